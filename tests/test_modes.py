"""TruncateModes: equals zeroing the outer modes, and leaves what neuraloperator itself would have built."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.pruning.boxes import centred, smallest_box
from lightning_compress.pruning.modes import TruncateModes
from lightning_compress.spectral import dense_weight, set_weight, spectral_layers
from lightning_compress.transform import OrderError, applied, replay

operators = pytest.importorskip("neuralop.models")
SpectralConv = pytest.importorskip("neuralop.layers.spectral_convolution").SpectralConv


def fno(modes=(8, 8), kind="FNO", **options):
    torch.manual_seed(0)
    sizes = {"hidden_channels": 4, "n_layers": 2, "projection_channel_ratio": 2}
    return getattr(operators, kind)(
        n_modes=modes, in_channels=1, out_channels=1, **{**sizes, **options}
    ).eval()


def uno(modes=((8, 8), (6, 6), (8, 8))):
    torch.manual_seed(0)
    return operators.UNO(
        in_channels=1,
        out_channels=1,
        hidden_channels=4,
        lifting_channels=4,
        projection_channels=4,
        n_layers=3,
        uno_out_channels=[4, 6, 4],
        uno_n_modes=[list(m) for m in modes],
        uno_scalings=[[1, 1], [0.5, 0.5], [2, 2]],
        channel_mlp_skip="linear",
    ).eval()


def codano(modes=(8, 8), **options):
    torch.manual_seed(0)
    return operators.CODANO(
        output_variable_codimension=1,
        hidden_variable_codimension=4,
        lifting_channels=8,
        projection_channels=8,
        n_layers=2,
        n_modes=[list(modes)] * 2,
        n_heads=[2, 2],
        per_layer_scaling_factors=[[1, 1], [1, 1]],
        attention_scaling_factors=[1, 1],
        **options,
    ).eval()


def run(model, *args, **options):
    return lc.compress(model, [TruncateModes(*args, **options)])


def zeroed(weight, stored, kept):
    """The weight with other modes at zero, by frequency numbers."""
    keep = np.ones(stored, dtype=bool)
    for axis, (size, k) in enumerate(zip(stored, kept, strict=True)):
        if axis == len(stored) - 1:
            inside = np.arange(size) < k
        else:
            mine = np.fft.fftshift(np.fft.fftfreq(size, 1 / size))
            inside = np.isin(mine, np.fft.fftshift(np.fft.fftfreq(k, 1 / k)))
        keep &= inside.reshape([-1 if a == axis else 1 for a in range(len(stored))])
    return weight * torch.from_numpy(keep)


def close(a, b, tolerance=1e-6):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


@pytest.mark.parametrize("stored", [(8, 8), (9, 9)])
@pytest.mark.parametrize("kept", [(6, 6), (5, 5), (5, 6), (1, 1), (7, 2), (8, 3)])
def test_equals_zeroing_at_every_size(stored, kept):
    model = fno(stored, hidden_channels=6)
    reference = copy.deepcopy(model)
    for layer in spectral_layers(reference).values():
        sizes = (stored[0], stored[1] // 2 + 1), (kept[0], kept[1] // 2 + 1)
        layer.weight.tensor.data = zeroed(layer.weight.tensor.data, *sizes)
    small = run(model, kept).model
    for size in ((16, 16), (17, 17), (32, 32), (9, 9), (17, 12)) + (((6, 6),) if stored[0] == 8 else ()):
        x = torch.randn(2, 1, *size)
        close(small(x), reference(x))
    assert [tuple(p.shape[2:]) for p in small.parameters() if p.is_complex()] == [
        (kept[0], kept[1] // 2 + 1)
    ] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"n_modes": (12,)},
        {"n_modes": (6, 5, 6)},
        {"n_modes": (8, 8), "separable": True},
        {"n_modes": (8, 8), "separable": True, "factorization": "tucker", "rank": 0.9},
        {"n_modes": (8, 8), "factorization": "tucker", "rank": 0.6, "implementation": "factorized"},
        {"n_modes": (8, 8), "factorization": "tucker", "rank": 0.6, "implementation": "reconstructed"},
        {"n_modes": (8, 8), "factorization": "cp", "rank": 0.5, "implementation": "factorized"},
        {"n_modes": (8, 8), "factorization": "tt", "rank": 0.5, "implementation": "factorized"},
        {"n_modes": (6, 6), "complex_data": True},
        {"n_modes": (8, 8), "bias": False, "resolution_scaling_factor": 2},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.2])
def test_every_kind_of_weight(options, ratio):
    torch.manual_seed(0)
    layer = SpectralConv(4, 4, **options)
    whole = dense_weight(layer).detach()
    stored = tuple(whole.shape)[1 if layer.separable else 2 :]
    kept = tuple(max(1, round(ratio * k)) for k in stored)
    reference = SpectralConv(4, 4, **{k: v for k, v in options.items() if k not in ("factorization", "rank")})
    reference.weight.tensor.data = zeroed(whole, stored, kept)
    reference.bias = layer.bias
    small = run(nn.Sequential(layer), keep_ratio=ratio).model[0]
    assert tuple(small.weight.shape)[-len(kept) :] == kept == tuple(small.n_modes)
    for size in (16, 17):
        x = torch.randn(2, 4, *[size] * len(kept), dtype=torch.cfloat if layer.complex_data else torch.float)
        close(small(x), reference(x), 2e-6)
    names = [n for n, _ in layer.named_parameters()]
    assert [n for n, _ in small.named_parameters()] == names
    shapes = [p.shape for p in layer.parameters()]
    assert sum(a != p.shape for a, p in zip(shapes, small.parameters(), strict=True)) == (
        len(kept) if options.get("factorization") else 1
    )


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.tuples(*(st.integers(1, s) for s in sizes)))
    )
)
def test_centred_keeps_the_lowest_frequencies(pair):
    stored, kept = pair
    for axis, (box, size, k) in enumerate(zip(centred(stored, kept), stored, kept, strict=True)):
        if axis == len(stored) - 1:
            assert list(range(size)[box]) == list(range(k))
        else:
            mine = np.fft.fftshift(np.fft.fftfreq(size, 1 / size))[box]
            assert np.array_equal(mine, np.fft.fftshift(np.fft.fftfreq(k, 1 / k)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_smallest_box_keeps_enough_and_no_axis_can_give_more(seed, ratio, sizes):
    energy = torch.rand(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def inside(kept):
        return float(energy[tuple(centred(sizes, kept))].sum())

    least, kept, total = ratio * float(energy.sum()), list(sizes), float(energy.sum())
    while True:  # the same by recounting everything
        smaller = [
            [k - (a == axis) for a, k in enumerate(kept)] for axis in range(len(kept)) if kept[axis] > 1
        ]
        best = max(smaller, key=inside, default=None)
        if best is None or inside(best) < least - 1e-12 * total:
            break
        kept = best
    found = smallest_box(energy, ratio)
    assert list(found) == kept and inside(found) >= least - 1e-9
    if ratio == 1.0:
        assert list(found) == sizes


def test_energy_ratio_depends_on_the_weight_of_each_layer():
    model = fno((8, 8))
    with torch.no_grad():
        model.fno_blocks.convs[0].weight.tensor[..., 3:] *= 1e-3
        model.fno_blocks.convs[1].weight.tensor[:, :, :2] *= 1e-3
    small = run(model, energy_ratio=0.999).model
    a, b = (layer.weight.shape[2:] for layer in small.fno_blocks.convs)
    assert a == (8, 3) and b[0] < 8 and b[1] == 5
    assert small.n_modes == (8, 8) == small.fno_blocks.n_modes  # no common answer
    x = torch.randn(1, 1, 16, 16)
    assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
    assert lc.save(small, "/dev/null", verify=False).file_bytes > 0


@pytest.mark.parametrize("kept", [(6, 6), (5, 7), (4, 3)])
def test_is_the_model_that_neuraloperator_would_build(kept, tmp_path):
    small, fresh = run(fno(), kept).model, fno(kept)
    state = small.state_dict()
    assert {k: v.shape for k, v in state.items() if k != "_metadata"} == {
        k: v.shape for k, v in fresh.state_dict().items() if k != "_metadata"
    }
    assert list(state) == list(fresh.state_dict())
    assert state["_metadata"] == fresh.state_dict()["_metadata"]
    for mine, theirs in (
        (small, fresh),
        (small.fno_blocks, fresh.fno_blocks),
        *zip(small.fno_blocks.convs, fresh.fno_blocks.convs, strict=True),
    ):
        assert mine.n_modes == theirs.n_modes
        assert getattr(mine, "max_n_modes", 0) == getattr(theirs, "max_n_modes", 0)
    fresh.load_state_dict(state)
    x = torch.randn(1, 1, 17, 32)
    assert torch.equal(fresh(x), small(x))
    small.save_checkpoint(tmp_path, "cut")
    assert torch.equal(operators.FNO.from_checkpoint(tmp_path, "cut").eval()(x), small(x))


def test_a_checkpoint_loads_where_the_library_is_not_imported(tmp_path):
    small = run(fno(), (6, 6)).model
    x = torch.randn(1, 1, 16, 16)
    torch.save({"state": small.state_dict(), "x": x, "y": small(x).detach()}, tmp_path / "cut.pt")
    code = f"""
