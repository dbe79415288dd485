"""Schemes of convolutions: k x k to fewer channels and 1 x 1, or a column and a row; grouped and transposed too."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.connections import TRANSPOSED
from lightning_compress.lowrank.factors import Factors, like, replaced
from lightning_compress.lowrank.matrices import MatrixScheme, same_forward
from lightning_compress.lowrank.schemes import Ranks, Scheme, Shapes
from lightning_compress.stats import Stats
from lightning_compress.targets import Target, plain_class

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _fits(layer: Any, kinds: Sequence[type[nn.Module]]) -> str | None:
    """Why a layer is no convolution of these kinds that can be written as two."""
    why = same_forward(layer, kinds)
    if why is None and layer.groups == layer.in_channels and layer.groups > 1:
        return "a depth-wise convolution has one input channel for each output: nothing to factorize"
    return why


class _ConvolutionScheme(MatrixScheme):
    """What the three schemes share."""

    def build(self, layer: Any, param: str, ranks: Ranks) -> nn.Module:
        first, second = self.pair(layer, layer.groups * ranks[0])
        kind = plain_class(layer).__name__
        return replaced(layer, Factors(type(self).__name__, kind, "second", first=first, second=second))

    @abstractmethod
    def pair(self, layer: Any, inner: int) -> tuple[nn.Module, nn.Module]:
        """The two layers with this many channels between them."""


def _kind(layer: nn.Module) -> Any:
    """The class of torch that a layer's class comes from."""
    return next(k for k in (*_CONVOLUTIONS, *TRANSPOSED) if isinstance(layer, k))


