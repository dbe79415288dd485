"""CIFAR ResNets and LeNet-5: counts, keys, published checkpoints, tracing, exporting, building by name."""

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress import models
from lightning_compress.models.resnet_cifar import PadShortcut

DATA = Path(os.environ.get("LC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no data packs in {DATA}; set LC_DATA to the folder that holds them"
)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers, counted from output shapes."""
    total = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += out[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(x)
    return total


def checkpoint(name: str) -> dict[str, torch.Tensor]:
    return pytest.importorskip("safetensors.torch").load_file(DATA / name)


@pytest.mark.parametrize(
    ("depth", "count"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962), (1202, 19_421_274)],
)
def test_parameter_counts_of_the_paper(depth: int, count: int) -> None:
    with torch.device("meta"):
        assert parameters(models.build(f"resnet{depth}")) == count


@pytest.mark.parametrize(
    ("shortcut", "count", "mac_count"), [("pad", 269_722, 40_551_040), ("projection", 272_474, 40_813_184)]
)
def test_resnet20_parameters_and_macs_of_both_shortcuts(shortcut: str, count: int, mac_count: int) -> None:
    model = models.resnet20(shortcut=shortcut)
    assert parameters(model) == count
    assert macs(model, torch.zeros(1, 3, 32, 32)) == mac_count


def test_lenet5_parameters_and_macs() -> None:
    model = models.LeNet5()
    assert parameters(model) == 61_706
    assert macs(model, torch.zeros(1, 1, 28, 28)) == 416_520


def test_option_a_keys_are_those_of_the_published_checkpoints() -> None:
    expected = {"conv1.weight", "linear.weight", "linear.bias"}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"bn1.{n}" for n in norm}
    for layer in (1, 2, 3):
        for block in range(3):
            at = f"layer{layer}.{block}"
            expected |= {f"{at}.conv{i}.weight" for i in (1, 2)}
            expected |= {f"{at}.bn{i}.{n}" for i in (1, 2) for n in norm}
    assert set(models.resnet20().state_dict()) == expected
    extra = set(models.resnet20(shortcut="projection").state_dict()) - expected
    assert {k.rsplit(".", 2)[0] + "." + k.split(".")[-2] for k in extra} == {
        f"layer{layer}.0.shortcut.{i}" for layer in (2, 3) for i in (0, 1)
    }


def reference_resnet(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Option-A forward pass from the state dict alone."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    x = norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1").relu()
    for layer in (1, 2, 3):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in weights:
            at = f"layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = norm(F.conv2d(x, weights[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1").relu()
            y = norm(F.conv2d(y, weights[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if stride == 2:
                zeros = torch.zeros(x.shape[0], x.shape[1] // 2, y.shape[2], y.shape[3])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (x + y).relu()
            block += 1
    return x.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]


@needs_data
@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_checkpoint_loads_strictly_and_computes_the_reference(depth: int) -> None:
    weights = checkpoint(f"resnet{depth}_cifar10.safetensors")
    model = models.build(f"resnet{depth}")
    model.load_state_dict(weights, strict=True)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), reference_resnet(weights, x), rtol=1e-4, atol=1e-4)


@needs_data
def test_published_resnet20_classifies_cifar10() -> None:
    pack = np.load(DATA / "cifar10_test.npz")
    x = torch.from_numpy(pack["x_test"][:250]).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    model = models.resnet20()
    model.load_state_dict(checkpoint("resnet20_cifar10.safetensors"))
    with torch.no_grad():
        top1 = (model.eval()(x).argmax(1).numpy() == pack["y_test"][:250]).mean()
    assert top1 > 0.88  # 91.5 % on all 5,000


@needs_data
def test_lenet5_checkpoint_classifies_mnist() -> None:
    pack = np.load(DATA / "mnist.npz")
    x = (torch.from_numpy(pack["x_test"][:500]).float()[:, None] / 255 - 0.1307) / 0.3081
    model = models.LeNet5()
    model.load_state_dict(checkpoint("lenet5_mnist.safetensors"), strict=True)
    with torch.no_grad():
        top1 = (model.eval()(x).argmax(1).numpy() == pack["y_test"][:500]).mean()
    assert top1 > 0.98  # 99.28 % on all 5,000


SMALL = [
    ("lenet5", {}, (2, 1, 28, 28)),
    ("resnet20", {"width": 4}, (2, 3, 32, 32)),
    ("resnet20", {"width": 4, "shortcut": "projection"}, (2, 3, 32, 32)),
]


@pytest.mark.parametrize(("name", "options", "shape"), SMALL)
def test_traces_exports_pickles_and_copies_with_equal_outputs(name: str, options: dict, shape: tuple) -> None:
    model = models.build(name, **options).eval()
    x = torch.randn(shape)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 10)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), y)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
        assert torch.equal(copy.deepcopy(model)(x), y)


@pytest.mark.parametrize(("name", "options", "shape"), SMALL)
def test_every_parameter_gets_a_gradient(name: str, options: dict, shape: tuple) -> None:
    model = models.build(name, **options)
    model(torch.randn(shape)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_options_of_the_networks() -> None:
    model = models.ResNetCIFAR(8, num_classes=7, in_channels=1, width=5)
    assert model(torch.zeros(2, 1, 24, 40)).shape == (2, 7)
    assert models.LeNet5(num_classes=3, in_channels=2)(torch.zeros(2, 2, 28, 28)).shape == (2, 3)


def test_resnet_starts_from_he_initialization() -> None:
    weight = models.ResNetCIFAR(8, width=64).layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("channels", "out", "stride"), [(2, 4, 2), (3, 8, 2), (3, 3, 3), (1, 2, 1)])
def test_pad_shortcut_subsamples_and_adds_zero_channels(channels: int, out: int, stride: int) -> None:
    x = torch.randn(2, channels, 7, 6)
    y = PadShortcut(channels, out, stride)(x)
    before = (out - channels) // 2
    expected = np.zeros((2, out, -(-7 // stride), -(-6 // stride)), dtype=np.float32)
    expected[:, before : before + channels] = x.numpy()[:, :, ::stride, ::stride]
    assert np.array_equal(y.numpy(), expected)


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6n \+ 2 .* got {depth}"):
        models.ResNetCIFAR(depth)


def test_unknown_shortcut_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"pad, projection.*'conv'"):
        models.ResNetCIFAR(20, shortcut="conv")


def test_every_name_builds() -> None:
    with torch.device("meta"):
        assert all(isinstance(models.build(name), nn.Module) for name in models.names())
    assert {"lenet5", "resnet20", "resnet110"} <= set(models.names())


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'resnet50'.*did you mean .*'resnet20'"):
        models.build("resnet50")
    with pytest.raises(ValueError, match=r"'zzz'.*resnet20, resnet32"):
        models.build("zzz")
