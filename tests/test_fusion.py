"""BatchNorm folding: the arithmetic, which pairs are found, what is left alone and why, and the callback."""

import copy
import itertools
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import codes
from lightning_compress.callbacks.copies import FirstInput
from lightning_compress.callbacks.fusion import BatchNormFusion
from lightning_compress.callbacks.pruning import ScheduledPruning
from lightning_compress.compress import compress
from lightning_compress.fusion import FuseBatchNorm, fold_batchnorm, fold_on_load
from lightning_compress.models import resnet20
from lightning_compress.plans import Plan
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.stats import Calibration
from lightning_compress.transform import NothingChangedError, Step, applied, replay

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def trained(model: nn.Module) -> nn.Module:
    """Eval mode, with statistics and parameters as after a training: no mean is 0, no variance 1, signs mixed."""
    for norm in model.modules():
        if isinstance(norm, NORMS) and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.3, 3)
            if norm.affine:
                norm.weight.data.uniform_(0.5, 2).mul_(torch.randint(0, 2, norm.weight.shape) * 2 - 1)
                norm.bias.data.normal_()
    return model.eval()


def norms_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def gap(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def outputs(model: nn.Module, x: Any) -> Any:
    with torch.no_grad():
        return model(x)


def fuse(model: nn.Module, x: Any = None, **options: Any) -> nn.Module:
    return compress(model, FuseBatchNorm(**options), example_input=x).model


def skipped(model: nn.Module, x: Any = None, **options: Any) -> dict[str, str]:
    return FuseBatchNorm(**options).plan(model, Calibration(example_input=x)).skipped


# -- arithmetic --------------------------------------------------------------------------------------------------

CONV_SHAPES = {1: (7,), 2: (6, 7), 3: (4, 5, 6)}


def layers() -> list[Any]:
    made: list[Any] = [
        pytest.param(lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4), id="linear"),
        pytest.param(lambda: nn.Linear(4, 6, bias=False), nn.BatchNorm1d, (5, 4), id="linear-no-bias"),
    ]
    for dim, groups, bias in itertools.product((1, 2, 3), (1, 2), (True, False)):
        for kind in ("Conv", "ConvTranspose"):
            cls = getattr(nn, f"{kind}{dim}d")
            options = {"stride": 2, "padding": 1, "groups": groups, "bias": bias}
            made.append(
                pytest.param(
                    lambda cls=cls, options=options: cls(4, 6, 3, **options),
                    getattr(nn, f"BatchNorm{dim}d"),
                    (2, 4, *CONV_SHAPES[dim]),
                    id=f"{kind}{dim}d-groups{groups}-bias{bias}",
                )
            )
    made.append(
        pytest.param(lambda: nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d, (2, 4, 6, 6), id="depthwise")
    )
    return made


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("build", "norm", "shape"), layers())
def test_folding_keeps_the_outputs(build: Any, norm: Any, shape: tuple[int, ...], affine: bool) -> None:
    """The reference is the unfused model itself; in double precision hardly anything is lost."""
    layer = build()
    channels = getattr(layer, "out_channels", None) or layer.out_features
    model = trained(nn.Sequential(layer, norm(channels, affine=affine, eps=1e-3), nn.Tanh())).double()
    x = torch.randn(shape, dtype=torch.float64)
    for example in (x, None):
        fused = fuse(model, example)
        assert norms_of(fused) == []
        assert type(fused[1]) is nn.Identity
        assert gap(outputs(model, x), outputs(fused, x)) < 1e-13


@pytest.mark.parametrize(
    ("norm", "layer", "shape"),
    [
        (nn.BatchNorm1d(4), nn.Linear(4, 6), (5, 4)),
        (nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, stride=2), (2, 4, 9, 9)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4, padding="valid"), (2, 4, 9, 9)),
        (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, padding="same"), (2, 4, 9, 9)),
        (nn.BatchNorm3d(4), nn.Conv3d(4, 6, 2), (2, 4, 4, 4, 4)),
    ],
)
def test_folding_into_the_layer_after(norm: nn.Module, layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = trained(nn.Sequential(nn.Tanh(), norm, layer)).double()
    x = torch.randn(shape, dtype=torch.float64)
    for example in (x, None):
        fused = fuse(model, example)
        assert norms_of(fused) == []
        assert gap(outputs(model, x), outputs(fused, x)) < 1e-13


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["after", "before"]),
    st.integers(0, 99),
)
def test_fold_batchnorm_equals_the_definition(
    groups: int, outs: int, ins: int, transposed: bool, place: str, seed: int
) -> None:
    """Entry by entry, as the docstring says it."""
    transposed &= place == "after"
    generator = torch.Generator().manual_seed(seed)
    a, b = (ins, outs) if transposed else (outs, ins)
    weight = torch.randn(groups * a, b, 2, generator=generator, dtype=torch.float64)
    bias, scale, shift = (
        torch.randn(groups * n, generator=generator, dtype=torch.float64)
        for n in (outs, *([outs, outs] if place == "after" else [ins, ins]))
    )
    new_weight, new_bias = fold_batchnorm(
        weight, bias, scale, shift, place=place, groups=groups, transposed=transposed
    )
    want_weight, want_bias = weight.clone(), bias.clone()
    if place == "after":
        want_bias = scale * bias + shift
    for g, o, i, k in itertools.product(range(groups), range(outs), range(ins), range(2)):
        at = (g * ins + i, o, k) if transposed else (g * outs + o, i, k)
        want_weight[at] *= scale[g * outs + o if place == "after" else g * ins + i]
        if place == "before":
            want_bias[g * outs + o] += weight[at] * shift[g * ins + i]
    torch.testing.assert_close(new_weight, want_weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_bias, want_bias, rtol=1e-12, atol=1e-12)


