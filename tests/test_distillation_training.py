"""Distillation with what else a training has: pruning and quantization of the student, resume, two ranks, averages."""

import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from killed import Resumable, equal, kill, saving
from lit import Lit, loader, sparsity, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.distillation.module import Distillation

TESTS = Path(__file__).parent


def nets() -> tuple[nn.Module, nn.Module]:
    """A student and a teacher with BatchNorm and Dropout, always the same."""
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )
    teacher = nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, 3)
    )
    return student, teacher


def built(kind: str) -> Distillation:
    student, teacher = nets()
    options = {"features": {"1": "1"}, "schedule": "cosine", "example_input": torch.zeros(1, 8)}
    if kind == "lit":
        return Distillation(Lit(student), teacher, **options | {"features": {"net.1": "1"}})
    return Distillation(student, teacher, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **options)


def callbacks(method: str) -> list[pl.Callback]:
    if method == "prune":
        return [
            lc.ScheduledPruning(sparsity=0.75, begin=2, end=20, unit="step", every=2, include="student.*")
        ]
    if method == "quantize":
        return [lc.QuantizationAwareTraining(weight_bits=4, activation_bits=8, edge_layers_bits=None)]
    return []


class Still(pl.Callback):
    """No dropout: it draws from the global generator, which Lightning does not save."""

    def on_train_start(self, t, module):
        for m in module.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0


