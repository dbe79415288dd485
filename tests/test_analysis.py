"""The sweep: every number is measured on the file, failures are rows, and what was stopped goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import archive
from lightning_compress.analysis import Analysis, analyze, bit_error_curve, quick, sensitivity, write_report
from lightning_compress.analysis import techniques as techniques_module
from lightning_compress.analysis.bare import Chain, holder, stripped
from lightning_compress.analysis.combined import joined
from lightning_compress.analysis.inputs import gather, read
from lightning_compress.analysis.judge import Judge
from lightning_compress.analysis.outcome import marked
from lightning_compress.analysis.rows import Row
from lightning_compress.analysis.sweep import JOURNAL
from lightning_compress.analysis.techniques import GROUPS, Grid, catalogue, choose, seed_of
from lightning_compress.analysis.workshop import Workshop
from lightning_compress.metrics import output_error_rate, weight_error

X = torch.zeros(1, 12)
FEW = ["pruned_magnitude_0.5", "pruned_random_0.5", "quantized_weights_int8", "clustered_16"]
SMALL: dict[str, Any] = {"example_input": X, "samples": 100, "progress": False}


class Net(nn.Module):
    """12 features, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def seeded(kind: Any = Net) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return seeded()


@pytest.fixture(scope="module")
def whole(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """All techniques at few strengths."""
    return analyze(
        net,
        **SMALL,
        pruning_amounts=(0.3, 0.5),
        quantization_bits=(8,),
        log2_bits=(6,),
        minifloat_formats=("e4m3",),
        rate_distortion_bits=(3.0,),
        cluster_counts=(16,),
        rank_ratios=(0.5,),
        student_ratios=(0.25,),
        student_steps=5,
        output_dir=tmp_path_factory.mktemp("whole"),
    )


def without_times(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: without_times(v) for k, v in values.items() if k != "seconds"}
    return [without_times(v) for v in values] if isinstance(values, list) else values


# -- rows ------------------------------------------------------------------------------------------------------


def test_every_technique_is_a_row_and_works(whole: Analysis) -> None:
    names = [row.name for row in whole.rows]
    assert len(names) == len(set(names))
    assert {row.group for row in whole.rows} == {*GROUPS, "combined"}
    assert {row.name: row.reason for row in whole.rows if row.status != "ok"} == {}
    assert {"minimal_loss", "hardware", "maximum"} <= set(names)


def test_rows_are_what_their_files_give(whole: Analysis, net: nn.Module) -> None:
    """Size, error and weights, each by its own path from the file."""
    judge = whole.workshop.judge
    assert judge is not None
    x = torch.cat(list(judge.batches))
    for row in whole.rows:
        path = whole.workshop.path(row.name)
        assert path.stat().st_size == row.file_bytes == archive.inspect(path).file_bytes
        model = lc.load(path, into=seeded()).eval()
        with torch.no_grad():
            ours, theirs = net(x), model(x)
        share = float((ours.argmax(1) != theirs.argmax(1)).double().mean())
        assert row.ber == share and row.agreement == 1 - share and row.n_samples == 100
        assert row.ber_se == pytest.approx(math.sqrt(share * (1 - share) / 100))
        assert row.ber_low <= row.ber <= row.ber_high
        assert row.params == sum(p.numel() for p in model.parameters())
        assert row.dense_bytes == 4 * sum(p.numel() for p in net.parameters())
        assert row.macs == lc.cost(model, X).macs


def test_weight_columns(whole: Analysis, net: nn.Module) -> None:
    rows = {row.name: row for row in whole.rows}
    models = whole.models(["pruned_magnitude_0.5", "lowrank_0.5", "quantized_weights_int8"])
    pruned = models["pruned_magnitude_0.5"]
    weights = [w for n, w in pruned.named_parameters() if n.endswith("weight")]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert (
        rows["pruned_magnitude_0.5"].sparsity == pytest.approx(zeros / total) == pytest.approx(0.5, abs=0.01)
    )
    assert rows["pruned_magnitude_0.5"].nonzero == total - zeros
    error = weight_error(net, pruned)
    assert rows["pruned_magnitude_0.5"].weight_sqnr_db == error.sqnr_db
    merged = lc.compress(models["lowrank_0.5"], [lc.MergeFactors()]).model
    assert rows["lowrank_0.5"].weight_relative_error == weight_error(net, merged).relative > 0
    assert 8 <= rows["quantized_weights_int8"].bits_mean < 10
    assert rows["pruned_random_0.5"].coverage == pytest.approx(
        4 * total / rows["pruned_random_0.5"].dense_bytes, abs=1e-6
    )
    for name in ("pruned_structured_0.3", "student_25percent"):
        assert math.isnan(rows[name].weight_sqnr_db) and "other shapes" in rows[name].reason


def test_products_stand_beside_what_was_measured(whole: Analysis) -> None:
    rows = {row.name: row for row in whole.rows}
    promised = (
        rows["pruned_magnitude_0.3"].compression_ratio * rows["quantized_weights_int8"].compression_ratio
    )
    assert rows["minimal_loss"].product_of_ratios == pytest.approx(promised)
    assert rows["minimal_loss"].compression_ratio != pytest.approx(promised, rel=0.01)
    assert all(math.isnan(row.product_of_ratios) for row in whole.rows if row.group != "combined")
    assert all(row.product_of_ratios > 1 for row in whole.combined)
    values = whole.to_json()["rows"]
    assert [r["product_of_ratios"] for r in values] == [
        None if math.isnan(r.product_of_ratios) else r.product_of_ratios for r in whole.rows
    ]


def test_front_knee_and_best(whole: Analysis) -> None:
    rows = whole.rows
    front = [
        a
        for a in rows
        if not any(
            b.compression_ratio >= a.compression_ratio
            and b.ber <= a.ber
            and (b.compression_ratio > a.compression_ratio or b.ber < a.ber)
            for b in rows
        )
    ]
    assert {row.name for row in whole.pareto} <= {row.name for row in front}
    assert {(r.file_bytes, r.ber) for r in whole.pareto} == {(r.file_bytes, r.ber) for r in front}
    fits = [row for row in rows if row.ber <= 0.1]
    best = whole.best(0.1)
    assert best is not None and best.file_bytes == min(row.file_bytes for row in fits)
    assert whole.best(-1.0) is None
    assert sum(row.knee for row in rows) == whole.has_knee
    assert whole.resolves(0.01) and not whole.resolves(0.009)


def test_rows_do_not_depend_on_each_other(whole: Analysis, net: nn.Module) -> None:
    alone = analyze(
        net, **SMALL, techniques=["pruned_random_0.5", "clustered"], cluster_counts=(16,), combine=False
    )
    rows = {row.name: row for row in whole.rows}
    for row in alone.rows:
        same = dataclasses.replace(rows[row.name], seconds=row.seconds, pareto=row.pareto, knee=row.knee)
        assert json.dumps(row.to_json()) == json.dumps(same.to_json())


def test_json_and_csv_hold_everything(whole: Analysis, tmp_path: Path) -> None:
    values = whole.to_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == values
    assert [Row.from_json(r).to_json() for r in values["rows"]] == values["rows"]
    whole.to_csv(tmp_path / "a.csv")
    assert len((tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()) == len(whole.rows) + 1
    assert values["pareto"] == [row.name for row in whole.pareto]
    assert set(values["best"]) == {"0.01", "0.05", "0.1", "0.2", "0.3"}


def test_the_model_and_the_global_random_state_are_left_alone() -> None:
    model = seeded().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    analyze(
        model,
        **SMALL,
        techniques=[*FEW, "pruned_wanda_0.5", "student"],
        student_ratios=(0.3,),
        student_steps=2,
    )
    assert torch.equal(torch.rand(2), wanted)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["lenet5", "fno"])
def test_other_architectures(kind: str) -> None:
    """Convolutions and spectral layers: every technique gives a file that gives the row's error back."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "fno":
            neuralop = pytest.importorskip("neuralop.models")
            model = neuralop.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=1)
            x = torch.zeros(1, 1, 8, 8)
        else:
            model, x = lc.models.build("lenet5"), torch.zeros(1, 1, 28, 28)
    wanted = ["pruned_structured_0.5", "quantized_static_int8", "lowrank_0.5", "quantized_e4m3", "student"]
    wanted += ["truncated_modes_0.5"] if kind == "fno" else []
    found = analyze(
        model,
        example_input=x,
        samples=30,
        techniques=wanted,
        student_ratios=(0.3,),
        train_students=False,
        progress=False,
        combine=False,
    )
    assert {row.name: row.reason for row in found.rows if row.status != "ok"} == {}
    assert found.about.task == ("regression" if kind == "fno" else "classification")
    judge = found.workshop.judge
    assert judge is not None
    for row in found.rows:
        again = lc.load(found.workshop.path(row.name), into=copy.deepcopy(model))
        assert judge(again).ber == row.ber and found.workshop.path(row.name).stat().st_size == row.file_bytes
    rows = {row.name: row for row in found.rows}
    assert rows["pruned_structured_0.5"].macs < 0.7 * found.about.macs
    assert rows["lowrank_0.5"].params < found.about.params and rows["lowrank_0.5"].weight_sqnr_db > 0


# -- errors of outputs -----------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 1), factor
        nn.init.ones_(self.linear.weight)
        nn.init.ones_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.linear(x)


def test_errors_of_known_models(net: nn.Module) -> None:
    """The identity has 0, swapped classes 1, and a regression scaled by 1.1 has 0.1."""
    batches = [torch.randn(50, 12), torch.randn(20, 12)]
    judge = Judge(net, batches, "classification")
    assert judge(net).ber == 0
    swapped = seeded()
    with torch.no_grad():
        swapped.head.weight.copy_(net.head.weight.roll(1, 0))  # type: ignore[union-attr,operator]
        swapped.head.bias.copy_(net.head.bias.roll(1, 0))  # type: ignore[union-attr,operator]
    assert judge(swapped).ber == 1 and judge(swapped).n_samples == 70
    judge = Judge(Scaled(1.0), [torch.rand(30, 4) + 1], "regression")
    assert judge(Scaled(1.1)).ber == pytest.approx(0.1, rel=1e-5)
    assert math.isnan(judge(Scaled(1.1)).agreement)
    assert "12 of 30" in (found := judge(_Broken())).reason and math.isnan(found.ber)
    assert judge(_Broken(), broken=True).ber == math.inf


class _Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sum(1, keepdim=True)
        y[:12] = torch.nan
        return y


def test_broken_outputs_of_a_classification_count_as_wrong(net: nn.Module) -> None:
    x = torch.randn(40, 12)

    class Partly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = net(x).clone()
            y[:10, 1] = torch.inf
            y[10:15] = torch.nan
            return y

    judge = Judge(net, [x], "classification")
    assert judge(Partly(), broken=True).ber == 15 / 40
    assert "not finite" in judge(Partly()).reason


def test_tokens_are_classified_along_the_last_axis() -> None:
    net = nn.Linear(8, 5)
    other = nn.Linear(8, 5)
    x = torch.randn(6, 7, 8)
    found = Judge(net, [x], "classification")(other)
    assert found.n_samples == 42
    assert found.ber == float((net(x).argmax(-1) != other(x).argmax(-1)).double().mean())
    conv = nn.Conv2d(3, 4, 1)
    assert Judge(conv, [torch.randn(2, 3, 5, 5)], "classification")(conv).n_samples == 50


# -- failures --------------------------------------------------------------------------------------------------


def _fails(*args: Any) -> Any:
    raise RuntimeError("made to fail")


def test_a_failing_technique_is_a_row(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = analyze(net, **SMALL, techniques=FEW, combine=False)
    monkeypatch.setattr("lightning_compress.sharing.ShareWeights.plan", _fails)
    found = analyze(net, **SMALL, techniques=FEW, combine=False)
    rows = {row.name: row for row in found.rows}
    assert rows["clustered_16"].status == "failed"
    assert rows["clustered_16"].reason == "RuntimeError: made to fail"
    assert rows["clustered_16"].file_bytes == 0 and math.isnan(rows["clustered_16"].ber)
    assert not found.workshop.path("clustered_16").exists()
    for row in fine.rows:
        if row.name != "clustered_16":
            assert (row.file_bytes, row.ber) == (rows[row.name].file_bytes, rows[row.name].ber)
    with pytest.raises(ValueError, match="clustered_16 has no model: it failed"):
        found.models("clustered_16")
    with pytest.raises(ValueError, match=r"no technique worked: clustered_16: RuntimeError: made to fail\."):
        analyze(net, **SMALL, techniques=["clustered_16"], combine=False)


def test_nothing_to_change_is_skipped_and_says_so(net: nn.Module) -> None:
    found = analyze(net, **SMALL, techniques=["truncated_modes", "clustered_16"], combine=False)
    assert {row.name: row.status for row in found.rows} == {
        "clustered_16": "ok",
        "truncated_modes_0.75": "skipped",
        "truncated_modes_0.5": "skipped",
    }
    assert all(row.reason for row in found.rows if row.status == "skipped")


def test_refused_removal_is_masked_with_the_reason(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise ValueError("cannot be traced")

    monkeypatch.setattr(lc.RemoveChannels, "plan", refuse)
    found = analyze(net, **SMALL, techniques="pruned_structured", pruning_amounts=(0.5,), combine=False)
    assert found.rows[0].status == "ok" and found.rows[0].reason.startswith(
        "masked, not removed: cannot be traced"
    )
    assert found.rows[0].sparsity > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"techniques": "prunning"}, "did you mean 'pruning'"),
        ({"minifloat_formats": ("e9m9",)}, "minifloat_formats: 'e9m9' is not possible"),
        ({"pruning_amounts": (1.0,)}, "pruning_amounts: 1.0 is not possible"),
        ({"student_ratios": (1.5,)}, "student_ratios: 1.5 is not possible"),
        ({"ber_thresholds": (1.5,)}, "ber_thresholds has 1.5"),
        ({"task": "ranking"}, "allowed: auto, classification, regression"),
        ({"samples": 0}, "samples=0"),
        ({"example_input": None}, "their shape is not guessed: give example_input="),
        (
            {"example_input": torch.zeros(1, 7)},
            r"Net does not run on example_input of shape \(1, 7\): .*Give example_input=",
        ),
    ],
)
def test_bad_options_are_refused_before_any_work(
    net: nn.Module, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workshop, "__call__", _fails)
    with pytest.raises(ValueError, match=message):
        analyze(net, **{**SMALL, **options})


def test_outputs_that_are_not_finite_and_bad_folders(net: nn.Module, tmp_path: Path) -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / 0

    with pytest.raises(ValueError, match=r"values that are not finite on example_input of shape \(1, 12\)"):
        analyze(Infinite(), **SMALL)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="output_dir="):
        analyze(net, **SMALL, output_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="give a model"):
        analyze()


# -- the same again --------------------------------------------------------------------------------------------


def test_same_seed_same_report(net: nn.Module) -> None:
    runs = [
        analyze(
            net,
            **SMALL,
            techniques=[*FEW, "quantized_static", "student"],
            student_ratios=(0.3,),
            student_steps=3,
        )
        for _ in range(2)
    ]
    values = [without_times(run.to_json()) for run in runs]
    assert json.dumps(values[0]) == json.dumps(values[1])
    assert all(
        runs[0].workshop.path(r.name).read_bytes() == runs[1].workshop.path(r.name).read_bytes()
        for r in runs[0].rows
    )
    other = analyze(net, **SMALL, techniques=FEW, combine=False, seed=1)
    assert other.rows[1].file_bytes != runs[0].rows[1].file_bytes  # random pruning


class Killed(BaseException):
    pass


def test_a_stopped_analysis_goes_on(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SMALL, "techniques": [*FEW, "quantized_e4m3"]}
    straight = analyze(net, **options, output_dir=tmp_path / "a")
    made: list[str] = []
    ordinary = Workshop.__call__

    def stops(self: Workshop, technique: Any) -> Row:
        if len(made) == 3:
            raise Killed
        made.append(technique.name)
        return ordinary(self, technique)

    monkeypatch.setattr(Workshop, "__call__", stops)
    with pytest.raises(Killed):
        analyze(net, **options, output_dir=tmp_path / "b")
    with (tmp_path / "b" / JOURNAL).open("a") as file:
        file.write('{"name": "half a li')  # as when the process dies while it writes
    again: list[str] = []

    def counts(self: Workshop, technique: Any) -> Row:
        again.append(technique.name)
        return ordinary(self, technique)

    monkeypatch.setattr(Workshop, "__call__", counts)
    resumed = analyze(net, **options, output_dir=tmp_path / "b")
    assert len(made) == 3 and not set(made) & set(again)
    assert {*made, *again} == {row.name for row in straight.rows}
    assert json.dumps(without_times(resumed.to_json())) == json.dumps(without_times(straight.to_json()))
    seconds = {row.name: row.seconds for row in resumed.rows}
    again.clear()
    (tmp_path / "b" / "compressed_models" / f"{made[0]}.lcz").unlink()
    third = analyze(net, **options, output_dir=tmp_path / "b")
    assert again == [made[0]]  # its file was gone
    assert all(row.seconds == seconds[row.name] for row in third.rows if row.name != made[0])


def test_a_folder_of_another_analysis_is_refused(net: nn.Module, tmp_path: Path) -> None:
    analyze(net, **SMALL, techniques=["clustered_16"], output_dir=tmp_path)
    with pytest.raises(ValueError, match="of an analysis with another inputs, seed"):
        analyze(net, **SMALL, techniques=["clustered_16"], output_dir=tmp_path, seed=1)
    wider = analyze(net, **SMALL, techniques=["clustered"], output_dir=tmp_path)
    assert [row.name for row in wider.rows] == ["clustered_16", "clustered_64", "clustered_256"]


class Elsewhere(Executor):
    """Works on pickled copies, as another process does."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        function, given = pickle.loads(pickle.dumps((fn, args)))
        done.set_result(pickle.loads(pickle.dumps(function(*given))))
        return done


def test_processes_give_the_same(net: nn.Module) -> None:
    options = {**SMALL, "techniques": [*FEW, "student"], "student_ratios": (0.3,), "student_steps": 2}
    far = analyze(net, **options, executor=Elsewhere())
    near = analyze(net, **options)
    assert json.dumps(without_times(far.to_json())) == json.dumps(without_times(near.to_json()))
    assert far.models(FEW[0])


# -- forms of input --------------------------------------------------------------------------------------------


def test_a_state_dict_alone(net: nn.Module, tmp_path: Path) -> None:
    torch.save(
        {"model_state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pth"
    )
    found = analyze(tmp_path / "w.pth", student_ratios=(0.25,), pruning_amounts=(0.5,), progress=False)
    assert all(
        math.isnan(row.ber) and "no architecture given: pass model=" in row.reason for row in found.rows
    )
    done = {row.name: row for row in found.rows if row.status == "ok"}
    assert {"pruned_magnitude_0.5", "quantized_weights_int4", "clustered_16", "lowrank_0.5"} <= set(done)
    assert all(math.isfinite(row.weight_sqnr_db) and row.file_bytes > 0 for row in done.values())
    assert {r.name for r in found.rows if r.status == "skipped"} >= {
        "pruned_structured_0.5",
        "student_25percent",
    }
    assert found.pareto == () and found.knee is None and found.about.task == ""
    full = analyze(tmp_path / "w.pth", model=seeded(), **SMALL, techniques=FEW, combine=False)
    assert all(0 <= row.ber <= 1 for row in full.rows)
    rows = {row.name: row for row in full.rows}
    for name in FEW:
        assert done[name].weight_sqnr_db == rows[name].weight_sqnr_db


def test_files_and_what_they_hold(net: nn.Module, tmp_path: Path) -> None:
    archive.save(net, tmp_path / "net.lcz")
    torch.save(net, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="a pickled model is not opened, because that would run code"):
        read(tmp_path / "pickled.pt")
    x = torch.randn(3, 12)
    for source in (tmp_path / "net.lcz", net.state_dict(), {"state_dict": dict(net.state_dict())}):
        filled = read(source, seeded())
        assert filled.runs and torch.equal(filled.model.eval()(x), net(x))
        bare = read(source)
        assert not bare.runs
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in bare.model.state_dict().items())
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="two models are given"):
        read(net, net)