def test_a_map_before_a_transposed_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="place='before' a transposed convolution"):
        fold_batchnorm(
            torch.ones(2, 3, 1), None, torch.ones(2), torch.ones(2), place="before", transposed=True
        )
    with pytest.raises(ValueError, match="place='inside'"):
        fold_batchnorm(torch.ones(2, 3), None, torch.ones(2), torch.ones(2), place="inside")


def test_zeros_become_plus_zero_and_underflow_too() -> None:
    weight = torch.tensor([[0.0, -1e-30], [2.0, 3.0]])
    folded, _ = fold_batchnorm(weight, None, torch.tensor([-1e-30, 1.0]), torch.zeros(2))
    assert folded.tolist() == [[0.0, 0.0], [2.0, 3.0]]
    assert not folded.signbit().any()


def test_short_types_are_rounded_once() -> None:
    weight, scale = torch.randn(3, 4, dtype=torch.bfloat16), torch.rand(3) + 0.5
    folded, bias = fold_batchnorm(weight, None, scale, scale)
    assert folded.dtype == bias.dtype == torch.bfloat16
    assert torch.equal(folded, (weight.double() * scale.double()[:, None]).bfloat16())


# -- real networks -----------------------------------------------------------------------------------------------


def networks() -> list[Any]:
    def vision(name: str) -> Any:
        def build() -> nn.Module:
            models = pytest.importorskip("torchvision.models")
            model: nn.Module = getattr(models, name)()
            return model

        return build

    return [
        pytest.param(vision("resnet18"), (2, 3, 32, 32), id="resnet18"),
        pytest.param(vision("mobilenet_v2"), (2, 3, 32, 32), id="mobilenet_v2"),
        pytest.param(resnet20, (2, 3, 32, 32), id="resnet20"),
        pytest.param(lambda: resnet20(shortcut="projection"), (2, 3, 32, 32), id="resnet20-projection"),
    ]


@pytest.mark.parametrize("traced", [False, True], ids=["run", "traced"])
@pytest.mark.parametrize(("build", "shape"), networks())
def test_networks_lose_every_batchnorm(build: Any, shape: tuple[int, ...], traced: bool) -> None:
    """No BatchNorm left, outputs equal to 1e-5; the stored step rebuilds the structure of a fresh model."""
    model, x = trained(build()), torch.randn(shape)
    result = compress(model, FuseBatchNorm(), example_input=None if traced else x)
    assert norms_of(result.model) == []
    assert result.steps[0].plan.skipped == {}
    assert gap(outputs(model, x), outputs(result.model, x)) <= 1e-5
    stored = json.loads(json.dumps([(prefix, step.to_json()) for prefix, step in applied(result.model)]))
    fresh = build().eval()
    replay(fresh, [(prefix, Step.from_json(step)) for prefix, step in stored])
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(outputs(fresh, x), outputs(result.model, x))


def test_running_and_tracing_find_the_same_pairs() -> None:
    model = trained(resnet20())
    x = torch.randn(1, 3, 32, 32)
    run, traced = (FuseBatchNorm().plan(model, Calibration(example_input=e)).layers for e in (x, None))
    assert run == traced
    assert run["layer1.0.bn1"] == {"layer": "layer1.0.conv1", "place": "after", "eps": 1e-5}


def test_weights_stay_the_same_parameter_objects() -> None:
    model = trained(resnet20())
    before = {name: p for name, p in model.named_parameters() if "bn" not in name}
    model.conv1.weight.requires_grad_(False)
    compress(model, FuseBatchNorm(), inplace=True)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert set(after) - set(before) == {
        f"{name.removesuffix('.weight')}.bias" for name in before if "conv" in name
    }
    assert (model.conv1.bias.requires_grad, model.layer1[0].conv1.bias.requires_grad) == (False, True)


def test_mode_flags_are_kept() -> None:
    model = trained(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())).train()
    model[0].eval()
    assert [m.training for m in fuse(model)] == [False, True, True]


