"""Measuring: what is reported, and that nothing is left behind. Times are never asserted, only their order."""

import copy
import gc
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import archive, codes
from lightning_compress.benchmark import BenchmarkReport, benchmark
from lightning_compress.compress import compress
from lightning_compress.cost import cost
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization import Quantize, training


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ReLU(), Slow()),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


@pytest.fixture(scope="module")
def report() -> BenchmarkReport:
    torch.manual_seed(0)
    return benchmark(net(), torch.randn(5, 1, 6, 6), warmup=1, runs=3)


def test_totals_agree_with_counts_and_with_the_file(report: BenchmarkReport, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = net()
    counted = cost(model, torch.randn(5, 1, 6, 6))
    assert (report.params, report.macs) == (counted.params, counted.macs)
    path = tmp_path / "net.lcz"
    info = archive.save(model, path)
    assert report.file_bytes == path.stat().st_size
    assert report.dense_bytes == info.dense_bytes
    assert report.compression_ratio == info.dense_bytes / path.stat().st_size
    assert report.baseline is None and math.isnan(report.speed_up)


def test_latencies_are_consistent(report: BenchmarkReport) -> None:
    assert (
        10 <= report.latency_ms_p10 <= report.latency_ms <= report.latency_ms_p90
    )  # sleep(0.01) is a lower bound
    assert report.throughput == pytest.approx(5 / report.latency_ms * 1000)
    assert report.setting["batch"] == 5 and report.setting["runs"] == 3
    assert report.setting["threads"] == torch.get_num_threads()


def test_layers_have_names_calls_and_shares(report: BenchmarkReport) -> None:
    layers = {layer.name: layer for layer in report.layers}
    assert list(layers) == ["", "0", "1", "2", "2.0", "2.1", "3", "4"]
    assert sum(layer.time_share for layer in report.layers) == pytest.approx(1)
    assert all(layer.time_share >= 0 and layer.calls == 1 for layer in report.layers)
    assert max(report.layers, key=lambda layer: layer.time_share).name == "2.1"
    assert layers["2"].time_share < 0.5  # its own time, not that of the slow layer inside
    assert layers["0"].activation_bytes == 5 * 4 * 4 * 4 * 4
    assert layers["4"].activation_bytes == 5 * 3 * 4
    assert (layers["4"].params, layers["4"].macs) == (64 * 3 + 3, 5 * 64 * 3)
    assert sum(layer.params for layer in report.layers) == report.params
    assert sum(layer.macs for layer in report.layers) == report.macs


def test_shared_layers_and_attention_are_counted_per_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, scale: float) -> dict[str, list[torch.Tensor]]:
            x = self.layer(self.layer(self.attention(x))) * scale
            return {"out": [x, x]}

    layers = {
        entry.name: entry
        for entry in benchmark(Twice(), (torch.randn(2, 3, 8), 2.0), warmup=0, runs=2).layers
    }
    assert layers["layer"].calls == 2
    assert layers["layer"].activation_bytes == 2 * (2 * 3 * 8 * 4)
    assert layers[""].activation_bytes == 2 * (2 * 3 * 8 * 4)  # two tensors in a nested output
    assert layers["attention.linear1"].calls == 1  # the fused path would have skipped it
    assert (
        layers["attention.self_attn.out_proj"].calls == 0 and layers["attention.self_attn.out_proj"].macs > 0
    )


def test_peak_memory_on_the_cpu_counts_what_is_held_at_once() -> None:
    size = 100_000

    class Temporaries(nn.Module):
        def __init__(self, together: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))
            self.tied = self.weight
            self.together = together

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(5):
                held = [x + i for i in range(self.together)]
            return held[0].sum()

    for together in (1, 4):
        measured = benchmark(Temporaries(together), torch.ones(size), warmup=1, runs=1, layerwise=False)
        # While a list is made again, the former one is still held.
        assert measured.peak_memory_bytes == pytest.approx(4 * size * (1 + 2 * together), rel=0.01)
    assert measured.layers == ()


def test_baseline_is_compared_in_turns() -> None:
    order: list[str] = []

    class Named(nn.Linear):
        def __init__(self, name: str, pause: float) -> None:
            super().__init__(64, 64)
            self.name, self.pause = name, pause

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            time.sleep(self.pause)
            return super().forward(x)

    original = Named("original", 0.02)
    small = compress(original, [Prune(0.9)]).model
    small.name, small.pause = "small", 0.0
    compared = benchmark(small, torch.randn(2, 64), baseline=original, warmup=1, runs=3, layerwise=False)
    assert order[:2] == ["small", "original"]
    assert order[2:11] == ["original", "small", "original"] * 3
    assert compared.baseline is not None and compared.baseline.latency_ms >= 20
    assert compared.file_bytes < compared.baseline.file_bytes
    assert compared.baseline.file_bytes / compared.file_bytes > 3
    text = str(compared)
    assert "original / this" in text and "speed-up" in text and "runs no faster" in text


