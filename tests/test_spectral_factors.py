"""Schemes of spectral convolutions: every one, against the dense layer, closed forms and brute force."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.lowrank.real_channels import SpectralFactors
from lightning_compress.lowrank.schemes import equal_shares
from lightning_compress.lowrank.spectral import REAL_SPECTRAL_SCHEMES, SPECTRAL_SCHEMES
from lightning_compress.spectral import dense_weight, is_factorized, is_spectral, spectral_layers
from lightning_compress.stats import Calibration
from lightning_compress.stats.measure import Stats, collect
from lightning_compress.targets import Axes, find, replace_modules

spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
operators = pytest.importorskip("neuralop.models")

SCHEMES = {s.name: s for s in SPECTRAL_SCHEMES} | {f"real {s.name}": s for s in REAL_SPECTRAL_SCHEMES}
EXACT = [name for name in SCHEMES if name != "cp"]  # at full rank
SEPARABLE = ["modes", "tucker", "cp", "tt"]
OUTPUTS = [name for name, s in SCHEMES.items() if s.gram]


def conv(modes=(6, 5), i=5, o=7, **options):
    torch.manual_seed(0)
    return spectral.SpectralConv(i, o, modes, **options)


def target_of(layer):
    return next(t for t in find(nn.Sequential(layer)) if t.param.startswith("weight"))


def full(scheme, layer):
    return scheme.full(layer, dense_weight(layer))


def half(scheme, layer):
    ranks = full(scheme, layer)
    return equal_shares(ranks)[(max(ranks) - 1) // 2]


def factorized(layer, scheme, ranks, seen=None, damping=1e-6):
    """A copy of the layer under a scheme, and its decomposition."""
    layer = copy.deepcopy(layer)
    target = target_of(layer)
    assert scheme.fits(target) is None
    cut = scheme.decompose(target, seen, damping)
    assert cut.full == full(scheme, layer)
    tensors = cut.tensors(ranks)
    made = scheme.build(layer, target.param, ranks)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter = made.get_parameter(name)
            assert parameter.shape == tensor.shape and parameter.dtype == tensor.dtype and not parameter.any()
            parameter.copy_(tensor)
    return made, cut


def whole_model(model, scheme, choose):
    """A copy of the model with every spectral layer under a scheme."""
    model = copy.deepcopy(model)
    for layer in list(spectral_layers(model).values()):
        made, _ = factorized(layer, scheme, choose(scheme, layer))
        replace_modules(model, {layer: made})
    return model


def close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    assert float((ours - theirs).detach().abs().max()) <= tolerance * max(
        1.0, float(theirs.detach().abs().max())
    )


def numbers(module):
    counted = (p for name, p in module.named_parameters() if "bias" not in name)
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in counted)


# -- full rank ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", EXACT)
def test_full_rank_reproduces_outputs(name, bias):
    layer = conv((8, 6), bias=bias)
    made, cut = factorized(layer, SCHEMES[name], full(SCHEMES[name], layer))
    assert cut.error(cut.full) < 1e-12
    close(cut.product(cut.full), dense_weight(layer))
    for size in (
        (16, 16),
        (17, 15),
        (32, 32),
        (5, 7),
        (4, 3),
    ):  # the last two reach fewer modes than there are
        x = torch.randn(2, 5, *size)
        close(made(x), layer(x))
    x = torch.randn(2, 5, 16, 16)
    close(made(x, output_shape=(20, 13)), layer(x, output_shape=(20, 13)))
    close(made.transform(x, output_shape=[20, 13]), layer.transform(x, output_shape=[20, 13]))


@pytest.mark.parametrize("factor", [2, 0.5])
@pytest.mark.parametrize("name", EXACT)
def test_full_rank_with_a_change_of_resolution(name, factor):
    layer = conv(resolution_scaling_factor=factor)
    made, _ = factorized(layer, SCHEMES[name], full(SCHEMES[name], layer))
    x = torch.randn(2, 5, 12, 14)
    close(made(x), layer(x))
    close(made.transform(x), layer.transform(x))
    assert made.resolution_scaling_factor == layer.resolution_scaling_factor


@pytest.mark.parametrize("name", EXACT)
def test_full_rank_in_one_and_three_dimensions(name):
    for modes in ((6,), (4, 3, 6)):
        layer = conv(modes)
        made, _ = factorized(layer, SCHEMES[name], full(SCHEMES[name], layer))
        for size in ((9, 8, 7), (3, 4, 5)):
            x = torch.randn(2, 5, *size[: len(modes)])
            close(made(x), layer(x))


@pytest.mark.parametrize("name", [n for n in EXACT if not n.startswith("real")])
def test_full_rank_on_complex_fields(name):
    layer = conv((4, 6), complex_data=True)
    made, _ = factorized(layer, SCHEMES[name], full(SCHEMES[name], layer))
    for size in ((9, 8), (3, 3)):
        x = torch.randn(2, 5, *size, dtype=torch.complex64)
        close(made(x), layer(x))


@pytest.mark.parametrize("name", [n for n in SEPARABLE if n != "cp"])
def test_full_rank_of_separable_weights(name):
    for modes in ((6,), (6, 4)):
        layer = conv(modes, o=5, separable=True)
        made, _ = factorized(layer, SCHEMES[name], full(SCHEMES[name], layer))
        for size in ((9, 8), (4, 3)):
            x = torch.randn(2, 5, *size[: len(modes)])
            close(made(x), layer(x))


def test_a_weight_of_few_terms_comes_back_from_cp():
    layer = conv()
    with torch.no_grad():
        factors = [torch.randn(n, 4, dtype=torch.complex64) for n in dense_weight(layer).shape]
        dense_weight(layer).copy_(torch.einsum("ar,br,cr,dr->abcd", *factors))
    made, cut = factorized(layer, SCHEMES["cp"], (4,))
    assert cut.error((4,)) < 1e-6
    x = torch.randn(2, 5, 16, 16)
    close(made(x), layer(x), 1e-2)
    assert cut.at_energy(0.9999)[0] <= 4


# -- what is stored and computed ------------------------------------------------------------------------------


def stored(name, i, o, modes, r):
    """The table of the forms, in real numbers."""
    m = math.prod(modes)
    a, b = (r[0], r[-1]) if name.endswith("channel") else (r[0], r[0])
    complex_numbers = {
        "channel_in": r[0] * i + r[0] * o * m,
        "channel_out": r[0] * o + r[0] * i * m,
        "channel": a * i + b * o + a * b * m,
        "modes": r[0] * (i * o + m),
        "tucker": math.prod(r) + sum(x * n for x, n in zip(r, (i, o, *modes), strict=False)),
        "cp": r[0] * (1 + i + o + sum(modes)),
        "tt": sum(p * n * q for p, n, q in zip((1, *r), (i, o, *modes), (*r, 1), strict=False)),
    }
    if not name.startswith("real"):
        return 2 * complex_numbers[name]
    return {
        "real channel_in": r[0] * i + 2 * r[0] * o * m,
        "real channel_out": r[0] * o + 2 * r[0] * i * m,
        "real channel": a * i + b * o + 2 * a * b * m,
    }[name]


def multiplied(name, i, o, m, r, batch, points):
    """Multiply-adds of one call by the table: m modes reached, so many points in space."""
    a, b = (r[0], r[-1])
    if name.startswith("real"):
        inner = {"real channel_in": (a, o), "real channel_out": (i, a), "real channel": (a, b)}[name]
        first = i * inner[0] if inner[0] != i or name != "real channel_out" else 0
        second = 0 if name == "real channel_in" else inner[1] * o
        return batch * (4 * inner[0] * inner[1] * m + points * (first + second))
    per_mode = {
        "channel_in": i * a + a * o,
        "channel_out": i * a + a * o,
        "channel": i * a + a * b + b * o,
        "modes": i * o,
    }[name]
    return 4 * (batch * m * per_mode + (i * o * m * r[0] if name == "modes" else 0))


@pytest.mark.parametrize("modes", [(6,), (6, 5), (4, 3, 6)])
@pytest.mark.parametrize("name", SCHEMES)
def test_numbers_and_multiplications(name, modes):
    scheme, layer = SCHEMES[name], conv(modes)
    weight = dense_weight(layer)
    kept = weight.shape[2:]
    for ranks in {(1,) * len(full(scheme, layer)), half(scheme, layer), full(scheme, layer)}:
        made = scheme.build(copy.deepcopy(layer), "weight.tensor", ranks)
        assert scheme.params(layer, weight, ranks) == numbers(made) == stored(name, 5, 7, kept, ranks)
        for size in ((12, 9, 8), (3, 4, 5)):
            x = torch.randn(2, 5, *size[: len(modes)])
            counted = lc.cost(nn.Sequential(made), x).layers
            calls = [(tuple(x.shape), tuple(made(x).shape))]
            macs = scheme.macs(layer, weight, ranks, calls)
            assert macs == sum(c.macs - c.fft_macs for c in counted)
            assert scheme.macs(layer, weight, ranks, calls * 2) == 2 * macs
            if name not in ("tucker", "cp", "tt"):
                half_spectrum = (*x.shape[2:-1], x.shape[-1] // 2 + 1)
                m = math.prod(min(n, k) for n, k in zip(half_spectrum, kept, strict=True))
                assert macs == multiplied(name, 5, 7, m, ranks, 2, math.prod(x.shape[2:]))


@pytest.mark.parametrize("name", SEPARABLE)
def test_numbers_of_separable_weights(name):
    scheme, layer = SCHEMES[name], conv((6, 5), o=5, separable=True)
    ranks = half(scheme, layer)
    made, _ = factorized(layer, scheme, ranks)
    assert scheme.params(layer, dense_weight(layer), ranks) == numbers(made)
    x = torch.randn(2, 5, 12, 9)
    counted = sum(c.macs - c.fft_macs for c in lc.cost(nn.Sequential(made), x).layers)
    # The product with a weight that has just been formed is entry by entry, which ``cost`` leaves out.
    entrywise = 4 * 2 * 5 * math.prod(dense_weight(layer).shape[1:]) if name == "modes" else 0
    macs = scheme.macs(layer, dense_weight(layer), ranks, [((2, 5, 12, 9), (2, 5, 12, 9))])
    assert macs == counted + entrywise


def test_one_channel_factor_for_all_modes_is_smaller_than_dense_at_every_rank_of_the_bound():
    for i, o, modes in ((24, 24, (8, 8)), (16, 8, (4, 4)), (3, 5, (6,))):
        layer = conv(modes, i, o)
        weight = dense_weight(layer)
        bound = weight.numel() / (i + weight.numel() / i)
        for r in range(1, i + 1):
            assert (SCHEMES["channel_in"].params(layer, weight, (r,)) < 2 * weight.numel()) == (r < bound)
        assert bound > 23 or i < 24


# -- below full rank ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_errors_are_those_of_the_product_and_fall_along_the_path(name):
    scheme, layer = SCHEMES[name], conv((4, 4), 4, 5)
    weight = dense_weight(layer).detach().to(torch.complex128)
    made, cut = factorized(layer, scheme, half(scheme, layer))
    close(
        dense_weight(scheme.merge(copy.deepcopy(made))), cut.product(half(scheme, layer)).to(torch.complex64)
    )
    path, before = cut.path(), 1.0
    assert path[-1] == cut.full and len(set(path)) == len(path)
    for ranks in path:
        lost = float((weight - cut.product(ranks)).abs().square().sum() / weight.abs().square().sum())
        assert cut.error(ranks) == pytest.approx(lost, abs=1e-9)
        assert lost <= before + (1e-3 if name == "cp" else 1e-9)
        before = lost
    for ratio in (0.3, 0.6, 0.9):
        ranks = cut.at_energy(ratio)
        assert cut.error(ranks) <= 1 - ratio + 1e-9
        assert all(1 <= r <= f for r, f in zip(ranks, cut.full, strict=True))
    if name not in ("cp", "tt"):
        assert cut.at_energy(1.0) == cut.full


@pytest.mark.parametrize("name", ["channel_in", "channel_out", "modes"])
def test_one_sided_schemes_are_the_best_of_their_rank(name):
    layer = conv((4, 4))
    weight = dense_weight(layer).detach()
    rows = {"channel_in": weight, "channel_out": weight.movedim(1, 0), "modes": weight.flatten(0, 1)}[name]
    s = torch.linalg.svdvals(rows.flatten(1))
    _, cut = factorized(layer, SCHEMES[name], (2,))
    assert cut.error((2,)) == pytest.approx(float(s[2:].square().sum() / s.square().sum()), rel=1e-4)
    assert cut.at_energy(0.8) == (int((s.square().cumsum(0) / s.square().sum() < 0.8).sum()) + 1,)


@pytest.mark.parametrize("name", ["channel_in", "channel_out"])
def test_a_real_factor_loses_no_less_than_a_complex_one(name):
    layer = conv((4, 4))
    for r in (1, 3):
        _, complex_cut = factorized(layer, SCHEMES[name], (r,))
        made, real_cut = factorized(layer, SCHEMES[f"real {name}"], (r,))
        assert real_cut.error((r,)) >= complex_cut.error((r,))
        part = made[0] if name == "channel_in" else made[-1]
        assert isinstance(part, nn.Conv2d) and not part.weight.is_complex()


def test_max_rank_of_trains_is_clipped_to_what_there_is():
    scheme, layer = SCHEMES["tt"], conv((4, 4))
    made, cut = factorized(layer, scheme, (2, 14, 3))
    x = torch.randn(1, 5, 8, 8)
    merged = scheme.merge(copy.deepcopy(made))
    close(merged(x), made(x))
    assert cut.error((2, 14, 3)) < 1


# -- inputs ---------------------------------------------------------------------------------------------------


def fields(n, channels, size, correlated=True):
    x = torch.randn(n, channels, *size)
    if correlated:
        mix = torch.randn(channels, channels) * torch.logspace(0, -1.5, channels)
        x = torch.einsum("nc...,cd->nd...", x, mix)
        smooth = torch.fft.rfft2(x)
        ky, kx = torch.fft.fftfreq(size[0], 1 / size[0])[:, None], torch.arange(smooth.shape[-1])
        x = torch.fft.irfft2(smooth / (1 + ky**2 + kx**2) ** 0.5, s=size)
    return x


@pytest.mark.parametrize("size", [(12, 11), (4, 5)])
@pytest.mark.parametrize("complex_data", [False, True])
def test_gram_of_every_mode(size, complex_data):
    layer = conv((6, 6), complex_data=complex_data)
    x = torch.randn(7, 5, *size, dtype=torch.complex64 if complex_data else torch.float32)
    seen = collect(nn.Sequential(layer), [target_of(layer)], Calibration(data=[x[:4], x[4:]]), ["gram"])
    stats = seen["0.weight.tensor"] if "0.weight.tensor" in seen else seen["weight.tensor"]
    caught = []
    contract = layer._contract
    layer._contract = lambda c, w, separable: (
        caught.append((c, w.tensor)) or contract(c, w, separable=separable)
    )
    with torch.no_grad():
        marks = torch.arange(dense_weight(layer)[0, 0].numel()).view(dense_weight(layer).shape[2:])
        dense_weight(layer).copy_(marks.expand_as(dense_weight(layer)))
        layer(x)
    coefficients, weight = caught[0]
    expected = torch.zeros(marks.numel(), 5, 5, dtype=torch.complex128)
    for place, mark in enumerate(weight[0, 0].real.long().flatten().tolist()):
        for sample in coefficients.flatten(2)[:, :, place].to(torch.complex128):
            expected[mark] += torch.outer(sample, sample.conj())
    assert stats.gram.shape == (*marks.shape, 5, 5) and stats.gram.dtype == torch.complex128
    close(stats.gram.flatten(0, 1), expected)
    assert stats.rows == 7 and float(expected.abs().max()) > 0


def test_gram_of_separable_layers():
    layer = conv((4, 4), o=5, separable=True)
    x = torch.randn(3, 5, 8, 8)
    stats = collect(layer, find(layer), Calibration(data=[x]), ["gram", "input_norm"])["weight.tensor"]
    energies = stats.gram.diagonal(dim1=-2, dim2=-1).real.movedim(-1, 0)
    close(energies.sqrt().float(), stats.input_norm)


def output_energy(layer, weight, x):
    """Energy of the outputs in space of a layer with this weight, by running it."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        dense_weight(layer).copy_(weight)
        return float(layer(x).double().square().sum())