class _Channel(_ConvolutionScheme):
    """``W [out, in k] = A B``: the original convolution to r channels, and a 1x1 convolution; per group."""

    name = "channel"

    def fits(self, target: Target) -> str | None:
        return _fits(target.module, _CONVOLUTIONS)

    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        per_position = self.params(layer, weight, ranks) * (2 if weight.is_complex() else 1)
        return sum(math.prod(made) // weight.shape[0] for _, made in calls) * per_position

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)

    def weight_like(self, layer: Any, shape: Sequence[int], matrices: Tensor) -> Tensor:
        return matrices.reshape(tuple(shape))

    def weights(self, layer: Any, shape: Sequence[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ones = (1,) * (len(shape) - 2)
        return b.reshape(-1, *shape[1:]), a.reshape(shape[0], -1, *ones)

    def halves(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        groups = first.groups
        rank, out = first.out_channels // groups, second.out_channels // groups
        return second.weight.reshape(groups, out, rank), first.weight.reshape(groups, rank, -1)

    def pair(self, layer: Any, inner: int) -> tuple[nn.Module, nn.Module]:
        kind = _kind(layer)
        first = kind(layer.in_channels, inner, bias=False, **like(layer, *_GEOMETRY))
        return first, kind(inner, layer.out_channels, 1, bias=False, **like(layer, "groups"))

    def dense(self, first: Any, second: Any) -> nn.Module:
        made: nn.Module = _kind(first)(
            first.in_channels, second.out_channels, bias=False, **like(first, *_GEOMETRY)
        )
        return made


class _Spatial(_ConvolutionScheme):
    """``W [out kw, in kh] = A B``: a kh x 1 convolution to r channels, and a 1 x kw convolution; per group.

    With inputs, the matrix is whitened by the mean Gram matrix of the columns of a patch, which leaves out how
    neighbouring columns go together.
    """

    name = "spatial"

    def fits(self, target: Target) -> str | None:
        layer: Any = target.module
        why = _fits(layer, _CONVOLUTIONS)
        if why is None and (not isinstance(layer, nn.Conv2d) or min(layer.kernel_size) == 1):
            return "the spatial scheme needs a 2-D kernel larger than 1 in both directions"
        if why is None and layer.padding_mode != "zeros":
            return f"the spatial scheme needs padding_mode='zeros', not {layer.padding_mode!r}"
        return why

    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        out, per_group, kh, kw = weight.shape
        column = ranks[0] * layer.groups * per_group * kh  # at rows of the output and columns of the input
        total = 0
        for given, made in calls:
            batch = math.prod(made) // (out * made[-1] * made[-2])
            total += batch * made[-2] * (given[-1] * column + made[-1] * ranks[0] * out * kw)
        return total * (4 if weight.is_complex() else 1)

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        out, per_group, kh, kw = weight.shape
        split = weight.reshape(layer.groups, out // layer.groups, per_group, kh, kw)
        return split.permute(0, 1, 4, 2, 3).reshape(layer.groups, -1, per_group * kh)

    def weight_like(self, layer: Any, shape: Sequence[int], matrices: Tensor) -> Tensor:
        out, per_group, kh, kw = shape
        split = matrices.reshape(layer.groups, out // layer.groups, kw, per_group, kh)
        return split.permute(0, 1, 3, 4, 2).reshape(out, per_group, kh, kw)

    def weights(self, layer: Any, shape: Sequence[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        out, per_group, kh, kw = shape
        second = a.reshape(layer.groups, out // layer.groups, kw, -1).transpose(2, 3)
        return b.reshape(-1, per_group, kh, 1), second.reshape(out, -1, 1, kw)

    def halves(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        groups, rank = first.groups, first.out_channels // first.groups
        a = second.weight.reshape(groups, second.out_channels // groups, rank, -1).transpose(2, 3)
        return a.reshape(groups, -1, rank), first.weight.reshape(groups, rank, -1)

    def inputs(self, target: Target, seen: Stats) -> Tensor | None:
        gram = super().inputs(target, seen)
        if gram is None:
            return None
        _, per_group, kh, kw = target.weight.shape
        n = per_group * kh
        return gram.view(-1, n, kw, n, kw).diagonal(dim1=2, dim2=4).mean(-1)

    def pair(self, layer: Any, inner: int) -> tuple[nn.Module, nn.Module]:
        sides = []
        for axis, (given, made) in enumerate(((layer.in_channels, inner), (inner, layer.out_channels))):
            one: dict[str, Any] = {
                name: tuple(v if i == axis else neutral for i, v in enumerate(getattr(layer, name)))
                for name, neutral in (("kernel_size", 1), ("stride", 1), ("dilation", 1))
            }
            padding = layer.padding
            if not isinstance(padding, str):
                padding = tuple(p if i == axis else 0 for i, p in enumerate(padding))
            sides.append(nn.Conv2d(given, made, bias=False, padding=padding, **one, **like(layer, "groups")))
        return sides[0], sides[1]

    def dense(self, first: Any, second: Any) -> nn.Module:
        geometry: dict[str, Any] = {
            name: (getattr(first, name)[0], getattr(second, name)[1])
            for name in ("kernel_size", "stride", "dilation")
        }
        padding = first.padding
        if not isinstance(padding, str):
            padding = (padding[0], second.padding[1])
        options = geometry | like(first, "groups")
        return nn.Conv2d(first.in_channels, second.out_channels, bias=False, padding=padding, **options)


class _Transposed(_ConvolutionScheme):
    """``W^T [out k, in] = A B``: a 1x1 convolution to r channels, and the transposed convolution; per group."""

    name = "channel"

    def fits(self, target: Target) -> str | None:
        return _fits(target.module, TRANSPOSED)

    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        per_position = self.params(layer, weight, ranks) * (2 if weight.is_complex() else 1)
        return sum(math.prod(given) // weight.shape[0] for given, _ in calls) * per_position

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1).mT

    def weight_like(self, layer: Any, shape: Sequence[int], matrices: Tensor) -> Tensor:
        return matrices.mT.reshape(tuple(shape))

    def weights(self, layer: Any, shape: Sequence[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ones = (1,) * (len(shape) - 2)
        return b.reshape(-1, shape[0] // layer.groups, *ones), a.mT.reshape(-1, *shape[1:])

    def halves(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        groups, rank = first.groups, first.out_channels // first.groups
        return second.weight.reshape(groups, rank, -1).mT, first.weight.reshape(groups, rank, -1)

    def inputs(self, target: Target, seen: Stats) -> Tensor | None:
        gram = super().inputs(target, seen)
        if gram is None:
            return None
        layer: Any = target.module
        n = target.weight.shape[0] // layer.groups
        taps = gram.shape[-1] // n
        return gram.view(-1, n, taps, n, taps).diagonal(dim1=2, dim2=4).mean(-1)

    def means(self, layer: Any, weight: Tensor, mean: Tensor) -> Tensor:
        return mean.expand(weight.shape[0], 1, *weight.shape[2:]).reshape(layer.groups, -1)

    def pair(self, layer: Any, inner: int) -> tuple[nn.Module, nn.Module]:
        point = _CONVOLUTIONS[len(layer.kernel_size) - 1]
        first = point(layer.in_channels, inner, 1, bias=False, **like(layer, "groups"))
        geometry = like(layer, "output_padding", *_GEOMETRY)
        return first, _kind(layer)(inner, layer.out_channels, bias=False, **geometry)

    def dense(self, first: Any, second: Any) -> nn.Module:
        geometry = like(second, "output_padding", *_GEOMETRY)
        made: nn.Module = _kind(second)(first.in_channels, second.out_channels, bias=False, **geometry)
        return made


CONVOLUTION_SCHEMES: tuple[Scheme, ...] = (_Channel(), _Spatial(), _Transposed())
