"""How the strength grows that pushes chosen groups of weights to zero."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """Options of kind="growing": which groups are pushed to zero, and how the strength grows.

    Args:
        share: of the groups of every layer, in (0, 1).
        step: what the strength grows by, > 0.
        ceiling: what it grows to, > 0.
        interval: optimizer steps between two values, >= 1.

    Raises:
        ValueError: an option outside its range.

    Examples:
        >>> [Growth(step=0.25, ceiling=1.0, interval=10).strength(0.5, t) for t in (0, 9, 10, 99)]
        [0.5, 0.5, 0.75, 1.0]
    """

    share: float = 0.5
    step: float = 1e-4
    ceiling: float = 1.0
    interval: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.step <= 0 or self.ceiling <= 0 or self.interval < 1:
            raise ValueError(f"{self}: allowed is 0 < share < 1, step > 0, ceiling > 0, interval >= 1.")

    def strength(self, first: float, since: int) -> float:
        """``min(first + step floor(since / interval), ceiling)``.

        Args:
            first: the strength to begin with.
            since: optimizer steps since then.

        Returns:
            The strength.
        """
        return min(first + self.step * (since // self.interval), self.ceiling)
