"""Scores of networks with computed weights, sensitivities, and histories in TensorBoard."""

import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

import lightning_compress as lc
from lightning_compress.cgp import Evolution, Settings, evolve, presets
from lightning_compress.cgp.campaign import COLUMNS, merge, plan, read_rows, run
from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.layers.integers import read_int8
from lightning_compress.cgp.metrics import SCORED, model_metrics, scores, write_metrics
from lightning_compress.cgp.search.logs import log_to
from lightning_compress.cgp.search.settings import MILLI, PICO
from lightning_compress.cgp.sensitivity import sensitivity, write_sensitivity
from lightning_compress.plots.circuits import circuit_front, evolution_history
from lightning_compress.quantization.quantize import Quantize

TINY = Settings(rows=16, cols=12, generations=60, patience=40)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return lc.compress(lc.models.build("lenet5"), [Quantize(8)]).model.eval()


@pytest.fixture(scope="module")
def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 1, 28, 28, generator=random), torch.randint(10, (30,), generator=random)
    return [(x[:16], y[:16]), (x[16:], y[16:])]


@pytest.fixture(scope="module")
def bypass(net: nn.Module) -> Experiment:
    return presets.layer_bypass(net, thresholds=[20], settings=TINY, runs=2)[0]


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_scores_are_those_of_torchmetrics(classes: int) -> None:
    random = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=random)
    labels = torch.randint(classes, (50,), generator=random)
    found = scores(nn.Identity(), [(logits[:31], labels[:31]), (logits[31:], labels[31:])])
    for value, k in ((found.top1, 1), (found.top5, min(5, classes))):
        wanted = multiclass_accuracy(logits, labels, num_classes=classes, top_k=k, average="micro")
        assert value == pytest.approx(float(wanted))
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)


def test_scores_leave_the_model_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)).train()
    batch = [(torch.ones(5, 4), torch.zeros(5))]
    assert scores(model, batch) == scores(model, batch)
    assert model.training and model[1].training


def test_scores_refuse_what_is_no_classifier() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) for 2 labels: needed are logits"):
        scores(nn.Identity(), [(torch.zeros(2, 3, 4), torch.zeros(2))])
    with pytest.raises(ValueError, match="no samples"):
        scores(nn.Identity(), [])


def test_metrics_are_those_of_weights_written_by_hand(
    net: nn.Module, images: list[tuple[torch.Tensor, torch.Tensor]], bypass: Experiment
) -> None:
    circuit = evolve(bypass.problem, bypass.settings).best.circuit
    weights = bypass.problem.decode(bypass.problem.outputs(circuit))[0]
    integers, base = read_int8(net.conv2, "weight")
    assert not np.array_equal(weights, integers.reshape(-1))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    scale = base.scale.view(-1, 1, 1, 1)
    state["conv2.weight"] = torch.from_numpy(weights.reshape(integers.shape)).float() * scale
    by_hand = lc.models.build("lenet5").eval()
    by_hand.load_state_dict(state)

    before = [p.detach().clone() for p in net.parameters()]
    [row] = model_metrics(net, bypass, [{"chromosome": circuit.to_text()}], images)
    wanted = scores(by_hand, images)
    assert (float(row["Top-1"]), float(row["Top-5"])) == (wanted.top1, wanted.top5)
    assert float(row["Loss"]) == wanted.loss != scores(net, images).loss
    assert all(map(torch.equal, before, net.parameters()))


def test_last_different_circuits_are_taken_in_order(
    net: nn.Module, images: list[tuple[torch.Tensor, torch.Tensor]], bypass: Experiment
) -> None:
    result = evolve(bypass.problem, bypass.settings)
    texts = list(dict.fromkeys(s.circuit.to_text() for s in result.front))[:3]
    assert len(texts) == 3
    a, b, c = texts
    rows = [{"generation": str(i), "chromosome": t} for i, t in enumerate([a, b, "", c, b, ""])]
    found = model_metrics(net, bypass, rows, images, top=2)
    assert [row["generation"] for row in found] == ["3", "4"]
    assert len(model_metrics(net, bypass, rows, images, top=9)) == 3


