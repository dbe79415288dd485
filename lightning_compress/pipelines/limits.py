"""Targets: what is asked for, whether it can be meant, and how near a model came."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

# target -> what of the result it bounds
BOUNDS = {
    "target_ratio": "size_fraction",
    "target_bytes": "file_bytes",
    "max_error": "error",
    "max_accuracy_drop": "accuracy_drop",
}
SIZES = ("target_ratio", "target_bytes")


@dataclass(frozen=True)
class Limits:
    """Upper bounds.

    Args:
        asked: target name (``target_ratio``, ``target_bytes``, ``max_error``, ``max_accuracy_drop``) -> bound.

    Raises:
        ValueError: a bound out of range; names the range.

    Examples:
        >>> from lightning_compress.pipelines.limits import Limits
        >>> limits = Limits({"target_ratio": 0.5, "max_error": 0.02})
        >>> limits.excess({"size_fraction": 0.25, "error": 0.03})
        1.5
        >>> limits.missed({"size_fraction": 0.25, "error": 0.03})
        ['max_error=0.02 (reached 0.03)']
    """

    asked: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, value in self.asked.items():
            ratio, count = name == "target_ratio", name == "target_bytes"
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value <= 0 or (ratio and value >= 1) or (count and value < 1):
                allowed = f"0 < {name} < 1" if ratio else f"{name} >= 1" if count else f"{name} > 0"
                raise ValueError(f"{name}={value!r}: allowed is {allowed}.")

    def __bool__(self) -> bool:
        return bool(self.asked)

    @property
    def of_size(self) -> bool:
        """Whether the size of the file is bounded."""
        return any(name in self.asked for name in SIZES)

    def needs(self, quantity: str) -> bool:
        """Whether a quantity of the result is bounded."""
        return any(BOUNDS[name] == quantity for name in self.asked)

    def excess(self, reached: Mapping[str, float], only: Collection[str] = tuple(BOUNDS)) -> float:
        """The largest ``reached / asked``; at most 1 if all bounds hold, infinity if something is not finite.

        Args:
            reached: what of the result -> value.
            only: the targets that count.

        Returns:
            The ratio; 0 without targets.
        """
        ratios = [reached[BOUNDS[name]] / bound for name, bound in self.asked.items() if name in only]
        return max((r if math.isfinite(r) else math.inf for r in ratios), default=0.0)

    def missed(self, reached: Mapping[str, float]) -> list[str]:
        """The bounds that do not hold, in words.

        Args:
            reached: what of the result -> value.

        Returns:
            One text for each.
        """
        return [
            f"{name}={bound:g} (reached {reached[BOUNDS[name]]:.6g})"
            for name, bound in self.asked.items()
            if self.excess(reached, [name]) > 1
        ]
