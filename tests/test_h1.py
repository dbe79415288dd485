"""RelativeH1Error against NumPy and neuraloperator, and evaluation at several resolutions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.benchmark.evaluate import evaluate
from lightning_compress.metrics import (
    RelativeH1Error,
    RelativeL2Error,
    relative_h1_error,
    relative_l2_error,
)


def reference(preds: np.ndarray, target: np.ndarray, dims: int, periodic: bool) -> float:
    """Plain loop over trials in double precision, with NumPy's differences."""

    def size(x: np.ndarray) -> float:
        parts = [x]
        for axis, n in enumerate(x.shape):
            if periodic:
                wide = np.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)], mode="wrap")
                inner = tuple(slice(1, -1) if a == axis else slice(None) for a in range(x.ndim))
                parts.append(np.gradient(wide, 1 / n, axis=axis)[inner])
            else:
                parts.append(np.gradient(x, 1 / n, axis=axis, edge_order=2))
        return math.sqrt(sum(float((np.abs(p) ** 2).sum()) for p in parts))

    trials = np.ndindex(target.shape[: target.ndim - dims])
    return float(np.mean([size(preds[t] - target[t]) / size(target[t]) for t in trials]))


@settings(max_examples=40)
@given(st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_against_numpy(dims: int, periodic: bool, as_complex: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = (2, 3, *generator.integers(3, 7, dims))
    preds, target = generator.normal(size=(2, *shape))
    if as_complex:
        preds, target = preds + 1j * target, target - 0.5j * preds
    metric = RelativeH1Error(dims=dims, periodic=periodic)
    for part in range(2):
        metric.update(*(torch.from_numpy(v[part : part + 1]) for v in (preds, target)))
    expected = reference(preds, target, dims, periodic)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)
    assert int(metric.n_samples) == 6
    assert relative_h1_error(
        torch.from_numpy(preds), torch.from_numpy(target), periodic=periodic
    ).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_periodic_equals_neuraloperators_loss(dims: int) -> None:
    losses = pytest.importorskip("neuralop.losses")
    preds, target = torch.randn(2, 5, 2, *(8, 6, 5)[:dims])
    ours = relative_h1_error(preds, target, dims, periodic=True).item()
    assert ours == pytest.approx(losses.H1Loss(d=dims, reduction="mean")(preds, target).item(), rel=1e-5)
    assert relative_l2_error(preds, target, dims).item() == pytest.approx(
        losses.LpLoss(d=dims, p=2, reduction="mean")(preds, target).item(), rel=1e-5
    )


def test_border_is_the_only_difference_from_neuraloperator_without_periods() -> None:
    """There its differences are of third order, these of second: on quadratic fields both are exact."""
    losses = pytest.importorskip("neuralop.losses")
    x, y = torch.meshgrid(torch.arange(8.0) / 8, torch.arange(6.0) / 6, indexing="ij")
    target, preds = (1 + x**2 - 2 * x * y)[None, None], (2 - y**2 + x)[None, None]
    theirs = losses.H1Loss(d=2, reduction="mean", periodic_in_x=False, periodic_in_y=False)(preds, target)
    assert relative_h1_error(preds, target).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_rough_errors_count_more_than_smooth_ones_of_equal_norm() -> None:
    x = torch.arange(32.0) / 32
    target = torch.cos(2 * math.pi * x).expand(1, 1, 32, 32)
    errors = [torch.sin(2 * math.pi * k * x).expand(1, 1, 32, 32) for k in (1, 6)]
    l2 = [relative_l2_error(target + e, target).item() for e in errors]
    h1 = [relative_h1_error(target + e, target, periodic=True).item() for e in errors]
    assert l2[0] == pytest.approx(l2[1], rel=1e-5) and h1[1] > 3 * h1[0]


def test_fields_too_small_for_differences_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(8, 2\) points.*3 points or more"):
        relative_h1_error(torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2))
    with pytest.raises(ValueError, match="RelativeH1Error: dims must be >= 1"):
        RelativeH1Error(dims=0)