def test_sync_batchnorm_has_the_same_formula() -> None:
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(2, 2, 5, 5)
    for example in (x, None):
        fused = fuse(synced, example)
        assert norms_of(fused) == []
        assert torch.equal(outputs(fused, x), outputs(fuse(model), x))


def test_identities_and_a_second_batchnorm_between_are_seen_through() -> None:
    model = trained(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity(), nn.BatchNorm2d(2), nn.BatchNorm2d(2)))
    x = torch.randn(2, 1, 6, 6)
    for example in (x, None):
        fused = fuse(model, example)
        assert norms_of(fused) == []
        assert gap(outputs(model, x), outputs(fused, x)) <= 1e-5


def test_keyword_and_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
            return self.bn(input=self.a(input=x)) + scale * self.b(y)

    model, x, y = trained(Two()), torch.randn(2, 1, 6, 6), torch.randn(2, 1, 6, 6)
    for example in ((x, y), {"y": y, "x": x}, None):
        fused = fuse(model, example)
        assert norms_of(fused) == []
        assert gap(model(x, y), fused(x, y)) <= 1e-5


def test_half_precision_passes_the_check() -> None:
    model = trained(resnet20()).bfloat16()
    x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    fused = fuse(model, x)
    assert norms_of(fused) == []
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}


# -- what is left alone ------------------------------------------------------------------------------------------


class Wired(nn.Module):
    """conv -> bn with something else going on in between."""

    def __init__(self, wiring: str) -> None:
        super().__init__()
        self.conv, self.bn, self.wiring = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), wiring

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        match self.wiring:
            case "residual":
                return self.bn(y) + y
            case "returned":
                return self.bn(y), {"features": [y]}
            case "changed in place":
                return self.bn(F.relu_(y))
            case "weight used":
                return self.bn(y) + self.conv.weight.sum()
            case "statistics used":
                return self.bn(y) + self.bn.running_mean.sum()
            case "conv twice":
                return self.bn(self.conv(y))
            case "bn twice":
                return self.bn(self.bn(y))
            case "a view":
                return self.bn(y[:1])
        raise AssertionError(self.wiring)


@pytest.mark.parametrize("traced", [False, True], ids=["run", "traced"])
@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        ("residual", "also used, or changed in place, elsewhere"),
        ("returned", "also used, or changed in place, elsewhere"),
        ("changed in place", ""),
        ("weight used", "tensors are also used outside of its call"),
        ("statistics used", "tensors are also used outside of its call"),
        ("conv twice", "runs 2 times"),
        ("bn twice", "runs 2 times"),
        ("a view", "not exactly the output"),
    ],
)
def test_what_is_used_elsewhere_is_left_alone(wiring: str, reason: str, traced: bool) -> None:
    model = trained(Wired(wiring))
    x = None if traced else torch.randn(2, 2, 5, 5)
    assert reason in skipped(model, x)["bn"]
    with pytest.raises(NothingChangedError, match="bn: "):
        fuse(model, x)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3))
    model[3].weight = model[0].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def infinite() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    model[1].running_mean[0] = torch.inf
    return model


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("traced", [False, True], ids=["run", "traced"])
@pytest.mark.parametrize(
    ("build", "shape", "reason"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=False)),
            (2, 2, 5, 5),
            "no running",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)),
            (2, 2, 5, 5),
            "not exactly the output",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)),
            (2, 2, 5, 5),
            "pads with zeros",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding="same")),
            (2, 2, 5, 5),
            "pads with zeros",
        ),
        (lambda: nn.Sequential(nn.BatchNorm2d(2), nn.ConvTranspose2d(2, 2, 3)), (2, 2, 5, 5), "unevenly"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5)), (2, 5, 4), "another axis"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm2d(3)), (2, 3, 5, 4), "another axis"),
        (tied, (2, 2, 7, 7), "shared with another layer"),
        (hooked, (2, 2, 5, 5), "forward hooks"),
        (infinite, (2, 2, 5, 5), "not finite"),
        (
            lambda: nn.Sequential(Standardized(2, 2, 3), nn.BatchNorm2d(2)),
            (2, 2, 5, 5),
            "a forward of its own",
        ),
        (
            lambda: nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.BatchNorm2d(2)
            ),
            (2, 2, 5, 5),
            "parametrization",
        ),
    ],
)
def test_reasons(build: Any, shape: tuple[int, ...], reason: str, traced: bool) -> None:
    model = build().eval()
    (given,) = skipped(model, None if traced else torch.randn(shape)).values()
    assert reason in given


