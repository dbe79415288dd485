"""Time, memory and file size of a model, measured; per layer and against its original."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.archive import save
from lightning_compress.benchmark.report import UNKNOWN, BenchmarkReport, LayerTime, Measurement
from lightning_compress.container import replacing
from lightning_compress.cost import Cost, cost
from lightning_compress.finalize import StandIn
from lightning_compress.names import clean
from lightning_compress.stats.running import (
    call,
    device_of,
    evaluating,
    first_tensor,
    move,
    observing,
    unwrap,
)

FILE = "benchmark_results.json"
"""What is written when ``output`` is a folder."""

NOTE = (
    "note: masks, grids and codebooks make the file smaller, not the computation: such a model runs no faster by "
    "itself. Removed structure and real integer kernels do."
)


def benchmark(
    model: nn.Module,
    x: Any,
    *,
    baseline: nn.Module | None = None,
    warmup: int = 5,
    runs: int = 20,
    layerwise: bool = True,
    output: str | os.PathLike[str] | None = None,
) -> BenchmarkReport:
    """Time forward passes, measure memory and write the file; in eval mode, without gradients.

    With a baseline the two are timed in turns, original, model, original, and each ratio pairs the model's
    time with the mean of its neighbours, so a machine that slows down does not favour either. Threads stay as
    they are set and are reported. Times per layer come from passes of their own, watched layer by layer:
    eager, without fused attention.

    Args:
        model: any module; it is left exactly as it was.
        x: a tensor, a tuple of positional arguments or a dict of keyword arguments; samples first.
        baseline: the original model, for comparison.
        warmup: passes before the clock counts, >= 0.
        runs: timed passes, >= 1.
        layerwise: whether to measure layers too.
        output: JSON file to write, or a folder that gets ``benchmark_results.json``; an old file is replaced only when
            the new one is complete.

    Returns:
        The measurements; ``print`` shows tables.

    Raises:
        ValueError: ``warmup`` or ``runs`` out of range, or the folder of ``output`` does not exist.

    Examples:
        >>> report = benchmark(nn.Linear(8, 4), torch.zeros(2, 8), runs=3)
        >>> report.params, report.macs, [layer.time_share for layer in report.layers]
        (36, 64, [1.0])
    """
    if warmup < 0 or runs < 1:
        raise ValueError(f"warmup={warmup}, runs={runs}: allowed are warmup >= 0 and runs >= 1.")
    path = None if output is None else Path(output)
    if path is not None and path.is_dir():
        path = path / FILE
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of output={str(path)!r} does not exist: make it first.")
    before, times, after = _times(model, baseline, x, warmup, runs)
    counted = cost(model, x)
    ours = _measure(model, x, times, counted, runs if layerwise else 0)
    theirs, speed_up = None, UNKNOWN
    if baseline is not None:
        theirs = _measure(baseline, x, [*before, *after], cost(baseline, x), runs if layerwise else 0)
        speed_up = float(np.median((np.array(before) + np.array(after)) / 2 / np.array(times)))
    rounding = any(isinstance(module, StandIn) for module in model.modules())
    coded = rounding or any(True for _ in codes.of(model)) or counted.sparsity > 0.1
    setting = {
        "device": _device_name(device_of(model)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": _batch(x),
        "warmup": warmup,
        "runs": runs,
    }
    fields = {f.name: getattr(ours, f.name) for f in dataclasses.fields(ours)}
    report = BenchmarkReport(
        **fields, baseline=theirs, speed_up=speed_up, setting=setting, note=NOTE if coded else ""
    )
    if path is not None:
        with replacing(path) as file:
            file.write(json.dumps(report.to_json(), indent=2, allow_nan=False).encode())
    return report


def _times(
    model: nn.Module, baseline: nn.Module | None, x: Any, warmup: int, runs: int
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds of forward passes: of the baseline before, of the model, of the baseline after; run by run."""
    before: list[float] = []
    times: list[float] = []
    after: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_no_garbage_collection())
        ours, theirs = _timer(model, x), None
        if baseline is not None:
            stack.enter_context(evaluating(baseline))
            theirs = _timer(baseline, x)
        for _ in range(warmup):
            ours()
            if theirs:
                theirs()
        for _ in range(runs):
            if theirs:
                before.append(theirs())
            times.append(ours())
            if theirs:
                after.append(theirs())
    return before, times, after


