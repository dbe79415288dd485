"""Penalties on entries, groups and activations against closed forms, float64 autograd and finite differences."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.callbacks.grouped import Grouped
from lightning_compress.functional import activity, sparsity
from lightning_compress.functional.groups import PerGroup
from lightning_compress.functional.layouts import GROUPINGS, Layout, grouping_of
from lightning_compress.functional.sparsity import PENALTIES, lowest, near_zero, penalty, soft_threshold
from lightning_compress.targets import find

RULES = {
    **PENALTIES,
    "l1_l2_intra-squared": functools.partial(sparsity.l1_l2_intra, squared=True),
    "l1_l2_inter-squared": functools.partial(sparsity.l1_l2_inter, squared=True),
    "scad": functools.partial(sparsity.scad, lam=0.7),
}
GROUPED = [g for g in GROUPINGS if g != "element"] + [PerGroup(3)]  # 4 = 3 + 1


def groups_3x4(grouping):
    """Lists of (row, column) of a 3 x 4 matrix, written out."""
    rows = [[(i, j) for j in range(4)] for i in range(3)]
    if isinstance(grouping, PerGroup):
        return [row[s : s + grouping.size] for row in rows for s in range(0, 4, grouping.size)]
    return {
        "element": [[(i, j)] for i in range(3) for j in range(4)],
        "channel": rows,
        "row": rows,
        "input": [[(i, j) for i in range(3)] for j in range(4)],
        "layer": [[(i, j) for i in range(3) for j in range(4)]],
    }[grouping]


def rho(u, lam=0.7, a=3.7):
    if u <= lam:
        return lam * u
    return (2 * a * lam * u - u * u - lam * lam) / (2 * (a - 1)) if u <= a * lam else (a + 1) * lam**2 / 2


def closed_form(name, w, groups):
    """Every penalty again, in plain Python, from |w|."""
    x = [[float(abs(w[i, j])) for i, j in group] for group in groups]
    l1, l2 = ([f(g) for g in x] for f in (sum, lambda g: math.sqrt(sum(u * u for u in g))))
    ratios = [a / b if b else 0.0 for a, b in zip(l1, l2, strict=True)]
    if name in ("l1", "l2", "scad"):
        return sum({"l1": lambda u: u, "l2": lambda u: u * u, "scad": rho}[name](u) for g in x for u in g)
    if name == "group_lasso":
        return sum(math.sqrt(len(g)) * norm for g, norm in zip(x, l2, strict=True))
    if name == "hoyer":
        parts = [
            1 - (math.sqrt(len(g)) - r) / (math.sqrt(len(g)) - 1) if len(g) > 1 and r else 0.0
            for g, r in zip(x, ratios, strict=True)
        ]
        return sum(parts) / len(parts)
    power = 2 if name.endswith("squared") else 1
    if name.startswith("l1_l2_inter"):
        norm = math.sqrt(sum(v * v for v in l2))
        return (sum(l2) / norm if norm else 0.0) ** power
    return sum(r**power for r in ratios) / len(ratios)


def matrix(complex_=False, zeros=True, seed=0):
    torch.manual_seed(seed)
    w = torch.randn(3, 4, dtype=torch.complex128 if complex_ else torch.float64)
    if zeros:
        w[1] = 0
        w[0, 2] = 0
    return w


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("grouping", GROUPED, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_values_are_the_closed_forms_on_3x4_with_zeros(name, grouping, complex_):
    w = matrix(complex_)
    value, gradient = penalty(w, Layout.of(grouping, w.shape, 0, 1), RULES[name])
    assert value.item() == pytest.approx(
        closed_form(name, w.numpy(), groups_3x4(grouping)), rel=1e-12, abs=1e-12
    )
    assert gradient.shape == w.shape and gradient.dtype == w.dtype
    assert bool((gradient[w == 0] == 0).all()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", RULES)
def test_values_by_element(name):
    w = matrix(zeros=False)
    value, gradient = penalty(w, Layout.of("element", w.shape, 0, 1), RULES[name])
    assert value.item() == pytest.approx(closed_form(name, w.numpy(), groups_3x4("element")), abs=1e-12)
    if name in ("hoyer", "l1_l2_intra", "l1_l2_intra-squared"):  # constant: the callback refuses them
        assert gradient.abs().max() < 1e-12


def forward(name, w, groups):
    """The same from torch operations on w, for autograd and finite differences; groups of norm 0 left out."""
    index = [tuple(torch.tensor(c) for c in zip(*group, strict=True)) for group in groups]
    x = [w[i].abs() for i in index]
    l2 = [g.square().sum().sqrt() if g.detach().any() else None for g in x]
    if name in ("l1", "l2"):
        return w.abs().sum() if name == "l1" else w.abs().square().sum()
    if name == "scad":
        u, lam, a = w.abs(), 0.7, 3.7
        middle = (2 * a * lam * u - u**2 - lam**2) / (2 * (a - 1))
        top = torch.full_like(u, (a + 1) * lam**2 / 2)
        return torch.where(u <= lam, lam * u, torch.where(u <= a * lam, middle, top)).sum()
    if name == "group_lasso":
        return sum(math.sqrt(len(g)) * n for g, n in zip(x, l2, strict=True) if n is not None)
    power = 2 if name.endswith("squared") else 1
    if name.startswith("l1_l2_inter"):
        kept = torch.stack([n for n in l2 if n is not None])
        return (kept.sum() / kept.square().sum().sqrt()) ** power
    ratios = [(g.sum() / n, math.sqrt(len(g))) for g, n in zip(x, l2, strict=True) if n is not None]
    if name == "hoyer":
        return sum((r - 1) / (root - 1) for r, root in ratios if root > 1) / len(x)
    return sum(r**power for r, _ in ratios) / len(x)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("grouping", GROUPED, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_gradients_are_those_of_autograd_and_finite_differences(name, grouping, complex_):
    """Autograd's subgradient of |w| at 0 is 0 as well; finite differences leave zeros out, where P has a kink."""
    groups = groups_3x4(grouping)
    w = matrix(complex_).requires_grad_()
    forward(name, w, groups).backward()
    _, gradient = penalty(w.detach(), Layout.of(grouping, w.shape, 0, 1), RULES[name])
    torch.testing.assert_close(gradient, w.grad, rtol=1e-10, atol=1e-12)
    h = 1e-6
    for i, j in [(0, 0), (0, 1), (2, 3)]:
        for direction in (1.0, 1j) if complex_ else (1.0,):
            shifted = []
            for sign in (1, -1):
                moved = w.detach().clone()
                moved[i, j] += sign * h * direction
                shifted.append(closed_form(name, moved.numpy(), groups))
            slope = (shifted[0] - shifted[1]) / (2 * h)
            exact = gradient[i, j]
            part = (exact.imag if direction == 1j else exact.real) if complex_ else exact
            assert slope == pytest.approx(part.item(), abs=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_all_zeros_give_zero(name):
    value, gradient = penalty(torch.zeros(3, 4), Layout.of("channel", (3, 4), 0, 1), RULES[name])
    assert value.item() == 0 and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_half_weights_are_computed_in_single_precision(name, dtype):
    w = (matrix() * 300).to(dtype)  # squares overflow in half precision
    layout = Layout.of("channel", w.shape, 0, 1)
    value, gradient = penalty(w, layout, RULES[name])
    exact, slope = penalty(w.double(), layout, RULES[name])
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close((value.double(), gradient.double()), (exact, slope), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grouping", GROUPED, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_stack_of_weights_gives_what_each_gives(name, grouping):
    stack = torch.stack([matrix(seed=s, zeros=s > 0) for s in range(3)])
    layout = Layout.of(grouping, (3, 4), 0, 1)
    values, gradients = penalty(stack, layout, RULES[name])
    for w, value, gradient in zip(stack, values, gradients, strict=True):
        alone = penalty(w, layout, RULES[name])
        torch.testing.assert_close((value, gradient), alone, rtol=1e-12, atol=1e-14)


# -- groups --------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": nn.Linear(6, 4),
    "conv": nn.Conv2d(3, 4, 2),
    "grouped": nn.Conv2d(4, 6, (2, 1), groups=2),
    "depthwise": nn.Conv1d(3, 6, 2, groups=3),
    "transposed": nn.ConvTranspose1d(4, 6, 2),
    "grouped transposed": nn.ConvTranspose1d(4, 6, 2, groups=2),
    "depthwise transposed": nn.ConvTranspose2d(3, 6, 2, groups=3),
}


def touched(layer, grouping):
    """Labels of every entry by what it connects: found by probing the layer with one entry at a time."""
    labels = torch.zeros(layer.weight.shape, dtype=torch.long)
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    space = () if isinstance(layer, nn.Linear) else (3,) * (layer.weight.dim() - 2)
    x = torch.zeros(inputs, inputs, *space)
    for c in range(inputs):
        x[c, c] = 1
    with torch.no_grad():
        layer.bias.zero_()
        for index in np.ndindex(*layer.weight.shape):
            layer.weight.zero_()
            layer.weight[index] = 1
            source, target, *_ = layer(x).nonzero()[0].tolist()
            labels[index] = source if grouping == "input" else target
    return labels


@pytest.mark.parametrize("grouping", ["channel", "input"])
@pytest.mark.parametrize("kind", LAYERS)
def test_channels_and_inputs_are_those_that_the_layer_connects(kind, grouping):
    layer = LAYERS[kind]
    labels = touched(layer, grouping)
    layout = Grouped.of(find(nn.Sequential(layer))[0], grouping).layout
    (block,) = layout.blocks(labels)
    assert block.shape[0] == labels.unique().numel() and bool((block == block[:, :1]).all())
    assert block[:, 0].unique().numel() == block.shape[0]


def test_row_is_an_index_of_the_output_axis():
    layer = LAYERS["grouped transposed"]  # weight [4, 3, 2], six channels
    target = find(nn.Sequential(layer))[0]
    assert Grouped.of(target, "row").layout.counts == [(3, 8)]
    assert Grouped.of(target, "channel").layout.counts == [(6, 4)]
    conv = find(nn.Sequential(LAYERS["grouped"]))[0]
    assert Grouped.of(conv, "row").layout.counts == Grouped.of(conv, "channel").layout.counts == [(6, 4)]


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    split=st.integers(1, 3),
    grouping=st.sampled_from(GROUPINGS) | st.integers(1, 7).map(PerGroup),
    axes=st.tuples(st.integers(0, 3), st.integers(0, 3) | st.none()),
    batch=st.sampled_from([(), (2,)]),
)
@settings(max_examples=200, deadline=None)
def test_blocks_hold_every_entry_once_and_go_back(shape, split, grouping, axes, batch):
    out, in_ = axes[0] % len(shape), None if axes[1] is None else axes[1] % len(shape)
    shape = (shape[0] * split, *shape[1:])
    if split > 1 and len(shape) == 1:
        split = 1
    x = torch.arange(math.prod((*batch, *shape))).view(*batch, *shape)
    layout = Layout.of(grouping, shape, out, in_, split)
    blocks = layout.blocks(x)
    assert [tuple(b.shape[-2:]) for b in blocks] == layout.counts
    assert torch.equal(layout.restore(blocks), x)
    if isinstance(grouping, PerGroup):
        assert all(b.shape[-1] <= grouping.size for b in blocks)


