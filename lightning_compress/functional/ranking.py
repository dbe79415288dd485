"""The k lowest of many scores, exactly, without ever holding all of them.

Scores are read several times, tensor by tensor and piece by piece: for a histogram of 16 bits of their order, twice
(four times in double precision), and to count the ties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 18  # elements
_DIGIT = 16  # bits
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_EXACT_IN_DOUBLE = (torch.float64, torch.int32, torch.int64)


@dataclass(frozen=True)
class Cut:
    """Where a ranking of several tensors is cut.

    Args:
        threshold: the k-th lowest score; below it everything goes.
        dtype: in which scores are compared with it.
        ties: of each tensor: how many of the elements that equal the threshold go, first ones first.
        dropped: of each tensor: how many elements go.
    """

    threshold: float
    dtype: torch.dtype
    ties: tuple[int, ...]
    dropped: tuple[int, ...]

    def mask(self, place: int, scores: Tensor) -> Tensor:
        """What stays of one tensor.

        Args:
            place: which one of those that were ranked.
            scores: its scores.

        Returns:
            Bool, shape of the scores, True = kept.
        """
        keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        flat, left = keep.view(-1), self.ties[place]
        for part, piece in _pieces(scores, self.dtype):
            flat[part] = piece >= self.threshold
            if left:
                ties = (piece == self.threshold).nonzero().squeeze(1)[:left]
                flat[part][ties] = False
                left -= len(ties)
        return keep


def lowest(scores: Sequence[Tensor], k: int) -> Cut:
    """Cut off the k lowest scores of several tensors ranked together.

    The order is (score, tensor order, flat index), so ties are decided the same way on every machine.

    Args:
        scores: real tensors of any shapes; they may be made anew whenever they are asked for.
        k: number of elements, 0 <= k <= total.

    Returns:
        The cut; for k = 0 nothing goes.

    Raises:
        ValueError: k out of range, or a score is NaN.

    Examples:
        >>> cut = lowest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 2)
        >>> cut.threshold, cut.ties, cut.dropped
        (1.0, (1, 1), (1, 1))
    """
    total, bad, dtype = 0, 0, torch.float32
    for tensor in scores:
        total += tensor.numel()
        if tensor.dtype in _EXACT_IN_DOUBLE:
            dtype = torch.float64
        bad += sum(int(piece.isnan().sum()) for _, piece in _pieces(tensor, tensor.dtype))
    if not 0 <= k <= total:
        raise ValueError(f"k={k} elements to drop, but there are {total}: allowed is 0 to {total}.")
    if bad:
        raise ValueError(f"{bad} of {total} scores are NaN: a ranking needs numbers.")
    if not k:
        return Cut(-torch.inf, dtype, (0,) * len(scores), (0,) * len(scores))
    if total <= _PIECE:
        pieces = [piece for tensor in scores for _, piece in _pieces(tensor, dtype)]
        threshold = float(torch.cat([p.to(pieces[0].device) for p in pieces]).kthvalue(k).values)
    else:
        threshold = _kth(scores, k, dtype)
    below, equal = [], []
    for tensor in scores:
        below.append(0)
        equal.append(0)
        for _, piece in _pieces(tensor, dtype):
            below[-1] += int((piece < threshold).sum())
            equal[-1] += int((piece == threshold).sum())
    ties, left = [], k - sum(below)
    for count in equal:
        ties.append(min(count, left))
        left -= ties[-1]
    return Cut(threshold, dtype, tuple(ties), tuple(b + t for b, t in zip(below, ties, strict=True)))


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        part = slice(start, start + _PIECE)
        yield part, flat[part].to(dtype)


def _kth(scores: Sequence[Tensor], k: int, dtype: torch.dtype) -> float:
    """The k-th lowest score: its place in the order of all numbers, 16 bits at a time, highest first."""
    size, width = 1 << _DIGIT, 8 * dtype.itemsize
    prefix, rank = 0, k
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        first = shift + _DIGIT == width  # this digit has a sign
        counts = torch.zeros(size, dtype=torch.int64)
        for tensor in scores:
            for _, piece in _pieces(tensor, dtype):
                places = _places(piece)
                if not first:
                    places = places[places >> shift + _DIGIT == prefix]
                digits = (places >> shift) + size // 2 if first else places >> shift & size - 1
                counts += torch.bincount(digits, minlength=size).cpu()
        ends = counts.cumsum(0)
        digit = int(torch.searchsorted(ends, rank))
        rank -= int(ends[digit] - counts[digit])
        prefix = digit - size // 2 if first else prefix * size + digit
    kind = _INTEGERS[dtype]
    bits = prefix ^ torch.iinfo(kind).max if prefix < 0 else prefix
    return float(torch.tensor(bits, dtype=kind).view(dtype))


def _places(values: Tensor) -> Tensor:
    """Integers in the order of floating-point numbers, int64; -0.0 and 0.0 are one."""
    kind = _INTEGERS[values.dtype]
    bits = (values + 0.0).view(kind)
    return (bits ^ (bits >> 8 * kind.itemsize - 1 & torch.iinfo(kind).max)).to(torch.int64)
