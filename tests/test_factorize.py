"""Factorize and MergeFactors: identities, formulas of every scheme, rank criteria, outputs-aware factors, budgets."""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress.functional.factor import (
    balanced,
    hosvd,
    rank_from_energy,
    rank_from_ratio,
    svd,
    tails,
    whitening,
)
from lightning_compress.lowrank import Factors, merge_factors
from lightning_compress.targets import find
from lightning_compress.transform import OrderError, applied, replay


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


class Complex(nn.Module):
    """A linear layer with complex weight: torch's own works with complex numbers as it is."""

    def __new__(cls):
        return nn.Linear(6, 5, dtype=torch.complex64)


# name -> (layer, input, scheme -> (parameters at rank r, MACs at rank r)); hand formulas of the table in the docs
LAYERS = {
    "linear": (
        lambda: nn.Linear(12, 9),
        randn(5, 4, 12),
        {"svd": (lambda r: r * (12 + 9), lambda r: 20 * r * 21)},
    ),
    "complex": (
        Complex,
        torch.complex(randn(5, 6), randn(5, 6, seed=1)),
        {"svd": (lambda r: 2 * r * 11, lambda r: 4 * 5 * r * 11)},
    ),
    "conv1d": (
        lambda: nn.Conv1d(6, 8, 5, stride=2, padding=2),
        randn(2, 6, 20),
        {"channel": (lambda r: r * (30 + 8), lambda r: 2 * 10 * r * 38)},
    ),
    "conv2d": (
        lambda: nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
        randn(2, 6, 15, 17),
        {
            "channel": (lambda r: r * (90 + 8), lambda r: 2 * 8 * 13 * r * 98),
            "spatial": (lambda r: r * (18 + 40), lambda r: 2 * 8 * (17 * r * 18 + 13 * r * 40)),
        },
    ),
    "same": (
        lambda: nn.Conv2d(6, 8, 3, padding="same"),
        randn(2, 6, 9, 9),
        {
            "channel": (lambda r: r * (54 + 8), lambda r: 162 * r * 62),
            "spatial": (lambda r: r * (18 + 24), lambda r: 162 * r * 42),
        },
    ),
    "reflect": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        randn(2, 6, 9, 9),
        {"channel": (lambda r: r * 62, lambda r: 162 * r * 62)},
    ),
    "grouped": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
        randn(2, 6, 9, 9),
        {
            "channel": (lambda r: 2 * r * (27 + 4), lambda r: 162 * 2 * r * 31),
            "spatial": (lambda r: 2 * r * (9 + 12), lambda r: 162 * 2 * r * 21),
        },
    ),
    "conv3d": (
        lambda: nn.Conv3d(4, 6, 3, padding=1),
        randn(2, 4, 5, 5, 5),
        {"channel": (lambda r: r * (108 + 6), lambda r: 250 * r * 114)},
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1),
        randn(2, 6, 7, 7),
        {"channel": (lambda r: r * (6 + 72), lambda r: 98 * r * 78)},
    ),
    "transposed1d": (
        lambda: nn.ConvTranspose1d(6, 8, 3, bias=False),
        randn(2, 6, 7),
        {"channel": (lambda r: r * (6 + 24), lambda r: 14 * r * 30)},
    ),
    "transposed grouped": (
        lambda: nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1, groups=2),
        randn(2, 6, 7, 7),
        {"channel": (lambda r: 2 * r * (3 + 64), lambda r: 98 * 2 * r * 67)},
    ),
    "embedding": (
        lambda: nn.Embedding(20, 7, padding_idx=3),
        torch.arange(20).view(4, 5),
        {"svd": (lambda r: r * 27, lambda r: 20 * r * 7)},
    ),
}
CASES = [(name, scheme) for name, (_, _, schemes) in LAYERS.items() for scheme in schemes]


def build(name):
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[name][0]()).eval()


