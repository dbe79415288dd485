"""How good a model is at several resolutions, and what it takes there: an operator must not depend on the grid."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_compress import tables
from lightning_compress.benchmark.measure import benchmark
from lightning_compress.benchmark.report import UNKNOWN, Measurement
from lightning_compress.cost import cost
from lightning_compress.spectral import spectral_layers, stored_modes
from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.running import call, device_of, evaluating, move, observing


@dataclass(frozen=True)
class Row:
    """One model at one resolution.

    Args:
        name: of the resolution, as given.
        errors: metric name -> value over all samples.
        latency_ms: median time of a forward pass of the first batch.
        throughput: samples per second at the median.
        peak_memory_bytes: see ``lightning_compress.benchmark.Measurement``.
        file_bytes: length of an ``.lcz`` file that was written.
        params: real numbers; a complex entry is two.
        macs: counted multiply-adds of one sample.
        fft_share: part of ``macs`` in Fourier transforms; NaN if nothing was counted.
        aliased: the grid is too coarse for frequencies that a spectral layer keeps: fewer than 2 k points along an axis
            with highest frequency k. The layer then leaves them out.
        speed_up: median of paired ratios, original time / this model's time; NaN without an original.
        baseline: the original at the same resolution, or None.
    """

    name: str
    errors: Mapping[str, float]
    latency_ms: float
    throughput: float
    peak_memory_bytes: float
    file_bytes: int
    params: int
    macs: float
    fft_share: float
    aliased: bool
    speed_up: float = UNKNOWN
    baseline: Row | None = None

    def change(self, metric: str) -> float:
        """Error against the original's: ``error / original error - 1``; 0.01 is one per cent worse.

        Args:
            metric: name of the metric.

        Returns:
            The relative change; NaN without an original, or if its error is 0.
        """
        base = self.baseline.errors[metric] if self.baseline else 0.0
        return self.errors[metric] / base - 1 if base else UNKNOWN


@dataclass(frozen=True)
class Evaluation:
    """A model at several resolutions; ``print`` shows a table.

    Args:
        rows: one for each resolution, in the order given.
    """

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of one resolution."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> list[dict[str, Any]]:
        """Everything as JSON values; unknown numbers are null."""
        return [_json(row) for row in self.rows]

    def __str__(self) -> str:
        metrics = list(self.rows[0].errors)
        header = ["resolution", "model", *(h for m in metrics for h in (f"{m} %", "change %")), *_QUANTITIES]
        body = []
        for row in self.rows:
            for name, line in (("original", row.baseline), ("this model", row)):
                if line is not None:
                    values = [getattr(line, quantity) for quantity in _QUANTITIES]
                    errors = [v for m in metrics for v in (100 * line.errors[m], 100 * line.change(m))]
                    body.append([line.name + " (aliased)" * line.aliased, name, *errors, *values])
        return tables.text(header, body)


_QUANTITIES = (
    "latency_ms",
    "speed_up",
    "throughput",
    "peak_memory_bytes",
    "file_bytes",
    "params",
    "macs",
    "fft_share",
)


def evaluate(
    model: nn.Module,
    loaders: Mapping[str, Any],
    metrics: Mapping[str, Metric],
    *,
    baseline: nn.Module | None = None,
    postprocess: Callable[[Tensor], Tensor] | None = None,
    warmup: int = 2,
    runs: int = 20,
) -> Evaluation:
    """Errors over all samples, and time, memory, bytes and multiply-adds of the first batch, at every resolution.

    With a baseline, its errors are measured on the same samples, and the two are timed in turns (see `benchmark`).
    Models, metrics and the global random state are left as they were.

    Args:
        model: any module.
        loaders: name of a resolution -> iterable of batches ``(inputs, targets)`` or dicts with a target ``y``, which
            can be read more than once.
        metrics: name -> metric with ``update(prediction, target)``; lower is better.
        baseline: the original model, for comparison.
        postprocess: applied to predictions before the metrics, such as undoing the normalization of outputs.
        warmup: passes before the clock counts, >= 0.
        runs: timed passes, >= 1.

    Returns:
        A row for each resolution; ``print`` shows them, errors and changes in per cent.

    Raises:
        ValueError: no resolution or no metric is given, or a loader has no batch or no targets.

    Examples:
        >>> from lightning_compress.benchmark.evaluate import evaluate
        >>> from lightning_compress.metrics import RelativeL2Error
        >>> net, x = nn.Conv2d(1, 1, 1, bias=False), torch.rand(4, 1, 8, 8)
        >>> found = evaluate(net, {"8": [(x, net(x).detach())]}, {"L2": RelativeL2Error(2)}, runs=1)
        >>> found["8"].errors, found["8"].macs
        ({'L2': 0.0}, 64.0)
    """
    if not loaders or not metrics:
        raise ValueError(
            f"loaders={list(loaders)}, metrics={list(metrics)}: give at least one of each, by name."
        )
    rows = []
    for name, loader in loaders.items():
        errors = _errors(model, name, loader, metrics, postprocess)
        x = next(iter(Calibration(data=loader, samples=sys.maxsize).batches(model)))
        report = benchmark(model, x, baseline=baseline, warmup=warmup, runs=runs, layerwise=False)
        row = _row(model, name, x, errors, report)
        if baseline is not None and report.baseline is not None:
            theirs = _row(
                baseline, name, x, _errors(baseline, name, loader, metrics, postprocess), report.baseline
            )
            row = dataclasses.replace(row, speed_up=report.speed_up, baseline=theirs)
        rows.append(row)
    return Evaluation(tuple(rows))


def _row(model: nn.Module, name: str, x: Any, errors: dict[str, float], measured: Measurement) -> Row:
    batch = measured.throughput * measured.latency_ms / 1e3
    return Row(
        name=name,
        errors=errors,
        latency_ms=measured.latency_ms,
        throughput=measured.throughput,
        peak_memory_bytes=measured.peak_memory_bytes,
        file_bytes=measured.file_bytes,
        params=measured.params,
        macs=measured.macs / round(batch),
        fft_share=cost(model, x).fft_share,
        aliased=_aliased(model, x),
    )


def _errors(
    model: nn.Module,
    name: str,
    loader: Any,
    metrics: Mapping[str, Metric],
    postprocess: Callable[[Tensor], Tensor] | None,
) -> dict[str, float]:
    fresh = {key: metric.clone().to(device_of(model)) for key, metric in metrics.items()}
    for metric in fresh.values():
        metric.reset()
    with evaluating(model):
        for inputs, target in Calibration(data=loader, samples=sys.maxsize).pairs(model):
            if target is None:
                raise ValueError(
                    f"loader {name!r} has batches without targets: give (inputs, targets), or dicts with 'y'."
                )
            prediction = call(model, inputs)
            prediction = prediction if postprocess is None else postprocess(prediction)
            for metric in fresh.values():
                metric.update(prediction, move(target, prediction.device))
    return {key: float(metric.compute()) for key, metric in fresh.items()}


def _aliased(model: nn.Module, x: Any) -> bool:
    """Whether some spectral layer gets a grid that lacks frequencies it keeps."""
    lacking = []

    def look(layer: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["x"]
        kept = [min(n, k) for n, k in zip(stored_modes(layer), layer.n_modes, strict=True)]
        # All axes hold frequencies of both signs, but for the last of real data.
        highest = [k // 2 for k in kept]
        if not layer.complex_data:
            highest[-1] = kept[-1] - 1
        lacking.append(any(n < 2 * k for n, k in zip(x.shape[-len(kept) :], highest, strict=True)))

    with ExitStack() as stack:
        stack.enter_context(observing(model))
        for layer in spectral_layers(model).values():
            stack.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
        call(model, x)
    return any(lacking)


def _json(value: Any) -> Any:
    if isinstance(value, Row):
        return {f.name: _json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _json(v) for key, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