import sys, torch
from neuralop.models import FNO
held = torch.load({str(tmp_path / "cut.pt")!r}, weights_only=False)
model = FNO(n_modes=(6, 6), in_channels=1, out_channels=1, hidden_channels=4, n_layers=2, projection_channel_ratio=2)
model.load_state_dict(held["state"], strict=True)
assert torch.equal(model.eval()(held["x"]), held["y"]) and "lightning_compress" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_positional_arguments_and_max_n_modes_are_remembered(tmp_path):
    torch.manual_seed(0)
    model = operators.FNO((6, 6), 1, 1, 4, n_layers=1, max_n_modes=(8, 5)).eval()
    small = run(model, (4, 4)).model
    layer = small.fno_blocks.convs[0]
    assert layer.n_modes == layer.max_n_modes == [4, 3] and small.fno_blocks.max_n_modes == [4, 3]
    small.save_checkpoint(tmp_path, "cut")
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(operators.FNO.from_checkpoint(tmp_path, "cut").eval()(x), small(x))
    assert model._init_kwargs["args"][0] == (6, 6)  # the user's own is as it was


@pytest.mark.parametrize("kept", [(6, 6), (5, 5)])
def test_parameters_and_macs_are_the_closed_forms(kept):
    x = torch.randn(3, 1, 16, 16)
    small = run(fno(), kept)
    after = lc.cost(small.model, x)
    modes, i = kept[0] * (kept[1] // 2 + 1), 4
    fft = 2 * round(2.5 / 2 * 3 * i * 256 * np.log2(256))  # forward and back
    for layer in (c for c in after.layers if c.kind == "SpectralConv"):
        assert layer.params == 2 * i * i * modes + i
        assert layer.macs == 4 * 3 * i * i * modes + fft
    before = lc.cost(fno(), x)
    assert before.params - after.params == 2 * 2 * i * i * (8 * 5 - modes)
    assert before.macs - after.macs == 2 * 4 * 3 * i * i * (8 * 5 - modes)


def test_uno_codano_and_tfno():
    x = {size: torch.randn(1, 1, size, size) for size in (16, 24)}
    small = run(uno(), {"fno_blocks.1.*": (3, 4), "*": (6, 6)}).model
    assert small.uno_n_modes == [[6, 6], [3, 4], [6, 6]]
    assert [b.n_modes for b in small.fno_blocks] == [[6, 6], [3, 4], [6, 6]]
    fresh = uno(small.uno_n_modes)
    fresh.load_state_dict(small.state_dict())
    assert all(torch.equal(fresh.eval()(v), small(v)) for v in x.values())

    model = codano()
    small = run(model, (5, 6)).model
    assert small.n_modes == [[5, 6], [5, 6]] and model.n_modes == [[8, 8], [8, 8]]
    assert {b.n_modes == [5, 6] for n, b in small.named_modules() if type(b).__name__ == "FNOBlocks"} == {
        True
    }
    reference = copy.deepcopy(model)
    for layer in spectral_layers(reference).values():
        set_weight(layer, zeroed(dense_weight(layer).detach(), (8, 5), (5, 4)))
    for v in x.values():
        close(small(v), reference(v), 1e-5)
    only = run(model, (5, 6), include="attention_layers.1.*").model
    assert only.n_modes == [[8, 8], [5, 6]]

    small = run(fno(kind="TFNO", rank=0.5), (6, 6)).model
    assert small.n_modes == (6, 6) and all(small(v).isfinite().all() for v in x.values())
    fresh = fno((8, 8), "TFNO", rank=0.5)
    replay(fresh, applied(small))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x[16]), small(x[16]))


