"""ONNX files hold the model's own integers, compute what the model computes, and say what they could not do."""

import copy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.export import ExportReport, export_onnx
from lightning_compress.export.nodes import StoredIntegers
from lightning_compress.functional.affine import choose_qparams, integer_range
from lightning_compress.functional.groups import Granularity, Groups, PerChannel, PerGroup, PerTensor
from lightning_compress.quantization.codes import Affine, PowerOfTwo
from lightning_compress.quantization.layers import quantize_input
from lightning_compress.quantization.quantizers import InputQuantizer

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
UNSIGNED, SIGNED = {"qmin": 0, "qmax": 255}, {"qmin": -128, "qmax": 127}


def grid(
    layer: nn.Module,
    bits: int = 8,
    granularity: Granularity | None = None,
    symmetric: bool = True,
    param: str = "weight",
    po2: bool = False,
) -> Any:
    """Put a layer's weight on a grid."""
    weight = layer._parameters[param]
    groups = Groups.of(granularity or PerChannel(), weight.shape, 1 if isinstance(layer, TRANSPOSED) else 0)
    qmin, qmax = integer_range(bits, signed=symmetric)
    blocks = groups.blocks(weight.detach().float())
    ends = [
        groups.join([f(b) for b in blocks], weight.shape) for f in (lambda b: b.amin(1), lambda b: b.amax(1))
    ]
    scale, zero = choose_qparams(*ends, qmin, qmax, symmetric=symmetric)
    scale = 2.0 ** scale.log2().ceil() if po2 else scale
    code = Affine(groups.axes, groups.size, bits, scale, None if symmetric else zero, qmin, qmax)
    weight.data.copy_(code.project(weight.detach()))
    codes.attach(layer, param, code)
    return layer


def quantized(layer: nn.Module, quantizer: InputQuantizer | None = None, **options: Any) -> Any:
    quantize_input(layer, quantizer or InputQuantizer(8, scale=0.02, zero_point=100))
    return grid(layer, **options)


def round_biases(model: nn.Module) -> None:
    """Biases onto the grid that integer sums have, s_x s_w."""
    for layer in model.modules():
        code = codes.read(layer, "weight")
        if code is not None and isinstance(layer.input_quantizer, InputQuantizer):
            step = (layer.input_quantizer.scale * code.scale).double()
            layer.bias.data.copy_((layer.bias.double() / step).round() * step)


def stored(path: str) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def operations(path: str) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: str, *inputs: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    # Otherwise it rounds float32 inputs of int8 weights to 8 bits by itself.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(out) for out in session.run(None, feed)]


def kernels(path: str) -> Counter:
    """What ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = "optimized.onnx"
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return operations("optimized.onnx")


LAYERS = [
    (lambda: nn.Linear(6, 5), (3, 6)),
    (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    (lambda: nn.Linear(6, 5), (2, 4, 6)),
    (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 7)),
    (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 7, 7)),
    (lambda: nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5)),
    (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
    (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (2, 3, 5, 5)),
]


@pytest.mark.parametrize("quantizer", ["static", "dynamic", "weights only"])
@pytest.mark.parametrize(
    "granularity, symmetric", [(PerChannel(), True), (PerChannel(), False), (PerTensor(), True)]
)
@pytest.mark.parametrize("make, shape", LAYERS)
def test_every_layer_type(
    make: Any, shape: tuple[int, ...], quantizer: str, granularity: Granularity, symmetric: bool
) -> None:
    """The file holds the layer's own integers and scales; ONNX Runtime gives the layer's outputs."""
    layer = grid(make(), granularity=granularity, symmetric=symmetric)
    if quantizer != "weights only":
        chosen = InputQuantizer(8, scale=0.02, zero_point=100) if quantizer == "static" else InputQuantizer(8)
        quantize_input(layer, chosen)
    x = torch.randn(shape)
    report = export_onnx(nn.Sequential(layer), x, "layer.onnx")
    with torch.no_grad():
        torch.testing.assert_close(run("layer.onnx", x)[0], layer(x), rtol=1e-4, atol=2e-3)
    (entry,) = report.layers
    taken = {"static": "uint8", "dynamic": "dynamic uint8", "weights only": "float32"}[quantizer]
    assert (entry.name, entry.weight, entry.input) == ("0.weight", "int8" if symmetric else "uint8", taken)
    assert entry.reason == ("weights only: its inputs are float32" if quantizer == "weights only" else "")
    file, arrays = stored("layer.onnx"), codes.read(layer, "weight").arrays(layer.weight)
    (integers,) = (v for v in file.values() if v.dtype in (np.int8, np.uint8) and v.ndim > 1)
    expected = arrays["codes"].numpy()
    turned = integers.shape != expected.shape or not np.array_equal(integers, expected)
    assert np.array_equal(integers.T if turned else integers, expected)
    assert turned == (
        isinstance(layer, nn.Linear) and len(shape) > 2
    )  # an integer matrix product reads it so
    assert any(np.array_equal(v.ravel(), arrays["scale"].numpy()) for v in file.values())
    biases = [v for v in file.values() if v.dtype == np.int32]
    assert len(biases) == (quantizer == "static" and layer.bias is not None)
    floats = [v for v in file.values() if v.dtype == np.float32 and v.size >= layer.weight.numel()]
    assert not floats


class Net(nn.Module):
    """Two convolutions that read one tensor, an addition, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in "bc")
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        return self.head(F.relu(self.b(x) + self.c(x)).mean((2, 3)))


