"""Quantize: grids, bits by layer, activations, rounding and what applying leaves."""

import copy
import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.functional.affine import (
    choose_qparams,
    dequantize,
    fake_quantize,
    integer_range,
    learned_step,
    quantize,
)
from lightning_compress.functional.groups import Groups, granularity_of, real
from lightning_compress.quantization import layers
from lightning_compress.quantization.codes import Affine
from lightning_compress.quantization.quantizers import InputQuantizer
from lightning_compress.targets import parameter
from lightning_compress.transform import OrderError


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    ).eval()


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# -- the grid ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.integers(2, 16),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_affine_equals_numpy(values, bits, signed, symmetric):
    x = np.array(values, dtype=np.float32)
    qmin, qmax = integer_range(bits, signed)
    scale, zero = choose_qparams(torch.tensor([x.min()]), torch.tensor([x.max()]), qmin, qmax, symmetric)
    lo, hi = (np.float64(x.min()), np.float64(x.max()))
    want = max(abs(lo), abs(hi)) / qmax if symmetric else (max(hi, 0) - min(lo, 0)) / (qmax - qmin)
    want = np.float32(want)
    s = np.float32(1.0) if want < np.finfo(np.float32).tiny else want
    z = 0 if symmetric else int(np.clip(np.rint(qmin - min(lo, 0) / np.float64(s)), qmin, qmax))
    assert float(scale) == s and int(zero) == z and scale.dtype == torch.float32
    q = np.clip(np.rint(x / s) + z, qmin, qmax)
    found = quantize(torch.from_numpy(x), scale, zero, qmin, qmax)
    assert np.array_equal(found.numpy(), q.astype(np.float32))
    back = dequantize(found, scale, zero).numpy()
    assert np.array_equal(back, ((q - z).astype(np.float32) * s)) and np.isfinite(back).all()
    assert 0.0 in dequantize(torch.arange(qmin, qmax + 1), scale, zero).numpy()  # zero is on the grid
    inside = (q - z > qmin - z) & (q - z < qmax - z)
    assert (np.abs(x - back)[inside] <= np.float64(s) / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_unsigned_symmetric_uses_every_code(bits):
    x = torch.linspace(0, 1, 100_000)
    qmin, qmax = integer_range(bits, signed=False)
    scale, zero = choose_qparams(x.min()[None], x.max()[None], qmin, qmax)
    assert len(quantize(x, scale, zero, qmin, qmax).unique()) == 2**bits


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-40, 1e38, -1e38])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"format": "log2"}, {"format": "e4m3"}, {"calibrator": "lsq"}]
)
def test_constant_tiny_and_huge_weights_stay_finite(value, options):
    net = nn.Linear(4, 3)
    nn.init.constant_(net.weight, value)
    out = lc.compress(net, [lc.Quantize(4, **options)]).model.weight
    assert torch.isfinite(out).all()
    if value in (0.0, 1.0, -3.0):
        assert (out - value).abs().max() <= 0.35 * abs(value)