def test_modes_in_use_below_the_stored_ones_do_not_count():
    model = fno()
    model.n_modes = (4, 4)
    result = run(model, (6, 6))
    assert result.model.fno_blocks.convs[1].n_modes == [6, 4]
    assert "convs.0 used 4 x 3 of 8 x 5 stored modes" in result.plan[0].data in result.report
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(result.model(x), run(fno(), (6, 6)).model(x))
    again = run(model, (8, 8))  # nothing to cut, but all stored modes are used again
    assert again.plan[0].identity and torch.equal(again.model(x), fno()(x))


def test_modes_as_stored_are_the_identity():
    first = run(fno(), (6, 6))
    for transform in (TruncateModes((6, 6)), TruncateModes(keep_ratio=1.0), TruncateModes(energy_ratio=1.0)):
        again = lc.compress(first.model, [transform])
        assert again.plan[0].identity and not again.coverage.changed and not again.plan[0].layers
        assert "stores 6 x 4 modes" in again.plan[0].skipped["fno_blocks.convs.0"]


def test_archives_and_replay(tmp_path):
    for make, options in (
        (fno, {"keep_ratio": 0.6}),
        (codano, {"energy_ratio": 0.9}),
        (uno, {"keep_ratio": 0.5}),
    ):
        result = run(make(), **options)
        small = result.model
        lc.save(small, tmp_path / "cut.lcz")
        back = lc.load(tmp_path / "cut.lcz", into=make())
        x = torch.randn(1, 1, 16, 16)
        assert torch.equal(back(x), small(x))
        assert [k for k in back.state_dict()] == [k for k in small.state_dict()]
        again = lc.compress(small, [TruncateModes((2, 2))]).model
        lc.save(again, tmp_path / "twice.lcz")
        assert torch.equal(lc.load(tmp_path / "twice.lcz", into=make())(x), again(x))
        plan = from_json(json.loads(json.dumps(to_json(result.plan[0]))))
        fresh = make()
        TruncateModes().apply(fresh, plan)
        assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("kind", ["FNO", "TFNO"])
