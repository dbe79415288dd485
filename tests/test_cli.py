"""The command line does what the library does, and refuses what it cannot use in one line."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import lightning_compress as lc
from lightning_compress import cli
from lightning_compress.checkpoints import load_weights
from lightning_compress.pipelines import compress_to
from lightning_compress.search import search
from lightning_compress.sharing import ShareWeights

NETWORK = """
import torch
from torch import nn

def build(width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 4)
    )

def by_position(target, stats):
    return torch.arange(float(target.weight.numel())).reshape(target.weight.shape)

def words():
    return "net"

def batches():
    return [torch.linspace(0, 1, 16 * 36).view(16, 1, 6, 6)]

def accuracy(model):
    return 1.0

number = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module in the working folder."""
    (tmp_path / "my_networks.py").write_text(NETWORK)
    (tmp_path / "broken.py").write_text("def build(")
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)


@pytest.fixture
def net() -> nn.Sequential:
    """A trained network: nothing in it has its default value."""
    model = network()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    model[1].num_batches_tracked.fill_(7)
    return model.eval()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(
        t.numpy().tobytes() == other[n].numpy().tobytes() for n, t in one.items()
    )


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a call that must end with exit code 2 and print nothing else."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-compress: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


class Lit(LightningModule):
    """A LightningModule around the network, with tensors beside it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(4))


def _torch_save(name: str, wrap: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[nn.Module], str]:
    def write(model: nn.Module) -> str:
        torch.save(wrap(model.state_dict()), name)
        return name

    return write


