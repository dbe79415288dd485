"""Few values for many: the best codebook of a set of numbers, and the nearest entry of every number."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_compress.functional.compiled import compiled
from lightning_compress.functional.segments import FloatArray, IntArray, best_segments

METHODS = ("optimal", "lloyd")
STARTS = ("linear", "quantile", "kmeans++")
_CHUNK = 1 << 20  # numbers that are compared at once: bounds the float64 copies
_FINER = 64  # halvings of the width of bins that are tried
_POLISH = 20  # Lloyd iterations from the best codebook of the bins to one of the numbers themselves

Array = npt.NDArray[Any]


class Clustering(NamedTuple):
    """Centroids in ascending order, their cost, and a lower bound of the least cost for so many (0: none known)."""

    centroids: FloatArray
    cost: float
    bound: float


def kmeans_1d(
    values: npt.ArrayLike,
    clusters: int,
    *,
    method: str = "optimal",
    init: str = "linear",
    iterations: int = 50,
    weights: npt.ArrayLike | None = None,
    seed: int = 0,
    points: int = 1 << 20,
) -> Clustering:
    r"""The centroids of a set of numbers: ``min_c sum_i w_i min_k (x_i - c_k)^2``.

    "optimal" finds the least cost. It is exact for up to ``points`` different numbers. More are put into bins of equal
    width first, as narrow as that number allows; the best centroids of the bins, B their cost and W the cost of putting
    every number into the middle of its bin, then go through Lloyd iterations on the numbers. No centroids can cost less
    than ``(sqrt(B) - sqrt(W))^2``, the ``bound``: the triangle inequality. Memory is a small multiple of that of
    the numbers either way, whatever K. "lloyd" alternates between nearest centroid (ties to the lower) and means from a
    given start, until no number changes its centroid; a centroid without numbers is dropped.

    Args:
        values: finite numbers of any shape.
        clusters: K >= 1.
        method: "optimal" or "lloyd".
        init: start of "lloyd": "linear" (K points from the smallest to the largest), "quantile" or "kmeans++".
        iterations: largest number of "lloyd".
        weights: importance of every number, >= 0, same shape; None: all alike.
        seed: of "kmeans++".
        points: different numbers up to which "optimal" is exact.

    Returns:
        At most K centroids, cost and bound; of no more than K different numbers these themselves.

    Raises:
        ValueError: no number, one that is not finite, weights that do not fit, or an option out of range.

    Examples:
        >>> found = kmeans_1d([0.0, 1.0, 8.0, 9.0, 10.0], 2)
        >>> found.centroids.tolist(), found.cost == found.bound == 2.5
        ([0.5, 9.0], True)

    Source: Wu 1991, Optimal Quantization by Matrix Searching; Lloyd 1982, Least Squares Quantization in PCM; Arthur and
        Vassilvitskii 2007, k-means++.
    """
    for option, value, allowed in (("method", method, METHODS), ("init", init, STARTS)):
        if value not in allowed:
            raise ValueError(f"{option}={value!r} is unknown; allowed: {', '.join(allowed)}.")
    for option, number in (("clusters", clusters), ("iterations", iterations), ("points", points)):
        if number < 1:
            raise ValueError(f"{option}={number}: allowed is >= 1.")
    x, w = _sorted(values, weights)
    # Squares of what is left after this division neither overflow nor vanish; a power of two changes no digit.
    scale = math.ldexp(1.0, math.frexp(float(max(abs(x[0]), abs(x[-1]))))[1] - 1)
    merged = _merged(x, w, scale, max(points, clusters))
    if merged.width == 0 and len(merged.values) <= clusters:
        return Clustering(merged.values, 0.0, 0.0)
    bound = 0.0
    if method == "lloyd":
        centroids = _lloyd(x, w, _start(merged, init, clusters, seed), iterations)
    else:
        parts = best_segments(merged.values, merged.masses, clusters)
        centroids = _means(x, w, merged.places[parts])
        if merged.width > 0:
            least = _cost(
                merged.values, merged.masses, parts, _means(merged.values, merged.masses, parts), scale
            )
            bound = max(math.sqrt(least) - math.sqrt(merged.within), 0.0) ** 2
            centroids = _lloyd(x, w, centroids, _POLISH)
    cost = _cost(x, w, _cuts(x, centroids), centroids, scale)
    exact = method == "optimal" and merged.width == 0
    return Clustering(centroids, cost * scale * scale, (cost if exact else min(bound, cost)) * scale * scale)


def nearest(values: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest entry of a sorted codebook, ties to the lower: ``argmin_k |x - c_k|``.

    Distances are compared in double precision, so that a value that is an entry always finds it.

    Args:
        values: real numbers of any shape.
        codebook: [K], ascending.

    Returns:
        int64, shape and device of the values.

    Examples:
        >>> nearest(torch.tensor([-9.0, 0.4, 0.5, 0.6]), torch.tensor([0.0, 1.0])).tolist()
        [0, 0, 0, 1]
    """
    entries = codebook.detach().to(values.device, torch.float64).contiguous()
    found = torch.empty(values.numel(), dtype=torch.int64, device=values.device)
    pieces = torch.split(values.detach().reshape(-1), _CHUNK)
    for piece, out in zip(pieces, torch.split(found, _CHUNK), strict=True):
        x = piece.double()
        above = torch.searchsorted(entries, x).clamp_max_(len(entries) - 1)
        below = (above - 1).clamp_min_(0)
        torch.where(x - entries[below] <= entries[above] - x, below, above, out=out)
    return found.view(values.shape)


# -- numbers in order, and in bins ---------------------------------------------------------------------------


class _Merged(NamedTuple):
    """Numbers in bins: mean and mass of each, where each begins among all numbers, and what the means cost."""

    values: FloatArray
    masses: FloatArray
    places: IntArray
    width: float
    within: float