def test_holder_keeps_every_kind_of_tensor() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv1d(4, 2, 3), nn.Embedding(5, 6))
    tensors = {
        **model.state_dict(),
        "scale": torch.ones(3),
        "deep.inside.weight": torch.ones(2, 3, dtype=torch.cfloat),
    }
    held = holder(tensors)
    assert {k: v.dtype for k, v in held.state_dict().items()} == {k: v.dtype for k, v in tensors.items()}
    assert archive.dense_bytes(held) == 4 * sum(
        t.numel() * (2 if t.is_complex() else 1) for t in tensors.values() if t.dtype != torch.int64
    )
    assert stripped({"module.a": torch.ones(1), "b": torch.ones(1)}).keys() == {"module.a", "b"}


def test_a_plain_chain_is_rebuilt() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(9, 2)
    assert torch.equal(Chain(mlp.state_dict(), "tanh")(x), mlp(x))
    found = analyze(
        mlp.state_dict(), rebuild="mlp:tanh", techniques=["quantized_weights"], samples=50, progress=False
    )
    assert found.about.model == "rebuilt MLP" and "rebuilt" in found.about.notes[0]
    assert found.about.task == "regression" and all(row.ber > 0 for row in found.rows)
    with pytest.raises(ValueError, match="unknown activation 'tan'"):
        read(mlp.state_dict(), rebuild="mlp:tan")
    with pytest.raises(ValueError, match="allowed is 'mlp:'"):
        read(mlp.state_dict(), rebuild="cnn")
    with pytest.raises(ValueError, match="0 returns 16 features and 2 takes 3"):
        read({"0.weight": torch.ones(16, 2), "2.weight": torch.ones(1, 3)}, rebuild="mlp:relu")
    with pytest.raises(ValueError, match="needs Linear layers alone, and scale"):
        read({"0.weight": torch.ones(16, 2), "scale": torch.ones(3)}, rebuild="mlp:relu")