def test_gradients_are_straight_through_and_the_steps_closed_form():
    x = torch.tensor([-9.0, -0.26, 0.3, 0.8, 9.0], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    learned_step(x, step, -3, 3, 0.7).sum().backward()
    inside = [0.26 / 0.5 - 1 + 0.0, 1 - 0.6, 2 - 1.6]  # round(v) - v
    want = 0.7 * (-3 + inside[0] + inside[1] + inside[2] + 3)
    assert x.grad.tolist() == [0, 1, 1, 1, 0] and float(step.grad) == pytest.approx(want, abs=1e-12)
    y = x.detach().clone().requires_grad_()
    fake_quantize(y, torch.tensor(0.5), torch.tensor(1), -3, 3).sum().backward()
    assert y.grad.tolist() == [0, 1, 1, 1, 0]


def test_the_steps_gradient_is_a_finite_difference_where_codes_do_not_change():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, dtype=torch.float64, generator=generator) * 3
    s, h = torch.tensor(0.7, dtype=torch.float64), 1e-7
    # d/ds of s q(x/s) at fixed codes is q; LSQ adds -x/s for the straight-through part of the rounding inside
    codes_ = quantize(x, s, None, -7, 7)
    steady = quantize(x, s + h, None, -7, 7) == codes_
    difference = (dequantize(codes_, s + h, None) - dequantize(codes_, s, None)) / h
    inside = (x / s).abs() <= 7
    want = torch.where(inside, difference - x / s, difference)[steady].sum()
    step = s.clone().requires_grad_()
    learned_step(x[steady], step, -7, 7, 1.0).sum().backward()
    assert float(step.grad) == pytest.approx(float(want), rel=1e-6)


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.integers(1, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_groups_cover_every_entry_once(rows, columns, kernel, size, is_complex):
    dtype = torch.complex64 if is_complex else torch.float32
    x = torch.randn(rows, columns, kernel, dtype=dtype)
    for given_, out in itertools.product(
        ("per_tensor", "per_channel", f"per_group:{min(size, columns * kernel)}"), (0, 1)
    ):
        if given_.startswith("per_group") and size > x.numel() // x.shape[out]:
            continue
        groups = Groups.of(granularity_of(given_), x.shape, out)
        blocks = groups.blocks(x)
        assert sum(b.numel() for b in blocks) == real(x).numel()
        largest = groups.join([b.abs().amax(1) for b in blocks], x.shape)
        assert len(largest) == groups.count(x.shape)
        wide = groups.expand(largest, x.shape, is_complex)
        assert (real(x).abs() <= wide).all()
        sums = groups.join([b.sum(1) for b in blocks], x.shape)
        spread = groups.expand(torch.arange(float(len(sums))), x.shape, is_complex).expand(real(x).shape)
        for g, total in enumerate(sums):
            assert float(real(x)[spread == g].sum()) == pytest.approx(float(total), abs=1e-4)


# -- weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"narrow": False}, {"granularity": "per_tensor"}]
)
def test_weights_lie_on_their_grid_and_the_code_is_exact(bits, options):
    result = lc.compress(small(), [lc.Quantize(bits, **options)])
    for target in lc.find(result.model):
        code = codes.read(target.module, target.param)
        assert isinstance(code, Affine) and code.matches(target.weight)
        integers = code.arrays(target.weight)["codes"]
        assert integers.min() >= code.qmin and integers.max() <= code.qmax
        groups = code.groups.blocks(target.weight)
        assert all(len(row.unique()) <= 2**bits for block in groups for row in block)
        side = code.scale.numel() * (32 if code.zero_point is None else 64)
        assert code.bits(target.weight) <= bits * target.weight.numel() + side
    assert result.coverage.share > 0.9


def test_runs_of_inputs_have_their_own_scale():
    net = nn.Linear(10, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.cat([torch.ones(2, 4), 100 * torch.ones(2, 4), torch.full((2, 2), 7.0)], 1))
    out = lc.compress(net, [lc.Quantize(4, granularity=lc.PerGroup(4), calibrator="minmax")]).model
    assert torch.allclose(out.weight, net.weight) and codes.read(out, "weight").scale.numel() == 6
    with pytest.raises(ValueError, match="allowed is 1 to 10"):
        lc.compress(net, [lc.Quantize(4, granularity=lc.PerGroup(11))])


def test_one_bit_is_a_sign_and_a_scale():
    net = small()
    out = lc.compress(net, [lc.Quantize(1, include="5")]).model
    want = net[5].weight.sign() * net[5].weight.abs().mean(1, keepdim=True)
    assert (
        torch.allclose(out[5].weight, want)
        and codes.read(out[5], "weight").bits(out[5].weight) < 96 * 5 + 200
    )
    masked = lc.compress(small(), [lc.Prune(0.5)]).model
    with pytest.raises(ValueError, match="has a mask, and one bit has no zero"):
        lc.compress(masked, [lc.Quantize(1)])


def test_formats_store_what_they_say():
    for name in ("log2", "e4m3", "e5m2", "e3m4", "e2m1", "fp16", "bf16"):
        out = lc.compress(small(), [lc.Quantize(4, format=name)]).model
        for target in lc.find(out):
            code = codes.read(target.module, target.param)
            assert (
                code.matches(target.weight)
                and code.rebuild(code.arrays(target.weight), torch.float32).isfinite().all()
            )
    out = lc.compress(small(), [lc.Quantize(format=lc.MiniFloat(4, 3, "none"))]).model
    for before, after in zip(lc.find(small()), lc.find(out), strict=True):
        assert torch.equal(after.weight, before.weight.to(torch.float8_e4m3fn).float())
    out = lc.compress(small(), [lc.Quantize(8, format=lc.Log2("linear"))]).model
    nonzero = out[5].weight[out[5].weight != 0].abs()
    assert torch.equal(torch.frexp(nonzero).mantissa, torch.full_like(nonzero, 0.5))


