"""Schemes that see a weight as one matrix per group, cut by its SVD; those of linear layers and embeddings."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.functional.factor import balanced, rank_from_energy, svd, tails, whitening
from lightning_compress.lowrank.factors import Factors, like, replaced
from lightning_compress.lowrank.schemes import Decomposition, Ranks, Scheme, Shapes
from lightning_compress.stats import Stats
from lightning_compress.targets import Target, plain_class


def same_forward(layer: nn.Module, kinds: Sequence[type[nn.Module]]) -> str | None:
    """Why a layer cannot be replaced by layers of these kinds: "" if it is of no such kind, None if it can."""
    base = next((k for k in kinds if isinstance(layer, k)), None)
    if base is None:
        return ""
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "the attention around it multiplies its weight itself"
    kind = plain_class(layer)
    inherited = (getattr(kind, f, None) is getattr(base, f, None) for f in ("forward", "_conv_forward"))
    return None if all(inherited) else f"{kind.__name__} has a forward of its own"


class _Svd(Decomposition):
    """Best rank-r product ``A B`` of each of the matrices [g, m, n], in the norm of ``W root``."""

    def __init__(self, scheme: MatrixScheme, target: Target, gram: Tensor | None, damping: float) -> None:
        weight = target.weight.detach().cpu()
        self.scheme, self.layer = scheme, target.module
        self.shape, self.dtype = weight.shape, weight.dtype
        matrices = scheme.matrices(target.module, weight)
        self.inverse = None
        if gram is not None:
            root, self.inverse = whitening(gram.cpu(), damping)
            matrices = matrices.to(root.dtype) @ root
        self.u, self.s, self.vh = svd(matrices)
        self.lost = tails(self.s)
        self.full = (self.s.shape[-1],)

    def error(self, ranks: Ranks) -> float:
        return float(self.lost[ranks[0]])

    def at_energy(self, ratio: float) -> Ranks:
        return (rank_from_energy(self.lost, ratio),)

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        first, second = self.scheme.weights(self.layer, self.shape, *self._factors(ranks))
        pair = {"first.weight": first, "second.weight": second}
        return {name: w.contiguous().to(self.dtype) for name, w in pair.items()}

    def product(self, ranks: Ranks) -> Tensor:
        a, b = self._factors(ranks)
        return self.scheme.weight_like(self.layer, self.shape, a @ b)

    def _factors(self, ranks: Ranks) -> tuple[Tensor, Tensor]:
        a, b = balanced(self.u, self.s, self.vh, ranks[0])
        return (a, b) if self.inverse is None else (a, b @ self.inverse)


class MatrixScheme(Scheme):
    """A scheme of two layers whose weights are the factors A B of one matrix per group."""

    def full(self, layer: Any, weight: Tensor) -> Ranks:
        """R = min(m, n)."""
        return (min(self.matrices(layer, weight).shape[-2:]),)

    def params(self, layer: Any, weight: Tensor, ranks: Ranks) -> int:
        """``g r (m + n)``; twice that for complex weights."""
        groups, m, n = self.matrices(layer, weight).shape
        return groups * ranks[0] * (m + n) * (2 if weight.is_complex() else 1)

    def decompose(self, target: Target, seen: Stats | None, damping: float) -> Decomposition:
        """SVD of the matrices, whitened by the inputs if they have been seen."""
        gram = None if seen is None or not self.gram else self.inputs(target, seen)
        return _Svd(self, target, gram, damping)

    def merge(self, factors: Factors) -> nn.Module:
        """One layer of the original type with the product of the factors; the bias Parameter moves over."""
        first, second = factors.get_submodule("first"), factors.get_submodule("second")
        layer: Any = self.dense(first, second)
        with torch.no_grad():
            a, b = (t.to(_wide(t)) for t in self.halves(first, second))
            layer.weight.copy_(self.weight_like(layer, layer.weight.shape, a @ b))
        layer.weight.requires_grad_(factors.get_parameter("first.weight").requires_grad)
        bias = second._parameters.get("bias")
        if bias is not None:
            layer.register_parameter("bias", bias)
        layer.train(factors.training)
        return cast(nn.Module, layer)

    @abstractmethod
    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        """The weight as [groups, m, n], n on the side of the inputs."""

    @abstractmethod
    def weight_like(self, layer: Any, shape: Sequence[int], matrices: Tensor) -> Tensor:
        """Inverse of ``matrices``."""

    @abstractmethod
    def weights(self, layer: Any, shape: Sequence[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the first and the second layer from A [g, m, r] and B [g, r, n]."""

    @abstractmethod
    def halves(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        """Inverse of ``weights``."""

    @abstractmethod
    def dense(self, first: Any, second: Any) -> nn.Module:
        """A layer of the original type without bias, its weight still to be filled."""

    def inputs(self, target: Target, seen: Stats) -> Tensor | None:
        """Gram matrix [g, n, n] of what the first layer will see, centred where the bias can make up for the mean."""
        if seen.gram is None:
            return None
        layer: Any = target.module
        # E[x x^H]; measured was X^H X
        gram = seen.gram.reshape(-1, *seen.gram.shape[-2:]).conj() / max(seen.rows, 1)
        if seen.input_mean is not None and layer._parameters.get("bias") is not None:
            means = self.means(layer, target.weight, seen.input_mean.to(gram))
            gram = gram - means[:, :, None] * means[:, None, :].conj()
        return gram

    def means(self, layer: Any, weight: Tensor, mean: Tensor) -> Tensor:
        """Mean inputs [g, D] in the order of the Gram matrix."""
        groups = getattr(layer, "groups", 1)
        return mean.expand(weight.shape).reshape(groups, -1, math.prod(weight.shape[1:]))[:, 0]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


class _Linear(MatrixScheme):
    """``W [out, in] = A B``: Linear(in, r) and Linear(r, out)."""

    name = "svd"

    def fits(self, target: Target) -> str | None:
        return same_forward(target.module, (nn.Linear,)) if target.param == "weight" else ""

    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        positions = sum(math.prod(given) // weight.shape[1] for given, _ in calls)
        return positions * ranks[0] * sum(weight.shape) * (4 if weight.is_complex() else 1)

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        return weight[None]

    def weight_like(self, layer: Any, shape: Sequence[int], matrices: Tensor) -> Tensor:
        return matrices[0]

    def weights(self, layer: Any, shape: Sequence[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return b[0], a[0]

    def halves(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        return second.weight[None], first.weight[None]

    def build(self, layer: Any, param: str, ranks: Ranks) -> nn.Module:
        first = nn.Linear(layer.in_features, ranks[0], bias=False, **like(layer))
        second = nn.Linear(ranks[0], layer.out_features, bias=False, **like(layer))
        kind = plain_class(layer).__name__
        return replaced(layer, Factors(type(self).__name__, kind, "second", first=first, second=second))

    def dense(self, first: Any, second: Any) -> nn.Module:
        return nn.Linear(first.in_features, second.out_features, bias=False, **like(first))


class _Embedding(MatrixScheme):
    """``W [vocabulary, dim] = A B``: Embedding(vocabulary, r) and Linear(r, dim)."""

    name = "svd"
    gram = False

    def fits(self, target: Target) -> str | None:
        layer: Any = target.module
        why = same_forward(layer, (nn.Embedding,))
        if why is None and (layer.max_norm is not None or layer.sparse):
            return "an embedding with max_norm or sparse gradients changes its rows by itself"
        return why

    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        return sum(math.prod(made) for _, made in calls) * ranks[0]

    def matrices(self, layer: Any, weight: Tensor) -> Tensor:
        return weight[None]

    def weight_like(self, layer: Any, shape: Sequence[int], matrices: Tensor) -> Tensor:
        return matrices[0]

    def weights(self, layer: Any, shape: Sequence[int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rows = a[0].clone()
        if layer.padding_idx is not None and not bool(layer.weight[layer.padding_idx].any()):
            rows[layer.padding_idx] = 0  # exactly, as the row of the padding is
        return rows, b[0].mT

    def halves(self, first: Any, second: Any) -> tuple[Tensor, Tensor]:
        return first.weight[None], second.weight.mT[None]

    def build(self, layer: Any, param: str, ranks: Ranks) -> nn.Module:
        first = nn.Embedding(
            layer.num_embeddings, ranks[0], **like(layer, "padding_idx", "scale_grad_by_freq")
        )
        second = nn.Linear(ranks[0], layer.embedding_dim, bias=False, **like(layer))
        kind = plain_class(layer).__name__
        return replaced(layer, Factors(type(self).__name__, kind, "second", first=first, second=second))

    def dense(self, first: Any, second: Any) -> nn.Module:
        options = like(first, "padding_idx", "scale_grad_by_freq")
        return nn.Embedding(first.num_embeddings, second.out_features, **options)


MATRIX_SCHEMES: tuple[Scheme, ...] = (_Linear(), _Embedding())
