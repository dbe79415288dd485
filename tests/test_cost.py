"""Counting: hand counts, torch's own counter as an independent reference, and no trace left on the model."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import codes
from lightning_compress.cost import Cost, LayerCost, cost
from lightning_compress.models import LeNet5, resnet20


def layers(counted: Cost) -> dict[str, LayerCost]:
    return {layer.name: layer for layer in counted.layers}


def torch_counter(model: nn.Module, *x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(*x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("layer", "x", "macs"),
    [
        (nn.Linear(3, 5), torch.zeros(2, 7, 3), 2 * 7 * 3 * 5),
        (nn.Linear(3, 5, bias=False), torch.zeros(2, 3, 7).mT, 2 * 7 * 3 * 5),
        (nn.Conv1d(4, 6, 3), torch.zeros(2, 4, 10), 2 * 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, (3, 2), stride=2, groups=2), torch.zeros(2, 4, 9, 8), 2 * (4 * 4) * 6 * 2 * (3 * 2)),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same"), torch.zeros(1, 4, 5, 5), 25 * 4 * 9),
        (nn.Conv3d(2, 3, 2), torch.zeros(1, 2, 3, 3, 3), 8 * 3 * 2 * 8),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.zeros(2, 4, 5), 2 * 5 * 4 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), torch.zeros(1, 4, 5, 5), 25 * 4 * 3 * 4),
        (nn.LSTM(3, 4, 2, bidirectional=True), torch.zeros(5, 2, 3), 5 * 2 * 2 * 16 * ((3 + 4) + (8 + 4))),
        (nn.GRU(3, 4), torch.zeros(5, 2, 3), 5 * 2 * 12 * (3 + 4)),
        (nn.Embedding(9, 4), torch.zeros(3, dtype=torch.long), 0),
        (nn.BatchNorm2d(4), torch.zeros(1, 4, 5, 5), 0),
    ],
)
def test_hand_counts_of_layers(layer: nn.Module, x: torch.Tensor, macs: int) -> None:
    counted = cost(layer, x)
    assert counted.macs == macs
    assert counted.flops == 2 * macs
    assert [entry.calls for entry in counted.layers] == [1]


def test_bilinear_and_several_arguments() -> None:
    layer, inputs = nn.Bilinear(2, 3, 4), {"input1": torch.zeros(5, 2), "input2": torch.zeros(5, 3)}
    assert cost(layer, inputs).macs == cost(layer, tuple(inputs.values())).macs == 5 * 4 * 2 * 3


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_counts_projections_and_products(separate: bool, need_weights: bool) -> None:
    """The fused path of eval mode must not hide anything, and the output projection gets its own share."""
    batch, length, width = 2, 5, 8
    attention = nn.MultiheadAttention(width, 2, batch_first=True)
    query, key = torch.randn(batch, length, width), torch.randn(batch, 7, width)
    other = key if separate else query
    counted = cost(attention, {"query": query, "key": other, "value": other, "need_weights": need_weights})
    n = other.shape[1]
    projections = batch * width * width * (length + 2 * n)
    products = 2 * batch * length * n * width
    found = layers(counted)
    assert found[""].macs == projections + products
    assert found["out_proj"].macs == batch * length * width * width
    assert counted.params == sum(p.numel() for p in attention.parameters())


def test_transformer_encoder_equals_torch_counter() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    x = torch.randn(3, 6, 16)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = torch_counter(encoder, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert cost(encoder, x).macs == expected
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "net", [resnet20(), resnet20(shortcut="projection"), LeNet5()], ids=["pad", "proj", "lenet"]
)
def test_networks_equal_torch_counter(net: nn.Module) -> None:
    x = torch.randn(2, 1, 28, 28) if isinstance(net, LeNet5) else torch.randn(2, 3, 32, 32)
    counted = cost(net, x)
    assert counted.macs == torch_counter(net, x)
    assert counted.params == sum(p.numel() for p in net.parameters())


def test_published_figures_of_resnet20() -> None:
    x = torch.randn(1, 3, 32, 32)
    counted = cost(resnet20(shortcut="projection"), x)
    assert (counted.params, counted.macs) == (272_474, 40_813_184)
    assert cost(resnet20(shortcut="pad"), x).params == 269_722


def test_torchvision_networks_equal_torch_counter() -> None:
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(1, 3, 64, 64)
    for build in (models.mobilenet_v2, models.densenet121):
        net = build(weights=None)
        assert cost(net, x).macs == torch_counter(net, x)


def fft_macs(points: int, transforms: int, *, real: bool) -> int:
    return round((2.5 if real else 5.0) * points * math.log2(points) / 2 * transforms)


@pytest.mark.parametrize("size", [16, 15])
def test_fourier_transforms(size: int) -> None:
    class Spectral(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
            torch.fft.irfftn(torch.fft.rfftn(x, dim=(-2, -1)), s=x.shape[-2:], dim=(-2, -1))
            torch.fft.ifft(torch.fft.fft(y))

    counted = cost(Spectral(), (torch.randn(2, 3, size, 8), torch.randn(4, size, dtype=torch.complex64)))
    expected = 2 * fft_macs(size * 8, 6, real=True) + 2 * fft_macs(size, 4, real=False)
    assert counted.macs == expected
    assert counted.fft_share == 1.0


def test_complex_products_count_four() -> None:
    class Product(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    real, complex_ = Product(torch.float32), Product(torch.complex64)
    a, b = cost(real, torch.ones(2, 3)), cost(complex_, torch.ones(2, 3, dtype=torch.complex64))
    assert (a.macs, b.macs) == (24, 96)
    assert (a.params, b.params) == (12, 24)
    assert (a.elements, b.elements) == (12, 12)
    assert (a.bits, b.bits) == (12 * 32, 12 * 64)


def test_element_wise_work_is_not_counted() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return (torch.relu(x * self.scale) + 1).sum() + (z * z.conj()).real.sum()

    assert cost(Scaled(), (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.complex64))).macs == 0


def test_neural_operator_spectral_layers() -> None:
    models = pytest.importorskip("neuralop.models")
    batch, width, size = 3, 6, 16
    fno = models.FNO(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=width, n_layers=2)
    counted = cost(fno, torch.randn(batch, 1, size, size))
    found = layers(counted)["fno_blocks.convs.0"]
    transforms = 2 * fft_macs(size * size, batch * width, real=True)
    assert found.kind == "SpectralConv"
    assert found.fft_macs == transforms
    assert found.macs == 4 * batch * width * width * 8 * 5 + transforms
    assert found.elements == width * width * 8 * 5 + width  # with the bias
    assert found.params == 2 * width * width * 8 * 5 + width
    assert not any(name.endswith(".weight") for name in layers(counted))
    assert counted.params == sum(p.numel() * (2 if p.is_complex() else 1) for p in fno.parameters())
    lower = cost(fno, torch.randn(batch, 1, 6, 6))  # fewer frequencies than modes: fewer products
    assert layers(lower)["fno_blocks.convs.0"].macs < found.macs


def test_separable_spectral_layer_counts_its_products() -> None:
    spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
    layer = spectral.SpectralConv(6, 6, (8, 8), separable=True)
    counted = cost(layer, torch.randn(2, 6, 16, 16))
    assert counted.macs == 4 * 2 * 6 * 8 * 5 + 2 * fft_macs(256, 2 * 6, real=True)


def test_without_input_multiply_adds_are_unknown() -> None:
    counted = cost(resnet20())
    assert math.isnan(counted.macs) and math.isnan(counted.flops) and math.isnan(counted.fft_share)
    assert counted.params == 269_722 and all(layer.calls == 0 for layer in counted.layers)
    assert " - " in str(counted) and "269,722" in str(counted)


def test_zeros_masked_and_accidental() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2, bias=False))
    with torch.no_grad():
        net[0].bias.zero_()
        net[1].weight[0, 0] = 0
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[:, :3] = False
    codes.set_mask(net[0], "weight", mask)
    counted = cost(net)
    assert (counted.elements, counted.zeros, counted.nonzero) == (35, 15 + 5 + 1, 14)
    assert (counted.masked, counted.accidental_zeros) == (15, 6)
    assert counted.sparsity == 21 / 35
    # Masked weight: its 5 values and 20 mask bits; the rest dense.
    assert counted.bits == (5 * 32 + 20) + 5 * 32 + 10 * 32
    with torch.no_grad():
        net[0].weight[0, 0] = 1.0  # the mask is stale now: it is not believed
    stale = cost(net)
    assert (stale.zeros, stale.masked, stale.bits) == (20, 0, 35 * 32)


def test_shared_weights_are_counted_once_and_work_everywhere() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    counted = cost(Tied(), torch.zeros(3, 2, dtype=torch.long))
    found = layers(counted)
    assert counted.params == 40
    assert (found["embed"].params, found["head"].params) == (40, 0)
    assert (found["embed"].macs, found["head"].macs) == (0, 3 * 2 * 40)


def test_a_layer_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    (entry,) = cost(Twice(), torch.zeros(1, 4)).layers
    assert (entry.macs, entry.calls, entry.params) == (32, 2, 20)


def test_work_inside_inference_mode_is_seen() -> None:
    class Inference(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    net = Inference(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    assert cost(net, torch.zeros(1, 1, 4, 4)).macs == 4 * 2 * 9 + 24


def test_wrappers_and_parametrizations_keep_plain_names() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2)))
    expected = cost(net, torch.zeros(1, 4))
    assert cost(torch.compile(net), torch.zeros(1, 4)) == expected
    assert cost(nn.DataParallel(net), torch.zeros(1, 4)) == expected
    inner = nn.Sequential(net[0], torch.compile(net[1]))
    assert [layer.name for layer in cost(inner, torch.zeros(1, 4)).layers] == ["0", "1.0"]
    assert cost(inner, torch.zeros(1, 4)).macs == expected.macs
    nn.utils.parametrizations.weight_norm(net[0])
    found = layers(cost(net, torch.zeros(1, 4)))
    assert list(found) == ["0", "1.0"]
    assert found["0"].params == 3 + 12 + 3
    assert found["0"].macs == 12


def test_parameter_lists_belong_to_their_layer() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = nn.ParameterList([torch.ones(4, 2), torch.ones(2, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.factors[0] @ self.factors[1]

    (entry,) = cost(nn.Sequential(Listed()), torch.zeros(5, 4)).layers
    assert (entry.name, entry.params, entry.macs) == ("0", 14, 5 * 8 + 5 * 6)


def test_lightning_module() -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    (entry,) = cost(Lit(), torch.zeros(2, 4)).layers
    assert (entry.name, entry.macs) == ("net", 24)


def test_meta_device_needs_no_memory() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(10_000, 100_000), nn.ReLU(), nn.Linear(100_000, 10))
        counted = cost(net, torch.zeros(1, 10_000))
    assert counted.macs == 10**9 + 10**6


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if fails:
                raise RuntimeError("on purpose")
            return x + torch.rand_like(x)

    class Counting(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.running_mean.add_(1)  # state that changes in eval mode too
            return super().forward(x)

    net = nn.Sequential(nn.Conv2d(1, 2, 3), Counting(2).eval(), nn.Dropout(), Noisy())
    before = copy.deepcopy(net)
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            cost(net, torch.randn(2, 1, 5, 5, generator=torch.Generator()))
    else:
        cost(net, torch.randn(2, 1, 5, 5, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    for new, old in zip(net.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(new, old)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert (
        torch.is_grad_enabled()
        and torch.backends.mkldnn.enabled
        and torch.backends.mha.get_fastpath_enabled()
    )


def test_rows_and_table() -> None:
    counted = cost(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4))
    (row,) = json.loads(json.dumps(counted.rows()))
    assert row["name"] == "0" and row["macs"] == 12 and row["flops"] == 24 and row["sparsity"] == 0.0
    header, _, line, total = str(counted).splitlines()
    assert header.split() == ["layer", "type", "params", "zeros", "sparsity", "bits", "MACs", "calls"]
    assert line.split() == ["0", "Linear", "15", "0", "0", "480", "12", "1"]
    assert total.split() == ["total", "15", "0", "0", "480", "12", "-"]


def test_model_without_parameters() -> None:
    empty = cost(nn.ReLU(), torch.zeros(1))
    assert (empty.params, empty.macs, empty.sparsity, empty.bits) == (0, 0, 0.0, 0)
