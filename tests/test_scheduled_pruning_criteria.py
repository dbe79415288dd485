"""ScheduledPruning with criteria that are measured while training, and with patterns: channels, N:M, blocks."""

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from killed import Resumable, equal, saving
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.callbacks.observed import TrainingStats
from lightning_compress.functional.masks import count_pruned
from lightning_compress.stats import Calibration, collect

ONCE = {"begin": 5, "end": 5, "unit": "step", "every": 4}  # one update, from steps 2 to 5
KEYS = ("net.0.weight", "net.2.weight")


class Seen(pl.Callback):
    """Stands before the pruning callback: inputs and gradients of every step, and the masks after it."""

    def __init__(self, prune):
        self.prune, self.inputs, self.products, self.weights, self.masks = prune, {}, [], [], []

    def on_fit_start(self, trainer, pl_module):
        for key in KEYS:
            self.inputs[key] = []
            layer = pl_module.get_submodule(key.removesuffix(".weight"))
            layer.register_forward_pre_hook(
                lambda m, args, key=key: self.inputs[key].append(args[0].detach().clone())
            )

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        targets = lc.find(pl_module)
        self.products.append(
            {t.key: (t.weight.grad.double() * t.weight.detach().double()).numpy() for t in targets}
        )

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.masks.append({k: m.clone() for k, m in self.prune.masks.items()})
        self.weights.append({t.key: t.weight.detach().double().clone().numpy() for t in lc.find(pl_module)})


def recorded(prune):
    """What was measured, at every update: target -> field -> value."""
    found, update = [], prune.update

    def recording(trainer):
        if prune._stats is not None:
            stats = prune._stats.stats()
            found.append({key: {f: getattr(s, f) for f in prune._stats.needs} for key, s in stats.items()})
        update(trainer)

    prune.update = recording
    return found