def _sorted(values: npt.ArrayLike, weights: npt.ArrayLike | None) -> tuple[Array, FloatArray]:
    """The numbers in ascending order, and their weights (none: all ones)."""
    x = np.asarray(values).reshape(-1)
    if x.dtype not in (np.float32, np.float64):
        x = x.astype(np.float64)
    if not x.size:
        raise ValueError("there are no values to cluster.")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).sum())} of {x.size} values are not finite.")
    if weights is None:
        return np.sort(x), np.zeros(0)
    w = np.asarray(weights, dtype=np.float64).reshape(-1)
    if w.shape != x.shape or not (w >= 0).all() or not 0 < w.sum() < math.inf:
        raise ValueError(
            f"{w.size} weights for {x.size} values: as many are needed, all >= 0, finite and not all 0."
        )
    order = np.argsort(x, kind="stable")
    order = order[w[order] > 0]
    return x[order], w[order] / w.max()


def _merged(x: Array, w: FloatArray, scale: float, points: int) -> _Merged:
    """Equal numbers as one, and neighbours in one bin if there are more different ones than points."""
    low, width = float(x[0]), 0.0
    if _count(x, low, 0.0) > points:
        width = float(x[-1]) / points - low / points
        for _ in range(_FINER):
            if _count(x, low, width / 2) > points:
                break
            width /= 2
    return _Merged(*_bins(x, w, low, width, _count(x, low, width), scale))


@compiled()
def _same(a: float, b: float, low: float, width: float) -> bool:
    """Whether two numbers lie in one bin."""
    return a == b or (width > 0 and math.floor((a - low) / width) == math.floor((b - low) / width))


@compiled()
def _count(x: Array, low: float, width: float) -> int:
    count = 1
    for i in range(1, len(x)):
        if not _same(x[i - 1], x[i], low, width):
            count += 1
    return count


@compiled()
def _bins(x: Array, w: FloatArray, low: float, width: float, count: int, scale: float) -> Any:
    values, masses = np.zeros(count), np.zeros(count)
    places = np.zeros(count + 1, dtype=np.int64)
    within, start = 0.0, 0
    for k in range(count):
        end = start + 1
        while end < len(x) and _same(x[end - 1], x[end], low, width):
            end += 1
        values[k], masses[k] = _mean(x, w, start, end)
        within += _spread(x, w, start, end, values[k], scale)
        places[k + 1] = start = end
    return values, masses, places, width, within


@compiled()
def _mean(x: Array, w: FloatArray, start: int, end: int) -> Any:
    """Mean and mass of a part, with the first number as the origin."""
    origin, total, mass = float(x[start]), 0.0, 0.0
    for i in range(start, end):
        weight = w[i] if len(w) else 1.0
        total += weight * (x[i] - origin)
        mass += weight
    return origin + total / mass, mass


@compiled()
def _spread(x: Array, w: FloatArray, start: int, end: int, mean: float, scale: float) -> float:
    total = 0.0
    for i in range(start, end):
        gap = (x[i] - mean) / scale
        total += (w[i] if len(w) else 1.0) * gap * gap
    return total


@compiled()
def _means(x: Array, w: FloatArray, cuts: IntArray) -> FloatArray:
    found = np.zeros(len(cuts) - 1)
    for k in range(len(found)):
        found[k] = _mean(x, w, cuts[k], cuts[k + 1])[0]
    return found


@compiled()
def _cost(x: Array, w: FloatArray, cuts: IntArray, centroids: FloatArray, scale: float) -> float:
    total = 0.0
    for k in range(len(centroids)):
        total += _spread(x, w, cuts[k], cuts[k + 1], centroids[k], scale)
    return total


# -- Lloyd ---------------------------------------------------------------------------------------------------


def _cuts(x: Array, centroids: FloatArray) -> IntArray:
    """Where the numbers of each centroid begin, and the end."""
    middles = centroids[:-1] / 2 + centroids[1:] / 2
    edges = middles.astype(x.dtype)  # rounded down: comparing with doubles would copy all numbers
    edges = np.where(edges > middles, np.nextafter(edges, edges.dtype.type(-math.inf)), edges)
    return np.concatenate([[0], np.searchsorted(x, edges, side="right"), [len(x)]])


def _lloyd(x: Array, w: FloatArray, centroids: FloatArray, iterations: int) -> FloatArray:
    """Centroids after Lloyd iterations from others."""
    cuts = np.zeros(0, dtype=np.int64)
    for _ in range(iterations):
        new = np.unique(_cuts(x, centroids))  # a cut that occurs twice: nothing between
        if np.array_equal(new, cuts):
            break
        cuts, centroids = new, _means(x, w, new)
    return centroids


def _start(merged: _Merged, init: str, clusters: int, seed: int) -> FloatArray:
    values, masses = merged.values, merged.masses
    if init == "linear":
        return np.linspace(values[0], values[-1], clusters)
    if init == "quantile":
        places = np.cumsum(masses)
        wanted = (np.arange(clusters) + 0.5) / clusters * places[-1]
        return np.unique(values[np.minimum(np.searchsorted(places, wanted), len(values) - 1)])
    random = np.random.default_rng(seed)
    chosen: list[float] = []
    distances, span = np.ones(len(values)), values[-1] - values[0]
    for _ in range(clusters):
        places = np.cumsum(masses * distances)
        place = int(np.searchsorted(places, random.random() * places[-1], side="right"))
        chosen.append(float(values[min(place, len(values) - 1)]))
        gaps = np.square((values - chosen[-1]) / span)
        distances = gaps if len(chosen) == 1 else np.minimum(distances, gaps)
    return np.unique(chosen)