def test_perfect_circuits_change_no_score(
    net: nn.Module, images: list[tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    found = presets.le_selector(net, settings=dataclasses.replace(TINY, rows=40), runs=4)
    plan(found, tmp_path, batches=2)
    run(tmp_path)
    files = write_metrics(tmp_path, net, images, dataset="mnist", split="train", top=3)
    assert [file.name for file in files] == [f"mnist.train.le_selector_t0.{r}.csv" for r in range(4)]
    csv.field_size_limit(sys.maxsize)
    before = scores(net, images)
    for number, path in enumerate(files):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        assert reader.fieldnames == list(SCORED) == [*COLUMNS, "Top-1", "Top-5", "Loss", "Run ID"]
        assert 1 <= len(rows) <= 3
        folder = path.parent.parent
        recorded = read_rows(folder / "train_statistics" / "fitness" / f"statistics.{number}.csv")
        assert {name: rows[-1][name] for name in COLUMNS} == recorded[-1]
        for row in rows:
            assert row["error"] == "0" and row["Run ID"] == f"le_selector_t0.{number}"
            assert (float(row["Top-1"]), float(row["Loss"])) == (before.top1, before.loss)

    merge(tmp_path, "le_selector_t0", mode="lean")  # the same runs once more, with fewer rows
    assert write_metrics(tmp_path, net, images, dataset="mnist", split="train", top=3) == files


def test_metrics_refuse_another_network(
    net: nn.Module, images: list[tuple[torch.Tensor, torch.Tensor]], bypass: Experiment, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    other = lc.compress(lc.models.build("lenet5"), [Quantize(8)]).model
    with pytest.raises(ValueError, match=r"made from another network.* of its 2400 weights of conv2.weight"):
        model_metrics(other, bypass, [], images)
    with pytest.raises(ValueError, match="1 inputs, 1 outputs and 1 data sets is none of 'layer_bypass"):
        model_metrics(net, bypass, [{"chromosome": "{1,1,1,1,2,1,1}([1]0,0,1)(1)"}], images)
    with pytest.raises(ValueError, match="top=0"):
        model_metrics(net, bypass, [], images, top=0)
    plan([bypass], tmp_path)
    with pytest.raises(ValueError, match="no circuits to measure: run"):
        write_metrics(tmp_path, net, images, dataset="mnist")


def test_sensitivity_shifts_and_saturates(
    net: nn.Module, images: list[tuple[torch.Tensor, torch.Tensor]], tmp_path: Path
) -> None:
    before = [p.detach().clone() for p in net.parameters()]
    rows = sensitivity(net, images, errors=[-100, 0, 3], include=["conv2", "fc3"])
    assert [(r.layer, r.kind, r.e) for r in rows] == [
        *(("conv2.weight", kind, e) for kind in ("inner", "outer", "all") for e in (-100, 0, 3)),
        *(("fc3.weight", "all", e) for e in (-100, 0, 3)),
    ]
    assert all(map(torch.equal, before, net.parameters()))
    base = scores(net, images)
    assert {(r.top1, r.top5, r.loss) for r in rows if r.e == 0} == {(base.top1, base.top5, base.loss)}

    integers, code = read_int8(net.conv2, "weight")
    shifted = integers.astype(int)
    shifted[:, :, 1:4, 1:4] = np.maximum(shifted[:, :, 1:4, 1:4] - 100, -128)
    by_hand = lc.models.build("lenet5").eval()
    by_hand.load_state_dict(
        net.state_dict() | {"conv2.weight": torch.from_numpy(shifted).float() * code.scale.view(-1, 1, 1, 1)}
    )
    wanted = scores(by_hand, images)
    assert (rows[0].top1, rows[0].loss) == (wanted.top1, pytest.approx(wanted.loss, rel=1e-6))

    write_sensitivity(rows, tmp_path / "sensitivity.csv")
    lines = (tmp_path / "sensitivity.csv").read_text().splitlines()
    assert lines[0] == "layer,kind,e,Top-1,Top-5,loss" and len(lines) == 13
    assert lines[1] == f"conv2.weight,inner,-100,{rows[0].top1},{rows[0].top5},{rows[0].loss}"


def test_sensitivity_refuses(net: nn.Module, images: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="kinds of inner, outer, all"):
        sensitivity(net, images, kinds=["middle"])
    with pytest.raises(ValueError, match=r"errors \[300\]"):
        sensitivity(net, images, errors=[0, 300])
    with pytest.raises(ValueError, match="quantize first"):
        sensitivity(lc.models.build("lenet5"), images)


def test_history_is_read_back_from_tensorboard(bypass: Experiment, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        evolution = Evolution(bypass.problem, bypass.settings)
        result = evolution.run(log_to(writer, "cgp/conv1"))
    found = events.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    found.Reload()
    assert set(found.Tags()["scalars"]) == {
        *(f"cgp/conv1/{name}" for name in ("energy_pj", "delay", "depth", "gate_count")),
        *(f"cgp/conv1/error/phase_{row.phase}" for row in result.history),
    }
    energies = [(e.step, e.value) for e in found.Scalars("cgp/conv1/energy_pj")]
    assert energies == [(r.generation, pytest.approx(r.energy / PICO, rel=1e-6)) for r in result.history]
    delays = [e.value for e in found.Scalars("cgp/conv1/delay")]
    assert delays == pytest.approx([r.delay / MILLI for r in result.history])
    for phase in {row.phase for row in result.history}:
        errors = [(e.step, e.value) for e in found.Scalars(f"cgp/conv1/error/phase_{phase}")]
        assert errors == [(r.generation, r.error) for r in result.history if r.phase == phase]


def test_figures_show_what_was_found(bypass: Experiment) -> None:
    pytest.importorskip("matplotlib")
    result = evolve(bypass.problem, bypass.settings)
    upper, lower = evolution_history({"run 0": result.history})
    assert upper.lines[0].get_ydata().tolist() == [row.error for row in result.history]
    assert lower.lines[0].get_xdata().tolist() == [row.generation for row in result.history]
    many = evolution_history({f"run {i}": result.history for i in range(6)})[0]
    assert [text.get_text() for text in many.get_legend().get_texts()] == ["run 0, the best of 6"]
    points = [(float(s.error), s.cost.energy_pj, s.cost.gate_count) for s in result.front]
    ax = circuit_front(points)
    assert ax.collections[0].get_offsets().tolist() == [[e, p] for e, p, _ in points]
    assert ax.collections[0].get_array().tolist() == [g for *_, g in points]
    with pytest.raises(ValueError, match="no circuits"):
        circuit_front([])
    with pytest.raises(ValueError, match="no history to draw of 'b'"):
        evolution_history({"a": result.history, "b": []})
