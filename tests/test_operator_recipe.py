"""Every verb of the neural-operator recipe runs for a few steps, and what it writes is what it says."""

import gc
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.metrics import relative_l2_error
from lightning_compress.spectral import spectral_layers
from recipes import neural_operators as recipe

pytest.importorskip("neuralop.models")
pytest.importorskip("scipy.sparse.linalg")
LAYERS = {"fno": "2", "tfno": "1", "uno": "4", "codano": "1"}


@pytest.fixture(scope="module", autouse=True)
def _only_new_objects_are_searched_for_garbage() -> Iterator[None]:
    """Every timing collects garbage first, which takes longer than the timed passes if all of torch is searched."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack with 8 training pairs at 16 and 4 test pairs at 16 and 32: smooth fields, no flow."""
    generator, pack = np.random.default_rng(0), {}
    for part, size, count in (("train", 16, 8), ("test", 16, 4), ("test", 32, 4)):
        y = generator.normal(size=(count, size, size)).cumsum(1).cumsum(2) / size
        pack |= {f"x_{part}_{size}": y > y.mean(), f"y_{part}_{size}": y.astype(np.float32)}
    path = tmp_path_factory.mktemp("packs") / "fields.npz"
    np.savez(path, **pack)
    return path


@pytest.fixture(scope="module")
def trained(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an FNO of two layers that has seen two epochs."""
    out = tmp_path_factory.mktemp("trained")
    sizes = ["--width", "6", "--layers", "2", "--n-modes", "6", "6"]
    recipe.main(["train", *sizes, "--data", str(pack), "--epochs", "2", "--output-dir", str(out)])
    return out / "fno.pt"


def run(verb: str, *more: str, trained: Path, pack: Path) -> None:
    given = ["--checkpoint", str(trained), "--data", str(pack), "--output-dir", "out", "--batch-size", "4"]
    recipe.main([*verb.split(), *given, *more])


def restored(file: str) -> tuple[nn.Module, dict]:
    """An operator as somebody else would load it: from the archive and the JSON beside it."""
    known = json.loads(Path(file).with_suffix(".json").read_text())
    return lc.load(file, into=recipe.build(known["config"])).eval(), known


def error(net: nn.Module, known: dict, pack: Path, size: int) -> float:
    stored, every = (32, 4) if size == 8 else (size, 1)
    with np.load(pack) as fields, torch.no_grad():
        x, y = (fields[f"{k}_test_{stored}"][:, None, ::every, ::every].astype(np.float32) for k in "xy")
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        return relative_l2_error(net(x) * known["std"] + known["mean"], y, 2).item()


def levels(weight: torch.Tensor) -> int:
    """The most different real numbers in a slice, along the axis on which there are fewest: that of the scales."""
    slices = (torch.view_as_real(weight).unbind(axis) for axis in range(weight.dim()))
    return min(max(len(part.unique()) for part in parts) for parts in slices)


def zeros(net: nn.Module) -> tuple[int, int]:
    weights = [layer.weight.tensor for layer in spectral_layers(net).values()]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


# -- data ------------------------------------------------------------------------------------------------------


def options(*argv: str):
    return recipe.parser().parse_args(["evaluate", *argv])


def test_packs_are_read_and_subsampled(pack: Path, tmp_path: Path) -> None:
    fields = recipe.read(options("--data", str(pack)))
    assert fields.train[0].shape == (8, 1, 16, 16) and sorted(fields.test) == [16, 32]
    with np.load(pack) as stored:
        assert fields.mean == pytest.approx(stored["y_train_16"].mean(), rel=1e-5)
        assert fields.std == pytest.approx(stored["y_train_16"].std(ddof=1), rel=1e-5)
        assert np.array_equal(fields.test[32][1][:, 0], stored["y_test_32"])
    coarse = recipe.read(options("--data", str(pack), "--resolutions", "8", "--test-size", "3"))
    assert torch.equal(coarse.test[8][0], fields.test[32][0][:3, :, ::4, ::4])
    plain = {
        f"{v}_{p}": np.random.randn(2, 64, 64).astype(np.float16) for v in "xy" for p in ("train", "test")
    }
    np.savez(tmp_path / "flow.npz", **plain)
    flow = recipe.read(options("--data", str(tmp_path / "flow.npz")))
    assert sorted(flow.test) == [16, 32, 64] and flow.train[0].shape[-1] == 16
    assert np.array_equal(flow.test[32][0][:, 0].numpy(), plain["x_test"][:, ::2, ::2].astype(np.float32))
    with pytest.raises(SystemExit, match=r"no fields at resolution 24.*\[16, 32\]"):
        recipe.read(options("--data", str(pack), "--resolutions", "24"))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(SystemExit, match="holds no x_train"):
        recipe.read(options("--data", str(tmp_path / "other.npz")))
    with pytest.raises(SystemExit, match="no such file or folder"):
        recipe.read(options("--data", "nowhere.npz"))


def test_generated_flow_is_made_once_and_is_the_librarys() -> None:
    from lightning_compress.functional.darcy import darcy

    asked = options(
        "--root", "made", "--train-size", "3", "--test-size", "2", "--resolutions", "8", "16", "--seed", "4"
    )
    fields = recipe.read(asked)
    (file,) = Path("made").iterdir()
    written = file.stat().st_mtime_ns
    a, u = darcy(5, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(fields.train[0][:, 0], (a[:3, ::2, ::2] == 12).float())
    assert torch.equal(fields.test[16][1][:, 0], u[3:])
    recipe.read(asked)
    assert file.stat().st_mtime_ns == written


def test_neuraloperators_files_are_fetched_checked_and_read(monkeypatch, capsys) -> None:
    """As its own download leaves them; the network is replaced."""
    loader = importlib.import_module("neuralop.data.datasets.darcy")

    def fetch(record_id, root, files_to_download):
        for name in files_to_download:
            size = int(name.removesuffix(".tgz").rpartition("_")[2])
            for part, count in (("train", 6), ("test", 3)):
                x = torch.rand(count, size, size) > 0.5
                torch.save({"x": x, "y": x.float().cumsum(1)}, Path(root) / f"darcy_{part}_{size}.pt")

    monkeypatch.setattr(loader, "download_from_zenodo_record", fetch)
    recipe.main(["download", "--root", "fetched", "--resolutions", "16", "32", "--output-dir", "out"])
    assert "darcy_train_32.pt" in capsys.readouterr().out
    fields = recipe.read(options("--data", "fetched"))
    stored = torch.load("fetched/darcy_test_32.pt", weights_only=True)
    assert torch.equal(fields.test[32][1][:, 0], stored["y"]) and len(fields.train[0]) == 6
    torch.save({"x": stored["x"], "y": stored["y"][:, :5]}, "fetched/darcy_test_32.pt")
    with pytest.raises(SystemExit, match=r"darcy_test_32.pt holds x .* delete it"):
        recipe.main(["download", "--root", "fetched", "--resolutions", "16", "32", "--output-dir", "out"])

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(loader, "download_from_zenodo_record", offline)
    with pytest.raises(
        SystemExit, match=r"no route\)\. Without a network use --data FILE.* or --data generate"
    ):
        recipe.main(["download", "--root", "empty", "--output-dir", "out"])


# -- verbs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", list(LAYERS))
def test_every_model_trains_quietly_and_is_evaluated(model: str, pack: Path, capsys) -> None:
    argv = ["--data", str(pack), "--output-dir", "out", "--resolutions", "8", "16"]
    sizes = ["--width", "4", "--n-modes", "6", "6", "--layers", LAYERS[model], "--train-resolution", "16"]
    recipe.main(["train", "--model_type", model, *sizes, "--epochs", "1", "--batch_size", "4", *argv])
    printed = capsys.readouterr().out
    assert "conv_type" not in printed and "this model" in printed  # the constructors of two models print
    known = json.loads(Path(f"out/{model}.json").read_text())
    assert known["config"]["model"] == model
    recipe.main(["evaluate", "--checkpoint", f"out/{model}.pt", *argv])  # what it is stands beside it
    found = json.loads(Path(f"out/{model}_evaluated.json").read_text())["evaluation"]
    assert [row["name"] for row in found] == ["8", "16"]
    net = recipe.build(known["config"]).eval()
    net.load_state_dict(torch.load(f"out/{model}.pt", weights_only=True), strict=False)
    for row in found:
        expected = error(net, known, pack, int(row["name"]))
        assert row["errors"]["L2"] == pytest.approx(expected, rel=1e-4) and row["errors"]["H1"] > 0
    assert found[0]["errors"]["L2"] == pytest.approx(known["evaluation"][0]["errors"]["L2"], rel=1e-6)


def test_prune_writes_exact_zeros_before_and_after_fine_tuning(trained: Path, pack: Path, capsys) -> None:
    run("prune", "--sparsity", "0.5", "--finetune_epochs", "2", trained=trained, pack=pack)
    printed = capsys.readouterr().out
    for name in ("prune", "prune_finetuned"):
        net, known = restored(f"out/fno_{name}.lcz")
        gone, total = zeros(net)
        assert gone == int(0.5 * total + 0.5) and f"{name}: out/fno_{name}.lcz" in printed
        for row in known["evaluation"]:
            assert row["errors"]["L2"] == pytest.approx(error(net, known, pack, int(row["name"])), rel=1e-4)
            assert (
                row["file_bytes"] < row["baseline"]["file_bytes"] and row["macs"] == row["baseline"]["macs"]
            )
        others = [p for n, p in net.named_parameters() if not p.is_complex() and n.endswith("weight")]
        assert all(bool((p != 0).all()) for p in others)  # spectral weights only
    run("prune", "--include", "*", "--sparsity", "0.25", trained=trained, pack=pack)
    net, _ = restored("out/fno_prune.lcz")
    assert any(bool((p == 0).any()) for p in net.parameters() if not p.is_complex())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int16", "int8", "int4"])
def test_quantize_every_precision(precision: str, trained: Path, pack: Path) -> None:
    run("quantize", "--precision", precision, "--data-free", trained=trained, pack=pack)
    net, known = restored("out/fno_quantize.lcz")
    bits = {"fp16": 16, "bf16": 16, "fp32": 32}.get(precision) or int(precision[3:])
    row = known["evaluation"][0]
    assert row["errors"]["L2"] == pytest.approx(error(net, known, pack, 16), rel=1e-4)
    assert row["file_bytes"] <= row["baseline"]["file_bytes"] * min(1, bits / 32 + 0.25)
    quantized = any(hasattr(m, "input_quantizer") for m in net.modules())
    assert quantized == precision.startswith("int")


@pytest.mark.parametrize(("mode", "dynamic"), [("weight", None), ("dynamic", True), ("static", False)])
def test_modes_and_fine_tuning_of_quantization(
    mode: str, dynamic: bool | None, trained: Path, pack: Path
) -> None:
    tune = [] if mode == "dynamic" else ["--finetune-epochs", "1"]
    run("quantize", "--precision", "int4", "--mode", mode, *tune, trained=trained, pack=pack)
    for name in ("quantize", "quantize_finetuned")[: 2 if tune else 1]:
        net, known = restored(f"out/fno_{name}.lcz")
        quantizers = [m.input_quantizer for m in net.modules() if hasattr(m, "input_quantizer")]
        assert [q.dynamic for q in quantizers] == ([] if dynamic is None else [dynamic] * len(lc.find(net)))
        weight = spectral_layers(net)["fno_blocks.convs.0"].weight.tensor
        assert all(len(torch.view_as_real(w).unique()) <= 16 for w in weight.unbind(1))
        assert known["evaluation"][0]["errors"]["L2"] == pytest.approx(error(net, known, pack, 16), rel=1e-4)


def test_sweep_prints_a_row_for_each_strength_and_draws(trained: Path, pack: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    run("sweep prune", "--sparsity", "0.2", "0.8", trained=trained, pack=pack)
    printed = capsys.readouterr().out
    table = printed[printed.index("sparsity  L2 %") :].splitlines()
    rows = {line.split()[0]: line.split() for line in table[2:5]}
    assert list(rows) == ["original", "0.2", "0.8"]
    for strength in ("0.2", "0.8"):
        net, known = restored(f"out/fno_prune_{strength}.lcz")
        gone, total = zeros(net)
        assert gone == int(float(strength) * total + 0.5)
        assert float(rows[strength][1]) == pytest.approx(100 * error(net, known, pack, 16), rel=1e-3)
        assert int(rows[strength][5].replace(",", "")) == Path(f"out/fno_prune_{strength}.lcz").stat().st_size
    assert Path("out/sweep_prune.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("factorize", ["--rank_ratio", "0.5", "--no_activation_aware", "--scheme", "tucker"]),
        ("factorize", ["--budget", "params", "0.6", "--real-channel", "--damping", "0.1"]),
        ("truncate", ["--energy-ratio", "0.6", "--augment", "transpose"]),
        ("truncate", ["--keep-ratio", "0.5", "--partial-fourier"]),
        ("drop-layers", ["--unit", "spectral", "--names", "fno_blocks.convs.1"]),
        ("drop-layers", ["--ratio", "0.5"]),
    ],
)
def test_smaller_structures(verb: str, more: list[str], trained: Path, pack: Path) -> None:
    run(verb, *more, "--finetune-epochs", "1", trained=trained, pack=pack)
    stem = f"out/fno_{verb.replace('-', '_')}"
    for file in (f"{stem}.lcz", f"{stem}_finetuned.lcz"):
        net, known = restored(file)
        for row in known["evaluation"]:
            assert row["errors"]["L2"] == pytest.approx(error(net, known, pack, int(row["name"])), rel=1e-4)
            assert (
                row["params"] <= row["baseline"]["params"]
                and row["file_bytes"] < row["baseline"]["file_bytes"]
            )
    row = known["evaluation"][0]
    if (
        verb != "factorize" and "spectral" not in more
    ):  # half of the rank of a square contraction is as many products
        assert row["macs"] < row["baseline"]["macs"]


def test_low_rank_goes_by_outputs_unless_told_otherwise(trained: Path, pack: Path) -> None:
    """The recipe's factors against the transform's own, with the same inputs."""
    known = json.loads(trained.with_suffix(".json").read_text())
    original = recipe.build(known["config"]).eval()
    original.load_state_dict(torch.load(trained, weights_only=True), strict=False)
    with np.load(pack) as fields:
        x = torch.from_numpy(fields["x_train_16"][:, None].astype(np.float32))
    where = list(spectral_layers(original))
    for more, aware in (([], True), (["--no-activation-aware"], False)):
        run("factorize", "--params-ratio", "0.5", "--scheme", "channel_in", *more, trained=trained, pack=pack)
        net, _ = restored("out/fno_factorize.lcz")
        how = {"params_ratio": 0.5, "scheme": "channel_in", "activation_aware": aware, "damping": 1e-2}
        own = lc.compress(original, [lc.Factorize(**how, include=where)], data=x).model
        with torch.no_grad():
            assert torch.allclose(net(x), own(x), atol=1e-4)


def test_combine_is_low_rank_with_zeros_on_a_grid(trained: Path, pack: Path, capsys) -> None:
    asked = ["--params-ratio", "0.6", "--sparsity", "0.4", "--bits", "5", "--finetune-epochs", "4"]
    run("combine", *asked, trained=trained, pack=pack)
    printed = capsys.readouterr().out
    dense = recipe.build(json.loads(trained.with_suffix(".json").read_text())["config"])
    for name in ("combine", "combine_finetuned"):
        net, known = restored(f"out/fno_{name}.lcz")
        spectral = spectral_layers(net).values()
        weights = [p for layer in spectral for p in layer.parameters() if p.is_complex()]
        total = sum(w.numel() for w in weights)
        assert total <= 0.6 * sum(p.numel() for p in dense.parameters() if p.is_complex())
        assert len(weights) == 2 * len(spectral)  # two factors each
        # Rounding may add zeros to those of the mask.
        assert sum(int((w == 0).sum()) for w in weights) >= int(0.4 * total + 0.5)
        assert all(levels(w) <= 32 for w in weights)
        row = known["evaluation"][0]
        assert row["errors"]["L2"] == pytest.approx(error(net, known, pack, 16), rel=1e-4)
        ratio = 4 * lc.cost(dense).params / Path(f"out/fno_{name}.lcz").stat().st_size
        assert known["compression_ratio"] == pytest.approx(ratio) and f", {ratio:.2f} x smaller" in printed
    assert not list(Path("out").glob("*sweep*"))
    with pytest.raises(SystemExit):
        recipe.main(["sweep", "combine"])


def test_a_sweep_needs_strengths_of_one_kind(capsys) -> None:
    for argv in (["prune"], ["factorize", "--rank-ratio", "0.5", "--params-ratio", "0.5"]):
        with pytest.raises(SystemExit):
            recipe.main(["sweep", *argv])
    printed = capsys.readouterr().err
    assert "--sparsity is required" in printed and "not allowed with argument --rank-ratio" in printed


def test_transposed_fields_are_trained_on(pack: Path) -> None:
    """Half of the samples change x and y, inputs and outputs alike; without the option none does."""
    seen: list[torch.Tensor] = []

    class Looks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x

    for augment in ("none", "transpose"):
        asked = options("--data", str(pack), "--augment", augment)
        fields = recipe.read(asked)
        lit = recipe.LitOperator(Looks(), fields, asked)
        lit.log = lambda *args: None
        torch.manual_seed(0)
        x, _ = fields.train
        loss = lit.training_step((x, x), 0)
        again = seen[-1]
        swapped = [bool((a == b.mT).all()) for a, b in zip(again, x, strict=True)]
        same = [bool((a == b).all()) for a, b in zip(again, x, strict=True)]
        assert all(a or b for a, b in zip(swapped, same, strict=True))
        assert any(swapped) == (augment == "transpose") and any(same)
        # The target is transposed along: the loss of y = x is that of the untransposed fields.
        expected = recipe.relative_l2(x, (x - lit.mean) / lit.std)
        assert torch.isclose(loss, expected)


def test_full_rank_factors_are_merged_before_they_are_rounded() -> None:
    """CODANO holds Tucker weights of full rank: their product has fewer numbers. TFNO's are smaller than theirs."""
    sizes = {"width": 4, "n_modes": [4, 4], "layers": 1, "rank": 0.3}
    asked = recipe.parser().parse_args(["quantize"])
    for model, merges in (("codano", True), ("tfno", False)):
        net = recipe.build({"model": model, **sizes}).eval()
        small = lc.compress(net, recipe.quantize(asked, net), example_input=torch.rand(1, 1, 16, 16)).model
        cores = [name for name, _ in small.named_parameters() if name.endswith("core")]
        assert bool(cores) != merges
        before, after = (lc.cost(m).params for m in (net, small))
        assert after < before if merges else after == before


def test_weights_that_neuraloperator_factorized_are_factorized_anew(pack: Path) -> None:
    argv = ["--data", str(pack), "--output-dir", "out", "--resolutions", "16", "--epochs", "1"]
    sizes = ["--model", "tfno", "--width", "4", "--layers", "1", "--n-modes", "4", "4"]
    recipe.main(["factorize", *sizes, *argv, "--rank-ratio", "0.5", "--scheme", "channel"])
    net, known = restored("out/tfno_factorize.lcz")
    (row,) = known["evaluation"]
    assert row["errors"]["L2"] == pytest.approx(error(net, known, pack, 16), rel=1e-4)
    assert (
        row["baseline"]["params"] == lc.cost(recipe.build(known["config"])).params
    )  # of neuraloperator's factors
    assert row["params"] == lc.cost(net).params


def test_an_archive_is_a_checkpoint(trained: Path, pack: Path) -> None:
    run("prune", "--sparsity", "0.5", trained=trained, pack=pack)
    small = Path("out/fno_prune.lcz").resolve()
    run("evaluate", "--baseline", str(trained), trained=small, pack=pack)
    (row, _) = json.loads(Path("out/fno_evaluated.json").read_text())["evaluation"]
    (before, _) = json.loads(small.with_suffix(".json").read_text())["evaluation"]
    assert row["errors"] == pytest.approx(before["errors"])
    assert row["baseline"]["errors"] == pytest.approx(before["baseline"]["errors"])


def test_without_a_checkpoint_one_is_trained(pack: Path) -> None:
    sizes = ["--width", "4", "--layers", "1", "--n-modes", "4", "4", "--epochs", "1"]
    recipe.main(["quantize", *sizes, "--data", str(pack), "--output-dir", "out"])
    assert Path("out/fno.pt").is_file() and Path("out/fno_quantize.lcz").is_file()


def test_unknown_precision_is_named(capsys) -> None:
    with pytest.raises(SystemExit):
        recipe.main(["quantize", "--precision", "int1"])
    assert "fp32, fp16, bf16 and int2 to int16" in capsys.readouterr().err
