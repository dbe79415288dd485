"""LowRankRegularization in a Trainer: what is added, when, to what; proximal steps, truncation, resume, the end."""

import contextlib
import copy
import csv
import importlib
import math
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from killed import Resumable, equal, kill, saving
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, sparsity, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress.callbacks.regularization import LowRankRegularization
from lightning_compress.functional.ranks import effective_rank
from lightning_compress.lowrank import Factorize

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes"
KEYS = ("net.0.weight", "net.2.weight")


class SGD(Lit):
    """Plain steps, so that a step shows its gradient."""

    def __init__(self, net=None, lr=0.1, **options):
        super().__init__(net, lr)
        self.options = options

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.options)


class Still(SGD):
    """A loss without a gradient: whatever moves is moved by the penalty."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0.0


class Gradients(pl.Callback):
    """What the optimizer is given."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({k: p.grad.clone() for k, p in pl_module.named_parameters() if p.grad is not None})


def nuclear(weight):
    """Sum of singular values in double precision, with autograd."""
    return torch.linalg.svdvals(weight.double()).sum()


def polar(weight):
    """U V^H."""
    u, _, vh = np.linalg.svd(weight.detach().numpy().astype(np.float64), full_matrices=False)
    return torch.from_numpy(u @ vh).float()


def by_hand(weight, batch, strength, accumulate, clip, lr):
    """Weights of one linear layer after an SGD step on loss + strength * nuclear norm; no Lightning."""
    layer = nn.Linear(8, 3, bias=False)
    layer.weight.data = weight.clone()
    for x, y in batch:
        (nn.functional.cross_entropy(layer(x), y) / accumulate).backward()
    total = layer.weight.grad + strength * polar(weight)
    norm = float(total.norm())
    return weight - lr * total * min(1.0, clip / (norm + 1e-6))


def test_accumulation_clipping_and_a_gradient_scaler_give_the_step_computed_by_hand():
    lit = SGD(nn.Sequential(nn.Linear(8, 3, bias=False)))
    before, batches = lit.net[0].weight.detach().clone(), list(loader())[:4]

    class Overflowing(pl.Callback):
        """Single precision under the scaler, so that the step can be computed by hand."""

        def on_train_start(self, trainer, pl_module):
            trainer.precision_plugin.forward_context = contextlib.nullcontext

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer(
        LowRankRegularization(strength=0.3),
        Overflowing(),
        max_steps=1,
        max_epochs=-1,
        accumulate_grad_batches=4,
        gradient_clip_val=0.4,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    ).fit(lit, loader())
    expected = by_hand(before, batches, 0.3, 4, 0.4, 0.1)
    torch.testing.assert_close(lit.net[0].weight.detach(), expected, rtol=1e-6, atol=1e-7)
    assert (expected - before).norm() == pytest.approx(0.04, rel=1e-4)  # the clip was at work


@pytest.mark.parametrize(
    ("optimizer", "scale"),
    [(name, None) for name in ("sgd", "adam", "fused", "lbfgs")]
    + [
        (name, 256.0) for name in ("sgd", "adam", "fused")
    ],  # closures that run several times cannot be scaled
)
def test_equals_a_term_of_the_loss(optimizer, scale):
    """The reference adds the penalty to the loss and lets autograd differentiate through the decomposition."""

    class Plain(Lit):
        strength = 0.0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.autocast("cpu", enabled=False):
                return loss + self.strength * sum(nuclear(self.get_parameter(k)) for k in KEYS).float()

        def configure_optimizers(self):
            return {
                "sgd": lambda: torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9),
                "adam": lambda: torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-3),
                "fused": lambda: torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-3, fused=True),
                "lbfgs": lambda: torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2),
            }[optimizer]()

    def fit(*callbacks, strength=0.0):
        lit = Plain()
        lit.strength = strength
        plugins = (
            [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]
            if scale
            else []
        )
        trainer(*callbacks, plugins=plugins, max_epochs=1).fit(lit, loader())
        return lit

    ours, reference, without = fit(LowRankRegularization(strength=0.5)), fit(strength=0.5), fit()
    for key in KEYS:
        a, b, c = (m.get_parameter(key).detach() for m in (ours, reference, without))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        assert (a - c).abs().max() > 1e-3


