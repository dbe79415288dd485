"""The recipes of evolved weights: what they print is what a reader of their files would find."""

import ast
import importlib
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lightning_compress as lc
from lightning_compress import cgp
from lightning_compress.cgp.layers.codes import CircuitCode
from lightning_compress.cgp.layers.integers import find_int8, read_int8

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--rows", "24", "--cols", "16", "--generations", "20", "--patience", "20"]

pytestmark = pytest.mark.usefixtures("recipes")


@pytest.fixture
def lenet() -> ModuleType:
    return importlib.import_module("lenet5_cgp")


@pytest.fixture
def mobilenet() -> ModuleType:
    pytest.importorskip("torchvision")
    return importlib.import_module("mobilenetv2_cgp")


def tables(printed: str) -> list[dict[str, dict[str, str]]]:
    """The printed tables: first cell of a row -> column -> cell."""
    found, lines = [], printed.splitlines()
    for at, line in enumerate(lines):
        if re.fullmatch(r"-+(  -+)+", line):
            header, rows = re.split(r"\s{2,}", lines[at - 1].strip()), {}
            for row in lines[at + 1 :]:
                cells = re.split(r"\s{2,}", row.strip())
                if len(cells) != len(header):
                    break
                rows[cells[0]] = dict(zip(header, cells, strict=True))
            found.append(rows)
    return found


def number(text: str) -> float:
    return float(text.replace(",", ""))


def integers(net: torch.nn.Module, name: str) -> np.ndarray:
    return find_int8(net, name)[1]


