"""PartialFourier: the transforms equal FFTs with slicing and zero filling, the layers equal neuraloperator's own."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress.functional import fourier
from lightning_compress.functional.inputs import spectrum
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.pruning import fourier as layers
from lightning_compress.pruning.fourier import PartialFourier
from lightning_compress.pruning.modes import TruncateModes
from lightning_compress.quantization.layers import input_quantizer, quantize_input, release
from lightning_compress.quantization.quantizers import InputQuantizer
from lightning_compress.spectral import is_spectral, set_weight
from lightning_compress.targets import plain_class
from lightning_compress.transform import applied, replay

operators = pytest.importorskip("neuralop.models")
SpectralConv = pytest.importorskip("neuralop.layers.spectral_convolution").SpectralConv
NORMS = ("forward", "backward", "ortho", None)


@st.composite
def transforms(draw, real=True):
    """Sizes of one to three axes, modes that they have, and other sizes for the way back."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    most = [*sizes[:-1], sizes[-1] // 2 + 1 if real else sizes[-1]]
    modes = [draw(st.integers(1, k)) for k in most]
    back = [draw(st.one_of(st.just(n), st.integers(1, 14))) for n in sizes]
    return sizes, modes, back, draw(st.sampled_from(NORMS)), draw(st.integers(0, 1000))


def signal(seed, *shape, complex_data=False):
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((2, 3, *shape))
    return x + 1j * generator.standard_normal(x.shape) if complex_data else x