class SGD(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lowest(scores, k):
    """Mask of what is left when the k lowest go, by a stable sort."""
    kept = np.ones(scores.size, dtype=bool)
    kept[np.argsort(scores.ravel(), kind="stable")[:k]] = False
    return kept.reshape(scores.shape)


def test_taylor_is_the_mean_over_the_steps_since_the_last_update():
    options = {**ONCE, "begin": 1, "schedule": "linear"}  # at step 1 the sparsity is still 0
    prune = lc.ScheduledPruning(sparsity=0.5, criterion="taylor", scope="layer", **options)
    seen, measured = Seen(prune), recorded(prune)
    trainer(seen, prune).fit(SGD(), loader())
    for key in KEYS:
        scores = np.mean([p[key] ** 2 for p in seen.products[1:5]], axis=0)
        np.testing.assert_allclose(measured[1][key]["taylor"].numpy(), scores, rtol=1e-5)
        assert np.array_equal(seen.masks[4][key].numpy(), lowest(scores, scores.size // 2)), key
        assert seen.masks[3][key].all() and torch.equal(seen.masks[4][key], seen.masks[-1][key])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_wanda_takes_all_inputs_since_the_last_update(accumulate):
    options = {**ONCE, "begin": 1, "schedule": "linear"}  # at step 1 the sparsity is still 0
    prune = lc.ScheduledPruning(sparsity=0.5, criterion="wanda", **options)
    seen, measured = Seen(prune), recorded(prune)
    t = trainer(seen, prune, accumulate_grad_batches=accumulate)
    t.fit(SGD(), loader(32 * accumulate))
    last = 5 * accumulate - 1
    for key, rows in (("net.0.weight", 16), ("net.2.weight", 3)):
        x = torch.cat(seen.inputs[key][accumulate : 5 * accumulate]).double()
        torch.testing.assert_close(measured[1][key]["input_norm"][0], x.square().sum(0).sqrt().float())
        weight = torch.from_numpy(seen.weights[last][key])
        prune_free = np.abs(undone(seen, key, last, weight.numpy()))
        scores = prune_free * x.square().sum(0).sqrt().numpy()
        k = count_pruned(0.5, scores.shape[1])
        expected = np.stack([lowest(scores[r], k) for r in range(rows)])
        assert np.array_equal(seen.masks[last][key].numpy(), expected), key


def undone(seen, key, batch, weight):
    """The weight just before the masks moved: SGD's step from the batch before."""
    before = seen.weights[batch - 1][key]
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient = np.where(before != 0, seen.products[4][key] / before, 0.0)
    return before - 0.1 * gradient


def layers():
    return {
        "linear": (nn.Linear(6, 4), torch.randn(5, 6)),
        "linear of three axes": (nn.Linear(6, 4, bias=False), torch.randn(5, 3, 6)),
        "complex": (nn.Linear(6, 4, dtype=torch.complex64), torch.randn(5, 6, dtype=torch.complex64)),
        "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(5, 4, 7, 8)),
        "conv without samples": (nn.Conv1d(4, 6, 3, padding=2, dilation=2), torch.randn(4, 9)),
        "same": (nn.Conv2d(4, 6, (2, 3), padding="same"), torch.randn(5, 4, 7, 8)),
        "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), torch.randn(5, 4, 7, 8)),
        "circular": (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), torch.randn(5, 4, 9)),
        "groups": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(5, 4, 7, 8)),
        "depth-wise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), torch.randn(5, 4, 7, 8)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), torch.randn(5, 4, 4, 5)),
    }


@pytest.mark.parametrize("kind", layers())
def test_what_hooks_sum_up_is_what_calibration_measures(kind):
    """Calibration watches the products themselves, one tensor after the other."""
    torch.manual_seed(0)
    layer, x = layers()[kind]
    needs = ("input_norm", "output_rms", "output_mean_abs")
    net = nn.Sequential(layer)
    targets = lc.find(net)
    measured = TrainingStats(needs, "mine")
    assert not measured.refusals(net, targets, None)
    undo = measured.start(targets)
    net(2 * x)  # nobody listens
    measured.listening = True
    with torch.no_grad():
        net(3 * x)
    for scale in (1, 2):
        net(scale * x)
    for end in undo:
        end()
    data = [(s * x)[None] if kind == "conv without samples" else s * x for s in (1, 2)]
    expected = collect(net, targets, Calibration(data=data), needs)["0.weight"]
    got = measured.stats()["0.weight"]
    for field in needs:
        torch.testing.assert_close(getattr(got, field), getattr(expected, field), rtol=1e-5, atol=1e-6)
    measured.reset()
    assert measured.stats()["0.weight"].input_norm is None


def test_spectral_weights_are_measured():
    neuralop = pytest.importorskip("neuralop.layers.spectral_convolution")
    torch.manual_seed(0)
    net = nn.Sequential(neuralop.SpectralConv(3, 4, (4, 4)))
    targets, x = lc.find(net, include="0"), torch.randn(2, 3, 8, 8)
    targets = [t for t in targets if t.weight.is_complex()]
    measured = TrainingStats(("input_norm", "output_rms"), "mine")
    refused = measured.refusals(net, targets, None)
    targets = [t for t in targets if t.key not in refused]
    assert targets
    measured.start(targets)
    measured.listening = True
    net(x)
    expected = collect(net, targets, Calibration(data=[x]), ("input_norm", "output_rms"))
    for key, stats in measured.stats().items():
        torch.testing.assert_close(stats.input_norm, expected[key].input_norm)
        torch.testing.assert_close(stats.output_rms, expected[key].output_rms)


def test_gradients_of_skipped_steps_do_not_count_and_scales_are_taken_out():
    class Fused(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.inf if batch_idx % 2 else 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    taken = Resumable(batch for i, batch in enumerate(loader()) if i % 2 == 0)
    found = []
    for lit, data in ((Fused(), loader()), (SGD(), taken)):
        prune = lc.ScheduledPruning(sparsity=0.5, criterion="taylor", begin=4, end=4, unit="step", every=4)
        found.append(recorded(prune))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if isinstance(lit, Fused) else []
        trainer(prune, plugins=plugins).fit(lit, data)
    assert found[0][0].keys() == set(KEYS)
    for key in KEYS:
        a, b = (measured[0][key]["taylor"] for measured in found)
        torch.testing.assert_close(a, b, rtol=0.1, atol=float(b.max()) * 0.05)  # half precision


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class Images(Lit):
    def __init__(self):
        super().__init__(convolutions())


def images(n=32):
    return loader(n, shape=(2, 8, 8))


CHANNELS = {"sparsity": 0.5, "pattern": "channel", "exclude": "net.7", "begin": 2, "unit": "step", "every": 3}


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "taylor", "redundancy", "wanda"])
def test_masked_channels_are_silent_at_every_step(criterion):
    class Check(pl.Callback):
        checked = 0

        def on_train_batch_end(self, trainer, pl_module, *args):
            conv, norm, second = (pl_module.net[i] for i in (0, 1, 3))
            masks = prune.masks
            gone = ~masks["net.0.weight"].flatten(1).any(1)
            assert (masks["net.0.weight"].flatten(1).sum(1) % conv.weight[0].numel() == 0).all()  # whole ones
            for parameter in (conv.weight, norm.weight, norm.bias):
                assert not parameter[gone].any()
                moments = trainer.optimizers[0].state[parameter]
                assert not moments["exp_avg"][gone].any()
            lost = ~masks["net.3.weight"].flatten(1).any(1)
            assert not second.weight[lost].any() and not second.bias[lost].any()
            self.checked += int(gone.sum()) + int(lost.sum())

        def on_train_end(self, trainer, pl_module):
            x = torch.randn(2, 2, 8, 8)
            pl_module.eval()
            gone = ~prune.masks["net.0.weight"].flatten(1).any(1)
            assert not pl_module.net[:2](x)[:, gone].any() and pl_module.net[:2](x)[:, ~gone].any()
            pl_module.train()

    options = {"scope": "layer"} if criterion != "magnitude" else {}
    prune, check, lit = (
        lc.ScheduledPruning(criterion=criterion, end=12, **CHANNELS, **options),
        Check(),
        Images(),
    )
    keys = list(lit.state_dict())
    t = trainer(prune, check)
    t.fit(lit, images())
    assert check.checked > 20 and list(lit.state_dict()) == keys
    if options:
        counts = [int((~m.flatten(1).any(1)).sum()) for m in prune.masks.values()]
        assert counts == [4, 3]
        assert prune.sparsity == 0.5 == float(t.callback_metrics["compress/sparsity"])
    coded = {
        key
        for key, module, _, code in lc.codes.of(lit)
        if code.matches(module.get_parameter(key.split(".")[-1]))
    }
    assert coded == {"net.0.weight", "net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"}


