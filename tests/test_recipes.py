"""Every recipe runs for a few steps, and what it prints is what a reader would find by counting."""

import ast
import csv
import re
import runpy
import sys
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lightning_compress as lc
from recipes import cifar_resnet, quickstart

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "recipes" / "configs"


def cells(printed: str, first: str) -> list[str]:
    """The cells of the printed table row that begins with ``first``."""
    (line,) = (line for line in printed.splitlines() if line.startswith(first + "  "))
    return [cell for cell in re.split(r"\s{2,}", line) if cell]


def zeros(net: nn.Module) -> int:
    return sum(int((target.weight == 0).sum()) for target in lc.find(net))


def size(net: nn.Module) -> int:
    return sum(target.weight.numel() for target in lc.find(net))


# -- quickstart ------------------------------------------------------------------------------------------------


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(["--epochs", "1", "--fine-tune-epochs", "1", "--output-dir", "out"])
    printed = capsys.readouterr().out
    pruned, small, dense = (quickstart.network().eval() for _ in range(3))
    pruned.load_state_dict(torch.load("out/pruned.pt", weights_only=True))
    dense.load_state_dict(torch.load("out/dense.pt", weights_only=True))
    lc.load("out/small.lcz", into=small)
    assert zeros(pruned) == zeros(small) == int(0.9 * size(pruned) + 0.5)
    assert any(isinstance(m, nn.BatchNorm2d) for m in pruned) and not any(
        isinstance(m, nn.BatchNorm2d) for m in small
    )
    digits = quickstart.Digits()
    digits.setup("test")
    images, labels = next(iter(digits.test_dataloader()))
    with torch.no_grad():
        before, after = dense(images), small(images)
        torch.testing.assert_close(after, pruned(images), rtol=1e-4, atol=1e-4)
    top1 = [f"{(logits.argmax(1) == labels).float().mean():.2%}" for logits in (before, after)]
    assert cells(printed, "top-1")[1:] == top1
    changed = (before.argmax(1) != after.argmax(1)).float().mean()
    assert cells(printed, "OutputErrorRate")[1:] == [f"{changed:.2%}"]
    files = [f"{Path('out', name).stat().st_size:,}" for name in ("dense.pt", "small.lcz")]
    assert cells(printed, "file_bytes")[1:] == files
    assert len(set(cells(printed, "MACs")[1:])) == 1
    assert all(row in printed for row in ("compression_ratio", "latency_ms"))
    assert list(Path("out/tensorboard").rglob("events.out.tfevents.*"))


def test_digits_split_is_fixed_and_disjoint() -> None:
    """Whatever the seed, 1297 digits train and the other 500 test."""
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        digits = quickstart.Digits()
        digits.setup("fit")
        splits.append((digits.train.indices, digits.test.indices))
    assert splits[0] == splits[1]
    train, test = map(set, splits[0])
    assert (len(train), len(test), len(train | test)) == (1297, 500, 1797)


# -- CIFAR data ------------------------------------------------------------------------------------------------


