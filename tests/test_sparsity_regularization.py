"""SparsityRegularization in a Trainer: what is added, when, to what; activations, proximal steps, growing, resume."""

import contextlib
import copy
import importlib
import math
import pickle
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from killed import Resumable, equal, kill, saving
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, sparsity, trainer
from test_lowrank_regularization import (
    KEYS,
    RANKS,
    RECIPES,
    SGD,
    TESTS,
    Any,
    Crash,
    Gradients,
    Still,
    column,
    fno,
    once,
)
from torch import nn
from torch.nn import functional as F

import lightning_compress as lc
from lightning_compress.callbacks.sparsity import SparsityRegularization
from lightning_compress.functional.groups import PerGroup


def amp(scale):
    """A gradient scaler on the CPU, or nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    return [MixedPrecision("16-mixed", "cpu", scaler)] if scale else []


class SinglePrecision(pl.Callback):
    """Single precision under the scaler, so that results can be compared closely."""

    def on_train_start(self, trainer, pl_module):
        trainer.precision_plugin.forward_context = contextlib.nullcontext


def lasso(w):
    """Group lasso over output rows, for autograd."""
    rows = w.flatten(1)
    return math.sqrt(rows.shape[1]) * rows.square().sum(1).sqrt().sum()


def ratio(w):
    norms = w.flatten(1).square().sum(1).sqrt()
    return norms.sum() / norms.square().sum().sqrt()


PENALTIES = {
    "l1": lambda w: w.abs().sum(),
    "l2": lambda w: w.abs().square().sum(),
    "group_lasso": lasso,
    "l1_l2_intra": lambda w: (w.flatten(1).abs().sum(1) / w.flatten(1).norm(dim=1)).mean(),
    "l1_l2_inter": ratio,
    "hoyer": lambda w: (
        (w.flatten(1).abs().sum(1) / w.flatten(1).norm(dim=1) - 1) / (math.sqrt(w[0].numel()) - 1)
    ).mean(),
    "scad": lambda w: torch.where(
        w.abs() <= 0.1,
        0.1 * w.abs(),
        torch.where(
            w.abs() <= 0.37, (0.74 * w.abs() - w**2 - 0.01) / 5.4, torch.full_like(w, 4.7 * 0.01 / 2)
        ),
    ).sum(),
}
OPTIONS = {"scad": {"lam": 0.1}}


# -- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PENALTIES)
def test_accumulation_clipping_and_a_gradient_scaler_give_the_step_computed_by_hand(kind):
    lit = SGD(nn.Sequential(nn.Linear(8, 3, bias=False)))
    before, batches = lit.net[0].weight.detach().clone(), list(loader())[:4]
    trainer(
        SparsityRegularization(kind, 0.3, **OPTIONS.get(kind, {})),
        SinglePrecision(),
        max_steps=1,
        max_epochs=-1,
        accumulate_grad_batches=4,
        gradient_clip_val=0.2,
        plugins=amp(1024.0),
    ).fit(lit, loader())

    layer = nn.Linear(8, 3, bias=False)
    layer.weight.data = before.clone()
    for x, y in batches:
        (F.cross_entropy(layer(x), y) / 4).backward()
    weight = before.double().requires_grad_()
    PENALTIES[kind](weight).backward()
    total = layer.weight.grad + 0.3 * weight.grad.float()
    expected = before - 0.1 * total * min(1.0, 0.2 / (float(total.norm()) + 1e-6))
    torch.testing.assert_close(lit.net[0].weight.detach(), expected, rtol=1e-6, atol=1e-7)
    assert (expected - before).norm() == pytest.approx(0.02, rel=1e-4)  # the clip was at work
    assert weight.grad.norm() > 1e-2


@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("optimizer", ["sgd", "fused", "lbfgs"])
def test_equals_a_term_of_the_loss(optimizer, scale):
    if (optimizer, scale) == ("lbfgs", 256.0):
        pytest.skip("closures that run several times cannot be scaled")

    class Plain(Lit):
        strength = 0.0

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            with torch.autocast("cpu", enabled=False):
                return loss + self.strength * sum(lasso(self.get_parameter(k)) for k in KEYS)

        def configure_optimizers(self):
            return {
                "sgd": lambda: torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9),
                "fused": lambda: torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-3, fused=True),
                "lbfgs": lambda: torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2),
            }[optimizer]()

    def fit(*callbacks, strength=0.0):
        lit = Plain()
        lit.strength = strength
        trainer(*callbacks, plugins=amp(scale), max_epochs=1).fit(lit, loader())
        return lit

    ours, reference, without = fit(SparsityRegularization("group_lasso", 0.1)), fit(strength=0.1), fit()
    for key in KEYS:
        a, b, c = (m.get_parameter(key).detach() for m in (ours, reference, without))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        assert (a - c).abs().max() > 1e-3


def test_every_second_step_has_twice_the_strength_along_the_schedule():
    probe = Gradients()
    callback = SparsityRegularization(
        strength=0.2, schedule="linear", every=2, begin=2, end=10, unit="step", include="net.0"
    )
    trainer(callback, probe).fit(Still(lr=0.0), loader())
    signs = Still().net[0].weight.detach().sign()
    for t, seen in enumerate(probe.seen):
        share = min((t - 2) / 8, 1.0) if t >= 2 and t % 2 == 0 else 0.0
        torch.testing.assert_close(seen["net.0.weight"], 2 * 0.2 * share * signs)
        assert not seen["net.2.weight"].any()
    assert len(probe.seen) == 16 and callback.span == (2, 10)


def grouped_lasso(w, rows):
    """``rows(w)`` [G, n] of a double-precision leaf, and the gradient."""
    leaf = w.detach().to(torch.complex128 if w.is_complex() else torch.float64).requires_grad_()
    found = rows(leaf)
    (math.sqrt(found.shape[1]) * found.abs().square().sum(1).sqrt()).sum().backward()
    return leaf.grad.to(w.dtype)


LAYERS = {
    "linear": (nn.Linear(6, 4), "weight", "channel", lambda w: w),
    "linear, inputs": (nn.Linear(6, 4), "weight", "input", lambda w: w.T),
    "runs": (nn.Linear(6, 4), "weight", PerGroup(3), lambda w: w.reshape(8, 3)),
    "conv": (nn.Conv2d(3, 5, 3), "weight", "channel", lambda w: w.flatten(1)),
    "conv, inputs": (nn.Conv2d(3, 5, 3), "weight", "input", lambda w: w.transpose(0, 1).flatten(1)),
    "conv, runs": (nn.Conv2d(3, 5, 3), "weight", "per_group:9", lambda w: w.reshape(15, 9)),
    "grouped, inputs": (
        nn.Conv2d(4, 6, 3, groups=2),
        "weight",
        "input",
        lambda w: w.reshape(2, 3, 2, 9).transpose(1, 2).reshape(4, 27),
    ),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), "weight", "channel", lambda w: w.flatten(1)),
    "transposed": (nn.ConvTranspose1d(4, 6, 3), "weight", "channel", lambda w: w.transpose(0, 1).flatten(1)),
    "grouped transposed": (
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        "weight",
        "channel",
        lambda w: w.reshape(2, 2, 3, 3).transpose(1, 2).reshape(6, 6),
    ),
    "attention": (nn.MultiheadAttention(4, 2), "in_proj_weight", "channel", lambda w: w),
    "complex": (nn.Linear(6, 4, dtype=torch.complex64), "weight", "channel", lambda w: w),
    "whole layer": (nn.Linear(6, 4), "weight", "layer", lambda w: w.reshape(1, 24)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_groups_of_every_kind_of_layer(kind):
    layer, param, grouping, rows = LAYERS[kind]
    callback = SparsityRegularization("group_lasso", 0.5, grouping=grouping, include="net.0")
    before, after = once(callback, Any(layer))
    weight = before[f"net.0.{param}"]
    expected = weight - 0.5 * grouped_lasso(weight, rows)
    torch.testing.assert_close(after[f"net.0.{param}"], expected, rtol=1e-5, atol=1e-6)


SPECTRAL = "net.0.fno_blocks.convs.0.weight.tensor"  # [in, out, 4, 3], complex


@pytest.mark.parametrize("proximal", [False, True])
def test_spectral_weights_by_channel(proximal):
    callback = SparsityRegularization("group_lasso", 0.01, proximal=proximal, include="*convs*")
    before, after = once(callback, Any(fno()))
    rows = before[SPECTRAL].transpose(0, 1).flatten(1).numpy().astype(complex)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    expected = rows * np.maximum(1 - 0.01 * 6 / norms, 0)  # sqrt of 3 x 4 x 3 entries
    got = after[SPECTRAL].transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)
    assert norms.min() > 0.01 * 6  # else the gradient would overshoot, and the two differ


def test_half_parameters_are_penalized_in_single_precision():
    layer = nn.Linear(300, 4).half()
    layer.weight.data *= 3000
    before, after = once(SparsityRegularization("group_lasso", 100.0, include="net.0"), Any(layer))
    weight = before["net.0.weight"]
    expected = weight.float() - 100 * grouped_lasso(weight.float(), lambda w: w)
    torch.testing.assert_close(after["net.0.weight"].float(), expected, rtol=2e-3, atol=0.25)


class Normed(SGD):
    def __init__(self, **options):
        torch.manual_seed(0)
        super().__init__(
            nn.Sequential(
                nn.Linear(8, 16),
                nn.BatchNorm1d(16),
                nn.ReLU(),
                nn.Linear(16, 3),
                nn.BatchNorm1d(3, affine=False),
            ),
            **options,
        )


def test_scales_of_batchnorm():
    """Network slimming: gammas shrink, all else moves as without."""
    lit, plain = Normed(), Normed()
    trainer(SparsityRegularization("l1", 0.1, on="batchnorm_scale"), max_steps=1, max_epochs=-1).fit(
        lit, loader()
    )
    trainer(max_steps=1, max_epochs=-1).fit(plain, loader())
    for (key, a), b in zip(lit.named_parameters(), plain.parameters(), strict=True):
        moved = 0.1 * 0.1 if key == "net.1.weight" else 0.0  # every gamma is positive
        torch.testing.assert_close(a, b - moved)


def test_proximal_slimming_makes_zeros_and_patterns_choose_the_layers():
    lit = Normed(lr=0.5)
    callback = SparsityRegularization("l1", 0.3, on="batchnorm_scale", proximal=True, include="net.1")
    trainer(callback).fit(lit, loader())
    assert 0 < int((lit.net[1].weight == 0).sum()) <= 16
    with pytest.raises(ValueError, match=r"'net\.0' fits no BatchNorm layer; these are: net\.1, net\.4"):
        trainer(SparsityRegularization("l1", on="batchnorm_scale", include="net.0")).fit(Normed(), loader())
    for options, reason in (
        ({"include": "net.4"}, r"net\.4: it has no scale \(affine=False\)"),
        ({"exclude": "net.1"}, r"net\.1\.weight: excluded by 'net\.1'"),
    ):
        with pytest.raises(MisconfigurationException, match=rf"(?s)nothing to penalize.*{reason}"):
            trainer(SparsityRegularization(on="batchnorm_scale", **options)).fit(Normed(), loader())


def test_the_scales_are_one_group_with_grouping_layer():
    lit = Normed()
    lit.net[1].weight.data = torch.linspace(0.1, 1, 16)
    gamma = lit.net[1].weight.detach().double().requires_grad_()
    (gamma.sum() / gamma.norm() - 1).div(3).backward()  # sqrt(16) - 1
    callback = SparsityRegularization("hoyer", 0.1, on="batchnorm_scale", grouping="layer", include="net.1")
    probe = Gradients()
    trainer(callback, probe, max_steps=1, max_epochs=-1).fit(lit, loader())
    plain, reference = Normed(), Gradients()
    plain.net[1].weight.data = torch.linspace(0.1, 1, 16)
    trainer(reference, max_steps=1, max_epochs=-1).fit(plain, loader())
    added = probe.seen[0]["net.1.weight"] - reference.seen[0]["net.1.weight"]
    torch.testing.assert_close(added, 0.1 * gamma.grad.float(), rtol=1e-4, atol=1e-6)


def test_groups_that_make_a_penalty_constant_are_left_alone_with_the_reason():
    for options, reason in (
        ({"kind": "hoyer", "grouping": "element"}, "groups have one entry each, for which hoyer is constant"),
        ({"kind": "l1_l2_intra", "grouping": "per_group:1"}, "try grouping='layer'"),
        ({"kind": "l1_l2_inter", "grouping": "layer"}, "it is one group, and l1_l2_inter needs several"),
        ({"kind": "growing", "grouping": "layer"}, "it is one group, and growing needs several"),
    ):
        with pytest.raises(MisconfigurationException, match=f"(?s)nothing to penalize.*{reason}"):
            trainer(SparsityRegularization(**options)).fit(Lit(), loader())


def test_frozen_and_unused_weights_and_several_optimizers():
    class Partial(Still):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.frozen, self.unused = nn.Linear(8, 3).requires_grad_(False), nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

        def configure_optimizers(self):
            parts = [(self.net[0], self.unused), (self.net[2],)]
            return [torch.optim.SGD([p for m in ms for p in m.parameters()], lr=1.0) for ms in parts]

    lit, callback = Partial(), SparsityRegularization("l2", 0.01, every=4)
    before = copy.deepcopy(lit.state_dict())
    trainer(callback, max_epochs=1).fit(lit, loader())
    assert callback.steps == 8
    for key in KEYS:  # two of eight steps
        torch.testing.assert_close(lit.state_dict()[key], before[key] * (1 - 2 * 4 * 0.01) ** 2)
    for key in ("frozen.weight", "unused.weight"):
        assert torch.equal(before[key], lit.state_dict()[key])


def test_a_rule_of_ones_own_by_import_path_or_as_a_function():
    def cubes(u, power=3):
        return (u**power).sum(-1), power * u ** (power - 1)

    for kind in (cubes, "test_sparsity_regularization.cubes"):
        before, after = once(SparsityRegularization(kind, 0.1), Any(nn.Linear(4, 3)))
        weight = before["net.0.weight"]
        torch.testing.assert_close(after["net.0.weight"], weight - 0.3 * weight * weight.abs())
    with pytest.raises(ValueError, match=r"'depth'; options of this kind: power=3"):
        SparsityRegularization(cubes, depth=2)


def cubes(u):
    return (u**3).sum(-1), 3 * u**2


# -- activations -----------------------------------------------------------------------------------------------


class Seen(SGD):
    """Collects outputs by itself, and adds the penalty to its loss if asked to."""

    names = ()
    rule = None
    strength = 0.0

    def training_step(self, batch, batch_idx):
        outputs = []
        hooks = [
            self.get_submodule(n).register_forward_hook(lambda m, a, o: outputs.append(o.clone()))
            for n in self.names
        ]
        loss = super().training_step(batch, batch_idx)
        for hook in hooks:
            hook.remove()
        return loss + self.strength * sum(self.rule(o) for o in outputs) if self.strength else loss


class Twice(nn.Module):
    """A convolution that runs twice, whose first output is overwritten in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Linear(8, 8), nn.Conv1d(2, 2, 3, padding=1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(self.stem(x).view(-1, 2, 4))
        x = self.act(x.mul_(1.5))
        return self.head(self.conv(x).flatten(1))


def channel_ratio(a, axis=1, order=2):
    rows = a.movedim(axis, 0).flatten(1)
    v = rows.abs().sum(1) if order == 1 else rows.square().sum(1).sqrt()
    return v.sum() / v.square().sum().sqrt()


ACTIVATIONS = {
    "activation_l1": (lambda a: a.abs().mean(), {}),
    "activation_l2": (lambda a: a.square().mean(), {}),
    "activation_l1_l2": (channel_ratio, {}),
    "activation_l1_l2, l1": (lambda a: channel_ratio(a, 1, 1), {"norm": "l1"}),
    "activation_l1_l2, axis": (lambda a: channel_ratio(a, 0), {"channel_axis": 0}),
}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_updates_are_those_of_loss_plus_penalty(kind, scale):
    """With accumulation, clipping, a scaler, a layer that runs twice, outputs that are overwritten in place."""
    rule, options = ACTIVATIONS[kind]

    def fit(*callbacks, strength=0.0):
        torch.manual_seed(3)
        lit = Seen(Twice())
        lit.names, lit.rule, lit.strength = ("net.stem", "net.conv", "net.act"), rule, strength
        trainer(
            *callbacks,
            SinglePrecision(),
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            plugins=amp(scale),
            max_epochs=1,
        ).fit(lit, loader())
        return lit

    callback = SparsityRegularization(
        kind.split(",")[0], 0.5, include=["net.stem", "net.conv", "net.act"], **options
    )
    ours, reference, without = fit(callback), fit(strength=0.5), fit()
    assert callback.steps == 4
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    moved = [
        float((a - c).detach().abs().max())
        for a, c in zip(ours.parameters(), without.parameters(), strict=True)
    ]
    assert max(moved) > 1e-3
    assert not any(m._forward_hooks for m in ours.modules())


def test_every_second_step_penalizes_activations_twice_along_the_schedule():
    lit, probe = Still(nn.Sequential(nn.Linear(8, 3)), lr=0.0), Gradients()
    lit.net[0].weight.data.zero_()
    lit.net[0].bias.data = torch.tensor([5.0, -5.0, 5.0])
    callback = SparsityRegularization(
        "activation_l1", 0.2, schedule="linear", every=2, begin=2, end=10, unit="step"
    )
    trainer(callback, probe).fit(lit, loader())
    for t, seen in enumerate(probe.seen):
        share = min((t - 2) / 8, 1.0) if t >= 2 and t % 2 == 0 else 0.0
        expected = 2 * 0.2 * share * torch.tensor([1.0, -1.0, 1.0]) / 3
        torch.testing.assert_close(seen["net.0.bias"], expected)


def test_linear_layers_have_their_channels_last():
    net = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 5), nn.Flatten(), nn.Linear(10, 3))

    def fit(*callbacks, strength=0.0):
        lit = Seen(copy.deepcopy(net))
        lit.names, lit.rule, lit.strength = ("net.1",), lambda a: channel_ratio(a, 2), strength
        trainer(*callbacks).fit(lit, loader())
        return lit

    a, b = fit(SparsityRegularization("activation_l1_l2", 0.3, include="net.1")), fit(strength=0.3)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


