"""Removed channels: the small model equals the original with them silenced, its sizes are those counted by hand."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress import codes
from lightning_compress.channels.families import Channels, find_channels
from lightning_compress.channels.surgery import cut
from lightning_compress.channels.trace import trace
from lightning_compress.channels.trials import Trials
from lightning_compress.channels.watcher import tensors_of
from lightning_compress.compress import compress
from lightning_compress.cost import cost
from lightning_compress.models import ResNetCIFAR
from lightning_compress.plans import Plan
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.pruning.silence import silencing
from lightning_compress.stats import Calibration
from lightning_compress.stats.running import call
from lightning_compress.targets import survey
from lightning_compress.transform import applied, replay

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Net(nn.Module):
    """Modules, and a function of them and the input."""

    def __init__(
        self, forward: Callable[..., Any], /, **parts: nn.Module | nn.Parameter | int | Tensor
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.rule = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.rule(self, *args, **kwargs)


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def trained(model: nn.Module) -> nn.Module:
    """Eval mode; statistics, gains and biases as after a training."""
    for norm in model.modules():
        if isinstance(norm, NORMS):
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.3, 3)
        if isinstance(norm, (*NORMS, nn.GroupNorm, nn.LayerNorm)) and norm.weight is not None:
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
    return model.eval()


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tree_leaves(call(model, x)) if isinstance(t, Tensor)]


def gap(first: nn.Module, second: nn.Module, x: Any) -> float:
    """The largest difference of outputs, as a share of the largest output."""
    a, b = outputs(first, x), outputs(second, x)
    assert [t.shape for t in a] == [t.shape for t in b]
    return max(
        ((s - t).abs().max() / s.abs().max().clamp(min=1e-12)).item() for s, t in zip(a, b, strict=True)
    )


def channels_of(model: nn.Module, x: Any) -> Channels:
    return find_channels(trace(model, x), survey(model).targets)


def removed(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Full parameter name -> mask of what a plan leaves."""
    masks = {}
    for key, tensor in tensors_of(model).items():
        if isinstance(tensor, nn.Parameter) and key in plan.layers:
            masks[key] = torch.zeros(tensor.shape, dtype=torch.bool)
            kept = plan.layers[key]["keep"]
            along = [
                kept[str(a)].long() if str(a) in kept else torch.arange(n) for a, n in enumerate(tensor.shape)
            ]
            masks[key][torch.meshgrid(*along, indexing="ij")] = True
    return masks


def twin(model: nn.Module, plan: Plan) -> nn.Module:
    """The original with zeros wherever a removed channel occurs."""
    other = copy.deepcopy(model)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for key, mask in removed(model, plan).items():
            parameters[key].mul_(mask)
    return other


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in model.named_parameters()}


# -- the networks: a function that builds one, an input, and shapes of the small one counted by hand ------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def chain() -> nn.Module:
    parts = [
        conv(3, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        conv(8, 12),
        nn.BatchNorm2d(12),
        nn.ReLU(),
    ]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5))


def residual() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = F.relu(x + net.b(F.relu(net.a(x))))
        x = F.relu(net.project(x) + net.d(F.relu(net.c(x))))
        return net.head(x.mean((2, 3)))

    parts = {"stem": conv(3, 8), "a": conv(8, 6), "b": conv(6, 8), "c": conv(8, 10), "d": conv(10, 12)}
    return Net(forward, **parts, project=conv(8, 12, 1), head=nn.Linear(12, 4))


def padded() -> nn.Module:
    return ResNetCIFAR(8, shortcut="pad")


def dense() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x)
        x = torch.cat([x, net.a(F.relu(net.na(x)))], 1)
        x = torch.cat([x, net.b(F.relu(net.nb(x)))], 1)
        return net.head(F.relu(net.nc(x)).mean((2, 3)))

    norms = {"na": nn.BatchNorm2d(8), "nb": nn.BatchNorm2d(12), "nc": nn.BatchNorm2d(16)}
    return Net(forward, stem=conv(3, 8), a=conv(8, 4), b=conv(12, 4), **norms, head=nn.Linear(16, 4))


def depthwise() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU6(), conv(8, 8, groups=8), nn.ReLU6(), conv(8, 12, 1), nn.Flatten(1),
                         nn.Linear(12 * 16, 3))  # fmt: skip


def multiplied() -> nn.Module:
    return nn.Sequential(conv(3, 6), conv(6, 12, groups=6), nn.ReLU(), conv(12, 4))


