"""Effective rank: how many directions a matrix really uses."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.functional.factor import rank_from_energy, svd, tails

KINDS = ("entropy", "energy", "stable", "numerical")


def entropy_rank(sigma: Tensor) -> Tensor:
    """Effective rank by entropy: ``exp(-sum p_i ln p_i)`` with ``p_i = s_i / sum s``.

    Args:
        sigma: [.., R], singular values >= 0.

    Returns:
        [..], between 1 and R; 0 where all are zero.

    Examples:
        >>> entropy_rank(torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
        [2.0, 0.0]

    Source: Roy & Vetterli 2007, The Effective Rank.
    """
    total = sigma.sum(-1)
    shares = sigma / total.where(total > 0, 1)[..., None]
    spread: Tensor = torch.special.entr(shares).sum(-1)
    return spread.exp().where(total > 0, 0)


def effective_rank(weight: Tensor, kind: str = "entropy", energy_ratio: float = 0.99) -> float:
    r"""Effective rank of a weight, seen as the matrix of its first axis and all others.

    With singular values s of ``W [m, n]``:

    - "entropy": ``exp(-sum p_i ln p_i)``, ``p_i = s_i / sum s``
    - "energy": smallest r with ``sum_{i<=r} s_i^2 >= energy_ratio sum s_i^2``
    - "stable": ``|W|_F^2 / s_1^2``
    - "numerical": number of ``s_i > max(m, n) eps s_1``, with eps of the weight's dtype

    Args:
        weight: two or more axes, real or complex.
        kind: which of the four.
        energy_ratio: for "energy", in (0, 1].

    Returns:
        The rank, a whole number for "energy" and "numerical"; 0 for a weight of zeros.

    Raises:
        ValueError: unknown kind, energy_ratio outside (0, 1], fewer than two axes, or an entry that is not finite.

    Examples:
        >>> weight = torch.diag(torch.tensor([2.0, 2.0, 1.0]))
        >>> [effective_rank(weight, kind) for kind in ("energy", "stable", "numerical")]
        [3.0, 2.25, 3.0]
        >>> effective_rank(weight, "energy", energy_ratio=0.8)
        2.0

    Source: Roy & Vetterli 2007, The Effective Rank (entropy); Rudelson & Vershynin 2007, Sampling from Large Matrices
    (stable).
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; allowed: {', '.join(KINDS)}.")
    if not 0 < energy_ratio <= 1:
        raise ValueError(f"energy_ratio={energy_ratio}: allowed is 0 < energy_ratio <= 1.")
    if weight.dim() < 2:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no matrix: it needs two axes or more.")
    matrix = weight.detach().flatten(1)
    sigma = svd(matrix)[1]
    if not bool(sigma.any()):
        return 0.0
    if kind == "entropy":
        return float(entropy_rank(sigma))
    if kind == "energy":
        return float(rank_from_energy(tails(sigma), energy_ratio))
    if kind == "stable":
        return float((sigma / sigma[0]).square().sum())
    return float((sigma > max(matrix.shape) * torch.finfo(matrix.dtype).eps * sigma[0]).sum())
