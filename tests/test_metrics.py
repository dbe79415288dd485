"""OutputErrorRate and RelativeL2Error against NumPy, SciPy and neuraloperator."""

import copy
import math
import pickle
import socket

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torchmetrics import MetricCollection

from lightning_compress.metrics import (
    OutputErrorRate,
    RelativeL2Error,
    output_error_rate,
    relative_l2_error,
    wilson_interval,
)

SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=5)
VALUES = st.floats(-1e3, 1e3, width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(SHAPES)
    return tuple(draw(hnp.arrays(np.float32, shape, elements=VALUES)) for _ in range(2))


def relative_reference(f: np.ndarray, g: np.ndarray, trial_axes: int) -> tuple[list[float], int]:
    """Plain loop over trials in double precision."""
    errors, left_out = [], 0
    for index in np.ndindex(f.shape[:trial_axes]):
        a, b = f[index].astype(complex).ravel(), g[index].astype(complex).ravel()
        norm = math.sqrt(sum(abs(v) ** 2 for v in a))
        if norm < 1e-12:
            left_out += 1
        else:
            errors.append(math.sqrt(sum(abs(v - w) ** 2 for v, w in zip(a, b, strict=True))) / norm)
    return errors, left_out


@settings(max_examples=60)
@given(pairs())
def test_classification_is_the_share_of_changed_top1(pair: tuple[np.ndarray, np.ndarray]) -> None:
    f, g = pair
    differs = np.argmax(f, axis=1) != np.argmax(g, axis=1)
    n, k = differs.size, int(differs.sum())
    metric = OutputErrorRate()
    for i in range(len(f)):  # one input at a time
        metric.update(torch.from_numpy(f[i : i + 1]), torch.from_numpy(g[i : i + 1]))
    assert metric.compute().item() == pytest.approx(k / n, abs=1e-15)
    assert output_error_rate(*map(torch.from_numpy, pair)).item() == pytest.approx(k / n, abs=1e-15)
    assert metric.standard_error.item() == pytest.approx(math.sqrt(k / n * (1 - k / n) / n), abs=1e-15)
    assert int(metric.n_samples) == n
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    low, high = metric.confidence_interval
    assert (low.item(), high.item()) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*no trial was counted")
@settings(max_examples=60)
@given(pairs())
def test_regression_is_the_mean_relative_norm(pair: tuple[np.ndarray, np.ndarray]) -> None:
    f, g = pair
    f[0] = 0  # always one input without a relative error
    errors, left_out = relative_reference(f, g, 1)
    metric = OutputErrorRate(task="regression")
    metric.update(torch.from_numpy(f[:1]), torch.from_numpy(g[:1]))
    metric.update(torch.from_numpy(f[1:]), torch.from_numpy(g[1:]))
    assert int(metric.n_left_out) == left_out >= 1
    assert int(metric.n_samples) == len(errors)
    if not errors:
        assert math.isnan(metric.compute().item())
        return
    assert metric.compute().item() == pytest.approx(np.mean(errors), rel=1e-12)
    assert output_error_rate(*map(torch.from_numpy, pair), task="regression").item() == pytest.approx(
        np.mean(errors), rel=1e-12
    )
    if len(errors) > 1:
        expected = np.std(errors, ddof=1) / math.sqrt(len(errors))
        slack = 1e-7 * np.mean(errors)  # the variance is a difference of sums
        assert metric.standard_error.item() == pytest.approx(expected, rel=1e-6, abs=slack)
    else:
        assert math.isnan(metric.standard_error.item())


def test_regression_is_not_capped_and_its_interval_is_the_normal_one() -> None:
    f, g = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [11.0, 0.0]])
    metric = OutputErrorRate(task="regression")
    metric.update(f, g)
    assert metric.compute().item() == 5.0
    assert metric.standard_error.item() == pytest.approx(5.0)  # sample deviation 10/√2 over √2
    low, high = metric.confidence_interval
    assert low.item() == 0.0
    assert high.item() == pytest.approx(5 + 1.959964 * 5)


