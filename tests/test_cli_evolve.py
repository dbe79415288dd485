"""The verb `evolve` does what the library does, and refuses what it cannot use in one line."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import Namespace

import lightning_compress as lc
from lightning_compress import cli, codes
from lightning_compress.cgp import Circuit, Settings, evolve, presets, to_python, to_verilog
from lightning_compress.cgp.campaign import Folder, find, read, read_rows
from lightning_compress.cgp.layers.integers import read_int8
from lightning_compress.cgp.metrics import scores
from lightning_compress.checkpoints import load_weights
from lightning_compress.cli import datasets

NET = ("--model", "lenet5", "--checkpoint", "int8.lcz")
SMALL = ("--rows", "16", "--cols", "12", "--generations", "40")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float and an int8 LeNet-5, and images."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = lc.models.build("lenet5")
    torch.save(net.state_dict(), folder / "float.pt")
    lc.save(lc.compress(net, [lc.Quantize(8)]).model, folder / "int8.lcz")
    random = np.random.default_rng(0)
    parts = {
        f"x_{split}": random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for split, count in (("train", 6), ("test", 20))
    }
    labels = {f"y{name[1:]}": random.integers(0, 10, len(x)).astype(np.uint8) for name, x in parts.items()}
    np.savez(folder / "digits.npz", **parts, **labels)
    return folder


@pytest.fixture(autouse=True)
def _here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in files.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)


def done(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a call prints."""
    capsys.readouterr()
    assert cli.main(["evolve", *argv]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a call that must end with exit code 2 and print nothing else."""
    capsys.readouterr()
    assert cli.main(["evolve", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lightning-compress: error: ") and err.count("\n") == 1
    return err


def loaded(path: str) -> torch.nn.Module:
    return load_weights(lc.models.build("lenet5"), path)


def test_train_a_preset_writes_the_circuit_and_no_other_weights(capsys: pytest.CaptureFixture[str]) -> None:
    out = done(
        capsys, "train", "le_selector", *NET, "--rows", "64", "--generations", "30", "--output", "a.lcz"
    )
    assert "le_selector_t0" in out and "paid: circuit" in out and "bytes as int8" in out
    before, after = loaded("int8.lcz"), loaded("a.lcz")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert [name for name, _, _, code in codes.of(after) if code.kind == "circuit"] == [
        "conv1.weight",
        "conv2.weight",
    ]
    assert done(capsys, "break-even", "a.lcz").count("paid: circuit") == 2


def test_train_gives_what_evolve_gives(capsys: pytest.CaptureFixture[str]) -> None:
    done(
        capsys,
        *(
            "train",
            "layer_bypass",
            *NET,
            *SMALL,
            "--error-threshold",
            "30",
            "--seed",
            "3",
            "--output",
            "b.lcz",
        ),
    )
    settings = Settings(rows=16, cols=12, generations=40, seed=3)
    [experiment] = presets.layer_bypass(loaded("int8.lcz"), thresholds=[30], settings=settings)
    best = evolve(experiment.problem, experiment.settings).best
    wanted = experiment.problem.decode(experiment.problem.outputs(best.circuit))[0]
    assert np.array_equal(read_int8(loaded("b.lcz").conv2, "weight")[0].reshape(-1), wanted)
    scope: dict[str, Any] = {}
    exec(done(capsys, "export", "python", "b.lcz", "--layer", "conv2"), scope)
    code = codes.read(loaded("b.lcz").conv2, "weight")
    assert sorted(scope["circuit"](code.given.tolist())) == np.unique(wanted).tolist()


def test_train_from_inputs_uses_the_transform(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--include", "conv1", "--quantize", "per_tensor", "--runs", "2", *SMALL, "--output", "c.lcz")
    out = done(capsys, "train", "frequent:8", "--model", "lenet5", "--checkpoint", "float.pt", *argv)
    assert "EvolveWeights frequent:8" in out and "paid: inputs read, 8" in out
    after = loaded("c.lcz")
    assert codes.read(after.conv1, "weight").kind == "circuit"
    assert codes.read(after.conv2, "weight").kind == "affine"
    assert len(codes.read(after.conv2, "weight").scale) == 1


def test_train_says_when_a_threshold_is_not_met(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--rows", "2", "--cols", "2", "--generations", "5", "--seed-circuit", "random")
    out = done(capsys, "train", "le_selector", *NET, *small, "--output", "d.lcz", code=1)
    assert " no " in out and Path("d.lcz").exists()
    argv = ("train", "constants", *NET, "--include", "conv1", *small, "--output", "e.lcz")
    assert " no " in done(capsys, *argv, code=1)


def test_train_logs_every_run_for_tensorboard(capsys: pytest.CaptureFixture[str]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    argv = ("--runs", "2", "--log-dir", "logs", "--error-threshold", "20", "--output", "f.lcz")
    done(capsys, "train", "layer_bypass", *NET, *SMALL, *argv)
    found = events.EventAccumulator("logs")
    found.Reload()
    name = "layer_bypass_conv1_conv2_t20"
    assert {tag.split("/")[1] for tag in found.Tags()["scalars"]} == {"run_0", "run_1"}
    assert f"{name}/run_1/energy_pj" in found.Tags()["scalars"]


def test_a_campaign_from_plan_to_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (
        "--thresholds",
        "0",
        "20",
        "--runs",
        "4",
        "--batches",
        "2",
        "--offspring",
        "3",
        "--look-back",
        "9",
    )
    argv += ("--log-error", "all", "--functions", "1", "2", "7", "12", "22", "--statistics", "csv.zip")
    out = done(capsys, "campaign", "plan", "layer_bypass", *NET, *SMALL, *argv, "--experiment-dir", "runs")
    assert "layer_bypass_conv1_conv2_t20_batch_1" in out
    settings = read("runs/layer_bypass_conv1_conv2_t20_batch_0").settings
    assert (settings.offspring, settings.look_back, settings.rows, settings.error_threshold) == (3, 9, 16, 20)
    assert settings.functions == (1, 2, 7, 12, 22)
    assert Folder.open("runs/layer_bypass_conv1_conv2_t0_batch_0").config.log_error == "all"

    assert "lightning-compress evolve campaign run" in done(capsys, "campaign", "status", "runs")
    out = done(capsys, "campaign", "run", "runs/layer_bypass_conv1_conv2_t20_batch_0", "runs")
    assert "The rest" not in out
    assert all(place.chromosome(r).exists() for place in find("runs") for r in place.config.numbers)

    name = "layer_bypass_conv1_conv2_t20"
    assert done(capsys, "merge", "runs", name, "--mode", "lean", "--top", "2") == f"runs/{name}_lean\n"
    out = done(capsys, "campaign", "report", "runs", "--plot-dir", "figures")
    assert name in out
    names = {
        f"{n}.{kind}.png" for n in (name, "layer_bypass_conv1_conv2_t0") for kind in ("front", "history")
    }
    assert {file.name for file in Path("figures").iterdir()} == names

    out = done(
        capsys, "metrics", "runs", *NET, "--data", "digits.npz", "--batch-size", "7", "--split", "train"
    )
    measured = sorted(Path("runs").glob("*/model_metrics/mnist.train.*.csv"))
    assert len(measured) == 8 and f"{name}.3" in out

    out = done(capsys, "break-even", "runs", "--wiring", "indexed")
    assert out.count("paid: selection, indexed wiring") == 2
    run_1 = done(capsys, "export", "verilog", f"runs/{name}_batch_0", "--run", "1")
    circuit = Circuit.from_text(Path(f"runs/{name}_batch_0/cgp_configs/cgp.1.config").read_text())
    assert run_1 == to_verilog(circuit)


def test_best_run_of_a_folder_is_exported(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*NET, *SMALL, "--thresholds", "25", "--runs", "2", "--experiment-dir", "runs")
    done(capsys, "campaign", "plan", "layer_bypass", *argv)
    done(capsys, "campaign", "run", "runs", "--jobs", "2")
    [folder] = find("runs")
    last = {run: read_rows(folder.statistics(run))[-1] for run in range(2)}
    limit = 25**2 * 2400
    assert all(float(row["error"]) <= limit for row in last.values())
    best = min(last, key=lambda run: (int(last[run]["quantized_energy"]), int(last[run]["error"])))
    text = folder.chromosome(best).read_text().strip()
    assert done(capsys, "export", "python", "runs", "--name", "f") == to_python(Circuit.from_text(text), "f")


def test_presets_of_all_kinds_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "single_filter": ("--count", "2", "--layers", "conv2"),
        "single_channel": ("--channel", "0", "--core", "1"),
        "grid_size": ("--grids", "5x5", "8x4"),
        "mobilenet": ("--layers", "conv2", "--count", "50", "--thresholds", "1"),
        "all_layers": ("--multiplex", "false"),
        "worst_case": (),
        "reversed_single_filter": (),
        "single_filter_zero_outer": (),
    }
    for preset, own in options.items():
        done(capsys, "campaign", "plan", preset, *NET, *own, "--experiment-dir", preset)
    [mobile] = find("mobilenet")
    assert (mobile.experiment.settings.rows, mobile.config.runs) == (256, 20)
    assert mobile.experiment.problem.loaded == 50
    assert [f.experiment.settings.rows for f in find("grid_size")] == [5, 8]
    assert len(find("single_filter")) == 2
    assert find("all_layers")[0].experiment.problem.targets.shape[1] > 256


def test_scripts_are_printed_or_written(capsys: pytest.CaptureFixture[str]) -> None:
    done(capsys, "campaign", "plan", "worst_case", "--model", "lenet5", "--experiment-dir", "runs")
    job = ("--name", "night", "--time", "2:00:00", "--cpus", "4", "--memory", "8gb", "--scratch", "1gb")
    out = done(capsys, "campaign", "script", "runs", "--system", "pbs", *job)
    assert "#PBS -l select=1:ncpus=4:mem=8gb:scratch_local=1gb" in out
    assert "lightning-compress evolve campaign run" in out and "--jobs 4" in out
    Path("own").write_text("#!/bin/sh\n# {name} {time} {cpus} {mem}\n{command}\n")
    argv = ("--system", "slurm", "--template", "own", "--name", "own", "--output-dir", ".")
    assert done(capsys, "campaign", "script", "runs", *argv) == "own.sh\n"
    assert "# own 24:00:00 1 4G" in Path("own.sh").read_text()
    assert "own.sh exists" in refused(capsys, "campaign", "script", "runs", *argv)


def test_a_dask_cluster_runs_a_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    distributed = pytest.importorskip("distributed")
    argv = (*NET, *SMALL, "--thresholds", "25", "--runs", "2", "--experiment-dir", "runs")
    done(capsys, "campaign", "plan", "layer_bypass", *argv)
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        where = ("--executor", "dask", "--address", cluster.scheduler_address)
        out = done(capsys, "campaign", "run", "runs", *where)
    assert "The rest" not in out and find("runs")[0].chromosome(1).exists()


def test_exported_verilog_passes_its_test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*NET, *SMALL, "--include", "conv1", "--output", "g.lcz")
    done(capsys, "train", "layer:conv2", *argv)
    done(capsys, "export", "verilog", "g.lcz", "--output", "circuit.v")
    done(capsys, "export", "testbench", "g.lcz", "--output", "bench.v")
    if shutil.which("iverilog") is None:
        pytest.skip("needs Icarus Verilog")
    subprocess.run(["iverilog", "-o", "bench", "circuit.v", "bench.v"], check=True)
    assert "PASS" in subprocess.run(["vvp", "bench"], check=True, capture_output=True, text=True).stdout


def test_circuits_in_text_files_are_exported(capsys: pytest.CaptureFixture[str]) -> None:
    text = "{2,1,2,1,2,2,1}([2]0,1,1)([3]2,2,12)(3)"
    Path("sum.config").write_text(text + "\n")
    assert done(capsys, "export", "python", "sum.config") == to_python(Circuit.from_text(text))
    assert "circuit_test" in done(capsys, "export", "testbench", "sum.config")
    Path("bad.config").write_text("{2,1,2")
    assert "position 0" in refused(capsys, "export", "python", "bad.config")
    assert "circuit alone" in refused(capsys, "break-even", "sum.config")


def test_sensitivity_writes_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("sensitivity", *NET, "--data", "digits.npz", "--include", "conv1")
    out = done(capsys, *argv, "--errors", "-9", "9", "--kinds", "inner", "all")
    assert [line.split()[:3] for line in out.splitlines()[2:]] == [
        ["conv1.weight", kind, e] for kind in ("inner", "all") for e in ("-9", "9")
    ]
    assert done(capsys, *argv, "--step", "200", "--output", "s.csv") == "6 rows in s.csv\n"
    rows = Path("s.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows[1:]] == ["-128", "72"] * 3


def test_images_are_read_as_networks_take_them(files: Path) -> None:
    def options(**changed: object) -> object:
        values = {"dataset": "mnist", "split": "test", "data": "digits.npz", "download": False, "limit": None}
        values |= {"mean": None, "std": None, "batch_size": 8, "num_workers": 0}
        return Namespace(**values | changed)

    pack = np.load("digits.npz")
    x = torch.cat([batch[0] for batch in datasets.loader(options())])
    assert x.shape == (20, 1, 28, 28)
    torch.testing.assert_close(x[:, 0], (torch.from_numpy(pack["x_test"]).float() / 255 - 0.1307) / 0.3081)
    y = torch.cat([batch[1] for batch in datasets.loader(options(split="train", limit=5))])
    assert y.tolist() == pack["y_train"][:5].tolist()
    colour = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez("colour.npz", x_test=colour, y_test=np.arange(4))
    [[x, _]] = datasets.loader(options(data="colour.npz", dataset="cifar10", mean=[0.0], std=[1.0]))
    torch.testing.assert_close(x, torch.from_numpy(colour.transpose(0, 3, 1, 2)).float() / 255)


@pytest.mark.parametrize("name", ["mnist", "qmnist", "emnist", "cifar10"])
def test_data_sets_of_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = pytest.importorskip("torchvision.datasets")
    images = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    given: dict[str, object] = {}

    class Fake:
        def __init__(self, root: Path, **how: object) -> None:
            given.update(how, root=root)
            self.data = torch.from_numpy(images)
            self.targets = torch.tensor([[3, 0], [4, 0]]) if name == "qmnist" else torch.tensor([3, 4])
            if name == "cifar10":
                self.data, self.targets = np.stack([images] * 3, axis=-1), [3, 4]

    monkeypatch.setattr(vision, name.upper(), Fake)
    values = {"dataset": name, "split": "train", "data": ".", "download": False, "limit": None}
    values |= {"mean": [0.0], "std": [1 / 255], "batch_size": 8, "num_workers": 0}
    [[x, y]] = datasets.loader(Namespace(**values))
    assert y.tolist() == [3, 4] and given["train"] and not given["download"]
    wanted = images.transpose(0, 2, 1) if name == "emnist" else images
    np.testing.assert_allclose(x[:, 0].numpy(), wanted, rtol=1e-5)
    assert x.shape[1] == (3 if name == "cifar10" else 1)


def test_metrics_of_a_network_are_those_of_scores(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*NET, *SMALL, "--thresholds", "20", "--experiment-dir", "runs")
    done(capsys, "campaign", "plan", "layer_bypass", *argv)
    done(capsys, "campaign", "run", "runs")
    out = done(capsys, "metrics", "runs", *NET, "--data", "digits.npz")
    pack = np.load("digits.npz")
    x = (torch.from_numpy(pack["x_test"]).float()[:, None] / 255 - 0.1307) / 0.3081
    found = scores(loaded("int8.lcz"), [(x, torch.from_numpy(pack["y_test"]))])
    line = next(line for line in out.splitlines() if line.startswith("int8"))
    assert [float(v) for v in line.split()[-3:]] == [
        pytest.approx(value, rel=1e-3) for value in (100 * found.top1, 100 * found.top5, found.loss)
    ]


REFUSED = {
    ("train", "nothing", *NET, "--output", "x.lcz"): "no preset and no choice of inputs",
    ("train", "le_selector", "--model", "lenet5", "--checkpoint", "float.pt", "--output", "x.lcz"): (
        "quantize first .* or give --quantize per_tensor or per_channel"
    ),
    (
        "train",
        "le_selector",
        *NET,
        "--quantize",
        "per_tensor",
        "--output",
        "x.lcz",
    ): "has int8 weights already",
    ("train", "le_selector", *NET, "--quantize", "per_row", "--output", "x.lcz"): "allowed are per_tensor",
    ("train", "le_selector", *NET, "--output", "int8.lcz"): "int8.lcz exists",
    ("train", "le_selector", *NET, "--include", "conv1", "--output", "x.lcz"): "presets take --layers",
    ("train", "worst_case", *NET, "--output", "x.lcz"): "worst_case belongs to no layer",
    ("train", "constants", *NET, "--log-dir", "x", "--output", "x.lcz"): "--log_dir is for presets",
    ("train", "le_selector", *NET, "--core", "3", "--output", "x.lcz"): "does not take --core; .* --layers",
    ("train", "le_selector", *NET, "--mutation", "2", "--output", "x.lcz"): "mutation=2.0",
    ("train", "le_selector", *NET, "--functions", "add", "--output", "x.lcz"): "--functions add: allowed",
    ("train", "layer_bypass", *NET, "--inputs", "conv9", "--output", "x.lcz"): "'conv9' is unknown; .*conv1",
    ("campaign", "plan", "nothing", *NET, "--experiment-dir", "x"): "preset 'nothing' is unknown; there are",
    ("campaign", "plan", "grid_size", *NET, "--grids", "5", "--experiment-dir", "x"): "needed is ROWSxCOLS",
    (
        "campaign",
        "plan",
        "le_selector",
        *NET,
        "--runs",
        "3",
        "--batches",
        "2",
        "--experiment-dir",
        "x",
    ): "batches=2",
    (
        "campaign",
        "plan",
        "le_selector",
        *NET,
        "--log-error",
        "low",
        "--experiment-dir",
        "x",
    ): "--log_error low",
    ("campaign", "run", "missing"): "Plan first",
    ("campaign", "run", "missing", "--executor", "dask"): "dask with the address",
    ("campaign", "report", "missing"): "Plan first",
    ("campaign",): "campaign",
    ("merge", "missing", "x"): "Plan first",
    ("metrics", "missing", *NET, "--data", "digits.npz"): "Plan first",
    (
        "metrics",
        "missing",
        *NET,
        "--data",
        "digits.npz",
        "--dataset",
        "imagenet",
    ): "allowed are mnist, qmnist",
    ("metrics", "missing", *NET, "--data", "no.npz"): "no file and no folder",
    ("metrics", "missing", *NET, "--data", "int8.lcz"): "is no .npz file",
    ("metrics", "missing", *NET, "--data", "digits.npz", "--mean", "1", "2"): "2 means",
    ("sensitivity", *NET, "--data", "digits.npz", "--split", "dev"): "allowed are test, train",
    ("sensitivity", *NET, "--data", "digits.npz", "--step", "0"): "--step 0",
    ("export", "rust", "int8.lcz"): "allowed: python, verilog, testbench",
    ("export", "python", "int8.lcz"): "has no circuit; it has: none",
    ("export", "python", "missing.lcz"): "does not exist",
    ("break-even", "float.pt"): "float.pt is no text of a circuit",
    ("export", "python", "digits.npz"): "digits.npz is no text of a circuit",
    ("metrics", "missing", *NET, "--data", "float.pt"): "lacks x_test and y_test",
}


@pytest.mark.parametrize("argv", REFUSED, ids=lambda argv: " ".join(argv)[:60])
def test_what_cannot_be_used_is_refused(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, *argv)
    assert re.search(REFUSED[argv], error), error
    assert not Path("x.lcz").exists() and not Path("x").exists()
