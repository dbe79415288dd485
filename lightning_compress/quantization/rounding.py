"""Rounding that knows the inputs: errors made up for inside a layer, and biases shifted by what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.functional.rounding import compensated_codes
from lightning_compress.quantization.codes import Affine, GridCode
from lightning_compress.stats import Calibration, Stats, collect
from lightning_compress.targets import Target

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_SWEEPS = 2  # of the polish after rounding column by column; each takes a third of its time
_GRAM_BYTES = 1 << 30  # Gram matrices measured in one pass


def has_gram(target: Target) -> bool:
    """Whether a target is the real weight matrix of a linear layer or a convolution."""
    return isinstance(target.module, _LAYERS) and target.param == "weight" and not target.weight.is_complex()


def bias_of(target: Target) -> nn.Parameter | None:
    """The bias beside a weight, or None."""
    return target.module._parameters.get("bias")


def collected(
    model: nn.Module, targets: Sequence[Target], inputs: Calibration, wanted: Mapping[str, Sequence[str]]
) -> dict[str, Stats]:
    """Statistics of every target, in as many passes as the Gram matrices need to fit into memory.

    Args:
        model: any module.
        targets: its weights.
        inputs: calibration inputs.
        wanted: target key -> fields of ``Stats``.

    Returns:
        Target key -> statistics.
    """
    found: dict[str, Stats] = {}
    by_fields: dict[tuple[str, ...], list[Target]] = {}
    for t in targets:
        if wanted[t.key]:
            by_fields.setdefault(tuple(wanted[t.key]), []).append(t)
    for fields, members in by_fields.items():
        passes: list[list[Target]] = [[]]
        room = _GRAM_BYTES
        for t in members:
            need = 8 * (t.weight.numel() // t.weight.shape[t.axes.out]) ** 2 if "gram" in fields else 0
            if need > room and passes[-1]:
                passes.append([])
                room = _GRAM_BYTES
            passes[-1].append(t)
            room -= need
        for part in passes:
            found |= collect(model, part, inputs, list(fields))
    return found


def _matrices(target: Target, values: Tensor) -> Tensor:
    """A weight-like tensor as ``[groups, out / groups, in x kernel]``, and back by ``_weight_like``."""
    groups = int(getattr(target.module, "groups", 1))
    if isinstance(target.module, _TRANSPOSED):
        split = values.view(groups, values.shape[0] // groups, *values.shape[1:])
        return split.transpose(1, 2).flatten(2)
    return values.reshape(groups, values.shape[0] // groups, -1)


def _weight_like(target: Target, matrices: Tensor) -> Tensor:
    shape = target.weight.shape
    if isinstance(target.module, _TRANSPOSED):
        groups = len(matrices)
        split = matrices.view(groups, shape[1], shape[0] // groups, *shape[2:])
        return split.transpose(1, 2).reshape(shape)
    return matrices.reshape(shape)


def compensated(target: Target, code: GridCode, gram: Tensor) -> Tensor:
    """Integers that minimize the error of the layer's output, on the grid of ``code``.

    Args:
        target: linear layer or convolution.
        code: its grid.
        gram: of its inputs, [D, D] or [groups, D, D].

    Returns:
        Integers of the weight's shape.

    Source: Frantar et al. 2022, GPTQ.
    """
    assert isinstance(code, Affine)
    weight = target.weight.detach().cpu()
    mask = codes.current_mask(target)
    expanded = [code.groups.expand(code.scale, weight.shape).expand(weight.shape)]
    zero = code.zero_point
    expanded.append(
        torch.zeros_like(expanded[0])
        if zero is None
        else code.groups.expand(zero, weight.shape).expand(weight.shape)
    )
    parts = [_matrices(target, t.contiguous()) for t in (weight, *expanded)]
    kept = None if mask is None else _matrices(target, mask.cpu())
    grams = gram.cpu().view(len(parts[0]), *gram.shape[-2:])
    rows = [
        compensated_codes(
            parts[0][g],
            grams[g],
            parts[1][g],
            parts[2][g],
            code.qmin,
            code.qmax,
            mask=None if kept is None else kept[g],
            sweeps=_SWEEPS,
        )
        for g in range(len(parts[0]))
    ]
    return _weight_like(target, torch.stack(rows))


def make_bias_an_integer(
    target: Target, decided: dict[str, Any], quantizer: Mapping[str, Any] | None
) -> None:
    """Round the bias beside a weight to a multiple of ``s_x s_w``, the step in which integer products are summed.

    Nothing happens where there is no such step: without a static quantizer of inputs, or with a scale for every run of
    inputs.

    Args:
        target: linear layer or convolution.
        decided: about its weight; gets or changes "bias".
        quantizer: configuration of the quantizer of its inputs.
    """
    bias, config = bias_of(target), decided["config"]
    fits = decided["kind"] == "affine" and not config["size"] and set(config["axes"]) <= {target.axes.out}
    if bias is None or not has_gram(target) or not fits or quantizer is None or quantizer["scale"] is None:
        return
    scale = decided["arrays"]["scale"].double() * quantizer["scale"]
    if len(scale) not in (1, len(bias)):
        return
    value = decided.get("bias", bias).detach().cpu().double()
    most = torch.iinfo(torch.int32).max
    decided["bias"] = ((value / scale).round().clamp(-most, most) * scale).to(bias.dtype)


def corrected(target: Target, bias: Tensor, error: Tensor, mean: Tensor) -> Tensor:
    """``b_o + sum_j (W - W^)_oj E[x_j]``: the mean output is as it was.

    Args:
        target: linear layer or convolution.
        bias: b.
        error: W - W^.
        mean: E[x] of the input that every weight multiplies, broadcast against W.

    Returns:
        The new bias, on the CPU.

    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction.
    """
    shift = _matrices(target, error * mean.cpu().double().expand(error.shape)).sum(2).flatten()
    return (bias.detach().cpu().double() + shift).to(bias.dtype)