class Physics(Seen):
    """Derivatives by inputs in the training step and in validation, and a pass without gradients."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        with torch.no_grad():
            self(x)
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        self.slopes = [*getattr(self, "slopes", []), slope.detach()]
        return super().training_step(batch, batch_idx) + slope.square().mean()

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            x = batch[0].clone().requires_grad_()
            loss = self(x).square().sum()
            self.checked = [*getattr(self, "checked", []), *torch.autograd.grad(loss, x)]


def test_other_gradients_and_validation_are_left_alone():
    """The outputs of both passes that require gradients are penalized, and no derivative is."""
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def fit(strength, *callbacks):
        torch.manual_seed(0)
        lit = Physics(copy.deepcopy(net), lr=0.0)
        probe = Gradients()
        trainer(*callbacks, probe, max_epochs=1, inference_mode=False).fit(lit, loader(), loader())
        return lit, probe

    ours, added = fit(0.0, SparsityRegularization("activation_l2", 10.0, include="net.0"))
    plain, without = fit(0.0)
    assert equal(ours.slopes, plain.slopes) and equal(ours.checked, plain.checked)
    first = nn.Linear(8, 6)
    first.load_state_dict(net[0].state_dict())
    x = next(iter(loader()))[0]
    (20 * first(x).square().mean()).backward()  # two passes
    difference = added.seen[0]["net.0.weight"] - without.seen[0]["net.0.weight"]
    torch.testing.assert_close(difference, first.weight.grad, rtol=1e-4, atol=1e-5)


def test_manual_optimization_has_the_penalty_once_for_every_backward():
    class Manual(Still):
        def __init__(self, net):
            super().__init__(net)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.seen = [*getattr(self, "seen", []), self.net[0].bias.grad.clone()]
            optimizer.step()

    lit = Manual(nn.Sequential(nn.Linear(8, 3)))
    lit.net[0].bias.data = torch.tensor([50.0, -50.0, 50.0])
    trainer(SparsityRegularization("activation_l1", 0.2), max_epochs=1).fit(lit, loader())
    assert len(lit.seen) == 8
    for gradient in lit.seen:
        torch.testing.assert_close(gradient, torch.tensor([0.2, -0.2, 0.2]) / 3)


def test_activation_checkpointing_runs_layers_again_and_counts_them_once():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.reentrant = reentrant

        def forward(self, x):
            x = self.stem(x)
            if self.reentrant is not None:
                x = torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)
            else:
                x = self.body(x)
            return self.head(x.tanh())

    ends = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        lit = SGD(Checkpointed(reentrant))
        trainer(SparsityRegularization("activation_l2", 1.0)).fit(lit, loader())
        ends.append(dict(lit.state_dict()))
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[2])


def test_compiled_networks_have_their_activations_penalized():
    def fit(*callbacks, backend=None):
        torch.compiler.reset()
        lit = Lit()
        if backend:
            lit.net = torch.compile(lit.net, backend=backend)
            lit(torch.ones(4, 8)).sum().backward()  # compiled before the hooks are there
            lit.zero_grad()
        trainer(*callbacks).fit(lit, loader())
        return [p.detach() for p in lit.parameters()]

    eager, compiled, plain = (
        fit(SparsityRegularization("activation_l2", 1.0)),
        fit(SparsityRegularization("activation_l2", 1.0), backend="eager"),
        fit(),
    )
    for a, b, c in zip(eager, compiled, plain, strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, c)


def test_layers_that_do_not_run_are_named_in_a_warning():
    class Idle(Lit):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(8, 3)

    with pytest.warns(UserWarning, match="first step met no gradient of the outputs of idle:") as caught:
        trainer(SparsityRegularization("activation_l1")).fit(Idle(), loader())
    assert sum("met no gradient" in str(w.message) for w in caught) == 1


def test_an_output_that_is_overwritten_only_later_is_an_error():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.ran = nn.Linear(8, 4), nn.Linear(4, 3), 0

        def forward(self, x):
            self.ran += 1
            x = self.first(x)
            return self.last(x.mul_(2) if self.ran == 3 else x * 2)

    with pytest.raises(RuntimeError, match=r"output of net\.first was overwritten in place.*inplace=False"):
        trainer(SparsityRegularization("activation_l2", include="net.first")).fit(Lit(Sometimes()), loader())


def test_layers_without_outputs_to_penalize():
    with pytest.raises(ValueError, match=r"'net\.9' fits no layer; these are: net, net\.0"):
        trainer(SparsityRegularization("activation_l1", include="net.9")).fit(Lit(), loader())
    with pytest.raises(MisconfigurationException, match="nothing to penalize"):
        trainer(SparsityRegularization("activation_l1", exclude=["net.0", "net.2"])).fit(Lit(), loader())


def test_activations_get_smaller_and_the_share_near_zero_is_logged(tmp_path):
    ends = {}
    for strength in (0.0, 1.0):
        log = CSVLogger(tmp_path, version=f"v{strength}")
        lit = Lit()
        callback = SparsityRegularization("activation_l1", strength, include="net.1")
        trainer(callback, logger=log, log_every_n_steps=4, max_epochs=6).fit(lit, loader())
        shares = column(log, "compress/near_zero")
        ends[strength] = shares[47]
        assert column(log, "compress/near_zero/net.1")[47] == shares[47]
        if strength:
            penalty = column(log, "compress/penalty")
            assert penalty[47] < 0.5 * penalty[3]
    x = list(loader())[-1][0]
    active = lit.net[1](lit.net[0](x))
    assert ends[0.0] < ends[1.0]
    assert ends[1.0] == pytest.approx(float((active <= 0.01 * active.mean()).float().mean()), abs=0.1)


# -- proximal steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l1", "group_lasso"])
def test_a_proximal_step_shrinks_with_the_rate_of_its_group(kind):
    class Groups(Still):
        def configure_optimizers(self):
            a, b = ({"params": self.net[i].parameters(), "lr": lr} for i, lr in ((0, 0.5), (2, 0.1)))
            return torch.optim.SGD([a, b], lr=9.0)

    lit = Groups()
    before = {k: lit.get_parameter(k).detach().double().numpy() for k in KEYS}
    callback = SparsityRegularization(kind, 0.2, proximal=True, every=2)
    trainer(callback, max_steps=2, max_epochs=-1).fit(lit, loader())  # the first of the two is due
    zeros = 0
    for key, rate in zip(KEYS, (0.5, 0.1), strict=True):
        w, t = before[key], rate * 0.2 * 2
        if kind == "l1":
            expected = np.sign(w) * np.maximum(np.abs(w) - t, 0)
        else:
            norms = np.linalg.norm(w, axis=1, keepdims=True)
            expected = w * np.maximum(1 - t * math.sqrt(w.shape[1]) / norms, 0)
        got = lit.get_parameter(key).detach().numpy()
        np.testing.assert_allclose(got, expected, atol=1e-7)
        assert np.array_equal(got == 0, expected == 0)
        zeros += int((got == 0).sum())
    assert zeros


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{"proximal": True}, {}, {"kind": "growing"}, {"kind": "activation_l1"}])
def test_steps_skipped_by_amp_do_not_shrink(options, fused):
    class Overflow(Still):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.net[0].weight.sum() * math.inf

    lit = Overflow(fused=fused)
    before = copy.deepcopy(lit.state_dict())
    callback = SparsityRegularization(strength=0.4, **options)
    trainer(callback, plugins=amp(2.0)).fit(lit, loader())
    assert callback.steps == 0 and equal(dict(lit.state_dict()), dict(before))


def test_zeros_of_a_proximal_fit_are_kept_by_what_follows():
    lit = SGD(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    trainer(SparsityRegularization("group_lasso", 0.05, proximal=True, include="net.0"), max_epochs=6).fit(
        lit, loader()
    )
    rows = (lit.net[0].weight == 0).all(1)
    assert 2 <= int(rows.sum()) <= 14
    pruned = lc.compress(lit.net, [lc.Prune(0.0, infer_masks=True)]).model
    tuned = SGD(pruned)
    trainer(lc.ScheduledPruning(sparsity=0.0), max_epochs=2).fit(tuned, loader())
    assert torch.equal((tuned.net[0].weight == 0).all(1), rows)
    assert not torch.equal(tuned.net[0].weight, lit.net[0].weight)


# -- growing ---------------------------------------------------------------------------------------------------


def test_growing_pushes_the_lowest_groups_with_a_strength_that_grows():
    lit, probe = Still(lr=0.0), Gradients()
    w = lit.net[0].weight.detach().clone()
    callback = SparsityRegularization(
        "growing",
        0.1,
        share=0.25,
        step=0.2,
        ceiling=0.6,
        interval=3,
        begin=2,
        unit="step",
        end=2,
        include="net.0",
    )
    trainer(callback, probe).fit(lit, loader())
    low = w.abs().mean(1).argsort()[:4]
    for t, seen in enumerate(probe.seen):
        strength = 0.0 if t < 2 else min(0.1 + 0.2 * ((t - 2) // 3), 0.6)
        expected = torch.zeros_like(w)
        expected[low] = 2 * strength * w[low]
        torch.testing.assert_close(seen["net.0.weight"], expected)


def test_growing_empties_what_it_pushes_and_leaves_the_rest():
    lit = Still(lr=0.1)
    before = {k: lit.get_parameter(k).detach().clone() for k in KEYS}
    callback = SparsityRegularization("growing", 0.5, grouping="input", step=0.5, ceiling=4.0, interval=2)
    trainer(callback, max_epochs=4).fit(lit, loader())
    for key, total in zip(KEYS, (8, 16), strict=True):
        scores = before[key].abs().mean(0)
        low = scores.argsort()[: total // 2]
        kept = [i for i in range(total) if i not in low]
        now = lit.get_parameter(key).detach()
        assert now[:, low].abs().max() < 1e-3 and torch.equal(now[:, kept], before[key][:, kept])


# -- logging ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PENALTIES)
def test_every_penalty_falls_when_nothing_else_pulls(tmp_path, kind):
    log = CSVLogger(tmp_path)
    callback = SparsityRegularization(kind, 0.01, **OPTIONS.get(kind, {}))
    lit = Still(lr=2.0 if kind == "l1_l2_inter" else 0.02)
    trainer(callback, logger=log, log_every_n_steps=1, max_epochs=3).fit(lit, loader())
    curve = column(log, "compress/penalty")
    values = [curve[step] for step in sorted(curve)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.9999 * values[0]
    total = sum(float(PENALTIES[kind](lit.get_parameter(k).detach().double())) for k in KEYS)
    assert values[-1] == pytest.approx(0.01 * total, rel=1e-5)


def test_near_zero_is_the_share_of_groups_without_weight(tmp_path):
    log = CSVLogger(tmp_path)
    lit = Still(lr=0.0)
    lit.net[0].weight.data[[1, 5, 6]] *= 1e-3
    lit.net[2].weight.data[2] = 0
    trainer(SparsityRegularization("group_lasso"), logger=log).fit(lit, loader())
    assert column(log, "compress/near_zero")[15] == pytest.approx(4 / 19)
    assert column(log, "compress/near_zero/net.0")[15] == pytest.approx(3 / 16)
    assert column(log, "compress/near_zero/net.2")[15] == pytest.approx(1 / 3)


def test_two_named_instances_have_tags_and_states_of_their_own(tmp_path):
    log = CSVLogger(tmp_path)
    both = [
        SparsityRegularization(strength=0.01, include="net.0", name="first"),
        SparsityRegularization("activation_l2", 0.01, include="net.2", name="last"),
    ]
    assert both[0].state_key != both[1].state_key
    run = trainer(*both, logger=log, log_every_n_steps=1)
    run.fit(Lit(), loader())
    assert column(log, "compress/first/near_zero") and column(log, "compress/last/penalty")
    assert {"compress/first/penalty", "compress/last/near_zero"} <= set(run.callback_metrics)


def test_two_without_names_would_share_their_tags():
    both = [SparsityRegularization(), lc.LowRankRegularization()]
    with pytest.raises(MisconfigurationException, match=r"SparsityRegularization and LowRank.*name="):
        trainer(*both).fit(Lit(), loader())
    trainer(both[0], lc.LowRankRegularization(name="ranks"), max_epochs=1).fit(Lit(), loader())


# -- with others -----------------------------------------------------------------------------------------------


def test_pruning_and_quantization_in_the_same_trainer():
    def fit(strength):
        probe = Gradients()
        penalty = SparsityRegularization("group_lasso", strength)
        prune = lc.ScheduledPruning(sparsity=0.5, begin=2, end=8, unit="step", every=2)
        qat = lc.QuantizationAwareTraining(4, 4, method="lsq", edge_layers_bits=None)
        lit = Lit()
        first = copy.deepcopy(lit.state_dict())
        trainer(penalty, probe, prune, qat).fit(lit, loader())
        return lit, first, probe

    lit, first, probe = fit(0.02)
    plain, _, reference = fit(0.0)
    added = probe.seen[0]["net.0.weight"] - reference.seen[0]["net.0.weight"]
    expected = 0.02 * grouped_lasso(first["net.0.weight"], lambda w: w)
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-6)
    assert sparsity(lit) == sparsity(plain) == 0.5
    final = lc.finalize(lit)
    assert all(len(row.unique()) <= 16 for row in final.net[0].weight.detach())


def test_activations_under_quantizers():
    lit, callback = Lit(), SparsityRegularization("activation_l1", 0.5)
    qat = lc.QuantizationAwareTraining(4, 4, edge_layers_bits=None)
    plain = Lit()
    trainer(callback, qat).fit(lit, loader())
    trainer(lc.QuantizationAwareTraining(4, 4, edge_layers_bits=None)).fit(plain, loader())
    x = torch.cat([x for x, _ in loader()])
    assert lit(x).abs().mean() < 0.9 * plain(x).abs().mean()
    assert list(lit.state_dict()) == list(plain.state_dict())


def test_a_place_behind_pruning_is_refused():
    callbacks = [lc.ScheduledPruning(sparsity=0.5), SparsityRegularization()]
    with pytest.raises(MisconfigurationException, match="must come before ScheduledPruning"):
        trainer(*callbacks).fit(Lit(), loader())
    trainer(*reversed(callbacks), max_epochs=1).fit(Lit(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "l0"}, "kind='l0' is unknown; allowed: l1, l2, group_lasso, .*activation_l1_l2, growing"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"on": "bias"}, "on='bias' is unknown; allowed: weight, batchnorm_scale"),
        ({"grouping": "filter"}, "grouping='filter' is unknown; allowed: element, channel"),
        ({"kind": "scad"}, "missing a required argument: 'lam'; options of this kind: lam.*a.*3.7"),
        ({"kind": "scad", "lam": 0.0}, "lam > 0"),
        ({"kind": "hoyer", "squared": True}, "'squared'; options of this kind: none"),
        (
            {"kind": "hoyer", "proximal": True},
            "proximal=True with kind='hoyer': allowed is kind=l1 or group_l",
        ),
        ({"kind": "activation_l1", "on": "batchnorm_scale"}, "concerns outputs: leave on= out"),
        ({"kind": "activation_l1_l2", "norm": "max"}, "norm='max'"),
        ({"kind": "growing", "share": 1.0}, "0 < share < 1"),
        ({"kind": "growing", "step": 0.0}, "step > 0"),
        ({"kind": "growing", "interval": 0}, "interval >= 1"),
        ({"kind": "growing", "lam": 0.0}, "'lam'; options of this kind: share.*0.5.*step.*ceiling.*interval"),
        ({"kind": "growing", "strength": 2.0}, "strength <= ceiling"),
        ({"kind": "growing", "schedule": "linear"}, "allowed is schedule='constant'"),
        ({"every": 0}, "every=0"),
        ({"begin": 0.8, "end": 0.2}, "before it begins"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SparsityRegularization(**options)


def test_patterns_that_fit_nothing():
    with pytest.raises(ValueError, match=r"'nett\.0' fits no layer"):
        trainer(SparsityRegularization(include="nett.0")).fit(Lit(), loader())


# -- resume ----------------------------------------------------------------------------------------------------

RESUMED = [
    {"kind": "l1", "every": 3, "schedule": "linear"},
    {"kind": "group_lasso", "every": 3, "proximal": True},
    {"kind": "growing", "step": 0.02, "ceiling": 0.1, "interval": 3},
    {"kind": "activation_l1_l2", "every": 3, "schedule": "linear"},
]


@pytest.mark.parametrize("options", RESUMED, ids=lambda o: o["kind"])
def test_resume_equals_the_uninterrupted_run(tmp_path, options):
    def run(*callbacks, ckpt=None):
        lit = Lit()
        penalty = SparsityRegularization(**{"strength": 0.02, **options})
        trainer(penalty, *callbacks, max_steps=16, max_epochs=-1).fit(lit, loader(4, 4), ckpt_path=ckpt)
        return lit, penalty

    whole, a = run()
    with pytest.raises(RuntimeError, match="power cut"):
        run(Crash(8), ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(Lit().state_dict())
    again, b = run(ckpt=tmp_path / "last.ckpt")
    assert equal(dict(whole.state_dict()), dict(again.state_dict()))
    assert a.steps == b.steps == 16 and equal(a.state_dict(), b.state_dict())


def test_groups_chosen_in_another_model_are_refused():
    callback = SparsityRegularization("growing")
    trainer(callback, max_epochs=1).fit(Lit(), loader())
    other = Lit(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)))
    with pytest.raises(MisconfigurationException, match=r"chose groups of net\.0\.weight.*another shape"):
        trainer(callback, max_epochs=1).fit(other, loader())


def fit(folder, *callbacks, resume=False, kind="growing"):
    torch.manual_seed(0)
    lit = Lit(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    options = {"step": 0.02, "interval": 4} if kind == "growing" else {"every": 2}
    penalty = SparsityRegularization(kind, 0.02, **options)
    t = trainer(penalty, saving(folder), *callbacks, max_epochs=3)
    t.fit(lit, Resumable(loader(64)), ckpt_path=folder / "last.ckpt" if resume else None)
    return {
        "weights": dict(lit.state_dict()),
        "state": penalty.state_dict(),
        "optimizer": t.optimizers[0].state_dict(),
    }


def test_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    end = fit(whole)
    saved = kill("test_sparsity_regularization", cut, step=22)
    assert saved == 21 and saved % 16  # in the middle of an epoch
    assert equal(end, fit(cut, resume=True))
    assert end["state"]["pushed"].keys() == set(KEYS)


def test_two_ranks_have_the_weights_of_one_process(tmp_path):
    ours = "from lightning_compress.callbacks.sparsity import SparsityRegularization"
    old = "from lightning_compress.callbacks.regularization import LowRankRegularization"
    low = "low = LowRankRegularization(strength=0.02, every=2)"
    assert old in RANKS and low in RANKS
    several = """low = [
        SparsityRegularization("group_lasso", 0.02, every=2, proximal=True, name="a"),
        SparsityRegularization("growing", 0.02, step=0.01, interval=2, name="b"),
        SparsityRegularization("activation_l2", 0.2, name="c"),
    ]"""
    script = RANKS.replace(old, ours).replace(low, several).replace("trainer(low,", "trainer(*low,")
    (tmp_path / "run.py").write_text(script.format(tests=str(TESTS)))
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b, one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("2-0", "2-1", "1-0"))
    assert equal(dict(a), dict(b))
    for key in a:
        torch.testing.assert_close(a[key], one[key], rtol=1e-5, atol=1e-6)


# -- the rest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"barebones": True}, {"limit_train_batches": 0}, {"max_epochs": 0}]
)
@pytest.mark.parametrize("kind", ["l1", "activation_l1", "growing"])
def test_short_and_bare_runs(options, kind):
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"logger": False, "max_epochs": 1, "enable_checkpointing": False}
    with pytest.warns() if options.get("barebones") else contextlib.nullcontext():
        pl.Trainer(**{**quiet, **options, "callbacks": [SparsityRegularization(kind)]}).fit(
            Lit(), loader(), loader()
        )


def test_an_endless_training_needs_no_length_while_the_strength_is_constant():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step >= 5

    for kind in ("l1", "growing", "activation_l1"):
        trainer(SparsityRegularization(kind), Stop(), max_epochs=-1).fit(Lit(), loader())
    with pytest.raises(ValueError, match="no known length"):
        trainer(SparsityRegularization(schedule="linear"), Stop(), max_epochs=-1).fit(Lit(), loader())


@pytest.mark.parametrize("kind", ["l1", "growing", "activation_l1_l2"])
def test_copies_hold_nothing_of_the_run(kind):
    """Of the callback, and of the module while hooks are on it: a copy of that trains as if there were none."""
    callback, seen = SparsityRegularization(kind), []

    class Copies(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            twin = copy.deepcopy(callback)
            seen.append((len(callback.penalized), len(twin.penalized), len(twin._undo), twin.steps))
            module = pickle.loads(pickle.dumps(pl_module.net))
            x, y = next(iter(loader()))
            F.cross_entropy(module(x), y).backward()
            plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
            plain.load_state_dict(pl_module.net.state_dict())
            F.cross_entropy(plain(x), y).backward()
            for p, q in zip(module.parameters(), plain.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)

    lit = Lit()
    trainer(callback, Copies(), max_epochs=1).fit(lit, loader())
    assert (
        seen == [(4 if kind.startswith("act") else 2, 0, 0, t) for t in range(8)] and not callback.penalized
    )
    assert pickle.loads(pickle.dumps(callback)).steps == 8
    assert not any(m._forward_hooks for m in lit.modules())


def test_hooks_are_gone_after_an_error():
    lit = Lit()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(SparsityRegularization("activation_l1"), Crash(3)).fit(lit, loader())
    assert not any(m._forward_hooks for m in lit.modules())


def test_the_benchmark_of_its_overhead_runs(monkeypatch, capsys):
    for folder in (RECIPES, RECIPES / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    main = importlib.import_module("sparsity_overhead").main
    main(["--steps", "4", "--warmup", "1", "--batch-size", "4", "--only", "l1", "activation_l1_l2"])
    printed = capsys.readouterr().out
    assert all(f"\n{name}" in printed for name in ("plain", "l1", "activation_l1_l2"))