def residual(pixels: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) pixels as the training packs hold them: differences along a row, down, to green, modulo 256."""
    planes = pixels.transpose(0, 3, 1, 2).astype(np.int64)
    planes[:, 0] -= planes[:, 1]
    planes[:, 2] -= planes[:, 1]
    planes[:, :, :, 1:] -= planes[:, :, :, :-1].copy()
    planes[:, :, 1:] -= planes[:, :, :-1].copy()
    return (planes % 256).astype(np.uint8)


@pytest.fixture
def packs(tmp_path: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """A folder of packs with 40 training and 24 test images; and the training pixels and labels."""
    folder, generator = tmp_path / "packs", np.random.default_rng(0)
    folder.mkdir()
    pixels = generator.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, 64, dtype=np.uint8)
    for i, part in enumerate((slice(0, 25), slice(25, 40))):
        np.savez(
            folder / f"cifar10_train_{i}.npz", x_train_delta=residual(pixels[part]), y_train=labels[part]
        )
    np.savez(folder / "cifar10_test.npz", x_test=pixels[40:], y_test=labels[40:])
    return str(folder), pixels, labels


def test_packs_are_read_as_written(packs: tuple[str, np.ndarray, np.ndarray]) -> None:
    folder, pixels, labels = packs
    for train, limit, part in (
        (True, None, slice(0, 40)),
        (True, 30, slice(0, 30)),
        (False, 7, slice(40, 47)),
    ):
        images, targets = cifar_resnet.read(folder, train, limit)
        assert images.dtype == torch.uint8 and targets.dtype == torch.int64
        assert np.array_equal(images.numpy(), pixels[part].transpose(0, 3, 1, 2))
        assert targets.tolist() == labels[part].tolist()
    Path(folder, "cifar10_train_1.npz").write_text("not needed for few images")
    assert len(cifar_resnet.read(folder, True, 25)[0]) == 25


def test_a_folder_without_packs_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no cifar10_train_\*\.npz"):
        cifar_resnet.read(".", True, None)


def test_torchvision_data_has_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)

    class Downloaded:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            self.data, self.targets = (pixels, [3, 1, 4, 1, 5, 9]) if train and download else (pixels[:0], [])

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    images, labels = cifar_resnet.read(None, True, 5)
    assert np.array_equal(images.numpy(), pixels[:5].transpose(0, 3, 1, 2))
    assert labels.tolist() == [3, 1, 4, 1, 5]


def test_augmented_images_are_crops_of_the_padded_ones() -> None:
    images = torch.randint(1, 256, (60, 3, 8, 8), dtype=torch.uint8)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, out in enumerate(cifar_resnet.augment(images)):
        crops = ((y, x, f) for y in range(9) for x in range(9) for f in (False, True))
        for y, x, flip in crops:
            crop = padded[image, :, y : y + 8, x : x + 8]
            if torch.equal(out, crop.flip(2) if flip else crop):
                seen.add((y, x, flip))
                break
        else:
            pytest.fail(f"image {image} is no crop")
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9)) and {
        f for _, _, f in seen
    } == {False, True}


# -- CIFAR runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint() -> str:
    torch.manual_seed(1)
    torch.save(
        {"state_dict": {f"net.{k}": v for k, v in lc.models.resnet20().state_dict().items()}}, "net.ckpt"
    )
    return "net.ckpt"


@pytest.mark.parametrize("fuse", [False, True])
def test_cifar_post_training(
    fuse: bool, packs: tuple[str, np.ndarray, np.ndarray], checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--post-training",
        "--sparsity",
        "0.5",
        "0.9",
        "--data",
        packs[0],
        "--checkpoint",
        checkpoint,
        "--output-dir",
        "out",
    ]
    cifar_resnet.main([*argv, *(["--fuse"] if fuse else [])])
    printed = capsys.readouterr().out
    images, labels = cifar_resnet.read(packs[0], False, None)
    dense = cifar_resnet.logits(cifar_resnet.build("resnet20", checkpoint), images)
    for name, kept in (("dense", 268_336), ("sparsity_0.5", 134_168), ("sparsity_0.9", 26_834)):
        net = lc.load(f"out/{name}.lcz", into=lc.models.resnet20())
        logits = cifar_resnet.logits(net, images)
        assert zeros(net) == 268_336 - kept
        assert cells(printed, name) == [
            name,
            f"{(logits.argmax(1) == labels).float().mean():.2%}",
            f"{(logits.argmax(1) != dense.argmax(1)).float().mean():.2%}",
            f"{268_336 - kept:,} of 268,336",
            f"{lc.cost(net).params:,}",
            f"{Path(f'out/{name}.lcz').stat().st_size:,}",
            *cells(printed, name)[6:],
        ]
        assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (name == "dense" or not fuse)


def test_cifar_fine_tuning_logs_the_schedule(
    packs: tuple[str, np.ndarray, np.ndarray], checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = "--sparsity 0.8 --max-steps 10 --every 1 --log-every 1 --batch-size 4 --train-size 20 --output-dir out"
    cifar_resnet.main([*argv.split(), "--data", packs[0], "--checkpoint", checkpoint])
    with Path("out/csv/version_0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["compress/sparsity"]]
    entries = 268_336
    logged = {int(row["step"]) + 1: float(row["compress/sparsity"]) for row in rows if int(row["step"]) < 10}
    assert list(logged) == list(range(1, 11))
    for t, value in logged.items():
        p = min(max((t - 1) / 6, 0), 1)  # begin 0.1 and end 0.7 of 10 steps
        assert value == pytest.approx(int(0.8 * (1 - (1 - p) ** 3) * entries + 0.5) / entries, abs=1e-12)
    pruned = lc.models.resnet20()
    pruned.load_state_dict(torch.load("out/pruned.pt", weights_only=True))
    assert zeros(pruned) == int(0.8 * entries + 0.5)
    printed = capsys.readouterr().out
    assert (
        cells(printed, "pruned")[3]
        == cells(printed, "fused")[3]
        == f"{int(0.8 * entries + 0.5):,} of {entries:,}"
    )
    assert list(Path("out/tensorboard").rglob("events.out.tfevents.*"))


def test_cifar_refuses_a_curve_that_leaves_the_schedule() -> None:
    """The check inside the recipe can fail."""
    Path("metrics.csv").write_text("step,compress/sparsity\n0,0.0\n9,0.8\n")
    options = cifar_resnet.argparse.Namespace(max_steps=10, every=1)
    cifar_resnet.check_curve(Path("metrics.csv"), 0.8, 1000, options)
    Path("metrics.csv").write_text("step,compress/sparsity\n0,0.0\n9,0.79\n")
    with pytest.raises(RuntimeError, match="after step 10"):
        cifar_resnet.check_curve(Path("metrics.csv"), 0.8, 1000, options)


def test_several_sparsities_need_post_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cifar_resnet.main(["--sparsity", "0.5", "0.6"])
    assert "--post-training" in capsys.readouterr().err


# -- from LightningCLI files -------------------------------------------------------------------------------------

RECIPES = {
    "quickstart": (quickstart.LitDigits, quickstart.Digits),
    "cifar_resnet": (cifar_resnet.LitClassifier, cifar_resnet.CIFAR10),
}


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe"])  # LightningCLI warns when given both


def parsed(recipe: str, *argv: str) -> list[Callback]:
    """The library's callbacks that a LightningCLI makes of its arguments."""
    cli = LightningCLI(*RECIPES[recipe], args=list(argv), run=False)
    return [c for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_compress.")]


def options(callback: Callback) -> dict[str, Any]:
    """What a callback was made with; a transform counts by its configuration."""
    made = {k: v for k, v in vars(callback).items() if k in signature(type(callback)).parameters}
    return {k: v.config() if isinstance(v, lc.Transform) else v for k, v in made.items()}


def test_cli_config_runs_the_cifar_recipe(packs: tuple[str, np.ndarray, np.ndarray], checkpoint: str) -> None:
    argv = ["fit", "--config", str(CONFIGS / "cifar_resnet.yaml"), "--model.checkpoint", checkpoint]
    argv += ["--data.folder", packs[0], "--data.batch_size", "8", "--trainer.max_steps", "4"]
    cli = LightningCLI(*RECIPES["cifar_resnet"], args=argv)
    pruning, fusion = cli.trainer.callbacks[0], cli.trainer.callbacks[1]
    assert isinstance(pruning, lc.ScheduledPruning) and isinstance(fusion, lc.BatchNormFusion)
    assert zeros(cli.model.net) == zeros(fusion.fused) == int(0.8 * 268_336 + 0.5)
    assert list(Path("outputs/cifar_resnet/tensorboard").rglob("events.out.tfevents.*"))
    saved = Path("outputs/cifar_resnet/csv/version_0/config.yaml").read_text()
    assert "class_path: lightning_compress.ScheduledPruning" in saved


@pytest.mark.parametrize("recipe", RECIPES)
def test_printed_cli_config_gives_equal_callbacks(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Behaviour 53: the output of ``--print_config`` re-parses, also with a function named by its import path."""
    given = [
        "--config",
        str(CONFIGS / f"{recipe}.yaml"),
        "--trainer.callbacks+=lightning_compress.ScheduledPruning",
    ]
    more = {
        "name": "second",
        "schedule": "math.sqrt",
        "sparsity": '{"*": 0.25}',
        "include": '["net.*"]',
        "scope": "layer",
    }
    given += [f"--trainer.callbacks.{option}={value}" for option, value in more.items()]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        LightningCLI(*RECIPES[recipe], args=[*given, "--print_config"], run=False)
    Path("printed.yaml").write_text(capsys.readouterr().out)
    first, again = parsed(recipe, *given), parsed(recipe, "--config", "printed.yaml")
    names = ["ScheduledPruning", "BatchNormFusion", "CompressionMonitor", "ScheduledPruning"]
    assert [type(c).__name__ for c in first] == [type(c).__name__ for c in again] == names
    assert [options(c) for c in first] == [options(c) for c in again]
    assert first[3].transform == lc.Prune({"*": 0.25}, scope="layer", include=["net.*"], exclude=[])
    assert first[3].schedule == "math.sqrt"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_files_start_the_cli(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user types it; the printed configuration names the callbacks by their public path."""
    script = ROOT / "recipes" / f"{recipe}.py"
    monkeypatch.setattr(
        sys, "argv", [str(script), "fit", "--config", str(CONFIGS / f"{recipe}.yaml"), "--print_config"]
    )
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    names = re.findall(r"class_path: lightning_compress\.(\w+)", capsys.readouterr().out)
    assert names == ["ScheduledPruning", "BatchNormFusion", "CompressionMonitor"]


# -- documentation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [quickstart, cifar_resnet])
def test_the_page_shows_the_whole_docstring(module: ModuleType) -> None:
    """docs/recipes.md includes lines 2 to n of the recipe: the docstring without its quotes."""
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    (docstring,) = (node for node in ast.parse(source).body[:1] if isinstance(node, ast.Expr))
    name = Path(module.__file__ or "").name
    assert (
        f'"recipes/{name}:1:{(docstring.end_lineno or 0) - 1}"' in (ROOT / "docs" / "recipes.md").read_text()
    )
    assert all(word in (module.__doc__ or "") for word in ("Measured", "seed", "torch", "CPU"))
