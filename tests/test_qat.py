"""Quantization-aware training: gradients, what every method learns, phases, resume, logs and errors.

The behaviours that users of other libraries asked for are in ``test_qat_behaviours.py``.
"""

import copy
import csv
import itertools
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit import Lit, loader, trainer
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.functional.affine import fake_quantize, learned_step
from lightning_compress.functional.groups import PerChannel, PerGroup, PerTensor
from lightning_compress.quantization.grids import Grid
from lightning_compress.quantization.layers import quantize_input, quantize_weight
from lightning_compress.quantization.learned import ClippedInput, LearnedInput, LearnedWeight
from lightning_compress.quantization.observed import CalibratedWeight, ObservedInput
from lightning_compress.quantization.training import quantizer_of, quantizers

METHODS = ("fake_quant", "lsq", "pact")


def qat(method="lsq", weight_bits=4, activation_bits=4, **options):
    return QuantizationAwareTraining(
        weight_bits, activation_bits, method, **{"edge_layers_bits": None, **options}
    )


def states(module):
    return {name: quantizer.state() for name, quantizer in quantizers(module).items()}


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Probe(pl.Callback):
    """Every quantizer's state after each training batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(states(pl_module))


def norm_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


# -- gradients -------------------------------------------------------------------------------------------------


def lsq_step_gradient(x, step, qmin, qmax):
    """Esser et al. 2020, equation 3, in NumPy."""
    ratio = x / step
    inside = np.round(ratio) - ratio
    return np.where(ratio <= qmin, qmin, np.where(ratio >= qmax, qmax, inside))


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31 - 1))
def test_lsq_gradients_equal_the_formula(bits, unsigned, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 50, generator=generator, dtype=torch.float64).requires_grad_()
    step = (0.01 + torch.rand(3, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    qmin, qmax = (0, 2**bits - 1) if unsigned else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    (learned_step(x, step, qmin, qmax, gradient_scale=0.37) * weight).sum().backward()
    values, steps, weights = x.detach().numpy(), step.detach().numpy(), weight.numpy()
    expected = (lsq_step_gradient(values, steps, qmin, qmax) * weights).sum(1, keepdims=True) * 0.37
    np.testing.assert_allclose(step.grad.numpy(), expected, rtol=1e-10, atol=1e-12)
    inside = (values / steps >= qmin) & (values / steps <= qmax)
    np.testing.assert_array_equal(x.grad.numpy(), weights * inside)


def test_the_step_gradient_is_that_of_the_clipped_identity_plus_rounding():
    """Where a value is clipped, y = s q is differentiable in s, and finite differences give the formula."""
    x = torch.tensor([5.0, -6.0, 9.0], dtype=torch.float64)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(s):
        return (learned_step(x, s, -7, 7, 1.0) * torch.tensor([1.0, 2.0, -3.0])).sum()

    loss(step).backward()
    with torch.no_grad():
        finite = (loss(step + 1e-6) - loss(step - 1e-6)) / 2e-6
    assert float(step.grad) == pytest.approx(float(finite), rel=1e-8) == 7 - 14 - 21
    # Inside, d/ds (s round(x / s)) with a straight-through round is round(x / s) - x / s: the slope of s (u + c(s))
    # with u = x / s free and c = round(u) - u held fixed.
    y, s = torch.tensor(0.8, dtype=torch.float64), 0.5
    inner = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    learned_step(y, inner, -7, 7, 1.0).backward()
    fixed = round(float(y) / s) - float(y) / s
    finite = ((float(y) + (s + 1e-6) * fixed) - (float(y) + (s - 1e-6) * fixed)) / 2e-6
    assert float(inner.grad) == pytest.approx(finite, rel=1e-6)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_learned_weight_starts_and_learns_as_in_the_paper(granularity, dtype):
    weight = torch.randn(3, 6, dtype=dtype)
    quantizer = LearnedWeight(4, weight, granularity)
    planes = torch.view_as_real(weight) if dtype.is_complex else weight[..., None]
    parts = {
        PerTensor: [planes],
        PerChannel: list(planes),
        PerGroup: [part for row in planes for part in (row[:4], row[4:])],
    }[type(granularity)]
    expected = torch.stack([2 * part.abs().mean() / math.sqrt(7) for part in parts])
    assert torch.allclose(quantizer.step, expected)
    (quantizer(weight) * torch.ones(3, 6)).abs().sum().backward()
    values = torch.view_as_real(quantizer(weight)) if dtype.is_complex else quantizer(weight)
    scale = 1 / math.sqrt(planes.numel() / len(parts) * 7)
    upstream = values.detach().sign()
    if dtype.is_complex:
        rounded = quantizer(weight).detach()
        upstream = torch.view_as_real(rounded / rounded.abs().clamp_min(1e-30))
    for part, sign, step, gradient in zip(
        parts,
        {
            PerTensor: [upstream],
            PerChannel: list(upstream),
            PerGroup: [p for row in upstream for p in (row[:4], row[4:])],
        }[type(granularity)],
        quantizer.step.detach(),
        quantizer.step.grad,
        strict=True,
    ):
        own = lsq_step_gradient(part.reshape(sign.shape).numpy(), float(step), -7, 7)
        assert float(gradient) == pytest.approx(float((own * sign.numpy()).sum() * scale), rel=1e-4, abs=1e-6)


def test_a_group_of_zeros_takes_the_step_of_a_usual_initialization():
    quantizer = LearnedWeight(4, torch.zeros(2, 16), PerChannel())
    assert quantizer.step.tolist() == pytest.approx([1 / math.sqrt(16 * 7)] * 2)


def test_pact_clips_and_its_gradient_is_the_share_above_alpha():
    quantizer = ClippedInput(3)
    quantizer(torch.tensor([0.0, 4.0, 2.0, 4.0]))
    assert float(quantizer.alpha.detach()) == 4.0 and not quantizer.signed
    x = torch.tensor([-0.0, 1.0, 5.0, 7.0], requires_grad=True)
    y = quantizer(x)
    assert torch.allclose(y, (x.detach().clamp(0, 4) / (4 / 7)).round() * (4 / 7))
    (y * torch.tensor([1.0, 1.0, 2.0, 4.0])).sum().backward()
    assert quantizer.alpha.grad.tolist() == [6.0] and x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    signed = ClippedInput(3)
    signed(torch.tensor([-4.0, 4.0, 1.0]))
    x = torch.tensor([-9.0, 1.0, 9.0, 9.5], requires_grad=True)
    signed(x).sum().backward()
    assert signed.signed and signed.alpha.grad.tolist() == [1.0] and signed(x).min() == -4.0


def test_one_bit_weights_are_plus_and_minus_their_mean():
    weight = torch.tensor([[0.5, -1.5], [0.0, 3.0]], requires_grad=True)
    for quantizer in (LearnedWeight(1, weight, PerChannel()), CalibratedWeight(Grid(1), weight)):
        y = quantizer(weight)
        assert y.tolist() == [[1.0, -1.0], [1.5, 1.5]]
        y.sum().backward()
        assert weight.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]
        code = quantizer.code(weight)
        assert code.width == 1 and torch.equal(code.project(weight.detach()), y.detach())
        weight.grad = None


# -- quantizers ------------------------------------------------------------------------------------------------


GRIDS = [(kind, bits) for kind in ("lsq", "mse", "minmax", "asymmetric") for bits in (1, 2, 4, 8)]
GRIDS += [("log2", 2), ("log2", 4), ("log2", 8), ("e4m3", 8)]


@pytest.mark.parametrize(("kind", "bits"), GRIDS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_the_code_of_a_weight_is_what_its_layer_used(bits, granularity, dtype, kind):
    weight = torch.randn(4, 12, dtype=dtype)
    if kind == "lsq":
        quantizer = LearnedWeight(bits, weight, granularity)
    elif kind in ("e4m3", "log2"):
        quantizer = CalibratedWeight(
            Grid(bits, format=kind, granularity=granularity, calibrator="minmax"), weight
        )
    elif kind == "asymmetric" and bits > 1:
        quantizer = CalibratedWeight(Grid(bits, symmetric=False, granularity=granularity), weight)
    else:
        rule = kind if kind in ("mse", "minmax") else "mse"
        quantizer = CalibratedWeight(Grid(bits, granularity=granularity, calibrator=rule), weight)
    code = quantizer.code(weight)
    rounded = code.project(weight)
    assert torch.equal(rounded, quantizer(weight)) and rounded.dtype == dtype
    assert code.matches(rounded)
    moved = nn.Parameter(weight.clone())
    quantizer(moved).abs().sum().backward()
    assert torch.isfinite(torch.view_as_real(moved.grad) if dtype.is_complex else moved.grad).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", [LearnedInput, ClippedInput, ObservedInput])
def test_the_frozen_input_quantizer_gives_the_same_values(kind, signed):
    quantizer = kind(3)
    for _ in range(3):
        x = torch.randn(5, 40)
        quantizer(x if signed else x.relu())
    quantizer.eval()
    x = 3 * torch.randn(100)
    assert quantizer.signed == signed == quantizer.frozen().signed
    assert torch.equal(quantizer.frozen()(x), quantizer(x))
    levels = 8 - (signed and kind is ClippedInput)
    assert len(quantizer(torch.linspace(-9, 9, 2001)).unique()) == levels  # all codes are used
    assert float(quantizer(torch.zeros(1))) == 0.0


def test_an_observer_follows_the_batches():
    quantizer = ObservedInput(8, momentum=0.1)
    batches = [torch.randn(20) + i for i in range(5)]
    low = high = None
    for batch in batches:
        quantizer(batch)
        low = batch.min() if low is None else low + 0.1 * (batch.min() - low)
        high = batch.max() if high is None else high + 0.1 * (batch.max() - high)
    assert float(quantizer.low) == pytest.approx(float(low)) and float(quantizer.high) == pytest.approx(
        float(high)
    )
    before = quantizer.state()
    quantizer(torch.tensor([math.inf, 1.0]))
    quantizer(torch.tensor([math.nan, 1.0]))
    quantizer.eval()(torch.tensor([1000.0]))
    assert equal(before, quantizer.state())
    quantizer.train().learning = False
    quantizer(torch.tensor([1000.0]))
    assert equal(before["tensors"], quantizer.state()["tensors"])


def test_an_observer_that_was_frozen_too_early_still_takes_its_first_batch():
    quantizer = ObservedInput(8)
    quantizer.learning = False
    quantizer(torch.tensor([0.0, 1.0]))
    quantizer(torch.tensor([0.0, 9.0]))
    assert quantizer.initialized and float(quantizer.high) == 1.0


def test_negative_values_after_the_first_batch_widen_the_grid():
    quantizer = ObservedInput(8, momentum=0.5)
    quantizer(torch.tensor([0.0, 1.0]))
    quantizer(torch.tensor([-1.0, 1.0]))
    assert not quantizer.signed and quantizer.widen() and quantizer.signed and not quantizer.widen()
    assert float(quantizer.eval()(torch.tensor([-0.4]))) < -0.3


@pytest.mark.parametrize("kind", [LearnedInput, ClippedInput, ObservedInput])
def test_zero_empty_and_complex_inputs(kind):
    quantizer = kind(4)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))
    quantizer(torch.randn(4, 4, dtype=torch.complex64))
    assert quantizer(torch.empty(0, 3)).shape == (0, 3)
    y = quantizer(torch.randn(4, 4, dtype=torch.complex64))
    assert y.is_complex() and torch.isfinite(torch.view_as_real(y)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_grids_stay_in_single_precision(dtype):
    layer = nn.Linear(8, 4)
    quantize_weight(layer, "weight", LearnedWeight(4, layer.weight, PerChannel()))
    quantize_input(layer, LearnedInput(4))
    step = layer.weight_quantizer.step.detach().clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype and torch.equal(layer.weight_quantizer.step, step)
    assert layer(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    assert layer.input_quantizer.step.dtype == torch.float32


def test_fewer_bits_keep_the_range():
    weight = torch.randn(100)
    quantizer = LearnedWeight(8, weight)
    reach = float(quantizer.step.detach()) * 127
    quantizer.set_bits(4)
    assert float(quantizer.step.detach()) * 7 == pytest.approx(reach)
    observer = ObservedInput(8)
    observer(torch.tensor([0.0, 1.0]))
    observer.set_bits(2)
    assert float(observer.scale) == pytest.approx(1 / 3)


# -- in a fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_finalize_equals_the_module_in_eval_mode_bit_for_bit(tmp_path, method):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(50, 3),
    )  # fmt: skip
    lit = Lit(net)
    trainer(qat(method), max_epochs=1).fit(lit, loader(16, shape=(1, 8, 8)))
    lit.eval()
    small, x = lc.finalize(lit), torch.randn(9, 1, 8, 8)
    assert torch.equal(small(x), lit(x)) and not torch.equal(
        Lit(net).net[0]._parameters["weight"], small.net[0].weight
    )
    assert list(small.state_dict()) == list(lit.state_dict()) and not quantizers(small)
    codes = {name: code for name, _, _, code in lc.codes.of(small)}
    assert list(codes) == [f"net.{i}.weight" for i in (0, 3, 5, 7)]
    assert all(code.kind == "affine" and code.width == 4 for code in codes.values())
    lc.save(small.net, tmp_path / "net.lcz")
    torch.manual_seed(1)
    fresh = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(50, 3),
    )  # fmt: skip
    assert torch.equal(lc.load(tmp_path / "net.lcz", into=fresh).eval()(x), lit(x))
    lc.save(small, tmp_path / "lit.lcz")
    assert torch.equal(lc.load(tmp_path / "lit.lcz", into=Lit(nn.Sequential(*fresh))).eval()(x), lit(x))


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_what_is_learned_moves_and_stays_positive(method):
    class Pull(Lit):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    probe, lit = Probe(), Pull()
    trainer(qat(method), probe).fit(lit, loader())
    key = {"lsq": "step", "pact": "alpha"}[method]
    names = [n for n in probe.seen[0] if key in probe.seen[0][n]["tensors"]]
    assert len(names) == {"lsq": 4, "pact": 2}[method]
    for name in names:
        values = [s[name]["tensors"][key] for s in probe.seen]
        assert not torch.equal(values[0], values[-1]), name
        assert all((v >= 1e-8).all() for v in values)


def test_alpha_gets_the_gradient_of_its_penalty_once_per_optimizer_step():
    class Zero(Lit):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    scaled = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    for options in ({}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 100.0}, {"plugins": scaled}):
        probe, lit = Probe(), Zero()
        t = trainer(qat("pact", pact_strength=0.05), probe, max_epochs=1, **options)
        t.fit(lit, loader())
        alpha = [float(s["net.2.input_quantizer"]["tensors"]["alpha"]) for s in probe.seen]
        steps = t.global_step
        if steps == 8:
            assert alpha[1:] == pytest.approx([a * 0.9 for a in alpha[:-1]], rel=1e-3), options
        else:
            assert alpha[3::2] == pytest.approx([a * 0.9 for a in alpha[1:-2:2]], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_rounding_can_begin_later(method):
    probe, lit = Probe(), Lit()
    chosen = {"calibrator": "lsq"} if method == "lsq" else {}
    callback = qat(method, begin=0.5, freeze_observer=0.75, **chosen)
    trainer(callback, probe).fit(lit, loader())
    enabled = [all(q["flags"]["enabled"] for q in s.values()) for s in probe.seen]
    assert enabled == [False] * 7 + [True] * 9 and callback.span == (8, 8)
    float_lit, reference = Lit(), []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            reference.append(pl_module.net[0]._parameters["weight"].detach().clone())

    trainer(Weights()).fit(float_lit, loader())
    again, weights = Lit(), Weights()
    reference_float, reference[:] = list(reference), []
    trainer(qat(method, begin=0.5), weights).fit(again, loader())
    same = [torch.equal(a, b) for a, b in zip(reference, reference_float, strict=True)]
    assert same == [True] * 8 + [False] * 8  # the float fit, until it begins
    if method == "lsq":
        step = probe.seen[7]["net.0.weight_quantizer"]["tensors"]["step"]
        mean = reference[7].abs().mean(1)  # of the weight at step 8, not of the one the fit began with
        assert torch.allclose(step, 2 * mean / math.sqrt(7))


@pytest.mark.parametrize("point", [0.5, None])
def test_observers_freeze(point):
    probe, lit = Probe(), Lit()
    trainer(qat("fake_quant", freeze_observer=point), probe).fit(lit, loader())
    high = [float(s["net.0.input_quantizer"]["tensors"]["high"]) for s in probe.seen]
    moves = [a != b for a, b in itertools.pairwise(high)]
    assert moves == ([True] * 7 + [False] * 8 if point else [True] * 15)


def test_batchnorm_freezes_and_stays_frozen_after_validation_and_on_resume(tmp_path):
    class Means(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.seen.append(pl_module.net[1].running_mean.tolist())

    save, means, lit = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"), Means(), Lit(norm_net())
    options = {"freeze_batchnorm": 0.5}
    trainer(qat(**options), means, save, max_epochs=4).fit(lit, loader(), loader())
    moves = [a != b for a, b in zip(means.seen, means.seen[1:], strict=False)]
    assert moves == [True] * 15 + [False] * 16 and lit.net[1].training == lit.net[2].training
    again, resumed = Means(), Lit(norm_net())
    trainer(qat(**options), again, max_epochs=4).fit(
        resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt"
    )
    assert again.seen == means.seen[24:]
    never = Means()
    trainer(qat(freeze_batchnorm=None), never, max_epochs=4).fit(Lit(norm_net()), loader())
    assert all(a != b for a, b in zip(never.seen, never.seen[1:], strict=False))


@pytest.mark.parametrize("method", METHODS)
def test_bits_follow_the_schedule(method):
    class Bits(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_start(self, trainer, pl_module):
            own = quantizers(pl_module)
            self.seen.append(
                [own[f"net.{i}.{k}_quantizer"].bits for k in ("weight", "input") for i in (0, 2, 4)]
            )

    torch.manual_seed(0)
    lit, bits = (
        Lit(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))),
        Bits(),
    )
    callback = qat(method, 8, 4, edge_layers_bits=8, bits_schedule={0: 8, 1: 4, 3: 2}, gate="val_loss")
    t = trainer(callback, bits, max_epochs=5)
    t.fit(lit, loader(), loader())
    inner = [(8, 8), (4, 4), (4, 4), (2, 4), (2, 4)]
    assert bits.seen == [[8, w, 8, 8, a, 8] for w, a in inner]
    assert float(t.callback_metrics["compress/weight_bits"]) == pytest.approx(
        (256 * 2 + (128 + 48) * 8) / 432
    )
    assert callback.span == (0, 24) and math.isfinite(t.callback_metrics["compress/at_target/val_loss"])
    assert lc.codes.read(lc.finalize(lit).net[2], "weight").width == 2


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact_in_every_phase(tmp_path, method, epoch):
    def callback():
        return qat(
            method, begin=0.125, freeze_observer=0.45, freeze_batchnorm=0.6, bits_schedule={0: 6, 2: 4, 3: 3}
        )

    def prune():
        return lc.ScheduledPruning(sparsity=0.5, begin=0.1, end=0.9, every=3)

    save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, again = Lit(norm_net()), Lit(norm_net())
    a = trainer(callback(), prune(), save, max_epochs=5, num_sanity_val_steps=1)
    a.fit(whole, loader(), loader())
    b = trainer(callback(), prune(), max_epochs=5, num_sanity_val_steps=1)
    b.fit(again, loader(), loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert equal(states(whole), states(again)) and equal(dict(whole.state_dict()), dict(again.state_dict()))
    assert equal(a.optimizers[0].state_dict()["state"], b.optimizers[0].state_dict()["state"])
    assert a.callback_metrics.keys() == b.callback_metrics.keys() and equal(
        a.callback_metrics, b.callback_metrics
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
)
def test_accumulation_and_precision(method, options):
    lit, callback = Lit(), qat(method)
    t = trainer(callback, **options)
    t.fit(lit, loader(), loader())
    assert callback.steps == t.global_step and math.isfinite(t.callback_metrics["val_loss"])
    for name, quantizer in quantizers(lit).items():
        assert quantizer.active, name
        assert all(v.dtype == torch.float32 for v in quantizer.tensors().values())
    lit.eval()
    x = torch.randn(4, 8, dtype=lit.net[0]._parameters["weight"].dtype)
    assert torch.equal(lc.finalize(lit)(x), lit(x))


def test_manual_optimization_and_several_optimizers():
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [
                torch.optim.Adam(self.net[0].parameters()),
                torch.optim.SGD(self.net[2].parameters(), lr=0.1),
            ]

    callback, probe, lit = qat(begin=0.25), Probe(), Manual()
    t = trainer(callback, probe)
    t.fit(lit, loader())
    assert t.global_step == 32 and callback.steps == 16 and callback.span[0] == 4
    first, last = probe.seen[4], probe.seen[-1]
    for name in first:
        assert not torch.equal(first[name]["tensors"]["step"], last[name]["tensors"]["step"])


def test_steps_that_configure_optimizers_left_out_are_updated_with_their_weights():
    class Forgetful(Lit):
        def __init__(self):
            super().__init__()
            self.mine = [self.net[0].weight, self.net[0].bias]

        def configure_optimizers(self):
            return torch.optim.Adam([{"params": self.mine}, {"params": self.net[2].parameters(), "lr": 0.1}])

    lit = Forgetful()
    with pytest.warns(UserWarning, match=r"left the learned steps of net\.0 out"):
        t = trainer(qat())
        t.fit(lit, loader())
    groups = t.optimizers[0].param_groups
    assert [len(g["params"]) for g in groups] == [4, 4]
    assert any(p is lit.net[0].weight_quantizer.step for p in groups[0]["params"])


def test_decay_of_steps_is_warned_of_and_the_named_groups_are_the_way_out():
    class Decay(Lit):
        grouped = False

        def configure_optimizers(self):
            if not self.grouped:
                return torch.optim.AdamW(self.parameters(), weight_decay=0.01)
            steps, others = lc.quantization.parameter_groups(self)
            assert len(steps) == 4 and len(others) == 4
            return torch.optim.AdamW([{"params": others}, {"params": steps, "weight_decay": 0.0}])

    with pytest.warns(UserWarning, match=r"decays learned steps.*quantization\.parameter_groups"):
        trainer(qat(), max_epochs=1).fit(Decay(), loader())
    lit = Decay()
    lit.grouped = True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*decays.*")
        trainer(qat(), max_epochs=1).fit(lit, loader())


def test_first_and_last_are_those_that_run_first_and_last():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(self.a(self.b(x)))

    class Example(Lit):
        def __init__(self, example):
            torch.manual_seed(0)
            super().__init__(Crossed())
            self.example_input_array = example

    widths = {}
    for example in (torch.zeros(2, 8), None, torch.zeros(2, 7)):
        lit = Example(example)
        trainer(qat(edge_layers_bits=8), max_epochs=1).fit(lit, loader())
        own = quantizers(lit)
        widths[None if example is None else example.shape[1]] = [
            (own[f"net.{n}.weight_quantizer"].bits, own[f"net.{n}.input_quantizer"].bits) for n in "abc"
        ]
    assert widths[8] == [(4, 4), (8, 8), (8, 8)]
    assert widths[None] == widths[7] == [(8, 8), (4, 4), (8, 8)]  # by the order of parameters


def test_bits_by_name_and_kind_and_weights_only():
    torch.manual_seed(0)
    lit = Lit(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    trainer(qat("lsq", {"net.2": 3, "output": 6, "*": 5}, None), max_epochs=1).fit(lit, loader())
    assert {n: q.bits for n, q in quantizers(lit).items()} == {
        "net.0.weight_quantizer": 5,
        "net.2.weight_quantizer": 3,
        "net.4.weight_quantizer": 6,
    }


def test_logs(tmp_path):
    log = CSVLogger(tmp_path)
    lit, callback = Lit(), qat("lsq", 2, 4)
    t = trainer(callback, lc.CompressionMonitor(file_bytes="never"), logger=log)
    t.fit(lit, loader(), loader())
    rows = list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))
    last = {k: float(v) for row in rows for k, v in row.items() if v and k.startswith("compress/")}
    assert last["compress/weight_bits"] == 2.0 == float(t.callback_metrics["compress/weight_bits"])
    weight = lit.net[0]._parameters["weight"].detach().double()
    lost = weight - lit.net[0].weight.detach().double()
    sqnr = 10 * math.log10(float(weight.square().sum() / lost.square().sum()))
    assert last["compress/sqnr_db/net.0"] == pytest.approx(sqnr, rel=1e-4)
    assert last["compress/step/net.0"] == pytest.approx(
        float(lit.net[0].weight_quantizer.step.detach().mean()), rel=1e-4
    )
    assert last["compress/input_step/net.2"] == pytest.approx(
        float(lit.net[2].input_quantizer.step.detach()), rel=1e-4
    )
    assert last["compress/levels_used/net.0"] == 1.0
    with torch.no_grad():
        lit.net[0].weight_quantizer.step.mul_(100)  # the range is lost: every weight becomes zero
    trainer(qat("lsq", 2, 4), logger=log, max_epochs=1, limit_train_batches=1).fit(lit, loader())
    rows = list(csv.DictReader(Path(log.log_dir, "metrics.csv").read_text().splitlines()))
    last = {k: float(v) for row in rows for k, v in row.items() if v and k.startswith("compress/")}
    assert last["compress/levels_used/net.0"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("where", ["attribute", "hparams"])
def test_hot_distillation_with_few_bits_is_warned_of(where):
    def lit():
        module = Lit()
        if where == "attribute":
            module.temperature = 5.0
        else:
            module.save_hyperparameters({"temperature": 5.0})
        return module

    with pytest.warns(UserWarning, match=r"temperature=5\.0 together with 2-bit weights.*levels_used"):
        trainer(qat("lsq", 2), max_epochs=1).fit(lit(), loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*temperature.*")
        trainer(qat("lsq", 4), max_epochs=1).fit(lit(), loader())


def test_layers_that_never_run_are_named():
    class Idle(Lit):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match=r"idle\.input_quantizer saw no batch in training mode"):
        trainer(qat(), max_epochs=1).fit(Idle(), loader())


def test_modules_built_in_configure_model_are_found():
    class Late(pl.LightningModule):
        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = Lit().net

        forward = Lit.forward
        configure_optimizers = Lit.configure_optimizers
        lr = 1e-2

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    lit = Late()
    trainer(qat()).fit(lit, loader())
    assert len(quantizers(lit)) == 4 and all(q.active for q in quantizers(lit).values())


def test_one_callback_serves_another_module_from_the_start():
    callback, first, second = qat("fake_quant"), Lit(), Lit()
    trainer(callback).fit(first, loader())
    trainer(callback).fit(second, loader())
    assert callback.steps == 16 and equal(states(first), states(second))


def test_a_saved_state_waits_for_its_module(tmp_path):
    lit, callback = Lit(), qat()
    t = trainer(callback, ModelCheckpoint(tmp_path, save_last=True))
    t.fit(lit, loader())
    t.save_checkpoint(tmp_path / "after.ckpt")
    for file in ("last", "after"):
        state = torch.load(tmp_path / f"{file}.ckpt", weights_only=True)["callbacks"][callback.state_key]
        again, plain = qat(), Lit.load_from_checkpoint(tmp_path / f"{file}.ckpt")
        again.load_state_dict(state)
        assert equal(again.state_dict()["quantizers"], state["quantizers"])
        trainer(again).validate(plain, loader(), verbose=False)
        assert equal(states(plain), states(lit))


def test_one_bit_is_refused_on_pruned_weights():
    prune = lc.ScheduledPruning(sparsity=0.5, include="net.0")
    with pytest.raises(MisconfigurationException, match=r"net\.0\.weight: one bit has no zero"):
        trainer(qat("lsq", 1), prune).fit(Lit(), loader())
    trainer(qat("lsq", {"net.0": 2, "*": 1}), prune, max_epochs=1).fit(Lit(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dorefa"}, "method='dorefa' is unknown; allowed: fake_quant, lsq, pact"),
        ({"weight_bits": 17}, "bits=17"),
        ({"activation_bits": 1}, "activation_bits=1"),
        ({"observer_momentum": 0.0}, "observer_momentum=0.0"),
        ({"pact_strength": -1.0}, "pact_strength=-1.0"),
        ({"bits_schedule": {-1: 4}}, "epoch -1"),
        ({"bits_schedule": {1: 20}}, "bits=20"),
        ({"bits": 4}, "give bits as weight_bits="),
        ({"mode": "dynamic"}, "mode='dynamic' is for quantization after training"),
        ({"method": "lsq", "symmetric": False}, "method='lsq' learns the step of a symmetric"),
        ({"begin": 1.5}, "begin=1.5"),
        ({"freeze_observer": 2.0}, "freeze_observer=2.0"),
        ({"transform": lc.quantization.Quantize(bits=4), "weight_bits": 3}, "not both"),
        ({"calibrator": "magic"}, "calibrator='magic'"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**options)


def test_a_transform_in_place_of_options():
    given = lc.quantization.Quantize(
        bits=3, activation_bits=5, edge_bits=6, granularity=PerTensor(), include="net.*"
    )
    lit = Lit(nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)]))
    trainer(QuantizationAwareTraining(method="lsq", transform=given), max_epochs=1).fit(lit, loader())
    own = quantizers(lit)
    assert [own[f"net.{i}.weight_quantizer"].bits for i in range(3)] == [6, 3, 6]
    assert [own[f"net.{i}.input_quantizer"].bits for i in range(3)] == [6, 5, 6]
    assert own["net.1.weight_quantizer"].step.shape == (1,)


def test_nothing_to_quantize_and_other_quantizers_in_the_checkpoint(tmp_path):
    with pytest.raises(MisconfigurationException, match="nothing to quantize"):
        trainer(qat(exclude="*")).fit(Lit(), loader())
    trainer(qat(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1).fit(Lit(), loader())
    with pytest.raises(MisconfigurationException, match=r"only one of the two has: net\.2\.input_quantizer"):
        trainer(qat(exclude="net.2")).test(Lit(), loader(), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"does not fit: CalibratedWeight"):
        trainer(qat("fake_quant", activation_bits=None)).test(
            Lit(), loader(), ckpt_path=weights_only_inputs(tmp_path)
        )


def weights_only_inputs(folder):
    """A checkpoint of weight quantizers with learned steps."""
    trainer(qat(activation_bits=None), ModelCheckpoint(folder / "w", save_last=True), max_epochs=1).fit(
        Lit(), loader()
    )
    return folder / "w" / "last.ckpt"


def test_attention_embedding_recurrent_and_bilinear_layers():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.attend = nn.Embedding(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.cell, self.rnn = nn.GRUCell(8, 8), nn.LSTM(8, 8, batch_first=True)
            self.pair, self.head = nn.Bilinear(8, 8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.words((x > 0).long())
            x, _ = self.attend(x, x, x)
            x, _ = self.rnn(x)
            x = self.cell(x[:, -1])
            return self.head(self.pair(x, x))

    torch.manual_seed(0)
    lit, callback = Lit(Mixed()), qat(include=["*", "net.words", "net.cell*", "net.rnn*"])
    trainer(callback).fit(lit, loader(), loader())
    own = quantizers(lit)
    assert {
        "net.words.weight_quantizer",
        "net.attend.in_proj_weight_quantizer",
        "net.attend.input_quantizer",
    } <= own.keys()
    assert "net.words.input_quantizer" not in own and type(lit.net.rnn) is nn.LSTM
    assert {"net.cell.weight_ih_quantizer", "net.pair.input_quantizer"} <= own.keys()
    lit.eval()
    x = torch.randn(4, 8)
    assert torch.allclose(lc.finalize(lit)(x), lit(x), atol=1e-6)


def test_a_spectral_convolution_is_quantized_in_both_planes():
    spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 4, 1), spectral.SpectralConv(4, 4, (6,)), nn.Flatten(), nn.Linear(64, 3))
    lit = Lit(net)
    trainer(qat("lsq"), max_epochs=1).fit(lit, loader(16, shape=(1, 16)))
    lit.eval()
    x = torch.randn(3, 1, 16)
    small = lc.finalize(lit)
    assert torch.equal(small(x), lit(x))
    (code,) = (code for key, _, _, code in lc.codes.of(small) if key.startswith("net.1"))
    assert code.kind == "affine" and code.axes == (1,) and code.scale.shape == (4,)


def test_the_command_line_builds_it():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.Callback, "callback")
    config = {
        "class_path": "lightning_compress.callbacks.quantization.QuantizationAwareTraining",
        "init_args": {"weight_bits": 4, "method": "lsq", "bits_schedule": {"0": 8, "5": 4}},
        "dict_kwargs": {"exclude": "head"},
    }
    built = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    assert (
        built.transform.bits == 4
        and built.bits_schedule == {0: 8, 5: 4}
        and built.transform.exclude == "head"
    )


def test_a_test_without_quantizer_state_says_so(tmp_path):
    lit = Lit()
    fit = trainer(qat("lsq"))
    fit.fit(lit, loader())
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    fit.save_checkpoint(tmp_path / "whole.ckpt")

    class Tested(Lit):
        def test_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

    with pytest.warns(
        UserWarning, match="have seen no training batch, so what they stand for is not rounded"
    ):
        trainer(qat("lsq")).test(Tested(), loader(), ckpt_path=tmp_path / "weights.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have seen no training batch.*")
        trainer(qat("lsq")).test(Tested(), loader(), ckpt_path=tmp_path / "whole.ckpt")


def test_a_quantized_network_trains_on_from_its_own_grid():
    lit = Lit()
    lit.net = lc.compress(lit.net, [lc.Quantize(4)]).model.train()
    want = [codes.read(t.module, t.param) for t in lc.find(lit.net)]
    for chosen in ({}, {"edge_layers_bits": None, "calibrator": "lsq"}):
        again = copy.deepcopy(lit)
        callback = QuantizationAwareTraining(4, None, "lsq", **{"edge_layers_bits": None, **chosen})
        callback.setup(trainer(callback), again, "fit")
        found = [quantizer_of(t) for t in lc.find(again.net)]
        assert all(
            torch.equal(q._steps(t.weight), c.scale)
            for q, t, c in zip(found, lc.find(again.net), want, strict=True)
        )
    moved = copy.deepcopy(lit)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.7)  # the codes are stale now
    callback.setup(trainer(callback), moved, "fit")
    steps = [quantizer_of(t)._steps(t.weight) for t in lc.find(moved.net)]
    assert not any(torch.equal(step, c.scale) for step, c in zip(steps, want, strict=True))


def test_the_first_step_of_inputs_by_another_calibrator():
    x = torch.cat([torch.rand(1, 4000), torch.tensor([[30.0]])], 1)
    mse, paper = LearnedInput(4, "mse"), LearnedInput(4)
    for quantizer in (mse, paper):
        quantizer.train()(x)
    assert torch.allclose(paper.step, 2 * x.mean().view(1) / math.sqrt(15))
    error = [float((q(x) - x).square().sum()) for q in (mse, paper)]
    best = min(
        float((fake_quantize(x, torch.tensor(30 * k / 1500), None, 0, 15) - x).square().sum())
        for k in range(20, 101)
    )
    assert error[0] == pytest.approx(best, rel=1e-4) and error[0] < error[1]
