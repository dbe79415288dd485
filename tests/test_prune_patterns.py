"""Patterns: N:M and blocks are exact, channels are silent, masks compose."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.functional.masks import blocks, count_pruned, nm_mask, spread
from lightning_compress.plans import from_json, to_json
from lightning_compress.pruning.patterns import NM, Block, pattern
from lightning_compress.targets import find


def compressed(net, *transforms, **options):
    return lc.compress(net, list(transforms), **options).model


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 6),
    )


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def silent_channels(weight, axis=0):
    return (weight == 0).movedim(axis, 0).flatten(1).all(1)


# N:M ------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_nm_keeps_the_best_of_every_block(data):
    m = data.draw(st.integers(1, 5))
    keep = data.draw(st.integers(0, m))
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] *= m
    values = st.sampled_from([-np.inf, 0.0, 1.0, 2.0])
    flat = data.draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    scores = np.array(flat).reshape(shape)
    mask = nm_mask(torch.from_numpy(scores), keep, m, axis).numpy()
    rows = np.moveaxis(scores, axis, -1).reshape(-1, m)
    expected = np.ones(rows.shape, bool)
    for row, order in zip(expected, np.argsort(rows, axis=1, kind="stable"), strict=True):
        row[order[: m - keep]] = False
    assert np.array_equal(np.moveaxis(mask, axis, -1).reshape(-1, m), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(8, 5), nn.Conv2d(8, 5, 3), nn.ConvTranspose1d(8, 5, 3), nn.Conv2d(16, 4, 3, groups=2)],
    ids=lambda layer: type(layer).__name__,
)
def test_every_block_of_four_inputs_keeps_exactly_n(layer, n):
    net = nn.Sequential(layer)
    weight = compressed(net, lc.Prune(pattern=NM(n, 4)))[0].weight
    axis = find(net)[0].axes.in_
    kept = weight.movedim(axis, -1).reshape(-1, 4) != 0
    assert (kept.sum(1) == n).all()
    before = layer.weight.detach().movedim(axis, -1).reshape(-1, 4).abs()
    assert (before.masked_fill(kept, 9).amin(1) <= before.masked_fill(~kept, 9).amin(1)).all()
    assert (before.masked_fill(kept, -1).amax(1) <= before.masked_fill(~kept, 9).amin(1)).all()


def test_two_of_four_is_what_semi_structured_kernels_take():
    """``torch.sparse.to_sparse_semi_structured`` packs two values of every four along the last axis, and no others."""
    weight = compressed(nn.Linear(64, 32), lc.Prune(pattern="2:4")).weight.detach()
    groups = weight.view(32, 16, 4)
    order = (groups != 0).int().argsort(dim=2, descending=True, stable=True)[..., :2]
    values = groups.gather(2, order)  # the packed half
    rebuilt = torch.zeros_like(groups).scatter_(2, order, values)
    assert torch.equal(rebuilt.view_as(weight), weight) and (values != 0).all()


def test_any_axis():
    net = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Linear(6, 8))
    out = compressed(net, lc.Prune(pattern=NM(1, 2, axis=0)))
    assert ((out[0].weight.view(2, 2, 8, 3, 3) != 0).sum(1) == 1).all()
    assert ((out[1].weight.view(4, 2, 6) != 0).sum(1) == 1).all()
    negative = compressed(net, lc.Prune(pattern=NM(1, 3, axis=-1)))
    assert ((negative[0].weight != 0).sum(3) == 1).all()


def test_targets_that_do_not_divide_are_listed():
    net = nn.Sequential(nn.Linear(6, 4), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(8, 4))
    result = lc.compress(net, lc.Prune(pattern="2:4"))
    assert result.coverage.skipped["0.weight"] == "its size 6 along axis 1 is no multiple of 4"
    assert "it has no input axis" in result.coverage.skipped["1.weight"]
    assert list(result.coverage.changed) == ["2.weight"]
    with pytest.raises(lc.NothingChangedError, match=r"0\.weight.*has no axis 5"):
        lc.compress(net, lc.Prune(pattern=NM(2, 4, axis=5)))


def test_sparsity_below_that_of_the_pattern_drops_fewer_of_every_block():
    net = nn.Linear(8, 8)
    for share, dropped in ((0.0, 0), (0.1, 0), (0.25, 1), (0.5, 2), (None, 2)):
        weight = compressed(net, lc.Prune(share, pattern="2:4")).weight
        assert ((weight.view(8, 2, 4) == 0).sum(2) == dropped).all()
    assert lc.Prune(pattern="1:4").sparsity == 0.75
    with pytest.raises(ValueError, match=r"sparsity=0.8: 2:4 has 0.5 zeros at most; leave sparsity out"):
        lc.Prune(0.8, pattern="2:4")


def test_layers_are_chosen_by_a_mapping():
    out = lc.compress(network(), lc.Prune({"3": 0.5}, pattern="2:4"))
    assert list(out.coverage.changed) == ["3.weight"]


@given(st.integers(0, 5), st.sampled_from(["magnitude", "random"]))
def test_nm_after_unstructured_leaves_at_most_n(seed, criterion):
    torch.manual_seed(seed)
    first = compressed(nn.Linear(16, 8), lc.Prune(0.6, criterion=criterion))
    both = compressed(first, lc.Prune(pattern="2:4"))
    kept = (both.weight.view(8, 4, 4) != 0).sum(2)
    before = (first.weight.view(8, 4, 4) != 0).sum(2)
    assert torch.equal(kept, before.clamp(max=2)) and (both.weight[first.weight == 0] == 0).all()


# Blocks ---------------------------------------------------------------------------------------------------------


@given(st.data())
def test_blocks_come_apart_and_together(data):
    counts = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    sizes = [data.draw(st.integers(1, 3)) for _ in counts]
    shape = [c * s for c, s in zip(counts, sizes, strict=True)]
    values = np.arange(np.prod(shape)).reshape(shape)
    cut = blocks(torch.from_numpy(values), sizes).numpy()
    for index in np.ndindex(*counts):
        part = values[tuple(slice(i * s, (i + 1) * s) for i, s in zip(index, sizes, strict=True))]
        assert np.array_equal(cut[index], part.ravel())
    mask = torch.rand(counts) < 0.5
    ones = blocks(spread(mask, sizes), sizes)
    assert torch.equal(ones.all(-1), mask) and torch.equal(ones.any(-1), mask)


@given(st.floats(0, 0.99), st.sampled_from(["global", "layer", "row"]), st.sampled_from(["l1", "l2"]))
def test_exactly_so_many_blocks_go(share, scope, norm):
    net = nn.Sequential(nn.Linear(6, 8), nn.Conv2d(6, 4, 2))
    torch.manual_seed(0)
    out = compressed(net, lc.Prune(share, pattern="block:4x2", scope=scope, norm=norm))
    sizes = ((4, 2), (4, 2, 1, 1))
    gone = [blocks(layer.weight == 0, s) for layer, s in zip(out, sizes, strict=True)]
    assert all(torch.equal(g.all(-1), g.any(-1)) for g in gone)
    gone = [g.all(-1) for g in gone]
    scores = [
        blocks(layer.weight.detach(), s).abs().double().norm(p=1 if norm == "l1" else 2, dim=-1)
        for layer, s in zip(net, sizes, strict=True)
    ]
    if scope == "global":
        gone, scores = [torch.cat([g.flatten() for g in part]) for part in (gone, scores)]
        gone, scores = [gone], [scores]
    for g, s in zip(gone, scores, strict=True):
        for row, values in zip(g, s, strict=True) if scope == "row" else [(g.flatten(), s.flatten())]:
            row, values = row.flatten(), values.flatten()
            assert int(row.sum()) == count_pruned(share, row.numel())
            assert not row.any() or row.all() or values[row].max() <= values[~row].min()


def test_a_block_lies_along_outputs_then_inputs():
    net = nn.Sequential(nn.ConvTranspose2d(6, 4, 2), nn.Conv1d(8, 8, 3, groups=8))
    out = compressed(net, lc.Prune(0.5, pattern=Block((4, 3)), include="0"))
    assert torch.equal(*(getattr(blocks(out[0].weight == 0, (3, 4, 1, 1)), f)(-1) for f in ("all", "any")))
    depthwise = compressed(net, lc.Prune(0.5, pattern=Block((4, 1, 3)), include="1"))
    assert torch.equal(*(getattr(blocks(depthwise[1].weight == 0, (4, 1, 3)), f)(-1) for f in ("all", "any")))
    with pytest.raises(lc.NothingChangedError, match="its size 6 along axis 0 is no multiple of 4"):
        lc.compress(net, lc.Prune(0.5, pattern=Block((4, 4)), include="0"))
    with pytest.raises(lc.NothingChangedError, match="has fewer axes than a block"):
        lc.compress(nn.Linear(4, 4), lc.Prune(0.5, pattern="block:4x1x1"))


# Channels -------------------------------------------------------------------------------------------------------


@given(st.floats(0, 0.999), st.sampled_from(["layer", "global"]))
def test_exactly_so_many_channels_are_silent_and_one_stays(share, scope):
    net = network()
    out = compressed(net, lc.Prune(share, pattern="channel", scope=scope, exclude="6"))
    gone = [int(silent_channels(out[i].weight).sum()) for i in (0, 3)]
    if scope == "layer":
        assert gone == [min(count_pruned(share, 8), 7)] * 2
    else:
        assert sum(gone) == min(count_pruned(share, 16), 14) and max(gone) <= 7


@pytest.mark.parametrize("example", [None, X])
def test_a_masked_channel_is_silent(example):
    net = network().eval()
    for tensor in (net[1].weight, net[1].bias, net[1].running_mean):
        nn.init.normal_(tensor)
    out = lc.compress(net, lc.Prune(0.5, pattern="channel", exclude="6"), example_input=example)
    gone = silent_channels(out.model[0].weight)
    kept = {key: code.mask for key, *_, code in codes.of(out.model)}
    assert set(kept) == {"0.weight", "1.weight", "1.bias", "3.weight", "3.bias"} and gone.any()
    for key in ("1.weight", "1.bias"):
        assert torch.equal(~kept[key], gone) and (out.model.get_parameter(key)[gone] == 0).all()
    parts = nn.Sequential(*list(out.model)[:2]), nn.Sequential(*list(out.model)[:4])
    with torch.no_grad():
        assert (parts[0](X)[:, gone] == 0).all() and (parts[0](X)[:, ~gone] != 0).any()
        assert (parts[1](X)[:, silent_channels(out.model[3].weight)] == 0).all()


def test_channels_of_tied_weights_of_attention_and_of_transposed_groups():
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    tied[2].weight = tied[0].weight
    out = compressed(tied, lc.Prune(0.5, pattern="channel", exclude="4"))
    gone = silent_channels(out[0].weight)
    assert int(gone.sum()) == 2
    for bias in (out[0].bias, out[2].bias, out[3].weight):
        assert torch.equal(bias == 0, gone | (bias == 0)) and (bias[gone] == 0).all()
    nn.init.normal_((attention := nn.MultiheadAttention(4, 2, kdim=3)).in_proj_bias)
    out = compressed(attention, lc.Prune(0.5, pattern="channel", scope="layer", exclude="out_proj"))
    parts = [getattr(out, f"{p}_proj_weight") for p in "qkv"]
    assert torch.equal(out.in_proj_bias == 0, torch.cat([silent_channels(w) for w in parts]))
    assert int((out.in_proj_bias == 0).sum()) == 6
    up = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), nn.Conv1d(6, 1, 1))
    out = compressed(up.eval(), lc.Prune(0.34, pattern="channel", exclude="2"))
    gone = silent_channels(out[0].weight, 1).repeat(2)
    assert int(gone.sum()) == 2 and (out[0].bias[gone] == 0).all()
    assert (nn.Sequential(*out[:2])(torch.randn(2, 4, 5))[:, gone] == 0).all()


def test_channels_of_complex_weights():
    spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
    net = nn.Sequential(spectral.SpectralConv(3, 4, (4, 4)), nn.Conv2d(4, 2, 1))
    nn.init.normal_(net[0].bias)
    out = compressed(net, lc.Prune(0.5, pattern="channel", exclude="1"))
    gone = silent_channels(out[0].weight.tensor, 1)
    size = net[0].weight.tensor.detach().abs().square().sum((0, 2, 3))
    assert torch.equal(gone, size <= size.sort().values[1])
    assert (out[0](torch.randn(2, 3, 8, 8))[:, gone] == 0).all()


def test_scores_of_layers_are_comparable_in_a_global_ranking():
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    with torch.no_grad():
        net[1].weight.copy_(net[0].weight * 1e-3)
    options = {"pattern": "channel", "exclude": "2"}

    def gone(**more):
        out = compressed(net, lc.Prune(0.5, **options, **more))
        return [int(silent_channels(out[i].weight).sum()) for i in (0, 1)]

    assert gone() == [4, 4] and gone(normalize_layers=False) == [1, 7]
    assert gone(normalize_layers=False, max_layer_sparsity=0.5) == [4, 4]
    elements = compressed(net, lc.Prune(0.5, normalize_layers=True, exclude="2"))
    assert abs(int((elements[0].weight == 0).sum()) - 32) <= 1
    assert int((compressed(net, lc.Prune(0.5, exclude="2"))[0].weight == 0).sum()) == 0


def test_negative_scores_are_not_turned_round_by_normalizing():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(net[0].weight * 1e-3)
    rule = lambda t, s: -t.weight.detach().abs()  # noqa: E731
    out = compressed(net, lc.Prune(0.25, criterion=rule, norm="l1", pattern="channel", exclude="2"))
    for layer in out[:2]:
        assert silent_channels(layer.weight).nonzero().item() == net[0].weight.abs().sum(1).argmax()


def test_a_threshold_of_channels_leaves_the_best():
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
    net[0].weight.data = torch.tensor([[1.0], [2.0], [3.0]])
    for threshold, gone in ((2.0, [0]), (9.0, [0, 1])):
        out = compressed(net, lc.Prune(threshold=threshold, pattern="channel", exclude="1"))
        assert silent_channels(out[0].weight).nonzero().flatten().tolist() == gone


def test_masked_outputs_of_the_model_give_a_warning():
    for example in (None, X):
        with pytest.warns(
            UserWarning, match=r"3 of 6 outputs of the model are constant zero now.*exclude='6'"
        ):
            lc.compress(network(), lc.Prune(0.5, pattern="channel", scope="layer"), example_input=example)


def test_an_excluded_batchnorm_is_left_alone_and_said_so():
    result = lc.compress(network(), lc.Prune(0.5, pattern="channel", exclude=["1", "6"]))
    assert (result.model[1].weight == 1).all()
    assert "channels of 0.weight are not quite silent" in result.coverage.skipped["1.weight"]


def test_factors_and_single_channels_are_skipped():
    net = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    result = lc.compress(net, lc.Prune(0.5, pattern="channel"))
    assert result.coverage.skipped["0.weight"] == "it has one output channel, which stays"


def test_zeros_outlive_fusion_reestimation_and_quantization():
    net = network().eval()
    nn.init.normal_(net[1].bias)
    prune = lc.Prune(0.5, pattern="channel", exclude="6")
    gone = silent_channels(compressed(net, prune)[0].weight)
    for later in (lc.FuseBatchNorm(), lc.Quantize(8)):
        out = compressed(net, prune, later, example_input=X).eval()
        assert (nn.Sequential(*list(out)[:2])(X)[:, gone] == 0).all()
        assert torch.equal(silent_channels(out[0].weight), gone)


# Composition and plans ----------------------------------------------------------------------------------------

OPTIONS = [
    {"pattern": "channel", "exclude": "6"},
    {"pattern": "channel", "scope": "layer", "exclude": "6", "criterion": "random"},
    {"pattern": "block:4x1"},
    {"pattern": "block:2x2", "scope": "layer", "norm": "l1"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masks_compose(options):
    half = compressed(network(), lc.Prune(0.5, **options))
    again = lc.compress(half, lc.Prune(0.5, **options))
    less = lc.compress(half, lc.Prune(0.2, **options))
    assert not again.coverage.changed and not less.coverage.changed
    more = compressed(half, lc.Prune(0.75, **options))
    straight = compressed(network(), lc.Prune(0.75, **options))
    zeros = [
        sum(int((p == 0).sum()) for n, p in m.named_parameters() if p.dim() > 1) for m in (more, straight)
    ]
    assert zeros[0] == zeros[1]
    for a, b in zip(half.parameters(), more.parameters(), strict=True):
        assert (b[a == 0] == 0).all()


@pytest.mark.parametrize("kind", ["unstructured", "channel", "block:4x1"])
def test_what_is_masked_counts_first_whatever_its_score(kind):
    options = {"pattern": kind, "criterion": "random", "exclude": "6"}
    half = compressed(network(), lc.Prune(0.4, seed=0, **options))
    more = compressed(half, lc.Prune(0.6, seed=1, **options))
    once = compressed(network(), lc.Prune(0.6, seed=1, **options))
    if kind == "channel":
        zeros = [sum(int(silent_channels(m[i].weight).sum()) for i in (0, 3)) for m in (more, once)]
    else:
        zeros = [sum(int((t.weight == 0).sum()) for t in find(m)) for m in (more, once)]
    assert zeros[0] == zeros[1]
    assert all(
        (b[a == 0] == 0).all()
        for a, b in zip(find(half), find(more), strict=True)
        for a, b in [(a.weight, b.weight)]
    )


def test_a_bias_that_has_a_mask_of_its_own_keeps_it():
    net = network()
    nn.init.normal_(net[3].bias)
    first = compressed(net, lc.Prune(0.5, include="3.bias"))
    both = compressed(first, lc.Prune(0.25, pattern="channel", include="3"))
    mask = next(code.mask for key, *_, code in codes.of(both) if key == "3.bias")
    gone = silent_channels(both[3].weight) | (first[3].bias == 0)
    assert torch.equal(mask, ~gone) and torch.equal(both[3].bias == 0, gone)


@pytest.mark.parametrize("first", ["unstructured", "2:4", "block:4x1", "channel"])
@pytest.mark.parametrize("second", ["unstructured", "2:4", "block:4x1", "channel"])
def test_masks_of_different_patterns_multiply(first, second):
    a = compressed(network(), lc.Prune(0.5, pattern=first, exclude="6"))
    b = lc.compress(a, lc.Prune(0.5, pattern=second, exclude="6")).model
    for old, new in zip(a.parameters(), b.parameters(), strict=True):
        assert (new[old == 0] == 0).all()
    assert all(code.matches(b.get_parameter(key)) for key, *_, code in codes.of(b))


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, *OPTIONS], ids=str)
def test_plans_are_json_and_the_same_every_time(options, tmp_path):
    a, b = (lc.compress(network(), lc.Prune(**options)) for _ in range(2))
    text = json.dumps(to_json(a.plan[0]))
    torch.manual_seed(0)
    net = network()
    plans = [json.dumps(to_json(lc.Prune(**options).plan(net))) for _ in range(2)]
    assert plans[0] == plans[1] and json.loads(json.dumps(lc.Prune(**options).config()))
    fresh = network()
    fresh.load_state_dict(a.model.state_dict())
    lc.Prune().apply(fresh, from_json(json.loads(text)))
    assert [c for *_, c in codes.of(fresh)] == [c for *_, c in codes.of(a.model)]
    lc.save(b.model, tmp_path / "net.lcz")
    back = lc.load(tmp_path / "net.lcz", into=network())
    assert all(torch.equal(x, y) for x, y in zip(back.parameters(), b.model.parameters(), strict=True))
    assert [c for *_, c in codes.of(back)] == [c for *_, c in codes.of(b.model)]


def test_a_forged_plan_writes_nothing():
    net = network()
    plan = lc.Prune(0.5, pattern="channel", exclude="6").plan(net)
    plan.layers["1.weight"]["packed"] = plan.layers["1.weight"]["packed"].to(torch.int16)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(
        ValueError, match=r"the mask of 1\.weight: torch\.int16 of shape \(.*\) is no mask of shape"
    ):
        lc.Prune().apply(net, plan)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "3/4"}, r"pattern='3/4' is unknown; allowed: unstructured, channel, n:m"),
        ({"pattern": "4:4"}, r"NM\(n=4, m=4\): allowed is 1 <= n < m"),
        ({"pattern": "block:0x2"}, r"Block\(\(0, 2\)\): allowed are sizes >= 1"),
        ({"norm": "max"}, "norm='max' is unknown; allowed: l2, l1"),
        ({"pattern": "2:4", "scope": "row"}, "scope='row' has no meaning with pattern='2:4'"),
        ({"pattern": "2:4", "threshold": 1.0}, "threshold=1.0 has no meaning"),
        ({"pattern": "channel", "scope": "row"}, "scope='row' has no meaning with pattern='channel'"),
        (
            {"pattern": "channel", "threshold": 1.0, "threshold_unit": "row_mean"},
            "threshold_unit='row_mean' has no",
        ),
    ],
)
def test_options_without_a_meaning(options, message):
    with pytest.raises(ValueError, match=message):
        lc.Prune(**options)


def test_names_and_objects_of_patterns_are_the_same():
    assert pattern("2:4") == NM(2, 4) == pattern(NM()) and pattern("block:8x2x1") == Block([8, 2, 1])
    a, b = (compressed(network(), lc.Prune(pattern=p)) for p in ("2:4", "2:4"))
    assert (a[3].weight != 0).sum() == (b[3].weight != 0).sum()