@pytest.mark.parametrize("name", OUTPUTS)
def test_factors_for_outputs_beat_those_for_weights(name):
    scheme, layer = SCHEMES[name], conv((6, 6), bias=False)
    x = fields(30, 5, (12, 12))
    seen = collect(layer, find(layer), Calibration(data=[x]), ["gram"])["weight.tensor"]
    weight = dense_weight(layer).detach()
    total = output_energy(layer, weight, x)
    for ranks in scheme.decompose(target_of(layer), None, 0.0).path()[:-1]:
        _, plain = factorized(layer, scheme, ranks)
        made, cut = factorized(layer, scheme, ranks, seen)
        ours = output_energy(layer, weight - cut.product(ranks).to(weight.dtype), x) / total
        theirs = output_energy(layer, weight - plain.product(ranks).to(weight.dtype), x) / total
        assert ours <= theirs * (1 + 1e-4)
        # What cancels in the real part of frequency 0 on the last axis is counted by ``error`` and not in space.
        assert cut.error(ranks) == pytest.approx(ours, rel=0.35)
        merged = scheme.merge(copy.deepcopy(made))
        close(dense_weight(merged), cut.product(ranks).to(weight.dtype), 1e-4)
    ranks = half(scheme, layer)
    ours, theirs = (
        factorized(layer, scheme, ranks, s)[1].product(ranks).to(weight.dtype) for s in (seen, None)
    )
    assert output_energy(layer, weight - ours, x) < 0.8 * output_energy(layer, weight - theirs, x)


