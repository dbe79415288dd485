"""How wide: one multiplier for all families of channels, so that the model has the size that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_HALVINGS = 40


@dataclass(frozen=True)
class Width:
    """One family of channels, as far as its width goes.

    Args:
        size: channels that it has.
        layer: width of the narrowest layer that they are in; larger than ``size`` where layers hold several families.
    """

    size: int
    layer: int

    def kept(self, share: float, minimum: int, round_to: int) -> int:
        """``max(minimum, r round(w n / r))``: n = size, w the share, r what it is rounded to, at most n.

        Args:
            share: w in [0, 1].
            minimum: channels that every layer keeps, of those it has.
            round_to: r.

        Returns:
            Channels to keep, at least 1.

        Examples:
            >>> Width(64, 64).kept(0.3, minimum=8, round_to=1), Width(64, 64).kept(0.1, minimum=8, round_to=1)
            (19, 8)
        """
        share = min(1.0, max(share, minimum / self.layer))
        wanted = round_to * int(share * self.size / round_to + 0.5)
        return max(1, min(self.size, max(wanted, round_to)))


class UnreachableError(ValueError):
    """No widths give the size that is asked for; ``least`` is the smallest that some give."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


def fit_widths(
    widths: Sequence[Width],
    count: Callable[[Sequence[int]], int],
    goal: float,
    *,
    tolerance: float = 0.1,
    minimum: int = 8,
    round_to: int = 1,
) -> list[int]:
    """The widths of a model whose size is within a tolerance of a goal: ``|P / goal - 1| <= tolerance``.

    One multiplier w for all families is found by bisection. If rounding leaves no such w, single families get wider or
    narrower by one step, each time the one that comes closest. The minimum is halved as long as it is in the way.

    Args:
        widths: the families.
        count: kept channels of every family -> size P of the model; must not fall when one grows.
        goal: P that is asked for, > 0.
        tolerance: relative, > 0.
        minimum: channels that a layer keeps where the goal allows it, >= 1.
        round_to: widths are multiples of it where a family has so many.

    Returns:
        Kept channels of every family.

    Raises:
        UnreachableError: even the narrowest model is too large, or no widths come close enough.

    Examples:
        >>> fit_widths([Width(64, 64), Width(64, 64)], lambda k: k[0] * k[1], 0.25 * 64 * 64)
        [32, 32]
    """

    def at(share: float, least: int) -> list[int]:
        return [width.kept(share, least, round_to) for width in widths]

    while minimum > 1 and count(at(0.0, minimum)) > goal:
        minimum //= 2
    least = count(at(0.0, minimum))
    if least > goal * (1 + tolerance):
        raise UnreachableError(f"the narrowest model has {least:,} parameters.", least)
    low, high = 0.0, 1.0
    best, off = at(low, minimum), abs(least - goal)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = at(middle, minimum)
        size = count(kept)
        if abs(size - goal) < off:
            best, off = kept, abs(size - goal)
        low, high = (middle, high) if size < goal else (low, middle)
        if at(low, minimum) == at(high, minimum):
            break
    return _stepped(widths, best, count, goal, tolerance, round_to)


def _stepped(
    widths: Sequence[Width],
    kept: list[int],
    count: Callable[[Sequence[int]], int],
    goal: float,
    tolerance: float,
    round_to: int,
) -> list[int]:
    """The same widths if they are close enough, else with single ones changed by steps until they are."""
    off = abs(count(kept) - goal)
    while off > tolerance * goal:
        sign = 1 if count(kept) < goal else -1
        tries = []
        for i, width in enumerate(widths):
            new = kept[i] + sign * round_to
            if 1 <= new <= width.size:
                changed = [*kept[:i], new, *kept[i + 1 :]]
                tries.append((abs(count(changed) - goal), i, changed))
        closest = min(tries, default=None)
        if closest is None or closest[0] >= off:
            raise UnreachableError(
                f"the nearest that widths in steps of {round_to} give are {count(kept):,} parameters.",
                count(kept),
            )
        off, _, kept = closest
    return kept


def evenly(size: int, count: int) -> list[int]:
    """Indices spread over a range, each in the middle of its part: ``floor((i + 1/2) size / count)``.

    Args:
        size: length of the range.
        count: how many, at most ``size``.

    Returns:
        Rising indices.

    Examples:
        >>> evenly(16, 4)
        [2, 6, 10, 14]
    """
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def strongest(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the highest scores; the first ones of equal scores.

    Args:
        scores: one per channel.
        count: how many.

    Returns:
        Rising indices.

    Examples:
        >>> strongest([0.1, 0.9, 0.5], 2)
        [1, 2]
    """
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def equal_steps(values: Sequence[float], count: int) -> list[int]:
    """Indices of the values nearest to equal steps from the lowest to the highest, so that the range stays.

    Args:
        values: such as the sizes of frequencies.
        count: how many, at most as many as there are.

    Returns:
        Rising indices.

    Examples:
        >>> equal_steps([0.0, 0.1, 0.2, 5.2, 9.0, 10.0], 3)
        [0, 3, 5]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    low, high = values[order[0]], values[order[-1]]
    chosen: list[int] = []
    at = 0
    for i in range(count):
        goal = low + (high - low) * (i / (count - 1) if count > 1 else 0.5)
        last = len(order) - (count - i)  # as many as are still wanted are left behind it
        at = min(range(at, last + 1), key=lambda j: abs(values[order[j]] - goal))
        chosen.append(order[at])
        at += 1
    return sorted(chosen)