def many_groups() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16, groups=8), nn.ReLU(), conv(16, 4))


def few_groups() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 24, groups=2), nn.ReLU(), conv(24, 4))


def upward() -> nn.Module:
    parts = [nn.ConvTranspose2d(3, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=2), nn.ReLU()]
    return nn.Sequential(*parts, nn.ConvTranspose2d(12, 24, 3, groups=12), conv(24, 4))


def excited() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        gate = net.up(F.silu(net.down(F.adaptive_avg_pool2d(x, 1))))
        return net.b(x * gate.sigmoid())

    return Net(forward, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8, 4))


def gated() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        a, b = net.a(x).chunk(2, -1)
        return net.c(F.glu(net.b(a * b.sigmoid())))

    return Net(forward, a=nn.Linear(4, 16), b=nn.Linear(8, 12), c=nn.Linear(6, 3))


def shuffled() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.PixelShuffle(2), nn.ReLU(), conv(4, 8), nn.PixelUnshuffle(2), conv(32, 5)
    )


def group_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 8), nn.GroupNorm(8, 8), conv(8, 3)
    )


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


def instance_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 3))


def free_parameters() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([net.token.expand(len(x), -1, -1), x], 1) + net.positions
        x = x + net.scale * net.down(F.gelu(net.up(x)))
        return net.head(x[:, 0])

    parts = {
        "patches": nn.Conv2d(3, 8, 2, 2),
        "up": nn.Linear(8, 16),
        "down": nn.Linear(16, 8),
        "head": nn.Linear(8, 3),
    }
    free = {"token": torch.randn(1, 1, 8), "positions": torch.randn(1, 5, 8), "scale": torch.randn(8)}
    return Net(forward, **parts, **{name: nn.Parameter(value) for name, value in free.items()})


def tied() -> nn.Module:
    net = Net(
        lambda net, x: net.out(F.relu(net.b(F.relu(net.a(net.words(x)))))),
        words=nn.Embedding(11, 8), a=nn.Linear(8, 12), b=nn.Linear(12, 8), out=nn.Linear(8, 11, bias=False),
    )  # fmt: skip
    net.out.weight = net.words.weight
    return net


def twice() -> nn.Module:
    return Net(
        lambda net, x: net.out(F.relu(net.a(F.relu(net.a(net.into(x)))))),
        into=nn.Linear(4, 8), a=nn.Linear(8, 8), out=nn.Linear(8, 3),
    )  # fmt: skip


def one_axis() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=4),
                         nn.ConvTranspose1d(4, 3, 2))  # fmt: skip


def three_axes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(8, 3, 1)
    )


def bilinear() -> nn.Module:
    return Net(
        lambda net, x, y: net.out(net.both(net.a(x), net.b(y)).tanh()),
        a=nn.Linear(3, 6), b=nn.Linear(4, 8), both=nn.Bilinear(6, 8, 10), out=nn.Linear(10, 2),
    )  # fmt: skip


def named() -> nn.Module:
    def forward(net: Any, image: Tensor, vector: Tensor) -> dict[str, Any]:
        x = F.relu(net.a(image)).mean((2, 3))
        y = F.relu(net.b(vector))
        return {"sum": net.c(x + y), "parts": (net.d(x), [net.e(y)])}

    return Net(forward, a=conv(3, 8), b=nn.Linear(4, 8), **{key: nn.Linear(8, 2) for key in "cde"})


def shared_view() -> nn.Module:
    """A weight that is a part of another tensor's memory."""
    net = mlp()
    store = torch.randn(2, 8, 4)
    net[0].weight.data = store[1]
    net[2].weight.data = torch.randn(8, 6).t()
    return net


