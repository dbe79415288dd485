"""Rounding that knows the inputs: errors made up for inside a layer, and biases on the steps of the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress import codes
from lightning_compress.functional.rounding import compensated_codes
from lightning_compress.quantization.codes import Affine, GridCode
from lightning_compress.stats.matrices import bias_of, has_gram, matrices, weight_like
from lightning_compress.targets import Target

_SWEEPS = 2  # of the polish after rounding column by column; each takes a third of its time


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
    parts = [matrices(target, t.contiguous()) for t in (weight, *expanded)]
    kept = None if mask is None else matrices(target, mask.cpu())
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
    return weight_like(target, torch.stack(rows))


def make_bias_an_integer(
    target: Target, decided: dict[str, Any], quantizer: Mapping[str, Any] | None
) -> None:
    """Round the bias beside a weight to a multiple of ``s_x s_w``, the step in which integer products are summed.

    Nothing happens where there is no such step: without a static quantizer of inputs, or with a scale for every run of
    inputs. Nor where a value is more of these steps than int32 holds, as with 16 bits of both: it would be clipped.

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
    integers = (decided.get("bias", bias).detach().cpu().double() / scale).round()
    if bool((integers.abs() <= torch.iinfo(torch.int32).max).all()):
        decided["bias"] = (integers * scale).to(bias.dtype)