@pytest.mark.parametrize("name", OUTPUTS)
def test_errors_for_outputs_equal_a_sum_over_samples(name):
    scheme, layer = SCHEMES[name], conv((6,), bias=False)
    weight = dense_weight(layer).detach().to(torch.complex128)
    x = torch.randn(9, 5, 4, dtype=torch.complex128)  # coefficients, [samples, channels, modes]
    seen = Stats(gram=torch.einsum("nim,njm->mij", x, x.conj()), rows=9)
    twice = torch.tensor([1.0, 2.0, 2.0, 2.0])  # frequencies above 0 stand for two
    _, cut = factorized(layer, scheme, half(scheme, layer), seen)

    def outputs(w):
        return float((torch.einsum("nim,iom->nom", x, w).abs().square() * twice).sum())

    lost = outputs(weight - cut.product(half(scheme, layer))) / outputs(weight)
    assert cut.error(half(scheme, layer)) == pytest.approx(lost, rel=1e-9)
    for ratio in (0.5, 0.8, 0.95):
        ranks = cut.at_energy(ratio)
        assert cut.error(ranks) <= 1 - ratio + 1e-9
        if len(ranks) == 1 and ranks[0] > 1:
            assert cut.error((ranks[0] - 1,)) > 1 - ratio
    assert cut.at_energy(1.0) == cut.full
    assert cut.error(cut.full) < 1e-9


