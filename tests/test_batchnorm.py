"""BatchNorm statistics measured again: against a manual pass, layer by layer, over the whole set at once."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.batchnorm import ReestimateBatchNorm, reestimate_batchnorm
from lightning_compress.compress import compress
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.transform import NothingChangedError

X = 3 * torch.randn(50, 2, 6, 6, generator=torch.Generator().manual_seed(0)) + 1


def net() -> Any:
    """Three BatchNorm layers, one of them on another branch, whose statistics fit nothing."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm1d(4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn1(self.conv1(x)))
            x = x + self.drop(self.bn2(self.conv2(x)))
            return self.bn3(x.mean((2, 3)))

    torch.manual_seed(1)
    model = Net()
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
        norm.running_mean.normal_(0, 5)
    return model.eval()


def by_hand(model: Any, x: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and unbiased variance before each layer, the layers before it normalized by the same statistics."""
    found = []

    def normalized(norm: Any, values: np.ndarray) -> Tensor:
        flat = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
        mean, variance = flat.mean(1), flat.var(1, ddof=1)
        found.append((mean, variance))
        shape = (1, -1) + (1,) * (values.ndim - 2)
        scale = norm.weight.detach().double().numpy() / np.sqrt(variance + norm.eps)
        out = (values - mean.reshape(shape)) * scale.reshape(shape)
        return torch.from_numpy(out + norm.bias.detach().double().numpy().reshape(shape))

    model = copy.deepcopy(model).double()
    with torch.no_grad():
        y = torch.relu(normalized(model.bn1, model.conv1(x.double()).numpy()))
        y = y + normalized(model.bn2, model.conv2(y).numpy())
        normalized(model.bn3, y.mean((2, 3)).numpy())
    return found


@pytest.mark.parametrize("sizes", [[50], [16, 16, 18], [1, 40, 9]])
def test_statistics_are_those_of_the_whole_set(sizes: list[int]) -> None:
    model = net()
    expected = by_hand(model, X)
    assert reestimate_batchnorm(model, [(x, None) for x in X.split(sizes)]) == {}
    for norm, (mean, variance) in zip((model.bn1, model.bn2, model.bn3), expected, strict=True):
        np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-4)
    # What comes out has the affine parameters as its statistics.
    with torch.no_grad():
        out = model(X)
    torch.testing.assert_close(out.mean(0), model.bn3.bias.data, rtol=1e-4, atol=1e-4)


def test_a_layer_that_runs_twice_pools_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x), self.norm(2 * x)

    model = Twice()
    reestimate_batchnorm(model, X.split(20))
    both = torch.cat([X, 2 * X]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.norm.running_mean, both.mean(1))
    torch.testing.assert_close(model.norm.running_var, both.var(1))
    single = nn.BatchNorm1d(2)
    assert reestimate_batchnorm(single, X[:1, :, 0, 0]) == {
        "": "one value per channel reaches it, a variance needs two"
    }


def test_it_agrees_with_training_mode_where_one_layer_is_all_there_is() -> None:
    ours, theirs = (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=None)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    theirs.train()(X)
    reestimate_batchnorm(ours, X)
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)
    assert int(ours[1].num_batches_tracked) == 0  # nothing was trained


def test_momentum_mixes_old_and_new() -> None:
    layer = nn.BatchNorm2d(2)
    layer.running_mean.fill_(10.0)
    old = layer.running_var.clone()
    reestimate_batchnorm(layer, X, momentum=0.25)
    torch.testing.assert_close(layer.running_mean, 7.5 + 0.25 * X.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, 0.75 * old + 0.25 * X.transpose(0, 1).flatten(1).var(1))


def test_planning_writes_nothing_and_plans_replay() -> None:
    model = net().train()
    before = copy.deepcopy(model)
    plan = ReestimateBatchNorm(samples=20).plan(model, Calibration(data=X))
    assert list(plan.layers) == ["bn1", "bn2", "bn3"] and plan.data == "data n=20"
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())
    ReestimateBatchNorm().apply(model, plan)
    reestimate_batchnorm(before, X[:20])
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    other = nn.Sequential(nn.BatchNorm2d(7))
    with pytest.raises(ValueError, match=r"statistics of 4 channels for bn1.*None"):
        ReestimateBatchNorm().apply(other, plan)
    with pytest.raises(ValueError, match=r"statistics of 2 channels for 0.*BatchNorm2d"):
        ReestimateBatchNorm().apply(other, Plan({"0": {"running_mean": torch.zeros(2)}}))


def test_layers_that_stay_have_a_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.BatchNorm2d(2, track_running_stats=False)
            self.frozen = nn.BatchNorm2d(2, momentum=0.0)
            self.spare, self.out, self.used = (nn.BatchNorm2d(2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.out(self.frozen(self.none(x))))

    model = Net().eval()
    result = compress(model, ReestimateBatchNorm(exclude="out"), data=X)
    assert set(result.coverage.changed) == {"used.running_mean", "used.running_var"}
    reasons = {name: result.coverage.skipped[name] for name in ("none", "frozen", "spare", "out")}
    assert reasons == {
        "none": "it has no running statistics",
        "frozen": "its statistics are frozen (momentum=0)",
        "spare": "the forward pass does not reach it",
        "out": "left out by include and exclude",
    }
    with pytest.raises(NothingChangedError, match="it has no BatchNorm layer"):
        compress(nn.Conv2d(2, 2, 1), ReestimateBatchNorm(), data=X)


def test_zero_momentum_changes_nothing() -> None:
    model = net()
    result = compress(model, ReestimateBatchNorm(momentum=0.0))
    assert not result.coverage.changed and result.plan[0].identity


def test_after_rounding_the_outputs_come_closer() -> None:
    model = net()
    reestimate_batchnorm(model, X)
    rounded = copy.deepcopy(model)
    for conv in (rounded.conv1, rounded.conv2):
        conv.weight.data = (conv.weight.data / 0.15).round() * 0.15
    tuned = compress(rounded, ReestimateBatchNorm(), data=X).model
    with torch.no_grad():
        target, before, after = (m(X) for m in (model, rounded, tuned))
    assert (after - target).square().mean() < 0.9 * (before - target).square().mean()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"samples": 0}, "samples=0"), ({"momentum": 1.5}, r"momentum=1\.5"), ({"momentum": -0.1}, "momentum")],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReestimateBatchNorm(**options)


def test_inputs_are_needed_and_must_be_finite() -> None:
    with pytest.raises(ValueError, match="data= or example_input="):
        compress(net(), ReestimateBatchNorm())
    with pytest.raises(ValueError, match="pattern 'bnx'"):
        compress(net(), ReestimateBatchNorm(include="bnx"), data=X)
    bad = X.clone()
    bad[3, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="inputs of bn1 are not finite"):
        compress(net(), ReestimateBatchNorm(), data=bad)
