"""Penalties on singular values that make ranks small, each with its slope; and one on pairs of factors.

A penalty is a function ``sigma [.., R] -> value [..], slope [.., R]`` with ``slope_i = dP / d sigma_i``, at
``sigma_i = 0`` the subgradient 0. The gradient for the matrix ``W = U diag(sigma) V^H`` is then
``U diag(slope) V^H`` (Lewis 1996, Derivatives of Spectral Functions): nothing is differentiated through the
decomposition, so equal singular values do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Penalty = Callable[[Tensor], tuple[Tensor, Tensor]]


def nuclear(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Nuclear norm: ``P = sum sigma_i``.

    Args:
        sigma: [.., R], singular values >= 0.

    Returns:
        P [..] and dP/dsigma [.., R].

    Examples:
        >>> nuclear(torch.tensor([3.0, 2.0, 1.0, 0.0]))
        (tensor(6.), tensor([1., 1., 1., 0.]))

    Source: Fazel 2002, Matrix Rank Minimization with Applications.
    """
    return sigma.sum(-1), torch.ones_like(sigma).where(sigma > 0, 0)


def entropy(sigma: Tensor, distribution: str = "linear") -> tuple[Tensor, Tensor]:
    r"""Entropy of the spectrum: ``P = H = -sum p_i ln p_i``, the logarithm of the effective rank.

    "linear": ``p_i = sigma_i / sum sigma``, slope ``-(ln p_i + H) / sum sigma``. "softmax": ``p = softmax(sigma)``,
    slope ``-p_i (ln p_i + H)``.

    Args:
        sigma: [.., R], singular values >= 0.
        distribution: "linear" or "softmax".

    Returns:
        P [..] and dP/dsigma [.., R].

    Raises:
        ValueError: unknown distribution.

    Examples:
        >>> value, slope = entropy(torch.tensor([1.0, 1.0, 0.0]))
        >>> round(float(value.exp()), 6), slope.abs().max().item() < 1e-6
        (2.0, True)

    Source: Roy & Vetterli 2007, The Effective Rank.
    """
    if distribution not in ("linear", "softmax"):
        raise ValueError(f"distribution={distribution!r} is unknown; allowed: linear, softmax.")
    linear = distribution == "linear"
    total = _or_one(sigma.sum(-1, keepdim=True))
    shares = sigma / total if linear else sigma.softmax(-1)
    value = torch.special.entr(shares).sum(-1)
    logs = shares.where(shares > 0, 1).log()
    slope = -(logs + value[..., None]) * (1 / total if linear else shares)
    return value, slope.where(sigma > 0, 0)


def l1_l2(sigma: Tensor, squared: bool = False) -> tuple[Tensor, Tensor]:
    """Ratio of norms: ``P = |sigma|_1 / |sigma|_2``, between 1 and sqrt(R), or its square.

    Args:
        sigma: [.., R], singular values >= 0.
        squared: take the square.

    Returns:
        P [..], 0 for zeros, and dP/dsigma [.., R].

    Examples:
        >>> round(l1_l2(torch.tensor([3.0, 4.0]))[0].item(), 5), round(l1_l2(torch.ones(3), squared=True)[0].item(), 5)
        (1.4, 3.0)

    Source: Hoyer 2004, Non-negative Matrix Factorization with Sparseness Constraints; Yang et al. 2020, DeepHoyer
    (squared).
    """
    norm = _or_one(torch.linalg.vector_norm(sigma, dim=-1, keepdim=True))
    unit = sigma / norm
    value = unit.sum(-1, keepdim=True)
    slope = (1 - value * unit) / norm
    if squared:
        value, slope = value.square(), 2 * value * slope
    return value.squeeze(-1), slope.where(sigma > 0, 0)