# -- evaluate ---------------------------------------------------------------------------------------------------


def pairs(size: int, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(size))
    return x, x.cumsum(-1)


METRICS = {"L2": RelativeL2Error(dims=2), "H1": RelativeH1Error(dims=2)}


def test_rows_hold_what_was_measured(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 1, 1)).train()
    small = lc.compress(net, [lc.Prune(0.5)]).model
    loaders = {str(n): DataLoader(TensorDataset(*pairs(n)), 2) for n in (8, 12)}
    before = [p.clone() for p in small.parameters()]
    found = evaluate(small, loaders, METRICS, baseline=net, postprocess=lambda y: 2 * y + 1, runs=2)
    for row, size in zip(found, (8, 12), strict=True):
        x, y = pairs(size)
        with torch.no_grad():
            for model, line in ((small, row), (net, row.baseline)):
                prediction = 2 * model(x) + 1
                assert line.errors["L2"] == pytest.approx(relative_l2_error(prediction, y).item(), rel=1e-6)
                assert line.errors["H1"] == pytest.approx(relative_h1_error(prediction, y).item(), rel=1e-6)
                lc.save(model, tmp_path / "net.lcz")
                assert line.file_bytes == (tmp_path / "net.lcz").stat().st_size
                assert line.macs == size**2 * (4 * 9 + 4) and line.params == 45
        assert row.change("L2") == pytest.approx(row.errors["L2"] / row.baseline.errors["L2"] - 1)
        assert row.throughput == pytest.approx(2 / row.latency_ms * 1e3) and row.speed_up > 0
        assert row.peak_memory_bytes > 2 * 4 * size**2 * 4 and not row.aliased
    assert found["12"] is found.rows[1] and math.isnan(found["8"].baseline.change("L2"))
    assert net.training and small.training
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    printed = str(found)
    assert printed.count("original") == printed.count("this model") == 2
    values = found.to_json()
    assert values[0]["baseline"]["speed_up"] is None and values[1]["errors"] == dict(found["12"].errors)
    assert METRICS["L2"].update_called is False  # clones were used


def test_dict_batches_and_no_baseline() -> None:
    x, y = pairs(8)
    net = nn.Conv2d(1, 1, 1)
    batches = [{"input": x[:3], "y": y[:3]}, {"input": x[3:], "y": y[3:]}]
    found = evaluate(net, {"8": batches}, {"L2": RelativeL2Error(2)}, runs=1)
    expected = relative_l2_error(net(x).detach(), y).item()
    assert found["8"].errors["L2"] == pytest.approx(expected, rel=1e-6)
    assert math.isnan(found["8"].change("L2")) and found["8"].baseline is None
    with pytest.raises(ValueError, match="loader '8' has batches without targets"):
        evaluate(net, {"8": [x]}, METRICS)
    with pytest.raises(ValueError, match="at least one of each"):
        evaluate(net, {}, METRICS)


def test_operators_are_timed_counted_and_flagged() -> None:
    models = pytest.importorskip("neuralop.models")
    net = models.FNO(n_modes=(8, 6), in_channels=1, out_channels=1, hidden_channels=4, n_layers=2)
    # Kept are frequencies up to 4 along the first axis and up to 3 along the last: 8 and 6 points carry them.
    grids = {"16": (16, 16), "8 6": (8, 6), "7 6": (7, 6), "8 5": (8, 5)}
    loaders = {}
    for name, grid in grids.items():
        x = torch.randn(2, 1, *grid)
        loaders[name] = [(x, x)]
    found = evaluate(net, loaders, {"L2": RelativeL2Error(2)}, runs=1)
    assert [row.aliased for row in found] == [False, False, True, True]
    assert "8 5 (aliased)" in str(found)
    counted = lc.cost(net, torch.randn(1, 1, 16, 16))
    assert found["16"].macs == counted.macs and 0 < found["16"].fft_share == pytest.approx(counted.fft_share)