def test_every_second_step_has_twice_the_strength_along_the_schedule():
    probe = Gradients()
    callback = LowRankRegularization(
        strength=0.2, schedule="linear", every=2, begin=2, end=10, unit="step", include="net.0"
    )
    trainer(callback, probe).fit(Still(lr=0.0), loader())
    direction = polar(Still().net[0].weight)
    for t, seen in enumerate(probe.seen):
        share = min((t - 2) / 8, 1.0) if t >= 2 and t % 2 == 0 else 0.0
        torch.testing.assert_close(seen["net.0.weight"], 2 * 0.2 * share * direction, rtol=1e-5, atol=1e-7)
        assert not seen["net.2.weight"].any()
    assert len(probe.seen) == 16 and callback.span == (2, 10)


def expected_gradients(net, form):
    """dP/dw of the nuclear norm of ``form(w)`` [g, m, n] by autograd in double precision."""
    weight = net.detach().to(torch.complex128 if net.is_complex() else torch.float64).requires_grad_()
    torch.linalg.svdvals(form(weight)).sum().backward()
    return weight.grad


LAYERS = {
    "linear": (nn.Linear(6, 4), "weight", "auto", lambda w: w[None]),
    "conv": (nn.Conv2d(3, 5, 3), "weight", "channel", lambda w: w.flatten(1)[None]),
    "spatial": (
        nn.Conv2d(3, 5, (3, 2)),
        "weight",
        "spatial",
        lambda w: w.permute(0, 3, 1, 2).reshape(1, 10, 9),
    ),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), "weight", "channel", lambda w: w.reshape(2, 3, -1)),
    "grouped spatial": (
        nn.Conv2d(4, 6, 3, groups=2),
        "weight",
        {"net*": "spatial"},
        lambda w: w.reshape(2, 3, 2, 3, 3).permute(0, 1, 4, 2, 3).reshape(2, 9, 6),
    ),
    "1x1 has no spatial": (nn.Conv2d(4, 6, 1), "weight", "spatial", lambda w: w.flatten(1)[None]),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2), "weight", "auto", lambda w: w.reshape(2, 2, -1)),
    "conv3d": (nn.Conv3d(2, 3, 2), "weight", "auto", lambda w: w.flatten(1)[None]),
    "attention": (
        nn.MultiheadAttention(4, 2),
        "in_proj_weight",
        "auto",
        lambda w: torch.stack(w.chunk(3)),
    ),
    "embedding": (nn.Embedding(7, 3), "weight", "auto", lambda w: w[None]),
    "complex": (nn.Linear(6, 4, dtype=torch.complex64), "weight", "auto", lambda w: w[None]),
    "recurrent": (nn.GRUCell(3, 4), "weight_ih", "auto", lambda w: w[None]),
}


class Any(pl.LightningModule):
    """Holds any layer, uses all of it in a loss without gradient, and moves it by its gradient."""

    def __init__(self, *layers, lr=1.0):
        super().__init__()
        self.net, self.lr = nn.Sequential(*copy.deepcopy(layers)), lr

    def training_step(self, batch, batch_idx):
        return sum(p.abs().sum() for p in self.parameters()) * 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def once(callback, module, **options):
    """One optimizer step."""
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    trainer(callback, max_steps=1, max_epochs=-1, **options).fit(module, loader())
    return before, {k: p.detach().clone() for k, p in module.named_parameters()}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_matrix_of_every_kind_of_layer(kind):
    layer, param, matrix, form = LAYERS[kind]
    before, after = once(LowRankRegularization(matrix=matrix, strength=0.5, include="net.0"), Any(layer))
    weight = before[f"net.0.{param}"]
    expected = weight - 0.5 * expected_gradients(weight, form).to(weight.dtype)
    torch.testing.assert_close(after[f"net.0.{param}"], expected, rtol=1e-5, atol=1e-6)


def fno():
    models = pytest.importorskip("neuralop.models")
    torch.manual_seed(0)
    return models.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=3, n_layers=1)


SPECTRAL = "net.0.fno_blocks.convs.0.weight.tensor"  # [in, out, 4, 3], complex
UNFOLDINGS = {
    "channel_in": [lambda w: w.flatten(1)],
    "channel_out": [lambda w: w.transpose(0, 1).flatten(1)],
    "channel": [lambda w: w.flatten(1), lambda w: w.transpose(0, 1).flatten(1)],
    "modes": [lambda w: w.flatten(0, 1).flatten(1)],
    "tucker": [lambda w, k=k: w.movedim(k, 0).flatten(1) for k in range(4)],
    "tt": [lambda w, k=k: w.flatten(k).reshape(-1, w.flatten(k).shape[-1]) for k in (1, 2, 3)],
}


