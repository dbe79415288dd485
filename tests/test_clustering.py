"""One-dimensional k-means against brute force, repeated points and an independent implementation."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_compress.functional.clustering import STARTS, kmeans_1d, nearest
from lightning_compress.functional.segments import best_segments
from lightning_compress.functional.vectors import kmeans_vectors, nearest_rows

NUMBERS = st.lists(
    st.one_of(st.integers(-20, 20).map(float), st.floats(-1e3, 1e3, allow_subnormal=False)),
    min_size=1,
    max_size=40,
)


def cost(values, centroids, weights=None):
    """Of every value at its nearest centroid, by all distances."""
    x, c = np.asarray(values, dtype=np.float64).reshape(-1), np.asarray(centroids)
    squares = np.square(x[:, None] - c).min(axis=1)
    return float(squares.sum() if weights is None else (squares * np.asarray(weights)).sum())


def cut_cost(x, w, cuts):
    parts = [(x[a:b], w[a:b]) for a, b in itertools.pairwise(cuts)]
    return sum(float((q * (p - np.average(p, weights=q)) ** 2).sum()) for p, q in parts)


def reference(values, clusters):
    kmeans1d = pytest.importorskip("kmeans1d")
    labels, centroids = kmeans1d.cluster(list(values), clusters)
    return float(np.square(np.asarray(values) - np.asarray(centroids)[labels]).sum())


@settings(max_examples=150, deadline=None)
@given(NUMBERS, st.integers(1, 8))
def test_optimal_equals_the_reference(values, clusters):
    found = kmeans_1d(values, clusters)
    expected = reference(values, min(clusters, len(values)))
    size = 1 + float(np.square(values).sum())
    assert found.cost == pytest.approx(expected, rel=1e-6, abs=1e-12 * size)
    assert found.cost == pytest.approx(cost(values, found.centroids), rel=1e-9, abs=1e-13 * size)
    assert found.bound == found.cost and len(found.centroids) <= clusters
    assert (np.diff(found.centroids) > 0).all()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("clusters", [2, 7, 64])
def test_optimal_equals_the_reference_at_any_magnitude(magnitude, shift, clusters):
    values = (np.random.default_rng(3).standard_normal(2000) + shift) * magnitude
    # The reference loses its digits far from zero: it is given values around it.
    assert kmeans_1d(values, clusters).cost == pytest.approx(
        reference(values - shift * magnitude, clusters), rel=1e-6
    )


def test_two_clusters_of_thirty_points_by_brute_force():
    values = np.random.default_rng(0).standard_t(2, 30)
    ordered = np.sort(values)
    best = min(cut_cost(ordered, np.ones(30), (0, k, 30)) for k in range(1, 30))
    assert kmeans_1d(values, 2).cost == pytest.approx(best, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_number_of_segments_by_brute_force(data):
    """Integer values lie on long plateaus, where many numbers of segments have one price."""
    x = np.sort(np.array(data.draw(st.lists(st.integers(0, 30), min_size=2, max_size=8, unique=True)), float))
    n = len(x)
    w = np.array(data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)), float)
    for count in range(1, n + 1):
        cuts = best_segments(x, w, count)
        assert len(cuts) == count + 1 and (np.diff(cuts) > 0).all()
        ways = itertools.combinations(range(1, n), count - 1)
        best = min(cut_cost(x, w, (0, *way, n)) for way in ways)
        assert cut_cost(x, w, cuts) == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_weights_are_repetitions(data, clusters):
    values = data.draw(NUMBERS)
    counts = data.draw(st.lists(st.integers(0, 4), min_size=len(values), max_size=len(values)))
    assume(sum(counts))
    for method in ("optimal", "lloyd"):
        whole = kmeans_1d(np.repeat(values, counts), clusters, method=method)
        found = kmeans_1d(values, clusters, method=method, weights=counts)
        # Weights are relative: the largest is 1.
        size = 1 + float(np.square(values).sum())
        assert found.cost * max(counts) == pytest.approx(whole.cost, rel=1e-9, abs=1e-12 * size)
        same = cost(values, found.centroids, counts)
        assert same == pytest.approx(whole.cost, rel=1e-9, abs=1e-12 * size)


@pytest.mark.parametrize("values", [[2.5], [1.0] * 9, [0.0, -0.0], [3.0, 3.0, -1.0], [0.0, 1e-300, 1e300]])
def test_few_different_values_are_their_own_centroids(values):
    found = kmeans_1d(values, 4)
    assert found.centroids.tolist() == np.unique(values).tolist() and found.cost == 0.0


@pytest.mark.parametrize("clusters", [2, 16, 100])
def test_bins_cost_no_more_than_their_bound_says(clusters):
    values = np.random.default_rng(1).standard_t(3, 50_000).astype(np.float32)
    exact = kmeans_1d(values, clusters)
    for points in (1 << 10, 1 << 13):
        found = kmeans_1d(values, clusters, points=points)
        assert found.bound <= exact.cost * (1 + 1e-12) <= found.cost * (1 + 2e-12)
        assert found.cost == pytest.approx(cost(values, found.centroids), rel=1e-9)
    assert found.cost < 1.0001 * exact.cost


def test_bins_hold_far_values_and_the_dense_middle():
    values = np.concatenate([np.random.default_rng(2).standard_normal(30_000), [1e6, -3e7]])
    found = kmeans_1d(values, 18, points=4096)
    assert found.cost < 1.001 * kmeans_1d(values, 18).cost and found.cost / found.bound < 1.2


@settings(max_examples=60, deadline=None)
@given(NUMBERS, st.integers(2, 6), st.sampled_from(STARTS))
def test_lloyd_ends_where_it_stays(values, clusters, init):
    found = kmeans_1d(values, clusters, method="lloyd", init=init, iterations=500)
    labels = nearest(torch.tensor(values, dtype=torch.float64), torch.from_numpy(found.centroids)).numpy()
    assert set(labels) == set(range(len(found.centroids))), "empty ones are dropped"
    means = [np.mean(np.asarray(values)[labels == k]) for k in range(len(found.centroids))]
    assert np.allclose(means, found.centroids, rtol=1e-9, atol=1e-9 * (1 + np.abs(values).max()))
    again = kmeans_1d(values, clusters, method="lloyd", init=init, iterations=500)
    assert again.centroids.tolist() == found.centroids.tolist() and found.bound == 0
    assert kmeans_1d(values, clusters).cost <= found.cost * (1 + 1e-9) + 1e-12


def test_linear_start_is_never_better_than_optimal_and_never_worse_than_its_grid():
    values = np.random.default_rng(4).standard_normal(5000)
    grid = cost(values, np.linspace(values.min(), values.max(), 16))
    linear = kmeans_1d(values, 16, method="lloyd", iterations=3).cost
    assert kmeans_1d(values, 16).cost < linear < grid


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-500, 500).map(lambda i: i / 64), min_size=1, max_size=20),
    st.sampled_from(["float32", "float64"]),
)
def test_nearest_is_the_argmin_with_ties_to_the_lower(values, dtype):
    x = torch.tensor(values, dtype=getattr(torch, dtype))
    codebook = torch.unique(x)[::2]
    expected = (x[:, None].double() - codebook.double()).abs().argmin(dim=1)
    assert nearest(x, codebook).tolist() == expected.tolist()


def test_neighbouring_floats_find_themselves():
    for dtype in (torch.float64, torch.float32):
        x = torch.tensor([1.0], dtype=dtype)
        entries = torch.cat([torch.nextafter(x, x - 1), x, torch.nextafter(x, x + 1)])
        assert nearest(entries, entries).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": []}, "no values"),
        ({"values": [1.0, float("nan"), float("inf")]}, "2 of 3 values are not finite"),
        ({"clusters": 0}, "clusters=0: allowed is >= 1"),
        ({"method": "best"}, "method='best' is unknown; allowed: optimal, lloyd"),
        ({"init": "zeros"}, "allowed: linear, quantile"),
        ({"weights": [1.0]}, "1 weights for 2 values"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"weights": [1.0, -1.0]}, ">= 0"),
    ],
)
def test_bad_input_is_refused(options, message):
    given_options = {"values": [1.0, 2.0], "clusters": 2} | options
    with pytest.raises(ValueError, match=message):
        kmeans_1d(given_options.pop("values"), given_options.pop("clusters"), **given_options)


# -- vectors -------------------------------------------------------------------------------------------------


def test_nearest_rows_is_the_argmin():
    generator = np.random.default_rng(0)
    x, c = generator.integers(0, 4, (500, 3)), generator.integers(0, 4, (20, 3))
    expected = np.square(x[:, None] - c).sum(axis=2).argmin(axis=1)
    assert nearest_rows(x, c).tolist() == expected.tolist()


def test_vectors_in_one_dimension_end_no_better_than_optimal_and_near_it():
    x = np.random.default_rng(5).standard_normal(1000)
    rows = kmeans_vectors(x[:, None], 8)
    best = kmeans_1d(x, 8).cost
    assert best * (1 - 1e-12) <= cost(x, rows[:, 0]) < 1.3 * best


def test_separated_clouds_are_found_with_their_weighted_means():
    generator = np.random.default_rng(6)
    centers = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    x = (centers[:, None] + generator.standard_normal((3, 40, 2))).reshape(-1, 2)
    w = generator.random(120)
    expected = [np.average(x[i : i + 40], axis=0, weights=w[i : i + 40]) for i in (0, 80, 40)]
    assert np.allclose(kmeans_vectors(x, 3, weights=w), expected)
    assert np.array_equal(kmeans_vectors(x, 3, seed=1), kmeans_vectors(x, 3, seed=1))
    assert len(kmeans_vectors(np.repeat(x[:2], 50, axis=0), 5)) == 2, "no more rows than different vectors"


def test_a_sample_stands_for_many_vectors():
    x = np.random.default_rng(7).standard_normal((20_000, 2))
    whole, part = kmeans_vectors(x, 16), kmeans_vectors(x, 16, sample=4000)

    def error(rows):
        return np.square(x - rows[nearest_rows(x, rows)]).sum()

    assert error(part) < 1.1 * error(whole)