def _lightning(model: nn.Module) -> str:
    trainer = Trainer(max_epochs=0, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(Lit(model))
    trainer.save_checkpoint("last.ckpt", weights_only=True)
    return "last.ckpt"


def _safetensors(model: nn.Module) -> str:
    pytest.importorskip("safetensors.torch").save_file(model.state_dict(), "net.safetensors")
    return "net.safetensors"


def _archive(model: nn.Module) -> str:
    lc.save(model, "dense.lcz")
    return "dense.lcz"


WRITERS = {
    "state dict": _torch_save("net.pt", lambda state: state),
    "under state_dict": _torch_save("net.pth", lambda state: {"epoch": 3, "state_dict": state}),
    "under model": _torch_save("net.bin", lambda state: {"model": state, "optimizer": {}}),
    "data parallel": _torch_save("dp.pt", lambda state: {f"module.{k}": v for k, v in state.items()}),
    "Lightning": _lightning,
    "safetensors": _safetensors,
    "archive": _archive,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_prune_equals_the_library_from_every_kind_of_checkpoint(
    kind: str, net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = WRITERS[kind](net)
    argv = [
        "prune",
        "--model",
        "my_networks:build",
        "--checkpoint",
        checkpoint,
        "--sparsity",
        "0.8",
        "--output",
        "net.lcz",
    ]
    assert cli.main(argv) == 0
    expected = lc.compress(net, [lc.Prune(0.8)]).model
    assert same(lc.load("net.lcz", into=network()).eval(), expected)
    lc.save(expected, "expected.lcz")
    assert Path("net.lcz").read_bytes() == Path("expected.lcz").read_bytes()
    assert f"{Path('net.lcz').stat().st_size:,}" in capsys.readouterr().out


def test_prune_fuses_and_writes_a_plain_state_dict(net: nn.Module) -> None:
    torch.save(net.state_dict(), "net.pt")
    argv = "prune --model my_networks:build --checkpoint net.pt --sparsity 0.5 --fuse --example-shape 1 1 6 6"
    assert cli.main([*argv.split(), "--output", "net.lcz", "--state-dict", "small.pt"]) == 0
    x = torch.randn(3, 1, 6, 6)
    restored = lc.load("net.lcz", into=network()).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in restored.modules())
    torch.testing.assert_close(restored(x), lc.compress(net, [lc.Prune(0.5)]).model(x))
    plain = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).eval()
    plain.load_state_dict(torch.load("small.pt", weights_only=True))
    assert torch.equal(plain(x), restored(x))


def test_prune_options_are_those_of_the_transform(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing given every option has the transform's default; what is given arrives with its type."""
    seen = []

    def compress(model: nn.Module, steps: list[lc.Transform], **kwargs: object) -> object:
        seen.extend(steps)
        return lc.compress(model, [lc.Prune(0.5)])

    monkeypatch.setattr(cli.methods, "compress", compress)
    argv = ["prune", "--model", "my_networks:build", "--output", "net.lcz", "--force"]
    assert cli.main(argv) == 0
    assert seen.pop().config() == lc.Prune().config()
    options = (
        "--sparsity 0.7 --criterion random --seed 3 --scope layer --max-layer-sparsity=0.9 --include 0 4*"
    )
    assert cli.main([*argv, *options.split(), "--exclude", "4.weight"]) == 0
    wanted = lc.Prune(
        0.7, "random", "layer", seed=3, max_layer_sparsity=0.9, include=["0", "4*"], exclude=["4.weight"]
    )
    assert seen.pop().config() == wanted.config()
    assert (
        cli.main([*argv, "--sparsity", '{"0": 0.1, "*": 0.6}', "--criterion", "my_networks:by_position"]) == 0
    )
    step = seen.pop()
    assert step.sparsity == {"0": 0.1, "*": 0.6} and step.criterion == "my_networks:by_position"


def test_inspect_prints_what_the_library_says(net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    info = lc.save(lc.compress(net, [lc.Prune(0.5)]).model, "net.lcz")
    assert cli.main(["inspect", "net.lcz"]) == 0
    assert capsys.readouterr().out == f"{info}\n"


def test_inspect_prints_sizes_and_one_tensor(net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    info = lc.save(net, "net.lcz")
    assert cli.main(["inspect", "net.lcz", "--sizes"]) == 0
    assert capsys.readouterr().out == f"{info.size_report}\n"
    assert cli.main(["inspect", "net.lcz", "--tensor", "0.weight"]) == 0
    weight = net.state_dict()["0.weight"]
    assert capsys.readouterr().out == f"0.weight: float32 {tuple(weight.shape)}\n{weight}\n"
    assert cli.main(["inspect", "net.lcz", "--tensor", "0.wieght"]) == 2
    assert "nearest names: 0.weight" in capsys.readouterr().err


def test_model_arguments_reach_the_callable(net: nn.Module) -> None:
    argv = ["prune", "--model", "my_networks:build", "--output", "net.lcz", "--model_args.width", "3"]
    assert cli.main(argv) == 0
    assert {t.name: t.shape for t in lc.inspect("net.lcz").tensors}["0.weight"] == (3, 1, 3, 3)


def test_a_network_without_checkpoint_is_built_with_a_fixed_seed() -> None:
    """And the process's random state is as before."""
    state = torch.get_rng_state()
    for name in ("a.lcz", "b.lcz"):
        assert cli.main(["prune", "--model", "my_networks:build", "--output", name]) == 0
    assert Path("a.lcz").read_bytes() == Path("b.lcz").read_bytes()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_working_folder_leaves_the_import_path() -> None:
    before = list(sys.path)
    assert cli.main(["prune", "--model", "my_networks:build", "--output", "a.lcz"]) == 0
    assert sys.path == before


# -- quantize ------------------------------------------------------------------------------------------------

LENET = "quantize --model lenet5 --checkpoint lenet5.pt --output net.lcz"


@pytest.fixture
def lenet() -> nn.Module:
    """LeNet-5 with weights in lenet5.pt, and MNIST-like inputs in images.npy."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = lc.models.build("lenet5").eval()
    torch.save(model.state_dict(), "lenet5.pt")
    np.save("images.npy", np.random.default_rng(0).random((40, 1, 28, 28)).astype(np.float32))
    return model


# command line -> the same in Python, and the most values that one output row of a weight may have
QUANTIZED = {
    "--bits 4": (lc.Quantize(4), 15),
    "--bits 8 --activation-bits 8 --data images.npy": (lc.Quantize(8, 8), 255),
    "--bits 8 --activation-bits 8 --mode dynamic": (lc.Quantize(8, 8, "dynamic"), 255),
    "--bits 3 --granularity per_group:16": (lc.Quantize(3, granularity=lc.PerGroup(16)), None),
    "--bits 5 --granularity per_tensor --symmetric false --calibrator minmax": (
        lc.Quantize(5, granularity="per_tensor", symmetric=False, calibrator="minmax"),
        31,
    ),
    "--format e4m3": (lc.Quantize(format="e4m3"), 253),  # 256 patterns less two NaN and one of two zeros
    "--format log2 --bits 3": (lc.Quantize(3, format="log2"), 7),
    "--bits auto --budget 4 --candidates 2 4 8": (
        lc.Quantize("auto", budget=4, candidates=(2, 4, 8)),
        255,
    ),
    '--bits {"fc*":2,"*":6} --edge-bits 8 --exclude fc2': (
        lc.Quantize({"fc*": 2, "*": 6}, edge_bits=8, exclude=["fc2"]),
        None,
    ),
    "--bits 4 --rounding compensated --bias-correction true --samples 32 --data images.npy": (
        lc.Quantize(4, rounding="compensated", bias_correction=True, samples=32),
        15,
    ),
}


@pytest.mark.parametrize("options", QUANTIZED)
def test_quantize_equals_the_library(
    options: str, lenet: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights and streams as from Python, and whoever reads them gets the same outputs."""
    transform, most = QUANTIZED[options]
    assert cli.main([*LENET.split(), *options.split()]) == 0
    out = capsys.readouterr().out
    images = torch.from_numpy(np.load("images.npy"))
    expected = lc.compress(lenet, [transform], data=images if "images" in options else None).model
    lc.save(expected, "expected.lcz")
    written = lc.inspect("net.lcz")
    assert written.tensors == lc.inspect("expected.lcz").tensors and written.stale == {}
    assert f"{Path('net.lcz').stat().st_size:,}" in out
    restored = lc.load("net.lcz", into=lc.models.build("lenet5")).eval()
    assert same(restored, expected) and torch.equal(restored(images), expected(images))
    assert not torch.equal(restored(images), lenet(images))
    if most is not None:
        assert all(len(t.weight[0].unique()) <= most for t in lc.find(restored))


def test_quantize_draws_inputs_where_it_needs_them(
    net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the statistics of BatchNorm, which folding takes away before; and says so."""
    torch.save(net.state_dict(), "net.pt")
    argv = (
        "quantize --model my_networks:build --checkpoint net.pt --output net.lcz --fuse --activation-bits 8"
    )
    argv += " --example-shape 1 1 6 6 --samples 8 --force --data"
    printed = {}
    for data in ("batchnorm", "normal", "grf", "my_networks:batches"):
        assert cli.main([*argv.split(), data]) == 0
        printed[data] = capsys.readouterr().out
    for data in ("batchnorm", "normal", "grf"):
        assert f"data: Quantize synthetic:{data} n=8 seed=0" in printed[data]
    assert "data: Quantize data n=8" in printed["my_networks:batches"]
    restored = lc.load("net.lcz", into=network()).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in restored.modules())
    assert restored[0].input_quantizer.bits == 8


def test_quantize_options_are_those_of_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing given every option has the transform's default."""
    seen = []

    def compress(model: nn.Module, steps: list[lc.Transform], **kwargs: object) -> object:
        seen.extend(steps)
        return lc.compress(model, [lc.Quantize()])

    monkeypatch.setattr(cli.methods, "compress", compress)
    assert cli.main(["quantize", "--model", "lenet5", "--output", "net.lcz"]) == 0
    [step] = seen
    given, default = step.config(), lc.Quantize().config()
    assert given.pop("granularity") == "per_channel" and default.pop("granularity")["type"] == "PerChannel"
    assert given == default


# -- share, run and search -----------------------------------------------------------------------------------


def test_share_equals_the_library(lenet: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    argv = (
        "share --model lenet5 --checkpoint lenet5.pt --clusters 8 --codebook-dtype float16 --output net.lcz"
    )
    assert cli.main([*argv.split(), "--sidecar"]) == 0
    expected = lc.compress(lenet, [ShareWeights(clusters=8, codebook_dtype="float16")]).model
    assert same(lc.load("net.lcz", into=lc.models.build("lenet5")).eval(), expected)
    size = Path("net.lcz").stat().st_size
    assert f"{size:,}" in capsys.readouterr().out
    assert json.loads(Path("net_metadata.json").read_text())["file_bytes"] == size


def test_share_options_are_those_of_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compress(model: nn.Module, steps: list[lc.Transform], **kwargs: object) -> object:
        seen.extend(steps)
        return lc.compress(model, [lc.Quantize()])

    monkeypatch.setattr(cli.methods, "compress", compress)
    assert cli.main(["share", "--model", "lenet5", "--output", "net.lcz"]) == 0
    assert seen.pop().config() == ShareWeights().config()


RECIPE = "transforms: [{Prune: {exclude: [fc3]}}, Quantize]\ntarget_ratio: 0.1\n"


def test_run_equals_the_library_and_its_exit_code_tells_the_truth(
    lenet: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("small.yaml").write_text(RECIPE)
    argv = [
        "run",
        "small.yaml",
        "--model",
        "lenet5",
        "--checkpoint",
        "lenet5.pt",
        "--output",
        "net.lcz",
        "--force",
    ]
    assert cli.main(argv) == 0
    expected = compress_to(lenet, [lc.Prune(exclude=("fc3",)), lc.Quantize()], target_ratio=0.1)
    assert same(lc.load("net.lcz", into=lc.models.build("lenet5")).eval(), expected.model)
    out = capsys.readouterr().out
    assert Path("net.lcz").stat().st_size == expected.reached["file_bytes"] and "target met" in out
    with pytest.warns(UserWarning, match="target_bytes=10 "):
        assert cli.main([*argv, "--target-bytes", "10"]) == 1
    assert "target NOT met" in capsys.readouterr().out


def test_run_measures_errors_and_accuracy(lenet: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text("transforms: [Quantize]\nmax_ber: 0.05\n")
    base = [
        "run",
        "small.yaml",
        "--model",
        "lenet5",
        "--checkpoint",
        "lenet5.pt",
        "--output",
        "net.lcz",
        "--force",
    ]
    assert cli.main([*base, "--data", "images.npy"]) == 0
    restored = lc.load("net.lcz", into=lc.models.build("lenet5")).eval()
    images = torch.from_numpy(np.load("images.npy"))
    changed = (restored(images).argmax(1) != lenet(images).argmax(1)).float().mean()
    assert changed <= 0.05 and "max_error" in capsys.readouterr().out
    options = ["--max-accuracy-drop", "0.5", "--evaluate", "my_networks:accuracy"]
    assert cli.main([*base, *options]) == 0
    assert "accuracy drop" in capsys.readouterr().out


SEARCH = """
space:
  "*": {bits: [2, 8]}
population: 4
generations: 2
target_ratio: 0.2
options: {Quantize: {calibrator: minmax}}
"""


def test_search_equals_the_library_and_goes_on_from_its_file(
    lenet: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    Path("space.yaml").write_text(SEARCH)
    argv = [
        "search",
        "space.yaml",
        "--model",
        "lenet5",
        "--checkpoint",
        "lenet5.pt",
        "--data",
        "images.npy",
        "--output",
        "net.lcz",
        "--force",
    ]
    more = ["--resume", "all.jsonl", "--front", "front.csv", "--plot", "front.png"]
    assert cli.main([*argv, *more]) == 0
    images = torch.from_numpy(np.load("images.npy"))
    options = {"Quantize": {"calibrator": "minmax"}}
    sizes = {"population": 4, "generations": 2, "target_ratio": 0.2}
    expected = search(lenet, {"*": {"bits": (2, 8)}}, data=images, options=options, **sizes)
    best = expected.best()
    assert best is not None
    restored = lc.load("net.lcz", into=lc.models.build("lenet5")).eval()
    assert same(restored, expected.model(best)) and expected.target_met
    assert Path("net.lcz").stat().st_size == best.values["size_fraction"] * expected.problem.dense_bytes
    assert len(Path("front.csv").read_text().splitlines()) == 1 + len(expected.rows)
    assert Path("front.png").stat().st_size > 1000 and len(Path("all.jsonl").read_text().splitlines()) == 10
    assert str(expected) in capsys.readouterr().out
    assert cli.main([*argv, *more, "--generations", "3", "--target-ratio", "0.01"]) == 1
    assert "target NOT met" in capsys.readouterr().out
    assert len(Path("all.jsonl").read_text().splitlines()) == 14


def test_run_and_search_refuse_in_one_line(lenet: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "a.yaml": ("transforms: [Prun]", "did you mean 'Prune'"),
        "b.yaml": ("transforms: [Prune]\ntarget_ration: 0.1", "did you mean 'target_ratio'"),
        "c.yaml": ("compression_types: [evolutionary]", "use lightning-compress search"),
        "d.yaml": ("transforms: [{Quantize: {bits: 4}}, {Prune: {sparsity: 0.5}}]", "Prune after Quantize"),
        "e.yaml": ("- 3", "a configuration is a mapping"),
        "f.yaml": ("transforms: [Prune]\nmax_ber: 0.1", "give data=, or example_input="),
    }
    for name, (content, message) in files.items():
        Path(name).write_text(content)
        assert message in refused(capsys, "run", name, "--model", "lenet5", "--output", "net.lcz")
    Path("g.yaml").write_text('space: {"*": {bits: [2, 4]}}\npopulatoin: 3')
    base = ("search", "g.yaml", "--model", "lenet5", "--output", "net.lcz")
    assert "did you mean 'population'" in refused(capsys, *base)
    Path("g.yaml").write_text('space: {"*": {bits: [2, 4]}}')
    assert "allowed endings" in refused(capsys, *base, "--front", "front.txt")
    assert "unknown backend" in refused(capsys, *base, "--backend", "luck")
    Path("front.csv").touch()
    assert "--force" in refused(capsys, *base, "--front", "front.csv")
    assert "missing.yaml" in refused(
        capsys, "run", "missing.yaml", "--model", "lenet5", "--output", "net.lcz"
    )
    assert not Path("net.lcz").exists()


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_export_writes_the_integers_of_an_archive(
    lenet: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    x = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    np.save("x.npy", x.numpy())
    small = lc.compress(lenet, [lc.Quantize(8, activation_bits=8)], data=x).model
    lc.save(small, "small.lcz")
    base = ["export", "--model", "lenet5", "--example-shape", "2", "1", "28", "28", "--output"]
    assert cli.main([*base, "net.onnx", "--checkpoint", "small.lcz", "--data", "x.npy"]) == 0
    printed = capsys.readouterr().out
    assert "samples compared         16" in printed and printed.count("int8  ") >= 5
    stored = [t for t in onnx.load("net.onnx").graph.initializer if t.data_type == onnx.TensorProto.INT8]
    weights = {tuple(t.weight.shape) for t in lc.find(lenet)}
    assert weights <= {tuple(t.dims) for t in stored}
    assert "no weight is quantized" in refused(capsys, *base, "other.onnx")
    assert "--force" in refused(capsys, *base, "net.onnx", "--checkpoint", "small.lcz")
    assert not Path("other.onnx").exists()


def test_the_prefix_is_asked_for_when_two_networks_fit(
    net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {f"net.{k}": v for k, v in net.state_dict().items()} | {
        f"ema.{k}": 2 * v for k, v in net.state_dict().items()
    }
    torch.save(both, "both.pt")
    argv = [
        "prune",
        "--model",
        "my_networks:build",
        "--checkpoint",
        "both.pt",
        "--output",
        "net.lcz",
        "--sparsity",
        "0",
    ]
    line = refused(capsys, *argv)
    assert "ema." in line and "net." in line and "--prefix" in line
    assert cli.main([*argv, "--prefix", "net."]) == 0
    assert same(lc.load("net.lcz", into=network()), net)


def test_tensors_outside_the_prefix_are_left_out_and_inside_are_not(net: nn.Module) -> None:
    state = {f"net.{k}": v for k, v in net.state_dict().items()}
    torch.save(state | {"loss.weight": torch.ones(4)}, "outside.pt")
    assert same(load_weights(network(), "outside.pt"), net)
    torch.save(state | {"net.9.weight": torch.ones(4)}, "inside.pt")
    with pytest.raises(ValueError, match=r"9\.weight"):
        load_weights(network(), "inside.pt")


def test_batch_counters_may_be_absent_and_nothing_else(net: nn.Module) -> None:
    state = net.state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, "net.pt")
    loaded = load_weights(network(), "net.pt")
    assert torch.equal(loaded[1].running_var, net[1].running_var)
    torch.save({k: v for k, v in state.items() if "running_var" not in k}, "net.pt")
    with pytest.raises(ValueError, match=r"lacks 1 of 7 tensors \(1.running_var"):
        load_weights(network(), "net.pt")


def test_loading_never_runs_code_and_never_half_loads(
    net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (Path("exploded"),))

    torch.save({"state_dict": net.state_dict(), "more": Bomb()}, "bomb.pt")
    Path("bomb.pkl").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for name in ("bomb.pt", "bomb.pkl"):
        line = refused(
            capsys, "prune", "--model", "my_networks:build", "--checkpoint", name, "--output", "net.lcz"
        )
        assert name in line and "state dict" in line
    assert not Path("exploded").exists() and not Path("net.lcz").exists()
    torch.save(net.state_dict() | {"4.bias": torch.ones(5)}, "wrong.pt")
    model = network()
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"4\.bias has shape \(5,\), in the network \(4,\)"):
        load_weights(model, "wrong.pt")
    assert torch.equal(model[0].weight, before)


# -- refusals ------------------------------------------------------------------------------------------------

PRUNE = "prune --model my_networks:build --output net.lcz"
QUANTIZE = "quantize --model lenet5 --output net.lcz"
REFUSED = {
    "": "verb",
    "squash": "squash",
    "inspect": "path",
    "inspect missing.lcz": "missing.lcz",
    "inspect my_networks.py": "my_networks.py",
    "prune --model my_networks:build": "output",
    "prune --output net.lcz": "model",
    "prune --model resnet21 --output net.lcz": "resnet20",
    "prune --model no_such_module:build --output net.lcz": "no_such_module",
    "prune --model broken:build --output net.lcz": "broken",
    "prune --model my_networks:missing --output net.lcz": "missing",
    "prune --model my_networks:number --output net.lcz": "int",
    "prune --model my_networks:words --output net.lcz": "torch.nn.Module",
    "prune --model my_networks:build --output no_folder/net.lcz": "no_folder",
    f"{PRUNE} --model_args.depth 3": "depth",
    f"{PRUNE} --sparsity 1.5": "0 <= sparsity < 1",
    f"{PRUNE} --sparsity much": "much",
    f"{PRUNE} --scope everywhere": "global, layer, row",
    f"{PRUNE} --criterion best": "magnitude",
    f"{PRUNE} --include layer9.*": "layer9.*",
    f"{PRUNE} --wanted 3": "--wanted",
    f"{PRUNE} --state-dict net.lcz": "two names",
    f"{PRUNE} --checkpoint missing.pt": "missing.pt",
    f"{PRUNE} --checkpoint my_networks.py": "my_networks.py",
    f"{PRUNE} --example-shape 1 x": "x",
    f"{PRUNE} --example-shape 0 1 6 6": "0 1 6 6",
    f"{PRUNE} --example-shape 1 3 6 6": "1 3 6 6",
    "quantize --model lenet5": "output",
    f"{QUANTIZE} --bits 17": "1 <= bits <= 16",
    f"{QUANTIZE} --bits few": "few",
    f"{QUANTIZE} --bits auto": "budget",
    f"{QUANTIZE} --bits auto --budget 1.5": "allowed is >= 2",
    f"{QUANTIZE} --activation-bits 1": "2 <= activation_bits <= 16",
    f"{QUANTIZE} --activation-bits 8": "data=",
    f"{QUANTIZE} --format int4": "e4m3",
    f"{QUANTIZE} --granularity per_row": "per_group:SIZE",
    f"{QUANTIZE} --granularity per_group:1000": "allowed is 1 to 25",
    f"{QUANTIZE} --calibrator best": "percentile",
    f"{QUANTIZE} --rounding up": "nearest, compensated",
    f'{QUANTIZE} --bits {{"conv9":4}}': "conv9",
    f"{QUANTIZE} --data missing.npy": "missing.npy",
    f"{QUANTIZE} --data my_networks.py": "my_networks.py",
    f"{QUANTIZE} --activation-bits 8 --data wrong.npy": "expected input[2, 3, 5, 5] to have 1 channels",
    f"{QUANTIZE} --fuse": "no BatchNorm",
    "benchmark --model my_networks:build": "example_shape",
    "benchmark --model my_networks:build --example-shape 1 1 6 6 --baseline missing.pt": "missing.pt",
}


@pytest.mark.parametrize(("command", "named"), REFUSED.items())
def test_bad_input_is_one_line_that_names_it(
    command: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("wrong.npy", np.zeros((4, 3, 5, 5)))
    assert named in refused(capsys, *command.split())
    assert not Path("net.lcz").exists()


def test_files_are_replaced_only_with_force(net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("net.lcz", "net.pt", "report.json"):
        Path(name).write_text("precious")
    build = ["--model", "my_networks:build"]
    for argv, name in (
        (["prune", *build, "--output", "net.lcz"], "net.lcz"),
        (["prune", *build, "--output", "new.lcz", "--state-dict", "net.pt"], "net.pt"),
        (
            ["benchmark", *build, "--example-shape", "1", "1", "6", "6", "--output", "report.json"],
            "report.json",
        ),
    ):
        line = refused(capsys, *argv)
        assert name in line and "--force" in line
        assert Path(name).read_text() == "precious" and not Path("new.lcz").exists()
    assert cli.main(["prune", *build, "--output", "net.lcz", "--force"]) == 0
    assert lc.inspect("net.lcz").tensors


# -- benchmark, help and the process -------------------------------------------------------------------------


def test_help_lists_the_verbs_and_the_options_of_the_transform(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("prune", "quantize", "inspect", "benchmark"))
    assert cli.main(["prune", "--help"]) == 0
    out = capsys.readouterr().out
    assert "share of zeros in [0, 1)" in out and "--max_layer_sparsity" in out and "--include" in out
    assert cli.main(["quantize", "--help"]) == 0
    out = capsys.readouterr().out
    assert "per_group:SIZE" in out and "--activation_calibrator" in out and "batchnorm" in out


def test_benchmark_compares_with_the_baseline_and_writes_json(
    net: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(net.state_dict(), "net.pt")
    lc.save(lc.compress(net, [lc.Prune(0.5)]).model, "net.lcz")
    argv = (
        "benchmark --model my_networks:build --checkpoint net.lcz --baseline net.pt --example-shape 2 1 6 6"
    )
    assert cli.main([*argv.split(), "--output", "report.json"]) == 0
    report = json.loads(Path("report.json").read_text())
    out = capsys.readouterr().out
    assert report["params"] == report["baseline"]["params"] == sum(p.numel() for p in net.parameters())
    assert report["file_bytes"] == Path("net.lcz").stat().st_size < report["baseline"]["file_bytes"]
    assert report["setting"]["batch"] == 2 and report["latency_ms"] > 0 and "latency_ms" in out


def test_as_a_process(net: nn.Module) -> None:
    """The exit code reaches the shell, and stderr holds the one line and nothing of the libraries."""
    torch.save(net.state_dict(), "net.pt")
    argv = ["prune", "--model", "my_networks:build", "--checkpoint", "net.pt", "--output", "net.lcz"]
    assert cli.main(argv) == 0
    command = [sys.executable, "-m", "lightning_compress.cli", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    line = "lightning-compress: error: net.lcz exists: choose another name, or replace it with --force.\n"
    assert done.stderr == line
