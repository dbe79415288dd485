"""Every configuration in recipes/configs does what its first lines say, and every recipe is run by some test."""

import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lightning_compress as lc
from lightning_compress import cli
from lightning_compress.archive import dense_bytes
from lightning_compress.cli import recipes as verbs
from lightning_compress.pipelines.files import read_yaml
from recipes import quickstart

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {path.name: path for path in sorted((ROOT / "recipes" / "configs").glob("*.yaml"))}
TRAINING = {"cifar_resnet.yaml", "quickstart.yaml"}  # the former is run by test_recipes.py
COMMANDS = sorted(CONFIGS.keys() - TRAINING)


def command(path: Path) -> list[str]:
    """The command that the comment at the beginning of a file shows."""
    lines = re.match(r"(# .*\n)+", path.read_text(encoding="utf-8"))
    assert lines
    shown = lines[0].replace("\\\n#", "").replace("# ", "").splitlines()[0]
    return shlex.split(shown)


def test_there_is_a_command_in_every_file() -> None:
    assert len(COMMANDS) >= 5
    for name, path in CONFIGS.items():
        assert f"recipes/configs/{name}" in command(path)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_in_the_file_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, verb, file, *options = command(CONFIGS[name])
    assert program == "lightning-compress" and file == f"recipes/configs/{name}"
    given = {word: options[i + 1] for i, word in enumerate(options) if word.startswith("--")}
    model = given["--model"]
    if model == "fno":
        pytest.importorskip("neuralop")
    net = lc.models.build(model).eval()
    torch.save({k: v for k, v in net.state_dict().items() if isinstance(v, torch.Tensor)}, "weights.pt")
    np.save("images.npy", np.random.default_rng(0).random((16, 1, 28, 28)).astype(np.float32))
    options[options.index("--checkpoint") + 1] = "weights.pt"
    few = functools.partial(verbs.compress_to, evaluations=3)
    monkeypatch.setattr(verbs, "compress_to", few)
    if verb == "search":
        pytest.importorskip("matplotlib")
        options += ["--population", "3", "--generations", "2"]
    done = cli.main([verb, str(CONFIGS[name]), *options])
    output = Path(given["--output"])
    info, printed = lc.inspect(output), capsys.readouterr().out
    restored = lc.load(output, into=lc.models.build(model)).eval()
    assert info.stale == {} and info.file_bytes == output.stat().st_size
    written = read_yaml(CONFIGS[name])
    fraction = output.stat().st_size / dense_bytes(net)
    if "target_ratio" in written:
        assert done == (0 if fraction <= written["target_ratio"] else 1)
    assert ("NOT met" in printed) == bool(done) and fraction < 0.7
    assert any(not torch.equal(a, b) for a, b in zip(restored.parameters(), net.parameters(), strict=False))
    for option in ("--resume", "--front", "--plot"):
        assert option not in given or Path(given[option]).stat().st_size > 100


def test_the_training_of_quickstart_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe"])  # LightningCLI warns when given both
    config = str(CONFIGS["quickstart.yaml"])
    argv = ["fit", "--config", config, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "10"]
    trained = LightningCLI(quickstart.LitDigits, quickstart.Digits, args=argv)
    targets = lc.find(trained.model.net)
    zeros, entries = (sum(int(f(t.weight)) for t in targets) for f in (lambda w: (w == 0).sum(), torch.numel))
    assert zeros == int(0.9 * entries + 0.5) and trained.trainer.global_step == 20


@pytest.mark.usefixtures("recipes")
def test_the_benchmark_of_pruning_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module("pruning_overhead").main
    main(["--steps", "6", "--warmup", "1", "--batch-size", "4", "--every", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"^plain +\d", printed, re.M) and re.search(r"^ScheduledPruning +\d", printed, re.M)
    assert re.search(r"paired ratios of [1-6] steps", printed)


def test_every_recipe_is_named_in_a_test() -> None:
    written = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    files = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes" / "benchmarks").glob("*.py")]
    assert len(files) > 15
    assert [path.stem for path in files if not re.search(rf"\b{path.stem}\b", written)] == []