def test_unknown_groupings():
    for given_ in ("filter", "per_group:x", 3):
        with pytest.raises(ValueError, match=r"is unknown; allowed: .*per_group:SIZE"):
            grouping_of(given_)
    with pytest.raises(ValueError, match="size >= 1"):
        PerGroup(0)


# -- steps that shrink ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("grouping", GROUPED, ids=str)
@pytest.mark.parametrize("groups", [False, True])
def test_shrinking_is_the_proximal_point(groups, grouping, complex_):
    """x minimizes ``|x - w|^2 / 2 + t P(x)``: it is the closed form, and no neighbour is better."""
    w, t = matrix(complex_), 0.4
    x = soft_threshold(w, Layout.of(grouping, w.shape, 0, 1), t, groups=groups)
    index = groups_3x4(grouping if groups else "element")
    for group in index:
        norm = math.sqrt(sum(abs(w[i, j].item()) ** 2 for i, j in group))
        factor = max(1 - t * math.sqrt(len(group)) / norm, 0) if norm else 0
        for i, j in group:
            assert x[i, j].item() == pytest.approx(w[i, j].item() * factor, abs=1e-14)
            assert factor or x[i, j] == 0

    def cost(v):
        distance = float((v - w).abs().square().sum()) / 2
        return distance + t * closed_form("group_lasso" if groups else "l1", v.numpy(), index)

    torch.manual_seed(1)
    assert all(cost(x + 1e-3 * torch.randn_like(x)) > cost(x) for _ in range(20))


