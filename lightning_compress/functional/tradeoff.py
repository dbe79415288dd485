"""Trade-offs between quantities: who dominates whom, the front, its knee, the best under a limit.

Points are rows of values, all minimized, in `dominance`, `pareto` and `hypervolume`; the other functions take ratios,
to be large, and errors, to be small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def dominance(points: Floats, *, strict: bool = False) -> npt.NDArray[np.bool_]:
    """Which point dominates which: nowhere larger, somewhere smaller.

    Args:
        points: [N, M].
        strict: smaller everywhere instead.

    Returns:
        [N, N], True at (i, j) if i dominates j.

    Examples:
        >>> from lightning_compress.functional.tradeoff import dominance
        >>> import numpy as np
        >>> dominance(np.array([[1.0, 1.0], [2.0, 1.0]])).tolist()
        [[False, True], [False, False]]
    """
    a, b = points[:, None, :], points[None, :, :]
    smaller = a < b
    return np.asarray(smaller.all(-1) if strict else (a <= b).all(-1) & smaller.any(-1))


def pareto(points: Floats, *, strict: bool = False) -> Ints:
    """The points that none dominates, of identical ones the first, sorted by their values.

    Args:
        points: [N, M].
        strict: a point is dominated only by one that is smaller everywhere.

    Returns:
        Positions.

    Examples:
        >>> from lightning_compress.functional.tradeoff import pareto
        >>> import numpy as np
        >>> pareto(np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [2.0, 2.0]])).tolist()
        [1, 0]
    """
    if not len(points):
        return np.zeros(0, dtype=np.int64)
    _, first = np.unique(points, axis=0, return_index=True)  # sorted by value
    return first[~dominance(points[first], strict=strict).any(0)]


def hypervolume(points: Floats, reference: Floats) -> float:
    """Volume of what is dominated by the points and dominates the reference; exact, by slices along the last axis.

    Args:
        points: [N, M]; those that are not below the reference everywhere add nothing.
        reference: [M].

    Returns:
        The volume, >= 0.

    Examples:
        >>> from lightning_compress.functional.tradeoff import hypervolume
        >>> import numpy as np
        >>> hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0]))
        3.0

    Source: Zitzler and Thiele 1998, Multiobjective Optimization Using Evolutionary Algorithms.
    """
    inside = points[(points < reference).all(1)]
    front = inside[pareto(inside)]
    if not len(front):
        return 0.0
    if front.shape[1] == 1:
        return float(reference[0] - front.min())
    if front.shape[1] == 2:  # sorted by the first objective, so the second one falls
        widths = np.diff(np.append(front[:, 0], reference[0]))
        return float((widths * (reference[1] - front[:, 1])).sum())
    front = front[np.argsort(front[:, -1], kind="stable")]
    ends = np.append(front[1:, -1], reference[-1])
    slices = (
        (end - front[i, -1]) * hypervolume(front[: i + 1, :-1], reference[:-1])
        for i, end in enumerate(ends)
        if end > front[i, -1]
    )
    return float(sum(slices))


def pareto_front(
    ratios: Sequence[float],
    errors: Sequence[float],
    names: Sequence[str] | None = None,
    *,
    strict: bool = False,
) -> list[int]:
    """The points that none beats: j dominates i if ratio_j >= ratio_i and error_j <= error_i, one of both strictly.

    Args:
        ratios: compression ratios, larger is better.
        errors: of the same points, smaller is better.
        names: of identical points the first by name is kept; None: the first in order.
        strict: both must be strict for one point to dominate another.

    Returns:
        Positions, by rising ratio. Points with a value that is NaN or infinite are left out.

    Raises:
        ValueError: the lengths differ.

    Examples:
        >>> from lightning_compress.functional.tradeoff import pareto_front
        >>> pareto_front([4.0, 2.0, 3.0, 9.0], [0.1, 0.0, 0.2, float("nan")])
        [1, 0]

    Source: Pareto 1906, Manuale di economia politica.
    """
    names = [""] * len(ratios) if names is None else names
    if not len(ratios) == len(errors) == len(names):
        raise ValueError(
            f"{len(ratios)} ratios, {len(errors)} errors, {len(names)} names: needed is one of each for every point."
        )
    usable = [i for i in range(len(ratios)) if np.isfinite(ratios[i]) and np.isfinite(errors[i])]
    usable.sort(key=lambda i: names[i])
    points = np.array([(-ratios[i], errors[i]) for i in usable], dtype=np.float64).reshape(-1, 2)
    front = pareto(points, strict=strict)
    return [usable[i] for i in front[::-1]]


class Knee(NamedTuple):
    """The knee of a front.

    Args:
        position: of the point; None if there is no point at all.
        found: False if the front has no knee, and the point is the one of lowest error.
    """

    position: int | None
    found: bool


def knee_point(
    ratios: Sequence[float],
    errors: Sequence[float],
    names: Sequence[str] | None = None,
    *,
    scale: str = "linear",
) -> Knee:
    """The point of the front behind which a larger ratio costs more error than before.

    Both axes are mapped to [0, 1] by the front's smallest and largest values. Of the inner points that lie on the
    better side of the chord between both ends, it is the one farthest from it: the largest ``x - y``, with x the mapped
    ratio and y the mapped error.

    Args:
        ratios: compression ratios, > 0.
        errors: of the same points.
        names: of the same points, as for ``pareto_front``.
        scale: "linear", or "log": log2 of the ratios.

    Returns:
        The position of the point; of several equally far ones that of the smallest ratio.

    Raises:
        ValueError: an unknown scale, or a ratio <= 0 under "log".

    Examples:
        >>> from lightning_compress.functional.tradeoff import knee_point
        >>> knee_point([1.0, 4.0, 5.0], [0.0, 0.05, 0.5])
        Knee(position=1, found=True)
        >>> knee_point([1.0, 2.0], [0.0, 0.5])
        Knee(position=0, found=False)

    Source: Das 1999, On Characterizing the "Knee" of the Pareto Curve; Satopää et al. 2011, Finding a "Kneedle" in a
    Haystack.
    """
    if scale not in ("linear", "log"):
        raise ValueError(f"scale={scale!r} is unknown; allowed: linear, log.")
    front = pareto_front(ratios, errors, names)
    if not front:
        return Knee(None, False)
    x = np.array([ratios[i] for i in front], dtype=np.float64)
    y = np.array([errors[i] for i in front], dtype=np.float64)
    if scale == "log":
        if x[0] <= 0:
            raise ValueError(f"ratio {x[0]}: scale='log' needs ratios > 0.")
        x = np.log2(x)
    if len(front) < 3:
        return Knee(front[0], False)
    gap = (x - x[0]) / (x[-1] - x[0]) - (y - y[0]) / (y[-1] - y[0])
    best = 1 + int(np.argmax(gap[1:-1]))
    return Knee(front[best], True) if gap[best] > 0 else Knee(front[0], False)


def best_under(
    ratios: Sequence[float], errors: Sequence[float], limit: float, names: Sequence[str] | None = None
) -> int | None:
    """The largest ratio among the points with an error of at most a limit.

    Args:
        ratios: compression ratios.
        errors: of the same points.
        limit: largest error allowed.
        names: decide between points that are equal in both.

    Returns:
        Its position, of equal ratios that of the smaller error; None if no point keeps the limit.

    Examples:
        >>> from lightning_compress.functional.tradeoff import best_under
        >>> best_under([2.0, 4.0, 8.0], [0.0, 0.1, 0.5], 0.2), best_under([2.0], [0.3], 0.2)
        (1, None)
    """
    front = pareto_front(ratios, errors, names)  # ratio and error rise together along it
    return next((i for i in reversed(front) if errors[i] <= limit), None)