@pytest.mark.parametrize("scheme", UNFOLDINGS)
def test_spectral_weights_are_complex_matrices_one_for_every_thin_axis(scheme):
    before, after = once(LowRankRegularization(strength=0.1, include="*convs*", matrix=scheme), Any(fno()))
    weight = before[SPECTRAL]
    expected = weight - 0.1 * sum(expected_gradients(weight, form) for form in UNFOLDINGS[scheme])
    torch.testing.assert_close(after[SPECTRAL], expected.to(weight.dtype), rtol=1e-5, atol=1e-6)


def test_proximal_steps_on_several_axes_follow_each_other():
    callback = LowRankRegularization(strength=6.4, proximal=True, include="*convs*", matrix="channel")
    before, after = once(callback, Any(fno(), lr=0.5))
    left = before[SPECTRAL].numpy().astype(complex)
    for axis in (0, 1):
        unfolded = np.moveaxis(left, axis, 0)
        u, s, vh = np.linalg.svd(unfolded.reshape(3, -1), full_matrices=False)
        assert s.min() < 3.2 < s.max() or axis
        left = np.moveaxis((u * np.maximum(s - 3.2, 0) @ vh).reshape(unfolded.shape), 0, axis)
    np.testing.assert_allclose(after[SPECTRAL].numpy(), left, rtol=0, atol=1e-6)


def test_real_channel_factors_have_a_real_matrix():
    factorize = Factorize(real_channel=True, rank_ratio=0.4)
    callback = LowRankRegularization(
        strength=0.1, include="*convs*", matrix="channel_in", factorize=factorize
    )
    before, after = once(callback, Any(fno()))
    weight = torch.view_as_real(before[SPECTRAL])
    expected = weight - 0.1 * expected_gradients(weight, lambda w: w.flatten(1)).to(weight.dtype)
    torch.testing.assert_close(torch.view_as_real(after[SPECTRAL]), expected, rtol=1e-5, atol=1e-6)


def test_tensors_that_are_factorized_already_are_left_alone():
    models = pytest.importorskip("neuralop.models")
    net = models.TFNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=4, n_layers=1, rank=0.5)
    with pytest.raises(MisconfigurationException, match="a factor of a tensor, whose ranks are set already"):
        once(LowRankRegularization(include="*convs*"), Any(net))


def test_auto_takes_the_matrix_that_factorize_takes_and_remembers_it():
    """Half the numbers are enough for one weight by channels, for the other by columns."""
    torch.manual_seed(0)
    by_channel, by_column = (nn.Conv2d(8, 8, 3, bias=False) for _ in range(2))
    by_channel.weight.data = torch.einsum("or,rikl->oikl", torch.randn(8, 3), torch.randn(3, 8, 3, 3))
    by_column.weight.data = torch.einsum("rol,rik->oikl", torch.randn(6, 8, 3), torch.randn(6, 8, 3))
    chosen = Factorize(params_ratio=0.5).plan(nn.Sequential(by_channel, by_column))
    names = [d["scheme"] for d in chosen.layers.values()]
    assert names == ["channel", "spatial"]
    other = Factorize(params_ratio={"0": 0.5, "1": 0.5}, activation_aware=True)
    for factorize, attribute, expected in (
        (None, None, ["channel", "channel"]),  # as Factorize() does: half the rank saves nothing in columns
        (Factorize(params_ratio=0.5), None, names),
        (other, "net", names),
        (Factorize(budget=("macs", 0.5)), None, names),
        (Factorize(budget=("rank", 0.5)), None, ["channel", "channel"]),
    ):
        callback = LowRankRegularization(factorize=factorize, attribute=attribute)
        once(callback, Any(by_channel, by_column, lr=0.0))
        schemes = callback.state_dict()["schemes"]
        assert schemes == dict(zip(("net.0.weight", "net.1.weight"), expected, strict=True))
    again = LowRankRegularization()
    again.load_state_dict(callback.state_dict())
    once(again, Any(by_column, by_channel, lr=0.0))
    assert again.state_dict()["schemes"] == schemes  # of the checkpoint, though weights are others now