def net(po2: bool = False, **options: Any) -> Net:
    model = Net().eval()
    scales = (
        {"a": 1 / 32, "b": 1 / 64, "c": 1 / 64, "head": 1 / 128}
        if po2
        else {"a": 0.03, "b": 0.013, "c": 0.013, "head": 0.01}
    )
    for name, scale in scales.items():
        kind = SIGNED if name == "a" else UNSIGNED
        quantized(model.get_submodule(name), InputQuantizer(8, scale=scale, **kind), po2=po2, **options)
    return model


def test_network_and_its_report() -> None:
    model, x = net(), torch.randn(32, 3, 12, 12)
    before = copy.deepcopy(model.state_dict())
    report = export_onnx(model, x, "net.onnx")
    assert isinstance(report, ExportReport)
    assert report.file_bytes == Path("net.onnx").stat().st_size
    assert report.top1_agreement == 1.0 and report.within_step >= 0.999 and report.samples == 32
    assert report.rms_difference < 0.2 * report.rms_rounding
    with torch.no_grad():
        expected, found = model(x), run("net.onnx", x)[0]
    assert report.max_difference == pytest.approx(float((expected - found).abs().max()), abs=1e-6)
    assert report.step == pytest.approx(float(expected.max() - expected.min()) / 255, rel=1e-5)
    assert [(e.name, e.weight, e.input, e.reason) for e in report.layers] == [
        (f"{n}.weight", "int8", "int8" if n == "a" else "uint8", "") for n in ("a", "b", "c", "head")
    ]
    printed = str(report)
    assert all(
        part in printed for part in (f"{report.file_bytes:,}", "head.weight", "onnxruntime", "opset 17")
    )
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert type(model.a).__name__ == "QuantizedConv2d"


def test_graph_is_tidy() -> None:
    """A tensor that two layers read is rounded once; nothing is left of the float weights or of this machine."""
    export_onnx(net(), torch.randn(4, 3, 12, 12), "net.onnx")
    found = operations("net.onnx")
    assert found == Counter(
        Conv=3, Gemm=1, Relu=2, Add=1, ReduceMean=1, QuantizeLinear=3, DequantizeLinear=3 + 8
    )
    file = stored("net.onnx")
    assert {"a.weight", "b.weight", "c.weight", "head.weight"} <= set(file)
    assert {n: v.dtype.name for n, v in file.items() if n.endswith(".weight")} == {
        f"{n}.weight": "int8" for n in ("a", "b", "c", "head")
    }
    assert {n: v.dtype.name for n, v in file.items() if n.endswith(".bias")} == {
        f"{n}.bias": "int32" for n in ("a", "b", "c", "head")
    }
    content = Path("net.onnx").read_bytes()
    assert b".py" not in content and str(Path.cwd()).encode() not in content


def test_powers_of_two_are_exact() -> None:
    """With such scales every float32 product is exact, so both runtimes give the same bits."""
    model, x = net(po2=True), torch.randn(64, 3, 12, 12)
    round_biases(model)
    report = export_onnx(model, x, "net.onnx")
    assert (report.max_difference, report.top1_agreement, report.within_step) == (0.0, 1.0, 1.0)
    assert report.rms_rounding > 0
    with torch.no_grad():
        assert torch.equal(run("net.onnx", x)[0], model(x))


