"""ScheduledPruning in a Trainer: the schedule, what counts as a step, resume, and its errors.

The behaviours that users of other libraries asked for are in ``test_behaviours.py``.
"""

import copy
import csv
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, sparsity, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.functional.masks import count_pruned
from lightning_compress.schedules import Schedule, cubic

N = 8 * 16 + 16 * 3


class Probe(pl.Callback):
    """What is true after every training batch."""

    def __init__(self):
        self.sparsity, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.sparsity.append(sparsity(pl_module))
        self.weights.append(copy.deepcopy({k: v.clone() for k, v in pl_module.state_dict().items()}))


@pytest.mark.parametrize("shape", ["cubic", "linear", "cosine", "constant"])
def test_sparsity_follows_the_schedule_at_every_step_and_is_logged_so(tmp_path, shape):
    prune, probe = (
        lc.ScheduledPruning(sparsity=0.8, schedule=shape, begin=2, end=12, unit="step", every=1),
        Probe(),
    )
    log = CSVLogger(tmp_path)
    trainer(prune, probe, logger=log, log_every_n_steps=1).fit(Lit(), loader())
    schedule = Schedule(prune.shape, 2, 12, 0.0, 0.8)
    expected = [count_pruned(schedule(t), N) / N for t in range(1, 17)]
    assert probe.sparsity == pytest.approx(expected)
    lines = csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines())
    rows = [r for r in lines if r.get("compress/sparsity")]
    logged = {int(r["step"]): float(r["compress/sparsity"]) for r in rows}
    assert logged == pytest.approx({**dict(enumerate(expected)), 16: expected[-1]})
    asked = {int(r["step"]): float(r["compress/target_sparsity"]) for r in rows}
    assert asked == pytest.approx({**{t - 1: schedule(t) for t in range(1, 17)}, 16: 0.8})


def test_masks_move_only_when_due_and_at_the_end():
    prune, probe = lc.ScheduledPruning(sparsity=0.5, begin=3, end=13, unit="step", every=4), Probe()
    trainer(prune, probe).fit(Lit(), loader())
    schedule = Schedule(cubic, 3, 13, 0.0, 0.5)
    due = [0, 0, 3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 13, 13, 13, 13]
    assert probe.sparsity == pytest.approx([count_pruned(schedule(t), N) / N if t else 0 for t in due])


def test_the_target_is_trained_for_at_least_one_step():
    prune, probe = lc.ScheduledPruning(sparsity=0.7, begin=0.0, end=1.0, every=100), Probe()
    trainer(prune, probe).fit(Lit(), loader())
    assert prune.span == (0, 15) and probe.sparsity[-2:] == pytest.approx([count_pruned(0.7, N) / N] * 2)
    last, before = probe.weights[-1]["net.0.weight"], probe.weights[-2]["net.0.weight"]
    assert not torch.equal(last, before)


def test_zeros_stay_and_moments_and_gradients_of_masked_entries_are_zero():
    class Check(pl.Callback):
        seen = 0

        def on_train_batch_end(self, trainer, pl_module, *args):
            for target in lc.find(pl_module):
                gone = ~prune.masks[target.key]
                state = trainer.optimizers[0].state[target.weight]
                assert (
                    not target.weight[gone].any()
                    and not state["exp_avg"][gone].any()
                    and not state["exp_avg_sq"][gone].any()
                )
                Check.seen += int(gone.sum())

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            for target in lc.find(pl_module):
                if target.weight.grad is not None and prune.masks:
                    assert not target.weight.grad[~prune.masks[target.key]].any() or trainer.global_step in (
                        4,
                    )

    prune = lc.ScheduledPruning(sparsity=0.6, begin=4, end=4, unit="step")
    trainer(prune, Check()).fit(Lit(), loader())
    assert Check.seen == 13 * count_pruned(0.6, N)


def test_accumulated_batches_are_one_step():
    prune = lc.ScheduledPruning(sparsity=0.5, begin=1, end=3, unit="step", every=1)
    trainer(prune, accumulate_grad_batches=4).fit(Lit(), loader())
    assert prune.steps == 4 and prune.finished