def hoyer(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """One minus Hoyer's sparseness: ``P = 1 - (sqrt(R) - |sigma|_1 / |sigma|_2) / (sqrt(R) - 1)``, in [0, 1].

    Args:
        sigma: [.., R], singular values >= 0.

    Returns:
        P [..] and dP/dsigma [.., R]; 0 for zeros, and for R = 1, which leaves nothing to choose.

    Examples:
        >>> hoyer(torch.ones(4))[0].item(), hoyer(torch.tensor([5.0, 0.0, 0.0, 0.0]))[0].item()
        (1.0, 0.0)

    Source: Hoyer 2004, Non-negative Matrix Factorization with Sparseness Constraints.
    """
    root = math.sqrt(sigma.shape[-1])
    ratio, slope = l1_l2(sigma)
    if root == 1:
        return torch.zeros_like(ratio), torch.zeros_like(slope)
    return ((ratio - 1) / (root - 1)).clamp_min(0), slope / (root - 1)


def scad(sigma: Tensor, lam: float, a: float = 3.7) -> tuple[Tensor, Tensor]:
    r"""Smoothly clipped absolute deviation, which leaves large values alone: ``P = sum rho(sigma_i)``.

    ``rho(u) = lam u`` up to lam, ``(2 a lam u - u^2 - lam^2) / (2 (a - 1))`` up to a lam, ``(a + 1) lam^2 / 2``
    beyond.

    Args:
        sigma: [.., R], singular values >= 0.
        lam: > 0, in the unit of sigma; values beyond ``a lam`` are free.
        a: > 2.

    Returns:
        P [..] and dP/dsigma [.., R].

    Raises:
        ValueError: lam or a outside its range.

    Examples:
        >>> value, slope = scad(torch.tensor([9.0, 2.0, 0.5]), lam=1.0)
        >>> round(value.item(), 4), slope.tolist()
        (4.6648, [0.0, 0.6296296119689941, 1.0])

    Source: Fan & Li 2001, Variable Selection via Nonconcave Penalized Likelihood.
    """
    if lam <= 0 or a <= 2:
        raise ValueError(f"scad(lam={lam}, a={a}): allowed is lam > 0 and a > 2.")
    middle = (2 * a * lam * sigma - sigma.square() - lam**2) / (2 * (a - 1))
    beyond = torch.full_like(sigma, (a + 1) * lam**2 / 2)
    value = (lam * sigma).where(sigma <= lam, middle.where(sigma <= a * lam, beyond))
    slope = ((a * lam - sigma) / (a - 1)).clamp(0, lam)
    return value.sum(-1), slope.where(sigma > 0, 0)


def orthogonality(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far a pair of factors is from orthonormal: ``P = (|A A^H - I|_F^2 + |B^H B - I|_F^2) / r^2``.

    The gradients are ``4 (A A^H - I) A / r^2`` and ``4 B (B^H B - I) / r^2``.

    Args:
        first: A [.., r, n], what the input meets.
        second: B [.., m, r].

    Returns:
        P [..] and the gradients for A and B.

    Examples:
        >>> value, _, to_second = orthogonality(torch.eye(2), 2 * torch.eye(2))
        >>> value.item(), to_second.diagonal().tolist()
        (4.5, [6.0, 6.0])

    Source: Yang et al. 2020, Learning Low-rank Deep Neural Networks via Singular Vector Orthogonality Regularization
    and Singular Value Sparsification.
    """
    rank = first.shape[-2]
    eye = torch.eye(rank, dtype=first.dtype, device=first.device)
    off_first, off_second = first @ first.mH - eye, second.mH @ second - eye
    value = sum(off.abs().square().sum((-2, -1)) for off in (off_first, off_second)) / rank**2
    return torch.as_tensor(value), 4 * off_first @ first / rank**2, 4 * second @ off_second / rank**2


PENALTIES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "nuclear": nuclear,
    "entropy": entropy,
    "l1_l2": l1_l2,
    "hoyer": hoyer,
    "scad": scad,
}


def _or_one(norm: Tensor) -> Tensor:
    return norm.where(norm > 0, 1)
