"""Real channel factors of spectral convolutions: they commute with the Fourier transform, which runs between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.lowrank.bases import BasisScheme
from lightning_compress.lowrank.factors import Factors
from lightning_compress.lowrank.operators import trained
from lightning_compress.lowrank.schemes import Ranks, Scheme, Shapes
from lightning_compress.spectral import dense_weight, set_weight, stored_modes
from lightning_compress.targets import Target, plain_class

_POINTWISE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SpectralFactors(Factors):
    """A real 1x1 convolution to fewer channels, a spectral convolution and a 1x1 convolution back, or one of them.

    The blocks of neural operators use it like the layer it replaces.

    Args:
        scheme: class name of the scheme that made it.
        kind: class name of the layer that was replaced.
        layers: ``spectral`` and ``first``, ``second`` or both, in the order they run.
    """

    spectral: Any

    def __init__(self, scheme: str, kind: str, **layers: nn.Module) -> None:
        super().__init__(scheme, kind, "spectral", **layers)

    def transform(self, x: Tensor, output_shape: Any = None) -> Tensor:
        """Resample a skip connection as the layer resamples its input.

        Args:
            x: [batch, channels, *sizes].
            output_shape: sizes that the layer is asked for, if any.

        Returns:
            x at the sizes of the layer's output.
        """
        resampled: Tensor = self.spectral.transform(x, output_shape=output_shape)
        return resampled

    @property
    def n_modes(self) -> Any:
        """Modes in use, in stored units; set in constructor units."""
        return self.spectral.n_modes

    @n_modes.setter
    def n_modes(self, modes: Any) -> None:
        self.spectral.n_modes = modes

    @property
    def max_n_modes(self) -> Any:
        """Modes stored."""
        return self.spectral.max_n_modes

    @max_n_modes.setter
    def max_n_modes(self, modes: Any) -> None:
        self.spectral.max_n_modes = modes

    @property
    def resolution_scaling_factor(self) -> Any:
        """Output size by input size, or None."""
        return self.spectral.resolution_scaling_factor

    @resolution_scaling_factor.setter
    def resolution_scaling_factor(self, factor: Any) -> None:
        self.spectral.resolution_scaling_factor = factor


def spectral_like(layer: Any, weight: Tensor) -> Any:
    """A spectral convolution as another one, with another weight, without bias; no random number is drawn.

    Args:
        layer: the other one.
        weight: dense, [in, out, *modes].

    Returns:
        The new layer.
    """
    from neuralop.layers.spectral_convolution import SpectralConv

    order = len(stored_modes(layer))
    with torch.random.fork_rng(devices=[]):
        made = SpectralConv(*weight.shape[:2], (1,) * order, bias=False, device=layer.device)
    for name in _SHARED:
        setattr(made, name, getattr(layer, name))
    made.max_n_modes, made._n_modes = list(layer.max_n_modes), list(layer.n_modes)
    made.__dict__.pop("bias")  # a plain None there keeps a Parameter out
    made.register_parameter("bias", None)
    set_weight(made, weight)
    made.weight.requires_grad_(trained(layer))
    return made.train(layer.training)


_SHARED = (
    "complex_data",
    "fno_block_precision",
    "rank",
    "implementation",
    "resolution_scaling_factor",
    "fft_norm",
)


class _RealChannelIn(BasisScheme):
    """``W[i, o, m] = sum V[i, r] G[r, o, m]`` with V real: a 1x1 convolution before the transform."""

    name = "channel_in"
    real = True
    separable = False

    def fits(self, target: Target) -> str | None:
        why = super().fits(target)
        layer: Any = target.module
        if why is None and layer.complex_data:
            return "a real channel factor would have to work on complex fields: use real_channel=False"
        if why is None and layer.fno_block_precision != "full":
            return (
                f"its transform runs in {layer.fno_block_precision!r} precision, real channel factors in full: "
                "use real_channel=False"
            )
        if why is None and len(stored_modes(layer)) > len(_POINTWISE):
            return "there is no 1x1 convolution of more than 3 dimensions: use real_channel=False"
        return why

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return (0,)

    def named(self, shape: Sequence[int], core: Tensor, bases: dict[int, Tensor]) -> dict[str, Tensor]:
        ones = (1,) * (core.dim() - 2)
        made = {"spectral.weight.tensor": core}
        if 0 in bases:
            made["first.weight"] = bases[0].mT.reshape(*bases[0].mT.shape, *ones)
        if 1 in bases:
            made["second.weight"] = bases[1].reshape(*bases[1].shape, *ones)
        return made

    def shapes(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> dict[str, tuple[int, ...]]:
        a, b = self._inner(layer, shape, ranks)
        return {"core": (a, b, *shape[2:])}

    def params(self, layer: Any, weight: Tensor, ranks: Ranks) -> int:
        """Two real numbers for every entry of the core, one for those of the real factors."""
        return super().params(layer, weight, ranks) + sum(self._pointwise(layer, weight.shape, ranks))

    def multiplications(self, layer: Any, shape: Sequence[int], ranks: Ranks, batch: int) -> int:
        return batch * math.prod(self.shapes(layer, shape, ranks)["core"])

    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        """The complex core at the modes in use, the real factors at every point."""
        first, second = self._pointwise(layer, weight.shape, ranks)
        points = ((given[0] * math.prod(given[2:]), made[0] * math.prod(made[2:])) for given, made in calls)
        at_points = sum(first * before + second * after for before, after in points)
        return super().macs(layer, weight, ranks, calls) + at_points

    def build(self, layer: Any, param: str, ranks: Ranks) -> nn.Module:
        weight, bias = dense_weight(layer), layer._parameters.get("bias")
        i, o = weight.shape[:2]
        a, b = self._inner(layer, weight.shape, ranks)
        axes = self.axes(layer, weight.dim())
        point = _POINTWISE[weight.dim() - 3]
        options: dict[str, Any] = {"bias": False, "dtype": weight.dtype.to_real()}
        parts: dict[str, Any] = {}
        if 0 in axes:
            parts["first"] = point(i, a, 1, device="meta", **options)  # meta: draws no random numbers
        parts["spectral"] = spectral_like(layer, weight.new_zeros(a, b, *weight.shape[2:]))
        if 1 in axes:
            parts["second"] = point(b, o, 1, device="meta", **options)
        made = SpectralFactors(type(self).__name__, plain_class(layer).__name__, **parts)
        for name in parts.keys() - {"spectral"}:
            nn.init.zeros_(parts[name].to_empty(device=weight.device).weight)
            parts[name].weight.requires_grad_(weight.requires_grad)
        if bias is not None:
            flat = nn.Parameter(bias.detach().reshape(-1), requires_grad=bias.requires_grad)
            list(made)[-1].register_parameter("bias", flat if 1 in axes else bias)
        return made.train(layer.training)

    def merge(self, factors: Any) -> nn.Module:
        """One spectral convolution with the product; a bias gets its shape back."""
        if not isinstance(factors, SpectralFactors):
            return super().merge(factors)
        inner = factors.spectral
        with torch.no_grad():
            weight = dense_weight(inner).to(torch.complex128)
            ones = (1,) * (weight.dim() - 2)
            if "first" in factors._modules:
                v = factors.get_parameter("first.weight").flatten(1).to(weight.dtype)
                weight = torch.einsum("ab...,ai->ib...", weight, v)
            if "second" in factors._modules:
                u = factors.get_parameter("second.weight").flatten(1).to(weight.dtype)
                weight = torch.einsum("ib...,ob->io...", weight, u)
            made = spectral_like(inner, weight.to(dense_weight(inner).dtype))
        last: Any = list(factors)[-1]
        bias = last._parameters.get("bias")
        if bias is not None:
            shaped = (
                bias if last is inner else nn.Parameter(bias.detach().reshape(-1, *ones), bias.requires_grad)
            )
            made.register_parameter("bias", shaped)
        merged: nn.Module = made
        return merged

    def _inner(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> tuple[int, int]:
        """Channels on both sides of the core."""
        inner = dict(zip(self.axes(layer, len(shape)), ranks, strict=True))
        return inner.get(0, shape[0]), inner.get(1, shape[1])

    def _pointwise(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> tuple[int, int]:
        """Numbers of the real factors before and after the transform."""
        (a, b), axes = self._inner(layer, shape, ranks), self.axes(layer, len(shape))
        return shape[0] * a if 0 in axes else 0, b * shape[1] if 1 in axes else 0


class _RealChannelOut(_RealChannelIn):
    """``W[i, o, m] = sum G[i, r, m] U[r, o]`` with U real: a 1x1 convolution after the transform."""

    name = "channel_out"

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return (1,)


class _RealChannel(_RealChannelIn):
    """``W[i, o, m] = sum V[i, a] G[a, b, m] U[b, o]`` with V and U real."""

    name = "channel"

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return (0, 1)


REAL_CHANNEL_SCHEMES: tuple[Scheme, ...] = (_RealChannelIn(), _RealChannelOut(), _RealChannel())