def test_onnx_runtime_computes_with_integers() -> None:
    """Where outputs are rounded too, nothing between the layers is a float."""
    model = net()
    for layer in (model.b, model.c):
        quantize_input(layer, InputQuantizer(8, scale=0.02, **SIGNED), output=True)
    quantize_input(model.head, InputQuantizer(8, scale=0.01, **SIGNED), output=True)
    report = export_onnx(model, torch.randn(8, 3, 12, 12), "net.onnx")
    assert report.step == pytest.approx(0.01)
    found = kernels("net.onnx")
    assert found["QLinearConv"] == 3 and found["QGemm"] == 1 and not found["Conv"] and not found["Gemm"]


def test_linear_layers_on_sequences_compute_with_integers() -> None:
    layer = quantized(nn.Linear(16, 8), InputQuantizer(8, scale=0.02, zero_point=100, **UNSIGNED))
    export_onnx(layer, torch.randn(2, 5, 16), "sequence.onnx")
    assert kernels("sequence.onnx")["MatMulIntegerToFloat"] == 1


def test_rounding_what_is_rounded_already_happens_once() -> None:
    """An activation's quantizer and the same one in the layer behind it."""
    model = net()
    quantize_input(model.relu, InputQuantizer(8, scale=0.013, **UNSIGNED), output=True)
    x = torch.randn(8, 3, 12, 12)
    export_onnx(model, x, "net.onnx")
    assert operations("net.onnx")["QuantizeLinear"] == 3
    with torch.no_grad():
        torch.testing.assert_close(run("net.onnx", x)[0], model(x), atol=1e-2, rtol=0)


@pytest.mark.parametrize("weight_bits", [1, 2, 4])
@pytest.mark.parametrize("kind", [{"qmin": 0, "qmax": 15}, {"qmin": -8, "qmax": 7}])
def test_few_bits_are_integers_of_a_smaller_range(weight_bits: int, kind: dict[str, int]) -> None:
    layer = nn.Linear(16, 8)
    if weight_bits == 1:
        code = Affine((0,), 0, 1, layer.weight.detach().abs().mean(1), None, -1, 1)
        layer.weight.data.copy_(code.project(layer.weight.detach()))
        codes.attach(layer, "weight", code)
    else:
        grid(layer, bits=weight_bits)
    quantize_input(layer, InputQuantizer(4, scale=0.3, **kind))
    round_biases(layer)
    x = 3 * torch.randn(40, 16)
    report = export_onnx(layer, x, "few.onnx")
    assert operations("few.onnx")["Clip"] == 1
    assert report.layers[0].weight == "int8" and np.abs(stored("few.onnx")["weight"]).max() <= 7
    with torch.no_grad():
        torch.testing.assert_close(run("few.onnx", x)[0], layer(x), atol=1e-4, rtol=1e-4)


def test_wide_activations_are_rounded_in_float32() -> None:
    layer = quantized(nn.Linear(16, 8), InputQuantizer(12, scale=0.001, zero_point=7, qmin=-2048, qmax=2047))
    x = torch.randn(20, 16)
    (entry,) = export_onnx(layer, x, "wide.onnx").layers
    assert (entry.weight, entry.input, entry.reason) == (
        "int8",
        "float32",
        "12-bit inputs are rounded in float32",
    )
    with torch.no_grad():
        torch.testing.assert_close(run("wide.onnx", x)[0], layer(x), atol=2e-3, rtol=1e-4)
        assert (layer(x) - layer(x.clamp(-2.055, 2.04))).abs().max() < 1e-5  # it clips


@pytest.mark.parametrize(
    "layer", [nn.Linear(12, 8), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)], ids=str
)
def test_runs_of_inputs_are_stored_as_rows(layer: nn.Module) -> None:
    quantized(layer, granularity=PerGroup(4))
    x = torch.randn(2, 12) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    (entry,) = export_onnx(layer, x, "rows.onnx").layers
    assert (entry.weight, entry.reason) == ("int8", "its scales change along its inputs: products in float32")
    with torch.no_grad():
        torch.testing.assert_close(run("rows.onnx", x)[0], layer(x), atol=2e-3, rtol=1e-4)


