"""Prune: exact counts, stable order, composition, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.functional.masks import count_pruned
from lightning_compress.targets import find


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Conv1d(11, 5, 3), nn.BatchNorm1d(5), nn.Linear(3, 2))


def zeros(model):
    return {t.key: int((t.weight == 0).sum()) for t in find(model)}


def total(model):
    return sum(t.weight.numel() for t in find(model))


@given(
    st.floats(0, 0.999), st.sampled_from(["global", "layer", "row"]), st.sampled_from(["magnitude", "random"])
)
def test_exactly_as_many_zeros_as_asked_for(s, scope, criterion):
    model = lc.compress(mlp(), [lc.Prune(s, scope=scope, criterion=criterion)]).model
    if scope == "global":
        assert sum(zeros(model).values()) == count_pruned(s, total(model))
    elif scope == "layer":
        assert zeros(model) == {t.key: count_pruned(s, t.weight.numel()) for t in find(model)}
    else:
        for t in find(model):
            rows = (t.weight == 0).flatten(1).sum(1)
            assert (rows == count_pruned(s, t.weight[0].numel())).all()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_lowest_magnitudes_go(scope):
    net = mlp()
    pruned = lc.compress(net, [lc.Prune(0.4, scope=scope)]).model
    groups = [find(net)] if scope == "global" else [[t] for t in find(net)]
    after = {t.key: t.weight.detach().numpy().ravel() for t in find(pruned)}
    for group in groups:
        flat = np.concatenate([t.weight.detach().numpy().ravel() for t in group])
        drop = np.argsort(np.abs(flat), kind="stable")[: count_pruned(0.4, flat.size)]
        expected = flat.copy()
        expected[drop] = 0
        assert np.array_equal(np.concatenate([after[t.key] for t in group]), expected)


def test_random_masks_depend_on_seed_and_name_only():
    a, b = (
        lc.compress(mlp(0), [lc.Prune(0.5, criterion="random", scope="layer", seed=s)]).model for s in (1, 2)
    )
    again = lc.compress(mlp(9), [lc.Prune(0.5, criterion="random", scope="layer", seed=1, exclude="0")]).model
    assert not torch.equal(a[2].weight == 0, b[2].weight == 0)
    assert torch.equal(a[2].weight == 0, again[2].weight == 0)
    state = torch.random.get_rng_state()
    lc.compress(mlp.__wrapped__() if hasattr(mlp, "__wrapped__") else a, [lc.Prune(0.9, criterion="random")])
    assert torch.equal(state, torch.random.get_rng_state())


def test_pruning_more_keeps_the_zeros_and_pruning_less_changes_nothing():
    half = lc.compress(mlp(), [lc.Prune(0.5)]).model
    more = lc.compress(half, [lc.Prune(0.8)]).model
    for a, b in zip(find(half), find(more), strict=True):
        assert ((b.weight == 0) | (a.weight != 0)).all()
    assert sum(zeros(more).values()) == count_pruned(0.8, total(more))
    less = lc.compress(more, [lc.Prune(0.5)])
    assert zeros(less.model) == zeros(more) and not less.coverage.changed


def test_a_stale_mask_is_not_taken_over_but_zeros_can_be_inferred():
    half = lc.compress(mlp(), [lc.Prune(0.5)]).model
    with torch.no_grad():
        for t in find(half):
            t.weight.fill_(1.0)
            t.weight.flatten()[0] = 0.0
    again = lc.compress(half, [lc.Prune(0.1)]).model
    assert sum(zeros(again).values()) == count_pruned(0.1, total(again))
    first = lc.compress(
        half, [lc.Prune(0.1, infer_masks=True, criterion=lambda t, s: -t.weight.detach())]
    ).model
    assert all(t.weight.flatten()[0] == 0 for t in find(first))


def test_complex_and_real_weights_are_ranked_apart():
    net = nn.Module()
    net.real = nn.Linear(10, 10)
    net.spectral = nn.Linear(10, 10)
    net.spectral.weight = nn.Parameter(torch.randn(10, 10, dtype=torch.complex64) * 100)
    pruned = lc.compress(net, [lc.Prune(0.3)]).model
    assert zeros(pruned) == {"real.weight": 30, "spectral.weight": 30}
    gone = net.spectral.weight.detach().abs()[pruned.spectral.weight == 0]
    assert gone.max() <= net.spectral.weight.detach().abs()[pruned.spectral.weight != 0].min()


def test_sparsity_by_pattern():
    result = lc.compress(mlp(), [lc.Prune({"0": 0.5, "2": 0.2})])
    assert zeros(result.model) == {"0.weight": 39, "2.weight": 33, "4.weight": 0}
    assert "no pattern of sparsity" in result.coverage.skipped["4.weight"]


def test_a_pattern_of_sparsity_that_fits_nothing_is_an_error():
    with pytest.raises(
        ValueError, match=r"sparsity has 'head', which fits no layer to prune; these are: 0, 2, 4"
    ):
        lc.compress(mlp(), [lc.Prune({"0": 0.5, "head": 0.9})])


def test_threshold():
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    assert lc.compress(net, [lc.Prune(threshold=3.0)]).model[0].weight.tolist() == [[0.0, 3.0], [10.0, 30.0]]
    by_row = lc.Prune(threshold=1.0, threshold_unit="row_mean")
    assert lc.compress(net, [by_row]).model[0].weight.tolist() == [[0.0, 3.0], [0.0, 30.0]]


def test_cap_per_layer_and_warning_for_an_emptied_layer():
    net = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        net[0].weight.mul_(1e-3)
    with pytest.warns(UserWarning, match=r"0\.weight has no weight left.*max_layer_sparsity"):
        assert zeros(lc.compress(net, [lc.Prune(0.6)]).model) == {"0.weight": 100, "1.weight": 20}
    assert zeros(lc.compress(net, [lc.Prune(0.6, max_layer_sparsity=0.9)]).model) == {
        "0.weight": 90,
        "1.weight": 30,
    }
    with pytest.raises(ValueError, match=r"asks for 160 zeros, but max_layer_sparsity=0.5 allows 100"):
        lc.compress(net, [lc.Prune(0.8, max_layer_sparsity=0.5)])


def test_a_criterion_is_a_plain_function_that_may_ask_for_stats():
    def wanda_like(target, stats):
        return target.weight.detach().abs() * stats.input_norm

    wanda_like.needs = ("input_norm",)
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    net[0].weight.data = torch.tensor([[1.0, 2.0]])
    x = torch.tensor([[10.0, 1.0], [10.0, 1.0]])
    result = lc.compress(net, [lc.Prune(0.5, criterion=wanda_like)], data=[x])
    assert result.model[0].weight.tolist() == [[1.0, 0.0]] and "data" in str(result)
    with pytest.raises(ValueError, match=r"example_input.*data|data.*example_input"):
        lc.compress(net, [lc.Prune(0.5, criterion=wanda_like)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sparsity": 1.0},
            r"sparsity=1.0: allowed is 0 <= sparsity < 1 \(1 would remove the layer\)",
        ),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": {"fc": 1.5}}, "sparsity=1.5 for 'fc'"),
        (
            {"criterion": "size"},
            "criterion='size' is unknown; allowed: magnitude, taylor, .*redundancy, random, an import path",
        ),
        ({"scope": "model"}, "scope='model' is unknown; allowed: global, layer, row"),
        ({"threshold": 0.0}, "threshold=0.0: allowed is > 0"),
        ({"threshold_unit": "mean"}, "allowed: absolute, row_mean"),
        ({"max_layer_sparsity": 0.0}, "allowed is 0 < max_layer_sparsity <= 1"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lc.Prune(**options)


def test_scores_must_fit_the_weight_and_be_finite():
    with pytest.raises(ValueError, match=r"0\.weight scores of shape \(3,\)"):
        lc.compress(mlp(), [lc.Prune(criterion=lambda t, s: torch.zeros(3))])
    with pytest.raises(ValueError, match=r"77 of 77 scores of 0\.weight are not finite"):
        lc.compress(mlp(), [lc.Prune(criterion=lambda t, s: t.weight.detach() / 0)])


def test_a_plan_for_another_architecture_is_refused_and_writes_nothing():
    prune = lc.Prune(0.5)
    plan = prune.plan(mlp())
    other = nn.Sequential(
        nn.Linear(7, 11), nn.ReLU(), nn.Conv1d(11, 6, 3), nn.BatchNorm1d(6), nn.Linear(3, 2)
    )
    with pytest.raises(ValueError, match=r"2\.weight has shape \(5, 11, 3\), its weight \(6, 11, 3\)"):
        prune.apply(other, plan)
    assert sum(zeros(other).values()) == 0 and not list(codes.of(other))
    with pytest.raises(ValueError, match="is it the architecture that was compressed"):
        prune.apply(nn.Linear(2, 2), plan)
