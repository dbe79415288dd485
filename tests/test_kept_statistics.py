"""Statistics that are kept: nothing runs twice, nobody changes them, and other weights or data are measured anew."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.archive import size_of
from lightning_compress.stats import Calibration, Stats, collect
from lightning_compress.stats.keeping import Kept


class Counted(nn.Module):
    """A network that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.passes = nn.Linear(8, 16), nn.Linear(16, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.second(self.first(x).relu())


def tensors(stats: dict[str, Stats]) -> dict[tuple[str, str], Tensor]:
    return {
        (key, f.name): getattr(s, f.name).clone()
        for key, s in stats.items()
        for f in dataclasses.fields(s)
        if isinstance(getattr(s, f.name), Tensor)
    }


def test_what_was_measured_is_not_measured_again() -> None:
    torch.manual_seed(0)
    net, data = Counted(), torch.randn(40, 8)
    inputs = Calibration(data=data, kept=Kept())
    first = collect(net, lc.find(net), inputs, ["gram", "input_mean"])
    seen = net.passes
    again = collect(net, lc.find(net), dataclasses.replace(inputs), ["input_mean", "gram"])
    assert net.passes == seen > 0
    assert all(torch.equal(tensors(first)[k], v) for k, v in tensors(again).items())


@pytest.mark.parametrize("change", ["weight", "data", "samples", "fields", "layers", "norm"])
def test_what_differs_is_measured_anew(change: str) -> None:
    torch.manual_seed(0)
    net, data = Counted(), torch.randn(40, 8)
    inputs = Calibration(data=data, kept=Kept())
    collect(net, lc.find(net), inputs, ["input_norm"])
    seen, fields, targets = net.passes, ["input_norm"], lc.find(net)
    if change == "weight":
        with torch.no_grad():
            net.first.weight[0, 0] += 1
    elif change == "data":
        inputs = dataclasses.replace(inputs, data=data.clone())
    elif change == "samples":
        inputs = dataclasses.replace(inputs, samples=20)
    elif change == "fields":
        fields = ["input_mean"]
    elif change == "layers":
        targets = targets[:1]
    else:
        net.first = nn.Sequential(nn.BatchNorm1d(8), net.first).eval()  # type: ignore[assignment]
        targets = lc.find(net)
    collect(net, targets, inputs, fields)
    assert net.passes > seen


@pytest.mark.parametrize(
    "method",
    [
        lc.RateDistortionQuantize(bits=3.0),
        lc.Quantize(bits=4, rounding="compensated", bias_correction=True),
        lc.Prune(0.5, criterion="wanda"),
        lc.Factorize(0.5, activation_aware=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_methods_leave_what_is_kept_as_it_is(method: lc.Transform) -> None:
    torch.manual_seed(0)
    net, kept = Counted().eval(), Kept()
    inputs = Calibration(data=torch.randn(64, 8), kept=kept)
    plain = method.plan(net, dataclasses.replace(inputs, kept=None))
    method.plan(net, inputs)
    before = {key: tensors(found) for key, (_, found) in kept._found.items()}
    assert before
    second = method.plan(net, inputs)
    for key, (_, found) in kept._found.items():
        assert all(torch.equal(before[key][k], v) for k, v in tensors(found).items())
    models = []
    for plan in (plain, second):
        models.append(Counted().eval())
        models[-1].load_state_dict(net.state_dict())
        method.apply(models[-1], plan)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_the_oldest_goes_when_there_is_no_room() -> None:
    kept = Kept(room=100)
    for name in "abc":
        kept.put(name, {"w": Stats(gradient=torch.zeros(10))})
    assert kept.get("a") is None and kept.get("b") is not None and kept.get("c") is not None
    kept.put("d", {"w": Stats(gradient=torch.zeros(100))})  # alone too large
    assert kept.get("d") is None and kept.get("c") is not None


def test_a_target_is_reached_with_one_pass_of_statistics() -> None:
    torch.manual_seed(0)
    net, data = Counted().eval(), torch.randn(64, 8)
    result = lc.compress_to(net, [lc.RateDistortionQuantize(gradients=8)], target_ratio=0.35, data=data)
    assert len(result.evaluations) > 2
    assert size_of(result.model) == result.reached["file_bytes"]
    one = Counted().eval()
    one.load_state_dict(net.state_dict())
    method = next(t for t in result.transforms if isinstance(t, lc.RateDistortionQuantize))
    again = lc.compress(one, [method], data=data).model
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), result.model.state_dict().values(), strict=True)
    )
