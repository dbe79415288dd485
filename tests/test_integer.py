"""The integer model: its sums are those of the fake-quantized model, exactly, and everything is accounted for."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.functional.affine import choose_qparams, integer_range
from lightning_compress.functional.groups import Granularity, Groups, PerChannel, PerGroup, PerTensor
from lightning_compress.quantization.codes import Affine, PowerOfTwo
from lightning_compress.quantization.integer import IntegerLayer, to_integer
from lightning_compress.quantization.layers import quantize_input
from lightning_compress.quantization.quantizers import InputQuantizer

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def grid(
    layer: nn.Module,
    bits: int = 8,
    granularity: Granularity | None = None,
    symmetric: bool = True,
) -> nn.Module:
    """Put a layer's weight on a grid."""
    weight = layer._parameters["weight"]
    groups = Groups.of(granularity or PerChannel(), weight.shape, 1 if isinstance(layer, TRANSPOSED) else 0)
    qmin, qmax = integer_range(bits, signed=symmetric)
    blocks = groups.blocks(weight.detach())
    ends = [
        groups.join([f(b) for b in blocks], weight.shape) for f in (lambda b: b.amin(1), lambda b: b.amax(1))
    ]
    scale, zero = choose_qparams(*ends, qmin, qmax, symmetric=symmetric)
    code = Affine(groups.axes, groups.size, bits, scale, None if symmetric else zero, qmin, qmax)
    weight.data.copy_(code.project(weight.detach()))
    codes.attach(layer, "weight", code)
    return layer


def quantized(layer: nn.Module, quantizer: InputQuantizer | None = None, **options: object) -> nn.Module:
    quantize_input(layer, quantizer or InputQuantizer(8, scale=0.02, zero_point=100))
    return grid(layer, **options)


LAYERS = [
    (lambda: nn.Linear(6, 5), (3, 6)),
    (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    (lambda: nn.Linear(6, 5), (6,)),
    (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 7)),
    (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 7, 7)),
    (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 7, 7)),
    (lambda: nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5)),
    (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
    (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5, 5)),
    (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(3)], ids=str)