def test_pairs_are_penalized_through_their_product():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 9), nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 3), nn.Embedding(9, 6)
    )
    options = {"force": True, "rank_ratio": 0.5, "include": ["0", "1", "2", "3"]}
    thin = lc.compress(net, [Factorize(scheme={"1": "spatial"}, **options)]).model
    module = Any(*thin)
    before, after = once(LowRankRegularization(strength=0.5), module)
    assert len(before) == len(after) == 8 + 3

    def product(name, a, b):
        if name == "net.0":
            return a @ b
        if name == "net.1":  # 1 x kw after kh x 1, in two groups
            a, b = a.reshape(2, 4, -1, 3).transpose(2, 3), b.reshape(2, -1, 4 * 3)
            return a.reshape(2, 12, -1) @ b
        if name == "net.2":
            return a.flatten(1).mT @ b.flatten(1)
        return b @ a.mT

    for i in range(4):
        first, second = f"net.{i}.first.weight", f"net.{i}.second.weight"
        b, a = (before[k].double().requires_grad_() for k in (first, second))
        matrix = product(f"net.{i}", a, b)
        u, s, vh = torch.linalg.svd(matrix.detach(), full_matrices=False)
        kept = (s > 1e-9 * s.amax()).double()  # the product has exact zeros, which autograd cannot pass
        (matrix * ((u * kept[..., None, :]) @ vh)).sum().backward()
        for key, leaf in ((first, b), (second, a)):
            moved = (before[key].double() - after[key].double()) / 0.5
            torch.testing.assert_close(moved, leaf.grad, rtol=1e-4, atol=1e-5)


def test_a_proximal_step_on_a_pair_shrinks_the_product():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 9))
    thin = lc.compress(net, [Factorize(rank=4)]).model
    before, after = once(LowRankRegularization(strength=0.2, proximal=True), Any(*thin, lr=0.5))
    a, b = ([d["net.0.second.weight"].double() @ d["net.0.first.weight"].double()] for d in (before, after))
    u, s, vh = np.linalg.svd(a[0].numpy(), full_matrices=False)
    expected = u @ np.diag(np.maximum(s - 0.1, 0) * (np.arange(9) < 4)) @ vh
    np.testing.assert_allclose(b[0].numpy(), expected, atol=1e-6)


def test_orthogonality_moves_pairs_only():
    torch.manual_seed(0)
    thin = lc.compress(
        nn.Sequential(nn.Linear(12, 9), nn.Conv2d(8, 8, 3)), [Factorize(include="0", rank=3)]
    ).model
    module = Any(*thin, lr=0.1)
    before, after = once(LowRankRegularization("orthogonality", strength=0.5), module)
    b, a = (before[f"net.0.{k}.weight"].double().requires_grad_() for k in ("first", "second"))
    eye = torch.eye(3, dtype=torch.float64)
    ((b @ b.mT - eye).square().sum() + (a.mT @ a - eye).square().sum()).div(9).backward()
    for name, leaf in (("first", b), ("second", a)):
        key = f"net.0.{name}.weight"
        expected = before[key].double() - 0.1 * 0.5 * leaf.grad
        torch.testing.assert_close(after[key].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(before["net.1.weight"], after["net.1.weight"])
    with pytest.raises(MisconfigurationException, match=r"(?s)nothing to penalize.*no pair of factors"):
        once(LowRankRegularization("orthogonality"), Any(nn.Linear(12, 9)))


def test_a_proximal_step_is_the_soft_thresholded_svd_with_the_rate_of_its_group():
    class Groups(Still):
        def configure_optimizers(self):
            a, b = ({"params": self.net[i].parameters(), "lr": lr} for i, lr in ((0, 0.5), (2, 0.1)))
            return torch.optim.SGD([a, b], lr=9.0)

    lit = Groups()
    before = {k: lit.get_parameter(k).detach().double().numpy() for k in KEYS}
    callback = LowRankRegularization(strength=0.4, proximal=True, every=2)
    trainer(callback, max_steps=2, max_epochs=-1).fit(lit, loader())  # the first of the two is due
    for key, rate in zip(KEYS, (0.5, 0.1), strict=True):
        u, s, vh = np.linalg.svd(before[key], full_matrices=False)
        assert (s - rate * 0.8 < 0).any() or key == KEYS[1]
        expected = u @ np.diag(np.maximum(s - rate * 0.4 * 2, 0)) @ vh
        np.testing.assert_allclose(lit.get_parameter(key).detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{"proximal": True}, {"kind": "truncate", "energy_ratio": 0.5}, {}])