@pytest.mark.parametrize("name", OUTPUTS)
def test_white_inputs_lose_what_weights_lose(name):
    scheme, layer = (
        SCHEMES[name],
        conv((4, 4), bias=False, complex_data=True) if "real" not in name else conv((2, 1)),
    )
    kept = dense_weight(layer).shape[2:]
    seen = Stats(gram=torch.eye(5, dtype=torch.complex128).expand(*kept, 5, 5).clone(), rows=1)
    for ranks in scheme.decompose(target_of(layer), None, 0.0).path():
        _, plain = factorized(layer, scheme, ranks)
        _, cut = factorized(layer, scheme, ranks, seen)
        assert cut.error(ranks) == pytest.approx(plain.error(ranks), rel=1e-3, abs=1e-9)


def test_modes_that_no_input_reached_keep_their_own_best_factors():
    layer = conv((8, 8), bias=False)
    x = fields(20, 5, (4, 4))  # reaches 4 x 3 of 8 x 5 modes
    seen = collect(layer, find(layer), Calibration(data=[x]), ["gram"])["weight.tensor"]
    scheme = SCHEMES["channel_in"]
    _, cut = factorized(layer, scheme, (3,), seen)
    weight = dense_weight(layer).detach().to(torch.complex128)
    left = (weight - cut.product((3,))).abs().square()
    unseen = seen.gram.abs().sum((2, 3)) == 0
    assert int(unseen.sum()) == 8 * 5 - 4 * 3
    assert float(left[:, :, unseen].sum()) < 0.7 * float(weight[:, :, unseen].abs().square().sum())
    empty = Stats(gram=torch.zeros_like(seen.gram), rows=20)
    _, blind = factorized(layer, scheme, (3,), empty)
    _, plain = factorized(layer, scheme, (3,))
    assert torch.equal(blind.product((3,)), plain.product((3,)))