@pytest.mark.parametrize("way", [[], ["--no-train", "--granularity", "per_channel"], ["--no-multiplex"]])
def test_lenet_files_are_what_the_tables_say(
    lenet: ModuleType, way: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    multiplexed = "--no-multiplex" not in way
    presets = (
        ["--thresholds", "0", "40"] if multiplexed else ["--thresholds", "40", "--presets", "layer_bypass"]
    )
    lenet.main([*SMALL, *way, *presets, "--dense-epochs", "2", "--output-dir", "out"])
    circuits, energies, sizes = tables(capsys.readouterr().out)
    names = [
        "layer_bypass_conv1_conv2_t0",
        "layer_bypass_conv1_conv2_t40",
        "le_selector_t0",
        "le_selector_t0.0655744",
    ]
    assert list(circuits) == list(energies) == list(sizes) == (names if multiplexed else names[1:2])
    data = lenet.read(None)
    before = lc.load("out/int8.lcz", into=lc.models.LeNet5()).eval()
    for name, row in circuits.items():
        after = lc.load(f"out/{name}.lcz", into=lc.models.LeNet5()).eval()
        layers = ["conv2"] if "bypass" in name else ["conv1", "conv2"]
        gaps = [(integers(after, x).astype(int) - integers(before, x)).ravel() for x in layers]
        mse = float((np.concatenate(gaps) ** 2).mean())
        assert number(row["MSE"]) == pytest.approx(mse, rel=1e-3)
        assert number(row["RMS error"]) == pytest.approx(math.sqrt(mse), rel=1e-3)
        for model, column in ((before, "top-1 % int8"), (after, "top-1 % after")):
            with torch.no_grad():
                right = (model(data["x_test"]).argmax(1) == data["y_test"]).float().mean()
            assert number(row[column]) == pytest.approx(100 * float(right), abs=0.06)
        circuit = cgp.Circuit.from_text(Path(f"out/{name}.txt").read_text())
        cost = circuit.cost()
        assert number(row["gates"]) == cost.gate_count and number(row["pJ"]) == pytest.approx(
            cost.energy_pj, rel=1e-3
        )
        assert number(row["depth"]) == cost.depth and number(row["delay"]) == pytest.approx(
            cost.delay, rel=1e-3
        )
        for file, column in (("int8", "bytes as int8"), (name, "bytes as circuit")):
            info = lc.inspect(f"out/{file}.lcz")
            stored = sum(t.stored_bytes for t in info.tensors if t.name.removesuffix(".weight") in layers)
            assert not info.stale and number(sizes[name][column]) == stored
        kinds = {t.name: t.kind for t in lc.inspect(f"out/{name}.lcz").tensors}
        assert all(kinds[f"{x}.weight"] == "circuit" for x in layers) and kinds["fc1.weight"] == "affine"
        row, count = energies[name], number(sizes[name]["weights"])
        paid = number(row["circuit"]) + number(row["inputs"])
        assert number(row["saved"]) == pytest.approx(1.25 * count, rel=1e-3)
        assert number(row["net"]) == pytest.approx(1.25 * count - paid, rel=1e-3)
        assert number(row["paid pJ/byte"]) == pytest.approx(paid / count, rel=1e-3)
        assert number(row["indexed, best"]) < number(row["net"]) <= number(row["inputs read anyhow"])
        assert number(sizes[name]["inputs read"]) == (150 if "bypass" in name else 0)
    if multiplexed:
        assert float(circuits[names[0]]["RMS error"]) == float(circuits[names[2]]["RMS error"]) == 0
    assert float(circuits[names[1]]["RMS error"]) <= 40


def test_lenet_exports_give_the_weights(lenet: ModuleType) -> None:
    argv = ["--no-train", "--dense-epochs", "1", "--presets", "le_selector", "--output-dir", "out"]
    lenet.main([*SMALL, *argv])
    net = lc.load("out/le_selector_t0.lcz", into=lc.models.LeNet5())
    scope: dict[str, object] = {}
    exec(Path("out/le_selector_t0.py").read_text(), scope)
    values = {0, *scope["weights"]([0])}  # type: ignore[operator]
    assert {int(v) for x in ("conv1", "conv2") for v in np.unique(integers(net, x))} <= values
    assert len(values) > 100
    if shutil.which("iverilog"):
        files = [f"out/le_selector_t0{end}.v" for end in ("", "_test")]
        subprocess.run(["iverilog", "-o", "simulation", *files], check=True)
        assert (
            "PASS" in subprocess.run(["vvp", "simulation"], check=True, capture_output=True, text=True).stdout
        )


def test_lenet_of_a_pack_and_a_checkpoint(lenet: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    pack = {}
    for part, size in (("train", 40), ("test", 20)):
        pack |= {f"x_{part}": random.integers(0, 256, (size, 28, 28), dtype=np.uint8)}
        pack |= {f"y_{part}": random.integers(0, 10, size, dtype=np.uint8)}
    np.savez("pack.npz", **pack)
    net = lc.models.LeNet5()
    torch.save(net.state_dict(), "net.pt")
    argv = [
        "--data",
        "pack.npz",
        "--checkpoint",
        "net.pt",
        "--no-train",
        "--thesis",
        "--presets",
        "layer_bypass",
    ]
    lenet.main([*argv, *SMALL[4:], "--output-dir", "out"])
    circuits, _, _ = tables(capsys.readouterr().out)
    assert [name.rpartition("_t")[2] for name in circuits] == [
        "250",
        "150",
        "100",
        "50",
        "25",
        "15",
        "10",
        "0",
    ]
    assert cgp.Circuit.from_text(Path("out/layer_bypass_conv1_conv2_t0.txt").read_text()).grid.rows == 256
    rounded = lc.compress(net, [lc.Quantize(8, granularity=lc.PerTensor(), calibrator="minmax")]).model
    for name in ("conv1", "fc3"):
        assert np.array_equal(
            integers(lc.load("out/int8.lcz", into=lc.models.LeNet5()), name), integers(rounded, name)
        )


def test_an_evolution_stops_in_time(lenet: ModuleType) -> None:
    problem = cgp.Problem.of([[0]], [list(range(-128, 128))])
    endless = cgp.Settings(seed_circuit="random", patience=10**9)
    assert cgp.evolve(problem, endless, callback=lenet.until(0.0)).stopped == "callback"


def test_mobilenet_layers(mobilenet: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["features.1.conv.1", "features.1.conv.0.0"]
    argv = ["--random", "--granularity", "per_tensor", "--layer", *layers, "--thresholds", "0", "2"]
    mobilenet.main([*SMALL, *argv, "--runs", "2", "--folder", "out"])
    printed = capsys.readouterr().out
    assert printed.startswith("8 runs in") and "0 not run again" in printed
    _, sizes = tables(printed)
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines() if line.startswith("features.")]
    assert [row[:3] for row in rows] == [
        [n, w, t] for n, w in zip(layers, ("512", "288"), strict=True) for t in "02"
    ]
    torch.manual_seed(0)
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2(weights=None)
    fresh = {t: lc.load(f"out/mobilenetv2_t{t}.lcz", into=mobilenet_v2(weights=None)) for t in "02"}
    lc.load("out/int8.lcz", into=net)
    for name, weights, threshold, error, gates, energy, inputs, reading, _ in rows:
        code = lc.codes.read(fresh[threshold].get_submodule(name), "weight")
        assert isinstance(code, CircuitCode)
        gap = (
            read_int8(fresh[threshold].get_submodule(name), "weight")[0].astype(int) - integers(net, name)
        ).ravel()
        assert float(error) == pytest.approx(math.sqrt((gap**2).mean()), rel=1e-3) and not gap[:96].any()
        assert float(error) <= float(threshold)
        assert number(inputs) == 96 * 1.25 and number(reading) == number(weights) * 1.25
        assert code.cost().energy_pj <= float(energy) + 1e-3 and code.cost().gate_count <= number(gates)
    for threshold, row in sizes.items():
        names = {t.name: t for t in lc.inspect(f"out/mobilenetv2_t{threshold}.lcz").tensors}
        assert number(row["bytes as circuits"]) == sum(names[f"{n}.weight"].stored_bytes for n in layers)
        assert all(names[f"{n}.weight"].kind == "circuit" for n in layers)
        assert names["features.18.0.weight"].kind == "affine"
    mobilenet.main([*SMALL, *argv, "--runs", "2", "--folder", "out"])
    again = capsys.readouterr().out
    assert again.startswith("0 runs in") and "8 not run again" in again
    assert again.splitlines()[1:] == printed.splitlines()[1:]


def test_all_convolutions_of_mobilenet_are_planned(
    mobilenet: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is run here; what has not finished is named."""
    monkeypatch.setattr(mobilenet.campaign, "run", lambda folders, jobs: [])
    with pytest.raises(SystemExit, match="no run has finished; start this again"):
        mobilenet.main([*SMALL, "--random", "--all", "--folder", "out"])
    weights = [cgp.campaign.read(path).problem.weights for path in Path("out").iterdir()]
    assert len(weights) == 52 and max(weights) == 409_600 and min(weights) == 288


@pytest.mark.parametrize("name", ["lenet5_cgp", "mobilenetv2_cgp"])
def test_the_page_shows_the_whole_docstring(name: str) -> None:
    module = ast.parse((ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8"))
    (docstring,) = (node for node in module.body[:1] if isinstance(node, ast.Expr))
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f'"recipes/{name}.py:1:{(docstring.end_lineno or 0) - 1}"' in page
    said = ast.get_docstring(module) or ""
    assert all(word in said for word in ("Measured", "seed", "torch", "CPU"))