def test_inputs_come_from_where_the_report_says(net: nn.Module) -> None:
    data = [(torch.randn(30, 12), torch.zeros(30)), (torch.randn(30, 12), torch.zeros(30))]
    given = gather(net, data=data, samples=45)
    assert given.count == 45 and given.words == "given data, 45 inputs" and given.example.shape == (1, 12)
    drawn = gather(net, X, samples=70)
    assert drawn.count == 70 and drawn.digest() == gather(net, X, samples=70).digest()
    assert drawn.digest() != gather(net, X, samples=70, seed=1).digest()
    looked_at = torch.cat([x for x, _ in drawn.calibration])
    judged = torch.cat(list(drawn.batches))
    assert not bool((judged[:, None] == looked_at[None]).all(-1).any())  # no input serves for both
    own = gather(net, input_sampler := None, sampler=lambda n, g: torch.rand(n, 12, generator=g), samples=5)
    assert input_sampler is None and own.count == 5 and float(torch.cat(list(own.batches)).min()) >= 0
    model = seeded()
    model.example_input_array = torch.ones(2, 12)
    assert gather(model, samples=3).example.shape == (1, 12)


# -- what is tried ---------------------------------------------------------------------------------------------


def test_the_catalogue_has_all_rows_of_the_table() -> None:
    names = list(catalogue(Grid()))
    for a in ("0.1", "0.3", "0.5", "0.7", "0.9"):
        for family in ("magnitude", "magnitude_global", "random", "structured", "wanda"):
            assert f"pruned_{family}_{a}" in names
    for b in (4, 6, 8):
        assert {f"quantized_static_int{b}", f"quantized_weights_int{b}", f"quantized_log2_{b}bit"} <= set(
            names
        )
    assert {
        "pruned_nm_2_4",
        "quantized_dynamic_int8",
        "quantized_e5m2",
        "clustered_64",
        "lowrank_0.25",
    } <= set(names)
    assert {"student_25percent", "student_10percent", "student_5percent"} <= set(names)
    assert len(names) == len(set(names)) and all(t.group in GROUPS for t in catalogue(Grid()).values())


