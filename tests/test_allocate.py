"""The knapsack against all combinations, its bound against the optimum."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.functional import allocate
from lightning_compress.functional.allocate import multiple_choice_knapsack

ITEMS = st.lists(
    st.lists(st.tuples(st.floats(-5, 100), st.integers(0, 12)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


def brute_force(losses, costs, budget):
    """The smallest loss of all combinations, or None."""
    found = [
        math.fsum(item[k] for item, k in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(c)) for c in costs))
        if sum(c[k] for c, k in zip(costs, choice, strict=True)) <= budget
    ]
    return min(found, default=None)


def split(items, unit=1):
    return [[loss for loss, _ in item] for item in items], [
        [unit * cost for _, cost in item] for item in items
    ]


def check_the_parts_fit(result, losses, costs, budget):
    assert result.cost == sum(c[k] for c, k in zip(costs, result.choice, strict=True)) <= budget
    assert result.loss == math.fsum(item[k] for item, k in zip(losses, result.choice, strict=True))
    assert result.gap == result.loss - result.bound >= 0


@given(ITEMS, st.integers(-1, 50), st.integers(1, 7), st.integers(0, 6))
def test_exact_is_the_best_of_all_combinations(items, budget, unit, rest):
    losses, costs = split(items, unit)
    budget = budget * unit + rest % unit
    best = brute_force(losses, costs, budget)
    if best is None:
        reachable = sum(map(min, costs))
        with pytest.raises(ValueError, match=rf"budget={budget} is not reachable.* {reachable} in all"):
            multiple_choice_knapsack(losses, costs, budget)
        return
    result = multiple_choice_knapsack(losses, costs, budget)
    check_the_parts_fit(result, losses, costs, budget)
    assert result.loss == pytest.approx(best, abs=1e-9)
    assert result.gap == 0


@given(ITEMS, st.integers(0, 50))
def test_relaxation_encloses_the_optimum(items, budget):
    losses, costs = split(items)
    best = brute_force(losses, costs, budget)
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "_EXACT_STEPS", -1)
        result = multiple_choice_knapsack(losses, costs, budget)
    check_the_parts_fit(result, losses, costs, budget)
    assert result.bound - 1e-9 <= best <= result.loss + 1e-9
    # No single swap that fits is left to take.
    for i, k in enumerate(result.choice):
        for other in range(len(costs[i])):
            fits = result.cost - costs[i][k] + costs[i][other] <= budget
            assert not fits or losses[i][other] >= losses[i][k]


def linear_relaxation(losses, costs, budget):
    """The same bound from the dual function, maximized by a search over the multiplier."""
    losses, costs = np.array(losses), np.array(costs)

    def dual(m):
        return (losses + m * costs).min(1).sum() - m * budget

    low, high = 0.0, 1e6
    for _ in range(300):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if dual(a) < dual(b) else (low, b)
    return dual(low)


def test_three_layers_of_five_widths():
    sizes, widths = (432, 9216, 640), (2, 3, 4, 6, 8)
    losses = [[4.0**-b * n**0.5 * s for b in widths] for n, s in zip(sizes, (90.0, 3.0, 20.0), strict=True)]
    costs = [[n * b for b in widths] for n in sizes]
    for mean in (2, 2.5, 3, 4.2, 6, 8, 20):
        budget = int(mean * sum(sizes))
        result = multiple_choice_knapsack(losses, costs, budget)
        check_the_parts_fit(result, losses, costs, budget)
        assert result.gap == 0
        assert result.loss == pytest.approx(brute_force(losses, costs, budget), rel=1e-12)


def test_a_big_instance_stays_in_its_budget_and_close_to_its_bound():
    generator = np.random.default_rng(0)
    sizes = generator.integers(1_000, 5_000_000, 150) * 2 + 1
    widths = (2, 3, 4, 6, 8)
    losses = [
        [float(n * s * 4.0**-b) for b in widths] for n, s in zip(sizes, generator.random(150), strict=True)
    ]
    costs = [[int(n) * b for b in widths] for n in sizes]
    for mean in (2.0, 2.7, 4.0, 5.5, 7.9):
        budget = int(mean * sizes.sum())
        result = multiple_choice_knapsack(losses, costs, budget)
        check_the_parts_fit(result, losses, costs, budget)
        assert result.bound == pytest.approx(linear_relaxation(losses, costs, budget), rel=1e-6)
        assert result.gap <= 0.005 * result.loss
    everything = multiple_choice_knapsack(losses, costs, 8 * int(sizes.sum()))
    assert set(everything.choice) == {4} and everything.gap == 0


def test_relaxation_and_program_agree_on_a_middling_instance(monkeypatch):
    generator = np.random.default_rng(1)
    sizes = generator.integers(10, 400, 40)
    losses = [sorted(generator.random(5).tolist(), reverse=True) for _ in sizes]
    costs = [[int(n) * b for b in (2, 3, 4, 6, 8)] for n in sizes]
    for mean in (2.3, 3.7, 5.1):
        budget = int(mean * sizes.sum())
        exact = multiple_choice_knapsack(losses, costs, budget)
        with monkeypatch.context() as patch:
            patch.setattr(allocate, "_EXACT_STEPS", -1)
            close = multiple_choice_knapsack(losses, costs, budget)
        assert exact.gap == 0
        assert close.bound - 1e-9 <= exact.loss <= close.loss <= 1.02 * exact.loss


def test_ties_go_to_the_cheaper_option():
    assert multiple_choice_knapsack([[1.0, 1.0, 1.0]], [[5, 3, 4]], 9).choice == (1,)


def test_nothing_to_choose():
    assert multiple_choice_knapsack([], [], 0) == ((), 0.0, 0, 0.0, 0.0)
    assert multiple_choice_knapsack([[2.0]], [[3]], 3) == ((0,), 2.0, 3, 2.0, 0.0)


def test_what_is_refused():
    for losses, costs, message in (
        ([[1.0]], [], "1 items have losses, but 0"),
        ([[1.0], [2.0, 3.0]], [[1], [1]], "item 1: 2 losses and 1 costs"),
        ([[]], [[]], "item 0: 0 losses"),
        ([[1.0, math.nan]], [[1, 2]], "item 0: losses .*finite"),
        ([[1.0, 2.0]], [[1, -2]], "item 0: costs .*>= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            multiple_choice_knapsack(losses, costs, 10)