def test_linear_in_front_of_a_sequence_is_told_apart_only_by_running() -> None:
    """Linear(., 5) on [2, 5, 4]: BatchNorm1d(5) normalizes the positions, though the numbers agree."""
    model = trained(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    assert "another axis" in skipped(model, torch.randn(2, 5, 4))["1"]
    assert skipped(model, torch.randn(2, 4)) == {}


def test_nothing_to_fold_says_so() -> None:
    with pytest.raises(NothingChangedError, match="Linear: it has no BatchNorm layer"):
        fuse(nn.Linear(2, 2))


def test_unreached_batchnorm() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
            self.unused = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    for x in (torch.randn(2, 1, 5, 5), None):
        fused = fuse(trained(Part()), x)
        assert norms_of(fused) == ["unused.1"]
        assert "not reached" in next(applied(fused))[1].plan.skipped["unused.1"]


def test_include_and_exclude_name_the_layer_or_the_batchnorm() -> None:
    model = trained(resnet20())
    assert len(norms_of(fuse(model, include="layer1.*"))) == 19 - 6
    assert norms_of(fuse(model, exclude=["bn1", "layer2.0.conv2"])) == ["bn1", "layer2.0.bn2"]
    assert "excluded by 'bn1'" in skipped(model, exclude="bn1")["bn1"]
    assert "no include pattern" in skipped(model, include="bn1")["layer1.0.bn1"]
    with pytest.raises(ValueError, match="'layr1'"):
        fuse(model, include="layr1")


# -- models that cannot be traced --------------------------------------------------------------------------------


class Branching(nn.Module):
    """Python decides by value: symbolic tracing fails here, not in the parts."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(x) * 2


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_parts_are_traced_where_the_whole_cannot_be() -> None:
    model = trained(Branching(resnet20()))
    x = torch.randn(2, 3, 32, 32)
    fused = fuse(model)
    assert norms_of(fused) == []
    assert gap(outputs(model, x), outputs(fused, x)) <= 1e-5


def test_neighbours_in_a_sequential_where_tracing_fails() -> None:
    model = trained(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), Opaque(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
    )
    x = torch.randn(2, 1, 9, 9)
    fused = fuse(model)
    assert norms_of(fused) == []
    assert gap(outputs(model, x), outputs(fused, x)) <= 1e-5


def test_optional_arguments_are_traced_at_their_defaults() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.conv(x)
            return self.bn(y if mask is None else y * mask)

    assert norms_of(fuse(trained(Masked()))) == []


# -- the check ---------------------------------------------------------------------------------------------------


class Peeking(nn.Module):
    """Behaves differently, or fails, when one BatchNorm is gone: no following of tensors can see that."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.second = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        if self.fails:
            return x / self.second[1].num_features
        return x if isinstance(self.second[1], nn.BatchNorm2d) else 3 * x


@pytest.mark.parametrize("fails", [True, False])
def test_pairs_that_change_the_outputs_are_undone(fails: bool) -> None:
    model, x = trained(Peeking(fails)), torch.randn(2, 1, 9, 9)
    result = compress(model, FuseBatchNorm(), example_input=x)
    assert norms_of(result.model) == ["second.1"]
    assert gap(outputs(model, x), outputs(result.model, x)) <= 1e-5
    assert "undone" in result.steps[0].plan.skipped["second.1"]
    assert norms_of(model) == ["first.1", "second.1"]


def test_the_check_can_be_left_out() -> None:
    plan = FuseBatchNorm(check=False).plan(
        trained(Peeking(True)), Calibration(example_input=torch.randn(2, 1, 9, 9))
    )
    assert set(plan.layers) == {"first.1", "second.1"}


def test_outputs_drawn_at_random_do_not_fail_the_check() -> None:
    class Sampler(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + torch.randn_like(y)

    fused = fuse(trained(Sampler(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))), torch.randn(2, 1, 5, 5))
    assert norms_of(fused) == []


# -- contracts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [False, True], ids=["run", "traced"])
def test_plan_leaves_the_model_and_the_random_state_alone(traced: bool) -> None:
    class Noting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x) + torch.rand(())
            return self.last

    model = trained(Noting(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())).train()
    model[2].eval()
    before, names = copy.deepcopy(model.state_dict()), set(vars(model))
    state = torch.get_rng_state()
    plan = FuseBatchNorm().plan(model, Calibration(example_input=None if traced else torch.randn(2, 1, 5, 5)))
    if traced:
        assert torch.equal(torch.get_rng_state(), state)
    assert set(plan.layers) == {"1"}
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(vars(model)) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_apply_refuses_another_architecture_and_writes_nothing() -> None:
    plan = FuseBatchNorm().plan(trained(resnet20()))
    other = trained(resnet20(width=8))
    other.layer3[2].bn2 = nn.Identity()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"layer3\.2\.bn2"):
        FuseBatchNorm().apply(other, plan)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match="architecture"):
        FuseBatchNorm().apply(
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(2)),
            Plan({"1": {"layer": "0", "place": "after", "eps": 0.1}}),
        )