def test_choosing_by_group_family_and_name() -> None:
    assert {t.group for t in choose("pruning", Grid()).values()} == {"pruning"}
    assert list(choose(["pruned_nm_2_4", "student"], Grid())) == [
        "pruned_nm_2_4",
        "student_25percent",
        "student_10percent",
        "student_5percent",
    ]
    assert choose("all", Grid()).keys() == catalogue(Grid()).keys()
    seeds = {seed_of(s, name) for s in range(3) for name in catalogue(Grid())}
    assert len(seeds) == 3 * len(catalogue(Grid()))
    assert techniques_module.STUDENT.format(100 * 0.1) == "student_10percent"


def test_bits_per_weight_count_for_those_that_are_left() -> None:
    every = catalogue(Grid())
    both = joined("both", [every["pruned_magnitude_0.9"], every["quantized_rate_distortion_3bit"]])
    assert both.transforms[1].bits == pytest.approx(0.3)  # type: ignore[attr-defined]
    assert every["quantized_rate_distortion_3bit"].transforms[0].bits == 3  # type: ignore[attr-defined]
    assert both.parameters == {
        "pruned_magnitude_0.9": {"amount": 0.9},
        "quantized_rate_distortion_3bit": {"bits": 3.0},
    }


def test_untrained_students_say_so(net: nn.Module) -> None:
    options = {**SMALL, "techniques": "student", "student_ratios": (0.3,), "combine": False}
    untrained = analyze(net, **options, train_students=False).rows[0]
    assert untrained.parameters["trained"] is False and "untrained" in untrained.reason
    trained = analyze(net, **options, student_steps=150)
    assert "trained" not in trained.rows[0].parameters and trained.rows[0].ber < untrained.ber
    params = sum(p.numel() for p in trained.models("student_30percent")["student_30percent"].parameters())
    assert params / sum(p.numel() for p in net.parameters()) == pytest.approx(0.3, rel=0.1)


