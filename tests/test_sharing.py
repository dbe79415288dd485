"""Weights that share values: what is shared, how it is stored, and that it stays what the code says."""

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.codes import Mask, same_bits
from lightning_compress.functional.groups import real
from lightning_compress.functional.hashing import hashed
from lightning_compress.functional.lengths import encoded_bytes
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.sharing import ShareWeights
from lightning_compress.sharing.build import Entries, Precision, slot_bits
from lightning_compress.sharing.build import filtered as filtered_code
from lightning_compress.sharing.codes import Codebook
from lightning_compress.sharing.hashes import Bloomier, Hashed
from lightning_compress.sharing.vectors import VectorCodebook

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
EVERY = (
    ShareWeights(clusters=8),
    ShareWeights(clusters=8, codebook_dtype="float16"),
    ShareWeights(clusters=8, codebook_dtype="bfloat16", init="kmeans++"),
    ShareWeights(clusters=8, codebook_bits=6),
    ShareWeights(clusters=8, scope="global"),
    ShareWeights(clusters=8, scope="global", codebook_bits=8),
    ShareWeights(clusters=8, block=3),
    ShareWeights(clusters=8, block=2, codebook_bits=8),
    ShareWeights("hash", ratio=0.125),
    ShareWeights("hash", clusters=20, codebook_bits=10),
    ShareWeights("bloom", clusters=8),
    ShareWeights("bloom", clusters=8, scope="global", codebook_dtype="float16"),
    ShareWeights("adaptive", ratio=0.1),
)


