"""Calibrators: the clip range of a group from its values, or from a histogram of them.

A calibrator is a plain function ``(rows, weights, options) -> (lo, hi)``; ``CALIBRATORS`` names them, and
``calibrate`` calls one on blocks of rows, so none of them has to mind memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.functional.affine import choose_qparams, dequantize, quantize
from lightning_compress.functional.formats import power_of_two

SAWB = {
    2: (0.0, 1.0),
    3: (2.587, -1.693),
    4: (3.12, -2.064),
    8: (7.509, -6.892),
    16: (12.68, -12.80),
    32: (17.74, -18.64),
    256: (31.76, -35.04),
}
"""(c1, c2) of ``T = c1 sqrt(E[w^2]) + c2 E[|w|]`` by number of levels (Choi et al. 2019)."""

# Elements per block: small enough that the 81 passes of mse stay in a core's cache.
_BLOCK = 2**18
_BINS = 2048
_NO_MASS = 1e-12
_SHRINKS = range(100, 19, -1)  # percent of the largest value; the larger comes first and wins ties


@dataclass(frozen=True)
class CalibratorOptions:
    """What a calibrator may need to know besides the values; see ``calibrate``."""

    qmin: int
    qmax: int
    symmetric: bool = True
    percentile: float = 99.99
    error: Callable[..., Tensor] | None = None


Calibrator = Callable[[Tensor, Tensor | None, CalibratorOptions], tuple[Tensor, Tensor]]


def calibrate(
    name: str,
    rows: Tensor,
    *,
    qmin: int,
    qmax: int,
    symmetric: bool = True,
    percentile: float = 99.99,
    weights: Tensor | None = None,
    error: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Clip range of every row, ``lo <= 0 <= hi``.

    Symmetric signed grids get (-T, T), symmetric unsigned grids (qmin = 0) get (0, T) with T from the values
    >= 0, asymmetric grids get both ends. T per row, over x = |values|:

    - minmax: max x; asymmetric (min, max).
    - percentile: P_p(x), linear interpolation; asymmetric (P_(100-p), P_p).
    - entropy: the clip at the edge of bin i = L..2048 of a histogram on [0, max x] with the smallest
      KL(P || Q). P is the histogram with everything beyond added to bin i; Q is its first i bins merged into
      L runs (edges floor(r i / L)), a run's mass spread evenly over its non-empty bins. L is the number of
      levels >= 0; both are normalized; Q = 0 where P > 0 counts as 1e-12; ties to the larger clip.
      Exact zeros are left out: every grid has them, and the many that a ReLU or a mask makes would hide the
      rest. Asymmetric: both ends are cut at T. Poor for less than a few thousand values.
    - sawb: ``T = c1 sqrt(E[x^2]) + c2 E[x]`` with ``SAWB``, the outermost levels at ±T, so the step is
      ``2T / (levels - 1)``. A narrow grid of 2^b - 1 levels takes the pair of 2^b. A full grid is the same
      step shifted by half of it onto zero, so that hi = T - step / 2. T is at least E[x]: for nearly
      constant magnitudes, which the regression does not cover, it would fall to zero and below.
    - lsq: the step is ``2 E[x] / sqrt(Q)`` and T is Q steps, with Q the codes above zero; T may exceed the
      largest value. Asymmetric: (-T, T) cut to 0 on a side without values, Q all codes if there is one.
    - mse: the smallest ``sum (v - v̂)^2`` over 20, 21, ... 100 % of minmax, both ends; ties to the larger.

    With ``weights``, rows are bin centres and weights their counts, and every result is that of the values
    moved to their centres: each order statistic, also minimum and maximum, is off by at most half a bin.

    Args:
        name: one of ``CALIBRATORS``: minmax, percentile, entropy, sawb, lsq, mse.
        rows: float32 [G, n], finite, n >= 1; a group per row.
        qmin: smallest integer of the grid, <= 0.
        qmax: largest integer of the grid, > 0.
        symmetric: whether the zero point is fixed at 0.
        percentile: p in 50..100.
        weights: counts >= 0, [G, n].
        error: for mse on something else than the integer grid: ``error(rows, lo, hi)`` or, with weights,
            ``error(rows, lo, hi, weights)`` returns the squared error summed over each row, [G]. It is
            called on parts of rows, whose errors are added.

    Returns:
        lo and hi, float32 [G]; both 0 for a row of zeros.

    Raises:
        ValueError: unknown name; rows that are not [G, n] or empty; weights of another shape; percentile out
            of range; sawb with weights, on asymmetric or unsigned grids, or on another number of levels.

    Examples:
        >>> rows = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]])
        >>> calibrate("minmax", rows, qmin=-127, qmax=127)
        (tensor([-1., 0.]), tensor([1., 0.]))
        >>> calibrate("minmax", rows, qmin=0, qmax=255, symmetric=False)
        (tensor([-1., 0.]), tensor([0.5000, 0.0000]))

    Source: Migacz 2017, 8-bit Inference with TensorRT (entropy); Choi et al. 2019, Accurate and Efficient 2-bit
    Quantized Neural Networks (sawb); Esser et al. 2020, Learned Step Size Quantization (lsq).
    """
    if name not in CALIBRATORS:
        raise ValueError(f"calibrator={name!r} is unknown; allowed: {', '.join(CALIBRATORS)}.")
    if rows.ndim != 2 or rows.numel() == 0:
        raise ValueError(
            f"calibrator {name!r}: rows of shape {tuple(rows.shape)}: [G, n], not empty, is needed."
        )
    if weights is not None and weights.shape != rows.shape:
        raise ValueError(
            f"calibrator {name!r}: weights of shape {tuple(weights.shape)} for rows of {tuple(rows.shape)}."
        )
    if not 50 <= percentile <= 100:
        raise ValueError(f"percentile={percentile}: allowed is 50 to 100.")
    options = CalibratorOptions(qmin, qmax, symmetric, percentile, error)
    rows = rows.detach()
    size = max(1, _BLOCK // max(rows.shape[1], _BINS if name == "entropy" else 1))
    ends = []
    for start in range(0, rows.shape[0], size):
        block, counts = rows[start : start + size].to(torch.float32), None
        if weights is not None:
            counts = weights[start : start + size].detach().to(torch.float64)
            block = block.where(counts > 0, 0.0)  # an empty bin has no say in the extremes
        ends.append(torch.stack(CALIBRATORS[name](block, counts, options)))
    limit = torch.finfo(torch.float32).max
    lo, hi = torch.cat([e.double() for e in ends], dim=1).clamp(-limit, limit).to(torch.float32)
    return lo, hi


def _minmax(rows: Tensor, weights: Tensor | None, options: CalibratorOptions) -> tuple[Tensor, Tensor]:
    if options.symmetric:
        return _around_zero(_magnitudes(rows, options).amax(1), options)
    return rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)


