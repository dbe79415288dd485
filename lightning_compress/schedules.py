"""When: optimizer step -> value. One type drives sparsity, bits, penalties and distillation weights.

A shape is a function of progress ``p`` in [0, 1] with ``f(0) = 0`` and ``f(1) = 1``; ``Schedule`` puts
it between two steps and two values: ``value(t) = start + (end - start) * f(clip((t - t0) / (t1 - t0), 0,
1))``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning_compress.names import resolve

Shape = Callable[[float], float]


def constant(p: float) -> float:
    """The end value from the first step on: ``f = 1``.

    Args:
        p: progress in [0, 1].

    Returns:
        1.0

    Examples:
        >>> constant(0.0)
        1.0
    """
    return 1.0


def linear(p: float) -> float:
    """Straight line: ``f = p``.

    Args:
        p: progress in [0, 1].

    Returns:
        Share of the way.

    Examples:
        >>> linear(0.25)
        0.25
    """
    return p


def cubic(p: float) -> float:
    """Fast first, slow at the end: ``f = 1 - (1 - p)^3`` (Zhu & Gupta 2017, To Prune or Not to Prune).

    Args:
        p: progress in [0, 1].

    Returns:
        Share of the way.

    Examples:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - p) ** 3


def polynomial(power: float = 0.5) -> Shape:
    """``f = p^power``.

    Args:
        power: > 0; below 1 is fast first, above 1 slow first.

    Returns:
        The shape.

    Raises:
        ValueError: power <= 0.

    Examples:
        >>> polynomial(2.0)(0.5)
        0.25
    """
    if power <= 0:
        raise ValueError(f"polynomial(power={power}): power must be > 0.")
    return _Power(power)


def cosine(p: float) -> float:
    """Slow at both ends: ``f = (1 - cos(pi p)) / 2``.

    Args:
        p: progress in [0, 1].

    Returns:
        Share of the way.

    Examples:
        >>> round(cosine(0.5), 9)
        0.5
    """
    return (1.0 - math.cos(math.pi * p)) / 2.0


def exponential(a: float = 5.0) -> Shape:
    """``f = (1 - e^(-a p)) / (1 - e^(-a))``.

    Args:
        a: steepness, not 0; larger is faster at first.

    Returns:
        The shape.

    Raises:
        ValueError: a is 0.

    Examples:
        >>> exponential(5.0)(1.0)
        1.0
    """
    if a == 0:
        raise ValueError("exponential(a=0) is a straight line: use 'linear'.")
    return _Exponential(a)


def steps(values: Mapping[float, float]) -> Shape:
    """Stairs: the value of the largest key that is <= p, 0 before the first; the last value must be 1.

    Args:
        values: progress -> share of the way, both in [0, 1].

    Returns:
        The shape.

    Raises:
        ValueError: keys or values outside [0, 1], or the stairs do not end at 1.

    Examples:
        >>> stairs = steps({0.0: 0.5, 0.5: 0.8, 1.0: 1.0})
        >>> stairs(0.25), stairs(0.75), stairs(1.0)
        (0.5, 0.8, 1.0)
    """
    pairs = tuple(sorted((float(p), float(v)) for p, v in values.items()))
    if not pairs or any(not (0 <= p <= 1 and 0 <= v <= 1) for p, v in pairs) or pairs[-1][1] != 1.0:
        raise ValueError(
            f"steps({dict(values)}): keys and values lie in [0, 1] and the last value is 1 (the end value)."
        )
    return _Stairs(pairs)


@dataclass(frozen=True)
class _Power:
    power: float

    def __call__(self, p: float) -> float:
        return float(p**self.power)


@dataclass(frozen=True)
class _Exponential:
    a: float

    def __call__(self, p: float) -> float:
        return math.expm1(-self.a * p) / math.expm1(-self.a)


@dataclass(frozen=True)
class _Stairs:
    pairs: tuple[tuple[float, float], ...]

    def __call__(self, p: float) -> float:
        return max(((q, v) for q, v in self.pairs if q <= p), default=(0.0, 0.0))[1]


SHAPES: dict[str, Shape] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "polynomial": polynomial(),
    "exponential": exponential(),
}


def shape(schedule: str | Mapping[float, float] | Shape) -> Shape:
    """The shape meant by a name, stairs, an import path or a function.

    Args:
        schedule: a name of ``SHAPES``, a mapping (see ``steps``), ``"package.module.function"``, or
            a function of progress.

    Returns:
        The shape.

    Raises:
        ValueError: unknown name.

    Examples:
        >>> shape("linear")(0.3)
        0.3
    """
    return steps(schedule) if isinstance(schedule, Mapping) else resolve(schedule, SHAPES, "schedule")


@dataclass(frozen=True)
class Schedule:
    """A shape between two steps and two values.

    Args:
        f: shape of progress.
        t0: first step, >= 0.
        t1: last step, >= t0; from then on the value is ``end``.
        start: value before t0.
        end: value from t1 on.

    Raises:
        ValueError: the schedule ends before it begins.

    Examples:
        >>> schedule = Schedule(cubic, t0=0, t1=100, start=0.0, end=0.8)
        >>> schedule(0), schedule(50), schedule(100)
        (0.0, 0.7000000000000001, 0.8)
    """

    f: Shape
    t0: float
    t1: float
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.t1 < self.t0:
            raise ValueError(
                f"the schedule ends (step {self.t1:g}) before it begins (step {self.t0:g}): set begin <= end."
            )

    def __call__(self, t: float) -> float:
        """Value at step ``t``; exactly ``end`` from t1 on and exactly ``start`` before t0."""
        if t < self.t0:
            return self.start
        if t >= self.t1:
            return self.end
        return self.start + (self.end - self.start) * self.f((t - self.t0) / (self.t1 - self.t0))


def to_steps(value: float, unit: str, *, total: float, per_epoch: float, name: str) -> int:
    """A point in training, given in steps, epochs or as a share of all steps, in optimizer steps.

    Args:
        value: the point, >= 0.
        unit: "fraction", "step" or "epoch".
        total: steps of the whole training (may be infinite).
        per_epoch: steps of one epoch.
        name: the option's name, for errors.

    Returns:
        Optimizer step, rounded to nearest.

    Raises:
        ValueError: unknown unit, negative value, fraction above 1 or of an endless training.

    Examples:
        >>> to_steps(0.5, "fraction", total=200, per_epoch=20, name="begin")
        100
    """
    if unit not in ("fraction", "step", "epoch"):
        raise ValueError(f"unit={unit!r} is unknown; allowed: 'fraction', 'step', 'epoch'.")
    if value < 0:
        raise ValueError(f"{name}={value} is negative; allowed: >= 0 {unit}s.")
    if unit == "step":
        return round(value)
    factor = total if unit == "fraction" else per_epoch
    if unit == "fraction" and value > 1:
        raise ValueError(
            f"{name}={value} with unit='fraction': allowed is [0, 1]; for literal steps set unit='step'."
        )
    if math.isinf(factor):
        raise ValueError(
            f"{name}={value} with unit={unit!r}: training has no known length, so give {name} with unit='step'."
        )
    return math.floor(value * factor + 0.5)