# -- quick, real data, bit errors ------------------------------------------------------------------------------


def test_quick_tells_the_truth(net: nn.Module) -> None:
    found = quick(net, target_compression=3, **SMALL)
    assert found.target_met and found.row.compression_ratio >= 3 and found.row.ber <= 0.3
    assert found.row == found.rows[-1] and len(found.rows) <= 2
    x = torch.randn(20, 12)
    again = found.analysis.models(found.row.name)[found.row.name]
    assert torch.equal(found.model(x), again(x))
    hopeless = quick(
        net, target_compression=500, max_ber=0.1, student_ratios=(0.3,), student_steps=2, **SMALL
    )
    assert not hopeless.target_met
    within = [row for row in hopeless.rows if row.ber <= 0.1]
    assert hopeless.row.file_bytes == min(row.file_bytes for row in within)
    best = hopeless.find_best(0.9)
    assert best is not None and best.name == hopeless.row.name and "NOT met" in str(hopeless)
    with pytest.raises(ValueError, match="allowed are > 1"):
        quick(net, target_compression=1)
    with pytest.raises(ValueError, match="no architecture given"):
        quick(net.state_dict())


def test_refinement_uses_what_the_target_allows(net: nn.Module) -> None:
    found = quick(net, target_compression=2.5, **SMALL)
    first = next(row for row in found.rows if row.name == "quantized_weights_int8")
    if found.row.name == "refined":  # weaker than int8, and still small enough
        assert 2.5 <= found.row.compression_ratio < first.compression_ratio and found.row.ber < first.ber
    else:
        assert first.ber == 0 or found.row == first