def _percentile(rows: Tensor, weights: Tensor | None, options: CalibratorOptions) -> tuple[Tensor, Tensor]:
    p = options.percentile
    if options.symmetric:
        return _around_zero(_order_statistic(_magnitudes(rows, options), weights, p), options)
    lo, hi = (_order_statistic(rows, weights, q) for q in (100 - p, p))
    return lo.clamp(max=0), hi.clamp(min=0)


def _entropy(rows: Tensor, weights: Tensor | None, options: CalibratorOptions) -> tuple[Tensor, Tensor]:
    x = _magnitudes(rows, options)
    top = x.amax(1).double()
    clip = torch.zeros_like(top)
    codes = _codes_above_zero(rows, options)
    for count in sorted(set(codes.tolist())):
        here = codes == count
        scaled = x[here].double() / top[here].where(top[here] > 0, 1.0)[:, None]
        index = (scaled * _BINS).long().clamp_(max=_BINS - 1)
        mass = (scaled > 0).double() if weights is None else weights[here] * (scaled > 0)
        histogram = scaled.new_zeros(len(scaled), _BINS).scatter_add_(1, index, mass)
        clip[here] = top[here] * _best_bin(histogram.t().contiguous(), count + 1) / _BINS
    lo, hi = _minmax(rows, weights, options)
    return torch.maximum(lo.double(), -clip), torch.minimum(hi.double(), clip)


def _sawb(rows: Tensor, weights: Tensor | None, options: CalibratorOptions) -> tuple[Tensor, Tensor]:
    if weights is not None or not options.symmetric or options.qmin >= 0:
        raise ValueError(
            "calibrator 'sawb' is for weights on signed symmetric grids, not for activations, asymmetric or "
            "unsigned grids: take 'mse' or 'percentile'."
        )
    levels = options.qmax - options.qmin + 1
    pair = SAWB.get(levels) or SAWB.get(levels + 1)
    if pair is None:
        raise ValueError(
            f"calibrator 'sawb': no coefficients for {levels} levels; known are {', '.join(map(str, SAWB))} "
            f"(or one less, a narrow grid of more than 2 bits): take 'mse' for other numbers of bits."
        )
    x = rows.double()
    mean = x.abs().mean(1)
    clip = torch.maximum(pair[0] * x.square().mean(1).sqrt() + pair[1] * mean, mean)
    return _around_zero(clip * (2 * options.qmax / (levels - 1)), options)


def _lsq(rows: Tensor, weights: Tensor | None, options: CalibratorOptions) -> tuple[Tensor, Tensor]:
    x = _magnitudes(rows, options).double()
    mean = x.mean(1) if weights is None else (x * weights).sum(1) / weights.sum(1).clamp(min=_NO_MASS)
    clip = 2 * mean * _codes_above_zero(rows, options).sqrt()
    if options.symmetric:
        return _around_zero(clip, options)
    return (-clip).where((rows < 0).any(1), 0.0), clip.where((rows > 0).any(1), 0.0)