def test_steps_skipped_by_amp_do_not_shrink(options, fused):
    class Overflow(Still):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.net[0].weight.sum() * math.inf

    lit = Overflow(fused=fused)
    before = copy.deepcopy(lit.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    callback = LowRankRegularization(strength=0.4, **options)
    trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(lit, loader())
    assert callback.steps == 0 and equal(dict(lit.state_dict()), dict(before))


def rank_at(weight, energy):
    s2 = np.linalg.svd(weight.detach().double().numpy(), compute_uv=False) ** 2
    return int((np.cumsum(s2) / s2.sum() < energy).sum()) + 1


@pytest.mark.parametrize("stop", [None, 11])
def test_truncation_ends_at_the_energy_rank_and_factorizing_it_changes_little(stop):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == stop

    lit = Lit()
    x = torch.randn(32, 8)
    dense = rank_at(lit.net[0].weight, 0.8)
    callback = LowRankRegularization(
        "truncate",
        every=4,
        energy_ratio=0.8,
        factorize=Factorize(energy_ratio=0.9999, force=True),
        attribute="net",
    )
    trainer(callback, Stop()).fit(lit, loader())
    ranks = [int(np.linalg.matrix_rank(lit.get_parameter(k).detach().numpy(), tol=1e-5)) for k in KEYS]
    assert ranks[0] <= dense < 8 and callback.factorized[0].first.out_features == ranks[0]
    difference = (callback.factorized(x) - lit.net(x)).norm() / lit.net(x).norm()
    assert difference < 1e-2


def test_truncation_follows_the_schedule():
    """The share of energy that may go grows from nothing."""

    class Ranks(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            callback.seen.append(
                int(np.linalg.matrix_rank(pl_module.net[0].weight.detach().numpy(), tol=1e-5))
            )

    lit = Still(nn.Sequential(nn.Linear(8, 8, bias=False)))
    lit.net[0].weight.data = torch.diag(torch.arange(8.0, 0, -1).sqrt())
    callback = LowRankRegularization("truncate", energy_ratio=0.5, schedule="linear", end=10, unit="step")
    callback.seen = []
    trainer(callback, Ranks()).fit(lit, loader())
    share, left, expected = np.arange(8.0, 0, -1), 8, []
    for t in range(16):
        energy = 1 - 0.5 * min(t / 10, 1)
        left = int((np.cumsum(share[:left]) < energy * share[:left].sum() - 1e-9).sum()) + 1
        expected.append(left)
    assert callback.seen == expected and expected[0] == 8 and len(set(expected)) > 3


def rows(log):
    return list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))


def column(log, tag):
    return {int(r["step"]): float(r[tag]) for r in rows(log) if r.get(tag)}


