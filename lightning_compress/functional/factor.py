"""Products of two thin matrices: singular values, ranks, and factors that fit weights or outputs best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_DROPPED = 1e-10  # eigenvalues of a Gram matrix below this share of the largest carry no inputs


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition ``W = U diag(s) V^H`` in double precision, batched.

    Args:
        matrices: [.., m, n], real or complex, any floating dtype.

    Returns:
        U [.., m, R], s [.., R] in falling order, V^H [.., R, n], with R = min(m, n); float64 or complex128.

    Raises:
        ValueError: an entry is not finite.

    Examples:
        >>> svd(torch.diag(torch.tensor([1.0, 3.0])))[1].tolist()
        [3.0, 1.0]
    """
    if not bool(torch.isfinite(matrices).all()):
        raise ValueError("a matrix to be factorized has entries that are not finite.")
    wide = matrices.to(torch.complex128 if matrices.is_complex() else torch.float64)
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    return u, s, vh


def tails(s: Tensor) -> Tensor:
    """Share of the energy that is lost at every rank: ``e(r) = sum_{i>r} s_i^2 / sum s_i^2``.

    Args:
        s: singular values [.., R] in falling order; leading axes (groups of one rank) are summed.

    Returns:
        [R + 1] for r = 0 ... R, falling from 1 to 0; zeros for a matrix of zeros.

    Examples:
        >>> tails(torch.tensor([4.0, 2.0, 1.0, 1.0]))[2].item() * 22
        2.0
    """
    energy = s.double().square().reshape(-1, s.shape[-1]).sum(0)
    rest = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    return rest / rest[0] if float(rest[0]) > 0 else torch.zeros_like(rest)


def rank_from_ratio(ratio: float, full: int) -> int:
    """Share of full rank: ``r = ceil(ratio R)``, at least 1.

    Args:
        ratio: in (0, 1].
        full: R.

    Returns:
        The rank.

    Examples:
        >>> rank_from_ratio(0.5, 4), rank_from_ratio(0.3, 10)
        (2, 3)
    """
    return max(1, math.ceil(ratio * full - 1e-9))  # 0.3 * 10 is a little more than 3 in floating point


def rank_from_energy(lost: Tensor, ratio: float) -> int:
    """Smallest rank with so much of the energy: ``sum_{i<=r} s_i^2 >= ratio sum s_i^2``; ratio 1 gives R.

    Args:
        lost: what ``tails`` returned.
        ratio: in (0, 1].

    Returns:
        The rank, at least 1.

    Examples:
        >>> rank_from_energy(tails(torch.tensor([4.0, 2.0, 1.0, 1.0])), 0.9)
        2
    """
    full = len(lost) - 1
    if ratio >= 1:
        return full
    # Rounding of the sums must not ask for one more where the energy is met exactly.
    return max(1, int((lost > 1 - ratio + 1e-12).sum()))


def balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of rank r with equal shares of the scale: ``A = U_r sqrt(s_r)``, ``B = sqrt(s_r) V_r^H``.

    Args:
        u: [.., m, R].
        s: [.., R].
        vh: [.., R, n].
        rank: r.

    Returns:
        A [.., m, r] and B [.., r, n].

    Examples:
        >>> a, b = balanced(*svd(torch.tensor([[4.0, 0.0], [0.0, 1.0]])), rank=1)
        >>> (a @ b).round().tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]


def whitening(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Roots of the Gram matrix of inputs: ``G^(1/2)`` and ``G^(-1/2)`` with ``G + damping tr(G)/n I``.

    ``|W G^(1/2)|_F^2 = E |W x|^2``, so the best rank-r product for outputs is found in ``W G^(1/2)``.
    Directions with less than 1e-10 of the largest eigenvalue are left out.

    Args:
        gram: [.., n, n], Hermitian, positive semi-definite.
        damping: >= 0.

    Returns:
        The root and its pseudo-inverse, [.., n, n], in double precision.

    Raises:
        ValueError: an entry is not finite.

    Examples:
        >>> root, inverse = whitening(torch.diag(torch.tensor([4.0, 9.0])), damping=0.0)
        >>> root.diagonal().tolist(), inverse.diagonal()[0].item()
        ([2.0, 3.0], 0.5)

    Source: Zhang et al. 2016, Accelerating Very Deep Convolutional Networks; Wang et al. 2024, SVD-LLM.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix of the inputs has entries that are not finite.")
    wide = gram.to(torch.complex128 if gram.is_complex() else torch.float64)
    n = wide.shape[-1]
    trace = wide.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    eye = torch.eye(n, dtype=wide.dtype, device=wide.device)
    values, vectors = torch.linalg.eigh(wide + (damping * trace / n)[..., None, None] * eye)
    kept = values > _DROPPED * values[..., -1:].clamp_min(0)
    root = values.clamp_min(0).sqrt().where(kept, 0)
    inverse = root.reciprocal().where(kept, 0)
    return (vectors * root[..., None, :]) @ vectors.mH, (vectors * inverse[..., None, :]) @ vectors.mH


def hosvd(tensor: Tensor, axes: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Singular vectors and values of the unfoldings of a tensor along some axes (higher-order SVD).

    Args:
        tensor: any shape, real or complex.
        axes: which axes to unfold along.

    Returns:
        For each axis of size n: U [n, R] with R = min(n, product of the others), and s [R], in double precision.

    Examples:
        >>> bases, values = hosvd(torch.ones(3, 4, 5), axes=(0, 2))
        >>> [tuple(u.shape) for u in bases], round(float(values[0][0] ** 2))
        ([(3, 3), (5, 5)], 60)

    Source: De Lathauwer et al. 2000, A Multilinear Singular Value Decomposition.
    """
    bases, values = [], []
    for axis in axes:
        u, s, _ = svd(tensor.movedim(axis, 0).flatten(1))
        bases.append(u)
        values.append(s)
    return bases, values