@pytest.mark.parametrize("make, shape", LAYERS)
@pytest.mark.parametrize("quantizer", ["static", "dynamic"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_sums_and_outputs_are_those_of_the_fake_quantized_layer(
    make: object, shape: tuple[int, ...], granularity: Granularity, quantizer: str, symmetric: bool
) -> None:
    """The sum over integers, divided out of the float64 output of the fake-quantized layer."""
    chosen = InputQuantizer(8, scale=0.02, zero_point=100) if quantizer == "static" else InputQuantizer(8)
    layer = quantized(make().double(), chosen, granularity=granularity, symmetric=symmetric)
    x = 2 * torch.randn(shape, dtype=torch.float64)
    integer = IntegerLayer(layer)
    with torch.no_grad():
        expected, found, sums = layer(x), integer(x), integer.accumulators(x)
    assert torch.equal(sums, sums.round())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if len(sums) > 1:
        return
    axis = 1 - integer.codes.dim()
    scale = integer.scale[0].double() * float(chosen.qparams(x)[0])
    bias = 0 if layer.bias is None else layer.bias.detach().view(-1, *[1] * (-axis - 1))
    counted = (expected - bias) / scale.view(-1, *[1] * (-axis - 1))
    assert torch.equal(counted.round(), sums[0])
    assert sums.abs().max() > 100


def test_sums_equal_integer_matrix_multiplication() -> None:
    """An independent count in int64."""
    layer = quantized(nn.Linear(300, 7), InputQuantizer(8, scale=0.01, zero_point=-5, qmin=-128, qmax=127))
    x = torch.randn(50, 300)
    sums = IntegerLayer(layer).accumulators(x)[0]
    q_x = ((x / torch.tensor(0.01)).round() - 5).clamp(-128, 127).long() + 5
    q_w = codes.read(layer, "weight").arrays(layer.weight)["codes"].long()
    assert torch.equal(sums.long(), q_x @ q_w.t()) and torch.equal(sums.long().double(), sums)


@given(bits=st.integers(2, 16), inputs=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_runs_of_inputs_add_up(bits: int, inputs: int, size: int, seed: int) -> None:
    """Any bits, any run length, the last run shorter."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, 3).double()
    quantized(layer, granularity=PerGroup(min(size, inputs)), bits=bits)
    integer = IntegerLayer(layer)
    x = torch.randn(4, inputs, dtype=torch.float64)
    assert len(integer.scale) == -(-inputs // min(size, inputs))
    with torch.no_grad():
        torch.testing.assert_close(integer(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "bits, dtype", [(2, torch.int8), (8, torch.int8), (9, torch.int16), (16, torch.int16)]
)
def test_weights_are_stored_as_integers(bits: int, dtype: torch.dtype) -> None:
    integer = IntegerLayer(quantized(nn.Linear(40, 3), bits=bits))
    assert integer.codes.dtype == dtype
    assert {n for n in integer.state_dict()} == {"codes", "scale", "bias"}
    assert int(integer.codes.abs().max()) == 2 ** (bits - 1) - 1


def test_output_size_of_a_transposed_convolution() -> None:
    layer = quantized(nn.ConvTranspose2d(2, 3, 3, stride=2).double())
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        expected, found = (m(x, [10, 10]) for m in (layer, IntegerLayer(layer)))
    assert found.shape[-1] == 10
    torch.testing.assert_close(found, expected)


def test_output_quantizer_is_kept() -> None:
    layer = quantized(nn.Linear(6, 5))
    quantize_input(layer, InputQuantizer(4, scale=0.25, qmin=-8, qmax=7), output=True)
    x = torch.randn(30, 6)
    with torch.no_grad():
        assert torch.equal(IntegerLayer(layer)(x), layer(x))
        assert torch.equal((layer(x) * 4).round(), layer(x) * 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 26 * 26, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(torch.flatten(x + self.b(x), 1))


def net() -> Net:
    model = Net().eval()
    for layer, scale in ((model.a, 4 / 127), (model.b, 0.02), (model.head, 0.02)):
        quantized(layer, InputQuantizer(8, scale=scale, qmin=-128, qmax=127))
    return model


def test_model_predicts_the_same() -> None:
    model = net()
    x = torch.randn(300, 1, 28, 28)
    before = copy.deepcopy(model.state_dict())
    integer = to_integer(model, x[:2])
    with torch.no_grad():
        expected, found = model(x), integer(x)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.999
    assert float((found - expected).norm() / expected.norm()) < 1e-2
    assert [type(m).__name__ for m in integer.children()] == ["IntegerLayer"] * 3
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert type(model.a).__name__ == "QuantizedConv2d"
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(copy.deepcopy(integer)))(x)
    assert torch.equal(again, found)


def test_a_model_that_is_one_layer_and_a_shared_layer() -> None:
    assert isinstance(to_integer(quantized(nn.Linear(3, 2))), IntegerLayer)
    layer = quantized(nn.Linear(3, 3))
    twice = to_integer(nn.Sequential(layer, nn.ReLU(), layer))
    assert twice[0] is twice[2]


def test_what_stays_is_listed_with_the_reason() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def hooked(layer: nn.Module) -> nn.Module:
        layer.register_forward_hook(lambda *_: None)
        return layer

    def stale(layer: nn.Module) -> nn.Module:
        layer.weight.data.mul_(1.01)
        return layer

    log2 = nn.Linear(3, 3)
    code = PowerOfTwo((), 0, 4, torch.tensor([0], dtype=torch.int32), "log")
    log2.weight.data.copy_(code.project(log2.weight.detach()))
    codes.attach(log2, "weight", code)
    quantize_input(log2, InputQuantizer(8, scale=0.1))
    parts = {
        "good": quantized(nn.Linear(3, 3)),
        "only": grid(nn.Linear(3, 3)),
        "own": quantized(Own(3, 3)),
        "hooked": hooked(quantized(nn.Linear(3, 3))),
        "stale": stale(quantized(nn.Linear(3, 3))),
        "columns": quantized(nn.Linear(3, 3), granularity=PerChannel(1)),
        "log2": log2,
        "plain": nn.Linear(3, 3),
    }
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    with pytest.warns(UserWarning) as caught:
        result = to_integer(model)
    said = dict(line.strip().split(": ", 1) for line in str(caught[0].message).splitlines()[1:])
    assert said == {
        "only": "its inputs are not quantized (weights only)",
        "own": "Own has a forward of its own",
        "hooked": "it has forward hooks, which may change what it computes",
        "stale": "its weight has left its grid since it was quantized: quantize it again",
        "columns": "its scales differ along axes (1,) of the weight, not only along its outputs",
        "log2": "its weight is not on an integer grid but stored as power_of_two",
    }
    converted = [name for name, part in result.named_children() if isinstance(part, IntegerLayer)]
    assert converted == ["good"]


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="Linear has no layer that can compute with integers: no weight is quant"
    ):
        to_integer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0: its inputs are not quantized \(weights only\)"):
        to_integer(nn.Sequential(grid(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="Linear has no integer form: its weight is not on an integer grid"):
        IntegerLayer(nn.Linear(2, 2))


def test_sums_too_large_for_float64_are_refused() -> None:
    layer = quantized(nn.Linear(2100, 1000), InputQuantizer(16, scale=1e-4), bits=16)
    with pytest.raises(ValueError, match=r"its sums could exceed 2\^53"):
        IntegerLayer(layer)


def test_example_input_catches_a_model_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(quantized(nn.Linear(6, 5)))
    x = torch.randn(4, 6)
    to_integer(model, x)
    forward = IntegerLayer.forward
    monkeypatch.setattr(IntegerLayer, "forward", lambda self, x: 1.1 * forward(self, x))
    with pytest.raises(ValueError, match=r"differs by \d+\.\d+% \(allowed is 1%\)"):
        to_integer(model, x)


def test_lenet_on_images() -> None:
    """Top-1 of the whole library's LeNet-5, quantized by hand from one batch."""
    torch.manual_seed(0)
    model = lc.models.build("lenet5").eval()
    images = torch.rand(200, 1, 28, 28)
    seen: dict[str, float] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=n: seen.__setitem__(n, float(args[0].max())))
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    for name, high in seen.items():
        quantized(model.get_submodule(name), InputQuantizer(8, scale=high / 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integer = to_integer(model, images[:4])
    with torch.no_grad():
        assert torch.equal(integer(images).argmax(1), model(images).argmax(1))
