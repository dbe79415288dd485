"""Tensors of several axes as products of thin factors: Tucker, tensor train and canonical (CP) decompositions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_compress.functional.factor import hosvd, svd

_BLOCK = 1 << 24  # entries of the products of factors that a CP sweep forms at a time
_PULL = 1e-6  # how strongly a CP sweep holds on to the factors before it, against near-singular systems


def along(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply one axis of a tensor by a matrix: ``Y[.., j, ..] = sum_i M[j, i] X[.., i, ..]``.

    Args:
        tensor: any shape.
        matrix: [m, n] with n the size of the axis.
        axis: which one.

    Returns:
        The tensor with size m on that axis.

    Examples:
        >>> along(torch.ones(2, 3), torch.ones(4, 3), axis=1).shape
        torch.Size([2, 4])
    """
    made: Tensor = torch.tensordot(matrix, tensor, dims=([1], [axis]))
    return made.movedim(0, axis)


def energy(tensor: Tensor) -> float:
    """Sum of squared moduli, in double precision.

    Examples:
        >>> energy(torch.tensor([3 + 4j, 1.0]))
        26.0
    """
    return float(_wide(tensor).abs().square().sum())


def tucker(
    tensor: Tensor,
    ranks: Sequence[int],
    axes: Sequence[int],
    *,
    start: Sequence[Tensor] | None = None,
    sweeps: int = 10,
) -> tuple[Tensor, list[Tensor]]:
    """Tucker decomposition on some axes: ``X ~ S x_1 U_1 ... x_q U_q`` with orthonormal columns in every ``U``.

    Starts from the leading singular vectors of the unfoldings (HOSVD), whose error is at most the sum of the tails of
    their singular values, and improves one basis after the other (HOOI); the error never rises.

    Args:
        tensor: any shape, real or complex.
        ranks: columns of every basis, each at most the size of its axis.
        axes: which axes get a basis.
        start: singular vectors that ``hosvd`` returned, if they are known.
        sweeps: HOOI sweeps at most; they end when a sweep gains less than 1e-4 of the error.

    Returns:
        Core, of the tensor's shape with ranks in place of the sizes of the axes, and bases [n_k, r_k]; in double
        precision.

    Examples:
        >>> core, (basis,) = tucker(torch.ones(3, 4, 5), ranks=[1], axes=[1])
        >>> core.shape, torch.allclose(along(core, basis, 1), torch.ones(3, 4, 5).double())
        (torch.Size([3, 1, 5]), True)

    Source: De Lathauwer et al. 2000, On the Best Rank-1 and Rank-(R1, R2, ..., RN) Approximation.
    """
    wide = _wide(tensor)
    whole = hosvd(wide, axes)[0] if start is None else start
    bases = [u[:, :r] for u, r in zip(whole, ranks, strict=True)]
    core = _projected(wide, bases, axes)
    cut = [k for k, axis in enumerate(axes) if bases[k].shape[1] < wide.shape[axis]]
    total, lost = energy(wide), energy(wide) - energy(core)
    for _ in range(sweeps if len(cut) > 1 else 0):  # one basis alone is optimal at once
        for k in cut:
            others = [j for j in range(len(axes)) if j != k]
            seen = _projected(wide, [bases[j] for j in others], [axes[j] for j in others])
            rows = seen.movedim(axes[k], 0).flatten(1)
            # Eigenvectors of the small Gram matrix: only the space of the leading ones matters here.
            found = torch.linalg.eigh(rows @ rows.mH)[1].flip(1)[:, : ranks[k]]
            if found.shape[1] == bases[k].shape[1]:
                bases[k] = found
        core = _projected(wide, bases, axes)
        before, lost = lost, total - energy(core)
        if before - lost <= 1e-4 * before:
            break
    return core, bases


def tucker_product(core: Tensor, bases: Sequence[Tensor], axes: Sequence[int]) -> Tensor:
    """The tensor that a Tucker decomposition stands for: ``S x_1 U_1 ... x_q U_q``.

    Args:
        core: S.
        bases: U_k [n_k, r_k].
        axes: the axis of each.

    Returns:
        The tensor.

    Examples:
        >>> tucker_product(torch.ones(1, 2), [torch.ones(3, 1)], axes=[0]).shape
        torch.Size([3, 2])
    """
    for basis, axis in zip(bases, axes, strict=True):
        core = along(core, basis, axis)
    return core