def test_pruned_weights_keep_their_zeros_and_masks() -> None:
    model, x = trained(resnet20()), torch.randn(2, 3, 32, 32)
    result = compress(model, [Prune(0.7), FuseBatchNorm()], example_input=x)
    pruned = compress(model, Prune(0.7)).model
    assert norms_of(result.model) == []
    assert result.after.sparsity > 0.68
    attached = {
        key: (code, module.get_parameter(param)) for key, module, param, code in codes.of(result.model)
    }
    assert set(attached) == {key for key, *_ in codes.of(pruned)}
    for key, (code, weight) in attached.items():
        assert isinstance(code, codes.Mask)
        assert code.matches(weight)
        assert torch.equal(weight == 0, pruned.get_parameter(key) == 0)
        assert not (weight.signbit() & (weight == 0)).any()


def test_mask_of_a_bias_goes_with_its_zeros() -> None:
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    fused = compress(
        model, [Prune(0.5, include=["0.weight", "0.bias"], scope="layer"), FuseBatchNorm()]
    ).model
    assert [key for key, *_ in codes.of(fused)] == ["0.weight"]


@dataclass(frozen=True, eq=False)
class Rounded(codes.Code):
    """A grid code as small as can be."""

    stage: ClassVar[str] = "grid"

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.detach().cpu()}

    def rebuild(self, arrays: Any, dtype: torch.dtype) -> Tensor:
        return arrays["weight"]

    def bits(self, weight: Tensor) -> int:
        return weight.numel()


def test_fusing_into_a_grid_that_cannot_take_the_factors_in_is_refused() -> None:
    model = trained(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    codes.attach(model[0], "weight", Rounded())
    with pytest.raises(NothingChangedError, match="put FuseBatchNorm before Quantize"):
        fuse(model)


def test_fused_models_pickle_copy_and_export() -> None:
    model, x = trained(resnet20()), torch.randn(2, 3, 32, 32)
    fused = fuse(model, x)
    want = outputs(fused, x)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(fused)), x), want)
    assert torch.equal(outputs(copy.deepcopy(fused), x), want)
    assert gap(want, outputs(torch.export.export(fused, (x,)).module(), x)) <= 1e-6


def test_a_batchnorm_under_two_names_is_replaced_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
            self.norm = self.body[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.body[0](x))

    fused = fuse(trained(Twice()), torch.randn(2, 1, 5, 5))
    assert isinstance(fused.norm, nn.Identity)
    assert fused.norm is fused.body[1]


# -- loading weights from before ---------------------------------------------------------------------------------


def test_fused_model_loads_unfused_weights() -> None:
    first, second, x = trained(resnet20()), trained(resnet20()), torch.randn(2, 3, 32, 32)
    fused = fuse(first)
    with pytest.raises(RuntimeError, match="running_mean"):
        fused.load_state_dict(second.state_dict())
    fold_on_load(fused)
    fold_on_load(fused)
    assert len(fused._load_state_dict_pre_hooks) == 1
    given = second.state_dict()
    for holder in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        holder.load_state_dict(given)
        assert torch.equal(outputs(holder, x), outputs(fuse(second), x))
    assert set(given) == set(second.state_dict())
    fused.load_state_dict(fuse(first).state_dict())
    assert torch.equal(outputs(fused, x), outputs(fuse(first), x))


def test_fused_part_loads_unfused_weights_of_the_whole() -> None:
    whole = nn.Sequential(trained(resnet20()), nn.ReLU())
    other = nn.Sequential(trained(resnet20()), nn.ReLU())
    compress(whole[0], FuseBatchNorm(), inplace=True)
    fold_on_load(whole)
    whole.load_state_dict(other.state_dict())
    assert equal(whole[0], fuse(other[0]))


# -- the callback ------------------------------------------------------------------------------------------------


def data(seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=4)


class Lit(LightningModule):
    """Two convolutions with BatchNorm and a linear layer."""

    def __init__(self, batchnorm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),
            nn.BatchNorm2d(8) if batchnorm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8) if batchnorm else nn.Identity(),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))

    def step(self, batch: Any, name: str) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log(name, loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "val_loss")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "test_loss")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(*callbacks: Callback, epochs: int = 2, **options: Any) -> Trainer:
    defaults = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def hooks(module: nn.Module) -> list[Any]:
    found = [
        h for m in module.modules() for k, v in vars(m).items() if k.endswith("_hooks") for h in v.values()
    ]
    return [*found, *(k for k in ("on_load_checkpoint", "forward") if k in vars(module))]


def test_fit_leaves_the_module_and_gives_a_fused_copy() -> None:
    plain, lit, callback = Lit(), Lit(), BatchNormFusion()
    trainer(epochs=1).fit(plain, data())
    trainer(callback, epochs=1).fit(lit, data())
    assert equal(plain, lit)
    assert hooks(lit) == []
    fused, x = callback.fused, torch.randn(4, 1, 8, 8)
    assert type(fused) is Lit
    assert not any(m.training for m in fused.modules())
    assert norms_of(fused) == []
    assert gap(outputs(lit.eval(), x), outputs(fused, x)) <= 1e-5
    assert fused._trainer is None
    want = outputs(fused, x)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(fused)), x), want)
    assert torch.equal(outputs(copy.deepcopy(fused), x), want)
    assert gap(want, outputs(torch.export.export(fused, (x,)).module(), x)) <= 1e-6
    again = pickle.loads(pickle.dumps(callback))
    assert torch.equal(outputs(again.fused, x), want)
    assert torch.equal(outputs(copy.deepcopy(callback).fused, x), want)
    assert next(applied(fused))[1].plan.data == "example_input"


