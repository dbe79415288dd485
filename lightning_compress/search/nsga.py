"""The parts of NSGA-II as pure functions of arrays: which front, who survives, who has children.

Points are rows of objective values, all minimized. Source: Deb, Pratap, Agarwal and Meyarivan 2002, A Fast and Elitist
Multiobjective Genetic Algorithm: NSGA-II.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.tradeoff import Floats, Ints, dominance


def ranks(points: Floats) -> Ints:
    """Front of every point: 0 for those that none dominates, 1 for those that only these dominate, and so on.

    Args:
        points: [N, M].

    Returns:
        [N], >= 0.

    Examples:
        >>> from lightning_compress.search.nsga import ranks
        >>> import numpy as np
        >>> ranks(np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 3.0]])).tolist()
        [0, 0, 1]
    """
    over = dominance(points)
    found = np.full(len(points), -1, dtype=np.int64)
    level = 0
    while (found < 0).any():
        left = found < 0
        first = left & ~(over & left[:, None]).any(0)
        found[first] = level
        level += 1
    return found


def crowding(points: Floats) -> Floats:
    """How much room a point of a front has: ``sum_m (next_m - previous_m) / (max_m - min_m)``; infinite at both ends.

    Args:
        points: [N, M] of one front.

    Returns:
        [N], >= 0.

    Examples:
        >>> from lightning_compress.search.nsga import crowding
        >>> import numpy as np
        >>> crowding(np.array([[0.0, 4.0], [1.0, 2.0], [4.0, 0.0]])).tolist()
        [inf, 2.0, inf]
    """
    room = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        extent = values[order[-1]] - values[order[0]]
        room[order[[0, -1]]] = np.inf
        if extent > 0:
            room[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / extent
    return room


def order(points: Floats) -> tuple[Ints, Floats]:
    """Front and room of every point.

    Args:
        points: [N, M].

    Returns:
        Ranks [N] and crowding within each front [N].
    """
    level = ranks(points)
    room = np.zeros(len(points))
    for front in np.unique(level):
        room[level == front] = crowding(points[level == front])
    return level, room


def survivors(points: Floats, count: int) -> Ints:
    """The best points: by front, then by room, then by position.

    Args:
        points: [N, M].
        count: how many.

    Returns:
        Their positions, the best first.

    Examples:
        >>> from lightning_compress.search.nsga import survivors
        >>> import numpy as np
        >>> survivors(np.array([[3.0, 3.0], [1.0, 2.0], [2.0, 1.0]]), 2).tolist()
        [1, 2]
    """
    level, room = order(points)
    return np.lexsort((np.arange(len(points)), -room, level))[:count]


def tournament(level: Ints, room: Floats, rng: np.random.Generator) -> int:
    """The better of two points drawn at random: lower front, or more room in the same one.

    Args:
        level: ranks [N].
        room: crowding [N].
        rng: source of randomness.

    Returns:
        Its position.
    """
    a, b = (int(i) for i in rng.integers(len(level), size=2))
    return a if (level[a], -room[a]) <= (level[b], -room[b]) else b


def crossover(a: Floats, b: Floats, rng: np.random.Generator, rate: float = 0.9) -> Floats:
    """A child of two: with probability ``rate`` each gene comes from either with equal chance, else all from the first.

    Args:
        a: genes [L].
        b: genes [L].
        rng: source of randomness.
        rate: in [0, 1].

    Returns:
        Genes [L].
    """
    mixed = rng.random() < rate
    return np.where(rng.random(len(a)) < 0.5, b, a) if mixed else a.copy()


def mutate(
    genes: Floats,
    low: Floats,
    high: Floats,
    integer: npt.NDArray[np.bool_],
    rng: np.random.Generator,
    sigma: float = 0.1,
) -> Floats:
    """Change genes with probability 1 / L each: reals by a normal step of ``sigma`` times their range, integers by one.

    Args:
        genes: [L].
        low: smallest values [L].
        high: largest values [L].
        integer: which genes are integers [L].
        rng: source of randomness.
        sigma: standard deviation of the step, relative to the range.

    Returns:
        Genes [L] in their ranges.
    """
    hit = rng.random(len(genes)) < 1 / len(genes)
    step = np.where(
        integer, rng.choice([-1.0, 1.0], len(genes)), sigma * (high - low) * rng.standard_normal(len(genes))
    )
    return np.clip(np.where(hit, genes + step, genes), low, high)