def test_batchnorm_scale_leaves_layers_without_batchnorm():
    prune = lc.ScheduledPruning(criterion="batchnorm_scale", end=12, **CHANNELS)
    lit = Images()
    lit.net[1].weight.data.copy_(torch.tensor([5.0, 1.0, 6.0, 2.0, 7.0, 3.0, 8.0, 4.0]))
    trainer(prune).fit(lit, images())
    assert list(prune.masks) == ["net.0.weight"]
    kept = prune.masks["net.0.weight"].flatten(1).any(1)
    assert kept.tolist() == [True, False] * 4


def test_outputs_of_the_module_are_warned_of():
    options = {**CHANNELS, "exclude": ()}
    with pytest.warns(UserWarning, match=r"channels of net\.7\.weight are outputs of the module"):
        trainer(lc.ScheduledPruning(end=12, **options)).fit(Images(), images())


def test_averages_and_files_have_silent_channels(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    prune, lit = lc.ScheduledPruning(end=12, **CHANNELS), Images()
    t = trainer(EMAWeightAveraging(decay=0.9), prune, saving(tmp_path))
    t.fit(lit, images(), images())
    saved = Images()
    saved.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    for module in (lit, saved):
        gone = ~prune.masks["net.0.weight"].flatten(1).any(1)
        assert gone.any() and not module.net[1].bias[gone].any() and not module.net[0].weight[gone].any()


@pytest.mark.parametrize("pattern", ["2:4", "block:4x1", "block:1x4"])
def test_patterns_along_the_schedule(pattern):
    class Check(pl.Callback):
        counts = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            mask = prune.masks["net.0.weight"]
            if pattern == "2:4":
                zeros = (~mask).view(16, 2, 4).sum(2)
                assert zeros.unique().numel() == 1
                self.counts += (int(zeros[0, 0]),)
            else:
                parts = mask.view(4, 4, 8).movedim(1, 2) if pattern == "block:4x1" else mask.view(16, 2, 4)
                blocks = parts.reshape(-1, 4)
                assert (blocks.all(1) | ~blocks.any(1)).all()
                self.counts += (int((~blocks.any(1)).sum()),)

    check = Check()
    options = {"begin": 2, "end": 12, "unit": "step", "every": 1, "schedule": "linear"}
    prune = lc.ScheduledPruning(sparsity=0.5, pattern=pattern, include="net.0", **options)
    trainer(prune, check).fit(Lit(), loader())
    shares = [0.5 * min(max((t - 2) / 10, 0), 1) for t in range(1, 17)]
    units = 4 if pattern == "2:4" else 32
    assert check.counts == tuple(count_pruned(s, units) for s in shares)
    assert prune.sparsity == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "wanda"},
        {"criterion": "taylor"},
        {"criterion": "activation", "pattern": "channel"},
        {"criterion": "magnitude", "pattern": "channel"},
    ],
)
def test_resume_in_the_middle_of_a_window_equals_the_uninterrupted_run(tmp_path, options):
    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 8:  # the file is of step 6, updates are at 5 and 9
                raise RuntimeError("power cut")

    def run(folder, *callbacks, ckpt=None):
        prune = lc.ScheduledPruning(
            sparsity=0.5, begin=1, end=13, unit="step", every=4, exclude="net.7", **options
        )
        lit, measured = Images(), recorded(prune)
        trainer(prune, saving(folder), *callbacks).fit(lit, Resumable(images()), ckpt_path=ckpt)
        return {"masks": prune.masks, "weights": dict(lit.state_dict()), "at 9 and 13": measured[-2:]}

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", Crash())
    saved = tmp_path / "cut" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 6
    assert equal(whole, run(tmp_path / "cut", ckpt=saved))


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import lightning.pytorch as pl
import torch
import lightning_compress as lc
from killed import saving
from lit import Lit, loader, trainer

