"""ScheduledPruning(regrow=): masks that move at constant sparsity (RigL, SET), to the element, through resume."""

import math
from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from killed import Resumable, equal, kill, saving
from lightning.pytorch.plugins import MixedPrecision
from lit import Lit, loader, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.functional.masks import count_pruned
from lightning_compress.functional.regrowth import erdos_renyi, uniform

SIZES = {"net.0.weight": (16, 8), "net.2.weight": (3, 16)}
N = 8 * 16 + 16 * 3
OPTIONS = {"sparsity": 0.7, "end": 13, "unit": "step", "every": 3}


class SGD(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Probe(pl.Callback):
    """Stands before the pruning callback: what the gradients are before it masks them, what is true after the step."""

    def __init__(self, prune):
        self.prune, self.before, self.gradients, self.masks, self.weights = prune, [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append({t.key: t.weight.detach().clone().numpy() for t in lc.find(pl_module)})
        self.gradients.append({t.key: t.weight.grad.clone().numpy() for t in lc.find(pl_module)})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.masks.append({k: m.clone().numpy() for k, m in self.prune.masks.items()})
        self.weights.append({t.key: t.weight.detach().clone().numpy() for t in lc.find(pl_module)})


@pytest.mark.parametrize("regrow", ["gradient", "random"])
@pytest.mark.parametrize("distribution", [None, "uniform", "erk"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_every_layer_keeps_its_count_at_every_step(regrow, distribution, criterion):
    prune = lc.ScheduledPruning(regrow=regrow, distribution=distribution, criterion=criterion, **OPTIONS)
    probe = Probe(prune)
    trainer(probe, prune).fit(Lit(), loader())
    counts = [{k: int(m.sum()) for k, m in masks.items()} for masks in probe.masks]
    assert len(counts) == 16 and all(c == counts[0] for c in counts)
    assert sum(counts[0].values()) == N - count_pruned(0.7, N)
    if distribution:
        rule = {"uniform": uniform, "erk": erdos_renyi}[distribution]
        assert list(counts[0].values()) == rule(list(SIZES.values()), 0.7)
    for masks, weights in zip(probe.masks, probe.weights, strict=True):
        assert all(not weights[k][~m].any() for k, m in masks.items())
    moved = [t for t in range(2, 17) if not equal_masks(probe.masks[t - 2], probe.masks[t - 1])]
    assert moved == [3, 6, 9]  # at 12 the share is less than one entry, at 13 it is 0


def equal_masks(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_masks_weights_and_shares_are_those_of_the_paper():
    """Plain SGD, so NumPy can take the step by itself; then sort."""
    prune = lc.ScheduledPruning(regrow="gradient", regrow_share=0.5, **OPTIONS)
    probe = Probe(prune)
    trainer(probe, prune).fit(SGD(), loader())
    came = []
    for t in (3, 6, 9, 12):
        share = 0.25 * (1 + math.cos(math.pi * t / 13))
        came.append(0)
        for key, old in probe.masks[t - 2].items():
            weight = np.where(old, probe.before[t - 1][key] - 0.1 * probe.gradients[t - 1][key], 0).ravel()
            size = np.abs(weight)
            k = math.floor(share * old.sum() + 0.5)
            inside = np.flatnonzero(old)
            kept = old.ravel().copy()
            kept[inside[np.argsort(size[inside], kind="stable")][:k]] = False
            outside = np.flatnonzero(~kept)
            new = kept.copy()
            gradient = np.abs(probe.gradients[t - 1][key]).ravel()
            new[outside[np.argsort(-gradient[outside], kind="stable")][:k]] = True
            assert np.array_equal(probe.masks[t - 1][key].ravel(), new), (t, key)
            # what comes starts at zero, what stays (or comes straight back) keeps its value
            expected = np.where(new & old.ravel(), weight, 0)
            np.testing.assert_allclose(probe.weights[t - 1][key].ravel(), expected, atol=1e-7)
            came[-1] += int((new & ~old.ravel()).sum())
    assert min(came[:3]) > 0


def test_moments_of_what_comes_and_goes_are_zero():
    class Check(pl.Callback):
        came = 0

        def on_train_batch_end(self, trainer, pl_module, *args):
            for t in lc.find(pl_module):
                state, mask = trainer.optimizers[0].state[t.weight], prune.masks[t.key]
                new = mask & ~self.old[t.key] if hasattr(self, "old") else torch.zeros_like(mask)
                self.came += int(new.sum())
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    assert not moment[~mask].any() and not moment[new].any()
            self.old = {k: m.clone() for k, m in prune.masks.items()}

    check, prune = Check(), lc.ScheduledPruning(regrow="random", **OPTIONS)
    trainer(prune, check).fit(Lit(), loader())
    assert check.came > 10


def test_the_loss_falls_and_the_last_share_is_logged():
    lit = SGD()
    x, y = loader().dataset.tensors
    before = float(nn.functional.cross_entropy(lit(x), y).detach())
    prune = lc.ScheduledPruning(regrow="gradient", sparsity=0.5, every=4)
    t = trainer(prune, max_epochs=20)
    t.fit(lit, loader())
    after = float(nn.functional.cross_entropy(lit(x), y).detach())
    assert after < 0.8 * before
    assert 0 <= float(t.callback_metrics["compress/regrown"]) < 0.05  # cosine: little is exchanged at the end
    assert float(t.callback_metrics["compress/sparsity"]) == 0.5


class Crash(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 8:
            raise RuntimeError("power cut")


def resumed(tmp_path, run):
    """What a run ends with, and what it ends with after a power cut: ``run(folder, *callbacks, ckpt=None)``."""
    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", Crash())
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert 0 < saved["global_step"] <= 16
    return whole, run(tmp_path / "cut", ckpt=tmp_path / "cut" / "last.ckpt"), saved


@pytest.mark.parametrize("regrow", ["gradient", "random"])
def test_resume_equals_the_uninterrupted_run(tmp_path, regrow):
    def run(folder, *callbacks, ckpt=None):
        prune, lit = lc.ScheduledPruning(regrow=regrow, distribution="erk", **OPTIONS), Lit()
        trainer(prune, saving(folder), *callbacks).fit(lit, Resumable(loader(64)), ckpt_path=ckpt)
        return {"masks": prune.masks, "weights": dict(lit.state_dict()), "regrown": prune._regrowth.regrown}

    whole, again, saved = resumed(tmp_path, run)
    assert saved["global_step"] == 6 and equal(whole, again)


def fit(folder, *callbacks, resume=False):
    prune = lc.ScheduledPruning(regrow="gradient", sparsity=0.8, end=37, unit="step", every=2)
    lit = Lit()
    t = trainer(prune, saving(folder), *callbacks, max_epochs=3)
    t.fit(lit, Resumable(loader(64)), ckpt_path=folder / "last.ckpt" if resume else None)
    return {"weights": dict(lit.state_dict()), "masks": prune.masks, "moments": t.optimizers[0].state_dict()}


def test_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path):
    end = fit(tmp_path / "whole")
    assert kill("test_scheduled_pruning_regrowth", tmp_path / "cut", step=22) == 21
    assert equal(end, fit(tmp_path / "cut", resume=True))


class Two(Lit):
    """Two optimizers in turn, one per layer."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[i].parameters(), lr=0.01) for i in (0, 2)]


def test_two_optimizers_move_the_masks_of_both_and_resume(tmp_path):
    """The first to reach a step exchanges for both; the other's gradients are those of its step before, in the file."""
    seen = []

    def run(folder, *callbacks, ckpt=None):
        options = {"begin": 3, "end": 13, "unit": "step", "every": 4}
        prune, lit = lc.ScheduledPruning(regrow="gradient", sparsity=0.5, **options), Two()
        seen.append(Probe(prune))
        t = trainer(prune, seen[-1], saving(folder), *callbacks)
        t.fit(lit, Resumable(loader(64)), ckpt_path=ckpt)
        return {"masks": prune.masks, "weights": dict(lit.state_dict())}

    whole, again, saved = resumed(tmp_path, run)
    for key in SIZES:
        assert any(not np.array_equal(a[key], b[key]) for a, b in pairwise(seen[0].masks)), key
    # saved after batch 6; at step 7 the first optimizer exchanges for both
    state = next(v for k, v in saved["callbacks"].items() if "ScheduledPruning" in k)
    assert saved["global_step"] == 12 and list(state["regrowth"]["gradients"]) == ["net.2.weight"]
    assert equal(whole, again)


def test_overflowing_steps_exchange_nothing():
    class Overflow(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx % 2 else 1.0)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01, fused=True)

    prune = lc.ScheduledPruning(regrow="gradient", sparsity=0.5, end=7, unit="step", every=1)
    probe = Probe(prune)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    lit = Overflow()
    trainer(probe, prune, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(lit, loader())
    assert prune.steps == 8 and all(bool(p.isfinite().all()) for p in lit.parameters())
    for skipped in range(1, 16, 2):
        assert equal_masks(probe.masks[skipped - 1], probe.masks[skipped])
    assert not equal_masks(probe.masks[0], probe.masks[2])


def test_a_gradient_that_is_not_a_number_names_the_layer():
    class Broken(SGD):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.nan

    with pytest.raises(ValueError, match=r"net\.0\.weight: .*NaN.*gradients finite"):
        trainer(lc.ScheduledPruning(regrow="gradient", **OPTIONS)).fit(Broken(), loader())


def test_a_weight_without_gradient_keeps_its_mask():
    class Unused(Lit):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

    prune = lc.ScheduledPruning(regrow="gradient", scope="layer", **OPTIONS)
    lit = Unused()
    first = {}

    class First(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            first.update({k: m.clone() for k, m in prune.masks.items()})

    trainer(prune, First()).fit(lit, loader())
    assert torch.equal(first["spare.weight"], prune.masks["spare.weight"])
    assert not torch.equal(first["net.0.weight"], prune.masks["net.0.weight"])


def test_zeros_of_an_earlier_compression_are_a_start_and_not_held():
    """Sparser than asked for: what is missing comes at zero, and all of it may move."""
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    net = lc.compress(net, [lc.Prune(0.9)]).model
    old = {f"net.{i}.weight": net[i].weight != 0 for i in (0, 2)}
    prune = lc.ScheduledPruning(regrow="gradient", **OPTIONS)
    starts = {}

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            starts.update({k: m.clone() for k, m in prune.masks.items()})

    trainer(prune, Start()).fit(Lit(net), loader())
    assert sum(int(m.sum()) for m in starts.values()) == N - count_pruned(0.7, N)
    assert all(bool(starts[k][m].all()) for k, m in old.items())
    assert all(code.matches(module.weight) for _, module, _, code in lc.codes.of(net))


def test_complex_weights_are_exchanged_by_modulus():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(self.weight.dtype) @ self.weight).abs()

    lc.register(Complex, lc.Axes(1, 0))
    torch.manual_seed(3)
    prune, lit = lc.ScheduledPruning(regrow="gradient", **OPTIONS), None
    probe = Probe(prune)
    lit = Lit(nn.Sequential(Complex(), nn.Linear(16, 3)))
    trainer(probe, prune).fit(lit, loader())
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in probe.masks]
    complex_kept, real_kept = 128 - count_pruned(0.7, 128), 48 - count_pruned(0.7, 48)
    assert set(counts) == {complex_kept + real_kept}
    assert not np.array_equal(probe.masks[0]["net.0.weight"], probe.masks[-1]["net.0.weight"])


def test_a_second_fit_goes_on_with_its_masks():
    prune, lit = lc.ScheduledPruning(regrow="gradient", **OPTIONS), Lit()
    trainer(prune).fit(lit, loader())
    first = {k: m.clone() for k, m in prune.masks.items()}
    trainer(prune).fit(lit, loader())
    assert equal(first, prune.masks)  # past the end of the schedule they stay
    assert not lit.net[0].weight[~first["net.0.weight"]].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regrow": "gradients"}, "regrow='gradients' is unknown; allowed: gradient, random"),
        ({"regrow_share": 0.0}, "0 < regrow_share <= 1"),
        ({"distribution": "er"}, "distribution='er' is unknown; allowed: erk, uniform"),
        ({"regrow": None, "distribution": "erk"}, "distribution='erk' needs regrow="),
        ({"rewind": True}, "rewind= has no meaning with regrow="),
        ({"start": 0.5}, "start= has no meaning with regrow="),
        ({"schedule": "constant"}, "'constant' is at its end at once"),
        ({"threshold": 0.1}, "in place of threshold="),
        ({"distribution": "erk", "scope": "layer"}, "so does scope='layer'"),
        ({"distribution": "erk", "sparsity": {"*": 0.5}}, "so does a sparsity for each pattern"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        lc.ScheduledPruning(**{"regrow": "gradient", **options})