def test_scales_for_combinations_of_axes() -> None:
    layer = quantized(nn.Conv2d(4, 6, 3), granularity=PerChannel((1, 3)))
    x = torch.randn(2, 4, 5, 5)
    assert export_onnx(layer, x, "axes.onnx").layers[0].weight == "int8"
    with torch.no_grad():
        torch.testing.assert_close(run("axes.onnx", x)[0], layer(x), atol=2e-3, rtol=1e-4)


def test_what_stays_float32_says_why() -> None:
    log2 = nn.Linear(8, 8)
    code = PowerOfTwo((), 0, 4, torch.tensor([0], dtype=torch.int32), "log")
    log2.weight.data.copy_(code.project(log2.weight.detach()))
    codes.attach(log2, "weight", code)
    stale = quantized(nn.Linear(8, 8))
    stale.weight.data.mul_(1.01)
    model = nn.Sequential(
        quantized(nn.Linear(8, 8)),
        log2,
        quantized(nn.Linear(8, 8), bits=9),
        quantized(nn.Linear(8, 8), granularity=PerGroup(3)),
        stale,
        nn.Linear(8, 8),
    )
    x = torch.randn(6, 8)
    report = export_onnx(model, x, "mixed.onnx")
    assert {e.name: (e.weight, e.reason) for e in report.layers} == {
        "0.weight": ("int8", ""),
        "1.weight": ("uint8 indices", "a table of its values: products in float32"),
        "2.weight": ("float32", "9 bits are more than int8 holds"),
        "3.weight": ("float32", "its last run of inputs is shorter than the others"),
        "4.weight": ("float32", "it has left its values since it was compressed: compress it again"),
    }
    with torch.no_grad():
        torch.testing.assert_close(run("mixed.onnx", x)[0], model(x), atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize(
    "sharing",
    [
        lc.ShareWeights(clusters=16),
        lc.ShareWeights(clusters=200, codebook_dtype="float16"),
        lc.ShareWeights(clusters=8, codebook_bits=6),
        lc.ShareWeights(clusters=20, block=2),
        lc.ShareWeights("hash", clusters=30),
        lc.ShareWeights("bloom", clusters=8),
        lc.Quantize(5, format="log2"),
    ],
    ids=lambda t: f"{type(t).__name__}-{getattr(t, 'strategy', '')}-{getattr(t, 'clusters', '')}",
)
def test_few_values_are_a_table_and_a_byte_for_each_weight(sharing: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 50), nn.Linear(50, 9))
    small, x = lc.compress(model, [lc.Prune(0.3), sharing]).model, torch.randn(4, 3, 8, 8)
    report = export_onnx(small, x, "table.onnx")
    weights = {name: small.get_parameter(name) for name in ("0.weight", "3.weight", "4.weight")}
    assert {e.name: e.weight for e in report.layers} == dict.fromkeys(weights, "uint8 indices")
    assert report.max_difference < 1e-5 and report.rms_rounding == 0
    arrays, nodes = stored("table.onnx"), onnx.load("table.onnx").graph.node
    wide = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Cast"}
    tables = {wide[node.input[1]]: node.input[0] for node in nodes if node.op_type == "Gather"}
    assert tables.keys() == weights.keys()  # equal tables are one
    for name, weight in weights.items():
        table, indices = arrays[tables[name]], arrays[name]
        assert indices.dtype == np.uint8 and np.array_equal(table[indices], weight.detach().numpy())
    assert [entry.domain for entry in onnx.load("table.onnx").opset_import] == [""]
    assert not kernels("table.onnx").keys() & {"Gather", "Cast", "Transpose"}  # floats once it is loaded
    with torch.no_grad():
        torch.testing.assert_close(run("table.onnx", x)[0], small(x), rtol=1e-5, atol=1e-5)
    saved = sum(3 * w.numel() - 4 * len(w.unique()) for w in weights.values())
    assert report.float32_bytes - report.file_bytes > saved - 3 * 200  # nodes and names