def prelu() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), conv(6, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, tuple[int, ...]]]] = {
    "mlp": (mlp, (5, 4), {"0.weight": (4, 4), "2.weight": (3, 4), "4.weight": (3, 3), "2.bias": (3,)}),
    "chain": (
        chain,
        (2, 3, 8, 8),
        {"0.weight": (4, 3, 3, 3), "1.bias": (4,), "4.weight": (6, 4, 3, 3), "9.weight": (5, 24)},
    ),
    "residual": (
        residual,
        (2, 3, 8, 8),
        {
            "stem.weight": (4, 3, 3, 3),
            "a.weight": (3, 4, 3, 3),
            "b.weight": (4, 3, 3, 3),
            "b.bias": (4,),
            "project.weight": (6, 4, 1, 1),
            "d.weight": (6, 5, 3, 3),
            "head.weight": (4, 6),
        },
    ),
    "padded": (
        padded,
        (2, 3, 8, 8),
        {
            "conv1.weight": (8, 3, 3, 3),
            "layer2.0.conv1.weight": (16, 8, 3, 3),
            "layer3.0.conv2.weight": (32, 32, 3, 3),
            "linear.weight": (10, 32),
        },
    ),
    "dense": (
        dense,
        (2, 3, 8, 8),
        {
            "stem.weight": (4, 3, 3, 3),
            "a.weight": (2, 4, 3, 3),
            "nb.weight": (6,),
            "b.weight": (2, 6, 3, 3),
            "head.weight": (4, 8),
        },
    ),
    "depthwise": (
        depthwise,
        (2, 3, 4, 4),
        {"0.weight": (4, 3, 3, 3), "2.weight": (4, 1, 3, 3), "6.weight": (3, 96)},
    ),
    "multiplied": (
        multiplied,
        (2, 3, 6, 6),
        {"0.weight": (3, 3, 3, 3), "1.weight": (6, 1, 3, 3), "3.weight": (4, 6, 3, 3)},
    ),
    "many_groups": (
        many_groups,
        (2, 3, 6, 6),
        {"0.weight": (8, 3, 3, 3), "2.weight": (8, 2, 3, 3), "4.weight": (4, 8, 3, 3)},
    ),
    "few_groups": (
        few_groups,
        (2, 3, 6, 6),
        {"0.weight": (8, 3, 3, 3), "2.weight": (12, 4, 3, 3), "4.weight": (4, 12, 3, 3)},
    ),
    "upward": (
        upward,
        (2, 3, 3, 3),
        {
            "0.weight": (3, 4, 2, 2),
            "2.weight": (4, 3, 2, 2),
            "2.bias": (6,),
            "4.weight": (6, 2, 3, 3),
            "5.weight": (4, 12, 3, 3),
        },
    ),
    "excited": (
        excited,
        (2, 3, 6, 6),
        {
            "a.weight": (4, 3, 3, 3),
            "down.weight": (2, 4, 1, 1),
            "up.weight": (4, 2, 1, 1),
            "b.weight": (4, 4, 3, 3),
        },
    ),
    "gated": (gated, (5, 4), {"a.weight": (8, 4), "b.weight": (6, 4), "c.weight": (3, 3)}),
    "shuffled": (
        shuffled,
        (2, 3, 4, 4),
        {"0.weight": (8, 3, 3, 3), "3.weight": (4, 2, 3, 3), "5.weight": (5, 16, 3, 3)},
    ),
    "group_norm": (
        group_norm,
        (2, 3, 6, 6),
        {"0.weight": (4, 3, 3, 3), "1.weight": (4,), "3.weight": (4, 4, 3, 3), "4.weight": (4,)},
    ),
    "layer_norm": (layer_norm, (5, 4), {"0.weight": (4, 4), "1.weight": (4,), "3.weight": (3, 4)}),
    "instance_norm": (
        instance_norm,
        (2, 3, 6, 6),
        {"0.weight": (4, 3, 3, 3), "1.bias": (4,), "3.weight": (3, 4, 3, 3)},
    ),
    "free_parameters": (
        free_parameters,
        (2, 3, 4, 4),
        {
            "patches.weight": (4, 3, 2, 2),
            "token": (1, 1, 4),
            "positions": (1, 5, 4),
            "scale": (4,),
            "up.weight": (8, 4),
            "head.weight": (3, 4),
        },
    ),
    "tied": (tied, "words", {"words.weight": (11, 4), "a.weight": (6, 4), "b.weight": (4, 6)}),
    "twice": (twice, (5, 4), {"into.weight": (4, 4), "a.weight": (4, 4), "out.weight": (3, 4)}),
    "one_axis": (one_axis, (2, 2, 9), {"0.weight": (4, 2, 3), "3.weight": (2, 2, 3), "4.weight": (2, 3, 2)}),
    "three_axes": (three_axes, (2, 2, 6, 6, 6), {"0.weight": (4, 2, 3, 3, 3), "4.weight": (3, 4, 1, 1, 1)}),
    "bilinear": (
        bilinear,
        ((5, 3), (5, 4)),
        {"a.weight": (3, 3), "b.weight": (4, 4), "both.weight": (5, 3, 4), "out.weight": (2, 5)},
    ),
    "named": (
        named,
        {"image": (2, 3, 6, 6), "vector": (2, 4)},
        {
            "a.weight": (4, 3, 3, 3),
            "b.weight": (4, 4),
            "c.weight": (2, 4),
            "d.weight": (2, 4),
            "e.weight": (2, 4),
        },
    ),
    "shared_view": (shared_view, (5, 4), {"0.weight": (4, 4), "2.weight": (3, 4)}),
    "prelu": (
        prelu,
        (2, 3, 6, 6),
        {"0.weight": (4, 3, 3, 3), "1.weight": (4,), "2.weight": (3, 4, 3, 3), "3.weight": (1,)},
    ),
}
OVER_CHANNELS = ("group_norm", "layer_norm")