def test_zeros_of_a_mask_stay_zero_codes():
    pruned = lc.compress(small(), [lc.Prune(0.7)]).model
    for options in ({}, {"symmetric": False}, {"format": "log2"}, {"rounding": "compensated"}):
        out = lc.compress(pruned, [lc.Quantize(4, **options)], data=X).model
        for before, after in zip(lc.find(pruned), lc.find(out), strict=True):
            assert not after.weight[before.weight == 0].any()
    with pytest.raises(OrderError, match="prune first, then quantize"):
        lc.compress(out, [lc.Prune(0.8)])
    with pytest.raises(OrderError, match="one Quantize"):
        lc.compress(out, [lc.Quantize(4)])


def test_complex_weights_share_a_scale_between_planes():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 5, dtype=torch.complex64))

        def forward(self, x):
            return torch.einsum("bim,iom->bom", x, self.kernel)

    lc.register(Spectral, (1, 0), "kernel")
    out = lc.compress(Spectral(), [lc.Quantize(8)]).model
    code = codes.read(out, "kernel")
    assert code.scale.shape == (3,) and code.axes == (1,) and out.kernel.dtype == torch.complex64
    planes = torch.view_as_real(out.kernel) / code.scale.view(1, 3, 1, 1)
    assert torch.allclose(planes, planes.round(), atol=1e-4) and planes.abs().max() <= 127.001
    assert code.bits(out.kernel) == 4 * 3 * 5 * 2 * 8 + 3 * 32


# -- which bits ----------------------------------------------------------------------------------------------


def test_bits_by_name_pattern_kind_and_edge():
    def bits(model):
        return [codes.read(t.module, t.param).width for t in lc.find(model)]

    net = small()
    table = {"conv": 3, "5": 6, "*": 8}
    assert bits(lc.compress(net, [lc.Quantize(table)]).model) == [3, 3, 6]
    assert bits(lc.compress(net, [lc.Quantize(4, edge_bits=8)], example_input=X[:1]).model) == [8, 4, 8]
    assert bits(lc.compress(net, [lc.Quantize({"output": 8, "*": 2})]).model) == [2, 2, 8]
    with pytest.raises(ValueError, match=r"fits no layer to quantize.*kinds: output"):
        lc.compress(net, [lc.Quantize({"spectral": 4, "*": 8})])
    skipped = lc.compress(net, [lc.Quantize({"conv": 4})]).steps[0].plan.skipped
    assert "no entry of bits=" in skipped["5.weight"]


@pytest.mark.parametrize("how", ["weight", "fisher", "output"])
def test_auto_bits_meet_the_budget_and_beat_uniform_in_the_measured_loss(how):
    net = small()
    step = lc.Quantize("auto", budget=4.0, candidates=(2, 3, 4, 5, 6, 8), sensitivity=how, samples=16)
    result = lc.compress(net, [step], data=X)
    sizes = [t.weight.numel() for t in lc.find(net)]
    widths = [codes.read(t.module, t.param).width for t in lc.find(result.model)]
    mean = sum(n * b for n, b in zip(sizes, widths, strict=True)) / sum(sizes)
    assert 3.5 < mean <= 4.0 and f"mean_bits={mean:.4f}" in result.steps[0].plan.data
    assert "gap=0" in result.steps[0].plan.data and f"sensitivity={how}" in result.steps[0].plan.data
    with pytest.raises(ValueError, match=r"allowed is >= 2"):
        lc.compress(net, [lc.Quantize("auto", budget=1.5)], data=X)


# -- activations ---------------------------------------------------------------------------------------------


def test_static_does_not_follow_the_input_and_dynamic_does():
    static = lc.compress(small(), [lc.Quantize(activation_bits=8)], data=X).model
    dynamic = lc.compress(small(), [lc.Quantize(activation_bits=8, mode="dynamic")]).model
    a, b = layers.input_quantizer(static[0]), layers.input_quantizer(dynamic[0])
    assert torch.equal(a.qparams(X)[0], a.qparams(2 * X)[0])
    assert torch.allclose(2 * b.qparams(X)[0], b.qparams(2 * X)[0])
    behind_relu = layers.input_quantizer(static[2])
    assert a.zero_point > 0 and not a.signed and not behind_relu.signed and behind_relu.zero_point == 0
    assert layers.input_quantizer(static[2]).qmax == 255