def test_integers_and_tables_in_one_file() -> None:
    model = nn.Sequential(
        nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30), nn.Linear(30, 30), nn.Linear(30, 4)
    )
    sharing = lc.ShareWeights(clusters={"2": 16, "3": 600})
    model = lc.compress(model, [lc.Quantize(8, include=["0", "4"]), sharing]).model
    stale = copy.deepcopy(model)
    report = export_onnx(model, torch.randn(5, 30), "both.onnx", reduce_range=True)
    assert {e.name: (e.weight, e.reason) for e in report.layers} == {
        "0.weight": ("int8", "weights only: its inputs are float32"),
        "2.weight": ("uint8 indices", "a table of its values: products in float32"),
        "3.weight": ("float32", "it has 600 different values, and indices of a byte tell 256 apart"),
        "4.weight": ("int8", "weights only: its inputs are float32"),
    }
    assert np.abs(stored("both.onnx")["0.weight"]).max() <= 64  # seven bits; tables stay
    assert np.array_equal(np.unique(stored("both.onnx")["2.weight"]), np.arange(16))
    stale[2].weight.data.mul_(1.01)
    found = {e.name: e for e in export_onnx(stale, torch.randn(5, 30), "both.onnx").layers}["2.weight"]
    assert found.weight == "float32" and "has left its values" in found.reason


def test_one_table_for_a_weight_that_two_layers_read() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.out = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.out.weight = self.tokens.weight
            self.spare = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.tokens(x)))

    model = lc.compress(Tied(), [lc.ShareWeights(clusters=8, include=["tokens", "spare"])]).model
    x = torch.randint(50, (3, 7))
    report = export_onnx(model, x, "tied.onnx")
    arrays = stored("tied.onnx")
    assert sorted(a.size for a in arrays.values() if a.dtype != np.int64) == [8, 800]
    assert {e.name: e.weight for e in report.layers}["spare.weight"] == "float32"
    with torch.no_grad():
        torch.testing.assert_close(run("tied.onnx", x)[0], model(x), rtol=1e-5, atol=1e-5)


def test_where_a_table_saves_nothing_the_weight_stays() -> None:
    layer = lc.compress(nn.Linear(40, 40), [lc.ShareWeights(clusters=32)]).model
    few = nn.Linear(6, 6)
    with torch.no_grad():
        few.weight.copy_(layer.weight.unique()[:32].repeat(2)[:36].view(6, 6))
    codes.attach(few, "weight", codes.read(layer, "weight"))
    report = export_onnx(nn.Sequential(layer, nn.Linear(40, 6), few), torch.randn(2, 40), "few.onnx")
    assert [e.weight for e in report.layers] == ["uint8 indices", "float32"]
    assert report.layers[1].reason == "as float32 it takes no more"


def test_a_layer_that_does_not_run_is_not_in_the_file() -> None:
    model = net()
    model.spare = quantized(nn.Linear(64, 64))
    report = export_onnx(model, torch.randn(4, 3, 12, 12), "net.onnx")
    spare = report.layers[-1]
    assert (spare.name, spare.weight) == ("spare.weight", "float32")
    assert spare.reason == "not in the file: the model did not read it on this input"
    assert not any("spare" in name for name in stored("net.onnx")) and report.file_bytes < 64 * 64 * 4


def test_nothing_to_store_as_integers_is_an_error() -> None:
    with pytest.raises(
        ValueError,
        match=r"Linear has no weight that int8 ONNX could store; precision='float32' .* no weight is q",
    ):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), "no.onnx")
    with pytest.raises(ValueError, match=r"0\.weight: 9 bits are more than int8 holds"):
        export_onnx(nn.Sequential(grid(nn.Linear(2, 2), bits=9)), torch.ones(1, 2), "no.onnx")
    assert not list(Path.cwd().iterdir())


