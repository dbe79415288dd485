"""Channels that go while training: optimizer, averages, checkpoints, resume, ranks and the copy at the end."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from killed import Resumable, equal, kill, saving
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from lit import Lit, loader, trainer
from torch import nn

import lightning_compress as lc

TESTS = Path(__file__).parent
DURING = {"ratio": 0.5, "remove_at": "during", "begin": 2, "end": 10, "unit": "step", "every": 4}


class Net(nn.Module):
    """Two convolutions with BatchNorm, and a residual connection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.c, self.fc = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1), nn.Linear(12, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.fc((x + self.c(torch.relu(self.b(x)))).mean((2, 3)))


class Image(Lit):
    """The same with images, an optimizer of choice, and a schedule of learning rates."""

    def __init__(self, optimizer: str = "Adam", **options):
        super().__init__(Net())
        self.kind, self.options = optimizer, options
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def configure_optimizers(self):
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=0.01, **self.options)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def images(n: int = 32):
    return loader(n, shape=(1, 6, 6))


def fit(folder, *callbacks, resume=False, **options):
    removal = lc.ScheduledRemoval(**{**DURING, "end": 30, **options})
    lit = Image()
    t = trainer(removal, saving(folder), *callbacks, max_epochs=3)
    t.fit(lit, Resumable(images(64)), ckpt_path=folder / "last.ckpt" if resume else None)
    return {
        "weights": dict(lit.state_dict()),
        "optimizer": t.optimizers[0].state_dict(),
        "left": removal._left,
        "gone": removal._gone,
    }


class Watch(pl.Callback):
    """After every batch: shapes agree, parameters are the optimizer's, and they move."""

    def __init__(self):
        self.widths, self.moved, self.losses = [], [], []
        self.last = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        owned = {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert owned == {id(p) for p in module.parameters()}
        for p, state in optimizer.state.items():
            assert all(v.shape == p.shape for v in state.values() if v.dim())
        self.widths.append((module.net.a.out_channels, module.net.b.out_channels))
        moving = [p for n, p in module.named_parameters() if n != "net.a.bias"]  # BatchNorm takes that off
        now = [p.detach().clone() for p in moving]
        if self.last is not None and [p.shape for p in now] == [p.shape for p in self.last]:
            self.moved.append(all(not torch.equal(x, y) for x, y in zip(now, self.last, strict=True)))
        self.last = now
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", {"momentum": 0.9}),
        ("Adam", {}),
        ("AdamW", {"amsgrad": True, "foreach": True}),
        ("RMSprop", {}),
    ],
)
def test_training_goes_on_with_fewer_channels(optimizer, options):
    lit, watch = Image(optimizer, **options), Watch()
    before = [id(p) for p in lit.parameters()]
    removal = lc.ScheduledRemoval(**DURING, schedule="linear")
    trainer(removal, watch, max_epochs=4).fit(lit, images())
    assert [id(p) for p in lit.parameters()] == before
    assert watch.widths[0] == (12, 8) and watch.widths[5] == (9, 6) and watch.widths[-1] == (6, 4)
    assert len(set(watch.widths)) == 3 and len(watch.moved) > 20 and all(watch.moved)
    assert sum(watch.losses[-8:]) < sum(watch.losses[:8])
    small = sum(p.numel() for p in lit.parameters())
    assert removal._left["params"] == pytest.approx(small / sum(p.numel() for p in Net().parameters()))
    assert lit.net(torch.ones(1, 1, 6, 6)).shape == (1, 3)


def test_momenta_are_those_of_the_channels_that_stay():
    class Compare(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):  # stands before the removal
            state = trainer.optimizers[0].state
            self.before = {
                n: (p.detach().clone(), state[p]["momentum_buffer"].clone())
                for n, p in module.named_parameters()
            }

    class Check(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            state = trainer.optimizers[0].state
            for name, p in module.named_parameters():
                weight, momentum = earlier.before[name]
                if p.shape == weight.shape:
                    continue
                self.seen = True
                old = {
                    row.numpy().tobytes(): m
                    for row, m in zip(weight.flatten(), momentum.flatten(), strict=True)
                }
                kept = zip(p.detach().flatten(), state[p]["momentum_buffer"].flatten(), strict=True)
                assert all(torch.equal(old[w.numpy().tobytes()], m) for w, m in kept)

    earlier, later = Compare(), Check()
    lit = Image("SGD", momentum=0.9)
    for p in lit.parameters():  # distinct entries name themselves
        nn.init.normal_(p)
    trainer(earlier, lc.ScheduledRemoval(**DURING), later).fit(lit, images())
    assert later.seen


@pytest.mark.parametrize("remove_at", ["during", "end"])
def test_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path, remove_at):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    end = fit(whole, remove_at=remove_at)
    assert kill("test_scheduled_removal", cut, step=20, remove_at=remove_at) == 18
    assert equal(end, fit(cut, resume=True, remove_at=remove_at))