# -- in a model -----------------------------------------------------------------------------------------------


def fno(**options):
    torch.manual_seed(0)
    sizes = {"n_modes": (6, 6), "hidden_channels": 6, "n_layers": 2, "projection_channel_ratio": 2}
    return operators.FNO(in_channels=1, out_channels=1, **sizes | options)


def uno():
    return operators.UNO(
        in_channels=1, out_channels=1, hidden_channels=6, projection_channels=8, n_layers=3, uno_out_channels=[6, 8, 6],
        uno_n_modes=[[6, 6], [4, 4], [6, 6]], uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]],
        channel_mlp_skip="linear", lifting_channels=8,
    )  # fmt: skip


def codano(**options):
    return operators.CODANO(
        output_variable_codimension=1, hidden_variable_codimension=4, lifting_channels=8, projection_channels=8,
        n_layers=2, n_modes=[[4, 4], [4, 4]], n_heads=[2, 2], per_layer_scaling_factors=[[1, 1], [1, 1]],
        attention_scaling_factors=[1, 1], use_horizontal_skip_connection=False, attention_token_dim=1,
        per_channel_attention=False, **options,
    )  # fmt: skip


MODELS = {"fno": fno, "uno": uno, "codano": codano}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", MODELS)
def test_operators_at_full_rank(kind, name):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for layer in spectral_layers(model).values():  # those of CODANO are Tucker tensors at first
        if is_factorized(layer):
            SCHEMES["channel_in"].merge(layer)
    made = whole_model(model, SCHEMES[name], full)
    for size in ((16, 16), (17, 15)):
        x = torch.randn(2, 1, *size)
        with torch.no_grad():
            close(made(x), model(x), 1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_copies_pickles_states_and_gradients(name):
    model = fno()
    made = whole_model(model, SCHEMES[name], half)
    x = torch.randn(2, 1, 16, 16)
    y = made(x)
    assert torch.equal(copy.deepcopy(made)(x), y)
    layers = [pickle.loads(pickle.dumps(c)) for c in made.fno_blocks.convs]
    z = torch.randn(2, 6, 12, 12)
    assert all(torch.equal(a(z), b(z)) for a, b in zip(layers, made.fno_blocks.convs, strict=True))
    fresh = fno()
    for layer in list(spectral_layers(fresh).values()):
        scheme = SCHEMES[name]
        replace_modules(fresh, {layer: scheme.build(layer, "weight.tensor", half(scheme, layer))})
    assert list(fresh.state_dict()) == list(made.state_dict())
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), y)
    y.square().mean().backward()
    parameters = dict(made.fno_blocks.convs[0].named_parameters())
    assert all(p.grad is not None and bool(p.grad.any()) for p in parameters.values())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    assert all(not torch.equal(before[n], p) for n, p in parameters.items())
    assert float((made(x) - y).detach().abs().max()) > 0


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_of_factors_equal_those_through_the_dense_weight(name):
    layer = conv((4, 4))
    made, _ = factorized(layer, SCHEMES[name], half(SCHEMES[name], layer))
    x = torch.randn(2, 5, 8, 8)
    made(x).square().sum().backward()
    if isinstance(made, SpectralFactors):
        merged = SCHEMES[name].merge(copy.deepcopy(made))
        merged(x).square().sum().backward()
        v = made.first.weight.flatten(1) if "channel_out" not in name else torch.eye(5)
        u = made.second.weight.flatten(1) if "channel_in" not in name else torch.eye(7)
        expected = torch.einsum("ai,bo,io...->ab...", v + 0j, u.mT + 0j, dense_weight(merged).grad)
        close(dense_weight(made.spectral).grad, expected, 1e-4)
        return
    plain, twin = conv((4, 4)), copy.deepcopy(made)
    twin.zero_grad()
    dense = dense_weight(twin)
    with torch.no_grad():
        dense_weight(plain).copy_(dense)
    plain(x).square().sum().backward()
    dense.backward(dense_weight(plain).grad)
    for ours, theirs in zip(made.weight.parameters(), twin.weight.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_frozen_weights_and_modes_of_training_stay(name):
    layer = conv()
    layer.weight.requires_grad_(False)
    layer.eval()
    bias = layer.bias
    scheme = SCHEMES[name]
    state = torch.get_rng_state()
    built = scheme.build(layer, "weight.tensor", half(scheme, layer))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in built.modules())
    kept = {n: p for n, p in built.named_parameters() if "bias" in n}
    assert not any(p.requires_grad for n, p in built.named_parameters() if n not in kept)
    assert len(kept) == 1 and torch.equal(next(iter(kept.values())).flatten(), bias.flatten())
    assert all(p.requires_grad for p in kept.values())
    merged = scheme.merge(built)
    assert torch.equal(merged.bias, bias) and merged.bias.requires_grad
    assert not dense_weight(merged).requires_grad and not any(m.training for m in merged.modules())


