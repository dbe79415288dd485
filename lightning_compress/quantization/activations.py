"""The grid of a layer's inputs and outputs, from what was seen of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.affine import choose_qparams, integer_range
from lightning_compress.functional.calibrators import calibrate
from lightning_compress.stats import Stats
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


def static(seen: Stats, bits: int, calibrator: str, percentile: float) -> dict[str, Any]:
    """Configurations of the quantizers of a layer: of its input, and of its output if that was measured.

    Args:
        seen: ranges and histograms.
        bits: 2 to 16.
        calibrator: name of the rule.
        percentile: for calibrator="percentile".

    Returns:
        "input_quantizer" and perhaps "output_quantizer" -> configuration of an ``InputQuantizer``.
    """
    pairs = {
        "input_quantizer": (seen.histogram, seen.input_range),
        "output_quantizer": (seen.output_histogram, seen.output_range),
    }
    return {
        slot: choose(*histogram, extremes, bits, calibrator, percentile)
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
) -> dict[str, Any]:
    """The static grid of values of which a histogram is known.

    Values that are never negative get the unsigned grid ``0 ... 2^b - 1`` with ``s = T / (2^b - 1)``, others the signed
    one ``-2^(b-1) ... 2^(b-1) - 1`` with ``s = T / (2^(b-1) - 1)``; z = 0 in both.

    Args:
        counts: of 2 x 2048 equal bins on [-upper, upper).
        upper: end of the histogram.
        extremes: smallest and largest value.
        bits: 2 to 16.
        calibrator: name of the rule that gives T.
        percentile: for calibrator="percentile".

    Returns:
        Configuration of an ``InputQuantizer``.

    Examples:
        >>> counts = torch.zeros(4096)
        >>> counts[2048:3072] = 1.0  # 0 ... 0.5
        >>> chosen = choose(counts, 1.0, (0.0, 0.5), 8, "minmax", 99.99)
        >>> chosen["qmin"], chosen["qmax"], round(chosen["scale"] * 255, 3)
        (0, 255, 0.5)
    """
    signed = extremes[0] < 0
    qmin, qmax = integer_range(bits, signed=signed, narrow=False)
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
            symmetric=True,
            percentile=percentile,
            weights=counts[seen].view(1, -1),
        )
    scale, _ = choose_qparams(lo, hi, qmin, qmax)
    return {"bits": bits, "scale": float(scale), "zero_point": 0, "qmin": qmin, "qmax": qmax}
