"""Spectral convolutions that compute only the frequencies they keep: the same numbers in less time."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lightning_compress.functional.fourier import (
    faster,
    partial_fftn,
    partial_ifftn,
    partial_irfftn,
    partial_rfftn,
)
from lightning_compress.names import clean
from lightning_compress.plans import Plan
from lightning_compress.pruning.operators import left_alone
from lightning_compress.spectral import is_spectral, spectral_layers
from lightning_compress.stats import Calibration
from lightning_compress.targets import plain_class
from lightning_compress.transform import Transform

_CLASSES: dict[type, type] = {}


@dataclass(frozen=True)
class PartialFourier(Transform):
    """Let spectral convolutions of neuraloperator compute only the frequencies that they multiply.

    Of n frequencies an axis, a layer keeps k. Full FFTs compute them all, shift them, and transform back mostly zeros;
    products with [n, k] matrices of cosines and sines leave these out. The outputs are the same up to rounding, so are
    gradients, and no tensor of the model changes. Where a layer keeps so many that the FFT is faster it still takes the
    FFT: decided at every call from the sizes (``functional.fourier.faster``).

    A changed layer is the same object of a subclass of its class, with its parameters under their keys. The more modes
    are cut (``TruncateModes``), the more it saves.

    Args:
        include: patterns of layer names to change.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: a pattern fits no layer.

    Examples:
        >>> from neuralop.models import FNO
        >>> net = FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=4, n_layers=1)
        >>> quick, x = compress(net, [PartialFourier()]).model, torch.randn(1, 1, 32, 32)
        >>> torch.allclose(quick(x), net(x), atol=1e-6), list(quick.state_dict()) == list(net.state_dict())
        (True, True)

    Source: Markel 1971, FFT Pruning; Sorensen and Burrus 1993, Efficient Computation of the DFT with Only a Subset of
        Input or Output Points.
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    structural: ClassVar[bool] = True

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """List the layers; writes nothing.

        Args:
            model: any module.
            data: not used.

        Returns:
            Layer name -> class. The plan is an identity: no tensor changes.

        Raises:
            ValueError: a pattern fits no layer.
        """
        found = spectral_layers(model, self.include, self.exclude)
        skipped = left_alone(model, found, self.include, self.exclude)
        layers: dict[str, dict[str, Any]] = {}
        already = False
        for name, layer in found.items():
            why = _refusal(layer)
            if _is_partial(layer):
                already, why = True, "it computes only the frequencies it keeps already"
            if why:
                skipped[name] = why
            else:
                layers[name] = {"class": plain_class(layer).__name__}
        return Plan(layers, skipped, identity=already or bool(layers))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Give the layers their subclass, in place.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model has no such layer; nothing is changed then.
        """
        modules = {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}
        for name in plan.layers:
            layer = modules.get(name)
            if layer is None or not is_spectral(layer):
                raise ValueError(
                    f"the plan changes {name}, which is not a spectral convolution of this model: "
                    "apply it to the architecture it was made for."
                )
            why = _refusal(layer)
            if why:
                raise ValueError(f"{name} cannot compute a part of its frequencies: {why}.")
        for name in plan.layers:
            if not _is_partial(modules[name]):
                _become(modules[name])


def _is_partial(layer: nn.Module) -> bool:
    return any("_partial_fourier" in vars(kind) for kind in type(layer).__mro__)


def _refusal(layer: Any) -> str | None:
    if layer.fno_block_precision != "full":
        return f"its spectrum is computed in {layer.fno_block_precision} precision, its products would be in full"
    if "forward" in vars(layer):
        return "it has a forward of its own"
    return None


def _become(layer: nn.Module) -> None:
    """A class that stands in for the layer's own, such as one with quantizers, is made again above the partial one."""
    make, (base, *rest) = cast("tuple[Callable[..., nn.Module], Any]", layer.__reduce_ex__(2)[:2])
    layer.__class__ = type(make(_class(base), *rest))


def _class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass whose forward computes a part of the frequencies."""
    if base not in _CLASSES:
        body = {
            "__doc__": f"{base.__name__} that computes only the frequencies it keeps.",
            "__module__": __name__,
            "__reduce_ex__": _reduce,
            "_plain_class": getattr(base, "_plain_class", base),
            "_partial_fourier": base,
            "forward": _forward(base),
        }
        _CLASSES[base] = _Kind(f"Partial{base.__name__}", (base,), body)
    return cast("type[nn.Module]", _CLASSES[base])


class _Kind(type):
    """Type of the subclasses, which pickle cannot find by name."""


def _reduce_class(cls: _Kind) -> Any:
    base = vars(cls).get("_partial_fourier")
    return cls.__qualname__ if base is None else (_class, (base,))


copyreg.pickle(_Kind, _reduce_class)


def _forward(base: Any) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, output_shape: Sequence[int] | None = None) -> Tensor:
        given, real = tuple(x.shape[2:]), not self.complex_data
        if len(given) != self.order:
            return cast(Tensor, base.forward(self, x, output_shape))
        spectrum = (*given[:-1], given[-1] // 2 + 1) if real else given
        weight = self.weight[_rows(self, spectrum)]
        kept, sizes = tuple(weight.shape)[-self.order :], _sizes(self, given, output_shape)
        fits = all(1 <= k <= n for k, n in zip(kept, spectrum, strict=True))
        if not fits or not faster(given, kept, sizes, real=real):
            return cast(Tensor, base.forward(self, x, output_shape))
        there, back = (partial_rfftn, partial_irfftn) if real else (partial_fftn, partial_ifftn)
        product = self._contract(there(x, kept, self.fft_norm), weight, separable=self.separable)
        # In single precision, as in the FFT's place; the sum in place, since nothing else holds the result.
        out = back(product.to(torch.cfloat), sizes, self.fft_norm, given)
        return out if self.bias is None else out.add_(self.bias)

    return forward


def _rows(layer: Any, spectrum: Sequence[int]) -> tuple[slice, ...]:
    """The part of the weight that neuraloperator takes for a spectrum of these sizes."""
    rows = [slice(None)] * (1 if layer.separable else 2)
    for axis, (size, used, most) in enumerate(zip(spectrum, layer.n_modes, layer.max_n_modes, strict=True)):
        unused = most - min(size, used)
        whole = axis == len(spectrum) - 1 and not layer.complex_data
        first = 0 if whole else unused // 2
        rows.append(slice(first, first - unused if unused else None))
    return tuple(rows)


def _sizes(layer: Any, given: Sequence[int], output_shape: Sequence[int] | None) -> tuple[int, ...]:
    if output_shape is not None:
        return tuple(output_shape)
    if layer.resolution_scaling_factor is None:
        return tuple(given)
    return tuple(round(n * factor) for n, factor in zip(given, layer.resolution_scaling_factor, strict=True))


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base = cast(Any, type(self))._partial_fourier
    return _rebuild, (base,), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _class(base)
    return cls.__new__(cls)