def _projected(tensor: Tensor, bases: Sequence[Tensor], axes: Sequence[int]) -> Tensor:
    """Coordinates in orthonormal bases."""
    return tucker_product(tensor, [u.mH for u in bases], axes)


def tensor_train(
    tensor: Tensor, ranks: Sequence[int] | None = None, *, energy_ratio: float = 1.0
) -> list[Tensor]:
    """Tensor train by one SVD per cut: ``X[i_1, .., i_d] = A_1[:, i_1, :] A_2[:, i_2, :] ... A_d[:, i_d, :]``.

    Every cut may lose an equal share ``(1 - energy_ratio) / (d - 1)`` of the energy, so that the whole loses at most
    ``1 - energy_ratio``.

    Args:
        tensor: two or more axes, real or complex.
        ranks: r_1 ... r_{d-1}; None takes the smallest that keep the energy.
        energy_ratio: in (0, 1], where no ranks are given.

    Returns:
        Cores [r_{k-1}, n_k, r_k] with r_0 = r_d = 1, in double precision.

    Examples:
        >>> [tuple(core.shape) for core in tensor_train(torch.ones(3, 4, 5), ranks=[2, 2])]
        [(1, 3, 2), (2, 4, 2), (2, 5, 1)]
        >>> [tuple(core.shape) for core in tensor_train(torch.ones(3, 4, 5), energy_ratio=0.999)]
        [(1, 3, 1), (1, 4, 1), (1, 5, 1)]

    Source: Oseledets 2011, Tensor-Train Decomposition, algorithm 1.
    """
    rest = _wide(tensor)
    allowed = (1 - energy_ratio) * energy(rest) / (tensor.dim() - 1)
    cores, rank = [], 1
    for k, size in enumerate(tensor.shape[:-1]):
        u, s, vh = svd(rest.reshape(rank * size, -1))
        if ranks is not None:
            kept = ranks[k]
            if kept > len(s):  # more than there can be: the rest is zeros
                more = kept - len(s)
                u, s, vh = pad(u, (0, more)), pad(s, (0, more)), pad(vh, (0, 0, 0, more))
        elif energy_ratio >= 1:
            kept = len(s)
        else:
            left = s.square().flip(0).cumsum(0).flip(0)
            kept = max(1, int((left > allowed * (1 + 1e-12)).sum()))
        cores.append(u[:, :kept].reshape(rank, size, kept))
        rest, rank = s[:kept, None] * vh[:kept], kept
    cores.append(rest.reshape(rank, -1, 1))
    return cores


def train_product(cores: Sequence[Tensor]) -> Tensor:
    """The tensor that a tensor train stands for.

    Args:
        cores: [r_{k-1}, n_k, r_k].

    Returns:
        [n_1, .., n_d].

    Examples:
        >>> train_product([torch.ones(1, 3, 2), torch.ones(2, 4, 1)])[0]
        tensor([2., 2., 2., 2.])
    """
    made = cores[0]
    for core in cores[1:]:
        made = torch.tensordot(made, core, dims=1)
    return made.squeeze(0).squeeze(-1)


