"""Clip ranges against closed forms, NumPy's percentile, a slow KL divergence and brute-force optima."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from lightning_compress.functional.affine import choose_qparams, dequantize, quantize
from lightning_compress.functional.calibrators import CALIBRATORS, SAWB, calibrate
from lightning_compress.functional.formats import minifloat_round

SIGNED, FULL, UNSIGNED = {"qmin": -7, "qmax": 7}, {"qmin": -8, "qmax": 7}, {"qmin": 0, "qmax": 15}
GRIDS = [SIGNED, FULL, UNSIGNED, {**UNSIGNED, "symmetric": False}, {**FULL, "symmetric": False}]
GRID = st.sampled_from(GRIDS)
ROWS = arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(-100, 100, width=32)
)


def error(rows, lo, hi, qmin, qmax, symmetric=True, weights=None):
    """Squared error per row on the integer grid of a clip range, float64."""
    scale, zero_point = choose_qparams(lo, hi, qmin, qmax, symmetric)
    s, z = scale[:, None], zero_point[:, None]
    square = (dequantize(quantize(rows, s, z, qmin, qmax), s, z).double() - rows.double()).square()
    return (square if weights is None else square * weights).sum(1)


def seen(rows: np.ndarray, grid: dict) -> np.ndarray:
    """The values that T is measured on."""
    if grid.get("symmetric", True) and grid["qmin"] == 0:
        return np.maximum(rows, 0)
    return np.abs(rows)


@given(ROWS, GRID)
def test_minmax_is_the_extremes(rows, grid):
    lo, hi = calibrate("minmax", torch.from_numpy(rows), **grid)
    if not grid.get("symmetric", True):
        assert lo.tolist() == np.minimum(rows.min(1), 0).tolist()
        assert hi.tolist() == np.maximum(rows.max(1), 0).tolist()
        return
    top = seen(rows, grid).max(1)
    assert hi.tolist() == top.tolist()
    assert lo.tolist() == ((0 if grid["qmin"] == 0 else -1) * top).tolist()


@given(ROWS, GRID, st.floats(50, 100))
def test_percentile_is_numpys(rows, grid, p):
    lo, hi = calibrate("percentile", torch.from_numpy(rows), percentile=p, **grid)
    wide = rows.astype(np.float64)
    if grid.get("symmetric", True):
        top = np.percentile(seen(wide, grid), p, axis=1)
        bottom = 0 * top if grid["qmin"] == 0 else -top
    else:
        top = np.maximum(np.percentile(wide, p, axis=1), 0)
        bottom = np.minimum(np.percentile(wide, 100 - p, axis=1), 0)
    np.testing.assert_allclose(hi.numpy(), top, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(lo.numpy(), bottom, rtol=1e-6, atol=1e-5)


@given(
    ROWS,
    GRID,
    st.floats(50, 100),
    st.sampled_from(["minmax", "percentile", "entropy", "lsq", "mse"]),
    st.data(),
)
@settings(max_examples=25)
def test_counts_are_repeated_values(rows, grid, p, name, data):
    counts = data.draw(arrays(np.int64, rows.shape[1], elements=st.integers(0, 4)).filter(np.any))
    weights = torch.from_numpy(np.broadcast_to(counts, rows.shape).copy())
    repeated = torch.from_numpy(np.repeat(rows, counts, axis=1))
    got = calibrate(name, torch.from_numpy(rows), percentile=p, weights=weights, **grid)
    want = calibrate(name, repeated, percentile=p, **grid)
    if name == "mse":  # sums in another order may decide a tie in another way
        options = {"symmetric": True, **grid}
        got, want = error(repeated, *got, **options), error(repeated, *want, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["minmax", "percentile"])
def test_a_histogram_is_at_most_half_a_bin_off(name, grid):
    values = torch.randn(1, 50_000) * 3 + 1
    counts, edges = np.histogram(values.numpy(), bins=2048)
    centres = torch.from_numpy((edges[1:] + edges[:-1]) / 2).float()[None]
    got = calibrate(name, centres, weights=torch.from_numpy(counts)[None], **grid)
    half = (edges[1] - edges[0]) / 2
    for g, want in zip(got, calibrate(name, values, **grid), strict=True):
        assert abs(float(g - want)) <= half * 1.001


def slow_entropy(x: np.ndarray, levels: int) -> tuple[np.ndarray, float]:
    """KL divergence of every number of kept bins, by the definition, and the width of a bin."""
    top = x.max()
    h = np.bincount(np.minimum((x[x > 0] / top * 2048).astype(int), 2047), minlength=2048).astype(float)
    divergences = np.full(2049, np.inf)
    for i in range(levels, 2049):
        p = h[:i].copy()
        p[-1] += h[i:].sum()
        q = np.zeros(i)
        for r in range(levels):
            run = slice(r * i // levels, (r + 1) * i // levels)
            full = h[run] > 0
            if full.any():
                q[run][full] = h[run].sum() / full.sum()
        p /= p.sum()
        q = q / q.sum() if q.any() else q
        q[(q == 0) & (p > 0)] = 1e-12
        divergences[i] = (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
    return divergences, top / 2048


@pytest.mark.parametrize("grid", GRIDS)
def test_entropy_is_the_slow_kl_divergence(grid):
    generator, n = np.random.default_rng(3), 50_000
    heavy = generator.standard_t(3, n)
    sparse = generator.normal(size=n) * (generator.random(n) < 0.2)
    rows = np.stack([generator.laplace(size=n), heavy, sparse, np.maximum(heavy, 0)]).astype(np.float32)
    lo, hi = calibrate("entropy", torch.from_numpy(rows), **grid)
    symmetric, kept = grid.get("symmetric", True), []
    for row, low, high in zip(rows.astype(np.float64), lo.tolist(), hi.tolist(), strict=True):
        levels = grid["qmax"] + 1
        if not symmetric:
            levels = (grid["qmax"] - grid["qmin"]) // (2 if row.min() < 0 else 1) + 1
        divergences, width = slow_entropy(seen(row, grid), levels)
        kept.append(int(divergences.argmin()))
        clip = kept[-1] * width
        assert high == pytest.approx(clip if symmetric else min(clip, row.max()), rel=1e-6)
        if symmetric:
            assert low == (0 if grid["qmin"] == 0 else -high)
        else:
            assert low == pytest.approx(max(-clip, row.min()), rel=1e-6)
    assert min(kept) < 1500  # tails were cut


def test_entropy_of_more_levels_than_bins_keeps_everything():
    rows = torch.randn(2, 100)
    for qmax in (2047, 4095, 32767):
        assert torch.equal(calibrate("entropy", rows, qmin=-qmax, qmax=qmax)[1], rows.abs().amax(1))


@pytest.mark.parametrize("count", [3, 150])
def test_rows_do_not_depend_on_each_other(count):
    rows = torch.randn(count, 700) * torch.logspace(-3, 3, count)[:, None]
    for name in ("minmax", "percentile", "entropy", "sawb", "lsq", "mse"):
        lo, hi = calibrate(name, rows, **SIGNED)
        alone = calibrate(name, rows[-1:], **SIGNED)
        assert hi.shape == lo.shape == (count,) and hi.dtype == torch.float32
        torch.testing.assert_close((lo[-1:], hi[-1:]), alone, rtol=1e-6, atol=0)


# SAWB ---------------------------------------------------------------------------------------------------------


class VonMises:
    """Quantiles by interpolation; scipy's take seconds."""

    @staticmethod
    def ppf(p: np.ndarray) -> np.ndarray:
        angles = np.linspace(-np.pi, np.pi, 200_001)
        mass = np.cumsum(np.exp(2 * np.cos(angles)))
        return np.interp(p, mass / mass[-1], angles)