def test_batchnorm_is_folded_into_quantized_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)
    ).eval()
    with torch.no_grad():
        for norm in (model[1], model[3]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
    quantized(model[0], InputQuantizer(8, scale=0.03, **SIGNED))
    x = torch.randn(4, 3, 8, 8)
    report = export_onnx(model, x, "norm.onnx")
    assert operations("norm.onnx")["BatchNormalization"] == 1
    assert report.notes[0].startswith("BatchNorm that is not folded:\n  3: ")
    integers = codes.read(model[0], "weight").arrays(model[0].weight)["codes"].numpy()
    assert np.array_equal(np.abs(stored("norm.onnx")["0.weight"]), np.abs(integers))
    with torch.no_grad():
        torch.testing.assert_close(run("norm.onnx", x)[0], model(x), atol=2e-2, rtol=0)


def test_reduce_range_stores_seven_bits() -> None:
    model, x = net(), torch.randn(32, 3, 12, 12)
    full, reduced = (export_onnx(model, x, f"{r}.onnx", reduce_range=r) for r in (False, True))
    largest = {
        r: max(np.abs(v).max() for n, v in stored(f"{r}.onnx").items() if n.endswith(".weight"))
        for r in (False, True)
    }
    assert largest == {False: 127, True: 63}
    assert "reduce_range: weights were rounded again, to 7 bits" in reduced.notes[0] and not full.notes
    assert reduced.top1_agreement >= 0.95
    with torch.no_grad():
        away = (run("True.onnx", x)[0] - model(x)).abs().max()
    assert (
        full.max_difference < reduced.max_difference + away
    )  # compared with its own weights, not the model's
    assert away > 2 * reduced.max_difference


def test_reduced_asymmetric_weights_keep_zero() -> None:
    layer = quantized(nn.Linear(8, 8), symmetric=False)
    layer.weight.data[:, ::2] = 0
    export_onnx(layer, torch.randn(4, 8), "asymmetric.onnx", reduce_range=True)
    file = stored("asymmetric.onnx")
    assert file["weight"].max() <= 127 and file["weight"].min() >= 0
    assert np.array_equal(file["weight"][:, 0], file["weight.zero_point"])


def test_samples_are_free_unless_told() -> None:
    model = net()
    for free in (True, False):
        export_onnx(model, torch.randn(4, 3, 12, 12), "net.onnx", dynamic_axes=free)
        if free:
            assert run("net.onnx", torch.randn(7, 3, 12, 12))[0].shape == (7, 10)
        else:
            with pytest.raises(Exception, match="Got: 7 Expected: 4"):
                run("net.onnx", torch.randn(7, 3, 12, 12))


def test_float32_file() -> None:
    """The weights as float32, activations not rounded."""
    model, x = net(), torch.randn(8, 3, 12, 12)
    report = export_onnx(model, x, "float.onnx", precision="float32")
    assert report.precision == "float32" and report.layers == () and report.file_bytes == report.float32_bytes
    assert set(operations("float.onnx")) == {"Conv", "Gemm", "Relu", "Add", "ReduceMean"}
    assert np.array_equal(stored("float.onnx")["b.weight"], model.b.weight.detach().numpy())
    assert report.max_difference < 1e-5 and report.rms_rounding == 0
    small = export_onnx(model, x, "small.onnx")
    assert (
        small.float32_bytes == report.file_bytes and small.size_ratio == small.file_bytes / report.file_bytes
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor, shift: Tensor, double: bool = False) -> dict[str, Tensor]:
        x = self.tokens(tokens) + shift
        mixed, weights = self.attention(x, x, x)
        return {"logits": self.head(mixed.mean(1)) * (2 if double else 1), "weights": weights}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # torch's attention looks at shapes
@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_attention_embedding_and_several_inputs(form: str) -> None:
    model = Attention().eval()
    grid(model.tokens)
    grid(model.attention, param="in_proj_weight")
    quantize_input(model.attention, InputQuantizer(8, scale=0.03, **SIGNED))
    grid(model.attention.out_proj)
    quantized(model.head, InputQuantizer(8, scale=0.01, **SIGNED))
    tokens, shift = torch.randint(20, (6, 5)), torch.randn(6, 5, 16)
    x: Any = {"tokens": tokens, "shift": shift} if form == "mapping" else (tokens, shift, True)
    report = export_onnx(model, x, "attention.onnx")
    names = [value.name for value in onnx.load("attention.onnx").graph.input]
    assert names == (["tokens", "shift"] if form == "mapping" else ["x_0", "x_1"])
    assert {e.name: e.weight for e in report.layers} == dict.fromkeys(
        ("tokens.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"), "int8"
    )
    with torch.no_grad():
        expected = model(tokens[:3], shift[:3], form == "tuple")
    logits, weights = run("attention.onnx", tokens[:3], shift[:3])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-2, rtol=0)
    torch.testing.assert_close(weights, expected["weights"], atol=1e-2, rtol=0)


