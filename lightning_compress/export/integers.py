"""Which weights become integers in a file, in what form, and why others do not."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.codes import Code
from lightning_compress.export.nodes import RoundedValues, StoredIntegers, StoredValues, integer_type
from lightning_compress.export.report import ExportedLayer
from lightning_compress.names import clean
from lightning_compress.quantization.codes import Affine
from lightning_compress.quantization.layers import (
    input_quantizer,
    output_quantizer,
    quantize_input,
    quantize_weight,
    release,
    weight_quantizer,
)
from lightning_compress.quantization.quantizers import InputQuantizer
from lightning_compress.tables import reasons
from lightning_compress.targets import parameter

_BYTES = (torch.int8, torch.uint8)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_INT32 = 2**31 - 1
_REDUCED_BITS = 7
_TABLE = 256  # values that indices of a byte tell apart


def write_float(model: nn.Module) -> nn.Module:
    """Take all quantizers off, in place: weights stay on their grid, activations are not rounded.

    Args:
        model: a finalized model.

    Returns:
        The same module.
    """
    for module in model.modules():
        release(module)
    return model


def write_integers(model: nn.Module) -> tuple[ExportedLayer, ...]:
    """Replace weights of few values and quantizers by what the exporter writes as integers, in place.

    Args:
        model: a finalized model in float32, BatchNorm folded.

    Returns:
        One entry for each weight with a code, in the order of the model.

    Raises:
        ValueError: no weight becomes integers, or a quantizer has no form in ONNX.
    """
    found: list[ExportedLayer] = []
    quantizers = {
        name: (module, input_quantizer(module), output_quantizer(module))
        for name, module in model.named_modules()
        if input_quantizer(module) is not None or output_quantizer(module) is not None
    }
    for name, (_, *both) in quantizers.items():
        for quantizer in both:
            _check(clean(name), quantizer)
    rounded = {module: before for module, before, _ in quantizers.values()}
    for module in model.modules():
        release(module)
    for name, holder, param, attached in list(codes.of(model)):
        code = attached.arithmetic
        if code.stage == "grid":
            found.append(_write(name, holder, param, code, rounded.get(holder)))
            _tie(model, holder, param)
    for module, before, after in quantizers.values():
        for quantizer, output in ((before, False), (after, True)):
            if quantizer is not None:
                node = cast(Any, RoundedValues(cast(InputQuantizer, quantizer)))
                quantize_input(module, node, output=output)
    if not any(layer.weight != "float32" for layer in found):
        why = reasons({x.name: x.reason for x in found}) or " no weight is quantized."
        raise ValueError(
            f"{type(model).__name__} has no weight that int8 ONNX could store; precision='float32' stores it as it is:"
            f"{why}"
        )
    return tuple(found)


def read_layers(model: nn.Module, layers: tuple[ExportedLayer, ...]) -> tuple[ExportedLayer, ...]:
    """What is in the file after the model has run: a weight that nothing read is not.

    Args:
        model: what ``write_integers`` changed.
        layers: what it returned.

    Returns:
        The same entries; those of weights that were not read say so.
    """
    nodes = {name: weight_quantizer(holder, param) for name, holder, param, _ in codes.of(model)}
    stored = StoredIntegers | StoredValues
    unread = {name for name, node in nodes.items() if isinstance(node, stored) and not node.used}
    why = "not in the file: the model did not read it on this input"
    return tuple(
        dataclasses.replace(x, weight="float32", reason=why) if x.name in unread else x for x in layers
    )


def _check(name: str, quantizer: Any) -> None:
    if quantizer is None:
        return
    if not isinstance(quantizer, InputQuantizer):
        raise ValueError(f"{name}: {type(quantizer).__name__} has no form in ONNX; finalize the model first.")
    if quantizer.dynamic and (quantizer.qmin, quantizer.qmax) != (0, 255):
        raise ValueError(
            f"{name}: dynamic activations of {quantizer.bits} bits have no form in ONNX, whose "
            "DynamicQuantizeLinear has unsigned 8: use these, or mode='static'."
        )


def refusal(holder: nn.Module, param: str, code: Code) -> str | None:
    """Why a weight stays float32 in the file, or None.

    Args:
        holder: the module that holds the weight.
        param: its name there.
        code: how it can be stored.

    Returns:
        The reason.
    """
    if "." in param or param not in holder._parameters:
        return "it lies inside a module of its own"
    if isinstance(holder, nn.RNNBase):
        return "ONNX's recurrent layers take float weights"
    weight = parameter(holder, param)
    if weight.is_complex():
        return "it is complex"
    if not code.matches(weight):
        return "it has left its values since it was compressed: compress it again"
    if not isinstance(code, Affine):
        count = len(torch.unique(weight.detach()))
        if count > _TABLE:
            return f"it has {count} different values, and indices of a byte tell {_TABLE} apart"
        return "as float32 it takes no more" if 4 * count >= 3 * weight.numel() else None
    if code.dtype not in _BYTES:
        return f"{code.width} bits are more than int8 holds"
    if code.size and weight.numel() // weight.shape[code.axes[0]] % code.size:
        return "its last run of inputs is shorter than the others"
    return None


def _write(name: str, holder: nn.Module, param: str, code: Code, before: Any) -> ExportedLayer:
    taken = "float32"
    if before is not None and param == "weight":
        dtype = integer_type(before)
        taken = "float32" if dtype is None else ("dynamic " if before.dynamic else "") + _short(dtype)
    why = refusal(holder, param, code)
    if why is not None:
        return ExportedLayer(name, "float32", taken, why)
    weight = parameter(holder, param).detach()
    if not isinstance(code, Affine):
        table, indices = torch.unique(weight, return_inverse=True)
        quantize_weight(holder, param, cast(Any, StoredValues(table, indices.to(torch.uint8))))
        return ExportedLayer(name, "uint8 indices", taken, "a table of its values: products in float32")
    stored = _stored(weight, code)
    quantize_weight(holder, param, cast(Any, stored))
    if stored.moved is not None:
        why = "its scales change along its inputs: products in float32"
    elif taken == "float32":
        wide = before is not None and integer_type(before) is None and param == "weight"
        why = (
            f"{before.bits}-bit inputs are rounded in float32"
            if wide
            else "weights only: its inputs are float32"
        )
    elif not before.dynamic:
        why = _write_bias(holder, stored, before)
    return ExportedLayer(name, _short(stored.codes.dtype), taken, why or "")


def _tie(model: nn.Module, holder: nn.Module, param: str) -> None:
    """Let every module that reads the same Parameter read what stands in for it."""
    stored = weight_quantizer(holder, param)
    if stored is None:
        return
    for module in list(model.modules()):
        for other, weight in module._parameters.items():
            same = weight is holder._parameters[param] and codes.read(module, other) is None
            if same and not isinstance(module, nn.RNNBase):
                quantize_weight(module, other, stored)


def _stored(weight: Tensor, code: Affine) -> StoredIntegers:
    """The integers with a scale for each index of an axis, or as rows with a scale each."""
    integers = code.arrays(weight)["codes"]
    zero = torch.zeros_like(code.scale, dtype=torch.int32) if code.zero_point is None else code.zero_point
    zero = zero.to(integers.dtype)
    if not code.size and not code.axes:
        return StoredIntegers(weight, integers, code.scale[0], zero[0], None)
    if not code.size and len(code.axes) == 1:
        return StoredIntegers(weight, integers, code.scale, zero, code.axes[0])
    (rows,) = code.groups.blocks(integers)
    order = [*code.axes, *(a for a in range(weight.dim()) if a not in code.axes)]
    back = [order.index(a) for a in range(weight.dim())]
    return StoredIntegers(weight, rows, code.scale, zero, 0, ([weight.shape[a] for a in order], back))


def _write_bias(layer: nn.Module, stored: StoredIntegers, before: InputQuantizer) -> str | None:
    """Store a bias as int32 with ``s = s_x s_w``; the reason if that cannot be."""
    bias, out = layer._parameters.get("bias"), 1 if isinstance(layer, _TRANSPOSED) else 0
    if bias is None or not isinstance(layer, _LINEAR):
        return None
    if stored.axis not in (None, out):
        return "its scales change along its inputs: products in float32"
    scale = before.scale.float() * stored.scale
    if stored.axis is not None:  # groups of a transposed convolution share them
        scale = scale.repeat(bias.numel() // scale.numel())
    integers = (bias.detach().double() / scale.double()).round()
    if float(integers.abs().max()) > _INT32:
        return "its bias is too large for int32: float32 products"
    axis = None if stored.axis is None else 0
    node = StoredIntegers(bias, integers.to(torch.int32), scale, None, axis)
    quantize_weight(layer, "bias", cast(Any, node))
    return None


def reduce_range_(model: nn.Module) -> None:
    """Round weights on integer grids of more than seven bits again, to seven, in place; quantizers stay.

    Sums of two products u8 x s7 fit into 16 bits, those of u8 x s8 do not.

    Args:
        model: a finalized model.
    """
    for _, holder, param, attached in list(codes.of(model)):
        code = attached.arithmetic
        if isinstance(code, Affine) and code.width > _REDUCED_BITS and refusal(holder, param, code) is None:
            weight, narrow = parameter(holder, param), _narrowed(code)
            with torch.no_grad():
                weight.copy_(narrow.project(weight.detach()))
            codes.attach(holder, param, narrow)


def _narrowed(code: Affine) -> Affine:
    """The grid with the same ends and half as many integers."""
    qmin, qmax = -(-code.qmin // 2), code.qmax // 2
    ratio = (code.qmax - code.qmin) / (qmax - qmin)
    zero = code.zero_point
    if zero is not None:
        zero = (zero / ratio).round().clamp(qmin, qmax).to(torch.int32)
    return dataclasses.replace(
        code, scale=code.scale * ratio, zero_point=zero, qmin=qmin, qmax=qmax, width=_REDUCED_BITS
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
