"""Schemes of spectral convolutions that end in neuraloperator's own factorized tensors: Tucker, CP, tensor train."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.tensors import (
    canonical,
    canonical_product,
    energy,
    tensor_train,
    train_product,
)
from lightning_compress.lowrank.bases import BasisScheme, smallest, thinned
from lightning_compress.lowrank.operators import SpectralScheme
from lightning_compress.lowrank.schemes import Decomposition, Ranks, Scheme, equal_shares
from lightning_compress.spectral import dense_weight, set_weight
from lightning_compress.stats import Stats
from lightning_compress.targets import Target


class _Tensorized(SpectralScheme):
    """The weight becomes a tensor of neuraloperator's, which its layer contracts as it would its own."""

    gram = False

    @abstractmethod
    def tensor(self, factors: Sequence[nn.Parameter]) -> nn.Module:
        """The factorized tensor of these Parameters, given in the order of ``shapes``."""

    @abstractmethod
    def letters(self, axes: str) -> list[str]:
        """Index letters of the factors in that order; lower-case ones are those of the weight's axes."""

    def build(self, layer: Any, param: str, ranks: Ranks) -> nn.Module:
        """The layer itself."""
        weight = dense_weight(layer)
        shapes = self.shapes(layer, weight.shape, ranks).values()
        zeros = [torch.zeros(s, dtype=weight.dtype, device=weight.device) for s in shapes]
        set_weight(layer, self.tensor([nn.Parameter(z, weight.requires_grad) for z in zeros]))
        layer.factorization, layer.implementation, layer.rank = self.name, "factorized", layer.weight.rank
        built: nn.Module = layer
        return built

    def multiplications(self, layer: Any, shape: Sequence[int], ranks: Ranks, batch: int) -> int:
        """In the cheapest order, which neuraloperator searches too; products without a sum only with a factor."""
        import opt_einsum  # type: ignore[import-untyped]

        axes = "cdefgh"[: len(shape)] if layer.separable else "bcdefgh"[: len(shape)]
        x, out = ("a" + axes,) * 2 if layer.separable else ("a" + axes[0] + axes[2:], "a" + axes[1:])
        shapes = list(self.shapes(layer, shape, ranks).values())
        equation = f"{','.join([x, *self.letters(axes)])}->{out}"
        sizes = dict(zip("a" + axes, (batch, *shape), strict=True))
        given = [tuple(sizes[letter] for letter in x), *shapes]
        _, found = opt_einsum.contract_path(equation, *given, shapes=True, optimize="optimal")
        sizes = found.size_dict
        factors = [False] + [True] * len(shapes)
        total = 0
        for positions, summed, step, _, blas in found.contraction_list:
            held = [factors.pop(p) for p in sorted(positions, reverse=True)]
            factors.append(False)
            product = (blas and "EINSUM" not in blas) or any(sizes[letter] > 1 for letter in summed)
            if product or any(held):
                total += math.prod(sizes[letter] for letter in set(step) & sizes.keys())
        return total