def example(form: Any) -> Any:
    """Random numbers of a shape, in nested tuples and dicts as the form says."""
    if form == "words":
        return torch.randint(0, 11, (2, 5))
    if isinstance(form, dict):
        return {key: example(value) for key, value in form.items()}
    return torch.randn(form) if isinstance(form[0], int) else tuple(map(example, form))


@pytest.fixture(params=CASES)
def case(request: Any) -> tuple[str, Callable[[], nn.Module], nn.Module, Any]:
    build, form, _ = CASES[request.param]
    return request.param, build, trained(build()), example(form)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_shapes_follow_hand_counts_and_outputs_those_of_the_silenced_twin(case: Any, criterion: str) -> None:
    name, _, net, x = case
    before = {key: t.clone() for key, t in net.state_dict().items()}
    result = compress(net, [RemoveChannels(0.5, criterion=criterion)], example_input=x)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    found = shapes(result.model)
    assert {key: found[key] for key in CASES[name][2]} == CASES[name][2]
    (plan,) = result.plan
    assert plan.layers
    if name not in OVER_CHANNELS:
        assert gap(twin(net, plan), result.model, x) < 1e-5
        assert gap(net, result.model, x) > 1e-3  # so the twin is no other name for the original


def test_a_model_cut_in_place_keeps_its_parameters_and_is_like_one_built_so(case: Any) -> None:
    name, build, net, x = case
    transform = RemoveChannels(0.5)
    plan = transform.plan(net, Calibration(example_input=x))
    small, objects = copy.deepcopy(net), {}
    objects = {key: (id(p), p.requires_grad) for key, p in small.named_parameters()}
    transform.apply(small, plan)
    assert {key: (id(p), p.requires_grad) for key, p in small.named_parameters()} == objects
    for layer in small.modules():
        check_numbers(layer)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)) if name in PICKLED else small):
        assert gap(small, other, x) == 0
    fresh = trained(build())
    transform.apply(fresh, transform.structure(plan))
    fresh.load_state_dict(small.state_dict())
    assert gap(small, fresh, x) == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), small.state_dict().values(), strict=True)
    )
    moved = [p for p in small.parameters() if p.grad is None]
    loss = sum(t.square().sum() for t in tree_leaves(call(small.train(), x)) if isinstance(t, Tensor))
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in moved)


PICKLED = [name for name, (build, _, _) in CASES.items() if isinstance(build(), nn.Sequential)]