def test_the_logged_effective_rank_falls_against_a_fit_without(tmp_path):
    ends = {}
    for strength in (0.0, 0.05):
        log = CSVLogger(tmp_path, version=f"v{strength}")
        lit = Lit(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
        trainer(LowRankRegularization(strength=strength), logger=log, log_every_n_steps=1, max_epochs=8).fit(
            lit, loader()
        )
        ranks = [effective_rank(lit.get_parameter(k)) for k in KEYS]
        curve = column(log, "compress/effective_rank")
        assert curve[63] == pytest.approx(sum(ranks) / 2, rel=1e-6)
        layers = [column(log, f"compress/effective_rank/{k.removesuffix('.weight')}") for k in KEYS]
        assert [layer[63] for layer in layers] == pytest.approx(ranks, rel=1e-6)
        total = sum(float(nuclear(lit.get_parameter(k).detach())) for k in KEYS)
        assert column(log, "compress/penalty")[63] == pytest.approx(strength * total, rel=1e-6, abs=1e-12)
        ends[strength] = curve
    assert ends[0.05][63] < 0.8 * ends[0.0][63] and ends[0.05][63] < 0.8 * ends[0.05][0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nuclear", {}),
        ("entropy", {}),
        ("entropy", {"distribution": "softmax"}),
        ("l1_l2", {}),
        ("l1_l2", {"squared": True}),
        ("hoyer", {}),
        ("scad", {"lam": 0.5}),
    ],
)
def test_every_penalty_falls_when_nothing_else_pulls(tmp_path, kind, options):
    log = CSVLogger(tmp_path)
    callback = LowRankRegularization(kind, 0.05, options=options)
    trainer(callback, logger=log, log_every_n_steps=1, max_epochs=3).fit(Still(lr=0.3), loader())
    curve = column(log, "compress/penalty")
    values = [curve[step] for step in sorted(curve)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.999 * values[0]


def test_a_rule_of_ones_own_by_import_path_or_as_a_function():
    def squares(sigma, power=2.0):
        return (sigma**power).sum(-1), power * sigma ** (power - 1)

    for kind, factor in ((squares, 2.0), ("test_lowrank_regularization.frobenius", 2.0)):
        before, after = once(LowRankRegularization(kind, 0.1), Any(nn.Linear(4, 3)))
        weight = before["net.0.weight"]
        torch.testing.assert_close(after["net.0.weight"], weight - 0.1 * factor * weight)


def frobenius(sigma):
    """Weight decay, by way of singular values."""
    return sigma.square().sum(-1), 2 * sigma


def test_pruning_and_quantization_in_the_same_trainer():
    """Zeros hold, the penalty belongs to the float weight, and the finalized model has its grid."""

    def fit(strength):
        probe = Gradients()
        low = LowRankRegularization(strength=strength)
        prune = lc.ScheduledPruning(sparsity=0.5, begin=2, end=8, unit="step", every=2)
        qat = lc.QuantizationAwareTraining(4, 4, method="lsq", edge_layers_bits=None)
        lit = Lit()
        first = copy.deepcopy(lit.state_dict())
        trainer(low, probe, prune, qat).fit(lit, loader())
        return lit, first, probe

    lit, first, probe = fit(0.02)
    plain, _, reference = fit(0.0)
    added = probe.seen[0]["net.0.weight"] - reference.seen[0]["net.0.weight"]
    torch.testing.assert_close(added, 0.02 * polar(first["net.0.weight"]), rtol=1e-4, atol=1e-6)
    assert sparsity(lit) == sparsity(plain) == 0.5
    # a mask and the polar factor of one weight disagree, and the entries of the mask stay zero
    final = lc.finalize(lit)
    assert all(len(row.unique()) <= 16 for row in final.net[0].weight.detach())
    small = (effective_rank(lit.net[0].weight), effective_rank(plain.net[0].weight))
    assert small[0] < small[1]


def test_a_place_behind_pruning_is_refused():
    callbacks = [lc.ScheduledPruning(sparsity=0.5), LowRankRegularization()]
    with pytest.raises(MisconfigurationException, match="must come before ScheduledPruning"):
        trainer(*callbacks).fit(Lit(), loader())
    trainer(*reversed(callbacks), max_epochs=1).fit(Lit(), loader())


def test_frozen_unused_and_thin_weights_are_left_alone():
    class Partial(Lit):
        def __init__(self):
            super().__init__()
            self.frozen, self.unused = nn.Linear(8, 3).requires_grad_(False), nn.Linear(8, 3)
            self.thin, self.depthwise = nn.Linear(8, 1), nn.Conv1d(4, 4, 3, groups=4)

        def configure_optimizers(self):
            parts = [self.net, self.unused, self.thin, self.depthwise]
            return torch.optim.SGD([p for m in parts for p in m.parameters()], lr=0.1)

    lit, callback, found = Partial(), LowRankRegularization(strength=0.1), {}

    class See(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            found.update(callback.penalized)

    before = copy.deepcopy(lit.state_dict())
    trainer(callback, See()).fit(lit, loader())
    assert set(found) == {*KEYS, "unused.weight"}
    for key in ("frozen.weight", "unused.weight", "thin.weight", "depthwise.weight"):
        assert torch.equal(before[key], lit.state_dict()[key])


def test_several_optimizers_count_and_update_their_own():
    class Manual(Still):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), lr=1.0) for i in (0, 2)]

    lit, callback = Manual(), LowRankRegularization(strength=0.01, every=4)
    before = {k: lit.get_parameter(k).detach().clone() for k in KEYS}
    trainer(callback, max_epochs=1).fit(lit, loader())
    assert callback.steps == 8
    for key in KEYS:  # two of eight steps; the polar factor stays the same while singular values are positive
        expected = before[key] - 2 * 0.04 * polar(before[key])
        torch.testing.assert_close(lit.get_parameter(key).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_sparse_gradient_is_refused():
    class Bag(Lit):
        def __init__(self):
            super().__init__(nn.Linear(4, 3))
            self.table = nn.Embedding(8, 4, sparse=True)

        def forward(self, x):
            return self.net(self.table(x.abs().long().clamp_max(7)).mean(1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"table\.weight has a sparse gradient.*sparse=False"):
        trainer(LowRankRegularization(include=["table", "net"])).fit(Bag(), loader())


def test_non_finite_weights_name_the_layer():
    lit = Lit()
    lit.net[2].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 of 48 entries of net\.2 are not finite"):
        trainer(LowRankRegularization()).fit(lit, loader())


def test_what_fits_nothing_is_an_error_before_training():
    with pytest.raises(ValueError, match=r"'nett\.0' fits no layer"):
        trainer(LowRankRegularization(include="nett.0")).fit(Lit(), loader())

    class Frozen(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.dim() == 1], lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"(?s)nothing to penalize.*no optimizer updates it"):
        trainer(LowRankRegularization()).fit(Frozen(), loader())
    with pytest.raises(MisconfigurationException, match=r"attribute='body'.*it has: net"):
        trainer(LowRankRegularization(factorize=Factorize(), attribute="body")).fit(Lit(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "schatten"},
            "kind='schatten' is unknown; allowed: nuclear, entropy, l1_l2, hoyer, scad, ortho",
        ),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": math.inf}, "strength=inf"),
        (
            {"kind": "scad"},
            "kind='scad': missing a required argument: 'lam'; options of this kind: lam.*a.*3.7",
        ),
        ({"kind": "scad", "options": {"lam": 0.0}}, "lam > 0"),
        ({"kind": "entropy", "options": {"squared": True}}, "'squared'; options of this kind: distribution"),
        ({"kind": "hoyer", "proximal": True}, "proximal=True with kind='hoyer'"),
        ({"kind": "truncate"}, "kind='truncate' needs it"),
        ({"energy_ratio": 0.9}, "energy_ratio=0.9 with kind='nuclear'"),
        ({"kind": "truncate", "energy_ratio": 1.5}, "0 < energy_ratio <= 1"),
        ({"matrix": "row"}, "matrix='row' is unknown; allowed: auto, "),
        ({"matrix": {"net*": "row"}}, "matrix='row' is unknown"),
        ({"every": 0}, "every=0"),
        ({"begin": 0.8, "end": 0.2}, "before it begins"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LowRankRegularization(**options)


# -- the factorized copy -------------------------------------------------------------------------------------


def test_a_factorized_copy_is_made_at_the_end_and_the_module_stays():
    callback = LowRankRegularization(
        strength=0.02, factorize=Factorize(rank_ratio=0.25, force=True), attribute="net"
    )
    lit = Lit()
    x, keys = torch.randn(4, 8), list(lit.state_dict())
    trainer(callback).fit(lit, loader())
    thin = callback.factorized
    assert type(lit.net[0]) is nn.Linear and list(lit.state_dict()) == keys
    assert thin[0].first.out_features == 2 and not thin.training
    product = thin[0].second.weight @ thin[0].first.weight
    u, s, vh = torch.linalg.svd(lit.net[0].weight.detach().double())
    torch.testing.assert_close(product.detach().double(), (u[:, :2] * s[:2]) @ vh[:2], rtol=0, atol=1e-6)
    torch.testing.assert_close(pickle.loads(pickle.dumps(callback)).factorized(x), thin(x))
    trainer(callback).fit(lit, loader())
    assert callback.factorized is not thin


def test_the_copy_may_look_at_inputs():
    """The shape of the first batch is enough for inputs to be drawn and MACs to be counted."""
    for factorize in (Factorize(rank_ratio=0.25, activation_aware=True), Factorize(budget=("macs", 0.7))):
        callback = LowRankRegularization(factorize=factorize)
        trainer(callback).fit(Lit(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 3))), loader())
        assert isinstance(callback.factorized, Lit)
        assert callback.factorized.net[1].__class__.__name__ in ("Factors", "Linear")