def test_masks_are_cut_along(kind, tmp_path):
    sparse = lc.compress(fno(kind=kind), [lc.Prune(0.5, include="fno_blocks.convs.*")]).model
    small = run(sparse, (5, 6)).model
    before = {key: code.mask for key, _, _, code in codes.of(sparse)}
    after = {key: (m.get_parameter(p), code) for key, m, p, code in codes.of(small)}
    assert list(before) == list(after) and len(after) >= 2
    for key, (weight, code) in after.items():
        assert code.matches(weight)
        where = torch.ones(before[key].shape, dtype=torch.bool)
        box = {(8, 5): (slice(2, 7), slice(0, 4))}.get(tuple(where.shape[2:]))
        if box:
            assert torch.equal(code.mask, before[key][:, :, box[0], box[1]])
    lc.save(small, tmp_path / "cut.lcz")
    back = lc.load(tmp_path / "cut.lcz", into=fno(kind=kind))
    assert [c for *_, c in codes.of(back)] == [c for *_, c in codes.of(small)]
    more = lc.compress(small, [lc.Prune(0.6, include="fno_blocks.convs.*")]).model
    assert more(torch.randn(1, 1, 16, 16)).isfinite().all()


def test_a_stale_mask_is_dropped_and_others_stay():
    model = lc.compress(fno(), [lc.Prune(0.5)]).model
    layer = model.fno_blocks.convs[0]
    layer.weight.tensor.data += 1
    codes.set_mask(layer, "bias", torch.zeros_like(layer.bias, dtype=torch.bool))
    small = run(model, (6, 6)).model.fno_blocks.convs
    assert codes.read(small[0], "weight.tensor") is None and codes.read(small[0], "bias") is not None
    assert codes.read(small[1], "weight.tensor").mask.shape == (4, 4, 6, 4)


def test_quantized_weights_are_refused():
    quantized = lc.compress(fno(), [lc.Quantize(8)]).model
    with pytest.raises(OrderError, match="truncate first, then quantize"):
        run(quantized, (6, 6))
    assert "lies on a grid" in TruncateModes((6, 6)).plan(quantized).skipped["fno_blocks.convs.0"]
    lc.compress(
        fno(),
        [TruncateModes((6, 6)), lc.Quantize(8, activation_bits=8)],
        example_input=torch.randn(2, 1, 16, 16),
    )


def test_layers_and_parameters_that_are_not_cut_stay_the_same_objects():
    model = fno()
    frozen = model.fno_blocks.convs[1].weight.tensor.requires_grad_(False)
    ids = {n: id(p) for n, p in model.named_parameters()}
    lists = [layer.n_modes for layer in model.fno_blocks.convs]
    lc.compress(model, [TruncateModes((6, 6), include="fno_blocks.convs.1")], inplace=True)
    changed = [n for n, p in model.named_parameters() if ids[n] != id(p)]
    assert changed == ["fno_blocks.convs.1.weight.tensor"]
    assert not model.fno_blocks.convs[1].weight.tensor.requires_grad and frozen.shape == (4, 4, 8, 5)
    assert lists == [[8, 5], [8, 5]] and model.fno_blocks.convs[0].max_n_modes == [8, 5]
    assert model.n_modes == (8, 8)
    model.train()(torch.randn(1, 1, 16, 16)).sum().backward()