def test_w8a8_is_close_and_every_input_lies_on_its_grid():
    net = small()
    model = lc.compress(net, [lc.Quantize(8, activation_bits=8, outputs=True)], data=X).model
    seen = {}
    for index in (0, 2, 5):
        layers.input_quantizer(model[index]).register_forward_hook(
            lambda m, args, out, index=index: seen.update({index: (m, out)})
        )
    out, want = model(X), net(X)
    assert (out - want).norm() / want.norm() < 0.03
    for quantizer, values in seen.values():
        scale, _ = quantizer.qparams(values)
        assert torch.allclose(values / scale, (values / scale).round(), atol=1e-3)
    assert layers.output_quantizer(model[5]) is not None


def test_inputs_are_needed_where_they_are():
    with pytest.raises(ValueError, match="look at inputs: give compress"):
        lc.compress(small(), [lc.Quantize(activation_bits=8)])
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    result = lc.compress(
        embedding, [lc.Quantize(activation_bits=8, include=["0", "1"])], data=torch.randint(5, (8, 3))
    )
    assert result.steps[0].plan.skipped["0.input"] == "its inputs are indices"
    assert (
        layers.input_quantizer(result.model[0]) is None
        and layers.input_quantizer(result.model[1]) is not None
    )


def test_attention_inputs_and_kwargs():
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    layers.quantize_input(net, InputQuantizer(8, scale=0.5))
    x = torch.randn(2, 3, 8)
    y = InputQuantizer(8, scale=0.5)(x)
    plain = copy.deepcopy(net)
    layers.release(plain)
    assert type(plain) is nn.MultiheadAttention
    assert torch.equal(net(query=x, key=x, value=x)[0], plain(y, y, y)[0])
    assert torch.equal(net(x, x, value=x)[0], plain(y, y, y)[0])


# -- rounding ------------------------------------------------------------------------------------------------


def test_compensated_rounding_and_bias_correction_lower_the_output_error():
    net = small()
    x = X.cumsum(-1) / 3 + 0.5  # correlated, with a mean

    @torch.no_grad()
    def error(**options):
        model = lc.compress(net, [lc.Quantize(3, **options)], data=x).model
        return float((model(x) - net(x)).square().mean())

    nearest, corrected = error(), error(bias_correction=True)
    compensated, both = error(rounding="compensated"), error(rounding="compensated", bias_correction=True)
    assert corrected < nearest and compensated < 0.7 * nearest and both < 0.7 * nearest


def test_bias_correction_keeps_the_mean_output():
    torch.manual_seed(0)
    net, x = nn.Linear(20, 6), torch.randn(500, 20) + 2
    model = lc.compress(net, [lc.Quantize(2, bias_correction=True, samples=500)], data=x).model
    assert torch.allclose(model(x).mean(0), net(x).mean(0), atol=1e-4)
    assert not torch.allclose(lc.compress(net, [lc.Quantize(2)]).model(x).mean(0), net(x).mean(0), atol=1e-2)


@pytest.mark.parametrize(
    "layer",
    [nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose2d(3, 4, 2)],
)
def test_compensated_rounding_of_any_convolution(layer):
    torch.manual_seed(0)
    size = (16, layer.in_channels) + (9,) * (layer.weight.dim() - 2)
    x = torch.randn(size).cumsum(-1)
    found = {
        how: lc.compress(
            layer, [lc.Quantize(3, rounding=how, granularity="per_channel", bias_correction=True)], data=x
        ).model
        for how in ("nearest", "compensated")
    }
    gap = {how: float((m(x) - layer(x)).square().mean()) for how, m in found.items()}
    assert gap["compensated"] < gap["nearest"]


def test_equalization_evens_out_ranges_before_rounding():
    net = small()
    with torch.no_grad():  # the same function, with channels of very different ranges
        factor = torch.logspace(-1.5, 1.5, 6)
        net[2].weight.mul_(factor.view(-1, 1, 1, 1)), net[2].bias.mul_(factor)
        net[5].weight.view(5, 6, 16).div_(factor.view(1, -1, 1))
    gap = {}
    for equalize in (False, True):
        step = lc.Quantize(4, granularity="per_tensor", equalize=equalize)
        result = lc.compress(net, [step], example_input=X[:1])
        gap[equalize] = float((result.model(X) - net(X)).square().mean())
        again = small()
        step.apply(again, result.plan[0])
        assert equalize is False or torch.equal(again(X), result.model(X))  # biases travel in the plan
    assert gap[True] < 0.5 * gap[False]