def test_a_copy_that_cannot_be_made_is_a_warning():
    callback = LowRankRegularization(factorize=Factorize(rank=8), attribute="net")
    with pytest.warns(UserWarning, match=r"(?s)makes no factorized copy.*nothing"):
        trainer(callback).fit(Lit(), loader())
    assert callback.factorized is None


# -- resume --------------------------------------------------------------------------------------------------


class Crash(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(
    "options",
    [
        {"every": 3, "schedule": "linear"},
        {"every": 3, "proximal": True},
        {"kind": "truncate", "energy_ratio": 0.9, "every": 5},
    ],
)
def test_resume_equals_the_uninterrupted_run(tmp_path, options):
    def run(*callbacks, ckpt=None):
        lit = Lit()
        low = LowRankRegularization(**{"strength": 0.02, **options})
        trainer(low, *callbacks, max_steps=16, max_epochs=-1).fit(lit, loader(4, 4), ckpt_path=ckpt)
        return lit, low

    whole, a = run()
    with pytest.raises(RuntimeError, match="power cut"):
        run(Crash(8), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1))
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again, b = run(ckpt=tmp_path / "last.ckpt")
    assert equal(dict(whole.state_dict()), dict(again.state_dict()))
    assert a.steps == b.steps == 16 and equal(a.state_dict(), b.state_dict())