def factorized(model, x=None, **options):
    return lc.compress(model, [lc.Factorize(include="0", force=True, **options)], example_input=x)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_full_rank_is_the_layer_and_merge_restores_it(name, scheme):
    model, x = build(name), LAYERS[name][1]
    result = factorized(model, rank_ratio=1.0, scheme=scheme)
    thin = result.model
    assert isinstance(thin[0], Factors) and thin[0].kind == type(model[0]).__name__
    torch.testing.assert_close(thin(x), model(x), rtol=1e-5, atol=1e-5)
    merged = merge_factors(thin)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-5)
    assert list(merged.state_dict()) == list(model.state_dict()) and type(merged[0]) is type(model[0])
    assert repr(merged[0]) == repr(model[0])
    assert isinstance(thin[0], Factors)  # merging was out of place


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_parameters_and_macs_equal_the_formulas(name, scheme):
    _, x, schemes = LAYERS[name]
    params, macs = schemes[scheme]
    for rank in (1, 2, 3):
        thin = factorized(build(name), rank=rank, scheme=scheme).model
        counted = lc.cost(thin, x)
        bias = thin[0][1].bias
        assert counted.params - (0 if bias is None else bias.numel() * (2 if bias.is_complex() else 1)) == (
            params(rank)
        )
        assert counted.macs == macs(rank)


@pytest.mark.parametrize(("name", "scheme"), [c for c in CASES if c[0] not in ("embedding", "complex")])
def test_the_budget_counts_the_same_macs(name, scheme):
    model, x = build(name), LAYERS[name][1]
    dense = lc.cost(model, x).macs
    result = lc.compress(model, [lc.Factorize(budget=("macs", 0.5), scheme=scheme)], example_input=x)
    assert f"macs={result.after.macs:.0f} " in result.plan[0].data
    assert result.after.macs <= 0.5 * dense == pytest.approx(0.5 * result.before.macs)


def test_the_best_product_of_its_rank():
    """Eckart-Young: the error is the tail of the singular values, by NumPy."""
    model = build("linear")
    thin = factorized(model, rank=4).model
    product = (thin[0].second.weight @ thin[0].first.weight).detach().numpy()
    weight = model[0].weight.detach().numpy()
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    assert np.linalg.norm(weight - product) == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-5)
    first, second = (np.linalg.norm(layer.weight.detach()) for layer in (thin[0].first, thin[0].second))
    assert first == pytest.approx(second, rel=1e-5)  # equal shares of the scale


# -- ranks -------------------------------------------------------------------------------------------------------


def diagonal(values=(4.0, 2.0, 1.0, 1.0)):
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor(values)))
    return model


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"rank_ratio": 0.5}, 2),
        ({"energy_ratio": 0.9}, 2),
        ({"energy_ratio": 20 / 22}, 2),
        ({"energy_ratio": 0.92}, 3),
        ({"energy_ratio": 1.0}, 4),
        ({"params_ratio": 0.5}, 1),
        ({"params_ratio": 1.0}, 2),
        ({"rank": 3}, 3),
        ({"rank": 9}, 4),
        ({"rank": 1, "min_rank": 2}, 2),
        ({"rank": 4, "max_rank": 2}, 2),
        ({"budget": ("params", 0.5)}, 1),
        ({"budget": ("rank", 0.5)}, 2),
        ({}, 2),
    ],
)
def test_criteria_on_known_singular_values(options, rank):
    result = lc.compress(diagonal(), [lc.Factorize(force=True, **options)])
    assert result.plan[0].layers["0.weight"]["ranks"] == [rank]
    assert result.model[0].first.out_features == rank


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=2), st.integers(0, 20))
def test_larger_ratios_never_give_smaller_ranks(ratios, seed):
    low, high = sorted(ratios)
    lost = tails(svd(randn(7, 9, seed=seed))[1])
    assert rank_from_energy(lost, low) <= rank_from_energy(lost, high)
    assert rank_from_ratio(low, 9) <= rank_from_ratio(high, 9)
    assert lost[rank_from_energy(lost, high)] <= 1 - high + 1e-9