@pytest.mark.parametrize("name", SCHEMES)
def test_merging_gives_one_dense_layer_back(name):
    scheme, layer = SCHEMES[name], conv((6, 6), resolution_scaling_factor=2)
    made, _ = factorized(layer, scheme, half(scheme, layer))
    x = torch.randn(2, 5, 9, 10)
    expected = made(x)
    merged = scheme.merge(made)
    assert is_spectral(merged) and not is_factorized(merged)
    assert list(merged.state_dict()) == list(layer.state_dict())
    assert (merged.in_channels, merged.out_channels, merged.n_modes) == (5, 7, layer.n_modes)
    close(merged(x), expected)


@pytest.mark.parametrize("factorization", ["tucker", "cp", "tt"])
def test_tensors_of_neuraloperator_merge_and_are_refused_until_then(factorization):
    model = fno(factorization=factorization, rank=0.5, implementation="factorized").eval()
    x = torch.randn(2, 1, 16, 16)
    expected = model(x)
    for layer in spectral_layers(model).values():
        target = next(t for t in find(model) if t.module is layer)
        assert all("merge_factors" in s.fits(target) for s in SCHEMES.values())
        assert SCHEMES["modes"].merge(layer) is layer
    close(model(x), expected, 1e-4)
    fresh = fno()
    assert set(model.state_dict()) == set(fresh.state_dict())
    again = whole_model(model, SCHEMES["tucker"], full)
    close(again(x), expected, 1e-4)