class _Tucker(_Tensorized, BasisScheme):
    """``W[i, o, m..] = sum S[a, b, c..] U_1[i, a] U_2[o, b] U_3[m, c] ..``."""

    name = "tucker"
    gram = False

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return tuple(range(order))

    def named(self, shape: Sequence[int], core: Tensor, bases: dict[int, Tensor]) -> dict[str, Tensor]:
        return {"weight.core": core} | {f"weight.factors.factor_{k}": u for k, u in bases.items()}

    def shapes(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> dict[str, tuple[int, ...]]:
        return {"core": ranks} | {
            f"factor_{k}": pair for k, pair in enumerate(zip(shape, ranks, strict=True))
        }

    def letters(self, axes: str) -> list[str]:
        ranks = axes.upper()
        return [ranks, *(axis + rank for axis, rank in zip(axes, ranks, strict=True))]

    def tensor(self, factors: Sequence[nn.Parameter]) -> nn.Module:
        from tltorch import TuckerTensor

        made: nn.Module = TuckerTensor(factors[0], list(factors[1:]))
        return made


class _Train(_Tensorized):
    """``W[i, o, m..] = A_1[i, a] A_2[a, o, b] A_3[b, m, c] ..``."""

    name = "tt"

    def full(self, layer: Any, weight: Tensor) -> Ranks:
        """The smaller of both sides at every cut."""
        cuts = [math.prod(weight.shape[:k]) for k in range(1, weight.dim())]
        return tuple(min(left, weight.numel() // left) for left in cuts)

    def decompose(self, target: Target, seen: Stats | None, damping: float) -> Decomposition:
        """TT-SVD."""
        return _TrainCut(self.full(target.module, target.weight), target.weight)

    def shapes(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> dict[str, tuple[int, ...]]:
        cuts = enumerate(zip(shape, pairwise((1, *ranks, 1)), strict=True))
        return {f"factor_{k}": (left, size, right) for k, (size, (left, right)) in cuts}

    def letters(self, axes: str) -> list[str]:
        ranks = "ABCDEFGHI"[: len(axes) + 1]
        return [left + axis + right for axis, (left, right) in zip(axes, pairwise(ranks), strict=True)]

    def tensor(self, factors: Sequence[nn.Parameter]) -> nn.Module:
        from tltorch import TTTensor

        made: nn.Module = TTTensor(list(factors))
        return made


class _Canonical(_Tensorized):
    """``W[i, o, m..] = sum w[r] A_1[i, r] A_2[o, r] A_3[m, r] ..``."""

    name = "cp"
    automatic = False

    def full(self, layer: Any, weight: Tensor) -> Ranks:
        """The rank that stores as many numbers as the dense weight."""
        return (math.ceil(weight.numel() / (sum(weight.shape) + 1)),)

    def decompose(self, target: Target, seen: Stats | None, damping: float) -> Decomposition:
        """Alternating least squares, when a rank is asked for."""
        return _CanonicalCut(self.full(target.module, target.weight), target.weight)

    def shapes(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> dict[str, tuple[int, ...]]:
        return {"weights": ranks} | {f"factor_{k}": (size, ranks[0]) for k, size in enumerate(shape)}

    def letters(self, axes: str) -> list[str]:
        return ["R", *(axis + "R" for axis in axes)]

    def tensor(self, factors: Sequence[nn.Parameter]) -> nn.Module:
        from tltorch import CPTensor

        made: nn.Module = CPTensor(factors[0], list(factors[1:]))
        return made


class _Cut(Decomposition):
    """A decomposition that starts anew at every rank."""

    def __init__(self, full: Ranks, weight: Tensor) -> None:
        self.full, self.dtype = full, weight.dtype
        self.weight = weight.detach().cpu().to(torch.complex128)
        if not bool(torch.isfinite(self.weight).all()):
            raise ValueError("a weight to be factorized has entries that are not finite.")
        self.total = energy(self.weight)
        self.cuts: dict[Ranks, list[Tensor]] = {}
        self.errors: dict[Ranks, float] = {}

    @abstractmethod
    def solved(self, ranks: Ranks) -> list[Tensor]:
        """The factors."""

    def factors(self, ranks: Ranks) -> list[Tensor]:
        """The factors, kept until other ranks are asked for."""
        if ranks not in self.cuts:
            self.cuts = {ranks: self.solved(ranks)}
        return self.cuts[ranks]

    def error(self, ranks: Ranks) -> float:
        if ranks not in self.errors:
            left = energy(self.weight - self.product(ranks))
            self.errors[ranks] = left / self.total if self.total else 0.0
        return self.errors[ranks]

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        named = {f"weight.factors.factor_{k}": f for k, f in enumerate(self.factors(ranks))}
        return {name: f.contiguous().to(self.dtype) for name, f in named.items()}


class _TrainCut(_Cut):
    """TT-SVD."""

    def solved(self, ranks: Ranks) -> list[Tensor]:
        return tensor_train(self.weight, ranks)

    def product(self, ranks: Ranks) -> Tensor:
        return train_product(self.factors(ranks))

    def at_energy(self, ratio: float) -> Ranks:
        return tuple(core.shape[-1] for core in tensor_train(self.weight, energy_ratio=ratio)[:-1])

    def path(self) -> list[Ranks]:
        """At most 32 steps."""
        return thinned(equal_shares(self.full))


class _CanonicalCut(_Cut):
    """Alternating least squares."""

    def solved(self, ranks: Ranks) -> list[Tensor]:
        return canonical(self.weight, ranks[0])

    def product(self, ranks: Ranks) -> Tensor:
        return canonical_product(self.factors(ranks))

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        return {"weight.weights": torch.ones(ranks, dtype=self.dtype)} | super().tensors(ranks)

    def at_energy(self, ratio: float) -> Ranks:
        """On a growing grid first, because large ranks are slow, then by bisection; full rank if none is enough."""
        low, high = 1, self.full[0]
        for rank in (r for (r,) in self.path()):
            if self.error((rank,)) <= 1 - ratio:
                high = rank
                break
            low = min(rank + 1, self.full[0])
        return (smallest(low, high, lambda r: self.error((r,)) <= 1 - ratio),)

    def path(self) -> list[Ranks]:
        """Every rank twice the one before."""
        grid = [self.full[0]]
        while grid[-1] > 1:
            grid.append(math.ceil(grid[-1] / 2))
        return [(rank,) for rank in reversed(grid)]


TENSOR_SCHEMES: tuple[Scheme, ...] = (_Tucker(), _Canonical(), _Train())