def test_hosvd_and_balanced_against_numpy():
    tensor = torch.complex(randn(3, 4, 5), randn(3, 4, 5, seed=1))
    for axis, (u, s) in enumerate(zip(*hosvd(tensor, (0, 1, 2)), strict=True)):
        unfolded = np.moveaxis(tensor.numpy().astype(np.complex128), axis, 0).reshape(tensor.shape[axis], -1)
        np.testing.assert_allclose(s.numpy(), np.linalg.svd(unfolded, compute_uv=False), rtol=1e-10)
        assert torch.allclose(u.mH @ u, torch.eye(u.shape[1], dtype=u.dtype))
    a, b = balanced(*svd(randn(2, 4, 6)), rank=4)
    torch.testing.assert_close((a @ b).float(), randn(2, 4, 6))


# -- what is left alone, and errors --------------------------------------------------------------------------


def test_nothing_is_factorized_where_it_would_grow():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    result = lc.compress(model, [lc.Factorize(rank=3)])
    assert isinstance(result.model[0], Factors) and isinstance(result.model[2], nn.Linear)
    why = result.plan[0].skipped["2.weight"]
    assert "rank 2 of 2 (svd) stores 20 numbers, the layer 16: the largest that saves is 1" in why
    with pytest.raises(lc.NothingChangedError, match="the largest that saves is 3"):
        lc.compress(model[:1], [lc.Factorize(rank=4)])
    with pytest.raises(lc.NothingChangedError, match=r"even rank 1 .* params_ratio=0\.1 is below that"):
        lc.compress(model[:1], [lc.Factorize(params_ratio=0.1)])
    assert lc.compress(model[:1], [lc.Factorize(rank=4, force=True)]).after.params == 72


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_every_reason_for_leaving_a_layer_is_given():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.odd = Odd(8, 8)
            self.hooked = nn.Linear(8, 8)
            self.hooked.register_forward_hook(lambda m, a, out: out)
            self.tied = nn.Linear(8, 8)
            self.twin = nn.Linear(8, 8)
            self.twin.weight = self.tied.weight
            self.attention = nn.MultiheadAttention(8, 2)
            self.bilinear = nn.Bilinear(8, 8, 8)
            self.good = nn.Linear(8, 8)

    result = lc.compress(Net(), [lc.Factorize(rank=1)])
    skipped = result.plan[0].skipped
    for key, words in {
        "depthwise.weight": "depth-wise",
        "odd.weight": "Odd has a forward of its own",
        "hooked.weight": "forward hooks",
        "tied.weight": "shared with twin.weight",
        "attention.in_proj_weight": "there is no scheme for MultiheadAttention.in_proj_weight",
        "attention.out_proj.weight": "the attention around it multiplies its weight itself",
        "bilinear.weight": "there is no scheme for Bilinear.weight",
    }.items():
        assert words in skipped[key], (key, skipped[key])
    assert set(result.plan[0].layers) == {"good.weight"}
    with pytest.raises(lc.NothingChangedError, match="it is the whole model"):
        lc.compress(nn.Linear(8, 8), [lc.Factorize(rank=1)])
    with pytest.raises(lc.NothingChangedError, match="Linear has no scheme 'channel'"):
        lc.compress(nn.Sequential(nn.Linear(8, 8)), [lc.Factorize(rank=1, scheme="channel")])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank_ratio": 0.5, "energy_ratio": 0.9}, "one criterion"),
        ({"rank_ratio": 0.0}, "0 < rank_ratio <= 1"),
        ({"params_ratio": 1.5}, "0 < params_ratio <= 1"),
        ({"energy_ratio": {"0": 2.0}}, "for '0'"),
        ({"rank": 0}, "rank >= 1"),
        ({"budget": ("bytes", 0.5)}, "params"),
        ({"budget": ("params", 0.0)}, r"share in \(0, 1\]"),
        ({"scheme": "lu"}, "unknown; allowed: auto, "),
        ({"min_rank": 5, "max_rank": 2}, "below min_rank"),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        lc.Factorize(**options)


def test_inputs_that_are_needed_and_budgets_that_cannot_be_met():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="activation_aware=True looks at inputs"):
        lc.compress(model, [lc.Factorize(activation_aware=True)])
    with pytest.raises(ValueError, match="budget of macs needs example_input"):
        lc.compress(model, [lc.Factorize(budget=("macs", 0.5))])
    with pytest.raises(ValueError, match=r"smallest share that can be reached is 0\.2500"):
        lc.compress(model, [lc.Factorize(budget=("params", 0.1))])
    with pytest.raises(ValueError, match="rank_ratio has 'fc', which fits no layer; these are: 0, 2"):
        lc.compress(model, [lc.Factorize(rank_ratio={"fc": 0.5})])
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"0\.weight"):
        lc.compress(model, [lc.Factorize()])