def fit(folder, *callbacks, resume=False):
    torch.manual_seed(0)
    head = nn.Conv2d(4, 6, 2), nn.Flatten(), nn.Linear(6, 3)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)), *head)
    low = LowRankRegularization(strength=0.02, schedule="linear", every=3)
    lit = Lit(net)
    t = trainer(low, saving(folder), *callbacks, max_epochs=3)
    t.fit(lit, Resumable(loader(64)), ckpt_path=folder / "last.ckpt" if resume else None)
    return {
        "weights": dict(lit.state_dict()),
        "state": low.state_dict(),
        "optimizer": t.optimizers[0].state_dict(),
    }


def test_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    end = fit(whole)
    saved = kill("test_lowrank_regularization", cut, step=22)
    assert saved == 21 and saved % 16  # in the middle of an epoch
    assert equal(end, fit(cut, resume=True))
    assert end["state"]["schemes"].keys() == {"net.0.weight", "net.3.weight", "net.5.weight"}


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import lightning.pytorch as pl
import torch
from lightning_compress.callbacks.regularization import LowRankRegularization
from lit import loader, trainer
from test_lowrank_regularization import SGD


class Rank(pl.Callback):
    def on_train_end(self, t, module):
        torch.save(module.state_dict(), f"{{t.world_size}}-{{t.global_rank}}.pt")


class Split(torch.utils.data.Sampler):
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


for devices in (2, 1):
    options = {{"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}} if devices == 2 else {{}}
    low = LowRankRegularization(strength=0.02, every=2)
    trainer(low, Rank(), max_epochs=3, **options).fit(SGD(), datamodule=Data())
"""


def test_two_ranks_have_the_weights_of_one_process(tmp_path):
    (tmp_path / "run.py").write_text(RANKS.format(tests=str(TESTS)))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b, one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("2-0", "2-1", "1-0"))
    assert equal(dict(a), dict(b))
    for key in a:
        torch.testing.assert_close(a[key], one[key], rtol=1e-5, atol=1e-6)


# -- the rest ------------------------------------------------------------------------------------------------


def test_two_named_instances_have_tags_and_states_of_their_own(tmp_path):
    log = CSVLogger(tmp_path)
    both = [
        LowRankRegularization(strength=0.01, include="net.0", name="first"),
        LowRankRegularization("hoyer", 0.01, include="net.2", name="last"),
    ]
    assert both[0].state_key != both[1].state_key
    run = trainer(*both, logger=log, log_every_n_steps=1)
    run.fit(Lit(), loader())
    assert column(log, "compress/first/effective_rank") and column(log, "compress/last/penalty")
    assert {"compress/first/penalty", "compress/last/effective_rank"} <= set(run.callback_metrics)


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}, {"max_epochs": 0}]
)
def test_short_and_bare_runs(options):
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "max_epochs": 1, "enable_checkpointing": False}
    callback = LowRankRegularization("truncate", energy_ratio=0.5)
    with pytest.warns() if options.get("barebones") else contextlib.nullcontext():
        pl.Trainer(**{**quiet, **options, "callbacks": [callback]}).fit(Lit(), loader(), loader())


def test_an_endless_training_needs_no_length_while_the_strength_is_constant():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 5

    trainer(LowRankRegularization(), Stop(), max_epochs=-1).fit(Lit(), loader())
    with pytest.raises(ValueError, match="no known length"):
        trainer(LowRankRegularization(schedule="linear"), Stop(), max_epochs=-1).fit(Lit(), loader())


def test_copies_hold_nothing_of_the_run():
    callback, seen = LowRankRegularization(factorize=Factorize(rank=1)), []

    class Copies(pl.Callback):
        def on_train_batch_end(self, *args):
            twin = copy.deepcopy(callback)
            seen.append((len(callback.penalized), len(twin.penalized), len(twin._undo), twin.steps))

    trainer(callback, Copies(), max_epochs=1).fit(Lit(), loader())
    assert seen == [(2, 0, 0, t + 1) for t in range(8)] and not callback.penalized
    assert pickle.loads(pickle.dumps(callback)).steps == 8


def test_the_benchmark_of_its_overhead_runs(monkeypatch, capsys):
    for folder in (RECIPES, RECIPES / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    main = importlib.import_module("lowrank_overhead").main
    main(["--steps", "4", "--warmup", "1", "--batch-size", "4", "--only", "nuclear", "nuclear, in the loss"])
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in printed for name in ("plain", "nuclear", "nuclear, in the loss"))