# -- what applying leaves ------------------------------------------------------------------------------------


def test_keys_parameters_and_plain_checkpoints():
    net = small()
    keys, ids = list(net.state_dict()), [id(p) for p in net.parameters()]
    lc.compress(net, [lc.Quantize(4, activation_bits=4)], data=X, inplace=True)
    assert list(net.state_dict()) == keys and [id(p) for p in net.parameters()] == ids
    fresh = small()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh[0].weight, parameter(net[0], "weight")) and type(net[0]).__mro__[1] is nn.Conv2d
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), lc.finalize(net)):
        assert torch.equal(clone(X), net(X)) and layers.input_quantizer(clone[0]) is not None
    exported = torch.export.export(net, (X,)).module()
    assert torch.equal(exported(X), net(X))


def test_archives_bring_the_quantizers_back(tmp_path):
    net = small()
    for options in ({}, {"mode": "dynamic"}, {"outputs": True}):
        model = lc.compress(net, [lc.Quantize(4, activation_bits=6, **options)], data=X).model
        lc.save(model, tmp_path / "net.lcz")
        again = lc.load(tmp_path / "net.lcz", into=small())
        assert torch.equal(again(X), model(X)) and not torch.equal(again(X), net(X))
        assert [
            codes.read(t.module, t.param) == codes.read(u.module, u.param)
            for t, u in zip(lc.find(model), lc.find(again), strict=True)
        ] == [True] * 3