class Net(nn.Module):
    """Two weights of one dtype, enough for any code to be worth its codebook."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape, size in (("a", (40, 25), 1.0), ("b", (7, 11, 13), 0.05)):
            weight = size * torch.randn(shape, generator=generator, dtype=torch.float64)
            if dtype.is_complex:
                weight = torch.complex(
                    weight, size * torch.randn(shape, generator=generator, dtype=torch.float64)
                )
            setattr(self, name, nn.Parameter(weight.to(dtype)))


def share(model, transform, **options):
    return lc.compress(model, [dataclasses.replace(transform, include=["a", "b"])], **options)


def pruned(dtype=torch.float32, sparsity=0.5):
    model = Net(dtype)
    for name, weight in model.named_parameters():
        order = weight.detach().abs().double().reshape(-1).argsort()
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[order[: int(sparsity * weight.numel())]] = False
        codes.set_mask(model, name, mask.view(weight.shape))
    return model


def error(a, b):
    return float((a - b).detach().abs().double().square().sum())


def code_of(model, name="a"):
    return codes.read(model, name)


# -- cluster -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from(DTYPES))
def test_at_most_so_many_values_and_an_error_below_the_linear_grid(clusters, seed, dtype):
    model = Net(dtype, seed)
    after = share(model, ShareWeights(clusters=clusters)).model
    for name in "ab":
        before, new = real(getattr(model, name).detach()), real(getattr(after, name).detach())
        assert len(torch.unique(new)) <= clusters
        if dtype in (torch.float32, torch.float64, torch.complex64):
            x = before.double()
            grid = torch.linspace(float(x.min()), float(x.max()), clusters, dtype=torch.float64)
            linear = (x[..., None] - grid).abs().amin(dim=-1).square().sum()
            assert error(before, new) <= float(linear) * (1 + 1e-6)
        assert code_of(after, name).matches(getattr(after, name))


def test_two_values_for_thirty_weights_are_the_best_two():
    model = nn.Linear(30, 1, bias=False)
    x = model.weight.detach().double().flatten().sort().values
    best = min(float(sum((p - p.mean()).square().sum() for p in (x[:k], x[k:]))) for k in range(1, 30))
    after = lc.compress(model, [ShareWeights(clusters=2)]).model
    assert error(after.weight, model.weight) == pytest.approx(best, rel=1e-6)


def test_every_start_is_worse_than_optimal():
    model = Net()
    found = {
        init: error(share(model, ShareWeights(clusters=6, init=init)).model.a, model.a)
        for init in ("optimal", "linear", "quantile", "kmeans++")
    }
    assert found["optimal"] < min(value for init, value in found.items() if init != "optimal")


def test_masked_weights_keep_their_zeros_and_the_others_do_not_pay_for_them():
    model = pruned()
    after = share(model, ShareWeights(clusters=4)).model
    mask = code_of(model).mask
    assert bool((after.a[~mask] == 0).all()) and len(torch.unique(after.a[mask])) <= 5
    code = code_of(after)
    assert isinstance(code, Codebook) and code.zero and len(code.codebook) == 5
    alone = nn.Linear(int(mask.sum()), 1, bias=False)
    with torch.no_grad():
        alone.weight.copy_(model.a[mask][None])
    free = lc.compress(alone, [ShareWeights(clusters=4)]).model
    assert error(after.a, model.a) <= error(free.weight, alone.weight)


def test_indices_are_those_of_neighbours():
    code = code_of(share(Net(), ShareWeights(clusters=16)).model)
    assert bool((code.codebook.diff() > 0).all())


def test_one_codebook_for_all_weights_over_their_sizes():
    model = Net()
    after = share(model, ShareWeights(clusters=8, scope="global")).model
    first, second = code_of(after, "a"), code_of(after, "b")
    assert torch.equal(first.codebook, second.codebook)
    for name, code in (("a", first), ("b", second)):
        rms = getattr(model, name).detach().double().square().mean().sqrt()
        assert float(code.scale) == pytest.approx(float(rms), rel=1e-6)
        assert set(torch.unique(getattr(after, name)).tolist()) <= set((code.codebook * code.scale).tolist())


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_values_on_a_grid_are_integers_and_indices_are_chosen_afterwards(bits):
    model = pruned()
    after = share(model, ShareWeights(clusters=16, codebook_bits=bits)).model
    code, most = code_of(after), 2 ** (bits - 1) - 1
    assert code.codebook.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert int(code.codebook.abs().max()) == most and 0 in code.codebook.tolist()
    values = code.table(torch.float32)
    mask = code_of(model).mask
    nearest = (model.a.detach()[mask][:, None].double() - values.double()).abs().argmin(dim=1)
    assert torch.equal(after.a.detach()[mask], values[nearest])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_values_are_rounded_before_indices_are_chosen(name):
    model = Net()
    after = share(model, ShareWeights(clusters=16, codebook_dtype=name)).model
    code = code_of(after)
    assert code.codebook.dtype == getattr(torch, name)
    values = code.codebook.float()
    nearest = (model.a.detach()[..., None].double() - values.double()).abs().argmin(dim=-1)
    assert torch.equal(after.a.detach(), values[nearest])


def test_both_planes_of_a_complex_weight_share_values_and_pairs_are_vectors():
    model = Net(torch.complex64)
    after = share(model, ShareWeights(clusters=5)).model
    assert len(torch.unique(torch.view_as_real(after.a.detach()))) == 5
    assert code_of(after).arrays(after.a)["codes"].shape == (*after.a.shape, 2)
    paired = share(model, ShareWeights(clusters=5, block=2)).model
    assert len(torch.unique(torch.view_as_real(paired.a.detach()).flatten(0, -2), dim=0)) == 5
    assert code_of(paired).arrays(paired.a)["codes"].shape == (after.a.numel(),)


def test_runs_share_vectors_also_the_short_last_one():
    model = Net()
    after = share(model, ShareWeights(clusters=10, block=3)).model
    runs = after.a.detach().flatten()[:999].view(-1, 3)  # 1000 = 333 runs and one entry
    rows = torch.unique(runs, dim=0)
    assert len(rows) <= 10 and after.a.detach().flatten()[-1] in rows[:, 0]
    x = model.a.detach().flatten()
    best = (x[-1] - code_of(after).codebook[:, 0]).abs().argmin()
    assert after.a.detach().flatten()[-1] == code_of(after).codebook[best, 0]


def test_runs_of_a_pruned_weight_go_along_what_is_kept():
    model = pruned()
    mask = code_of(model).mask
    after = share(model, ShareWeights(clusters=10, block=2)).model
    assert bool((after.a[~mask] == 0).all())
    assert len(torch.unique(after.a.detach()[mask].view(-1, 2), dim=0)) <= 10


def test_importance_moves_the_values_to_what_matters():
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    data = [torch.randn(64, 32) * torch.linspace(0.01, 3, 32)]
    plain = lc.compress(model, [ShareWeights(clusters=4)]).model
    informed = lc.compress(model, [ShareWeights(clusters=4, importance="fisher")], data=data)
    seen = lc.stats.collect(model, lc.find(model), lc.stats.Calibration(data=data), ["gradient"])
    lost = {
        name: float((seen["0.weight"].gradient * (m[0].weight - model[0].weight).detach().square()).sum())
        for name, m in (("plain", plain), ("informed", informed.model))
    }
    assert lost["informed"] < lost["plain"]
    assert "n=64" in informed.plan[0].data


# -- hash ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_hashed_weights_follow_from_values_key_and_place_alone(dtype):
    model = Net(dtype)
    after = share(model, ShareWeights("hash", clusters=24)).model
    code = code_of(after)
    assert isinstance(code, Hashed) and set(code.arrays(after.a)) == {"codebook"}
    flat = real(after.a.detach()).flatten()
    assert len(torch.unique(flat.abs())) <= 24
    buckets, signs = hashed(code.key, len(flat), 24)
    expected = code.codebook.numpy().astype(np.float64)[buckets] * signs
    assert torch.equal(flat, torch.from_numpy(expected).to(flat.dtype))


def test_hashed_values_are_the_least_squares_ones():
    model = Net()
    code = code_of(share(model, ShareWeights("hash", clusters=10)).model)
    buckets, signs = hashed(code.key, 1000, 10)
    matrix = np.zeros((1000, 10))
    matrix[np.arange(1000), buckets] = signs
    best = np.linalg.lstsq(matrix, model.a.detach().double().numpy().ravel(), rcond=None)[0]
    assert np.allclose(code.codebook.numpy(), best, rtol=1e-5, atol=1e-7)


def test_weights_of_different_names_or_seeds_get_different_hashes():
    model = Net()
    model.b = nn.Parameter(model.a.detach().clone())
    keys = {
        code_of(share(model, ShareWeights("hash", clusters=10, seed=seed)).model, name).key
        for seed, name in itertools.product((0, 1), "ab")
    }
    assert len(keys) == 4


def test_a_ratio_means_so_many_values_for_each_number():
    model = share(Net(torch.complex64), ShareWeights("hash", ratio=0.1)).model
    assert len(code_of(model, "a").codebook) == 200 and len(code_of(model, "b").codebook) == 201  # of 2002


# -- bloom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_filters_keep_what_the_mask_keeps(dtype):
    model = pruned(dtype, 0.8)
    after = share(model, ShareWeights("bloom", clusters=6, false_positive=0.02)).model
    code, mask = code_of(after), code_of(model).mask
    assert isinstance(code, Bloomier) and code.width == slot_bits(6, 0.02) == 9
    clustered = share(model, ShareWeights(clusters=6)).model
    values = codes.read(clustered, "a").codebook
    kept, wanted = real(after.a.detach())[mask], real(model.a.detach())[mask].double()
    table = values[values != 0].to(kept.dtype)
    nearest = (wanted[..., None] - table.double()).abs().argmin(dim=-1)
    assert torch.equal(kept, table[nearest])
    assert len(code.slots) == 3 * -(-(int(np.ceil(1.23 * kept.numel())) + 32) // 3)
    false = real(after.a.detach())[~mask] != 0
    assert float(false.double().mean()) < 3 * 6 / 2**9


def test_false_positives_in_weights_are_as_rare_as_chance():
    """Within 3 standard errors of K / 2^t over 10^5 masked entries."""
    weight = torch.zeros(110_000)
    weight[::11] = torch.randn(10_000)
    mask = weight != 0
    part = Entries("w", weight, mask)
    code = filtered_code(part, torch.linspace(-2, 2, 16, dtype=torch.float64), Precision(), 0.01, 0)
    share_, expected = float((code.project(weight)[~mask] != 0).double().mean()), 16 / 2**code.width
    assert expected <= 0.01 and abs(share_ - expected) < 3 * (expected * (1 - expected) / 100_000) ** 0.5


def test_a_filter_needs_a_mask():
    with pytest.raises(lc.NothingChangedError, match=r"it has no mask.*Prune first"):
        share(Net(), ShareWeights("bloom"))


# -- adaptive ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.08, 0.15, 0.4])
@pytest.mark.parametrize("make", [Net, pruned])
def test_adaptive_stays_under_its_size_in_encoded_bytes(ratio, make):
    model = make()
    result = share(model, ShareWeights("adaptive", ratio=ratio))
    total = 0
    for name in "ab":
        weight, code = getattr(result.model, name), code_of(result.model, name)
        total += encoded_bytes({"w": weight.detach()} if code is None else code.arrays(weight))
    assert total <= ratio * 4 * 2001
    text = result.steps[0].plan.data
    assert f"bytes={total} of {int(ratio * 4 * 2001)}" in text and "gap=" in text


def test_adaptive_loses_less_with_more_bytes_and_no_more_than_one_number_for_all():
    model = Net()
    lost = {
        ratio: sum(error(getattr(m, n), getattr(model, n)) / error(getattr(model, n), 0) for n in "ab")
        for ratio in (0.06, 0.1, 0.15, 0.25)
        for m in (share(model, ShareWeights("adaptive", ratio=ratio)).model,)
    }
    assert sorted(lost.values(), reverse=True) == list(lost.values())
    uniform = share(model, ShareWeights(clusters=8)).model
    used = sum(encoded_bytes(code_of(uniform, n).arrays(getattr(uniform, n))) for n in "ab")
    chosen = share(model, ShareWeights("adaptive", ratio=(used + 1) / (4 * 2001))).model

    def loss(m):
        return sum(error(getattr(m, n), getattr(model, n)) / error(getattr(model, n), 0) for n in "ab")

    assert loss(chosen) <= loss(uniform) * (1 + 1e-3)


def test_adaptive_lists_its_choices_and_names_the_least_size():
    result = share(Net(), ShareWeights("adaptive", ratio=0.12))
    assert "cluster" in result.report and "a" in result.steps[0].plan.data.split(";")[1]
    with pytest.raises(
        ValueError, match=r"ratio=0.001 of 8,004 bytes cannot be reached.*allowed is ratio >= 0\.0"
    ):
        share(Net(), ShareWeights("adaptive", ratio=0.001))


def test_adaptive_measures_outputs_when_asked():
    net = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30))
    with torch.no_grad():
        net[0].bias.fill_(100.0)  # beside it, what the first layer adds is nothing
    data = [torch.randn(16, 30)]
    found = lc.compress(net, [ShareWeights("adaptive", ratio=0.15, sensitivity="output")], data=data)
    values = [len(torch.unique(found.model[i].weight)) for i in (0, 2)]
    assert values[0] < values[1]
    with pytest.raises(ValueError, match="sensitivity='fisher' looks at inputs"):
        lc.compress(net, [ShareWeights("adaptive", sensitivity="fisher")])


# -- codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "transform", EVERY, ids=lambda t: f"{t.strategy}-{t.scope}-{t.block}-{t.codebook_bits}"
)
def test_archives_give_the_bits_back(transform, dtype, tmp_path):
    """Weights, codes and plans, of dense and of pruned models, in every precision."""
    for make in (Net, pruned):
        model = make(dtype)
        if transform.strategy == "bloom" and make is Net:
            continue
        result = share(model, transform)
        small = result.model
        stored = [code for *_, code in codes.of(small)]
        assert all(code.matches(getattr(small, name)) for name, _, _, code in codes.of(small))
        assert result.after.bits < result.before.bits
        info = lc.save(small, tmp_path / "net.lcz")
        assert not info.stale and sum(t.kind != "raw" for t in info.tensors) == len(stored)
        back = lc.load(tmp_path / "net.lcz", into=Net(dtype, seed=1))
        assert same_bits(back.a, small.a) and same_bits(back.b, small.b)
        assert [code for *_, code in codes.of(back)] == stored
        again = copy.deepcopy(model)
        plan = json.dumps(to_json(result.plan[0]))
        ShareWeights().apply(again, from_json(json.loads(plan)))
        assert same_bits(again.a, small.a) and same_bits(again.b, small.b)


@pytest.mark.parametrize(
    "transform", EVERY[:-1], ids=lambda t: f"{t.strategy}-{t.scope}-{t.block}-{t.codebook_bits}"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tied_entries_are_equal_and_may_move_together(transform, dtype):
    model = share(pruned(dtype), transform).model
    code, weight = code_of(model), model.a.detach()
    labels, signs = code.tied(weight)
    view = real(weight)
    assert labels.shape == view.shape and labels.dtype == torch.int64 and int(labels.min()) == -1
    assert bool((view[labels < 0] == 0).all())
    values = view if signs is None else view * signs
    for label in torch.unique(labels[labels >= 0]).tolist():
        assert len(torch.unique(values[labels == label])) == 1
    # Every value moves by its own step.
    steps = torch.randn(int(labels.max()) + 1, dtype=torch.float64).abs().add(0.1)[labels.clamp_min(0)]
    moved = (view.double() + 0.01 * steps * (1 if signs is None else signs)).to(view.dtype)
    moved[labels < 0] = 0
    if dtype.is_complex:
        moved = torch.view_as_complex(moved)
    new, fresh = code.refreshed(moved)
    assert fresh.matches(new) and type(fresh) is type(code) and new.dtype == dtype
    assert fresh.codebook.dtype == code.codebook.dtype and len(fresh.codebook) <= len(code.codebook)
    precise = transform.codebook_bits is None and transform.codebook_dtype == "float32"
    if precise and dtype != torch.float64:
        assert torch.equal(new, moved) or code.scale is not None
    # Half a step of the coarsest grid here (6 bits), or of bfloat16's eight digits.
    scale = float(real(moved).abs().max())
    assert float(real(new - moved).abs().max()) <= scale * (2**-6 if not precise else 1e-6)
    assert bool((real(new)[labels < 0] == 0).all())


def test_entries_that_moved_apart_are_refused():
    model = share(Net(), ShareWeights(clusters=4)).model
    with pytest.raises(ValueError, match="1000 different values and its code 4: tied entries moved apart"):
        code_of(model).refreshed(torch.randn(40, 25))


def test_a_stale_code_is_reported_and_not_used(tmp_path):
    model = share(Net(), ShareWeights(clusters=4)).model
    with torch.no_grad():
        model.a[0, 0] += 1e-6
    assert not code_of(model).matches(model.a)
    info = lc.save(model, tmp_path / "net.lcz")
    assert list(info.stale) == ["a"]
    assert same_bits(lc.load(tmp_path / "net.lcz", into=Net()).a, model.a)


def test_forged_fields_are_refused():
    weight = torch.randn(6, 4)
    table = Codebook(torch.tensor([-1.0, 1.0]))
    arrays = table.arrays(weight)
    with pytest.raises(ValueError, match="an index is 9; allowed are 0 to 1"):
        table.rebuild(arrays | {"codes": torch.full((6, 4), 9, dtype=torch.uint8)}, torch.float32)
    for dtype in (torch.float32, torch.int64, torch.bool, torch.int8):
        with pytest.raises(ValueError, match="indices have dtype"):
            table.rebuild(arrays | {"codes": arrays["codes"].to(dtype)}, torch.float32)
    rows = VectorCodebook(torch.randn(3, 2), None, None, (6, 4))
    with pytest.raises(ValueError, match=r"24 entries in runs of 2 have not \(5,\) indices"):
        rows.rebuild({"codes": torch.zeros(5, dtype=torch.uint8)}, torch.float32)
    masked = VectorCodebook(torch.randn(3, 2), None, torch.ones(5, dtype=torch.bool), (6, 4))
    with pytest.raises(ValueError, match=r"a mask of dtype torch.bool and shape \(5,\)"):
        masked.rebuild({"codes": torch.zeros(12, dtype=torch.uint8)}, torch.float32)
    for code in (
        Hashed(torch.zeros(0), None, None, 3, (6, 4)),
        Bloomier(torch.zeros(4, dtype=torch.uint8), torch.ones(2), None, 5, 0, (6, 4)),
        Bloomier(torch.zeros(3, dtype=torch.uint8), torch.ones(2), None, 40, 0, (6, 4)),
    ):
        with pytest.raises(ValueError, match="allowed"):
            code.rebuild({}, torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "mask"},
        {"kind": "unknown"},
        {"config": {}},
        {"arrays": {}},
        {"arrays": {"codebook": 3}},
        {"dtypes": {"codebook": "int3"}},
        {"layer": "nowhere"},
        {"kind": "hashed", "config": {"scale": None, "mask": None, "key": 1, "shape": [3, 3]}},
        {"kind": "hashed", "config": {"scale": None, "mask": None, "key": -1, "shape": [40, 25]}},
    ],
)
def test_forged_plans_are_refused_and_write_nothing(change):
    model = Net()
    plan = dataclasses.replace(ShareWeights(clusters=4), include=["a", "b"]).plan(model)
    layers = {name: dict(decided) for name, decided in plan.layers.items()}
    layers["b"] |= change
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="b"):
        ShareWeights().apply(model, Plan(layers))
    assert same_bits(model.a, before.a) and not list(codes.of(model))


# -- the transform -------------------------------------------------------------------------------------------


def test_plans_are_light():
    model = nn.Linear(300, 300)
    for transform in (ShareWeights(clusters=16), ShareWeights("hash", ratio=0.02)):
        text = json.dumps(to_json(transform.plan(model)))
        assert len(text) < 0.05 * 4 * 90_000


def test_every_layer_has_its_own_number():
    net = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 40), nn.Linear(40, 30))
    result = lc.compress(net, [ShareWeights(clusters={"0": 3, "re:[01]": 9})])
    assert [len(torch.unique(layer.weight)) for layer in result.model] == [3, 9, 1200]
    assert "no pattern of clusters" in result.coverage.skipped["2.weight"]
    with pytest.raises(
        ValueError, match="clusters has 'conv', which fits no layer to share; these are: 0, 1, 2"
    ):
        lc.compress(net, [ShareWeights(clusters={"conv": 3, "*": 9})])


def test_what_would_not_get_smaller_is_left_alone():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    result = lc.compress(net, [ShareWeights(clusters=128)])
    assert len(torch.unique(result.model[0].weight)) == 128
    assert "no fewer bits" in result.coverage.skipped["1.weight"]


def test_no_more_values_than_there_are_is_lossless_and_no_error():
    net = nn.Linear(64, 64)
    with torch.no_grad():
        net.weight.copy_(net.weight.sign() * 0.25)
    result = lc.compress(net, [ShareWeights(clusters=16)])
    assert torch.equal(result.model.weight, net.weight) and result.steps[0].plan.identity
    assert "weight_error=0" in result.report and result.after.bits < result.before.bits / 20


def test_weights_that_are_on_a_grid_stay_there():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    result = lc.compress(net, [lc.Quantize(4, include="0"), ShareWeights(clusters=8)])
    assert "stored as affine already" in result.steps[1].coverage.skipped["0.weight"]
    assert {code.kind for *_, code in codes.of(result.model)} == {"affine", "codebook"}
    with pytest.raises(lc.NothingChangedError, match="stored as codebook already"):
        lc.compress(result.model, [ShareWeights(include="1")])
    with pytest.raises(ValueError, match="prune first"):
        lc.compress(result.model, [lc.Prune(0.5)])
    with pytest.raises(
        ValueError, match=r"Quantize after ShareWeights is refused: .*codebook_bits=8.*quantize first"
    ):
        lc.compress(net, [ShareWeights(clusters=8), lc.Quantize(8)])


def test_an_entry_of_clusters_may_name_a_weight_that_stays():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        net[1].weight.zero_()
    net = lc.compress(net, [lc.Quantize(4, include="0")]).model
    result = lc.compress(net, [ShareWeights(clusters={"0": 8, "1": 16, "2": 4})])
    assert "stored as affine already" in result.coverage.skipped["0.weight"]
    assert "all its entries are zero" in result.coverage.skipped["1.weight"]
    assert (
        len(torch.unique(result.model[2].weight)) == 4
        and codes.read(result.model[0], "weight").kind == "affine"
    )
    with pytest.raises(lc.NothingChangedError, match="stored as affine already"):
        lc.compress(net, [ShareWeights(clusters={"0": 8}, include="0")])
    with pytest.raises(
        ValueError, match="clusters has '3', which fits no layer to share; these are: 0, 1, 2"
    ):
        lc.compress(net, [ShareWeights(clusters={"0": 8, "3": 8})])


def test_weights_that_left_their_codebook_are_shared_again():
    net = lc.compress(nn.Linear(64, 64), [ShareWeights(clusters=8)]).model
    with torch.no_grad():
        net.weight.add_(0.01 * torch.randn(64, 64))
    assert len(torch.unique(lc.compress(net, [ShareWeights(clusters=4)]).model.weight)) == 4


def test_weights_of_zeros_are_left_alone():
    net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        net[0].weight.zero_()
    assert (
        "all its entries are zero"
        in lc.compress(net, [ShareWeights(clusters=4)]).coverage.skipped["0.weight"]
    )


def test_values_that_do_not_fit_the_type_are_refused():
    net = nn.Linear(40, 40)
    with torch.no_grad():
        net.weight.mul_(1e8)
    with pytest.raises(ValueError, match=r"does not fit in torch\.float16: take another codebook_dtype"):
        lc.compress(net, [ShareWeights(clusters=4, codebook_dtype="float16")])


def test_importance_needs_inputs():
    with pytest.raises(ValueError, match="importance='fisher' looks at gradients"):
        lc.compress(nn.Linear(40, 40), [ShareWeights(importance="fisher")])


def test_masks_count_what_they_save():
    """A codebook with zeros is never said to be larger than the mask and the indices of what is kept."""
    model = pruned(sparsity=0.9)
    code = code_of(share(model, ShareWeights(clusters=16)).model)
    mask = code_of(model)
    assert isinstance(mask, Mask)
    assert code.bits(model.a) == 4 * 100 + 1000 + 32 * 17
    dense = code_of(share(Net(), ShareWeights(clusters=16)).model)
    assert dense.bits(model.a) == 4 * 1000 + 32 * 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "strategy='best' is unknown; allowed: cluster, hash, bloom, adaptive"),
        ({"clusters": 1}, "clusters=1: allowed is 2 <= clusters <= 65536"),
        ({"clusters": 65537}, "clusters=65537"),
        ({"clusters": {"fc": 0}}, "clusters=0 for 'fc'"),
        ({"strategy": "hash", "ratio": 1.0}, "ratio=1.0: allowed is 0 < ratio < 1"),
        ({"ratio": 0.5}, "ratio=0.5 has no meaning with strategy='cluster'"),
        ({"false_positive": 0}, "allowed is 0 < false_positive < 1"),
        ({"init": "zeros"}, "allowed: optimal, linear, quantile"),
        ({"scope": "row"}, "allowed: layer, global"),
        ({"strategy": "hash", "scope": "global"}, "scope='global' has no meaning"),
        ({"clusters": {"*": 4}, "scope": "global"}, "clusters=.* has no meaning"),
        ({"codebook_dtype": "int8"}, "allowed: float64, float32, float16, bfloat16"),
        ({"codebook_bits": 1}, "codebook_bits=1: allowed is >= 2 and <= 16"),
        ({"block": 65}, "block=65: allowed is >= 1 and <= 64"),
        ({"block": 2, "strategy": "bloom"}, "block=2 has no meaning"),
        ({"block": 2, "init": "linear"}, "init='linear' has no meaning"),
        ({"iterations": 0}, "iterations=0: allowed is >= 1"),
        ({"importance": "size"}, "allowed: none, fisher"),
        ({"strategy": "hash", "importance": "fisher"}, "importance='fisher' has no meaning"),
        ({"sensitivity": "loss"}, "allowed: auto, weight, output, fisher"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShareWeights(**options)