def fit(folder, *more, method="none", kind="plain", resume=False):
    module, chosen = built(kind), callbacks(method)
    before = {k: v.clone() for k, v in module.teacher.state_dict().items()}
    pl.seed_everything(5, verbose=False)
    t = trainer(*chosen, Still(), saving(folder), *more, max_epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.fit(module, Resumable(loader(64)), ckpt_path=folder / "last.ckpt" if resume else None)
    assert equal(dict(module.teacher.state_dict()), before) and not module.teacher.training
    return module, t


@pytest.mark.parametrize(("kind", "method"), [("lit", "prune"), ("plain", "quantize")])
def test_a_killed_fit_resumes_bit_for_bit(tmp_path, kind, method):
    """Acceptance 3."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    module, t = fit(whole, method=method, kind=kind)
    saved = kill("test_distillation_training", cut, step=22, method=method, kind=kind)
    assert saved == 21
    again, t2 = fit(cut, method=method, kind=kind, resume=True)
    assert equal(dict(module.state_dict()), dict(again.state_dict()))
    assert equal(t.optimizers[0].state_dict(), t2.optimizers[0].state_dict())
    assert t.global_step == t2.global_step == 48


@pytest.mark.parametrize("kind", ["plain", "lit"])
def test_pruning_holds_the_student_alone(tmp_path, kind):
    module, _ = fit(tmp_path, method="prune", kind=kind)
    assert sparsity(module, "student.") == pytest.approx(0.75, abs=0.01)
    assert sparsity(module.teacher) == 0 and (module.projections["0"].weight != 0).all()
    small = lc.finalize(module).student
    assert sparsity(small) == pytest.approx(0.75, abs=0.01)
    keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {k.partition(".")[0] for k in keys} == {"student", "projections"}


def test_without_patterns_projections_are_no_targets(tmp_path):
    module = built("plain")
    assert {target.key for target in lc.find(module)} == {"student.0.weight", "student.4.weight"}


@pytest.mark.parametrize("kind", ["plain", "lit"])
def test_quantization_of_the_student_alone(tmp_path, kind):
    module, _ = fit(tmp_path, method="quantize", kind=kind)
    plain = lc.finalize(module).student
    first = plain[0] if kind == "plain" else plain.net[0]
    assert all(len(row.unique()) <= 16 for row in first.weight)
    assert type(module.teacher[0]) is nn.Linear and len(module.teacher[0].weight[0].unique()) == 8
    for m in (module, module.teacher):
        assert all(type(p) is nn.Parameter for p in m.parameters())


@pytest.mark.parametrize(
    ("bits", "temperature", "loss", "warned"),
    [
        (3, 5.0, "kd", True),
        (3, 2.0, "kd", False),
        (4, 5.0, "kd", False),
        (2, 4.0, "dkd", True),
        (2, 4.0, "mse", False),
    ],
)
def test_soft_answers_for_a_student_of_few_bits_warn(bits, temperature, loss, warned):
    """Acceptance 9: the callback reads the module's temperature, which only losses of logits have."""
    student, teacher = nets()
    module = Distillation(student, teacher, loss, temperature=temperature)
    quantize = lc.QuantizationAwareTraining(
        weight_bits=bits, activation_bits=8, edge_layers_bits=None, method="lsq"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(quantize, max_epochs=2).fit(module, loader())
    found = [str(w.message) for w in caught if "temperature=" in str(w.message)]
    assert len(found) == warned
    if warned:
        assert f"temperature={temperature}" in found[0] and f"{bits}-bit" in found[0]


def test_accumulated_batches_are_one_large_batch():
    """Of a network without BatchNorm: half the batch twice, accumulated, is the batch."""
    weights = []
    for size, accumulate in ((4, 2), (8, 1)):
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, 3)) for w in (8, 16))
        module = Distillation(student, teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        trainer(accumulate_grad_batches=accumulate).fit(module, loader(batch=size))
        weights.append(torch.cat([p.flatten() for p in student.parameters()]))
    assert torch.allclose(*weights, atol=1e-6)


RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import lightning.pytorch as pl
import torch
from torch import nn
import lightning_compress as lc
from lightning_compress.distillation.module import Distillation
from lit import Lit, loader, trainer


class Rank(pl.Callback):
    def on_train_end(self, t, module):
        end = {{"weights": module.state_dict(), "teacher": module.teacher.state_dict()}}
        end["logged"] = {{k: v for k, v in t.callback_metrics.items() if "agreement" in k or "val" in k}}
        torch.save(end, folder / f"rank{{t.global_rank}}.pt")


class Split(torch.utils.data.Sampler):
    '''Rank r of n sees the r-th part of every global batch.'''

    def __init__(self, rank, size):
        part = range(rank * 8 // size, (rank + 1) * 8 // size)
        self.order = [start + i for start in range(0, 32, 8) for i in part]

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        sampler = Split(self.trainer.global_rank, self.trainer.world_size)
        return torch.utils.data.DataLoader(loader().dataset, batch_size=8 // self.trainer.world_size, sampler=sampler)

    val_dataloader = train_dataloader


class SGD(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


for kind in ("plain", "lit"):
    for devices in (2, 1):
        folder = Path({folder!r}, kind, str(devices))
        folder.mkdir(parents=True)
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, 3)) for w in (8, 16))
        layer, options = "0", {{"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}}
        if kind == "lit":
            student, layer, options = SGD(student), "net.0", {{}}
        module = Distillation(student, teacher, features={{layer: "0"}}, schedule="linear", **options)
        prune = lc.ScheduledPruning(sparsity=0.5, end=9, unit="step", every=2, include="student.*")
        options = {{"max_epochs": 3}}
        if devices == 2:
            options |= {{"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}}
        trainer(prune, Rank(), **options).fit(module, datamodule=Data())
"""


def test_two_ranks_train_what_one_process_trains(tmp_path):
    """The teacher is on each rank and the same; projections are averaged like the student."""
    (tmp_path / "run.py").write_text(RANKS.format(tests=str(TESTS), folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("plain", "lit"):
        a, b = (torch.load(tmp_path / kind / "2" / f"rank{r}.pt", weights_only=True) for r in (0, 1))
        one = torch.load(tmp_path / kind / "1" / "rank0.pt", weights_only=True)
        assert equal(dict(a["weights"]), dict(b["weights"])) and equal(
            dict(a["teacher"]), dict(one["teacher"])
        )
        assert "projections.0.weight" in a["weights"] and a["logged"].keys() == one["logged"].keys()
        for key, weight in one["weights"].items():
            assert torch.allclose(a["weights"][key], weight, atol=1e-6, rtol=0), key
        assert a["logged"]["compress/distill/agreement"] == pytest.approx(
            one["logged"]["compress/distill/agreement"].item()
        )