def sample(distribution, n=40_000) -> np.ndarray:
    """The quantiles of a distribution: a sample without chance."""
    return distribution.ppf((np.arange(n) + 0.5) / n)


def best_clip(x: np.ndarray, levels: int) -> float:
    """The MSE-optimal T of ``levels`` evenly spaced values on [-T, T], by search."""

    def mse(clip):
        step = 2 * clip / (levels - 1)
        return np.square(np.clip(np.rint((x + clip) / step), 0, levels - 1) * step - clip - x).mean()

    clips = np.geomspace(0.2 * np.abs(x).mean(), np.abs(x).max(), 120)
    k = int(np.argmin([mse(c) for c in clips]))
    clips = np.linspace(clips[max(k - 1, 0)], clips[min(k + 1, 119)], 40)
    return float(clips[int(np.argmin([mse(c) for c in clips]))])


def sawb_grid(levels: int) -> tuple[int, int]:
    return (-(levels // 2), levels - levels // 2 - 1)


@pytest.mark.parametrize("distribution", [stats.norm, stats.laplace])
@pytest.mark.parametrize("levels", [3, 4, 16])
def test_sawb_is_close_to_the_optimal_clip(distribution, levels):
    x = sample(distribution)
    qmin, qmax = sawb_grid(levels)
    lo, hi = calibrate("sawb", torch.from_numpy(x).float()[None], qmin=qmin, qmax=qmax)
    step = float(hi) / qmax
    assert float(lo) == -float(hi)
    assert step * (levels - 1) / 2 == pytest.approx(best_clip(x, levels), rel=0.08)


@pytest.mark.parametrize("levels", sorted(SAWB))
def test_sawb_constants_are_the_regression_of_optimal_clips(levels):
    """Six shapes as in the paper; its table is met to 7 % (its samples and von Mises shape are not stated)."""
    shapes = [
        stats.norm,
        stats.uniform(-1, 2),
        stats.laplace,
        stats.logistic,
        stats.triang(0.5, -1, 2),
        VonMises(),
    ]
    points = []
    for shape in shapes:
        x = sample(shape)
        mean = np.abs(x).mean()
        points.append((np.sqrt(np.square(x).mean()) / mean, 1.0, best_clip(x, levels) / mean))
    design = np.array(points)
    fit, *_ = np.linalg.lstsq(design[:, :2], design[:, 2], rcond=None)
    np.testing.assert_allclose(fit, SAWB[levels], rtol=0.07, atol=5e-3)


@pytest.mark.parametrize(
    ("qmin", "qmax", "pair"),
    [(-1, 1, 3), (-2, 1, 4), (-3, 3, 8), (-7, 7, 16), (-127, 127, 256), (-128, 127, 256)],
)
def test_sawb_is_its_formula(qmin, qmax, pair):
    x = torch.randn(3, 400, dtype=torch.float64)
    clip = SAWB[pair][0] * x.square().mean(1).sqrt() + SAWB[pair][1] * x.abs().mean(1)
    _, hi = calibrate("sawb", x.float(), qmin=qmin, qmax=qmax)
    torch.testing.assert_close(hi.double(), clip * 2 / (qmax - qmin) * qmax, rtol=1e-5, atol=0)


def test_sawb_of_equal_magnitudes_is_their_magnitude():
    hi = calibrate("sawb", torch.tensor([[0.5, -0.5, 0.5]]), **SIGNED)[1]
    assert float(hi) == 0.5


def test_sawb_refuses_what_it_was_not_derived_for():
    x = torch.ones(1, 2)
    for options in ({**FULL, "symmetric": False}, UNSIGNED, {**SIGNED, "weights": x}):
        with pytest.raises(ValueError, match="take 'mse' or 'percentile'"):
            calibrate("sawb", x, **options)
    with pytest.raises(ValueError, match="2, 3, 4, 8, 16, 32, 256"):
        calibrate("sawb", x, qmin=-31, qmax=31)


CLOSE = {"rtol": 1e-5, "atol": 1e-37}  # below, float32 has fewer digits


# LSQ and MSE --------------------------------------------------------------------------------------------------


@given(ROWS, GRID)
def test_lsq_is_its_formula(rows, grid):
    lo, hi = calibrate("lsq", torch.from_numpy(rows), **grid)
    mean = seen(rows.astype(np.float64), grid).mean(1)
    if grid.get("symmetric", True):
        np.testing.assert_allclose(hi.numpy(), 2 * mean / np.sqrt(grid["qmax"]) * grid["qmax"], **CLOSE)
        assert lo.tolist() == ((0 if grid["qmin"] == 0 else -1) * hi).tolist()
        return
    for row, m, low, high in zip(rows, mean, lo.tolist(), hi.tolist(), strict=True):
        both = (row < 0).any() and (row > 0).any()
        codes = 7 if both else 15
        assert high == pytest.approx(2 * m * codes**0.5 if (row > 0).any() else 0, rel=1e-5, abs=1e-37)
        assert low == pytest.approx(-2 * m * codes**0.5 if (row < 0).any() else 0, rel=1e-5, abs=1e-37)


@given(ROWS, GRID, st.booleans())
@settings(max_examples=60)
def test_mse_is_the_best_of_the_81_candidates(rows, grid, weighted):
    rows = torch.from_numpy(rows)
    weights = torch.rand(rows.shape).double() + 0.1 if weighted else None
    lo, hi = calibrate("minmax", rows, **grid)
    options = {"symmetric": True, **grid, "weights": weights}
    errors = torch.stack([error(rows, lo * (k / 100), hi * (k / 100), **options) for k in range(100, 19, -1)])
    got = calibrate("mse", rows, **options)
    torch.testing.assert_close(error(rows, *got, **options), errors.amin(0), rtol=1e-5, atol=1e-9)
    assert bool(
        (error(rows, *got, **options) <= errors[0] * (1 + 1e-5) + 1e-9).all()
    )  # never worse than minmax


def test_mse_ties_go_to_the_larger_clip():
    assert calibrate("mse", torch.tensor([[7.0, -7.0, 1.0]]), **SIGNED)[1].tolist() == [7.0]
    constant = calibrate("mse", torch.ones(1, 3), error=lambda rows, lo, hi: torch.zeros(1), **SIGNED)
    assert [float(c) for c in constant] == [-1.0, 1.0]


def test_mse_takes_another_formats_error():
    rows = torch.randn(5, 64) * torch.tensor([0.01, 1, 10, 100, 1000])[:, None]

    def of_e2m1(part, lo, hi, weights=None):
        unit = (hi / 6)[:, None]
        square = (minifloat_round(part / unit, 2, 1) * unit - part).square()
        return (square if weights is None else square * weights).sum(1)

    weights = torch.rand(5, 64) + 0.1
    for given_weights in (None, weights):
        extra = () if given_weights is None else (given_weights,)
        lo, hi = calibrate("mse", rows, error=of_e2m1, weights=given_weights, **SIGNED)
        top = rows.abs().amax(1)
        errors = torch.stack(
            [of_e2m1(rows, -top * k / 100, top * k / 100, *extra) for k in range(100, 19, -1)]
        )
        torch.testing.assert_close(of_e2m1(rows, lo, hi, *extra), errors.amin(0), rtol=1e-4, atol=0)
    assert bool((hi < top).any())


def test_a_long_row_is_the_same_in_parts():
    row = torch.randn(1, 600_000)
    got = calibrate("mse", row, **SIGNED)
    top = row.abs().amax(1)
    errors = [float(error(row, -top * (k / 100), top * (k / 100), **SIGNED)) for k in range(100, 19, -1)]
    assert float(error(row, *got, **SIGNED)) == pytest.approx(min(errors), rel=1e-6)
    assert float(got[1]) == pytest.approx(float(top) * (100 - int(np.argmin(errors))) / 100, rel=1e-6)


# All ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["entropy", "mse"])
@pytest.mark.parametrize(
    "grid", [{"qmin": -127, "qmax": 127}, SIGNED, {"qmin": 0, "qmax": 255, "symmetric": False}]
)
def test_an_outlier_of_100_sigma_is_clipped(name, grid):
    rows = torch.randn(1, 200_000)
    rows[0, 7] = 100.0
    _, hi = calibrate(name, rows, **grid)
    assert 2 < float(hi) < (30 if name == "entropy" else 80)
    assert float(calibrate("minmax", rows, **grid)[1]) == 100


@pytest.mark.parametrize("name", sorted(CALIBRATORS))
@pytest.mark.parametrize("grid", GRIDS)
def test_extreme_rows_give_finite_ranges_around_zero(name, grid):
    if name == "sawb" and (grid["qmin"] == 0 or "symmetric" in grid):
        return
    rows = torch.stack(
        [
            torch.zeros(6),
            torch.full((6,), 0.3),
            torch.full((6,), -0.3),
            torch.tensor([1e-38, -1e-38, 0, 1e-39, 5e-39, 1e-45]),
            torch.tensor([3e38, -3e38, 1e38, -1e38, 3.4e38, 0]),
            torch.tensor([1e38, 1e-38, 0, 0, 0, 0]),
        ]
    )
    for weights in (None, torch.ones_like(rows), torch.zeros_like(rows)):
        if name == "sawb" and weights is not None:
            continue
        lo, hi = calibrate(name, rows, weights=weights, **grid)
        assert bool(lo.isfinite().all() and hi.isfinite().all())
        assert bool((lo <= 0).all() and (hi >= 0).all())
        assert lo[0] == 0 and hi[0] == 0
        if weights is None or bool(weights.any()):
            assert bool(((hi - lo)[torch.tensor([1, 3, 4, 5])] > 0).all())
        else:
            assert bool((lo == 0).all() and (hi == 0).all())


@pytest.mark.parametrize("name", ["minmax", "percentile", "entropy", "lsq", "mse"])
@pytest.mark.parametrize("grid", GRIDS)
def test_ranges_scale_with_the_values(name, grid):
    rows = torch.randn(3, 500)
    for power in (2.0**-60, 2.0**60):
        got = calibrate(name, rows * power, **grid)
        want = [end * power for end in calibrate(name, rows, **grid)]
        torch.testing.assert_close(got, tuple(want), rtol=1e-6, atol=0)


def test_calibrate_says_what_it_refuses():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="minmax, percentile, entropy, sawb, lsq, mse"):
        calibrate("max", x, **SIGNED)
    with pytest.raises(ValueError, match=r"rows of shape \(2, 0\)"):
        calibrate("mse", torch.ones(2, 0), **SIGNED)
    with pytest.raises(ValueError, match=r"weights of shape \(2, 2\) for rows of \(2, 3\)"):
        calibrate("mse", x, weights=torch.ones(2, 2), **SIGNED)
    with pytest.raises(ValueError, match="50 to 100"):
        calibrate("percentile", x, percentile=0.5, **SIGNED)


def test_a_new_calibrator_is_one_entry(monkeypatch):
    monkeypatch.setitem(
        CALIBRATORS, "half", lambda rows, weights, options: (-rows.amax(1) / 2, rows.amax(1) / 2)
    )
    assert calibrate("half", torch.ones(2, 3), **SIGNED)[1].tolist() == [0.5, 0.5]
