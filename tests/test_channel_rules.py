"""What single operations do to channels: those that let them go, and those at which they stay, with the reason."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_channels import Net, check_numbers, conv, gap, twin
from torch import Tensor, nn

from lightning_compress.channels.labels import Labels
from lightning_compress.compress import compress
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.transform import NothingChangedError

components = pytest.importorskip("scipy.sparse.csgraph").connected_components

MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.SiLU(),
    nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardshrink(), nn.Softshrink(), nn.Tanhshrink(),
    nn.Softplus(), nn.Softsign(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Threshold(0.1, 0.2), nn.PReLU(8),
    nn.RReLU(), nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Identity(),
    nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False),
    nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3),
    nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, 3), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1),
    nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2, mode="bicubic"),
    nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.ConstantPad2d(1, 0.5),
    nn.PixelUnshuffle(2), nn.PixelShuffle(2), nn.ChannelShuffle(2), nn.GLU(1), nn.Softmax(2),
    nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid()),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m).split("(")[0])
def test_channels_go_on_through_modules(module: nn.Module) -> None:
    keeps_channels(module)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "1 - x": lambda x: 1 - x,
    "x / 2 + 3": lambda x: x / 2 + 3,
    "x ** 2": lambda x: x**2,
    "clamp": lambda x: x.clamp(0, 1).sqrt(),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.5),
    "in place": lambda x: x.clone().mul_(2).add_(x).relu_(),
    "normalize over space": lambda x: F.normalize(x.flatten(2), dim=2).reshape_as(x),
    "transpose": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "permute": lambda x: x.permute(1, 0, 2, 3).movedim(0, 1),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "max": lambda x: x.amax((2, 3)),
    "max of an axis": lambda x: x.max(3).values,
    "sort": lambda x: x.sort(3).values,
    "topk": lambda x: x.flatten(2).mean(2),
    "flatten": lambda x: x.mean(3).flatten(1),
    "flatten all": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(len(x), -1),
    "view with a size of the input": lambda x: x.view(x.shape[0], x.shape[1], -1).mean(2),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(-1),
    "unsqueeze": lambda x: x.unsqueeze(2).mean(2),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + x,
    "repeat in space": lambda x: x.repeat(1, 1, 2, 1),
    "repeat channels": lambda x: x.repeat(1, 3, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "tile": lambda x: x.tile((1, 2, 1, 1)),
    "stack": lambda x: torch.stack([x, x.relu()], -1).sum(-1),
    "stack as channels": lambda x: torch.stack([x, x.relu()], 1).flatten(1, 2),
    "cat": lambda x: torch.cat([x, x.tanh()], 1),
    "cat in space": lambda x: torch.cat([x, x.tanh()], 3),
    "cat in front": lambda x: torch.cat([torch.zeros_like(x), x], 1),
    "slice in space": lambda x: x[:, :, 1:3, ::2],
    "index in space": lambda x: x[:, :, torch.tensor([1, 0])],
    "first position": lambda x: x[..., 0].mean(-1),
    "roll in space": lambda x: x.roll(1, 3).flip(2),
    "cumsum in space": lambda x: x.cumsum(3),
    "split": lambda x: sum(x.split(x.shape[1] // 2, 1)),
    "chunk": lambda x: torch.cat([part * i for i, part in enumerate(x.chunk(4, 1))], 1),
    "split in space": lambda x: x.split([1, 3], 2)[1],
    "softmax": lambda x: x.flatten(2).softmax(-1).mean(-1),
    "unfold": lambda x: F.unfold(x, 3),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (4, 4), 2, stride=2),
    "fold of channels": lambda x: F.fold(x.flatten(2)[..., :4], (4, 4), 2, stride=2),
    "windows": lambda x: x.unfold(2, 2, 2).mean(-1),
    "interpolate": lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", align_corners=True),
    "grid_sample": lambda x: F.grid_sample(x, torch.zeros(len(x), 3, 3, 2), align_corners=True),
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "pad": lambda x: F.pad(x, (1, 0, 0, 1)),
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:]),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x.relu())).sum(-1),
    "gram": lambda x: x.mean((2, 3)) @ (x.mean((2, 3)).mT @ x.mean((2, 3))),
    "zeros": lambda x: x.new_zeros(x.shape) + x,
    "einsum": lambda x: torch.einsum("nchw,nchv->nchwv", x, x).mean(-1),
    "distances": lambda x: (
        x.flatten(2).transpose(1, 2) + torch.cdist(x.flatten(2).mT, x.flatten(2).mT).mean(-1, True)
    ),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3, scale=0.1),
    "attention to values": lambda x: F.scaled_dot_product_attention(
        *[torch.ones(len(x), 16, 4)] * 2, x.flatten(2).mT
    ),
    "half": lambda x: x.double().float(),
    "detach": lambda x: x - x.detach() / 2,
    "gumbel": lambda x: x.log_softmax(3).exp(),
    "norm": lambda x: x.norm(dim=3).flatten(1),
    "variance": lambda x: x.var((2, 3)),
    "cast of a mask": lambda x: (x > 0).float() * x,
    "fill in place": lambda x: torch.zeros_like(x).copy_(x),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_channels_go_on_through_functions(name: str) -> None:
    keeps_channels(FUNCTIONS[name])


def keeps_channels(between: Callable[[Tensor], Tensor]) -> None:
    """Half of the channels that go into an operation can go, and what comes out follows."""
    x, first = torch.randn(2, 3, 4, 4), conv(3, 8)
    parts = {"between": between.eval()} if isinstance(between, nn.Module) else {}
    last = consumer(between, first(x))
    net = Net(
        lambda net, x: net.b((net.between if parts else between)(net.a(x))), a=first, b=last, **parts
    ).eval()
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    (plan,) = result.plan
    assert plan.layers["a.weight"]["keep"].keys() == {"0"}
    assert result.model.a.weight.shape[0] == 4
    assert result.model.b.weight.shape[1] == last.weight.shape[1] // 2
    assert gap(twin(net, plan), result.model, x) < 1e-5
    for layer in result.model.modules():
        check_numbers(layer)


def consumer(between: Callable[[Tensor], Tensor], x: Tensor) -> nn.Module:
    """A layer that takes what the operation gives."""
    with torch.no_grad():
        made = between(x)
    if made.dim() == 4:
        return nn.Conv2d(made.shape[1], 3, 1)
    if made.dim() == 3 and made.shape[1] % 8 == 0 and made.shape[2] % 8:
        return nn.Conv1d(made.shape[1], 3, 1)
    return nn.Linear(made.shape[-1], 3)


FIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "literal view": (
        lambda x: x.view(-1, 8, 16).mean(2),
        "its forward pass fails: RuntimeError: shape '[-1, 8, 16]' is invalid",
    ),
    "literal flat view": (
        lambda x: x.view(-1, 128),
        "its forward pass fails: RuntimeError: shape '[-1, 128]' is invalid",
    ),
    "literal split": (lambda x: torch.cat(x.split(4, 1)[::-1], 1), "would meet others"),
    "literal zeros": (
        lambda x: x + torch.zeros(8, 1, 1),
        "its forward pass fails: RuntimeError: The size of tensor a",
    ),
    "parts of different sizes": (lambda x: x.split([3, 5], 1)[0], "splits it into parts of [3, 5]"),
    "tensor_split": (lambda x: x.tensor_split(2, 1)[0], "takes a range of its entries by number"),
    "first channels": (lambda x: x[:, :4], "takes a range of its entries by number"),
    "every second": (lambda x: x[:, ::2], "takes a range of its entries by number"),
    "one channel": (lambda x: x[:, 2:3] * x, "takes a range of its entries by number"),
    "selected": (lambda x: x[:, 2].unsqueeze(1) * x, "takes one of its entries by number"),
    "unbind": (lambda x: torch.stack(x.unbind(1), 1), "takes its entries one by one"),
    "indexed": (lambda x: x[:, torch.arange(7, -1, -1)], "takes entries by number"),
    "index_select": (lambda x: x.index_select(1, torch.tensor([0, 3])), "takes entries by number"),
    "written": (
        lambda x: torch.index_fill(x, 1, torch.tensor([1]), 0.0),
        "index_fill, whose channels are not followed",
    ),
    "rolled": (lambda x: x.roll(1, 1), "uses the order of its entries"),
    "flipped": (lambda x: x.flip(1), "uses the order of its entries"),
    "cumsum": (lambda x: x.cumsum(1), "uses the order of its entries"),
    "sorted": (lambda x: x.sort(1).values, "uses the order of its entries"),
    "argmax": (lambda x: x * x.argmax(1, keepdim=True), "numbers its entries"),
    "topk": (lambda x: x.topk(4, 1).values, "numbers its entries"),
    "numbered": (
        lambda x: x * torch.arange(x.shape[1])[:, None, None],
        "joins it with a tensor of fixed size",
    ),
    "neighbours": (nn.LocalResponseNorm(3), "moves over it"),
    "transform": (lambda x: torch.fft.rfft(x, dim=1).abs(), "takes the Fourier transform along it"),
    "convolved": (lambda x: F.conv1d(x.flatten(2).transpose(1, 2), torch.ones(2, 16, 3)), "moves over it"),
    "scale from the number": (
        lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT] * 3),
        "root of their number",
    ),
    "gather": (
        lambda x: x.gather(1, torch.zeros(len(x), 8, 4, 4, dtype=torch.long)),
        "gather, whose channels are not followed",
    ),
    "memory": (
        lambda x: x.contiguous().as_strided((len(x), 64), (128, 1)),
        "reads its memory in another order",
    ),
    "mask": (lambda x: x[:, torch.ones(8, dtype=torch.bool)], "takes entries by number"),
    "repeated": (lambda x: x.repeat_interleave(torch.full((8,), 2), 1), "takes entries by number"),
}


@pytest.mark.parametrize("name", FIXED)
def test_channels_stay_where_code_numbers_them(name: str) -> None:
    between, why = FIXED[name]
    x, first = torch.randn(2, 3, 4, 4), conv(3, 8)
    net = Net(lambda net, x: net.b(between(net.a(x))), a=first, b=consumer(between, first(x))).eval()
    before = {key: t.clone() for key, t in net.state_dict().items()}
    with pytest.raises(NothingChangedError) as error:
        compress(net, [RemoveChannels(0.5)], example_input=x)
    assert why in str(error.value)
    with pytest.raises(ValueError, match=r"cannot be removed|changed nothing"):
        compress(net, [RemoveChannels(0.5, on_conflict="error")], example_input=x)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def test_padded_channels_stay_and_the_others_go() -> None:
    net = Net(lambda net, x: net.b(F.pad(net.a(x), (0, 0, 0, 0, 1, 2))), a=conv(3, 8), b=conv(11, 2))
    x = torch.randn(2, 3, 4, 4)
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    kept = result.plan[0].layers["b.weight"]["keep"]["1"].tolist()
    assert len(kept) == 7
    assert {0, 9, 10} < set(kept)
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5


PAIRS = st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30)


@given(PAIRS, st.lists(st.integers(0, 19), max_size=3))
def test_classes_are_the_connected_parts_of_a_graph(pairs: list[tuple[int, int]], stay: list[int]) -> None:
    labels = Labels()
    ids = labels.new(20)
    for a, b in pairs:
        labels.equal(ids[[a]], ids[[b]])
    labels.freeze(ids[stay], "why")
    edges = np.zeros((20, 20))
    for a, b in pairs:
        edges[a, b] = 1
    _, expected = components(edges, directed=False)
    classes = labels.solve()
    assert all(classes[i] == np.flatnonzero(expected == expected[i])[0] for i in range(20))
    assert labels.frozen(classes) == {int(classes[i]): "why" for i in stay}