def _mse(rows: Tensor, weights: Tensor | None, options: CalibratorOptions) -> tuple[Tensor, Tensor]:
    error = options.error or _integer_error(options)
    unit = torch.ones_like(rows[:, 0])
    if options.error is None:
        # Squares of 1e38 and of 1e-38 are no float32. A power of two leaves every digit as it is.
        unit = power_of_two(torch.frexp(rows.abs().amax(1)).exponent - 1)
    given = (rows / unit[:, None],) if weights is None else (rows / unit[:, None], weights)
    parts = list(zip(*(torch.split(g, _BLOCK, dim=1) for g in given), strict=True))
    lo, hi = _minmax(given[0], weights, options)
    best = torch.full_like(hi, torch.inf, dtype=torch.float64)
    shrink = torch.ones_like(hi)
    for percent in _SHRINKS:
        s = percent / 100
        total = sum(error(part, lo * s, hi * s, *counts).double() for part, *counts in parts)
        better = total < best
        best, shrink = torch.where(better, total, best), shrink.masked_fill_(better, s)
    return lo * shrink * unit, hi * shrink * unit


CALIBRATORS: dict[str, Calibrator] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "sawb": _sawb,
    "lsq": _lsq,
    "mse": _mse,
}
"""Calibrators by name; a new entry is available everywhere."""


def _magnitudes(rows: Tensor, options: CalibratorOptions) -> Tensor:
    """What T is measured on; an unsigned grid has no codes for negative values, whatever T is."""
    return rows.clamp(min=0) if options.symmetric and options.qmin == 0 else rows.abs()


def _around_zero(clip: Tensor, options: CalibratorOptions) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(clip) if options.qmin == 0 else 0.0 - clip, clip


def _codes_above_zero(rows: Tensor, options: CalibratorOptions) -> Tensor:
    """Codes between 0 and T, [G]: on an asymmetric grid all for values of one sign, else half of them."""
    if options.symmetric:
        return torch.full_like(rows[:, 0], options.qmax, dtype=torch.int64)
    steps = options.qmax - options.qmin
    both = (rows < 0).any(1) & (rows > 0).any(1)
    return torch.where(both, steps // 2, steps)


def _order_statistic(values: Tensor, weights: Tensor | None, percentile: float) -> Tensor:
    """Linear interpolation between the two values next to place p / 100 (N - 1), with N the total weight."""
    if weights is None:
        place = percentile / 100 * (values.shape[1] - 1)
        below = int(place)
        above = min(below + 1, values.shape[1] - 1)
        a, b = (values.kthvalue(k + 1, dim=1).values.double() for k in (below, above))
        return a + (b - a) * (place - below)
    values, order = values.sort(dim=1)
    counts = weights.gather(1, order).cumsum(1)
    places = percentile / 100 * (counts[:, -1:] - 1).clamp(min=0)
    both = torch.cat([places.floor(), torch.minimum(places.floor() + 1, counts[:, -1:] - 1)], dim=1)
    index = torch.searchsorted(counts, both, right=True).clamp(max=values.shape[1] - 1)
    a, b = values.double().gather(1, index).unbind(1)
    return a + (b - a) * (places - places.floor()).squeeze(1)


def _best_bin(histogram: Tensor, levels: int) -> Tensor:
    """Number of bins to keep, [G], of histograms [bins, G], by the smallest KL divergence.

    Sums over bins are differences of running sums at the edges of the runs: with q = M / c in a run of mass
    M and c non-empty bins, ``sum p log q = sum M log(M / c)`` over runs.
    """
    mass, filled, own = (
        torch.cat([torch.zeros_like(h[:1]), h.cumsum(0)])
        for h in (histogram, (histogram > 0).double(), torch.xlogy(histogram, histogram))
    )
    total = mass[-1]
    best = torch.full_like(total, torch.inf)
    kept = torch.full_like(total, _BINS)
    runs = torch.arange(levels + 1, device=histogram.device)
    for i in range(_BINS, min(levels, _BINS) - 1, -1):
        edges = runs * i // levels
        m, c = mass[edges].diff(dim=0), filled[edges].diff(dim=0).clamp_(min=1)
        inside, last = mass[i], histogram[i - 1]
        beyond = total - inside
        q_last = torch.where(last > 0, m[-1] / (c[-1] * inside), _NO_MASS)
        cross = torch.xlogy(m, m / c).sum(0) - torch.xlogy(inside, inside) + torch.xlogy(beyond, q_last)
        divergence = (
            own[i - 1] + torch.xlogy(last + beyond, last + beyond) - torch.xlogy(total, total) - cross
        )
        better = divergence < best
        best, kept = torch.where(better, divergence, best), kept.masked_fill_(better, i)
    return kept


def _integer_error(options: CalibratorOptions) -> Callable[..., Tensor]:
    def error(rows: Tensor, lo: Tensor, hi: Tensor, weights: Tensor | None = None) -> Tensor:
        scale, zero_point = choose_qparams(lo, hi, options.qmin, options.qmax, options.symmetric)
        s, z = scale[:, None], None if options.symmetric else zero_point[:, None]
        square = dequantize(quantize(rows, s, z, options.qmin, options.qmax), s, z).sub_(rows).square_()
        return (square if weights is None else square * weights).sum(1, dtype=torch.float64)

    return error
