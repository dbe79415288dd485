"""What a model costs: parameters, zeros, stored bits and multiply-adds per layer. Counted, never timed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import codes, tables
from lightning_compress.names import clean
from lightning_compress.stats.running import Operations, call, observing, unwrap
from lightning_compress.targets import find, own_parameters, plain_class

UNKNOWN = float("nan")


@dataclass(frozen=True)
class LayerCost:
    """Counts of one layer.

    Args:
        name: layer name, "" for the model itself.
        kind: class of the layer.
        params: real numbers; a complex entry is two.
        elements: entries; a complex entry is one.
        zeros: entries that are exactly 0.
        masked: zeros at places where a mask code, which the weight respects, says so.
        bits: counted storage bits: of the code where a weight respects one, otherwise dense in the weight's
            dtype.
        macs: multiply-adds for the given input; NaN when no input was given.
        calls: how often the layer ran.
        fft_macs: the part of ``macs`` spent in Fourier transforms.
    """

    name: str
    kind: str
    params: int
    elements: int
    zeros: int
    masked: int
    bits: int
    macs: float
    calls: int
    fft_macs: float = 0

    @property
    def flops(self) -> float:
        """Floating-point operations: ``2 * macs``."""
        return 2 * self.macs

    @property
    def sparsity(self) -> float:
        """Share of zeros; 0 for a layer without parameters."""
        return self.zeros / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Cost:
    """Counts of a model: the sums over its layers; see ``LayerCost`` for what is counted.

    Args:
        layers: one entry per layer that owns parameters or does counted arithmetic, in the order of
            ``model.named_modules()``.
    """

    layers: tuple[LayerCost, ...]

    @property
    def params(self) -> int:
        """Real numbers; a complex entry is two."""
        return sum(layer.params for layer in self.layers)

    @property
    def elements(self) -> int:
        """Entries; a complex entry is one."""
        return sum(layer.elements for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Entries that are exactly 0."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def nonzero(self) -> int:
        """Entries that are not 0."""
        return self.elements - self.zeros

    @property
    def masked(self) -> int:
        """Zeros that a mask code accounts for."""
        return sum(layer.masked for layer in self.layers)

    @property
    def accidental_zeros(self) -> int:
        """Zeros that no mask code accounts for, such as fresh biases."""
        return self.zeros - self.masked

    @property
    def sparsity(self) -> float:
        """Share of all entries that are 0, biases and norms included."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def bits(self) -> int:
        """Counted storage bits of all parameters, before entropy coding."""
        return sum(layer.bits for layer in self.layers)

    @property
    def macs(self) -> float:
        """Multiply-adds for the given input; NaN without one."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> float:
        """Floating-point operations: ``2 * macs``."""
        return 2 * self.macs

    @property
    def fft_share(self) -> float:
        """Share of the multiply-adds that Fourier transforms take; NaN when nothing was counted."""
        return sum(layer.fft_macs for layer in self.layers) / self.macs if self.macs else UNKNOWN

    def rows(self) -> list[dict[str, Any]]:
        """One dict per layer, plain JSON values but for NaN where multiply-adds are unknown."""
        return [{**vars(layer), "flops": layer.flops, "sparsity": layer.sparsity} for layer in self.layers]

    def __str__(self) -> str:
        header = ["layer", "type", "params", "zeros", "sparsity", "bits", "MACs", "calls"]
        body = [
            [layer.name or "(model)", layer.kind, *(getattr(layer, c) for c in _COLUMNS), layer.calls]
            for layer in self.layers
        ]
        total = ["total", "", *(getattr(self, c) for c in _COLUMNS), None]
        return tables.text(header, [*body, total])


_STORAGE = ("params", "elements", "zeros", "masked", "bits")
_COLUMNS = ("params", "zeros", "sparsity", "bits", "macs")


def cost(model: nn.Module, x: Any = None) -> Cost:
    """Count parameters, zeros, storage bits and multiply-adds; nothing is timed.

    One forward pass in eval mode is watched operation by operation; model and global random state stay as
    they were.

    - Matrix product of [n, k] and [k, m]: ``n k m``. Convolution: output positions (transposed: input
      positions) times ``C_out C_in / groups`` times kernel size. Attention: both products, masked positions
      included.
    - A complex multiply-add is 4.
    - Fourier transform over N points: ``5 N log2 N`` flops, half of that if its input or output is real; macs
      are half of the flops.
    - Element-wise work (activations, norms, additions, pooling) is not counted; except a complex weight
      multiplied entry by entry, which is all that a separable spectral layer does.

    Buffers are not counted. A shared parameter is counted at the first layer that holds it.

    Args:
        model: any module; wrappers of ``torch.compile`` and DDP are looked through.
        x: input: a tensor, a tuple of positional arguments or a dict of keyword arguments. Counts are for
            this whole batch. Without it multiply-adds are unknown (NaN).

    Returns:
        Counts per layer and in total; ``print`` shows a table.

    Raises:
        ValueError: a parameter has no shape yet (lazy layer).

    Examples:
        >>> counted = cost(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(1, 3, 4, 4))
        >>> counted.params, counted.macs
        (224, 3456)
    """
    model = unwrap(model)
    modules = {clean(name): module for name, module in model.named_modules()}
    holders = _holders(model, modules)
    counter = None if x is None else _count(model, x, modules, holders)
    attached = {key: code for key, _, _, code in codes.of(model)}
    sums: dict[str, Counter[str]] = {}
    for raw, parameter in own_parameters(model):
        key = clean(raw)
        sums.setdefault(holders[key], Counter()).update(_storage(parameter.detach(), attached.get(key)))
    layers = []
    for name, module in modules.items():
        macs = counter.macs[name] if counter else 0
        if name in sums or macs:
            held = sums.get(name, Counter())
            layers.append(
                LayerCost(
                    name,
                    plain_class(module).__name__,
                    **{field: held[field] for field in _STORAGE},
                    macs=macs if counter else UNKNOWN,
                    calls=counter.calls[name] if counter else 0,
                    fft_macs=counter.fft[name] if counter else UNKNOWN,
                )
            )
    return Cost(tuple(layers))


def _holders(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Full parameter name -> layer it is counted at, for every name of every parameter.

    A weight kept in an inner module belongs to the layer that a target names; lists of parameters and torch
    parametrizations are parts of their layer.
    """
    named = {t.key: t.name for t in find(model)}
    holders = {}
    for raw, _ in own_parameters(model, remove_duplicate=False):
        key = clean(raw)
        outer, inner, _ = f".{key}".partition(".parametrizations.")
        holder = outer[1:] if inner else key.rpartition(".")[0]
        while isinstance(modules.get(holder), nn.ParameterList | nn.ParameterDict):
            holder = holder.rpartition(".")[0]
        holders[key] = named.get(key, holder)
    return holders