def test_real_data(whole: Analysis, net: nn.Module) -> None:
    x, y = torch.randn(40, 12), torch.randint(3, (40,))
    found = whole.evaluate_with_data([(x[:25], y[:25]), (x[25:], y[25:])])
    with torch.no_grad():
        own = float((net(x).argmax(1) == y).double().mean())
    assert found.about.metric == own and found.about.metric_name == "accuracy"
    for row in found.rows[::5]:
        with torch.no_grad():
            theirs = float((whole.workshop.load(row.name)(x).argmax(1) == y).double().mean())
        assert (row.metric, row.metric_change) == (theirs, theirs - own)
    counted = whole.evaluate_with_data([(x, y)], metric=lambda model, loader: float(len(loader)))
    assert counted.about.metric == 1 and counted.rows[0].metric_change == 0
    with pytest.raises(ValueError, match="nothing is made up"):
        whole.evaluate_with_data(None)
    with pytest.raises(ValueError, match="without targets"):
        whole.evaluate_with_data([x])


def test_relative_l2_on_real_data() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.rand(30, 2)
    found = analyze(net, example_input=torch.zeros(1, 2), techniques=["quantized_weights_int4"], samples=50)
    y = torch.rand(30, 1) + 1
    with torch.no_grad():
        wanted = float(((net(x) - y).abs() / y.abs()).mean())
    assert found.evaluate_with_data([(x, y)]).about.metric == pytest.approx(wanted, rel=1e-5)


