"""The grid of a layer's inputs and outputs, from what was seen of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.connections import follow
from lightning_compress.functional.affine import choose_qparams, integer_range
from lightning_compress.functional.calibrators import calibrate
from lightning_compress.stats import Stats
from lightning_compress.stats.matrices import has_gram
from lightning_compress.targets import Target

SYMMETRIC_ONLY = ("sawb",)


def refusal(target: Target) -> str | None:
    """Why the inputs of a target's layer cannot be quantized, or None."""
    module = target.module
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "its inputs are indices"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "a recurrent layer makes its own inputs"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "the attention around it multiplies its weight itself"
    return None


def passed_on(model: nn.Module, targets: Sequence[Target], example: Any) -> set[str]:
    """Layers whose output nothing sees but one other target, through ReLU, pooling or reshaping at most.

    Args:
        model: any module; it is left as it was.
        targets: the layers that round their inputs.
        example: one input.

    Returns:
        Their names.
    """
    seen = follow(model, example)
    before = [seen.predecessor(t.module) for t in targets if has_gram(t)]
    alone = {id(found.layer) for found in before if found is not None and found.consumers == 1}
    return {t.name for t in targets if id(t.module) in alone}


def without_output(decided: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a layer's quantizers without that of its output."""
    return {slot: config for slot, config in decided.items() if slot != "output_quantizer"}


def static(seen: Stats, bits: int, calibrator: str, percentile: float, scale: str) -> dict[str, Any]:
    """Configurations of the quantizers of a layer: of its input, and of its output if that was measured.

    Args:
        seen: ranges and histograms.
        bits: 2 to 16.
        calibrator: name of the rule.
        percentile: for calibrator="percentile".
        scale: "float" or "po2".

    Returns:
        "input_quantizer" and perhaps "output_quantizer" -> configuration of an ``InputQuantizer``.
    """
    pairs = {
        "input_quantizer": (seen.histogram, seen.input_range),
        "output_quantizer": (seen.output_histogram, seen.output_range),
    }
    return {
        slot: choose(*histogram, extremes, bits, calibrator, percentile, scale)
        for slot, (histogram, extremes) in pairs.items()
        if histogram is not None and extremes is not None
    }


def choose(
    counts: Tensor,
    upper: float,
    extremes: tuple[float, float],
    bits: int,
    calibrator: str,
    percentile: float,
    scale: str = "float",
) -> dict[str, Any]:
    """The static grid of values of which a histogram is known.

    It is unsigned, ``0 ... 2^b - 1``. Values that are never negative get ``s = T / (2^b - 1)`` and z = 0, others
    ``s = (hi - lo) / (2^b - 1)`` and ``z = -round(lo / s)``: behind GELU or SiLU, which reach little below zero, a
    symmetric grid would leave half of its levels unused.

    Args:
        counts: of 2 x 2048 equal bins on [-upper, upper).
        upper: end of the histogram.
        extremes: smallest and largest value.
        bits: 2 to 16.
        calibrator: name of the rule that gives T.
        percentile: for calibrator="percentile".
        scale: "float", or "po2" for a power of two.

    Returns:
        Configuration of an ``InputQuantizer``.

    Examples:
        >>> counts = torch.zeros(4096)
        >>> counts[2048:3072] = 1.0  # 0 ... 0.5
        >>> chosen = choose(counts, 1.0, (0.0, 0.5), 8, "minmax", 99.99)
        >>> chosen["qmin"], chosen["qmax"], round(chosen["scale"] * 255, 3)
        (0, 255, 0.5)
    """
    symmetric = extremes[0] >= 0
    qmin, qmax = integer_range(bits, signed=False, narrow=False)
    if calibrator == "minmax" or extremes[0] == extremes[1]:
        lo, hi = torch.tensor([extremes[0]]), torch.tensor([extremes[1]])
    else:
        width = 2 * upper / len(counts)
        centres = -upper + width * (torch.arange(len(counts), dtype=torch.float64) + 0.5)
        centres = centres.clamp(*extremes)  # the outermost bins are not full
        centres[len(counts) // 2] = 0.0  # the zeros of a ReLU, which are no small positive values
        seen = counts > 0
        lo, hi = calibrate(
            calibrator,
            centres[seen].float().view(1, -1),
            qmin=qmin,
            qmax=qmax,
            symmetric=symmetric,
            percentile=percentile,
            weights=counts[seen].view(1, -1),
        )
    step, zero = choose_qparams(lo, hi, qmin, qmax, symmetric=symmetric, power_of_two=scale == "po2")
    return {"bits": bits, "scale": float(step), "zero_point": int(zero), "qmin": qmin, "qmax": qmax}