class Stop(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


def run(folder, steps, ckpt=None):
    prune = lc.ScheduledPruning(sparsity=0.5, criterion="wanda", begin=1, end=13, unit="step", every=4)
    lit, options = Lit(), {{"strategy": "ddp_fork", "devices": 2, "max_epochs": 20}}
    trainer(prune, saving(folder), Stop(steps), **options).fit(lit, loader(8, 4), ckpt_path=ckpt)
    return lit

whole = run("whole", 15)
run("cut", 6)  # in the middle of a window
again = run("cut", 15, "cut/last.ckpt")
assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
"""


def test_ranks_resume_with_the_sums_of_all(tmp_path):
    (tmp_path / "run.py").write_text(RANKS.format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_cannot_be_measured_is_left_and_listed(caplog):
    class Attention(Lit):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.net(self.attention(x, x, x)[0])

    prune = lc.ScheduledPruning(sparsity=0.5, criterion="wanda", **ONCE)
    trainer(prune).fit(Attention(), loader())
    assert {*prune.masks} >= set(KEYS) and "attention.in_proj_weight" not in prune.masks
    with pytest.raises(MisconfigurationException, match="measured in training for linear layers"):
        options = {"include": "attention.in_proj_weight", **ONCE}
        trainer(lc.ScheduledPruning(sparsity=0.5, criterion="wanda", **options)).fit(Attention(), loader())


def test_a_layer_that_training_does_not_use_is_named():
    class Unused(Lit):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

    with pytest.raises(ValueError, match=r"spare\.weight.*not measured"):
        trainer(lc.ScheduledPruning(sparsity=0.5, criterion="wanda", **ONCE)).fit(Unused(), loader())


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_compiled_layers_are_measured_too(criterion):
    masks = []
    for compiled in (False, True):
        lit = Lit()
        lit.net = torch.compile(lit.net, backend="eager") if compiled else lit.net
        prune = lc.ScheduledPruning(sparsity=0.5, criterion=criterion, begin=2, end=10, unit="step", every=4)
        trainer(prune).fit(lit, loader())
        masks.append(prune.masks)
    assert equal(*masks)


def test_nothing_is_left_behind():
    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            copy.deepcopy(pl_module)
            copied = pickle.loads(pickle.dumps(prune))
            assert not copied._stats._trackers and not copied._silent._silenced

    prune, lit = lc.ScheduledPruning(criterion="activation", end=12, **CHANNELS), Images()
    trainer(prune, Copy()).fit(lit, images(), images())
    assert not any(m._forward_hooks for m in lit.modules()) and not prune._stats._trackers
    before = {k: m.clone() for k, m in prune.masks.items()}
    trainer(prune).fit(lit, images())
    assert equal(before, prune.masks)
