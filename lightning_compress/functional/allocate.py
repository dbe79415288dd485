"""One option per item under a common budget, exactly where that is affordable and with a bound otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Steps of the dynamic program that are still taken: seconds, and one byte per item and unit of capacity.
_EXACT_STEPS = 200_000_000

FloatArray = npt.NDArray[np.float64]


class Allocation(NamedTuple):
    """The option of each item, what they lose and cost, a lower bound of the loss, and loss - bound."""

    choice: tuple[int, ...]
    loss: float
    cost: int
    bound: float
    gap: float


def multiple_choice_knapsack(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int
) -> Allocation:
    r"""Choose one option per item: ``min sum_i l[i, c_i]`` subject to ``sum_i cost[i, c_i] <= budget``.

    Costs count from each item's cheapest option, in units of their greatest common divisor. Dynamic
    programming is exact when items x options x capacity in these units is at most 2e8. Otherwise the
    relaxation on the lower convex hulls of the items is solved, whose multiplier λ gives the dual bound
    ``sum_i min_k (l[i, k] + λ cost[i, k]) - λ budget``; its integral part is the start of a greedy fill that
    takes the swap of largest gain per cost that still fits, until none does.

    Args:
        losses: loss of each option of each item, finite.
        costs: its cost, integers >= 0.
        budget: largest total cost, in the unit of the costs.

    Returns:
        The allocation; ``gap`` is 0 when it is proven optimal. Ties go to the cheaper option.

    Raises:
        ValueError: the budget is below the sum of the cheapest options; an item without options, or with
            unequal numbers of losses and costs; a loss that is not finite; a negative cost.

    Examples:
        >>> multiple_choice_knapsack([[9.0, 1.0], [5.0, 2.0]], [[2, 4], [2, 4]], budget=6)
        Allocation(choice=(1, 0), loss=6.0, cost=6, bound=6.0, gap=0.0)

    Source: Sinha and Zoltners 1979, The Multiple-Choice Knapsack Problem.
    """
    _check(losses, costs)
    cheapest = [min(c) for c in costs]
    if budget < sum(cheapest):
        raise ValueError(
            f"budget={budget} is not reachable: the cheapest option of every item costs {sum(cheapest)} in all; "
            f"raise the budget or add cheaper options."
        )
    extra = [[int(c) - low for c in row] for row, low in zip(costs, cheapest, strict=True)]
    unit = math.gcd(*(c for row in extra for c in row)) or 1
    extra = [[c // unit for c in row] for row in extra]
    capacity = min((budget - sum(cheapest)) // unit, sum(map(max, extra)))
    values = [np.asarray(row, dtype=np.float64) for row in losses]
    exact = sum(map(len, extra)) * capacity <= _EXACT_STEPS
    choice, bound = (_by_programming if exact else _by_relaxation)(values, extra, capacity)
    loss = math.fsum(float(row[k]) for row, k in zip(values, choice, strict=True))
    bound = loss if exact else min(bound, loss)
    cost = sum(int(row[k]) for row, k in zip(costs, choice, strict=True))
    return Allocation(tuple(choice), loss, cost, bound, loss - bound)


def _by_programming(
    losses: list[FloatArray], costs: list[list[int]], capacity: int
) -> tuple[list[int], float]:
    """best[c] = smallest loss of the items so far at a cost of at most c."""
    best = np.zeros(capacity + 1)
    taken = []
    for item, prices in zip(losses, costs, strict=True):
        order = sorted(range(len(prices)), key=lambda k: (prices[k], item[k]))
        new = np.full(capacity + 1, np.inf)
        option = np.zeros(capacity + 1, dtype=np.min_scalar_type(len(prices) - 1))
        for k in order:
            price = prices[k]
            if price > capacity:
                break
            candidate = best[: capacity + 1 - price] + item[k]
            better = candidate < new[price:]
            new[price:][better] = candidate[better]
            option[price:][better] = k
        best = new
        taken.append(option)
    choice, left = [], capacity
    for option, prices in zip(reversed(taken), reversed(costs), strict=True):
        choice.append(int(option[left]))
        left -= prices[choice[-1]]
    return choice[::-1], float(best[capacity])


def _by_relaxation(
    losses: list[FloatArray], costs: list[list[int]], capacity: int
) -> tuple[list[int], float]:
    """Walk down the hulls, steepest first, to the step that no longer fits; its slope is the multiplier."""
    steps = []
    choice = []
    for i, (item, prices) in enumerate(zip(losses, costs, strict=True)):
        hull = _hull(item, prices)
        choice.append(hull[0])
        for a, b in pairwise(hull):
            steps.append(((item[a] - item[b]) / (prices[b] - prices[a]), i, prices[b] - prices[a], b))
    left, multiplier = capacity, 0.0
    # A hull is convex, so its own steps come in order (equal slopes: the shorter reach first, by price).
    for slope, i, price, k in sorted(steps, key=lambda s: (-s[0], s[1], costs[s[1]][s[3]])):
        if price > left:
            multiplier = float(slope)
            break
        choice[i], left = k, left - price
    reduced = (
        item + multiplier * np.array(c, dtype=np.float64) for item, c in zip(losses, costs, strict=True)
    )
    bound = math.fsum(float(r.min()) for r in reduced) - multiplier * capacity
    return _fill(choice, losses, costs, left), bound


def _hull(item: FloatArray, prices: list[int]) -> list[int]:
    """Options on the lower convex hull of (cost, loss), from the cheapest on, each better than the one before."""
    hull: list[int] = []
    for k in sorted(range(len(prices)), key=lambda k: (prices[k], item[k])):
        if hull and item[k] >= item[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (item[a] - item[b]) * (prices[k] - prices[b]) > (item[b] - item[k]) * (prices[b] - prices[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


def _fill(choice: list[int], losses: list[FloatArray], costs: list[list[int]], left: int) -> list[int]:
    """Spend what is left on single swaps, the largest gain per cost first, free gains before all."""
    while True:
        best, swap = 0.0, None
        for i, (item, prices) in enumerate(zip(losses, costs, strict=True)):
            for k, price in enumerate(prices):
                more, gain = price - prices[choice[i]], float(item[choice[i]] - item[k])
                if gain <= 0 or more > left:
                    continue
                rate = gain / more if more > 0 else math.inf
                if rate > best:
                    best, swap = rate, (i, k, more)
        if swap is None:
            return choice
        i, k, more = swap
        choice[i], left = k, left - more


def _check(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]]) -> None:
    if len(losses) != len(costs):
        raise ValueError(f"{len(losses)} items have losses, but {len(costs)} have costs.")
    for i, (item, prices) in enumerate(zip(losses, costs, strict=True)):
        if len(item) != len(prices) or len(item) == 0:
            raise ValueError(
                f"item {i}: {len(item)} losses and {len(prices)} costs: as many of each, and one at least."
            )
        if not all(math.isfinite(v) for v in item):
            raise ValueError(f"item {i}: losses {list(item)}: all have to be finite.")
        if min(prices) < 0:
            raise ValueError(f"item {i}: costs {list(prices)}: allowed is >= 0.")