def test_ranks_by_pattern():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    result = lc.compress(model, [lc.Factorize(rank={"0": 2, "2": 5})])
    assert [result.plan[0].layers[k]["ranks"] for k in ("0.weight", "2.weight")] == [[2], [5]]
    assert result.plan[0].skipped["4.weight"] == "no pattern of rank fits"
    mixed = lc.compress(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)),
        [lc.Factorize(rank=2, scheme={"0": "spatial", "1": "channel"})],
    )
    assert [d["scheme"] for d in mixed.plan[0].layers.values()] == ["spatial", "channel"]


def test_order_with_other_methods():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    for method in (lc.Prune(0.5), lc.Quantize(8)):
        with pytest.raises(OrderError, match="factorize first"):
            lc.compress(model, [method, lc.Factorize()])
        result = lc.compress(model, [lc.Factorize(rank=2), method])
        assert {"0.first.weight", "0.second.weight"} <= {k for k in result.steps[1].plan.layers}
    with pytest.raises(lc.NothingChangedError, match="pruned or quantized"):
        merge_factors(result.model)


# -- outputs ----------------------------------------------------------------------------------------------------


def correlated(rows, features, condition=1e3, seed=0):
    basis = torch.linalg.qr(randn(features, features, seed=seed))[0]
    scales = torch.logspace(0, -math.log10(condition) / 2, features)
    return (randn(rows, features, seed=seed + 1) * scales) @ basis


def output_error(model, thin, x):
    return float((model(x) - thin(x)).detach().square().sum() / len(x))


@pytest.mark.parametrize("bias", [True, False])
def test_activation_aware_is_the_best_product_for_outputs(bias):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 20, bias=bias)), correlated(400, 24) + (0.3 if bias else 0.0)
    plain = lc.compress(model, [lc.Factorize(rank=5)]).model
    result = lc.compress(model, [lc.Factorize(rank=5, activation_aware=True, damping=0.0)], data=[x])
    error = output_error(model, result.model, x[:256])
    assert error < 0.5 * output_error(model, plain, x[:256])
    assert "data n=256" in result.plan[0].data
    seen, weight = x[:256].double(), model[0].weight.detach().double()
    if bias:  # the bias takes the mean error in, so the centred inputs count
        seen = seen - seen.mean(0)
    values = torch.linalg.svdvals(seen @ weight.T) ** 2 / 256  # best rank-5 approximation of the outputs
    assert error == pytest.approx(float(values[5:].sum()), rel=1e-3)
    lost = result.plan[0].layers["0.weight"]["error"]
    assert lost == pytest.approx(float(values[5:].sum() / values.sum()), rel=1e-3)


def test_on_white_inputs_both_are_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    white = torch.linalg.qr(randn(64, 16))[0] * 8
    plain, aware = (
        lc.compress(model, [lc.Factorize(rank=4, activation_aware=a, damping=0.0)], data=[white]).model
        for a in (False, True)
    )
    torch.testing.assert_close(plain(white), aware(white), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scheme"), [c for c in CASES if c[0] not in ("embedding", "reflect")], ids=str
)
def test_activation_aware_helps_every_scheme(name, scheme):
    model, x = build(name), LAYERS[name][1]
    shape = x.shape
    mix = torch.linspace(1, 0.02, shape[1 if name not in ("linear", "complex") else -1])
    x = x * (mix if name in ("linear", "complex") else mix.view(1, -1, *(1,) * (x.dim() - 2)))
    x = x + (x.cumsum(-1) if name not in ("linear", "complex") else 0)
    errors = {}
    for aware in (False, True):
        thin = lc.compress(
            model,
            [lc.Factorize(rank=2, scheme=scheme, activation_aware=aware, include="0", force=True)],
            data=[x],
        ).model
        errors[aware] = float((model(x) - thin(x)).detach().abs().square().sum())
    assert errors[True] < errors[False]