def check_numbers(layer: nn.Module) -> None:
    """What a layer says of itself fits its tensors."""
    if isinstance(layer, nn.Linear):
        assert (layer.out_features, layer.in_features) == layer.weight.shape
        assert f"in_features={layer.weight.shape[1]}, out_features={layer.weight.shape[0]}" in repr(layer)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        a, b = (layer.in_channels, layer.out_channels)[:: 1 if layer.transposed else -1]
        assert (a, b // layer.groups) == layer.weight.shape[:2]
        assert layer.in_channels % layer.groups == 0
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert getattr(layer, name) is None or len(getattr(layer, name)) == layer.num_features
    elif isinstance(layer, nn.LayerNorm):
        assert layer.normalized_shape == tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        assert layer.num_channels == len(layer.weight)
        assert layer.num_channels % layer.num_groups == 0
    elif isinstance(layer, nn.Embedding):
        assert (layer.num_embeddings, layer.embedding_dim) == layer.weight.shape
    elif isinstance(layer, nn.Bilinear):
        assert (layer.out_features, layer.in1_features, layer.in2_features) == layer.weight.shape
    elif isinstance(layer, nn.PReLU):
        assert layer.num_parameters == len(layer.weight)


def test_counts_are_those_of_the_small_model(case: Any) -> None:
    name, _, net, x = case
    found = channels_of(net, x)
    sizes = shapes(net)
    whole = cost(net, x)
    assert found.macs([]) == pytest.approx(whole.macs)
    assert found.params([], sizes) == whole.params
    plan = RemoveChannels(0.5).plan(net, Calibration(example_input=x))
    lost = [c for f in found.families for c in f.classes if gone(found, plan, c)]
    small = copy.deepcopy(net)
    RemoveChannels().apply(small, plan)
    less = cost(small, x)
    assert found.macs(lost) == pytest.approx(less.macs), name
    assert found.params(lost, sizes) == less.params
    masks = silencing(net, found, lost)
    assert all(torch.equal(mask, masks[key]) for key, mask in removed(net, plan).items())


def gone(found: Channels, plan: Plan, one: int) -> bool:
    """Whether a plan removes a class."""
    for family in found.families:
        if one in family.classes:
            (key, axis), indices = next(iter(family.members.items()))
            kept = plan.layers.get(key, {"keep": {}})["keep"].get(str(axis))
            return kept is not None and int(indices[family.classes.index(one)][0]) not in kept.tolist()
    return False


# -- what is refused, and what is left alone -----------------------------------------------------------------------


FORGED: dict[str, tuple[str, Any, str]] = {
    "no such tensor": ("9.weight", {"shape": [4, 4], "keep": {"0": torch.tensor([0])}}, "no such tensor"),
    "another shape": ("0.weight", {"shape": [8, 5], "keep": {"0": torch.tensor([0])}}, "shape"),
    "no index": ("0.weight", {"shape": [8, 4], "keep": {"0": torch.tensor([], dtype=torch.int32)}}, "at least one"),
    "no such axis": ("0.weight", {"shape": [8, 4], "keep": {"2": torch.tensor([0])}}, "axis 2"),
    "a negative axis": ("0.weight", {"shape": [8, 4], "keep": {"-1": torch.tensor([0])}}, "axis -1"),
    "too large": ("0.weight", {"shape": [8, 4], "keep": {"0": torch.tensor([0, 8])}}, "from 0 to 7"),
    "negative": ("0.weight", {"shape": [8, 4], "keep": {"0": torch.tensor([-1, 2])}}, "from 0 to 7"),
    "twice": ("0.weight", {"shape": [8, 4], "keep": {"0": torch.tensor([1, 1])}}, "rising"),
    "falling": ("0.weight", {"shape": [8, 4], "keep": {"0": torch.tensor([3, 1])}}, "rising"),
    "fractions": ("0.weight", {"shape": [8, 4], "keep": {"0": torch.tensor([0.0, 1.0])}}, "at least one"),
    "two axes": ("0.weight", {"shape": [8, 4], "keep": {"0": torch.tensor([[0, 1]])}}, "at least one"),
    "no such module": ("9()", {"set": {"in_features": [-1, 8, 4]}}, "in_features"),
    "no such number": ("0()", {"set": {"width": [-1, 8, 4]}}, "width"),
    "another number": ("0()", {"set": {"out_features": [-1, 9, 4]}}, "out_features"),
    "a growing number": ("0()", {"set": {"out_features": [-1, 8, 9]}}, "out_features"),
    "less than nothing": ("0()", {"set": {"out_features": [-1, 8, -1]}}, "out_features"),
    "no number": ("0()", {"set": {"training": [-1, 1, 1]}}, "training"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_plan_is_refused_and_nothing_is_changed(name: str) -> None:
    net, x = mlp(), torch.randn(5, 4)
    key, entry, why = FORGED[name]
    plan = RemoveChannels(0.5).plan(net, Calibration(example_input=x))
    forged = Plan({**plan.layers, key: entry})
    before, described = {k: t.clone() for k, t in net.state_dict().items()}, repr(net)
    with pytest.raises(ValueError, match=why):
        RemoveChannels().apply(net, forged)
    assert repr(net) == described
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_a_plan_is_carried_out_once() -> None:
    net, x = mlp(), torch.randn(5, 4)
    plan = RemoveChannels(0.5).plan(net, Calibration(example_input=x))
    RemoveChannels().apply(net, plan)
    with pytest.raises(ValueError, match="apply it to the architecture it was made for"):
        RemoveChannels().apply(net, plan)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell])
def test_recurrent_layers_stay_whole_or_work(kind: type[nn.Module]) -> None:
    cell = kind in (nn.LSTMCell, nn.GRUCell)

    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.a(x))
        y = net.core(x[:, 0] if cell else x)
        return net.b(torch.tanh(net.c(y[0] if isinstance(y, tuple) else y)))

    options = {} if cell else {"batch_first": True}
    net = Net(
        forward, a=nn.Linear(3, 8), core=kind(8, 6, **options), c=nn.Linear(6, 10), b=nn.Linear(10, 2)
    ).eval()
    x = torch.randn(2, 4, 3)
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    assert result.model.c.weight.shape[0] == 5
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5
    result.model.train()(x).sum().backward()