@pytest.mark.parametrize("name", ["tucker", "cp", "tt"])
def test_neuraloperator_sees_its_own_kind_of_layer(name):
    made, _ = factorized(conv(), SCHEMES[name], half(SCHEMES[name], conv()))
    theirs = conv(factorization=name, rank=0.5, implementation="factorized")
    assert type(made.weight) is type(theirs.weight)
    assert list(made.state_dict()) == list(theirs.state_dict())
    assert made._contract is theirs._contract
    assert (made.factorization, made.implementation) == (theirs.factorization, theirs.implementation)
    assert made.rank == made.weight.rank


@pytest.mark.parametrize("name", SCHEMES)
def test_later_methods_find_the_factors(name):
    model = whole_model(fno(), SCHEMES[name], half)
    found = [t for t in find(model) if ".convs." in t.key and "bias" not in t.key]
    assert {t.key for t in found} == {
        n for n, _ in model.named_parameters() if ".convs." in n and not n.endswith("bias")
    }
    pruned = lc.compress(model, [lc.Prune(0.5, include="fno_blocks.convs*")]).model
    weights = [t.weight for t in find(pruned, "fno_blocks.convs*")]
    zeros, entries = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert abs(zeros - entries / 2) <= 1


def test_axes_of_held_factors():
    made, _ = factorized(conv(), SCHEMES["channel"], (2, 3))
    assert made.weight.axes == {n: Axes(1, 0) for n in ("input", "core", "output")}
    assert {n: tuple(p.shape) for n, p in made.weight.named_parameters()} == {
        "input": (5, 2), "core": (2, 3, 6, 3), "output": (3, 7),
    }  # fmt: skip
    made, _ = factorized(conv(), SCHEMES["modes"], (4,))
    assert made.weight.axes == {"coefficients": Axes(1, 0), "modes": Axes(0, None)}
    made, _ = factorized(conv(o=5, separable=True), SCHEMES["modes"], (4,))
    assert made.weight.axes["coefficients"] == Axes(0, None)


