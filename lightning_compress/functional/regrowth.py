"""Sparse training with moving masks: how many entries each layer keeps, and which it trades for others.

Pure functions; a mask is a bool tensor, True = kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from lightning_compress.functional.masks import count_pruned, topk_mask


def exchange(scores: Tensor, growth: Tensor, mask: Tensor, k: int) -> Tensor:
    """The mask after the ``k`` kept entries with the lowest scores went and the ``k`` best of the others came.

    ``kept = mask minus the k lowest scores in it``, ``new = kept plus the k largest growth outside of kept``. What just
    went may come straight back, as in the paper: then it never went. Ties go by flat index, the first goes and
    the first comes.

    Args:
        scores: importance of the kept entries, real, such as |w|.
        growth: of the others, real, such as |dL/dw|; same shape.
        mask: present mask, same shape.
        k: entries to exchange, 0 <= k <= number of kept ones.

    Returns:
        The new mask; it keeps as many entries as ``mask``.

    Raises:
        ValueError: k out of range, or a number that is NaN.

    Examples:
        >>> scores, growth = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.1, 0.2, 0.9])
        >>> exchange(scores, growth, torch.tensor([True, True, False, False]), k=1)
        tensor([ True, False, False,  True])

    Source: Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners, algorithm 1 (growth by gradient);
    Mocanu et al. 2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity (at random).
    """
    count = int(mask.sum())
    if not 0 <= k <= count:
        raise ValueError(f"k={k} entries to exchange: allowed is 0 to {count}, the number of kept ones.")
    (kept,) = topk_mask([scores.masked_fill(~mask, -torch.inf)], mask.numel() - count + k)
    (rest,) = topk_mask([(-growth).masked_fill(kept, torch.inf)], k)
    return kept | ~rest


def erdos_renyi(shapes: Sequence[Sequence[int]], sparsity: float, *, kernel: bool = True) -> list[int]:
    r"""Entries each layer keeps when small and narrow layers are to stay denser.

    The density of a weight with sizes n_1, ..., n_d is ``min(1, e (n_1 + ... + n_d) / (n_1 ... n_d))``, with the one e
    that gives the total; so a layer keeps ``e (n_1 + ... + n_d)`` of its entries.

    Args:
        shapes: of the weights.
        sparsity: share of zeros of all of them together, in [0, 1).
        kernel: count the sizes of a convolution's kernel too (ERK); else only the first two (ER).

    Returns:
        Kept entries of every weight; they add up to N - floor(sparsity N + 0.5) exactly, and none is empty as long as
        there is an entry for each.

    Examples:
        >>> erdos_renyi([(8, 8), (64, 64)], sparsity=0.9)
        [46, 370]

    Source: Mocanu et al. 2018 (ER); Evci et al. 2020 (ERK).
    """
    sums = [sum(shape if kernel else shape[:2]) for shape in shapes]
    if not kernel:  # the density of a kernel's entries is that of its two channels
        sums = [n * math.prod(shape[2:]) for n, shape in zip(sums, shapes, strict=True)]
    return _spread(shapes, sums, sparsity)


def uniform(shapes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """Entries each layer keeps when all are equally sparse: ``(1 - sparsity) n_1 ... n_d``.

    Args:
        shapes: of the weights.
        sparsity: share of zeros, in [0, 1).

    Returns:
        As ``erdos_renyi``.

    Examples:
        >>> uniform([(8, 8), (64, 64)], sparsity=0.9)
        [6, 410]
    """
    return _spread(shapes, [math.prod(shape) for shape in shapes], sparsity)


def _spread(shapes: Sequence[Sequence[int]], weights: Sequence[int], sparsity: float) -> list[int]:
    """Whole numbers in proportion to weights, from 1 to the size of each, that add up to the kept total."""
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes) - count_pruned(sparsity, sum(sizes))
    least = 1 if total >= len(sizes) else 0
    fixed: dict[int, int] = {}
    while True:  # a size or the least one binds; each round fixes some, so it ends
        free = [i for i in range(len(sizes)) if i not in fixed]
        unit = Fraction(total - sum(fixed.values()), max(sum(weights[i] for i in free), 1))
        shares = {i: unit * weights[i] for i in free}
        over = {i: sizes[i] for i in free if shares[i] > sizes[i]}
        under = {i: least for i in free if shares[i] < least}
        if not over and not under:
            break
        # Fixing the larger violation first never has to be taken back.
        more = sum(shares[i] - sizes[i] for i in over)
        fixed |= over if more >= sum(least - shares[i] for i in under) else under
    counts = fixed | {i: math.floor(share) for i, share in shares.items()}
    by_remainder = sorted(shares, key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts.values())]:
        counts[i] += 1
    return [counts[i] for i in range(len(sizes))]
