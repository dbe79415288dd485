"""Which layer feeds which, through which operations, and which channel goes where."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.connections import follow


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Any, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.between = between
        self.second = second or nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.between(self.first(x)))


X = torch.randn(2, 2, 6, 6)


def found(net: Any, x: Tensor = X) -> Any:
    return follow(net, x).predecessor(net.second)


def relu_in_place(x: Tensor) -> Tensor:
    x.relu_()
    return x


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("between", "via"),
    [
        (nn.Identity(), ()),
        (nn.Dropout(0.5), ()),
        (nn.ReLU(), ("relu",)),
        (nn.ReLU(inplace=True), ("relu",)),
        (F.relu, ("relu",)),
        (relu_in_place, ("relu",)),
        (nn.LeakyReLU(0.1), ("leaky_relu",)),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), ("relu", "max_pool")),
        (lambda x: F.avg_pool2d(x, 3, padding=1).relu(), ("mean_pool", "relu")),
        (nn.AdaptiveAvgPool2d(1), ("mean_pool",)),
        (nn.AdaptiveAvgPool2d(3), ("mean_pool",)),
        (nn.AdaptiveMaxPool2d(2), ("max_pool",)),
        (lambda x: x.mean((2, 3), keepdim=True), ("mean_pool",)),
        (lambda x: x.amax(-1)[..., None], ("max_pool", "shape")),
        (lambda x: x.mT.contiguous().relu(), ("shape", "relu")),
    ],
)
def test_operations_that_keep_a_factor_are_looked_through(between: Any, via: Any, inference: bool) -> None:
    net = Net(between).train()
    with torch.inference_mode(inference):
        got = found(net)
    assert got.layer is net.first and got.via == via
    assert got.channels.tolist() == [0, 1, 2, 3] and got.consumers == 1
    assert net.training and not net.first._forward_hooks


@pytest.mark.parametrize(
    "between",
    [
        torch.sigmoid,
        nn.ReLU6(),
        nn.PReLU(),
        nn.GELU(),
        lambda x: x + 1,
        lambda x: x + x,
        lambda x: x.add_(1),
        lambda x: torch.cat([x[:, :2], x[:, 2:]], 1),
        lambda x: F.relu(x + 0.5),
        lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1),
        lambda x: x.mean() * torch.ones(2, 4, 6, 6),
        lambda x: x.reshape(2, 4, -1).transpose(1, 2).reshape(2, 4, 6, 6),  # channels run into each other
    ],
)
def test_everything_else_breaks_the_connection(between: Any) -> None:
    assert found(Net(between)) is None


def test_memory_that_changes_through_a_view_breaks_it_too() -> None:
    def aliased(x: Tensor) -> Tensor:
        x.view(-1).add_(1.0)
        return x

    assert found(Net(aliased)) is None
    # The other way round, the view is what the layer gets.
    assert found(Net(lambda x: x.view(2, 4, 36).relu_().view(2, 4, 6, 6))).via == ("shape", "relu", "shape")


def test_channels_of_features() -> None:
    flat = found(Net(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3), nn.Flatten()), nn.Linear(16, 2)))
    assert flat.channels.tolist() == [c for c in range(4) for _ in range(4)]
    assert flat.via == ("relu", "max_pool", "shape")
    shuffled = found(Net(nn.ChannelShuffle(2)))  # an operation of its own
    assert shuffled is None
    by_hand = found(Net(lambda x: x.view(2, 2, 2, 6, 6).transpose(1, 2).reshape(2, 4, 6, 6)))
    assert by_hand.channels.tolist() == [0, 2, 1, 3]
    last = found(Net(lambda x: x.flatten(2).transpose(1, 2), nn.Linear(4, 5)))
    assert last.channels.tolist() == [0, 1, 2, 3]


def test_channels_say_where_values_come_from() -> None:
    """The reference is the model itself: each feature depends on its channel alone."""
    net = Net(nn.Sequential(nn.AvgPool2d(2), nn.ReLU(), nn.Flatten()), nn.Linear(36, 2)).double()
    got = found(net, X.double())
    seen: list[Tensor] = []
    net.second.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        net(X.double())
        factors = torch.tensor([2.0, 3.0, 5.0, 7.0], dtype=torch.float64)
        net.first.weight.mul_(factors.view(-1, 1, 1, 1))
        net.first.bias.mul_(factors)
        net(X.double())
    torch.testing.assert_close(seen[1], seen[0] * factors[got.channels])


def test_linear_and_batchnorm_layers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    seen = follow(net, torch.randn(5, 3))
    norm, last = seen.predecessor(net[1]), seen.predecessor(net[3])
    assert (norm.layer, norm.via) == (net[0], ()) and (last.layer, last.via) == (net[1], ("relu",))
    assert seen.predecessor(net[0]) is None
    assert seen.source[net[1]] is net[0] and net[3] not in seen.source  # exactly its output, as before
    sequence = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert follow(sequence, torch.randn(2, 7, 3)).predecessor(sequence[2]).channels.tolist() == [0, 1, 2, 3]


def test_several_readers_are_counted() -> None:
    class Residual(nn.Module):
        def __init__(self, late: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)
            self.late = late

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = F.relu(y)
            return self.second(z) + (z if self.late else y)

    assert found(Residual(True)).consumers == 2
    assert found(Residual(False)).consumers == 2

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(2, 2, 1) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.first(x).relu_()
            return self.second(y), self.third(y.flatten(2).mT.mT.unflatten(2, (6, 6))), y

    net = Branches()
    seen = follow(net, X)
    assert seen.predecessor(net.second).consumers == 3  # two layers and whoever gets the output
    assert seen.predecessor(net.third).consumers == 3


def test_layers_that_run_twice_have_no_predecessor() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.first(x)))

    assert found(Twice(), torch.randn(2, 3)) is None