@pytest.mark.parametrize("name", ["channel_in", "channel_out", "channel", "modes"])
def test_held_factors_can_lose_modes(name):
    made, _ = factorized(conv((6, 6)), SCHEMES[name], half(SCHEMES[name], conv((6, 6))))
    made.weight.requires_grad_(False)
    cut = made.weight.truncated([slice(1, 5), slice(0, 2)])
    assert type(cut) is type(made.weight) and cut.shape == (5, 7, 4, 2)
    close(cut.to_tensor(), made.weight.to_tensor()[:, :, 1:5, :2])
    changed = [n for n, p in cut.named_parameters() if p is not made.weight.get_parameter(n)]
    assert changed == ["modes" if name == "modes" else "core"]
    assert not any(p.requires_grad for p in cut.parameters())
    same = made.weight.truncated([slice(0, 6), slice(0, 4)])
    assert all(p is made.weight.get_parameter(n) for n, p in same.named_parameters())


@pytest.mark.parametrize("name", ["channel_in", "channel", "modes", "real channel"])
def test_export_and_compile(name):
    model = whole_model(fno(n_layers=1), SCHEMES[name], half).eval()
    x = torch.randn(2, 1, 16, 16)
    exported = torch.export.export(model, (x,)).module()
    close(exported(x), model(x))
    compiled = torch.compile(model, backend="eager")
    close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["channel_in", "channel_out", "channel", "modes"])
def test_half_precision_coefficients_are_multiplied_in_full(name):
    made, _ = factorized(conv((4, 4)), SCHEMES[name], half(SCHEMES[name], conv((4, 4))))
    x = torch.randn(2, 5, 4, 3, dtype=torch.complex64)
    index = (slice(None),) * 4
    low = made._contract(x.to(torch.complex32), made.weight[index], separable=False)
    assert low.dtype == torch.complex32
    close(low.to(torch.complex64), made._contract(x, made.weight[index], separable=False), 2e-2)


def test_real_factors_stand_in_for_the_layer_in_its_block():
    model = fno().eval()
    made = whole_model(model, SCHEMES["real channel"], full)
    layer = made.fno_blocks.convs[0]
    assert isinstance(layer, SpectralFactors) and layer.max_n_modes == [6, 4] and layer.n_modes == [6, 4]
    assert [n for n, _ in layer.named_children()] == ["first", "spectral", "second"]
    for m in (model, made):
        m.fno_blocks.n_modes = (4, 4)
    assert layer.n_modes == [4, 3] == layer.spectral.n_modes
    x = torch.randn(2, 1, 16, 16)
    close(made(x), model(x), 1e-4)
    layer.resolution_scaling_factor, layer.max_n_modes = [2, 2], [6, 4]
    assert layer.spectral.resolution_scaling_factor == [2, 2]
    assert layer(torch.randn(1, 6, 8, 8)).shape == (1, 6, 16, 16)
    thin = whole_model(model, SCHEMES["real channel_in"], half)
    assert thin.fno_blocks.convs[0].spectral.in_channels == 3


# -- what is refused ------------------------------------------------------------------------------------------


def test_reasons():
    linear = next(iter(find(nn.Linear(3, 2))))
    separable = target_of(conv(o=5, separable=True))
    for name, scheme in SCHEMES.items():
        assert scheme.fits(linear) == ""
        why = scheme.fits(separable)
        assert (why is None) == (name in SEPARABLE)
        assert why is None or "separable" in why
    bias = next(t for t in find(nn.Sequential(conv()), "0.bias"))
    assert all(s.fits(bias) == "" for s in SCHEMES.values())
    pairs = conv(factorization="ComplexDense")
    assert "complex64" in SCHEMES["modes"].fits(target_of(pairs))
    low = conv()
    low.weight.tensor = nn.Parameter(low.weight.tensor.detach().to(torch.complex32))
    assert "complex32" in SCHEMES["channel_in"].fits(target_of(low))
    for name, options in (("complex", {"complex_data": True}), ("'half'", {"fno_block_precision": "half"})):
        target = target_of(conv(**options))
        assert SCHEMES["channel"].fits(target) is None
        assert name in SCHEMES["real channel"].fits(target)
    assert "3 dimensions" in SCHEMES["real channel_in"].fits(target_of(conv((2, 2, 2, 2))))


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_that_are_not_finite(name):
    layer = conv()
    with torch.no_grad():
        dense_weight(layer)[0, 0, 0, 0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        SCHEMES[name].decompose(target_of(layer), None, 0.0)