def test_integers_are_stored_at_their_entropy(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(512, 256, bias=False)
    model = lc.compress(net, [lc.Quantize(4)]).model
    info = lc.save(model, tmp_path / "net.lcz")
    integers = codes.read(model, "weight").arrays(model.weight)["codes"].numpy()
    _, counts = np.unique(integers, return_counts=True)
    p = counts / counts.sum()
    bound = -(p * np.log2(p)).sum() * integers.size / 8 + 4 * 256
    assert info.file_bytes < 1.02 * bound + 700


def test_batchnorm_goes_into_quantized_weights_without_new_rounding():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    with torch.no_grad():
        for norm in (net[1], net[4]):
            norm.weight.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    quantized = lc.compress(net.eval(), [lc.Quantize(4, activation_bits=8)], data=X).model
    before = [codes.read(quantized[i], "weight").arrays(quantized[i].weight)["codes"] for i in (0, 3)]
    for example in (X, None):
        fused = lc.compress(quantized, [lc.FuseBatchNorm()], example_input=example).model
        for index, integers, norm in zip((0, 3), before, (1, 4), strict=True):
            code = codes.read(fused[index], "weight")
            sign = net[norm].weight.detach().sign().view(-1, 1, 1, 1)
            assert code.matches(fused[index].weight)
            assert torch.equal(code.arrays(fused[index].weight)["codes"], (integers * sign).to(torch.int8))
        assert isinstance(fused[1], nn.Identity) and isinstance(fused[4], nn.Identity)
        assert (fused(X) - quantized(X)).abs().max() <= 2e-2 * quantized(X).abs().max()
        bare = [copy.deepcopy(m) for m in (fused, quantized)]
        for m in bare:
            for module in m:
                layers.release(module)
        assert (bare[0](X) - bare[1](X)).abs().max() <= 1e-5 * bare[1](X).abs().max()


def test_apply_checks_the_plan_before_it_writes():
    net = small()
    plan = lc.Quantize(4, activation_bits=8).plan(net, lc.stats.Calibration(data=X))
    other = nn.Sequential(
        nn.Conv2d(3, 8, 5), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)
    )
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="apply it to the architecture it was made for"):
        lc.Quantize().apply(other, plan)
    bad = dataclasses.replace(
        plan, layers={**plan.layers, "0.input": {"layer": "0", "input_quantizer": {"bits": 99}}}
    )
    untouched = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"allowed is 1 <= bits <= 16"):
        lc.Quantize().apply(net, bad)
    bad = dataclasses.replace(plan, layers={"9.input": {"layer": "9", "input_quantizer": {"bits": 8}}})
    with pytest.raises(ValueError, match=r"'9.input' does not fit this model"):
        lc.Quantize().apply(net, bad)
    for model, state in ((other, before), (net, untouched)):
        assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
        assert not list(codes.of(model)) and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "allowed is 1 <= bits <= 16"),
        ({"bits": 17}, "allowed is 1 <= bits <= 16"),
        ({"bits": "best"}, "allowed are 1 to 16, a mapping, or 'auto'"),
        ({"bits": "auto"}, "needs budget="),
        ({"budget": 4.0}, "needs budget="),
        ({"calibrator": "best"}, "allowed: minmax"),
        ({"activation_calibrator": "sawb", "activation_bits": 8}, "for weights only"),
        ({"calibrator": "sawb", "symmetric": False}, "symmetric"),
        ({"mode": "fast"}, "allowed: static, dynamic"),
        ({"format": "e9m9"}, "allowed: int, log2, e4m3"),
        ({"format": "log2", "bits": 1}, "allowed is 2 <= bits <= 8"),
        ({"rounding": "up"}, "allowed: nearest, compensated"),
        ({"rounding": "compensated", "format": "e4m3"}, "is for format='int'"),
        ({"outputs": True}, "needs activation_bits"),
        ({"granularity": "rows"}, "allowed: per_tensor"),
        ({"activation_bits": 1}, "allowed is 2 <= activation_bits <= 16"),
        ({"percentile": 30.0}, "allowed is 50 < percentile <= 100"),
        ({"samples": 0}, "allowed is >= 1"),
        ({"bits": 1, "symmetric": False}, "symmetric"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        lc.Quantize(**options)


# -- for integer runtimes ------------------------------------------------------------------------------------


@given(st.lists(st.floats(2.0**-60, 2.0**60, width=32), min_size=1, max_size=20), st.booleans())
@settings(max_examples=60, deadline=None)
def test_scales_that_are_powers_of_two_are_the_next_above(values, symmetric):
    hi = torch.tensor(values)
    lo = -hi if symmetric else -hi / 3
    qmin, qmax = integer_range(8, narrow=symmetric)
    scale, zero = choose_qparams(lo, hi, qmin, qmax, symmetric, power_of_two=True)
    free, _ = choose_qparams(lo, hi, qmin, qmax, symmetric)
    assert (
        (torch.frexp(scale).mantissa == 0.5).all() and (scale >= free).all() and (scale < 2.001 * free).all()
    )
    assert (zero >= qmin).all() and (zero <= qmax).all()


def test_powers_of_two_everywhere():
    step = lc.Quantize(8, activation_bits=8, outputs=True, scale="po2")
    model = lc.compress(small(), [step], data=X).model
    for target in lc.find(model):
        scales = [codes.read(target.module, target.param).scale, layers.input_quantizer(target.module).scale]
        assert all((torch.frexp(s).mantissa == 0.5).all() for s in scales)
    assert (model(X) - small()(X)).norm() < 0.05 * small()(X).norm()


def test_biases_are_multiples_of_the_product_of_scales():
    net = small()
    model = lc.compress(net, [lc.Quantize(8, activation_bits=8, bias_correction=True)], data=X).model
    for index in (0, 2, 5):
        code, quantizer = codes.read(model[index], "weight"), layers.input_quantizer(model[index])
        unit = code.scale.double() * float(quantizer.scale)
        integers = model[index].bias.detach().double() / unit
        assert torch.allclose(integers, integers.round(), atol=1e-3)
        assert ((model[index].bias - net[index].bias).abs() < 0.05).all()


@pytest.mark.parametrize("corrected", [False, True])
def test_biases_of_more_steps_than_int32_holds_stay_as_they_are(corrected):
    """With 16 bits of weights and inputs a step is so small that all such integers together are a small bias."""
    net = small()
    with torch.no_grad():
        net[0].bias[0] = 5.0
    step = lc.Quantize(16, activation_bits=16, bias_correction=corrected)
    model = lc.compress(net, [step], data=X).model
    code, quantizer = codes.read(model[0], "weight"), layers.input_quantizer(model[0])
    unit = code.scale.double() * float(quantizer.scale)
    assert float((5.0 / unit).max()) > 2**31
    assert torch.equal(model[0].bias, net[0].bias) or corrected
    assert (model[0].bias - net[0].bias).abs().max() < 1e-3


def test_outputs_are_rounded_only_where_they_meet_something_else():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.b(torch.relu(self.a(x)))
            return self.c(torch.relu(x + y))

    model = lc.compress(Block(), [lc.Quantize(activation_bits=8, outputs=True)], data=X).model
    found = {name: layers.output_quantizer(getattr(model, name)) is not None for name in "abc"}
    assert found == {"a": False, "b": True, "c": True}