def _storage(weight: Tensor, code: codes.Code | None) -> dict[str, int]:
    """The counts of one parameter that do not depend on an input."""
    if code is not None and not code.matches(weight):
        code = None
    elements = weight.numel()
    return {
        "params": elements * (2 if weight.is_complex() else 1),
        "elements": elements,
        "zeros": 0 if weight.is_meta else elements - int(torch.count_nonzero(weight)),
        "masked": elements - code.kept if isinstance(code, codes.Mask) else 0,
        "bits": weight.element_size() * 8 * elements if code is None else code.bits(weight),
    }


def _count(model: nn.Module, x: Any, modules: dict[str, nn.Module], holders: dict[str, str]) -> _Counter:
    """Run the model once and count, each operation at the innermost layer that runs."""
    storages: dict[int, list[str]] = {}
    for raw, parameter in own_parameters(model, remove_duplicate=False):
        if address := parameter.untyped_storage().data_ptr():  # 0 on the meta device
            storages.setdefault(address, []).append(holders[clean(raw)])
    counter = _Counter(storages)
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        if any(isinstance(m, nn.RNNBase) for m in modules.values()):
            # The fused kernels of recurrent layers hide their matrix products.
            backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
            for backend in backends:
                stack.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False
        for name, module in modules.items():
            enter = module.register_forward_pre_hook(lambda m, args, name=name: counter.enter(name))
            stack.callback(enter.remove)
            leave = module.register_forward_hook(lambda m, args, out: counter.leave())
            stack.callback(leave.remove)
        stack.enter_context(counter)
        call(model, x)
    return counter


