"""Inputs from BatchNorm: the statistics that a model then sees, and when calibration makes such inputs."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.compress import compress
from lightning_compress.functional.sampling import gaussian_random_field
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.stats import Calibration, calibration, match_batchnorm

EXAMPLE = torch.zeros(1, 2, 8, 8)


def net() -> nn.Module:
    """Two convolutions with BatchNorm whose statistics come from smooth inputs of mean (3, -1) and deviation 2."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
    )
    fields = gaussian_random_field((512, 8, 8)).view(256, 2, 8, 8)
    x = 2 * fields / fields.std() + torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    for norm in (model[1], model[5]):
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for _ in range(2):  # the second layer's statistics settle with the first's
            for norm in (model[1], model[5]):
                norm.reset_running_stats()
            model.train()(x)
    return model.eval()


def seen(model: Any, x: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation per channel before each BatchNorm, in running deviations from the running ones."""
    differences = []
    for position in (1, 5):
        with torch.no_grad():
            values = model[:position](x).double().numpy()
        norm = model[position]
        sigma = np.sqrt(norm.running_var.numpy() + norm.eps)
        mean, deviation = values.mean((0, 2, 3)), values.std((0, 2, 3))
        differences.append(((mean - norm.running_mean.numpy()) / sigma, deviation / sigma - 1))
    return differences


def test_batchnorm_sees_its_own_statistics() -> None:
    model = net()
    x = match_batchnorm(model, EXAMPLE, 16, steps=120, batch=16, progress=False)
    assert x.shape == (16, 2, 8, 8) and x.dtype == torch.float32
    noise = torch.randn(16, 2, 8, 8)
    for (mean, deviation), (far_mean, _) in zip(seen(model, x), seen(model, noise), strict=True):
        assert np.abs(mean).max() < 0.05 and np.abs(deviation).max() < 0.05
        assert np.abs(far_mean).max() > 0.3


def test_first_inputs_do_not_depend_on_how_many() -> None:
    options: dict[str, Any] = {"steps": 3, "batch": 4, "progress": False}
    few, many, other = (
        match_batchnorm(net(), EXAMPLE, n, seed=s, **options) for n, s in ((3, 1), (9, 1), (3, 2))
    )
    assert torch.equal(few, many[:3]) and not torch.equal(few, other)
    assert len({tuple(x.flatten().tolist()) for x in many}) == 9


def test_start_is_smooth_and_as_large_as_the_example() -> None:
    x = match_batchnorm(net(), EXAMPLE, 64, steps=1, lr=1e-9, progress=False)
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01
    steps = (x[..., 1:] - x[..., :-1]).square().mean()
    assert float(steps) < 1.2  # 2 in white noise
    example = torch.randn(5, 2, 8, 8) * torch.tensor([0.1, 30.0]).view(1, 2, 1, 1) + 7
    x = match_batchnorm(net(), example, 64, steps=1, lr=1e-9, progress=False)
    for channel in range(2):
        torch.testing.assert_close(x[:, channel].mean(), example[:, channel].mean(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(x[:, channel].std(), example[:, channel].std(), rtol=0.02, atol=0)
    flat = nn.BatchNorm1d(3).double()
    x = match_batchnorm(flat, torch.zeros(1, 3, dtype=torch.float64), 5, progress=False)
    assert x.shape == (5, 3) and x.dtype == torch.float64


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = net()
    if fails:
        model.append(nn.Linear(4, 4))  # three features come in
    model.train()
    model[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    with torch.inference_mode():  # as inside Lightning's validation
        if fails:
            with pytest.raises(RuntimeError):
                match_batchnorm(model, EXAMPLE, 4, steps=2, batch=4)
        else:
            assert not match_batchnorm(model, EXAMPLE, 4, steps=2, batch=4).requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    for new, old in zip(model.modules(), before.modules(), strict=True):
        assert new.training == old.training and not new._forward_pre_hooks
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        assert new.grad is None and new.requires_grad == old.requires_grad
    for new, old in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(new, old)


class Unused(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "example", "options", "words"),
    [
        (nn.Conv2d(2, 2, 1), EXAMPLE, {}, r"found 0"),
        (nn.BatchNorm2d(2, track_running_stats=False), EXAMPLE, {}, r"found 0"),
        (nn.BatchNorm2d(2), (EXAMPLE,), {}, "given: tuple"),
        (nn.BatchNorm2d(2), EXAMPLE.long(), {}, r"one real tensor"),
        (nn.BatchNorm2d(2), EXAMPLE, {"steps": 0}, "steps=0"),
        (nn.BatchNorm2d(2), EXAMPLE, {"lr": 0.0}, r"lr=0\.0"),
        (Unused(nn.BatchNorm2d(2)), EXAMPLE, {}, "no BatchNorm .* runs"),
        (nn.Sequential(nn.BatchNorm2d(2, eps=0.0), nn.ReLU()), EXAMPLE, {}, "not finite"),
    ],
)
def test_bad_input(model: nn.Module, example: Any, options: dict[str, Any], words: str) -> None:
    if "finite" in words:
        model[0].running_var.zero_()  # type: ignore[index]
    with pytest.raises(ValueError, match=words):
        match_batchnorm(model, example, 2, **options)


# As the default of Calibration --------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every synthesis is cut to two steps and noted."""
    made: list[Any] = []

    def quick(model: nn.Module, example: Any, n: int, **options: Any) -> Tensor:
        made.append((model, n, options))
        return match_batchnorm(model, example, n, steps=2, batch=8, progress=False, **options)

    monkeypatch.setattr(calibration, "match_batchnorm", quick)
    return made


def test_models_with_batchnorm_get_such_inputs(calls: list[Any]) -> None:
    model = net()
    source = Calibration(EXAMPLE, samples=40, seed=3)
    assert source.describe(model) == "synthetic:batchnorm n=40 seed=3" and not calls
    batches = list(source.batches(model))
    assert [len(b) for b in batches] == [32, 8]
    expected = match_batchnorm(model, EXAMPLE, 40, steps=2, batch=8, seed=3, progress=False)
    assert torch.equal(torch.cat(batches), expected)
    named = Calibration(EXAMPLE, data="batchnorm", samples=40, seed=3)
    assert torch.equal(torch.cat(list(named.batches(model))), expected)


@pytest.mark.parametrize(
    ("model", "example", "name"),
    [
        (nn.Conv2d(2, 2, 1), EXAMPLE, "normal"),
        (nn.BatchNorm2d(2, track_running_stats=False), EXAMPLE, "normal"),
        (nn.BatchNorm2d(2), (EXAMPLE, EXAMPLE), "normal"),
        (nn.BatchNorm2d(2), EXAMPLE.long(), "normal"),
        (nn.BatchNorm2d(2), EXAMPLE, "batchnorm"),
        (nn.Sequential(nn.BatchNorm2d(2), nn.Linear(8, 8, dtype=torch.complex64)), EXAMPLE, "grf"),
    ],
)
def test_which_sampler_is_the_default(model: nn.Module, example: Any, name: str) -> None:
    assert Calibration(example).describe(model) == f"synthetic:{name} n=256 seed=0"


def test_inputs_are_made_once(calls: list[Any]) -> None:
    model, twin = net(), net()
    source = Calibration(EXAMPLE, samples=12)
    first = torch.cat(list(source.batches(model)))
    assert torch.equal(torch.cat(list(source.batches(model))), first)
    fewer = dataclasses.replace(source, samples=5)
    assert torch.equal(torch.cat(list(fewer.batches(model))), first[:5])
    assert len(calls) == 1
    list(dataclasses.replace(source, samples=13).batches(model))
    list(dataclasses.replace(source, seed=1).batches(model))
    list(source.batches(twin))  # another model
    assert [(m is twin, n) for m, n, _ in calls] == [(False, 12), (False, 13), (False, 12), (True, 12)]
    assert source == Calibration(EXAMPLE, samples=12) and "_made" not in repr(source)


def test_the_origin_is_asked_when_batchnorm_is_gone(calls: list[Any]) -> None:
    model = net()
    fused = compress(model, FuseBatchNorm()).model
    assert Calibration(EXAMPLE).describe(fused) == "synthetic:normal n=256 seed=0"
    source = Calibration(EXAMPLE, samples=8, origin=model)
    assert source.describe(fused) == "synthetic:batchnorm n=8 seed=0"
    assert len(torch.cat(list(source.batches(fused)))) == 8
    assert calls[0][0] is model and "origin" not in repr(source)


def test_compress_gives_the_model_as_it_came(calls: list[Any]) -> None:
    def by_input(target: Any, stats: Any) -> Tensor:
        return target.weight.detach().abs() * stats.input_norm

    by_input.needs = ("input_norm",)  # type: ignore[attr-defined]
    model = net()
    result = compress(
        model, [FuseBatchNorm(), Prune(0.5, criterion=by_input, samples=8)], example_input=EXAMPLE
    )
    assert result.steps[1].plan.data == "synthetic:batchnorm n=8 seed=0"
    assert [m is model for m, *_ in calls] == [True]
