"""A layer's inputs as its weight sees them: taps of a convolution, Fourier coefficients, a histogram."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def taps(
    x: Tensor,
    kernel: Sequence[int],
    size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
) -> Iterator[Tensor]:
    """What each kernel position j is multiplied with: ``y[l] = sum_j w[j] tap_j[l]``, padding included.

    Together the taps are the unfolded input, without ever holding it.

    Args:
        x: input [N, C, n_1, ..., n_d].
        kernel: kernel sizes.
        size: output sizes.
        stride: per axis; of a transposed convolution: zeros are put between the inputs.
        padding: per axis.
        dilation: per axis.
        transposed: whether it is a transposed convolution.

    Yields:
        One view [N, C, *size] per kernel position, last axis fastest.

    Examples:
        >>> views = taps(torch.tensor([[[1.0, 2.0]]]), [3], [2], stride=[1], padding=[1], dilation=[1])
        >>> [view[0, 0].tolist() for view in views]
        [[0.0, 1.0], [1.0, 2.0], [2.0, 0.0]]
    """
    axes = range(len(kernel))
    reach = [dilation[d] * (kernel[d] - 1) for d in axes]
    if transposed:
        stuffed = x.new_zeros(*x.shape[:2], *((x.shape[2 + d] - 1) * stride[d] + 1 for d in axes))
        stuffed[_index(slice(None, None, s) for s in stride)] = x
        before = [reach[d] - padding[d] for d in axes]
        x, step = stuffed, [1] * len(kernel)
    else:
        before, step = list(padding), list(stride)
    needed = [reach[d] + step[d] * (size[d] - 1) + 1 for d in axes]
    pads = [(before[d], needed[d] - before[d] - x.shape[2 + d]) for d in axes]
    x = functional.pad(x, [p for pair in reversed(pads) for p in pair])
    for position in itertools.product(*(range(k) for k in kernel)):
        index = [k - 1 - p if transposed else p for p, k in zip(position, kernel, strict=True)]
        start = [index[d] * dilation[d] for d in axes]
        yield x[_index(slice(start[d], start[d] + step[d] * (size[d] - 1) + 1, step[d]) for d in axes)]


def _index(last: Iterable[slice]) -> tuple[Any, ...]:
    """An index of the last axes."""
    return (..., *last)


def spectrum(
    x: Tensor,
    stored: Sequence[int],
    modes: Sequence[int],
    most: Sequence[int],
    *,
    real: bool,
    norm: str | None,
) -> tuple[Tensor, tuple[slice, ...]]:
    """The Fourier coefficients that a spectral convolution multiplies, and where they meet the stored weight.

    Args:
        x: input [N, C, n_1, ..., n_d].
        stored: mode axes of the weight.
        modes: modes in use per axis, in stored units.
        most: modes the layer was built for, in stored units.
        real: whether the last axis holds the non-negative frequencies only.
        norm: normalization of the transform, as in ``torch.fft``.

    Returns:
        Coefficients [N, C, *kept] and the kept part of the stored mode axes.

    Examples:
        >>> spectrum(torch.ones(1, 1, 4), [2], [2], [2], real=True, norm="forward")[0].abs().tolist()
        [[[1.0, 0.0]]]

    Source: Li et al. 2021, Fourier Neural Operator; layout of neuraloperator 2.0, lowest frequencies in the
        centre.
    """
    dims = list(range(-len(stored), 0))
    coefficients = torch.fft.rfftn(x, dim=dims, norm=norm) if real else torch.fft.fftn(x, dim=dims, norm=norm)
    if len(dims) > 1:
        coefficients = torch.fft.fftshift(coefficients, dim=dims[:-1] if real else dims)
    ours, theirs = [], []
    for axis, (total, size) in enumerate(zip(stored, coefficients.shape[-len(stored) :], strict=True)):
        unused, last = most[axis] - min(size, modes[axis]), axis == len(stored) - 1
        if last and real:
            theirs.append(slice(0, total - unused))
        else:
            theirs.append(slice(unused // 2, total - (unused - unused // 2)))
        kept = theirs[-1].stop - theirs[-1].start
        start = 0 if last else size // 2 - kept // 2
        ours.append(slice(start, start + kept))
    return coefficients[_index(ours)], tuple(theirs)


class Histogram:
    """Signed counts in equal bins on [-upper, upper); the range doubles by merging bins, so no value is kept.

    Bin k of ``2 * bins`` counts ``(k / bins - 1) * upper <= x < ((k + 1) / bins - 1) * upper``. ``upper`` is a
    power of two above every ``|x|``, so bin edges are exact, zero is one of them, and the order of the values
    does not matter.

    Args:
        bins: number of bins on each side of zero, a power of two, 2 or more.

    Examples:
        >>> histogram = Histogram(bins=2)
        >>> histogram.add(torch.tensor([0.1, -0.9]))
        >>> histogram.counts.tolist(), histogram.upper
        ([1.0, 0.0, 1.0, 0.0], 1.0)
        >>> histogram.add(torch.tensor([1.0]))
        >>> histogram.counts.tolist(), histogram.upper
        ([0.0, 1.0, 1.0, 1.0], 2.0)
    """

    def __init__(self, bins: int = 2048) -> None:
        self.bins = bins
        self.counts = torch.zeros(2 * bins, dtype=torch.float64)
        self.upper = 0.0

    def add(self, x: Tensor) -> None:
        """Count the entries of a tensor of finite values.

        Args:
            x: real, any shape and device; of a complex tensor, real and imaginary parts are counted.
        """
        x = x.detach()
        values = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double().reshape(-1)
        largest = float(values.abs().max()) if values.numel() else 0.0
        needed = 2.0 ** math.frexp(largest)[1] if largest else 0.0  # the next power of two above
        if self.upper == 0.0:
            self.upper = needed  # until now there were zeros only: they stay in the first bin from zero on
        while needed > self.upper:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = functional.pad(merged, (self.bins // 2, self.bins // 2))
            self.upper *= 2
        # Dividing by a power of two is exact, so floor never moves a value over an edge.
        codes = (values * (self.bins / (self.upper or 1.0))).floor().long() + self.bins
        self.counts += torch.bincount(codes, minlength=2 * self.bins).cpu()
