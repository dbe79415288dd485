"""What a benchmark found, as values, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lightning_compress import tables

UNKNOWN = float("nan")


@dataclass(frozen=True)
class LayerTime:
    """One layer in a forward pass.

    Args:
        name: layer name, "" for the model itself.
        kind: class of the layer.
        calls: per forward pass.
        time_share: own time without that of layers inside it, as a share of the whole forward pass.
        time_ms: own time per forward pass; with the cost of watching, so more than in an unwatched pass.
        params: real numbers; a complex entry is two.
        macs: counted multiply-adds.
        activation_bytes: of its outputs, over all calls of a pass.
    """

    name: str
    kind: str
    calls: int
    time_share: float
    time_ms: float
    params: int
    macs: float
    activation_bytes: int


@dataclass(frozen=True)
class Measurement:
    """What was measured on one model.

    Args:
        latency_ms: median time of a forward pass of the whole batch.
        latency_ms_mean: mean.
        latency_ms_p10: 10th percentile.
        latency_ms_p90: 90th percentile.
        throughput: samples per second at the median.
        peak_memory_bytes: parameters and buffers, plus the most that a forward pass held at once on top: by
            the allocator on CUDA; on the CPU by the profiler's memory events, which are torch's own tensor
            allocations and not the work space of libraries. NaN on other devices.
        file_bytes: length of an ``.lcz`` file that was written.
        dense_bytes: float32 bytes of the same tensors.
        params: real numbers; a complex entry is two.
        macs: counted multiply-adds.
        layers: per layer, in the order of ``model.named_modules()``; empty without ``layerwise``.
    """

    latency_ms: float
    latency_ms_mean: float
    latency_ms_p10: float
    latency_ms_p90: float
    throughput: float
    peak_memory_bytes: float
    file_bytes: int
    dense_bytes: int
    params: int
    macs: float
    layers: tuple[LayerTime, ...]

    @property
    def compression_ratio(self) -> float:
        """``dense_bytes / file_bytes``; above 1 is smaller."""
        return self.dense_bytes / self.file_bytes


@dataclass(frozen=True)
class BenchmarkReport(Measurement):
    """Measurements of a model, beside those of its original if there is one.

    Args:
        baseline: the original's measurements, or None.
        speed_up: median of paired ratios, original time / this model's time; NaN without a baseline.
        setting: device, threads, versions, batch size, numbers of passes.
        note: what the numbers do not say, or "".
    """

    baseline: Measurement | None
    speed_up: float
    setting: dict[str, Any]
    note: str

    @property
    def differences(self) -> dict[str, float]:
        """This model's totals minus the original's, by name; empty without a baseline."""
        if self.baseline is None:
            return {}
        return {field: getattr(self, field) - getattr(self.baseline, field) for _, field in _ROWS}

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, with differences and compression ratio; unknown numbers are null."""
        derived = {"differences": self.differences, "compression_ratio": self.compression_ratio}
        values: dict[str, Any] = _plain(dataclasses.asdict(self) | derived)
        return values

    def __str__(self) -> str:
        old = self.baseline
        rows: list[list[Any]] = []
        for title, field in _ROWS:
            now = getattr(self, field)
            rows.append(
                [title, now]
                if old is None
                else [title, getattr(old, field), now, _ratio(getattr(old, field), now)]
            )
        header = (
            ["quantity", "value"]
            if old is None
            else ["quantity", "original", "this model", "original / this"]
        )
        parts = [", ".join(f"{k} {v}" for k, v in self.setting.items()), tables.text(header, rows)]
        if old is not None:
            parts.append(f"speed-up {self.speed_up:.3g} (median of {self.setting['runs']} paired ratios)")
        if self.layers:
            fields = [f.name for f in dataclasses.fields(LayerTime)]
            body = [[layer.name or "(model)", *dataclasses.astuple(layer)[1:]] for layer in self.layers]
            parts.append(tables.text(["layer", *fields[1:]], body))
        return "\n\n".join([*parts, *([self.note] if self.note else [])])


_ROWS = (
    ("latency_ms (median)", "latency_ms"),
    ("latency_ms (mean)", "latency_ms_mean"),
    ("latency_ms (p10)", "latency_ms_p10"),
    ("latency_ms (p90)", "latency_ms_p90"),
    ("throughput (samples/s)", "throughput"),
    ("peak_memory_bytes", "peak_memory_bytes"),
    ("file_bytes", "file_bytes"),
    ("dense_bytes", "dense_bytes"),
    ("params", "params"),
    ("macs", "macs"),
)


def _ratio(old: float, new: float) -> float:
    return old / new if new else UNKNOWN


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
