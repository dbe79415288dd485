"""Schedules: end points exact, monotone, formulas of the table."""

import math

import pytest

from lightning_compress import schedules
from lightning_compress.schedules import SHAPES, Schedule, shape, steps, to_steps

STAIRS = steps({0.25: 0.3, 0.5: 0.6, 1.0: 1.0})
ALL = {**SHAPES, "stairs": STAIRS, "power": schedules.polynomial(3.0), "steep": schedules.exponential(9.0)}


@pytest.mark.parametrize("name", ALL)
def test_ends_are_exact_and_values_monotone(name):
    s = Schedule(ALL[name], 7, 107, start=0.1, end=0.83)
    points = [s(7 + 100 * i / 1000) for i in range(1001)]
    assert points == sorted(points)
    assert s(107) == 0.83 and s(1e9) == 0.83 and s(6) == 0.1
    assert s(7) == (0.83 if name == "constant" else 0.1)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_shapes_equal_their_formulas(p):
    assert SHAPES["linear"](p) == p
    assert SHAPES["cubic"](p) == pytest.approx(1 - (1 - p) ** 3)
    assert SHAPES["cosine"](p) == pytest.approx((1 - math.cos(math.pi * p)) / 2)
    assert SHAPES["polynomial"](p) == pytest.approx(math.sqrt(p))
    assert SHAPES["exponential"](p) == pytest.approx((1 - math.exp(-5 * p)) / (1 - math.exp(-5)))


def test_a_schedule_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match=r"ends \(step 3\) before it begins \(step 5\).*begin <= end"):
        Schedule(schedules.linear, 5, 3)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="unknown; allowed: constant, linear"):
        shape("cubick")
    with pytest.raises(ValueError, match="last value is 1"):
        shape({0.5: 0.5})
    with pytest.raises(ValueError, match="power must be > 0"):
        schedules.polynomial(0)
    with pytest.raises(ValueError, match="straight line"):
        schedules.exponential(0)


def test_a_shape_may_be_an_import_path_or_a_function():
    assert shape("lightning_compress.schedules.cubic") is schedules.cubic
    assert shape(math.sqrt) is math.sqrt


def test_points_in_training():
    assert to_steps(0.3, "fraction", total=1000, per_epoch=100, name="begin") == 300
    assert to_steps(2, "epoch", total=1000, per_epoch=100, name="begin") == 200
    assert to_steps(17, "step", total=math.inf, per_epoch=math.inf, name="begin") == 17
    for value, unit, message in (
        (1.5, "fraction", r"allowed is \[0, 1\]"),
        (-1, "step", "negative"),
        (1, "batch", "allowed: 'fraction', 'step', 'epoch'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_steps(value, unit, total=10, per_epoch=5, name="begin")
    with pytest.raises(ValueError, match="no known length, so give begin with unit='step'"):
        to_steps(0.5, "fraction", total=math.inf, per_epoch=5, name="begin")
