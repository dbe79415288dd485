"""The best cut of a sorted sequence into segments: exact least squares in memory proportional to its length.

The cost of a segment is the weighted sum of squared distances from its mean. For a price per segment, the best cut of
any number of segments is a shortest path whose costs satisfy the quadrangle inequality; a price that gives the wanted
number is found by search, since the least cost is convex in the number of segments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_ROUNDS = 200  # prices that are tried: a safeguard, about 15 are needed


def best_segments(values: FloatArray, weights: FloatArray, count: int) -> IntArray:
    r"""Cut points of a sorted sequence: ``min sum_k sum_{i in segment k} w_i (x_i - m_k)^2``.

    Args:
        values: x, [n] ascending and different.
        weights: w, [n] > 0.
        count: number of segments, 1 to n.

    Returns:
        [count + 1] ascending, from 0 to n; segment k is ``values[cuts[k]:cuts[k + 1]]``.

    Examples:
        >>> best_segments(np.array([0.0, 1.0, 8.0, 9.0]), np.ones(4), 2).tolist()
        [0, 2, 4]

    Source: Wu 1991, Optimal Quantization by Matrix Searching; Grønlund et al. 2017, Fast Exact k-Means, k-Medians and
        Bregman Divergence Clustering in 1D.
    """
    n = len(values)
    if count >= n:
        return np.arange(n + 1)
    sums = _sums(values, weights)
    few = np.array([0, n])
    if count == 1:
        return few
    many = np.arange(n + 1)
    few_cost, many_cost = _cost(sums, few), 0.0
    for _ in range(_ROUNDS):
        # The line between two known points of the convex curve (number, cost): its slope is the next price.
        price = (few_cost - many_cost) / (len(many) - len(few))
        cuts = _path(sums, price)
        cost = _cost(sums, cuts)
        number = len(cuts) - 1
        if number == count:
            return cuts
        line = few_cost - price * (len(cuts) - len(few))
        if not len(few) < len(cuts) < len(many) or cost >= line:
            break  # nothing lies below the line: all numbers between are on it
        if number < count:
            few, few_cost = cuts, cost
        else:
            many, many_cost = cuts, cost
    return _spliced(few, many, count)


def _spliced(few: IntArray, many: IntArray, count: int) -> IntArray:
    """A cut into ``count`` segments from two best cuts of one price: the start of one, the end of the other.

    After d + i segments of the finer cut, d = count - len(few), comes a place where a segment of the coarser cut
    begins no later and ends no earlier; by the quadrangle inequality, changing over there costs nothing.
    """
    extra = count - (len(few) - 1)
    for i in range(len(few) - 1):
        if few[i] <= many[extra + i] and many[extra + i + 1] <= few[i + 1]:
            return np.concatenate([many[: extra + i + 1], few[i + 1 :]])
    raise AssertionError("two best cuts of one price always cross")


def _sums(values: FloatArray, weights: FloatArray) -> tuple[FloatArray, ...]:
    """Sums of w, w x and w x^2 up to each place, the last two as pairs of doubles: differences stay exact."""
    center = float(np.average(values, weights=weights))
    scale = float(np.abs(values - center).max()) or 1.0
    found: tuple[FloatArray, ...] = _accumulated((values - center) / scale, weights / weights.max())
    return found


@compiled()
def _accumulated(x: FloatArray, w: FloatArray) -> Any:
    n = len(x)
    mass = np.zeros(n + 1)
    first, first_low = np.zeros(n + 1), np.zeros(n + 1)
    second, second_low = np.zeros(n + 1), np.zeros(n + 1)
    for i in range(n):
        mass[i + 1] = mass[i] + w[i]
        for high, low, term in (
            (first, first_low, w[i] * x[i]),
            (second, second_low, w[i] * x[i] * x[i]),
        ):
            total = high[i] + term
            part = total - high[i]
            low[i + 1] = low[i] + ((high[i] - (total - part)) + (term - part))
            high[i + 1] = total
    return mass, first, first_low, second, second_low


@compiled(inline="always")
def _segment(sums: Any, i: int, j: int) -> float:
    mass, first, first_low, second, second_low = sums
    a = (first[j] - first[i]) + (first_low[j] - first_low[i])
    b = (second[j] - second[i]) + (second_low[j] - second_low[i])
    return float(max(b - a * a / (mass[j] - mass[i]), 0.0))


@compiled()
def _cost(sums: Any, cuts: IntArray) -> float:
    total = 0.0
    for k in range(len(cuts) - 1):
        total += _segment(sums, cuts[k], cuts[k + 1])
    return total


@compiled()
def _path(sums: Any, price: float) -> IntArray:
    """The best cut when each segment costs ``price`` more.

    The best last cut of a prefix moves only forward with its length, so a queue holds which cut is the best from
    where on; a new one takes over from the first place at which it is better than the last in the queue.
    """
    n = len(sums[0]) - 1
    best = np.zeros(n + 1)
    last = np.zeros(n + 1, dtype=np.int64)
    queue, start = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
    start[0] = 1
    head, tail = 0, 1
    for j in range(1, n + 1):
        while head + 1 < tail and start[head + 1] <= j:
            head += 1
        i = queue[head]
        best[j] = best[i] + _segment(sums, i, j) + price
        last[j] = i
        if j == n:
            break
        while True:
            i, low = queue[tail - 1], max(start[tail - 1], j + 1)
            new = best[j] + _segment(sums, j, low)
            if new >= best[i] + _segment(sums, i, low):
                break
            if tail - 1 == head:
                break
            tail -= 1
        # The queue's last cut is the best at ``low``, unless it is the only one and loses there already.
        if new < best[i] + _segment(sums, i, low):
            queue[tail - 1], start[tail - 1] = j, low
            continue
        high = n + 1
        while low + 1 < high:
            middle = (low + high) // 2
            if best[j] + _segment(sums, j, middle) < best[i] + _segment(sums, i, middle):
                high = middle
            else:
                low = middle
        if high <= n:
            queue[tail], start[tail] = j, high
            tail += 1
    count, j = 0, n
    while j > 0:
        j = last[j]
        count += 1
    cuts = np.zeros(count + 1, dtype=np.int64)
    cuts[count] = n
    for k in range(count - 1, -1, -1):
        cuts[k] = last[cuts[k + 1]]
    return cuts