def places(modes, sizes, real, there):
    """The kept part of a shifted spectrum; on the last axis from the start."""
    index = [slice(n // 2 - k // 2, n // 2 - k // 2 + k) for k, n in zip(modes[:-1], sizes[:-1], strict=True)]
    return (..., *index, slice(0, modes[-1]))


def close(a, b, tolerance=1e-10):
    b = torch.as_tensor(b)
    assert a.shape == b.shape and a.is_complex() == b.is_complex()
    torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=tolerance * (1 + float(b.detach().abs().max())))


@settings(max_examples=150, deadline=None)
@given(transforms())
def test_real_analysis_is_the_fft_sliced(case):
    sizes, modes, _, norm, seed = case
    x = signal(seed, *sizes)
    axes = tuple(range(-len(sizes), 0))
    whole = np.fft.fftshift(np.fft.rfftn(x, axes=axes, norm=norm), axes=axes[:-1])
    close(fourier.partial_rfftn(torch.tensor(x), modes, norm), whole[places(modes, sizes, True, True)])


@settings(max_examples=150, deadline=None)
@given(transforms(real=False))
def test_complex_analysis_is_the_fft_sliced(case):
    sizes, modes, _, norm, seed = case
    x = signal(seed, *sizes, complex_data=True)
    axes = tuple(range(-len(sizes), 0))
    whole = np.fft.fftn(x, axes=axes, norm=norm)
    whole = np.fft.fftshift(whole, axes=axes) if len(axes) > 1 else whole
    close(fourier.partial_fftn(torch.tensor(x), modes, norm), whole[places(modes, sizes, False, True)])


@settings(max_examples=150, deadline=None)
@given(st.booleans(), transforms())
def test_synthesis_is_the_inverse_of_a_filled_spectrum(real, case):
    sizes, modes, back, norm, seed = case
    c = signal(seed, *modes, complex_data=True)
    axes = tuple(range(-len(sizes), 0))
    whole = np.zeros((2, 3, *sizes[:-1], sizes[-1] // 2 + 1 if real else sizes[-1]), dtype=complex)
    whole[places(modes, sizes, real, False)] = c
    whole = torch.tensor(np.fft.fftshift(whole, axes=axes[:-1]) if len(axes) > 1 else whole)
    inverse, partial = (
        (torch.fft.irfftn, fourier.partial_irfftn) if real else (torch.fft.ifftn, fourier.partial_ifftn)
    )
    close(partial(torch.tensor(c), back, norm, sizes), inverse(whole, s=back, dim=axes, norm=norm))
    if back == sizes:
        assert torch.equal(partial(torch.tensor(c), back, norm, sizes), partial(torch.tensor(c), back, norm))


@pytest.mark.parametrize("stored", [(5, 3), (8, 5), (7, 4)])
def test_layout_is_that_of_the_statistics(stored):
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    theirs, _ = spectrum(x, stored, stored, stored, real=True, norm="forward")
    close(fourier.partial_rfftn(x, stored, "forward"), theirs)


def test_gradients_of_both_directions():
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    c = torch.randn(1, 2, 3, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fourier.partial_rfftn(x, (3, 3), "ortho"), x)
    assert torch.autograd.gradcheck(lambda c: fourier.partial_irfftn(c, (5, 7), "ortho", (5, 6)), c)
    assert torch.autograd.gradcheck(
        lambda c: fourier.partial_ifftn(fourier.partial_fftn(c, (2, 3)), (3, 3)), c
    )
    assert torch.autograd.gradgradcheck(lambda x: fourier.partial_rfftn(x, (3, 3)).abs().square().sum(), x)


@pytest.mark.parametrize(
    ("dtype", "wide", "tolerance"),
    [
        (torch.float32, torch.complex64, 2e-6),
        (torch.float64, torch.complex128, 1e-13),
        (torch.bfloat16, torch.complex64, 2e-6),
        (torch.float16, torch.complex64, 2e-6),
    ],
)
def test_precision(dtype, wide, tolerance):
    x = torch.randn(2, 256, 200).to(dtype)
    reference = np.fft.rfft2(x.double().numpy(), norm="forward")
    found = fourier.partial_rfftn(x, (16, 9), "forward")
    reference = np.fft.fftshift(reference, axes=-2)[:, 120:136, :9]
    assert found.dtype == wide
    close(found.to(torch.complex128), reference, tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        again = fourier.partial_rfftn(x, (16, 9), "forward")
        back = fourier.partial_irfftn(again, (256, 200), "forward")
    assert torch.equal(again, found) and torch.equal(
        back, fourier.partial_irfftn(found, (256, 200), "forward")
    )


def test_matrices_are_kept_for_training_too_and_few():
    fourier._kept.cache_clear()
    x = torch.randn(1, 6, 6)
    with torch.inference_mode():
        fourier.partial_rfftn(x, (3, 2))
    leaf = x.clone().requires_grad_()
    fourier.partial_rfftn(leaf, (3, 2)).abs().sum().backward()
    assert leaf.grad is not None and fourier._kept.cache_info().hits == 2
    for n in range(2, 100):
        fourier.partial_rfftn(torch.randn(n, n), (1, 1))
    assert fourier._kept.cache_info().currsize == fourier._kept.cache_info().maxsize <= 128
    assert fourier.partial_rfftn(x.double(), (3, 2)).dtype == torch.complex128


@given(
    st.lists(st.integers(2, 128), min_size=1, max_size=3).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.tuples(*(st.integers(1, max(1, n // 2)) for n in sizes)))
    )
)
def test_the_rule_counts_what_runs(case):
    sizes, modes = case
    net = nn.Module()

    def forward(x):
        return fourier.partial_irfftn(fourier.partial_rfftn(x, modes), sizes)

    net.forward = forward
    products = lc.cost(net, torch.randn(1, *sizes)).macs
    net.forward = lambda x: torch.fft.irfftn(torch.fft.rfftn(x, dim=dims), s=sizes, dim=dims)
    dims = tuple(range(-len(sizes), 0))
    ffts = lc.cost(net, torch.randn(1, *sizes)).macs
    limit = fourier.FASTER_UP_TO[len(sizes) > 1]
    if abs(products - limit * ffts) > 1 + len(sizes) * limit:  # costs are rounded to whole numbers
        assert fourier.faster(sizes, modes, sizes, real=True) == (products <= limit * ffts)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fourier.partial_rfftn(torch.zeros(4, 4), (4, 4)),
        lambda: fourier.partial_rfftn(torch.zeros(4, 4), (0, 1)),
        lambda: fourier.partial_fftn(torch.zeros(4, 4), (5, 1)),
        lambda: fourier.partial_irfftn(torch.zeros(4, 4, dtype=torch.cfloat), (4, 4)),
        lambda: fourier.partial_ifftn(torch.zeros(4, 4, dtype=torch.cfloat), (8, 8), None, (4, 3)),
    ],
)
def test_modes_that_a_transform_does_not_have(call):
    with pytest.raises(ValueError, match=r"modes=.*allowed are 1 to"):
        call()
    with pytest.raises(ValueError, match="norm='sideways'"):
        fourier.partial_rfftn(torch.zeros(4, 4), (1, 1), "sideways")


# -- layers --------------------------------------------------------------------------------------------------


def quick(layer):
    """The layer as the only one of a model, changed."""
    return lc.compress(nn.Sequential(layer), [PartialFourier()]).model[0]


@pytest.fixture
def always(monkeypatch):
    """Never the FFT, whatever the rule says; a call of the layer's own forward is a failure."""
    monkeypatch.setattr(layers, "faster", lambda *a, **k: True)
    for name in ("fftn", "rfftn"):
        monkeypatch.setattr(torch.fft, name, None)
    yield monkeypatch
    monkeypatch.undo()


OPTIONS = [
    {"n_modes": (8, 8)},
    {"n_modes": (7, 9), "bias": False},
    {"n_modes": (6,)},
    {"n_modes": (5, 4, 6)},
    {"n_modes": (8, 8), "separable": True},
    {"n_modes": (6, 6), "complex_data": True},
    {"n_modes": (5, 7), "complex_data": True, "fft_norm": "ortho"},
    {"n_modes": (6,), "complex_data": True},
    {"n_modes": (8, 8), "fft_norm": "backward"},
    {"n_modes": (8, 8), "fft_norm": "ortho"},
    {"n_modes": (5, 6), "max_n_modes": (8, 7)},
    {"n_modes": (8, 8), "resolution_scaling_factor": 2},
    {"n_modes": (8, 8), "resolution_scaling_factor": [0.5, 1.5]},
    {"n_modes": (8, 8), "factorization": "tucker", "rank": 0.5, "implementation": "factorized"},
    {"n_modes": (8, 8), "factorization": "cp", "rank": 0.5, "implementation": "factorized"},
    {"n_modes": (8, 8), "factorization": "tt", "rank": 0.5, "implementation": "reconstructed"},
]


def plain_outputs(options, sizes, output_shape=None):
    torch.manual_seed(0)
    layer = SpectralConv(3, 3, **options)
    x = torch.randn(2, 3, *sizes, dtype=torch.cfloat if layer.complex_data else torch.float)
    return layer, x, layer(x, output_shape)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("size", [16, 17, 6, 5, 3])
def test_layers_give_the_same(options, size, always):
    sizes = [size + axis for axis in range(len(options["n_modes"]))]
    always.undo()
    layer, x, y = plain_outputs(options, sizes)
    for name in ("fftn", "rfftn"):
        always.setattr(torch.fft, name, None)
    always.setattr(layers, "faster", lambda *a, **k: True)
    made = quick(layer)(x)
    assert made.dtype == y.dtype
    close(made, y, 3e-6)


@pytest.mark.parametrize("shape", [(16, 16), (20, 11), (7, 9), (5, 3)])
@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[5:6] + OPTIONS[11:12])
def test_output_shapes_are_kept(options, shape, always):
    always.undo()
    layer, x, y = plain_outputs(options, (12, 9), shape)
    always.setattr(layers, "faster", lambda *a, **k: True)
    close(quick(layer)(x, output_shape=shape), y, 3e-6)
    close(quick(layer)(x, shape), y, 3e-6)


def fno(**options):
    torch.manual_seed(0)
    sizes = {"n_modes": (8, 8), "hidden_channels": 6, "n_layers": 2}
    return operators.FNO(in_channels=1, out_channels=1, **{**sizes, **options}).eval()


def uno():
    torch.manual_seed(0)
    return operators.UNO(
        in_channels=1,
        out_channels=1,
        hidden_channels=4,
        lifting_channels=4,
        projection_channels=4,
        n_layers=3,
        uno_out_channels=[4, 6, 4],
        uno_n_modes=[[8, 8], [6, 6], [8, 8]],
        uno_scalings=[[1, 1], [0.5, 0.5], [2, 2]],
        channel_mlp_skip="linear",
    ).eval()


def codano():
    torch.manual_seed(0)
    return operators.CODANO(
        output_variable_codimension=1,
        hidden_variable_codimension=4,
        lifting_channels=8,
        projection_channels=8,
        n_layers=2,
        n_modes=[[8, 8]] * 2,
        n_heads=[2, 2],
        per_layer_scaling_factors=[[1, 1], [1, 1]],
        attention_scaling_factors=[1, 1],
    ).eval()


@pytest.mark.parametrize("make", [fno, uno, codano])
@pytest.mark.parametrize("size", [(16, 16), (33, 30), (64, 64)])
def test_models_give_the_same_outputs_and_gradients(make, size):
    a, b = make(), lc.compress(make(), [PartialFourier()]).model
    x = torch.randn(1, 1, *size)
    ya, yb = a(x), b(x)
    close(yb.detach(), ya.detach(), 1e-5)
    ya.square().mean().backward()
    yb.square().mean().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        if p.grad is not None:
            close(q.grad, p.grad, 1e-4)
    assert any(p.grad is not None and p.is_complex() for p in a.parameters())


def test_training_runs_through_it():
    def losses(model):
        torch.manual_seed(1)
        x = torch.randn(4, 1, 32, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for _ in range(5):
            loss = (model(x) - x.roll(1, -1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    plain, fast = losses(fno().train()), losses(lc.compress(fno(), [PartialFourier()]).model.train())
    assert plain[-1] < plain[0] and fast == pytest.approx(plain, rel=1e-4)


def test_the_rule_decides_at_every_call(monkeypatch):
    layer = quick(SpectralConv(2, 2, (16, 16)))
    ran = []
    monkeypatch.setattr(layers, "partial_rfftn", lambda *a: ran.append(a[1]) or fourier.partial_rfftn(*a))
    for size in (128, 16, 64):
        layer(torch.randn(1, 2, size, size))
    assert ran == [(16, 9), (16, 9)] and not fourier.faster((16, 16), (16, 9), (16, 16), real=True)


def test_other_numbers_of_axes_fail_as_before():
    layer = SpectralConv(2, 2, (4, 4))
    with pytest.raises(Exception) as ours:
        quick(layer)(torch.randn(1, 2, 8))
    with pytest.raises(type(ours.value)):
        layer(torch.randn(1, 2, 8))


def test_objects_keys_and_classes():
    model = nn.Sequential(SpectralConv(2, 2, (4, 4)))
    layer, x = model[0], torch.randn(1, 2, 32, 32)
    ids, keys, y = [id(p) for p in model.parameters()], list(model.state_dict()), model(x)
    lc.compress(model, [PartialFourier()], inplace=True)
    assert model[0] is layer and isinstance(layer, SpectralConv) and type(layer) is not SpectralConv
    assert [id(p) for p in model.parameters()] == ids and list(model.state_dict()) == keys
    assert plain_class(layer) is SpectralConv and is_spectral(layer)
    assert "SpectralConv" in {c.kind for c in lc.cost(model, x).layers}
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lc.finalize(model)]
    for twin in twins:
        assert type(twin[0]) is type(layer)
        assert torch.equal(twin(x), model(x))
    close(model(x).detach(), y.detach(), 1e-6)
    assert pickle.loads(pickle.dumps(type(layer))) is type(layer)

    class Own(SpectralConv):
        pass

    assert plain_class(quick(Own(2, 2, (4, 4)))) is Own


def test_twice_is_an_identity_and_every_step_replays(tmp_path):
    result = lc.compress(fno(), [PartialFourier()])
    assert result.plan[0].identity and not result.coverage.changed and len(result.plan[0].layers) == 2
    again = lc.compress(result.model, [PartialFourier()])
    assert again.plan[0].identity and not again.plan[0].layers
    assert "already" in again.plan[0].skipped["fno_blocks.convs.0"]
    x = torch.randn(1, 1, 64, 64)
    for model in (result.model, again.model):
        lc.save(model, tmp_path / "fno.lcz")
        back = lc.load(tmp_path / "fno.lcz", into=fno())
        assert torch.equal(back(x), model(x))
        assert [type(m).__name__ for m in back.modules()] == [type(m).__name__ for m in model.modules()]
    fresh = fno()
    replay(fresh, applied(result.model))
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(fresh(x), result.model(x))
    fresh = fno()
    PartialFourier().apply(fresh, from_json(json.loads(json.dumps(to_json(result.plan[0])))))
    assert torch.equal(fresh(x), result.model(x))
    fno().load_state_dict(result.model.state_dict())


def test_with_truncation_in_either_order():
    x = torch.randn(1, 1, 32, 32)
    plain = lc.compress(fno(), [TruncateModes((5, 4))]).model
    one = lc.compress(fno(), [TruncateModes((5, 4)), PartialFourier()]).model
    other = lc.compress(fno(), [PartialFourier(), TruncateModes((5, 4))]).model
    assert torch.equal(one(x), other(x)) and type(one.fno_blocks.convs[0]) is type(other.fno_blocks.convs[0])
    close(one(x).detach(), plain(x).detach(), 1e-5)


def test_quantizers_on_a_partial_layer_and_the_other_way_round(tmp_path):
    x = torch.randn(2, 2, 32, 32)
    reference = SpectralConv(2, 2, (6, 6))
    first, second = copy.deepcopy(reference), copy.deepcopy(reference)
    quantize_input(reference, InputQuantizer(4, scale=0.5))
    first = quick(first)
    quantize_input(first, InputQuantizer(4, scale=0.5))
    quantize_input(second, InputQuantizer(4, scale=0.5))
    second = quick(second)
    y = reference(x)
    assert not torch.allclose(y, SpectralConv.forward(reference, x))
    for layer in (first, second):
        close(layer(x).detach(), y.detach(), 1e-5)
        assert input_quantizer(layer) is not None
        for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert torch.equal(twin(x), layer(x)) and type(twin) is type(layer)
        release(layer)
        assert input_quantizer(layer) is None
        close(layer(x).detach(), SpectralConv.forward(reference, x).detach(), 1e-5)
    assert second.__class__.__name__ == "PartialSpectralConv"
    assert lc.compress(nn.Sequential(second), [PartialFourier()]).plan[0].identity

    field = torch.randn(4, 1, 32, 32)
    steps = [lc.Quantize(8, activation_bits=8), PartialFourier()]
    made = [
        lc.compress(fno(), order, example_input=field, seed=1).model
        for order in (steps, steps[::-1], steps[:1])
    ]
    for model in made[:2]:
        close(model(field).detach(), made[2](field).detach(), 1e-2)  # a rounding may flip
        lc.save(model, tmp_path / "fno.lcz")
        assert torch.equal(lc.load(tmp_path / "fno.lcz", into=fno())(field), model(field))
        assert torch.equal(lc.finalize(model)(field), model(field))


def test_qat_weights_are_rounded_in_a_partial_layer():
    from lightning_compress.quantization.layers import quantize_weight
    from lightning_compress.quantization.learned import LearnedWeight

    layer = SpectralConv(2, 2, (6, 6))
    quantize_weight(layer.weight, "tensor", LearnedWeight(3, layer.weight.tensor))
    x = torch.randn(1, 2, 32, 32)
    close(quick(copy.deepcopy(layer))(x).detach(), layer(x).detach(), 1e-5)


class Holder(nn.Module):
    """Some other weight: it has a shape and can be sliced."""

    def __init__(self, tensor):
        super().__init__()
        self.kept = nn.Parameter(tensor)

    shape = property(lambda self: self.kept.shape)

    def __getitem__(self, index):
        return self.kept[index]


def test_any_holder_and_contraction():
    layer = SpectralConv(2, 2, (6, 6))
    weight = layer.weight.tensor.detach()
    x = torch.randn(1, 2, 32, 32)
    y = layer(x)

    def contract(x, weight, separable=False):
        assert not separable and x.shape[2:] == weight.shape[2:] == (6, 4)
        return torch.einsum("bixy,ioxy->boxy", x, weight)

    set_weight(layer, Holder(weight), contract)
    close(quick(layer)(x).detach(), y.detach(), 1e-6)


def test_export_and_compile():
    layer, x = quick(SpectralConv(2, 2, (6, 6))).eval(), torch.randn(1, 2, 32, 32)
    fourier._kept.cache_clear()
    program = torch.export.export(layer, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("fft" in t for t in targets) and any("bmm" in t for t in targets)
    close(program.module()(x).detach(), layer(x).detach(), 1e-5)
    assert fourier._kept.cache_info().currsize == 4  # of the call above; what was traced has kept nothing
    close(torch.compile(layer, backend="eager")(x).detach(), layer(x).detach(), 1e-5)


def test_costs_of_a_partial_layer_are_those_of_its_products():
    x = torch.randn(3, 4, 64, 64)
    layer = quick(SpectralConv(4, 4, (8, 8)))
    counted = lc.cost(nn.Sequential(layer), x).macs
    k1, k2, n = 8, 5, 64
    both_ways = 2 * 3 * 4 * (n * n * 2 * k2 + 4 * k1 * n * k2)
    assert counted == both_ways + 4 * 3 * 4 * 4 * k1 * k2
    assert counted < lc.cost(nn.Sequential(SpectralConv(4, 4, (8, 8))), x).macs


def test_what_cannot_be_changed_is_listed():
    with pytest.raises(lc.NothingChangedError, match="computed in half precision"):
        quick(SpectralConv(2, 2, (4, 4), fno_block_precision="half"))
    result = lc.compress(
        nn.Sequential(SpectralConv(2, 2, (4, 4), fno_block_precision="mixed"), SpectralConv(2, 2, (4, 4))),
        [PartialFourier()],
    )
    assert "mixed precision" in result.plan[0].skipped["0"] and list(result.plan[0].layers) == ["1"]
    patched = SpectralConv(2, 2, (4, 4))
    patched.forward = lambda x: x
    with pytest.raises(lc.NothingChangedError, match="forward of its own"):
        quick(patched)
    with pytest.raises(lc.NothingChangedError, match="Linear is not a spectral convolution"):
        lc.compress(nn.Linear(2, 2), [PartialFourier()])
    with pytest.raises(lc.NothingChangedError, match="excluded by"):
        lc.compress(fno(), [PartialFourier(exclude="fno_blocks.convs.*")])
    with pytest.raises(ValueError, match="fits no layer"):
        lc.compress(fno(), [PartialFourier(include="nowhere")])


def test_forged_plans_change_nothing():
    model = fno(fno_block_precision="mixed")
    for target, plan in (
        (fno(), {"fno_blocks.convs.0": {}, "lifting": {}}),
        (fno(), {"fno_blocks.convs.0": {}, "nowhere": {}}),
        (model, {"fno_blocks.convs.0": {}}),
    ):
        with pytest.raises(ValueError, match=r"not a spectral convolution|mixed precision"):
            PartialFourier().apply(target, Plan(plan))
        assert all(plain_class(m) is type(m) for m in target.modules())


def test_a_layer_under_two_names_is_changed_once():
    layer = SpectralConv(2, 2, (4, 4))
    model = lc.compress(nn.Sequential(layer, layer), [PartialFourier()]).model
    assert model[0] is model[1] and type(model[0]).__name__ == "PartialSpectralConv"


def test_sizes_follow_the_scaling_of_the_layer():
    for factor, n in ((0.5, 15), (1.5, 15), (2, 9)):
        layer, x, y = plain_outputs({"n_modes": (4, 4), "resolution_scaling_factor": factor}, (n, n + 1))
        assert layers._sizes(layer, x.shape[2:], None) == tuple(y.shape[2:])
        assert math.prod(y.shape) > 0