def test_every_weight_of_a_stack_has_its_own_amount():
    stack = torch.stack([matrix(), matrix()])
    layout = Layout.of("channel", (3, 4), 0, 1)
    both = soft_threshold(stack, layout, torch.tensor([0.1, 0.3]), groups=True)
    for w, amount, got in zip(stack, (0.1, 0.3), both, strict=True):
        torch.testing.assert_close(got, soft_threshold(w, layout, amount, groups=True), rtol=1e-6, atol=1e-7)


# -- scores --------------------------------------------------------------------------------------------------


@given(share=st.floats(0, 1), seed=st.integers(0, 99), grouping=st.sampled_from(GROUPED))
@settings(max_examples=60, deadline=None)
def test_the_lowest_groups_are_the_lowest(share, seed, grouping):
    w = matrix(seed=seed, zeros=False)
    groups = groups_3x4(grouping)
    chosen = lowest(w, Layout.of(grouping, w.shape, 0, 1), share)
    inside = [all(bool(chosen[i, j]) for i, j in group) for group in groups]
    assert all(any(bool(chosen[i, j]) for i, j in g) == all_ for g, all_ in zip(groups, inside, strict=True))
    means = np.array([np.mean([abs(w[i, j].item()) for i, j in group]) for group in groups])
    k = min(math.floor(share * len(groups) + 0.5), len(groups) - 1)
    assert set(np.flatnonzero(inside)) == set(np.argsort(means)[:k])