def test_shared_weights_are_stored_once() -> None:
    layer = quantized(nn.Linear(64, 64))
    once = export_onnx(nn.Sequential(layer), torch.randn(2, 64), "once.onnx")
    twice = export_onnx(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 64), "twice.onnx")
    assert twice.file_bytes < once.file_bytes + 1000
    tied = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    tied[2].weight = tied[0].weight
    for part in (tied[0], tied[2]):
        quantized(part)
    assert export_onnx(tied, torch.randn(2, 64), "tied.onnx").file_bytes < once.file_bytes + 2000


def test_half_precision_models_are_exported_in_float32() -> None:
    model = nn.Sequential(quantized(nn.Linear(16, 8).half()))
    export_onnx(model, torch.randn(4, 16), "half.onnx")
    file, code = stored("half.onnx"), codes.read(model[0], "weight")
    assert np.array_equal(file["0.weight"], code.arrays(model[0].weight)["codes"].numpy())


@pytest.mark.parametrize("check", [True, False])
def test_a_file_that_disagrees_is_not_kept(check: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("net.onnx").write_bytes(b"earlier")
    init = StoredIntegers.__init__

    def wrong(self: Any, value: Tensor, integers: Tensor, scale: Tensor, *rest: Any) -> None:
        init(self, value, integers, scale * 1.5, *rest)

    monkeypatch.setattr(StoredIntegers, "__init__", wrong)
    model, x = net(), torch.randn(8, 3, 12, 12)
    if check:
        with pytest.raises(
            ValueError, match=r"the file is not kept: its outputs in ONNX Runtime differ .* allowed is"
        ):
            export_onnx(model, x, "net.onnx")
        assert Path("net.onnx").read_bytes() == b"earlier"
    else:
        report = export_onnx(model, x, "net.onnx", check=False)
        assert np.isnan(report.top1_agreement) and report.samples == 0
        assert "onnxruntime" not in report.versions and " -\n" in str(report)
    assert [p.name for p in Path.cwd().iterdir()] == ["net.onnx"]


def test_errors_say_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(2, 3, 12, 12)
    for options, message in (
        ({"precision": "int4"}, "precision='int4' is unknown; allowed: int8, float32"),
        ({"opset": 12}, "opset=12: allowed is 13 to 20"),
        ({"precision": "float32", "reduce_range": True}, "reduce_range=True is for precision='int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_onnx(model, x, "net.onnx", **options)
    with pytest.raises(ValueError, match=r"the folder of path='nowhere/net\.onnx' does not exist"):
        export_onnx(model, x, "nowhere/net.onnx")
    with pytest.raises(ValueError, match="0: dynamic activations of 4 bits have no form in ONNX"):
        export_onnx(
            nn.Sequential(quantized(nn.Linear(3, 3), InputQuantizer(4))), torch.ones(1, 3), "net.onnx"
        )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-compress\[onnx\]"'):
        export_onnx(model, x, "net.onnx")
    assert export_onnx(model, x, "net.onnx", check=False).samples == 0


def test_fourier_transforms_are_refused() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = quantized(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.irfft(2 * torch.fft.rfft(x), n=8))

    with pytest.raises(
        ValueError, match=r"Spectral computes fft_c2r, fft_r2c, and ONNX has no complex numbers"
    ):
        export_onnx(Spectral(), torch.randn(2, 8), "fft.onnx")


@pytest.mark.parametrize("opset", [13, 20])
def test_other_opsets(opset: int) -> None:
    report = export_onnx(net(), torch.randn(4, 3, 12, 12), "net.onnx", opset=opset)
    assert report.opset == onnx.load("net.onnx").opset_import[0].version == opset


def test_resnet_from_quantize_to_file() -> None:
    """The way a user goes: fold, calibrate, export."""
    torch.manual_seed(0)
    model = lc.models.ResNetCIFAR(8).eval()
    x = torch.randn(32, 3, 16, 16)
    result = lc.compress(
        model, [lc.FuseBatchNorm(), lc.Quantize(8, activation_bits=8)], example_input=x[:2], data=x
    )
    report = export_onnx(result.model, x, "resnet.onnx")
    assert all(e.weight == "int8" and e.reason == "" for e in report.layers) and len(report.layers) == 8
    assert report.size_ratio < 0.32 and report.top1_agreement >= 0.9
    assert report.rms_difference < report.rms_rounding
