"""Cross-layer equalization: equal outputs, equal ranges, and which layers are left alone."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.compress import compress
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.models import LeNet5, resnet20
from lightning_compress.quantization.equalize import equalize, equalizing_factors


def spread(model: nn.Module) -> Any:
    """Ranges of channels that differ by a hundred times, as after folding BatchNorm."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            size = layer.weight.shape[axis]
            factors = torch.logspace(-1, 1, size).view(
                [-1 if a == axis else 1 for a in range(layer.weight.dim())]
            )
            layer.weight.data *= factors
    return model.eval()


def check(model: Any, x: Tensor) -> tuple[Any, list[tuple[str, str]], dict[str, str]]:
    """The equalized copy: the same outputs to 1e-5 of the largest."""
    after = copy.deepcopy(model)
    pairs, skipped = equalize(after, x)
    with torch.no_grad():
        a, b = model(x), after(x)
    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())
    return after, pairs, skipped


class ConvNet(nn.Module):
    """Depthwise, grouped and transposed convolutions; functional, in-place and module activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.up2 = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(4 * 9, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True)
        x = F.leaky_relu(self.depthwise(x), 0.2)
        x = self.up(torch.relu(self.grouped(x)))
        x = self.pool(F.relu(self.up2(x)))
        x = F.adaptive_avg_pool2d(x, 3).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


def test_every_kind_of_layer() -> None:
    x = torch.randn(3, 2, 8, 8)
    model = spread(ConvNet())
    after, pairs, skipped = check(model, x)
    names = ["a", "depthwise", "grouped", "up", "up2", "fc1", "fc2"]
    assert pairs == list(pairwise(names)) and set(skipped) == {"a"}
    # Ranges of the last pair, where every channel is one row and one column.
    rows, columns = after.fc1.weight.detach().abs().amax(1), after.fc2.weight.detach().abs().amax(0)
    torch.testing.assert_close(rows, columns, rtol=0.01, atol=0)
    before = model.fc1.weight.detach().abs().amax(1)
    assert float(before.max() / before.min()) > 5 * float(rows.max() / rows.min())
    # Input channels of a transposed and a grouped convolution.
    torch.testing.assert_close(
        after.grouped.weight.abs().flatten(1).amax(1),
        after.up.weight.abs().flatten(1).amax(1),
        rtol=0.01,
        atol=0,
    )
    columns = after.grouped.weight.view(2, 3, 4, 9).abs().amax((1, 3)).flatten()
    torch.testing.assert_close(after.depthwise.weight.abs().flatten(1).amax(1), columns, rtol=0.01, atol=0)


def test_lenet5() -> None:
    _, pairs, skipped = check(spread(LeNet5()), torch.randn(2, 1, 28, 28))
    assert pairs == [("conv1", "conv2"), ("conv2", "fc1"), ("fc1", "fc2"), ("fc2", "fc3")]
    assert set(skipped) == {"conv1"}


def test_residual_network_after_folding() -> None:
    """Only the two convolutions inside a block are a pair: a sum is read twice and made of two."""
    x = torch.randn(2, 3, 32, 32)
    model = resnet20().eval()
    _, pairs, skipped = check(model, x)
    assert pairs == [] and "BatchNorm lies before it: fold it first" in skipped.values()
    fused = compress(model, FuseBatchNorm(), example_input=x).model
    _, pairs, _ = check(fused, x)
    assert pairs == [(f"layer{i}.{j}.conv1", f"layer{i}.{j}.conv2") for i in (1, 2, 3) for j in range(3)]


@given(
    ranges=st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_factors_make_ranges_equal(ranges: list[tuple[float, float]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(len(ranges), 3, generator=generator, dtype=torch.float64) * torch.tensor([r]).T
        for r in zip(*ranges, strict=True)
    )
    s = equalizing_factors(first, second)
    rows, columns = (first / s[:, None]).abs().amax(1), (second * s[:, None]).abs().amax(1)
    torch.testing.assert_close(rows, columns)
    torch.testing.assert_close(rows * columns, first.abs().amax(1) * second.abs().amax(1))


def test_channels_that_are_zero_on_one_side_stay() -> None:
    first, second = torch.tensor([[0.0], [2.0], [8.0]]), torch.tensor([[1.0], [0.0], [2.0], [1.0]])
    assert equalizing_factors(first, second[:3]).tolist() == [1.0, 1.0, 2.0]
    # A channel that feeds two columns, and one that feeds none.
    assert equalizing_factors(first, second, torch.tensor([1, 1, 1, 0])).tolist() == [1.0, 1.0, 1.0]
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].weight.data[1] = 0
    model[2].weight.data[:, 2] = 0
    after, _, _ = check(model, torch.randn(4, 2))
    assert torch.equal(after[0].weight[1:], model[0].weight[1:])  # zeros stay zeros, and masks fit


class Pair(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(4, 4), between, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Read(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first(x))
        return self.second(y) + y


class Penalized(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.first.weight.abs().sum()


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=1.0)


def tied() -> nn.Module:
    model = Pair(nn.ReLU())
    model.second.weight = model.first.weight
    return model


def own() -> nn.Module:
    model = Pair(nn.ReLU())
    model.first = Own(4, 4)
    return model


def parametrized() -> nn.Module:
    model = Pair(nn.ReLU())
    nn.utils.parametrizations.weight_norm(model.second)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Pair(nn.ReLU6()), "does not commute"),
        (Pair(nn.Sigmoid()), "does not commute"),
        (Pair(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())), "fold it first"),
        (Read(nn.ReLU()), "also used elsewhere"),
        (Penalized(nn.ReLU()), "weight or bias is also used elsewhere"),
        (tied(), "weight or bias is also used elsewhere"),
        (own(), "Own is a layer of its own kind"),
        (parametrized(), "layer of its own kind"),
    ],
)
def test_what_is_left_alone_and_why(model: Any, reason: str) -> None:
    after, pairs, skipped = check(model.eval(), torch.randn(3, 4))
    assert pairs == [] and reason in skipped["second"]
    for new, old in zip(after.parameters(), model.parameters(), strict=True):
        assert torch.equal(new, old)


def test_bad_input() -> None:
    model = Pair(nn.ReLU())
    with pytest.raises(ValueError, match="example_input="):
        equalize(model, None)
    model.second.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of second is not finite"):
        equalize(model, torch.randn(2, 4))