class _Counter(Operations):  # type: ignore[no-untyped-call]
    """Multiply-adds of every tensor operation that runs inside, by layer.

    Args:
        storages: address of a parameter's storage -> layers that hold it.
    """

    def __init__(self, storages: dict[int, list[str]]) -> None:
        super().__init__()
        self.storages = storages
        self.running: list[str] = []
        self.macs: Counter[str] = Counter()
        self.fft: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def enter(self, name: str) -> None:
        """A layer begins its forward."""
        self.calls[name] += 1
        self.running.append(name)

    def leave(self) -> None:
        """The innermost layer has ended its forward."""
        self.running.pop()

    def wants(self, name: str) -> bool:
        """Operations with a formula."""
        return _kind(name) in _FORMULAS

    def seen(self, name: str, args: Any, result: Any) -> None:
        """Add its multiply-adds to the layer that does the work."""
        operands = [a for a in args if isinstance(a, Tensor)]
        held = [h for a in operands for h in self.storages.get(a.untyped_storage().data_ptr(), ())]
        if name == "mul" and not held:
            return
        macs = _FORMULAS[_kind(name)](args, result)
        layer = self._layer(held)
        self.macs[layer] += macs
        self.fft[layer] += macs if name.startswith("_fft") else 0

    def _layer(self, held: Iterable[str]) -> str:
        """The running layer, or one inside it whose weight it uses without a call (as attention does)."""
        here = self.running[-1] if self.running else ""
        inside = f"{here}." if here else ""
        return next((name for name in held if name != here and name.startswith(inside)), here)


def _kind(name: str) -> str:
    return "attention" if name.startswith("_scaled_dot_product_") else name


def _matmul(a: Tensor, b: Tensor) -> int:
    """[.., n, k] x [.., k, m], also with vectors."""
    return a.numel() * (b.shape[-1] if b.dim() > 1 else 1) * (4 if a.is_complex() else 1)


def _convolution(args: Any, result: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return int((x if transposed else result).numel() * weight[0].numel() * (4 if x.is_complex() else 1))


def _attention(args: Any, result: Any) -> int:
    query, key, value = args[:3]
    return int(query.numel() * key.shape[-2] + query[..., 0].numel() * value.shape[-2] * value.shape[-1])


def _bilinear(args: Any, result: Tensor) -> int:
    """For each output the form x W y: one multiply-add per entry of W and sample."""
    shapes = []
    for tensor, expand in zip(args[:3], args[3:6], strict=True):
        for dim in expand:
            tensor = tensor.unsqueeze(dim)
        shapes.append(tensor.shape)
    return math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


def fft_macs(flops_per_point: float, signal: Tensor, dims: Iterable[int]) -> int:
    """Multiply-adds of a Fourier transform, half of its flops: ``flops_per_point / 2 N log2(points)``.

    Args:
        flops_per_point: 5 for a complex transform, 2.5 for a real one.
        signal: what is transformed; the real side of a real transform, N entries.
        dims: transformed axes, with so many points together.

    Returns:
        Their number.

    Examples:
        >>> fft_macs(2.5, torch.zeros(3, 8), [1])
        90
    """
    points = math.prod(signal.shape[d] for d in dims)
    return round(flops_per_point / 2 * signal.numel() * math.log2(points)) if points else 0


def _entrywise(args: Any, result: Tensor) -> int:
    return 4 * result.numel() if all(isinstance(a, Tensor) and a.is_complex() for a in args[:2]) else 0


_FORMULAS: dict[str, Callable[[Any, Any], int]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm"), lambda args, _: _matmul(args[0], args[1])),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), lambda args, _: _matmul(args[1], args[2])),
    "linear": lambda args, _: _matmul(args[0], args[1].t()),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "attention": _attention,
    "_trilinear": _bilinear,
    "_fft_r2c": lambda args, _: fft_macs(2.5, args[0], args[1]),
    "_fft_c2r": lambda args, result: fft_macs(2.5, result, args[1]),
    "_fft_c2c": lambda args, _: fft_macs(5.0, args[0], args[1]),
    "mul": _entrywise,
}