def test_layers_that_inputs_do_not_reach_get_their_own_svd():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = Branches()
    with pytest.warns(UserWarning, match="unused is not reached"):
        result = lc.compress(model, [lc.Factorize(rank=2, activation_aware=True)], data=[randn(8, 16)])
    plain = lc.compress(model, [lc.Factorize(rank=2)]).plan[0].layers
    mine = result.plan[0].layers
    assert torch.equal(
        mine["unused.weight"]["tensors"]["first.weight"], plain["unused.weight"]["tensors"]["first.weight"]
    )


def test_whitening_of_a_singular_gram_matrix_gives_no_infinities():
    x = randn(3, 8).double()  # rank 3 of 8
    root, inverse = whitening(x.T @ x, damping=0.0)
    assert torch.allclose(root @ root, x.T @ x)
    assert bool(inverse.isfinite().all()) and int(torch.linalg.matrix_rank(inverse)) == 3
    with pytest.raises(ValueError, match="not finite"):
        whitening(torch.full((2, 2), math.inf), 0.0)


# -- automatic ranks -----------------------------------------------------------------------------------------------


def three():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))


@pytest.mark.parametrize("unit", ["params", "macs", "rank"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.95])
def test_automatic_ranks_equal_brute_force(unit, share):
    model = three()
    result = lc.compress(model, [lc.Factorize(budget=(unit, share))], example_input=randn(2, 6))
    layers = [model[i] for i in (0, 2, 4)]
    options = []
    for layer in layers:
        out, inp = layer.weight.shape
        dense = {"params": out * inp, "macs": 2 * out * inp, "rank": min(out, inp)}[unit]
        values = np.linalg.svd(layer.weight.detach().numpy().astype(np.float64), compute_uv=False) ** 2
        thin = []
        for r in range(1, min(out, inp) + 1):
            price = {"params": r * (out + inp), "macs": 2 * r * (out + inp), "rank": r}[unit]
            if price < dense:
                thin.append((price, values[r:].sum() / values.sum()))
        options.append([(dense, 0.0), *thin])
    limit = math.floor(share * sum(o[0][0] for o in options))
    best = min(
        sum(e for _, e in pick) for pick in itertools.product(*options) if sum(c for c, _ in pick) <= limit
    )
    found = sum(d["error"] for d in result.plan[0].layers.values())
    assert found == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("unit", ["params", "macs"])
def test_budgets_on_resnet20(unit):
    torch.manual_seed(0)
    model, x = lc.models.resnet20().eval(), randn(1, 3, 32, 32)
    errors = []
    for share in (0.25, 0.5, 0.75):
        result = lc.compress(model, [lc.Factorize(budget=(unit, share))], example_input=x)
        values = dict(part.split("=") for part in result.plan[0].data.split())
        spent, limit = int(values[unit]), int(values["budget"])
        assert 0.99 * limit <= spent <= limit  # within 1 %, never above
        assert float(values["gap"].rstrip("%")) <= 1
        errors.append(float(values["error"]))
        assert getattr(result.after, unit) < getattr(result.before, unit)
        if unit == "macs":
            assert result.after.macs == spent
    assert errors == sorted(errors, reverse=True)


# -- the model afterwards -----------------------------------------------------------------------------------------


def test_archive_replay_copies_and_bias(tmp_path):
    model = lc.models.resnet20().eval()
    result = lc.compress(model, [lc.FuseBatchNorm(), lc.Factorize(params_ratio=0.5)])
    thin, x = result.model, randn(2, 3, 32, 32)
    assert thin.layer3[1].conv1.second.bias is not None
    info = lc.save(thin, tmp_path / "thin.lcz")
    assert info.file_bytes == (tmp_path / "thin.lcz").stat().st_size < 0.6 * 4 * 270_000
    fresh = lc.load(tmp_path / "thin.lcz", into=lc.models.resnet20().eval())
    assert torch.equal(fresh(x), thin(x))
    again = lc.models.resnet20().eval()
    replay(again, applied(thin))
    again.load_state_dict(thin.state_dict())
    assert torch.equal(again(x), thin(x))
    for copied in (copy.deepcopy(thin), pickle.loads(pickle.dumps(thin)), lc.finalize(thin)):
        assert torch.equal(copied(x), thin(x))
    merged = merge_factors(thin)
    torch.testing.assert_close(merged(x), thin(x), rtol=1e-4, atol=1e-4)
    info = lc.save(merged, tmp_path / "merged.lcz")
    assert torch.equal(lc.load(tmp_path / "merged.lcz", into=lc.models.resnet20().eval())(x), merged(x))


