"""The weakest strength that meets a limit, in few measurements, each of which is dear."""

from __future__ import annotations

import math
from collections.abc import Callable

_CLOSE = 1 / 4096  # strengths that are closer than this are one


def weakest(
    measure: Callable[[float], float],
    *,
    most: float = 1.0,
    evaluations: int = 20,
    tolerance: float = 0.005,
) -> tuple[float, bool]:
    r"""The smallest strength s in [0, most] with ``measure(s) <= 1``, by bisection.

    The measure is expected to fall with s, and need not: of all strengths that were measured and meet the limit the
    smallest is returned, which is not worse than bisection's own. Inside the bracket (a, b), ``measure(a) > 1 >=
    measure(b)``, the next strength is where the logarithm of the measure would meet the limit if it were straight,
    at least a tenth of the bracket from its ends; every third one is the middle.

    Args:
        measure: strength -> what was reached / what is allowed, >= 0; infinity and NaN do not meet the limit.
        most: largest strength.
        evaluations: measurements at most, >= 2.
        tolerance: stop when a strength meets the limit and the measure is at least 1 - tolerance.

    Returns:
        The strength, and whether it meets the limit; if none does, the one with the smallest measure.

    Examples:
        >>> from lightning_compress.pipelines.bisection import weakest
        >>> found, met = weakest(lambda s: 4 * (1 - s), tolerance=0.001)
        >>> met, abs(found - 0.75) < 0.001
        (True, True)
        >>> weakest(lambda s: 2 - s / 2)
        (1.0, False)
    """
    seen: dict[float, float] = {}

    def at(strength: float) -> float:
        value = measure(strength)
        seen[strength] = value if value == value else math.inf
        return seen[strength]

    low, high = 0.0, most
    if at(low) > 1 and at(high) <= 1:
        while len(seen) < evaluations and high - low > _CLOSE and seen[high] < 1 - tolerance:
            middle = (low + high) / 2
            if len(seen) % 3 != 1:
                middle = _crossing(low, high, seen[low], seen[high], 1 - tolerance / 2)
            if at(middle) <= 1:
                high = middle
            else:
                low = middle
    met = [strength for strength, value in seen.items() if value <= 1]
    if met:
        return min(met), True
    return min(seen, key=lambda strength: (seen[strength], strength)), False


def _crossing(low: float, high: float, above: float, below: float, aim: float) -> float:
    """Where a line through the logarithms meets the aim, kept away from the ends."""
    share = 0.5
    if below > 0 and math.isfinite(above):
        share = math.log(above / aim) / math.log(above / below)
    return low + min(0.9, max(0.1, share)) * (high - low)
