"""The recipe and the benchmarks of low rank run for a few steps, and the command line factorizes."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_compress as lc
from lightning_compress import cli
from lightning_compress.lowrank import Factors

pytestmark = pytest.mark.usefixtures("recipes")


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """Options that name a checkpoint and a folder of packs."""
    draw = np.random.default_rng(0)
    pixels, labels = draw.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), draw.integers(0, 10, 40)
    train = pixels.transpose(0, 3, 1, 2)[:24]
    np.savez(tmp_path / "cifar10_train_0.npz", x_train_delta=train, y_train=labels[:24])
    np.savez(tmp_path / "cifar10_test.npz", x_test=pixels[24:], y_test=labels[24:])
    torch.manual_seed(1)
    torch.save(lc.models.resnet20().state_dict(), tmp_path / "net.pt")
    return ["--data", str(tmp_path), "--checkpoint", str(tmp_path / "net.pt")]


def test_regularize_factorize_and_fine_tune(given, tmp_path, capsys):
    out = tmp_path / "out"
    steps = [
        "--regularize-steps",
        "1",
        "--max-steps",
        "2",
        "--batch-size",
        "8",
        "--log-every",
        "1",
        "--macs-ratio",
        "2.84",
    ]
    importlib.import_module("cifar_lowrank").main([*given, *steps, "--output-dir", str(out)])
    printed = capsys.readouterr().out
    rows = ("dense", "regularized", "factorized", "fine-tuned", "fused")
    macs = {
        line.split()[0]: line for line in printed.splitlines() if line.split()[:1] and line.split()[0] in rows
    }
    assert set(macs) == set(rows) and "40,551,040" in macs["dense"]
    thin = lc.load(out / "fine-tuned.lcz", into=lc.models.resnet20().eval())
    assert 40_551_040 / lc.cost(thin, torch.zeros(1, 3, 32, 32)).macs >= 2.84
    assert any(isinstance(layer, Factors) for layer in thin.modules())
    assert list((out / "csv" / "fine_tune").rglob("metrics.csv"))


def test_latency_of_operators(capsys):
    pytest.importorskip("neuralop")
    main = importlib.import_module("operator_latency").main
    small = [
        "--hidden-channels",
        "6",
        "--half-modes",
        "2",
        "4",
        "--n-modes",
        "4",
        "4",
        "--sizes",
        "16",
        "--batch-sizes",
        "1",
        "--runs",
        "2",
        "--profile",
    ]
    main(small)
    printed = capsys.readouterr().out
    for name in ("original", "half the modes", "half the numbers", "half the numbers, partial Fourier"):
        assert f"  {name}  " in printed and f"{name}: " in printed


@pytest.mark.parametrize("kind", ["fno", "codano"])
def test_operators_on_the_command_line(kind, tmp_path, monkeypatch, capsys):
    pytest.importorskip("neuralop")
    monkeypatch.chdir(tmp_path)
    sizes = "--model_args.n_modes [4,4] --model_args.hidden_channels 4 --model_args.n_layers 1"
    shape = "--example-shape 1 1 8 8"
    for verb, options in {
        "prune": "--sparsity 0.5",
        "factorize": "--rank_ratio 0.3 --activation_aware true --samples 8",
        "quantize": "--bits 8 --activation-bits 8 --samples 8",
    }.items():
        argv = f"{verb} --model {kind} {sizes} {shape} {options} --output {verb}.lcz"
        assert cli.main(argv.split()) == 0, capsys.readouterr().err
        assert f"{(tmp_path / f'{verb}.lcz').stat().st_size:,}" in capsys.readouterr().out
        fresh = lc.models.build(kind, n_modes=(4, 4), hidden_channels=4, n_layers=1)
        x = torch.randn(1, 1, 12, 12)
        assert lc.load(f"{verb}.lcz", into=fresh).eval()(x).shape == x.shape
    assert cli.main(f"factorize --model {kind} {sizes} --rank_ratio 2 --output no.lcz".split()) == 2
    assert "0 < rank_ratio <= 1" in capsys.readouterr().err and not (tmp_path / "no.lcz").exists()


def test_ratios_on_the_command_line_are_those_of_the_given_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["factorize", "--model", "lenet5", "--params_ratio", "0.25", "--output", "thin.lcz"]
    assert cli.main(argv) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("thin.lcz"))
    size = (tmp_path / "thin.lcz").stat().st_size
    assert float(line.split()[-1]) == pytest.approx(4 * 61_706 / size, rel=1e-3)