@pytest.mark.parametrize("remove_at", ["during", "end"])
def test_a_fresh_module_tests_and_loads(tmp_path, remove_at):
    removal, lit = lc.ScheduledRemoval(**{**DURING, "remove_at": remove_at}), Image()
    t = trainer(removal, saving(tmp_path))
    t.fit(lit, images())
    t.save_checkpoint(tmp_path / "last.ckpt")
    trained = t.test(lit, images(), verbose=False)
    assert t.test(ckpt_path=tmp_path / "last.ckpt", dataloaders=images(), verbose=False) == trained
    fresh = Image()
    again = trainer(lc.ScheduledRemoval(**{**DURING, "remove_at": remove_at}))
    assert again.test(fresh, images(), ckpt_path=tmp_path / "last.ckpt", verbose=False) == trained
    assert equal(dict(fresh.state_dict()), dict(lit.state_dict()))
    lc.save(lit.net, tmp_path / "net.lcz")
    assert equal(dict(lc.load(tmp_path / "net.lcz", into=Net()).state_dict()), dict(lit.net.state_dict()))
    again.fit(fresh, images())  # a second fit
    assert equal(pickle.loads(pickle.dumps(removal)).state_dict(), copy.deepcopy(removal).state_dict())


def test_at_the_end_there_is_a_smaller_copy_that_gives_the_same():
    removal, lit = lc.ScheduledRemoval(**{**DURING, "remove_at": "end"}), Image()
    shapes = [p.shape for p in lit.parameters()]
    trainer(removal).fit(lit, images())
    assert [p.shape for p in lit.parameters()] == shapes
    small, x = removal.removed, torch.randn(4, 1, 6, 6)
    assert (small.net.a.out_channels, small.net.b.out_channels) == (6, 4)
    assert torch.allclose(small.eval()(x), lit.eval()(x), atol=1e-5)
    assert bool((lit.net.b.weight == 0).any())


def test_averages_lose_the_same_channels(tmp_path):
    average = EMAWeightAveraging(decay=0.5)
    lit = Image()
    t = trainer(average, lc.ScheduledRemoval(**DURING), saving(tmp_path))
    t.fit(lit, images(), val_dataloaders=images(8))
    assert (lit.net.a.out_channels, lit.net.b.out_channels) == (6, 4)
    fresh = Image()
    again = trainer(
        EMAWeightAveraging(decay=0.5), lc.ScheduledRemoval(**DURING), saving(tmp_path), max_epochs=3
    )
    again.fit(fresh, images(), ckpt_path=tmp_path / "last.ckpt")
    assert fresh.net.a.out_channels == 6


def test_a_budget_of_macs_is_reached_in_steps():
    removal, lit = lc.ScheduledRemoval(**{**DURING, "ratio": 0.5, "budget": ("macs", 0.4)}), Image()
    before = lc.cost(lit.net, torch.ones(2, 1, 6, 6)).macs
    trainer(removal).fit(lit, images())
    left = lc.cost(lit.net, torch.ones(2, 1, 6, 6)).macs / before
    assert 0.3 < left <= 0.4 and removal._left["macs"] == pytest.approx(left)


def test_only_a_part_of_the_module():
    lit = Image()
    lit.example_input_array = None
    trainer(lc.ScheduledRemoval(**DURING, attribute="net", exclude="a")).fit(lit, images())
    assert (lit.net.a.out_channels, lit.net.b.out_channels) == (12, 4)


def test_a_short_fit_says_what_is_missing():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

    with pytest.warns(UserWarning, match="before the removal ends at step 10"):
        trainer(lc.ScheduledRemoval(**DURING), Stop()).fit(Image(), images())


def test_what_cannot_work_is_refused():
    mask = lc.ScheduledPruning(sparsity=0.5, begin=0, end=2, unit="step")
    with pytest.raises(MisconfigurationException, match="remove_at='end'"):
        trainer(lc.ScheduledRemoval(**DURING), mask).fit(Image(), images())
    with pytest.raises(ValueError, match="latency"):
        lc.ScheduledRemoval(budget=("latency", 0.5))
    with pytest.raises(ValueError, match="during"):
        lc.ScheduledRemoval(remove_at="sometimes")
    with pytest.raises(ValueError, match="transform="):
        lc.ScheduledRemoval(lc.RemoveChannels(0.3), ratio=0.4)
    with pytest.raises(ValueError, match="share"):
        lc.ScheduledRemoval(ratio="silent")


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
import test_scheduled_removal as case
from lit import trainer
import lightning_compress as lc
lit = case.Image()
removal = lc.ScheduledRemoval(**case.DURING)
t = trainer(removal, devices=2, strategy="ddp", max_epochs=3)
t.fit(lit, case.images())
torch.save(dict(lit.state_dict()), f"{folder}/{{t.global_rank}}.pt")
"""


def test_two_ranks_agree(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(TESTS), folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=TESTS, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["net.a.weight"].shape[0] == 6
    assert all(torch.equal(first[k], second[k]) for k in first if "running" not in k)