def test_a_layer_under_two_names_and_a_weight_of_two_layers():
    layer = SpectralConv(2, 2, (6, 6))
    net = run(nn.Sequential(layer, layer), (4, 4)).model
    assert net[0] is net[1] and net[0].weight.shape == (2, 2, 4, 3)
    other = SpectralConv(2, 2, (6, 6))
    other.weight = layer.weight
    third = SpectralConv(2, 2, (6, 6))
    third.weight.tensor = SpectralConv(2, 2, (6, 6)).weight.tensor
    result = run(nn.Sequential(layer, other, third), (4, 4))
    assert "shared with another layer" in result.plan[0].skipped["0"]
    assert "shared with another layer" in result.plan[0].skipped["1"]
    assert list(result.plan[0].layers) == ["2"]


class Own(nn.Module):
    """A weight of a kind that neuraloperator does not know."""

    def __init__(self, tensor):
        super().__init__()
        self.inner = nn.Parameter(tensor)

    shape = property(lambda self: self.inner.shape)

    def __getitem__(self, index):
        return self.inner[index]

    def to_tensor(self):
        return self.inner

    def truncated(self, box):
        assert all(isinstance(part, slice) for part in box)
        return Own(self.inner.detach()[:, :, *box].clone())


def test_weights_that_can_truncate_themselves():
    model = fno()
    layer = model.fno_blocks.convs[0]
    set_weight(layer, Own(layer.weight.tensor.detach()), layer._contract)
    codes.set_mask(layer, "weight.inner", torch.rand(4, 4, 8, 5) > 0.5)
    small = run(model, (6, 6)).model
    assert small.fno_blocks.convs[0].weight.inner.shape == (4, 4, 6, 4)
    assert codes.read(small.fno_blocks.convs[0], "weight.inner").mask.shape == (4, 4, 6, 4)
    layer.weight.__class__ = type("Blind", (Own,), {"truncated": property()})
    assert "no modes to cut" in TruncateModes((6, 6)).plan(model).skipped["fno_blocks.convs.0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one of modes, keep_ratio, energy_ratio"),
        ({"modes": (4, 4), "keep_ratio": 0.5}, "modes and keep_ratio"),
        ({"modes": (9, 4)}, r"fno_blocks.convs.0 stores 8 x 5 modes, so allowed are 2 numbers up to 8 x 9"),
        ({"modes": (4, 10)}, "stores 8 x 5"),
        ({"modes": (4,)}, "2 numbers"),
        ({"modes": (4, 0)}, "integers >= 1"),
        ({"modes": 4}, "integers >= 1"),
        (
            {"modes": {"nothing.*": (4, 4)}},
            r"'nothing.\*', which fits no spectral convolution; these are: fno_blocks",
        ),
        ({"keep_ratio": 0.0}, "0 < keep_ratio <= 1"),
        ({"energy_ratio": 1.5}, "0 < energy_ratio <= 1"),
        ({"keep_ratio": 0.5, "include": "nowhere"}, "fits no layer"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        run(fno(), **options)


def test_models_without_spectral_convolutions():
    with pytest.raises(lc.NothingChangedError, match="Linear is not a spectral convolution"):
        run(nn.Sequential(nn.Linear(2, 2)), (4, 4))

    class Other(SpectralConv):
        def forward(self, x, output_shape=None):
            return x

    with pytest.raises(lc.NothingChangedError, match="Other is not a spectral convolution"):
        run(nn.Sequential(Other(2, 2, (4, 4))), (2, 2))
    with pytest.raises(lc.NothingChangedError, match="no include pattern"):
        run(fno(), (4, 4), include="lifting.*")


@pytest.mark.parametrize(
    "forged",
    [
        {"start": [0, 0]},
        {"start": [1, 1], "stop": [7, 5]},
        {"stop": [9, 4]},
        {"stop": [1, 4]},
        {"stop": [7]},
        {"stop": ["x", 4]},
        {"n_modes": [6, 9]},
        {"n_modes": [6]},
        {"shape": [4, 4, 9, 5]},
    ],
    ids=str,
)
def test_forged_plans_write_nothing(forged):
    plan, model = TruncateModes((6, 6)).plan(fno()), fno()
    layers = {k: dict(v) for k, v in plan.layers.items()}
    layers["fno_blocks.convs.1"] |= forged
    with pytest.raises(ValueError, match=r"convs\.1"):
        TruncateModes().apply(model, Plan(layers))
    with pytest.raises(ValueError, match="not a spectral convolution"):
        TruncateModes().apply(model, Plan({**plan.layers, "lifting": plan.layers["fno_blocks.convs.0"]}))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fno().parameters(), strict=True))
    assert model.fno_blocks.convs[0].n_modes == [8, 5]