def canonical(
    tensor: Tensor, rank: int, *, sweeps: int = 200, tolerance: float = 2e-5, seed: int = 0
) -> list[Tensor]:
    """Canonical (CP) decomposition by alternating least squares: ``X ~ sum_r a_r o b_r o ... o z_r``.

    Starts from the leading singular vectors of the unfoldings; columns beyond their number are drawn. One sweep solves
    for each factor in turn, ``A = (X_(k) conj(K) + m A_old) (K^T conj(K) + m I)^-1`` with K the Khatri-Rao product of
    the others; the small m makes near-singular systems harmless, and the error still never rises.

    Args:
        tensor: two or more axes, real or complex.
        rank: number of terms, 1 or more.
        sweeps: at most.
        tolerance: stop when a sweep gains less than this share of the error.
        seed: of the drawn columns.

    Returns:
        Factors [n_k, rank] in double precision; the columns of one term have equal norms, terms in falling order.

    Examples:
        >>> factors = canonical(torch.ones(3, 4, 5), rank=1)
        >>> torch.allclose(canonical_product(factors), torch.ones(3, 4, 5).double())
        True

    Source: Carroll & Chang 1970; Harshman 1970; Li, Kindermann & Navasca 2013 (the proximal term).
    """
    wide = _wide(tensor)
    total = energy(wide)
    if total == 0:
        return [wide.new_zeros(size, rank) for size in wide.shape]
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for u in hosvd(wide, range(wide.dim()))[0]:
        drawn = torch.randn(u.shape[0], rank, dtype=u.dtype, generator=generator)
        factors.append(torch.cat([u, drawn / math.sqrt(u.shape[0])], 1)[:, :rank])
    middle = wide.dim() // 2
    halves = list(range(middle)), list(range(middle, wide.dim()))
    lost = math.inf
    for _ in range(sweeps):
        for half in halves:
            through = _seen_through(wide, factors, half)
            for k in half:
                known = through
                for place, j in reversed(list(enumerate(half))):
                    if j != k:
                        known = (known.movedim(place, -2) * factors[j].conj()).sum(-2)
                system = _gram_of_terms([f for j, f in enumerate(factors) if j != k])
                pull = _PULL * float(system.diagonal().real.mean())
                system = system + pull * torch.eye(rank, dtype=system.dtype)
                factors[k] = torch.linalg.solve(system, known + pull * factors[k], left=False)
        cross = float((known * factors[-1].conj()).sum().real)
        before, lost = lost, (total - 2 * cross + float(_gram_of_terms(factors).sum().real)) / total
        _even(factors)
        if before - lost <= tolerance * lost or lost < 1e-14:
            break
    order = factors[0].abs().square().sum(0).argsort(descending=True)
    return [f[:, order] for f in factors]


def canonical_product(factors: Sequence[Tensor]) -> Tensor:
    """The tensor that a canonical decomposition stands for: ``sum_r a_r o b_r o ... o z_r``.

    Args:
        factors: [n_k, rank].

    Returns:
        [n_1, .., n_d].

    Examples:
        >>> canonical_product([torch.ones(2, 3), torch.ones(4, 3)])[0]
        tensor([3., 3., 3., 3.])
    """
    made = factors[0]
    for factor in factors[1:-1]:
        made = made[..., None, :] * factor
    return made @ factors[-1].mT


def _gram_of_terms(factors: Sequence[Tensor]) -> Tensor:
    """Inner products of the terms: the entry-wise product of ``A^T conj(A)``."""
    made = factors[0].mT @ factors[0].conj()
    for factor in factors[1:]:
        made = made * (factor.mT @ factor.conj())
    return made


def _seen_through(tensor: Tensor, factors: Sequence[Tensor], kept: Sequence[int]) -> Tensor:
    """The tensor contracted with ``conj(A_j)`` on all other axes, term by term: [n_k of the kept axes, rank]."""
    others = [j for j in range(tensor.dim()) if j not in kept]
    sizes = [tensor.shape[k] for k in kept]
    matrix = tensor.permute(*kept, *others).reshape(math.prod(sizes), -1)
    parts = []
    for first in range(0, factors[0].shape[1], block := max(1, _BLOCK // matrix.shape[1])):
        terms = factors[others[0]][:, first : first + block].conj()
        for j in others[1:]:
            terms = (terms[:, None] * factors[j][:, first : first + block].conj()).flatten(0, 1)
        parts.append(matrix @ terms)
    return torch.cat(parts, 1).reshape(*sizes, -1)


def _even(factors: list[Tensor]) -> None:
    """Give the columns of one term equal norms, in place."""
    norms = [torch.linalg.vector_norm(f, dim=0) for f in factors]
    mean = torch.stack([n.clamp_min(1e-300).log() for n in norms]).mean(0).exp()
    for k, norm in enumerate(norms):
        factors[k] = factors[k] * (mean / norm.clamp_min(1e-300))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