def test_near_zero_counts_what_is_one_percent_of_the_mean():
    assert near_zero(torch.tensor([[1.0, 0.0099, 0.0, 0.0101 * 4], [0.0, 0.0, 0.0, 0.0]])).tolist() == [
        0.25,
        1.0,
    ]
    sizes = torch.tensor([4.0, 0.01, 0.011, 0.0])  # mean just above 1
    assert near_zero(sizes).item() == 0.5


# -- activations ---------------------------------------------------------------------------------------------


def activation_form(kind, a, axis, norm):
    """From torch operations, in the order of the definition."""
    if kind != "activation_l1_l2":
        return a.abs().mean() if kind == "activation_l1" else a.abs().square().mean()
    rows = a.movedim(axis, 0).flatten(1).abs()
    v = torch.stack([r.sum() if norm == "l1" else r.square().sum().sqrt() for r in rows if r.detach().any()])
    return v.sum() / v.square().sum().sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((2, 3, 4, 2), 1), ((2, 5, 3), -1), ((3, 2, 2), 0)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("activation_l1", {}),
        ("activation_l2", {}),
        ("activation_l1_l2", {}),
        ("activation_l1_l2", {"norm": "l1"}),
    ],
)
def test_activation_penalties_are_the_closed_forms(kind, options, shape, axis, dtype):
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=dtype)
    a.movedim(axis, 0)[1] = 0  # a dead channel
    a.flatten()[0] = 0
    given_ = options | ({"channel_axis": axis} if kind == "activation_l1_l2" else {})
    leaf = a.clone().requires_grad_()
    reference = activation_form(kind, leaf, axis, options.get("norm", "l2"))
    reference.backward()
    value = activity.PENALTIES[kind](a, **given_)
    c, x = activity.GRADIENTS[kind](a, **given_)
    torch.testing.assert_close(value, reference.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c * x, leaf.grad, rtol=1e-10, atol=1e-12)
    assert not bool((c * x)[a == 0].any())


def test_the_mean_of_magnitudes_gives_what_their_sum_gives():
    a = torch.randn(4, 3, 5, dtype=torch.float64)
    v = a.abs().mean((0, 2))
    assert activity.activation_l1_l2(a, norm="l1").item() == pytest.approx(
        float(v.sum() / v.norm()), rel=1e-12
    )


@pytest.mark.parametrize("kind", activity.PENALTIES)
def test_activations_of_half_precision(kind):
    a = (torch.randn(64, 8, 4) * 300).half()
    value, (c, x) = activity.PENALTIES[kind](a), activity.GRADIENTS[kind](a)
    exact, (d, y) = activity.PENALTIES[kind](a.double()), activity.GRADIENTS[kind](a.double())
    assert value.dtype == c.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(c.double() * x.double(), d * y, rtol=1e-5, atol=1e-12)


def test_activation_options_out_of_range():
    for rule in (activity.activation_l1_l2, activity.activation_l1_l2_gradient):
        with pytest.raises(ValueError, match="norm='max' is unknown; allowed: l2, l1"):
            rule(torch.ones(2, 2), norm="max")
        with pytest.raises(ValueError, match=r"channel_axis=2: an output of shape \(2, 2\) has axes 0 to 1"):
            rule(torch.ones(2, 2), channel_axis=2)
