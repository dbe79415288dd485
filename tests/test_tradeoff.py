"""Fronts, knees and best points, against definitions written out as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.functional.tradeoff import (
    Knee,
    best_under,
    hypervolume,
    knee_point,
    pareto,
    pareto_front,
)

NAN = math.nan
Points = list[tuple[float, float, str]]

ratio = st.sampled_from(
    [1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0, NAN, math.inf]
)  # few values, so that ties are common
error = st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, NAN])
clouds = st.lists(st.tuples(ratio, error, st.sampled_from("abcdefgh")), max_size=14)


def columns(points: Points) -> tuple[list[float], list[float], list[str]]:
    return [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]


def front_by_hand(points: Points, strict: bool) -> list[tuple[float, float, str]]:
    fine = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]

    def beats(j: tuple[float, float, str], i: tuple[float, float, str]) -> bool:
        if strict:
            return j[0] > i[0] and j[1] < i[1]
        return j[0] >= i[0] and j[1] <= i[1] and (j[0] > i[0] or j[1] < i[1])

    left = [i for i in fine if not any(beats(j, i) for j in fine)]
    firsts: dict[tuple[float, float], str] = {}
    for r, e, name in left:
        firsts[r, e] = min(name, firsts.get((r, e), name))
    return sorted((r, e, name) for (r, e), name in firsts.items())


def knee_by_hand(front: Sequence[tuple[float, float, str]], log: bool) -> tuple[tuple[float, float], bool]:
    """Distance to the chord from the formula for a line through two points."""
    lowest = min(front, key=lambda p: (p[1], -p[0]))
    if len(front) < 3:
        return lowest[:2], False
    xs = [math.log2(p[0]) if log else p[0] for p in front]
    ys = [p[1] for p in front]
    x = [(v - min(xs)) / (max(xs) - min(xs)) for v in xs]
    y = [(v - min(ys)) / (max(ys) - min(ys)) for v in ys]
    (x0, y0), (x1, y1) = (x[0], y[0]), (x[-1], y[-1])
    signed = [
        ((x1 - x0) * (y0 - b) - (x0 - a) * (y1 - y0)) / math.hypot(x1 - x0, y1 - y0)
        for a, b in zip(x, y, strict=True)
    ]
    best = max(range(1, len(front) - 1), key=lambda i: signed[i])
    return (front[best][:2], True) if signed[best] > 1e-12 else (lowest[:2], False)


@given(clouds, st.booleans())
def test_front_is_what_nothing_beats(points: Points, strict: bool) -> None:
    found = pareto_front(*columns(points), strict=strict)
    assert sorted(points[i] for i in found) == front_by_hand(points, strict)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


@given(clouds, st.booleans())
def test_knee_is_farthest_below_the_chord(points: Points, log: bool) -> None:
    front = front_by_hand(points, strict=False)
    found = knee_point(*columns(points), scale="log" if log else "linear")
    if not front:
        assert found == Knee(None, False)
        return
    assert found.position is not None
    wanted, real = knee_by_hand(front, log)
    got = points[found.position][:2]
    assert found.found == real or abs_gap(front, got, log) < 1e-9
    assert got == wanted or abs_gap(front, got, log) == pytest.approx(abs_gap(front, wanted, log), abs=1e-12)


def abs_gap(front: Sequence[tuple[float, float, str]], at: tuple[float, float], log: bool) -> float:
    scale = math.log2 if log else float
    (r0, e0, _), (r1, e1, _) = front[0], front[-1]
    return (scale(at[0]) - scale(r0)) / (scale(r1) - scale(r0)) - (at[1] - e0) / (e1 - e0)


@given(clouds, st.sampled_from([0.0, 0.03, 0.1, 1.0]))
def test_best_has_the_largest_ratio_within_the_limit(points: Points, limit: float) -> None:
    fits = [p for p in points if math.isfinite(p[0]) and p[1] <= limit]
    found = best_under(*columns(points)[:2], limit, columns(points)[2])
    if not fits:
        assert found is None
    else:
        assert found is not None
        assert points[found] == min(fits, key=lambda p: (-p[0], p[1], p[2]))


def test_a_thousand_random_sets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        count = int(rng.integers(0, 30))
        ratios = rng.integers(1, 12, count) / 2
        errors = np.where(rng.random(count) < 0.1, NAN, rng.integers(0, 12, count) / 10)
        points = [
            (float(r), float(e), f"{i:02d}") for i, (r, e) in enumerate(zip(ratios, errors, strict=True))
        ]
        front = [points[i] for i in pareto_front(*columns(points))]
        assert front == front_by_hand(points, strict=False)
        if front:
            found = knee_point(*columns(points))
            assert found.position is not None
            wanted, _ = knee_by_hand(front, log=False)
            gap = abs_gap(front, points[found.position][:2], False) if len(front) > 1 else 0.0
            assert gap == pytest.approx(abs_gap(front, wanted, False) if len(front) > 1 else 0.0, abs=1e-12)


def test_of_identical_points_the_first_by_name_stays() -> None:
    assert pareto_front([2.0, 2.0, 2.0], [0.1, 0.1, 0.1], ["b", "a", "c"]) == [1]
    assert best_under([2.0, 2.0], [0.1, 0.1], 0.1, ["b", "a"]) == 1


def test_single_points_and_none() -> None:
    assert pareto_front([], []) == [] and knee_point([], []) == Knee(None, False)
    assert knee_point([3.0], [0.2]) == Knee(0, False)
    assert pareto_front([1.0, 2.0], [NAN, NAN]) == [] and best_under([2.0], [NAN], 1.0) is None


def test_a_concave_front_has_no_knee() -> None:
    assert knee_point([1.0, 2.0, 3.0], [0.0, 0.9, 1.0]) == Knee(0, False)
    assert knee_point([1.0, 2.0, 3.0], [0.0, 0.5, 1.0]) == Knee(0, False)  # on the chord


def test_strict_keeps_points_that_only_tie() -> None:
    assert pareto_front([1.0, 2.0], [0.1, 0.1]) == [1]
    assert pareto_front([1.0, 2.0], [0.1, 0.1], strict=True) == [0, 1]


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="2 ratios, 1 errors"):
        pareto_front([1.0, 2.0], [0.1])
    with pytest.raises(ValueError, match="allowed: linear, log"):
        knee_point([1.0], [0.1], scale="cubic")
    with pytest.raises(ValueError, match="needs ratios > 0"):
        knee_point([0.0, 1.0, 2.0], [0.0, 0.1, 1.0], scale="log")


def test_hypervolume_of_front_equals_that_of_all() -> None:
    points = np.random.default_rng(1).random((40, 3))
    assert hypervolume(points, np.ones(3)) == pytest.approx(hypervolume(points[pareto(points)], np.ones(3)))