def test_class_axis_may_be_the_last() -> None:
    f = torch.zeros(2, 3, 4)
    f[..., 1] = 1
    g = f.clone()
    g[0, 0, 3] = 2  # another top-1 at one of six tokens
    metric = OutputErrorRate(class_axis=-1)
    metric.update(f, g)
    assert metric.compute().item() == pytest.approx(1 / 6)


def test_complex_outputs_count_by_modulus() -> None:
    f = torch.tensor([[3 + 4j, 1j], [1 + 0j, -2 + 0j]])
    g = torch.tensor([[3 + 4j, -1j], [1 + 0j, 0j]])
    assert output_error_rate(f, g).item() == 0.5
    expected = np.mean(relative_reference(f.numpy(), g.numpy(), 1)[0])
    assert output_error_rate(f, g, task="regression").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_every_real_dtype_is_computed_in_double_precision(dtype: torch.dtype) -> None:
    f = torch.tensor([[300.0, 400.0]]).to(dtype)  # its squared norm overflows float16
    g = torch.tensor([[300.0, 0.0]]).to(dtype)
    assert output_error_rate(f, g, task="regression").item() == pytest.approx(0.8, rel=1e-12)
    assert relative_l2_error(g, f, dims=1).item() == pytest.approx(0.8, rel=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
def test_relative_l2_equals_neuraloperators_loss(dims: int) -> None:
    losses = pytest.importorskip("neuralop.losses")
    metric = RelativeL2Error(dims=dims)
    preds, target = torch.randn(2, 6, 3, *(8, 5)[:dims])
    expected = losses.LpLoss(d=dims, p=2, reduction="mean")(preds, target).item()
    metric.update(preds[:2], target[:2])
    metric.update(preds[2:], target[2:])
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
    assert relative_l2_error(preds, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*no trial was counted")
@settings(max_examples=40)
@given(pairs(), st.integers(1, 3), st.booleans())
def test_relative_l2_against_a_loop(pair: tuple[np.ndarray, np.ndarray], dims: int, as_complex: bool) -> None:
    target, preds = pair
    if as_complex:
        target, preds = target + 1j * preds, preds - 0.5j * target
    dims = min(dims, target.ndim - 1)
    errors, left_out = relative_reference(target, preds, target.ndim - dims)
    metric = RelativeL2Error(dims=dims)
    metric.update(torch.from_numpy(preds), torch.from_numpy(target))
    assert int(metric.n_left_out) == left_out
    assert metric.compute().item() == pytest.approx(
        np.mean(errors) if errors else math.nan, rel=1e-6, nan_ok=True
    )


def test_relative_l2_without_dims_keeps_sample_and_channel() -> None:
    preds, target = torch.randn(2, 4, 3, 5, 6)
    expected = np.mean(relative_reference(target.numpy(), preds.numpy(), 2)[0])
    metric = RelativeL2Error()
    metric.update(preds, target)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("name", ["classification", "regression", "l2"])
def test_non_finite_values_are_refused_by_argument_name(name: str, argument: int, value: float) -> None:
    metric = RelativeL2Error(dims=1) if name == "l2" else OutputErrorRate(task=name)
    pair = [torch.ones(4, 3), torch.ones(4, 3)]
    pair[argument][1, 2] = value
    names = ("preds", "target") if name == "l2" else ("original_output", "compressed_output")
    with pytest.raises(ValueError, match=f"{names[argument]}: 1 of 12 values are not finite"):
        metric.update(*pair)


@pytest.mark.parametrize(
    ("shapes", "task", "message"),
    [
        (((4, 3), (4, 2)), "classification", r"original_output \(4, 3\) and compressed_output \(4, 2\)"),
        (((4,), (4,)), "classification", r"shape \(4,\).*task='regression'"),
        (((4, 1), (4, 1)), "classification", r"C >= 2"),
        (((), ()), "regression", "scalar"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple, task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputErrorRate(task=task).update(*(torch.zeros(s) for s in shapes))


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="classification, regression, got 'auto'"):
        OutputErrorRate(task="auto")
    with pytest.raises(ValueError, match="dims must be >= 1 or None, got 0"):
        RelativeL2Error(dims=0)
    with pytest.raises(ValueError, match=r"\(4, 3\).*dims=None"):
        RelativeL2Error().update(torch.ones(4, 3), torch.ones(4, 3))


@pytest.mark.parametrize(
    "metric", [OutputErrorRate(), OutputErrorRate(task="regression"), RelativeL2Error(dims=1)]
)
def test_nothing_measured_is_nan_with_a_warning(metric: OutputErrorRate | RelativeL2Error) -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metric.compute().item())
    metric.reset()
    metric.update(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.warns(UserWarning, match="no trial was counted"):
        assert math.isnan(metric.compute().item())
    assert math.isnan(metric.standard_error.item())
    assert int(metric.n_samples) == 0


def test_properties_follow_updates_resets_and_forward() -> None:
    f, g = torch.eye(4), torch.eye(4).roll(1, 0)
    metric = OutputErrorRate()
    metric.update(f, g)
    assert metric.standard_error.item() == 0.0
    metric.update(f, f)
    assert metric.standard_error.item() == pytest.approx(math.sqrt(0.25 / 8))
    assert metric(f, f).item() == 0.0  # the batch's own value
    assert metric.compute().item() == pytest.approx(1 / 3)
    assert int(metric.n_samples) == 12
    metric.reset()
    metric.update(f, f)
    assert (metric.compute().item(), int(metric.n_samples)) == (0.0, 4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_continue(copied: object) -> None:
    f, g = torch.eye(4), torch.eye(4).roll(1, 0)
    metric = OutputErrorRate()
    metric.update(f, g)
    metric.compute()
    other = copied(metric)
    other.update(f, f)
    assert (metric.compute().item(), other.compute().item()) == (1.0, 0.5)


def test_both_tasks_live_in_one_collection() -> None:
    metrics = MetricCollection({"top1": OutputErrorRate(), "norm": OutputErrorRate(task="regression")})
    f = torch.eye(4)
    metrics.update(f, 0.5 * f)
    metrics.update(f, 0.5 * f)
    result = metrics.compute()
    assert (result["top1"].item(), result["norm"].item()) == (0.0, 0.5)


def test_direction_and_differentiability_are_declared() -> None:
    for kind in (OutputErrorRate, RelativeL2Error):
        assert kind.higher_is_better is False
        assert kind.is_differentiable is False


def test_sums_stay_exact_over_many_updates() -> None:
    metric = RelativeL2Error(dims=1)
    for _ in range(2000):
        metric.update(torch.full((1, 4), 1.1, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64))
    assert metric.compute().item() == pytest.approx(0.1, rel=1e-12)


def test_states_fall_back_to_single_precision_where_there_is_no_double() -> None:
    def to_device_without_doubles(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return x

    metric = OutputErrorRate(task="regression")
    metric._apply(to_device_without_doubles)
    metric.update(torch.ones(2, 3), 2 * torch.ones(2, 3))
    assert metric.total.dtype == torch.float32
    assert metric.compute().item() == 1.0


def test_wilson_interval_stays_in_the_unit_interval() -> None:
    for p in (0.0, 1.0):
        low, high = wilson_interval(torch.tensor(p), torch.tensor(1.0))
        assert 0 <= low.item() < high.item() <= 1


def _evaluate_on_rank(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    f = torch.eye(4)
    metric = OutputErrorRate()
    metric.update(f, f if rank else f.roll(1, 0))
    if rank:
        metric.update(f, f)
    result = [float(x) for x in (metric.compute(), metric.standard_error, metric.n_samples)]
    torch.save(result, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_on_all_samples(tmp_path: object) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked, because importing torch twice takes longer than the rest of this file.
    torch.multiprocessing.start_processes(
        _evaluate_on_rank, (port, str(tmp_path)), nprocs=2, start_method="fork"
    )
    expected = [1 / 3, math.sqrt(1 / 3 * 2 / 3 / 12), 12.0]
    for rank in (0, 1):
        assert torch.load(f"{tmp_path}/{rank}") == pytest.approx(expected)