def test_plans_that_do_not_fit_write_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    transform = lc.Factorize(rank=2)
    plan = transform.plan(model)
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 9))
    with pytest.raises(ValueError, match=r"the plan factorizes 1\.weight"):
        transform.apply(other, plan)
    assert isinstance(other[0], nn.Linear)
    for forged in ({"ranks": [99]}, {"ranks": [1, 1]}, {"scheme": "spatial"}, {"ranks": [0]}):
        plan.layers["1.weight"] |= forged
        with pytest.raises(ValueError, match=r"1\.weight"):
            transform.apply(model, plan)
        assert isinstance(model[0], nn.Linear)


def test_the_bias_parameter_moves_over_and_flags_stay():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).train()
    model[0].weight.requires_grad_(False)
    biases = [layer.bias for layer in model]
    result = lc.compress(model, [lc.Factorize(rank=2)], inplace=True)
    assert result.model is model and model[0].second.bias is biases[0] and model[1].second.bias is biases[1]
    assert not model[0].first.weight.requires_grad and model[1].first.weight.requires_grad
    assert model[0].second.training
    model(randn(2, 16)).sum().backward()
    assert model[1].first.weight.grad is not None


def test_a_layer_used_under_two_names_is_replaced_everywhere():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    thin = lc.compress(Twice(), [lc.Factorize(rank=2)]).model
    assert isinstance(thin.a, Factors) and thin.a is thin.b
    assert thin(randn(2, 16)).shape == (2, 16)


def test_half_precision_weights_are_factorized_in_full():
    model = nn.Sequential(nn.Linear(32, 32)).to(torch.bfloat16)
    thin = lc.compress(model, [lc.Factorize(rank=32, force=True)]).model
    assert thin[0].first.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        (thin[0].second.weight.float() @ thin[0].first.weight.float()),
        model[0].weight.float(),
        rtol=0.05,
        atol=0.01,
    )


def test_auto_takes_the_scheme_that_loses_least_per_number_saved():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False))
    column, row = randn(8 * 3, 2), randn(2, 8 * 3, seed=1)
    with torch.no_grad():  # a weight of spatial rank 2
        model[0].weight.copy_((column @ row).view(8, 3, 8, 3).permute(0, 2, 3, 1))
    result = lc.compress(model, [lc.Factorize(params_ratio=0.5)])
    decided = result.plan[0].layers["0.weight"]
    assert decided["scheme"] == "spatial" and decided["error"] < 1e-9


def test_transposed_output_size_still_works():
    model = build("transposed")
    thin = factorized(model, rank_ratio=1.0).model
    x = LAYERS["transposed"][1]
    for size in ([13, 13], [14, 14]):
        torch.testing.assert_close(
            thin[0](x, output_size=size), model[0](x, output_size=size), rtol=1e-5, atol=1e-5
        )


def test_a_users_own_complex_layer_is_listed_and_pruned_not_lost():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.complex(randn(8, 8), randn(8, 8, seed=1)))

        def forward(self, x):
            return (x.to(self.kernel.dtype) @ self.kernel).real

    lc.register(Mine, lc.Axes(1, 0), param="kernel")
    model = nn.Sequential(Mine(), nn.Linear(8, 8))
    result = lc.compress(model, [lc.Factorize(rank=2), lc.Prune(0.5)])
    assert result.steps[0].plan.skipped["0.kernel"] == "there is no scheme for Mine.kernel"
    assert [t.key for t in find(result.model)] == ["0.kernel", "1.first.weight", "1.second.weight"]


def test_no_warning_is_given_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lc.compress(three(), [lc.Factorize(rank=2, activation_aware=True)], data=[randn(4, 6)])