@pytest.mark.parametrize("inplace", [False, True])
def test_best_checkpoint_and_second_fit(inplace: bool) -> None:
    """fit, test(ckpt_path="best"), fit again, test again: also after the module itself was fused."""
    callback, checkpoint, lit = BatchNormFusion(inplace=inplace), ModelCheckpoint(monitor="val_loss"), Lit()
    runner = trainer(callback, checkpoint)
    runner.fit(lit, data(), data(1))
    best = float(checkpoint.best_model_score)
    assert norms_of(lit) == ([] if inplace else ["body.1", "body.4"])
    assert (callback.fused is None) == inplace
    (score,) = runner.test(lit, data(1), ckpt_path="best", verbose=False)
    assert score["test_loss"] == pytest.approx(best, rel=1e-5)
    (fresh,) = trainer(BatchNormFusion(inplace=inplace)).test(
        Lit(), data(1), ckpt_path=checkpoint.best_model_path, verbose=False
    )
    assert fresh["test_loss"] == pytest.approx(best, rel=1e-5)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert saved["state_dict"].keys() == Lit().state_dict().keys()

    before = copy.deepcopy(lit.state_dict())
    checkpoint = ModelCheckpoint(monitor="val_loss", dirpath="second")
    runner = trainer(callback, checkpoint)
    runner.fit(lit, data(), data(1))
    assert not torch.equal(before["body.0.weight"], lit.state_dict()["body.0.weight"])
    assert (callback.fused is None) == inplace
    (score,) = runner.test(lit, data(1), ckpt_path="best", verbose=False)
    assert score["test_loss"] == pytest.approx(float(checkpoint.best_model_score), rel=1e-5)
    (fresh,) = trainer(BatchNormFusion(inplace=inplace)).test(
        Lit(), data(1), ckpt_path=checkpoint.best_model_path, verbose=False
    )
    assert fresh["test_loss"] == pytest.approx(float(checkpoint.best_model_score), rel=1e-5)
    assert (
        torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"].keys()
        == lit.state_dict().keys()
    )


def test_inplace_gives_what_the_copy_has() -> None:
    callback, inside, outside = BatchNormFusion(), Lit(), Lit()
    trainer(BatchNormFusion(inplace=True)).fit(inside, data())
    trainer(callback).fit(outside, data())
    assert equal(inside, callback.fused)
    assert inside.training
    assert equal(pickle.loads(pickle.dumps(inside)), inside)


def test_checkpoint_saved_after_an_inplace_fit_knows_its_structure() -> None:
    """Whichever of the library's callbacks a later session has."""
    lit = Lit()
    runner = trainer(ScheduledPruning(sparsity=0.5), BatchNormFusion(inplace=True))
    runner.fit(lit, data())
    runner.save_checkpoint("after.ckpt")
    for callback in (ScheduledPruning(sparsity=0.5), BatchNormFusion(inplace=True)):
        fresh = Lit()
        trainer(callback).test(fresh, data(1), ckpt_path="after.ckpt", verbose=False)
        assert equal(fresh, lit)
    fresh.load_state_dict(Lit().state_dict())  # and the one from the fusion callback loads older weights too


def test_fused_training_resumes() -> None:
    """A second fit trains the fused module; a run that is cut off goes on in a fresh process with equal weights."""
    lit = Lit()
    trainer(BatchNormFusion(inplace=True)).fit(lit, data())
    start = copy.deepcopy(lit)
    trainer(BatchNormFusion(inplace=True), epochs=2).fit(lit, data())
    runner = trainer(BatchNormFusion(inplace=True), epochs=1)
    runner.fit(start, data())
    runner.save_checkpoint("half.ckpt")
    fresh = Lit()
    trainer(BatchNormFusion(inplace=True), epochs=2).fit(fresh, data(), ckpt_path="half.ckpt")
    assert equal(fresh, lit)


def test_resuming_an_unfused_training_in_a_fused_module_is_refused() -> None:
    lit, checkpoint = Lit(), ModelCheckpoint(save_last=True)
    trainer(BatchNormFusion(inplace=True), checkpoint, epochs=1).fit(lit, data())
    with pytest.raises(MisconfigurationException, match="before the module was fused in place"):
        trainer(BatchNormFusion(inplace=True)).fit(lit, data(), ckpt_path=checkpoint.last_model_path)
    trainer(BatchNormFusion(inplace=True)).fit(Lit(), data(), ckpt_path=checkpoint.last_model_path)