def test_steps_skipped_by_amp_do_not_count():
    class Overflow(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.inf if batch_idx % 2 else 1.0)

    prune = lc.ScheduledPruning(sparsity=0.5, begin=1, end=3, unit="step", every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run = trainer(prune, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    run.fit(Overflow(), loader())
    assert run.global_step == 16 and prune.steps == 8


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_steps_that_fused_optimizers_skip_inside_do_not_count(kind):
    """PyTorch calls ``step`` of a fused optimizer for every step, hooks included, and it skips by itself."""

    class Fused(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.inf if batch_idx % 2 else 1.0)

        def configure_optimizers(self):
            return kind(self.parameters(), lr=0.01, fused=True)

    prune, probe = lc.ScheduledPruning(sparsity=0.5, begin=1, end=3, unit="step", every=1), Probe()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run = trainer(prune, probe, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    acted, after_step = [], prune.after_step
    prune.after_step = lambda *args: (acted.append(prune.steps), after_step(*args))
    run.fit(Fused(), loader())
    assert run.global_step == 16 and prune.steps == 8 and acted == list(range(8))
    assert probe.sparsity[6:] == [count_pruned(0.5, N) / N] * 10 and probe.sparsity[2] > 0
    for skipped in range(1, 16, 2):
        before, after = probe.weights[skipped - 1], probe.weights[skipped]
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("optimizer", ["lbfgs", "fused", "sgd-clip"])
def test_other_optimizers(optimizer):
    class Other(Lit):
        def configure_optimizers(self):
            return {
                "lbfgs": lambda: torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3),
                "fused": lambda: torch.optim.Adam(self.parameters(), fused=True),
                "sgd-clip": lambda: torch.optim.SGD(
                    self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2
                ),
            }[optimizer]()

    prune = lc.ScheduledPruning(sparsity=0.5, begin=1, end=5, unit="step", every=2)
    lit = Other()
    trainer(prune, gradient_clip_val=0.5 if optimizer == "sgd-clip" else None).fit(lit, loader())
    assert prune.steps == 16 and sparsity(lit) == count_pruned(0.5, N) / N


def test_steps_epochs_and_fractions_name_the_same_point():
    spans = set()
    for begin, end, unit in ((4, 12, "step"), (0.5, 1.5, "epoch"), (0.25, 0.75, "fraction")):
        prune = lc.ScheduledPruning(sparsity=0.5, begin=begin, end=end, unit=unit)
        trainer(prune).fit(Lit(), loader())
        spans.add(prune.span)
    assert spans == {(4, 12)}


def test_an_earlier_compression_is_carried_on():
    net = lc.compress(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), [lc.Prune(0.5)]).model
    gone = net[0].weight == 0
    probe = Probe()
    trainer(lc.ScheduledPruning(sparsity=0.6, begin=8, end=8, unit="step"), probe).fit(Lit(net), loader())
    assert probe.sparsity[0] == 0.5 and not net[0].weight[gone].any()
    assert sparsity(net) == count_pruned(0.6, N) / N
    assert all(code.matches(module.weight) for _, module, _, code in lc.codes.of(net))


class Crash(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def test_a_number_in_the_place_of_the_transform_is_explained() -> None:
    with pytest.raises(TypeError, match=r"ScheduledPruning\(0\.8\): .* give sparsity=0\.8"):
        lc.ScheduledPruning(0.8)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [3, 8, 14])
def test_resume_at_any_step_equals_the_uninterrupted_run(tmp_path, stop, accumulate):
    def run(*callbacks, ckpt=None):
        prune, lit = lc.ScheduledPruning(sparsity=0.8, begin=2, end=13, unit="step", every=3), Lit()
        t = trainer(prune, *callbacks, max_steps=16, max_epochs=-1, accumulate_grad_batches=accumulate)
        t.fit(
            lit, loader(4 * accumulate, 4), ckpt_path=ckpt
        )  # one step an epoch: checkpoints stand between epochs
        return lit, prune, t

    whole, masks, t0 = run()
    with pytest.raises(RuntimeError, match="power cut"):
        run(Crash(stop), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1))
    again, resumed, t1 = run(ckpt=tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert masks.masks.keys() == resumed.masks.keys() and masks.steps == resumed.steps == 16
    assert all(torch.equal(masks.masks[k], resumed.masks[k]) for k in masks.masks)
    a, b = t0.optimizers[0].state_dict()["state"], t1.optimizers[0].state_dict()["state"]
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


def test_two_named_instances_prune_their_own_layers_and_resume(tmp_path):
    def both():
        options = {"begin": 1, "end": 6, "unit": "step", "every": 2}
        return [
            lc.ScheduledPruning(sparsity=0.75, include="net.0", name="encoder", **options),
            lc.ScheduledPruning(sparsity=0.5, include="net.2", name="head", **options),
        ]

    def zeros(module):
        return {t.name: float((t.weight == 0).float().mean()) for t in lc.find(module)}

    log, whole, part, again = CSVLogger(tmp_path), Lit(), Lit(), Lit()
    trainer(*both(), lc.CompressionMonitor(), logger=log, log_every_n_steps=1).fit(whole, loader())
    assert zeros(whole) == {"net.0": 0.75, "net.2": 0.5}
    lines = list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))
    tags = ("compress/encoder/sparsity", "compress/head/sparsity", "compress/sparsity")
    ends = [next(float(r[tag]) for r in reversed(lines) if r[tag]) for tag in tags]
    assert ends == pytest.approx([0.75, 0.5, (96 + 24) / N])
    trainer(*both(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1).fit(part, loader())
    trainer(*both()).fit(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "0 <= sparsity < 1"),
        ({"start": 1.0}, "start=1.0"),
        ({"every": 0}, "every=0"),
        ({"begin": 0.8, "end": 0.2}, "ends .end=0.2. before it begins .begin=0.8.: set begin <= end"),
        ({"end": 1.5}, r"end=1.5 with unit='fraction'"),
        ({"schedule": "cube"}, "schedule='cube' is unknown"),
        ({"unit": "batch"}, "unit='batch' is unknown"),
        ({"transform": lc.Prune(0.5), "sparsity": 0.6}, "either transform= or its options"),
        ({"schedule": "math.cube"}, "schedule='math.cube' cannot be imported"),
        ({"name": "a/b"}, "slash"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lc.ScheduledPruning(**options)


def test_a_transform_beside_options_at_their_defaults_is_no_conflict():
    """As a configuration file gives them."""
    import dataclasses

    defaults = {f.name: getattr(lc.Prune(), f.name) for f in dataclasses.fields(lc.Prune)}
    callback = lc.ScheduledPruning(
        lc.Prune(0.7, criterion="lightning_compress.pruning.criteria.magnitude"), **defaults
    )
    assert callback.transform.sparsity == 0.7


def test_what_cannot_be_measured_in_training_is_refused_at_once():
    def by_gram(target, stats):
        return target.weight.detach().abs() * stats.gram.diagonal()

    by_gram.needs = ("gram",)
    with pytest.raises(
        MisconfigurationException, match=r"by_gram needs gram, .*measured are .*before the fit"
    ):
        lc.ScheduledPruning(criterion=by_gram)
    with pytest.raises(
        MisconfigurationException, match=r"fisher needs .*gradient.* says nothing of single ones"
    ):
        lc.ScheduledPruning(criterion="fisher")


def test_what_fits_nothing_is_an_error_before_training():
    with pytest.raises(ValueError, match=r"'nett\.0' fits no layer.*net\.0"):
        trainer(lc.ScheduledPruning(include="nett.0")).fit(Lit(), loader())

    class Frozen(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.dim() == 1], lr=0.1)

    with pytest.raises(
        MisconfigurationException,
        match=r"(?s)nothing to prune.*net\.0\.weight, net\.2\.weight: no optimizer updates it",
    ):
        trainer(lc.ScheduledPruning(sparsity=0.5)).fit(Frozen(), loader())


def test_frozen_parts_are_left_alone():
    class Student(Lit):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(8, 3).requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    lit = Student()
    trainer(lc.ScheduledPruning(sparsity=0.9, begin=0.0, end=0.1)).fit(lit, loader())
    assert sparsity(lit.teacher) == 0 and sparsity(lit.net) == count_pruned(0.9, N) / N


def test_an_endless_training_needs_steps():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 5

    with pytest.raises(ValueError, match="no known length, so give begin with unit='step'"):
        trainer(lc.ScheduledPruning(sparsity=0.5), max_epochs=-1).fit(Lit(), loader())
    lit = Lit()
    trainer(lc.ScheduledPruning(sparsity=0.5, begin=1, end=3, unit="step"), Stop(), max_epochs=-1).fit(
        lit, loader()
    )
    assert sparsity(lit) == 0.5


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer(lc.ScheduledPruning(sparsity=0.5), save).fit(Lit(), loader())
    with pytest.raises(MisconfigurationException, match=r"masks for \['net\.2\.weight'\]"):
        trainer(lc.ScheduledPruning(sparsity=0.5, exclude="net.2"), max_epochs=3).fit(
            Lit(), loader(), ckpt_path=tmp_path / "last.ckpt"
        )


def test_non_finite_weights_name_the_layer():
    lit = Lit()
    lit.net[2].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 of 48 scores of net\.2\.weight are not finite"):
        trainer(lc.ScheduledPruning(sparsity=0.5, begin=0.0, schedule="constant")).fit(lit, loader())


def test_sharded_strategies_are_refused_with_the_reason(monkeypatch):
    t = trainer(lc.ScheduledPruning(sparsity=0.5))
    monkeypatch.setattr(type(t.strategy), "restore_checkpoint_after_setup", property(lambda self: True))
    with pytest.raises(
        MisconfigurationException, match="cannot work under SingleDeviceStrategy, which shards"
    ):
        t.fit(Lit(), loader())


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}, {"max_epochs": 0}]
)
def test_short_and_bare_runs(options):
    lit = Lit()
    with pytest.warns() if options.get("barebones") else __import__("contextlib").nullcontext():
        settings = {"enable_checkpointing": False} if options.get("barebones") else {}
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
        }
        t = pl.Trainer(
            **{
                **quiet,
                **settings,
                "max_epochs": 1,
                **options,
                "callbacks": [lc.ScheduledPruning(sparsity=0.5)],
            }
        )
        t.fit(lit, loader(), loader())
    trained = t.global_step > 0
    assert sparsity(lit) == (0.5 if trained else 0.0)
