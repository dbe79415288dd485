"""Few vectors for many: k-means in some dimensions, and the nearest row of a codebook."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.compiled import compiled
from lightning_compress.functional.segments import FloatArray, IntArray


def kmeans_vectors(
    vectors: npt.ArrayLike,
    clusters: int,
    *,
    iterations: int = 50,
    weights: npt.ArrayLike | None = None,
    seed: int = 0,
    sample: int = 1 << 16,
) -> FloatArray:
    r"""Centroids of a set of vectors: ``min_c sum_i w_i min_k |x_i - c_k|^2``, by Lloyd iterations from k-means++.

    Each first centroid is drawn with a probability in proportion to the cost that the vector has so far. Ties go to the
    first centroid; a centroid without vectors is dropped.

    Args:
        vectors: finite numbers, [n, b].
        clusters: K >= 1.
        iterations: largest number; the search ends when no vector changes its centroid.
        weights: importance of every vector, >= 0, [n]; None: all alike.
        seed: of the draws.
        sample: of more vectors, so many drawn ones are clustered.

    Returns:
        At most K different rows, [K, b], in lexicographic order.

    Raises:
        ValueError: no vectors, or an option out of range.

    Examples:
        >>> kmeans_vectors([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]], 2).tolist()
        [[0.0, 0.5], [9.0, 9.0]]

    Source: Arthur and Vassilvitskii 2007, k-means++; Jégou et al. 2011, Product Quantization for Nearest Neighbor
        Search.
    """
    x = np.ascontiguousarray(vectors, dtype=np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.ndim != 2 or not x.size or w.shape != (len(x),) or clusters < 1 or iterations < 1:
        raise ValueError(
            f"vectors of shape {x.shape} with weights {w.shape}, clusters={clusters}, iterations={iterations}: allowed "
            "are [n, b] vectors, [n] weights, and options >= 1."
        )
    random = np.random.default_rng(seed)
    if len(x) > sample:
        chosen = np.sort(random.permutation(len(x))[:sample])
        x, w = x[chosen], w[chosen]
    centroids = _start(x, w, clusters, random)
    labels = np.full(len(x), -1)
    for _ in range(iterations):
        new = nearest_rows(x, centroids)
        if np.array_equal(new, labels):
            break
        labels = new
        masses = np.bincount(labels, w, len(centroids))
        sums = np.stack([np.bincount(labels, w * column, len(centroids)) for column in x.T], axis=1)
        used = masses > 0
        centroids = sums[used] / masses[used, None]
        labels = (np.cumsum(used) - 1)[labels]
    return np.unique(centroids, axis=0)


def nearest_rows(vectors: npt.ArrayLike, codebook: npt.ArrayLike) -> IntArray:
    """Number of the nearest row of a codebook, ties to the first: ``argmin_k |x - c_k|^2``.

    Distances are sums of squared differences, so that a vector that is a row always finds it.

    Args:
        vectors: [n, b].
        codebook: [K, b].

    Returns:
        [n].

    Examples:
        >>> nearest_rows([[0.2, 0.0], [5.0, 5.0]], [[0.0, 0.0], [1.0, 1.0]]).tolist()
        [0, 1]
    """
    x = np.ascontiguousarray(vectors, dtype=np.float64)
    found: IntArray = _nearest(x, np.ascontiguousarray(codebook, dtype=np.float64))
    return found


def _start(x: FloatArray, w: FloatArray, clusters: int, random: np.random.Generator) -> FloatArray:
    chosen: list[FloatArray] = []
    distances = np.ones(len(x))
    while len(chosen) < clusters:
        places = np.cumsum(w * distances)
        if places[-1] == 0:
            break  # every vector is a centroid already
        place = int(np.searchsorted(places, random.random() * places[-1], side="right"))
        chosen.append(x[min(place, len(x) - 1)])
        gaps = np.square(x - chosen[-1]).sum(axis=1)
        distances = gaps if len(chosen) == 1 else np.minimum(distances, gaps)
    return np.unique(np.stack(chosen), axis=0)


@compiled()
def _nearest(x: FloatArray, codebook: FloatArray) -> IntArray:
    found = np.zeros(len(x), dtype=np.int64)
    for i in range(len(x)):
        best = np.inf
        for k in range(len(codebook)):
            distance = 0.0
            for j in range(x.shape[1]):
                gap = x[i, j] - codebook[k, j]
                distance += gap * gap
            if distance < best:
                best = distance
                found[i] = k
    return found
