"""The recipes and benchmarks of quantization run for a few steps."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_compress as lc

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that name a checkpoint and a folder of packs; recipes are imported as they are when run."""
    generator = np.random.default_rng(0)
    pixels, labels = (
        generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8),
        generator.integers(0, 10, 40),
    )
    np.savez(
        tmp_path / "cifar10_train_0.npz", x_train_delta=pixels.transpose(0, 3, 1, 2)[:24], y_train=labels[:24]
    )
    np.savez(tmp_path / "cifar10_test.npz", x_test=pixels[24:], y_test=labels[24:])
    torch.manual_seed(1)
    torch.save(lc.models.resnet20().state_dict(), tmp_path / "net.pt")
    for folder in (RECIPES, RECIPES / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    return ["--data", str(tmp_path), "--checkpoint", str(tmp_path / "net.pt")]


@pytest.mark.parametrize("start", ["compensated", "float"])
def test_quantization_aware_training(given, start, tmp_path, capsys):
    out = tmp_path / "out"
    steps = [
        "--max-steps",
        "2",
        "--batch-size",
        "8",
        "--log-every",
        "1",
        "--start",
        start,
        "--output-dir",
        str(out),
    ]
    importlib.import_module("cifar_qat").main([*given, "--bits", "3", "4", *steps])
    printed = capsys.readouterr().out
    assert all(row in printed for row in ("float32", "W3A4", "the same, fused"))
    plain, small = lc.models.resnet20().eval(), lc.models.resnet20().eval()
    plain.load_state_dict(torch.load(out / "rounded.pt", weights_only=True))
    lc.load(out / "W3A4.lcz", into=small)
    for a, b in zip(plain.parameters(), small.parameters(), strict=True):
        assert torch.equal(a, b)
    inner = [t for t in lc.find(plain) if t.name not in ("conv1", "linear")]
    assert len(inner) == 18 and all(len(row.unique()) <= 7 for t in inner for row in t.weight.flatten(1))
    assert len((out / "W3A4.lcz").read_bytes()) < len((out / "float32.lcz").read_bytes()) / 5
    assert list((out / "csv").rglob("metrics.csv"))


def test_accuracy_of_post_training_quantization(given, tmp_path, capsys):
    main = importlib.import_module("ptq_accuracy").main
    file = given.pop()
    rows = ["--rows", "W4, nearest", "W4A8, 8 images", "--calibration", "8", "--samples", "4"]
    main([*given, f"resnet20={file}", *rows, "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "W4, nearest  no data" in printed and "W4A8         8 images" in printed and "float32" in printed


def test_latency_of_integer_files(given, capsys):
    pytest.importorskip("onnxruntime")
    main = importlib.import_module("int8_latency").main
    main(
        [
            "--models",
            "lenet5",
            "--images",
            "8",
            "--calibration",
            "8",
            "--runs",
            "2",
            "--warmup",
            "0",
            "--batch-size",
            "4",
        ]
    )
    printed = capsys.readouterr().out
    assert all(f"int8, {form}" in printed for form in ("inputs", "outputs", "po2"))
    (line,) = (line for line in printed.splitlines() if "po2" in line)
    assert line.split()[-3:-1] == ["100.00%", "100.00%"] and float(line.split()[-1]) == 0  # bit for bit


def test_overhead_of_training(given, capsys):
    main = importlib.import_module("qat_overhead").main
    main(["--steps", "4", "--warmup", "1", "--batch-size", "4", "--only", "lsq", "pact"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("plain", "lsq", "pact"))