def _timer(model: nn.Module, x: Any) -> Callable[[], float]:
    device = device_of(model)
    x = move(x, device)

    def run() -> float:
        _synchronize(device)
        start = time.perf_counter()
        call(model, x)
        _synchronize(device)
        return (time.perf_counter() - start) * 1e3

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _measure(model: nn.Module, x: Any, times: Sequence[float], counted: Cost, watched: int) -> Measurement:
    """Everything about one model whose passes have been timed."""
    with tempfile.TemporaryDirectory() as folder:
        info = save(model, Path(folder, "model.lcz"))
    median = float(np.median(times))
    return Measurement(
        latency_ms=median,
        latency_ms_mean=float(np.mean(times)),
        latency_ms_p10=float(np.percentile(times, 10)),
        latency_ms_p90=float(np.percentile(times, 90)),
        throughput=_batch(x) / median * 1e3,
        peak_memory_bytes=_peak_memory(model, x),
        file_bytes=info.file_bytes,
        dense_bytes=info.dense_bytes,
        params=counted.params,
        macs=counted.macs,
        layers=_layers(model, x, counted, watched) if watched else (),
    )


def _peak_memory(model: nn.Module, x: Any) -> float:
    device = device_of(model)
    x = move(x, device)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    with evaluating(model):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call(model, x)
            torch.cuda.synchronize(device)
            return sum(held.values()) + torch.cuda.max_memory_allocated(device) - before
        return sum(held.values()) + _peak_on_cpu(model, x) if device.type == "cpu" else UNKNOWN


def _peak_on_cpu(model: nn.Module, x: Any) -> int:
    """The largest running sum of the profiler's allocations (+) and releases (-) during one forward pass."""
    previous = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it reports on stderr that there is no GPU
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            call(model, x)
    finally:
        if previous is None:
            del os.environ["KINETO_LOG_LEVEL"]
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())] or [0])
    return max(0, int(sums.max()))


class _Clock:
    """Own time of nested layers: the clock always runs for the innermost one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.running: list[str] = []
        self.since = 0.0
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def enter(self, name: str) -> None:
        self._turn()
        self.running.append(name)

    def leave(self, name: str, output: Any) -> None:
        self._turn()
        self.running.pop()
        self.calls[name] += 1
        self.bytes[name] += _bytes(output)
        self.since = time.perf_counter()  # counting bytes is not the layers' work

    def _turn(self) -> None:
        _synchronize(self.device)
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since  # type: ignore[assignment]
        self.since = now


def _layers(model: nn.Module, x: Any, counted: Cost, runs: int) -> tuple[LayerTime, ...]:
    model = unwrap(model)
    modules = {clean(name): module for name, module in model.named_modules()}
    known = {layer.name: layer for layer in counted.layers}
    x = move(x, device_of(model))
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        stack.enter_context(_no_garbage_collection())
        call(model, x)
        clock = _Clock(device_of(model))
        for name, module in modules.items():
            enter = module.register_forward_pre_hook(lambda m, args, name=name: clock.enter(name))
            leave = module.register_forward_hook(lambda m, args, out, name=name: clock.leave(name, out))
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        for _ in range(runs):
            call(model, x)
    total = sum(clock.seconds.values())
    return tuple(
        LayerTime(
            name=name,
            kind=type(module).__name__,
            calls=clock.calls[name] // runs,
            time_share=clock.seconds[name] / total,
            time_ms=clock.seconds[name] / runs * 1e3,
            params=known[name].params if name in known else 0,
            macs=known[name].macs if name in known else 0,
            activation_bytes=clock.bytes[name] // runs,
        )
        for name, module in modules.items()
        if name in known or clock.calls[name]
    )


def _bytes(output: Any) -> int:
    """Bytes of all tensors in a nested output."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    parts = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    )
    return sum(map(_bytes, parts))


def _batch(x: Any) -> int:
    tensor = first_tensor(x)
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    )
