"""What all schemes of spectral convolutions share: which weights they take, what is counted, and the way back."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.lowrank.schemes import Ranks, Scheme, Shapes
from lightning_compress.spectral import dense_weight, is_factorized, is_spectral, set_weight
from lightning_compress.targets import Target


class SpectralScheme(Scheme):
    """A scheme of complex weights [in, out, *modes], or [channels, *modes] if separable.

    Attributes:
        separable: whether it can write separable weights.
    """

    separable: ClassVar[bool] = True

    def fits(self, target: Target) -> str | None:
        """Dense complex weights only."""
        layer: Any = target.module
        if not is_spectral(layer) or target.param.partition(".")[0] != "weight":
            return ""
        if is_factorized(layer):
            return "its weight is held as factors already: merge_factors first"
        if target.weight.dtype not in (torch.complex64, torch.complex128):
            return f"its weight is {target.weight.dtype}, and factors are complex64 or complex128: convert it first"
        if layer.separable and not self.separable:
            return f"a separable weight mixes no channels, so it has no scheme {self.name!r}: 'modes' has"
        return None

    @abstractmethod
    def shapes(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> dict[str, tuple[int, ...]]:
        """Shapes of the complex factors of a weight of this shape."""

    @abstractmethod
    def multiplications(self, layer: Any, shape: Sequence[int], ranks: Ranks, batch: int) -> int:
        """Complex multiply-adds of one call where the weight meets modes of this shape."""

    def params(self, layer: Any, weight: Tensor, ranks: Ranks) -> int:
        """Two real numbers for every complex entry."""
        return 2 * sum(math.prod(s) for s in self.shapes(layer, weight.shape, ranks).values())

    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        """Four for every complex multiply-add, at the modes that each input reaches."""
        channels = tuple(weight.shape[: 1 if layer.separable else 2])
        reached = [((*channels, *used_modes(layer, given[2:])), given[0]) for given, _ in calls]
        return 4 * sum(self.multiplications(layer, shape, ranks, batch) for shape, batch in reached)

    def merge(self, factors: Any) -> nn.Module:
        """The same layer with one dense weight, also where neuraloperator itself built the factors."""
        kept = trained(factors)
        with torch.no_grad():
            set_weight(factors, dense_weight(factors))
        factors.weight.requires_grad_(kept)
        layer: nn.Module = factors
        return layer


def trained(layer: Any) -> bool:
    """Whether any part of a spectral convolution's weight takes gradients.

    Args:
        layer: a spectral convolution.

    Returns:
        The flag.
    """
    weight = layer.weight
    held = [weight] if isinstance(weight, Tensor) else weight.parameters()
    return any(p.requires_grad for p in held)


def used_modes(layer: Any, size: Sequence[int]) -> tuple[int, ...]:
    """Modes of the weight that an input of this size reaches, per axis.

    Args:
        layer: a spectral convolution.
        size: n_1 ... n_d of the input.

    Returns:
        Sizes in stored units.
    """
    stored = layer.weight.shape[1 if layer.separable else 2 :]
    points = list(size)
    if not layer.complex_data:
        points[-1] = points[-1] // 2 + 1
    axes = zip(stored, points, layer.n_modes, layer.max_n_modes, strict=True)
    return tuple(held - (most - min(n, modes)) for held, n, modes, most in axes)
