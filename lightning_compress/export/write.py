"""``export_onnx``: a compressed model as a file of integers, compared with the model before it is kept."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress import codes
from lightning_compress.container import replacing
from lightning_compress.export.agreement import Agreement, agreement
from lightning_compress.export.integers import read_layers, reduce_range_, write_float, write_integers
from lightning_compress.export.report import ExportedLayer, ExportReport
from lightning_compress.export.trace import Flat, serialized
from lightning_compress.finalize import finalize
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.stats import Calibration
from lightning_compress.stats.running import first_tensor, move, unwrap
from lightning_compress.tables import reasons
from lightning_compress.targets import parameter

PRECISIONS = ("int8", "float32")
_OPSETS = (13, 20)  # DequantizeLinear knows axes; the last that torch's exporter knows
_OPSET = 17


def export_onnx(
    model: nn.Module,
    x: Any,
    path: str | os.PathLike[str],
    *,
    precision: str = "int8",
    dynamic_axes: bool = True,
    check: bool = True,
    reduce_range: bool = False,
    opset: int | None = None,
) -> ExportReport:
    """Write a model as an ONNX file that ONNX Runtime, or another integer runtime, runs.

    Weights on an integer grid of at most eight bits are int8 in the file, ``w = s (q - z)`` by DequantizeLinear with
    the layer's own scales; quantizers of activations are QuantizeLinear and DequantizeLinear; biases between the two
    are int32 with ``s = s_x s_w``. Other weights of at most 256 different values (shared ones, powers of two, small
    floats) are a float32 table and uint8 indices: a quarter of the bytes and no other gain, for a runtime computes with
    the floats. BatchNorm is folded where it can be. The report lists every quantized weight and says why one is not an
    integer in the file.

    Args:
        model: a quantized or shared model, also one with quantizers in training; it stays as it is.
        x: an example input: a tensor, a tuple of positional arguments or a dict of keyword arguments; samples first.
        path: the file; it is replaced only when the new one is complete and, with ``check``, agrees.
        precision: "int8", or "float32": the same weights as float32 and activations that are not rounded.
        dynamic_axes: whether the number of samples is free.
        check: run the file in ONNX Runtime on ``x`` and on random inputs, and refuse it if the outputs differ by more
            than one step and by more than rounding activations changes them (root mean square). A step is that of the
            output's quantizer, or of an 8-bit grid over the outputs if there is none.
        reduce_range: round weights again, to seven bits, for processors whose sums of u8 x s8 products saturate
            (x86 without VNNI). The check then compares with the model with these weights.
        opset: of ONNX, 13 to 20.

    Returns:
        Sizes, layers and agreement; ``print`` shows tables.

    Raises:
        ImportError: onnx, or for the check onnxruntime, is not installed.
        ValueError: an option outside its range; a model without such weights for precision="int8"; a quantizer that
            ONNX cannot express; or a file that does not agree, which is then not kept.

    Examples:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small = compress(net, [Quantize(8, activation_bits=8)], data=torch.randn(64, 64)).model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(small, torch.randn(8, 64), f"{folder}/net.onnx")
        >>> [(layer.name, layer.weight, layer.reason) for layer in report.layers]
        [('0.weight', 'int8', ''), ('2.weight', 'int8', '')]
        >>> report.within_step
        1.0

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """
    path = Path(path)
    opset = _OPSET if opset is None else opset
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; allowed: {', '.join(PRECISIONS)}.")
    if not _OPSETS[0] <= opset <= _OPSETS[1]:
        raise ValueError(f"opset={opset}: allowed is {_OPSETS[0]} to {_OPSETS[1]}.")
    if reduce_range and precision != "int8":
        raise ValueError("reduce_range=True is for precision='int8'.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of path={str(path)!r} does not exist: make it first.")
    versions = _versions(check)
    plain = _single(finalize(unwrap(model)))
    x = move(x, torch.device("cpu"))
    few = _few(x) if dynamic_axes else x
    notes = []
    if reduce_range:
        reduce_range_(plain)
        notes.append("reduce_range: weights were rounded again, to 7 bits, and so were those compared with.")
    fused, note = _fused(plain, few)
    notes += [note] if note else []
    bare = write_float(copy.deepcopy(fused))
    layers: tuple[ExportedLayer, ...] = ()
    data = serialized(Flat(bare, few), dynamic_axes, opset)
    float32_bytes = len(data)
    if precision == "int8":
        layers = write_integers(fused)
        data = serialized(Flat(fused, few), dynamic_axes, opset)
        layers = read_layers(fused, layers)
    found = Agreement()
    if check:
        rounded = precision == "int8"
        flat = Flat(plain if rounded else bare, x)
        found = agreement(flat, bare if rounded else None, data, dynamic_axes)
    with replacing(path) as file:
        file.write(data)
    return ExportReport(
        path=str(path),
        precision=precision,
        file_bytes=len(data),
        float32_bytes=float32_bytes,
        layers=layers,
        top1_agreement=found.top1,
        within_step=found.within_step,
        max_difference=found.max_difference,
        rms_difference=found.rms_difference,
        rms_rounding=found.rms_rounding,
        step=found.step,
        samples=found.samples,
        opset=opset,
        versions=versions,
        notes=tuple(notes),
    )


def _few(x: Any) -> Any:
    """Two samples of an input are enough to trace a model."""
    first = first_tensor(x)
    if first is None or not first.dim():
        return x
    return pytree.tree_map(
        lambda t: t[:2] if isinstance(t, Tensor) and t.shape[:1] == first.shape[:1] else t, x
    )


def _versions(check: bool) -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    try:
        import onnx

        found["onnx"] = onnx.__version__
        if check:
            import onnxruntime

            found["onnxruntime"] = onnxruntime.__version__
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs onnx, and onnxruntime for check=True ({error}): "
            'pip install "lightning-compress[onnx]".'
        ) from error
    return found


def _single(model: nn.Module) -> nn.Module:
    """The model in float32 on the CPU; weights on a grid are made from their integers."""
    stored = [
        (holder, param, code, code.arrays(parameter(holder, param)))
        for _, holder, param, code in codes.of(model)
        if code.stage == "grid" and code.matches(parameter(holder, param))
    ]
    model = model.cpu().float()
    with torch.no_grad():
        for holder, param, code, arrays in stored:
            weight = parameter(holder, param)
            weight.copy_(code.rebuild(arrays, weight.dtype))
    return model


def _fused(plain: nn.Module, x: Any) -> tuple[nn.Module, str]:
    """A copy with BatchNorm folded where it can be, and which stay."""
    fused = copy.deepcopy(plain)
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules()):
        return fused, ""
    fuse = FuseBatchNorm()
    plan = fuse.plan(fused, Calibration(example_input=x))
    fuse.apply(fused, plan)
    stays = {name: why for name, why in plan.skipped.items() if name}
    return fused, f"BatchNorm that is not folded:{reasons(stays)}" if stays else ""