def test_order_in_the_callback_list_does_not_matter() -> None:
    """With pruning, averaging and checkpoints: the same fused network, with its zeros."""
    results = []
    for order in itertools.permutations(range(4)):
        made = [
            EMAWeightAveraging(decay=0.5),
            ScheduledPruning(sparsity=0.75, end=0.5),
            BatchNormFusion(),
            ModelCheckpoint(),
        ]
        if order.index(0) > order.index(1):
            continue  # refused by ScheduledPruning
        trainer(*(made[i] for i in order), epochs=1).fit(Lit(), data(), data(1))
        results.append(made[2].fused)
    assert len(results) == 12
    assert all(equal(r, results[0]) for r in results)
    weights = [results[0].get_parameter(k) for k in ("body.0.weight", "body.3.weight", "head.weight")]
    zeros, size = (sum(f(w) for w in weights) for f in (lambda w: int((w == 0).sum()), Tensor.numel))
    assert zeros == int(0.75 * size + 0.5)
    assert all(code.matches(module.get_parameter(param)) for _, module, param, code in codes.of(results[0]))
    assert len(list(codes.of(results[0]))) == 3


@pytest.mark.parametrize("inplace", [False, True])
def test_averaged_weights_are_what_is_fused(inplace: bool) -> None:
    """Also their checkpoints, which hold two sets of weights, load afterwards; and averaging goes on."""
    plain, lit, callback = Lit(), Lit(), BatchNormFusion(inplace=inplace)
    scores, x = [], torch.randn(4, 1, 8, 8)
    for module, extra, folder in ((plain, [], "plain"), (lit, [callback], "fused")):
        best = ModelCheckpoint(monitor="val_loss", dirpath=folder)
        runner = trainer(EMAWeightAveraging(decay=0.5), *extra, best)
        runner.fit(module, data(), data(1))
        fused = callback.fused if extra and not inplace else module
        scores.append(
            (outputs(fused.eval(), x), runner.test(module, data(1), ckpt_path="best", verbose=False))
        )
    assert gap(scores[0][0], scores[1][0]) <= 1e-5
    assert scores[1][1][0]["test_loss"] == pytest.approx(scores[0][1][0]["test_loss"], rel=1e-5)
    trainer(EMAWeightAveraging(decay=0.5), callback).fit(lit, data(), data(1))
    assert norms_of(lit if inplace else callback.fused) == []


def test_attribute_fuses_a_part() -> None:
    lit, callback = Lit(), BatchNormFusion(attribute="body")
    trainer(callback).fit(lit, data())
    x = torch.randn(4, 1, 8, 8)
    assert type(callback.fused) is nn.Sequential
    assert norms_of(callback.fused) == []
    assert gap(outputs(lit.body.eval(), x), outputs(callback.fused, x)) <= 1e-5
    inside = Lit()
    trainer(BatchNormFusion(attribute="body", inplace=True)).fit(inside, data())
    assert equal(inside.body, callback.fused)
    assert [prefix for prefix, _ in applied(inside)] == ["body"]


def test_unknown_attribute_is_refused_before_training() -> None:
    with pytest.raises(MisconfigurationException, match="no such submodule; it has: body, head"):
        trainer(BatchNormFusion(attribute="net")).fit(Lit(), data())


def test_nothing_to_fold_is_a_warning_with_the_reasons() -> None:
    callback, lit = BatchNormFusion(), Lit(batchnorm=False)
    with pytest.warns(UserWarning, match="Lit: it has no BatchNorm layer"):
        trainer(callback).fit(lit, data())
    assert callback.fused is None


def test_failure_is_a_warning_that_keeps_the_training() -> None:
    class Uncopyable(Lit):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    callback = BatchNormFusion()
    with pytest.warns(UserWarning, match="no copies"):
        trainer(callback).fit(Uncopyable(), data())
    assert callback.fused is None


def test_no_training_at_all() -> None:
    for options in ({"limit_train_batches": 0}, {"max_epochs": 0}):
        callback = BatchNormFusion()
        trainer(callback, **options).fit(Lit(), data())
        assert norms_of(callback.fused) == []
        assert next(applied(callback.fused))[1].plan.data == ""


def test_evaluation_without_fit() -> None:
    callback, lit = BatchNormFusion(), Lit()
    runner = trainer(callback)
    runner.validate(lit, data(), verbose=False)
    runner.test(lit, data(), verbose=False)
    assert callback.fused is None
    assert hooks(lit) == []
    runner.fit(lit, data())
    assert norms_of(callback.fused) == []


def test_own_example_input_is_preferred() -> None:
    lit, callback = Lit(), BatchNormFusion()
    lit.example_input_array = torch.randn(3, 1, 8, 8)
    trainer(callback, limit_train_batches=0).fit(lit, data())
    assert next(applied(callback.fused))[1].plan.data == "example_input"