def test_speed_up_is_the_median_of_paired_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[benchmark.__module__]
    monkeypatch.setattr(module, "_times", lambda *_: ([4.0, 8.0, 90.0], [2.0, 2.0, 2.0], [4.0, 12.0, 10.0]))
    compared = benchmark(
        nn.Linear(2, 2), torch.zeros(1, 2), baseline=nn.Linear(2, 2), runs=3, layerwise=False
    )
    assert compared.speed_up == 5.0  # of 2, 5 and 25
    assert compared.latency_ms == 2.0 and compared.latency_ms_p90 == 2.0
    assert compared.baseline.latency_ms == 9.0 and compared.baseline.latency_ms_mean == pytest.approx(128 / 6)


def test_differences_are_this_model_minus_the_original() -> None:
    original = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    small = compress(original, [Prune(0.9)]).model
    compared = benchmark(small, torch.randn(2, 64), baseline=original, warmup=0, runs=2, output=".")
    written = json.loads(Path("benchmark_results.json").read_text())
    assert written == compared.to_json()
    ours, theirs, differences = written, written["baseline"], written["differences"]
    assert {"latency_ms", "latency_ms_p10", "latency_ms_p90", "throughput", "file_bytes"} < differences.keys()
    for name, value in differences.items():
        assert value == pytest.approx(ours[name] - theirs[name], rel=1e-9)
    assert differences["file_bytes"] < -10_000 and differences["params"] == differences["macs"] == 0
    assert written["compression_ratio"] == written["dense_bytes"] / written["file_bytes"]
    for side in (ours, theirs):
        assert [layer["name"] for layer in side["layers"]] == ["", "0", "1"]
        assert {"calls", "time_share", "params", "macs", "activation_bytes"} <= side["layers"][1].keys()
    alone = benchmark(small, torch.randn(2, 64), warmup=0, runs=1, layerwise=False)
    assert alone.differences == {} and alone.to_json()["layers"] == []


def test_fake_quantized_models_get_the_note() -> None:
    """Quantizers in training leave no codes on the layers."""
    net = nn.Sequential(nn.Linear(8, 8))
    training.install(net, Quantize(4), "fake_quant", 0.01, None)
    assert not list(codes.of(net))
    assert "runs no faster" in benchmark(net, torch.zeros(1, 8), warmup=0, runs=1, layerwise=False).note


def test_dense_model_gets_no_note(report: BenchmarkReport) -> None:
    assert report.note == "" and "runs no faster" not in str(report)
    pruned = compress(nn.Linear(20, 20), [Prune(0.5)]).model
    assert "runs no faster" in benchmark(pruned, torch.zeros(1, 20), warmup=0, runs=1, layerwise=False).note


def test_json_round_trip_and_atomic_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "benchmark_results.json"
    first = benchmark(nn.Linear(4, 2), torch.zeros(3, 4), warmup=0, runs=2, output=path)
    written = json.loads(path.read_text())
    assert written == first.to_json()
    assert written["speed_up"] is None and written["baseline"] is None
    assert {
        "latency_ms",
        "latency_ms_mean",
        "latency_ms_p10",
        "latency_ms_p90",
        "throughput",
        "peak_memory_bytes",
    } <= set(written)
    assert written["layers"][0]["kind"] == "Linear" and written["file_bytes"] == first.file_bytes
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(BenchmarkReport, "to_json", lambda self: {"bad": object()})
    with pytest.raises(TypeError):
        benchmark(nn.Linear(4, 2), torch.zeros(3, 4), warmup=0, runs=1, output=path)
    assert json.loads(path.read_text()) == written
    assert list(tmp_path.iterdir()) == [path]


def test_file_name_without_folder_is_in_the_working_folder() -> None:
    benchmark(nn.Linear(4, 2), torch.zeros(3, 4), warmup=0, runs=1, output="results.json")
    assert json.loads(Path("results.json").read_text())["params"] == 10


def test_bad_arguments() -> None:
    for options in ({"warmup": -1}, {"runs": 0}):
        with pytest.raises(ValueError, match=r"runs >= 1"):
            benchmark(nn.Linear(1, 1), torch.zeros(1, 1), **options)
    with pytest.raises(ValueError, match=r"no-such-folder.*make it first"):
        benchmark(nn.Linear(1, 1), torch.zeros(1, 1), output="no-such-folder/results.json")


@pytest.mark.parametrize("fails_at", [None, 1, 3, 5])
def test_nothing_is_left_behind(fails_at: int | None) -> None:
    calls = 0

    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise RuntimeError("on purpose")
            return x + torch.rand_like(x)

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2).eval(), nn.Dropout(), Failing())
    before, state, threads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    x = torch.ones(2, 1, 5, 5)
    if fails_at:
        with pytest.raises(RuntimeError, match="on purpose"):
            benchmark(model, x, warmup=1, runs=2)
    else:
        benchmark(model, x, warmup=1, runs=2)
    assert [m.training for m in model] == [True, False, True, True] and model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads and gc.isenabled() and torch.is_grad_enabled()


def test_neural_operator() -> None:
    models = pytest.importorskip("neuralop.models")
    fno = models.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=4, n_layers=1)
    measured = benchmark(fno, torch.randn(2, 1, 8, 8), warmup=0, runs=1)
    spectral = next(layer for layer in measured.layers if layer.kind == "SpectralConv")
    assert spectral.calls == 1 and spectral.params == 2 * 4 * 4 * 4 * 3 + 4