@pytest.mark.parametrize("literal", [True, False])
def test_a_channel_shuffle_loses_channels_from_every_group(literal: bool) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, 8 if literal else c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return net.b(torch.relu(net.c(x)))

    net = Net(forward, a=conv(3, 16), c=conv(16, 8, groups=2), b=conv(8, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    assert result.model.a.weight.shape[0] == (16 if literal else 8)
    assert result.model.c.weight.shape == ((4, 8, 3, 3) if literal else (4, 4, 3, 3))
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5
    if literal:
        assert "its forward pass fails: RuntimeError: shape" in result.plan[0].skipped["a.weight"]


def test_a_size_written_in_code_is_left_alone() -> None:
    net = Net(
        lambda net, x: net.c(torch.relu(net.b(torch.relu(net.a(x)).view(-1, 400)))),
        a=nn.Conv2d(1, 16, 3), b=nn.Linear(400, 12), c=nn.Linear(12, 3),
    )  # fmt: skip
    x = torch.randn(2, 1, 7, 7)
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    assert shapes(result.model)["b.weight"] == (6, 400)
    assert "shape '[-1, 400]' is invalid" in result.plan[0].skipped["a.weight"]
    with pytest.raises(ValueError, match=r"a cannot be removed: .*\[-1, 400\].*exclude=\['a'\]"):
        compress(net, [RemoveChannels(0.5, on_conflict="error")], example_input=x)


def test_a_number_that_code_derives_a_size_of_the_output_from_is_found_out() -> None:
    net = Net(
        lambda net, x: net.c(torch.relu(net.b(torch.relu(net.a(x)))))[:, : net.a.out_features // 4],
        a=nn.Linear(3, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 2),
    )  # fmt: skip
    result = compress(net, [RemoveChannels(0.5)], example_input=torch.randn(4, 3))
    assert shapes(result.model)["b.weight"] == (3, 8)
    assert "its output has shapes ((1, 1),) instead of ((1, 2),)" in result.plan[0].skipped["a.weight"]


def test_gradients_of_what_is_cut_go() -> None:
    net, x = mlp(), torch.randn(5, 4)
    plan = RemoveChannels(0.5).plan(net, Calibration(example_input=x))
    net(x).sum().backward()
    cut(net, plan.layers)
    left = {key for key, p in net.named_parameters() if p.grad is not None}
    assert left == set(shapes(net)) - {key for key, entry in plan.layers.items() if "keep" in entry}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).sum().backward()
    optimizer.step()


def test_layers_that_only_run_in_training_follow() -> None:
    def forward(net: Any, x: Tensor) -> Any:
        x = torch.relu(net.a(x))
        return (net.b(x), net.helper(x)) if net.training else net.b(x)

    net = Net(forward, a=conv(3, 8), b=conv(8, 2), helper=conv(8, 5)).eval()
    x = torch.randn(2, 3, 4, 4)
    small = compress(net, [RemoveChannels(0.5)], example_input=x).model
    assert small.helper.weight.shape == (5, 4, 3, 3)
    assert [t.shape[1] for t in small.train()(x)] == [2, 5]
    assert cost(small.eval(), x).macs == channels_of(small, x).macs([])


def test_masks_are_cut_along() -> None:
    net = mlp()
    mask = torch.rand(8, 4) > 0.5
    net[0].weight.data *= mask
    codes.set_mask(net[0], "weight", mask)
    plan = RemoveChannels(0.5).plan(net, Calibration(example_input=torch.randn(5, 4)))
    cut(net, plan.layers)
    (code,) = [code for _, _, _, code in codes.of(net)]
    assert torch.equal(code.mask, mask[plan.layers["0.weight"]["keep"]["0"].long()])
    assert code.matches(net[0].weight)


def test_tied_parameters_stay_tied() -> None:
    net = tied()
    small = compress(net, [RemoveChannels(0.5)], example_input=example("words")).model
    assert small.out.weight is small.words.weight
    assert small.out.in_features == small.words.embedding_dim == 4


def test_a_fresh_model_takes_the_recorded_steps() -> None:
    net, x = trained(chain()), torch.randn(2, 3, 8, 8)
    small = compress(net, [RemoveChannels(0.5), RemoveChannels(0.25)], example_input=x).model
    fresh = trained(chain())
    replay(fresh, applied(small))
    fresh.load_state_dict(small.state_dict())
    assert gap(small, fresh, x) == 0


# -- random graphs ----------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """Convolutions, sums and concatenations in a random order."""

    def __init__(self, plan: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        widths, self.nodes = [4], plan
        self.layers = nn.ModuleDict({"stem": conv(2, 4)})
        for i, (kind, a, b, width) in enumerate(plan):
            a, b = a % len(widths), b % len(widths)
            if kind == "conv":
                self.layers[f"n{i}"] = nn.Sequential(conv(widths[a], width), nn.BatchNorm2d(width), nn.ReLU())
                widths.append(width)
            elif kind == "depthwise":
                self.layers[f"n{i}"] = conv(widths[a], widths[a], groups=widths[a])
                widths.append(widths[a])
            elif kind == "add" and widths[a] != widths[b]:
                self.layers[f"n{i}"] = conv(widths[b], widths[a], 1)
                widths.append(widths[a])
            else:
                widths.append(widths[a] + (widths[b] if kind == "cat" else 0))
        self.layers["head"] = nn.Linear(sum(widths), 3)

    def forward(self, x: Tensor) -> Tensor:
        made = [torch.relu(self.layers["stem"](x))]
        for i, (kind, a, b, _) in enumerate(self.nodes):
            one, two = made[a % len(made)], made[b % len(made)]
            if kind in ("conv", "depthwise"):
                made.append(self.layers[f"n{i}"](one))
            elif kind == "cat":
                made.append(torch.cat([one, two], 1))
            else:
                made.append(one + (self.layers[f"n{i}"](two) if f"n{i}" in self.layers else two))
        return self.layers["head"](torch.cat(made, 1).mean((2, 3)))


NODES = st.tuples(
    st.sampled_from(["conv", "add", "cat", "depthwise"]),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(2, 6),
)


@settings(max_examples=40)
@given(st.lists(NODES, min_size=1, max_size=7), st.integers(0, 2**16))
def test_random_graphs_lose_any_channels(nodes: list[tuple[str, int, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    net, x = trained(Graph(nodes)), torch.randn(2, 2, 5, 5)
    found, sizes, whole = channels_of(net, x), shapes(net), cost(net, x)
    assert found.macs([]) == whole.macs
    assert found.params([], sizes) == whole.params
    draw = torch.Generator().manual_seed(seed)
    lost = []
    for family in found.families:
        count = int(torch.randint(0, len(family), (), generator=draw))
        lost += [family.classes[i] for i in torch.randperm(len(family), generator=draw)[:count].tolist()]
    trials = Trials(net, x, found)
    assert trials.fault(lost) == ""
    small, silenced = trials.small(lost), copy.deepcopy(net)
    with torch.no_grad():
        for key, mask in silencing(net, found, lost).items():
            tensors_of(silenced)[key].mul_(mask)
    assert gap(silenced, small, x) < 1e-5
    less = cost(small, x)
    assert found.macs(lost) == less.macs
    assert found.params(lost, sizes) == less.params == sum(p.numel() for p in small.parameters())


def test_the_benchmark_finds_what_works_and_what_is_broken(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    path = Path(__file__).parent.parent / "recipes" / "benchmarks" / "torchvision_channels.py"
    done = tmp_path / "done.json"
    command = [sys.executable, str(path), "--models", "squeezenet1_1", "--done", str(done)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "1 of 1 succeed, 0 are left broken." in text
    rows = json.loads(done.read_text())
    rows["squeezenet1_1"]["broken"] = "it does not run"
    done.write_text(json.dumps(rows))  # what is done is not run again
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "0 of 1 succeed, 1 are left broken." in text