def test_example_input_that_does_not_run_is_replaced_by_tracing() -> None:
    lit, callback = Lit(), BatchNormFusion()
    lit.example_input_array = torch.randn(3, 7)
    trainer(callback).fit(lit, data())
    assert norms_of(callback.fused) == []


def test_first_input_keeps_two_samples_and_lets_go() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, grid: Tensor, *, scale: float = 1.0) -> Tensor:
            return x * scale

    module, x = Two(), torch.randn(5, 3, requires_grad=True)
    first = FirstInput(module)
    module(x, torch.zeros(7), scale=2.0)
    module(torch.zeros(9, 3), torch.zeros(7))
    assert list(first.value) == ["x", "grid", "scale"]
    assert torch.equal(first.value["x"], x[:2])
    assert not first.value["x"].requires_grad
    assert first.value["grid"].shape == (7,)
    assert hooks(module) == []


def test_first_input_is_not_fooled_by_redirected_forwards() -> None:
    """Distributed strategies send the arguments of training_step through a patched forward of the module."""
    lit = Lit()
    first = FirstInput(lit)
    lit.forward = lambda batch, index: None
    lit(torch.zeros(4, 2), 0)
    assert first.value is None
    del lit.forward
    lit(torch.zeros(4, 1, 8, 8))
    assert first.value[0].shape == (2, 1, 8, 8)


def test_inputs_that_are_no_tensors_are_not_kept() -> None:
    class Graph:
        pass

    class Model(nn.Module):
        def forward(self, graph: Any) -> None:
            return None

    module = Model()
    first = FirstInput(module)
    module(Graph())
    assert first.value is None


def test_nothing_is_left_after_an_exception() -> None:
    class Failing(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ValueError("boom")

    lit, callback = Failing(), BatchNormFusion()
    with pytest.raises(ValueError, match="boom"):
        trainer(callback).fit(lit, data())
    assert hooks(lit) == []
    assert callback.fused is None


class Direct(Lit):
    """Never calls its own forward."""

    def step(self, batch: Any, name: str) -> Tensor:
        return F.cross_entropy(self.head(self.body(batch[0]).mean((2, 3))), batch[1])


def test_copies_made_while_it_waits_for_the_first_input() -> None:
    """The hook that waits for an input stays during the whole fit here; copies of the module still work."""

    class Copies(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.copy = pickle.loads(pickle.dumps(copy.deepcopy(pl_module)))

    callback, copies, lit = BatchNormFusion(), Copies(), Direct()
    trainer(copies, callback).fit(lit, data())
    assert equal(copies.copy, lit)
    assert hooks(lit) == []
    assert norms_of(callback.fused) == []


def test_modules_built_in_configure_model() -> None:
    class Late(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.body = None

        def configure_model(self) -> None:
            if self.body is None:
                self.body = Lit().body

    callback = BatchNormFusion(attribute="body")
    trainer(callback).fit(Late(), data())
    assert norms_of(callback.fused) == []


def test_launchers_whose_processes_end_with_the_fit() -> None:
    runner = trainer(strategy="ddp_fork", devices=2)
    with pytest.warns(UserWarning, match="callback.fused will be None in the main process"):
        BatchNormFusion().setup(runner, Lit(), "fit")
    with pytest.raises(MisconfigurationException, match="only weights come back"):
        BatchNormFusion(inplace=True).setup(runner, Lit(), "fit")
    BatchNormFusion(inplace=True).setup(runner, Lit(), "test")


DISTRIBUTED = """
import sys
sys.path[:0] = [{tests!r}]
from test_fusion import *

def main():
    copies, inside, lit = BatchNormFusion(name="copy"), BatchNormFusion(inplace=True), Lit()
    runner = trainer(copies, inside, strategy="ddp", devices=2, epochs=1)
    runner.fit(lit, data())
    for part in (copies.fused, lit):
        assert norms_of(part) == []
        assert next(applied(part))[1].plan.data == "example_input"
    assert equal(copies.fused, lit)
    trainer(inside, strategy="ddp", devices=2, epochs=1).fit(lit, data())
    assert not equal(copies.fused, lit)
    assert hooks(copies.fused) == []
    print("rank", runner.global_rank, "done", flush=True)

if __name__ == "__main__":
    main()
"""


def test_two_processes(tmp_path: Path) -> None:
    """Every rank has the fused copy, found with a real input; a module fused in place trains on."""
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent)))
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("done") == 2


def test_callback_state_is_plain() -> None:
    callback, checkpoint = BatchNormFusion(inplace=True), ModelCheckpoint()
    runner = trainer(callback, checkpoint)
    runner.fit(Lit(), data())
    assert all(isinstance(step, str) for step in callback.state_dict()["structure"])
    runner.save_checkpoint("plain.ckpt")
    saved = torch.load("plain.ckpt", weights_only=True)
    assert len(saved["callbacks"][callback.state_key]["structure"]) == 1