def test_bit_error_curves(whole: Analysis, net: nn.Module) -> None:
    names = ["original", "quantized_weights_int8", "quantized_e4m3"]
    curves = bit_error_curve(whole, (0.0, 1e-3, 0.05), names=names)
    rows = {row.name: row for row in whole.rows}
    assert list(curves) == names
    assert [curve[0][1] for curve in curves.values()] == [0.0, *(rows[name].ber for name in names[1:])]
    assert all(curve[0][1] <= curve[2][1] and 0 <= curve[2][1] <= 1 for curve in curves.values())
    assert (
        curves["original"][2][1] > curves["quantized_weights_int8"][2][1]
    )  # a float has bits that break all
    full = whole.with_bit_errors((1e-3,))
    assert {"original"} < set(full.bit_errors) and full.to_json()["bit_errors"]["original"][0][0] == 1e-3


def test_one_layer_at_a_time(net: nn.Module) -> None:
    found = sensitivity(net, levels=[3, 0.9], **SMALL)
    names = {name for name, _ in net.named_parameters() if name.endswith("weight")}
    assert {row.parameters["layer"] for row in found.rows} == names and len(found.rows) == 2 * len(names)
    for name, model in found.models([row.name for row in found.rows]).items():
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, net.state_dict()[k])}
        assert changed == {name.split()[0]}
    with pytest.raises(ValueError, match=r"levels has 1\.5"):
        sensitivity(net, levels=[1.5], **SMALL)


def test_reports_are_written(whole: Analysis, tmp_path: Path) -> None:
    files = write_report(whole, tmp_path / "report", models="pareto")
    assert {f.name for f in files} >= {
        "results.json",
        "compression_report.txt",
        *(f"{r.name}.lcz" for r in whole.pareto),
    }
    assert whole.report_text().startswith("Compression of Net") and "Net" in whole.ber_text()
    assert "knee" in whole.table() or not whole.has_knee


def test_marking_leaves_out_what_failed() -> None:
    rows = [
        Row("a", "pruning", file_bytes=10, dense_bytes=100, ber=0.1),
        Row("b", "pruning", file_bytes=5, dense_bytes=100, ber=0.0, status="failed"),
        Row("c", "pruning", file_bytes=5, dense_bytes=100),
    ]
    assert [row.pareto for row in marked(rows)] == [True, False, False]
    assert np.isnan(Row("d", "x").compression_ratio)
    assert output_error_rate(torch.eye(3), torch.eye(3)).item() == 0
