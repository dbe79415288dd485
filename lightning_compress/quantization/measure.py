"""How well grids serve weights in training, and where steps and clips stand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lightning_compress.functional.groups import real
from lightning_compress.quantization.learned import ClippedInput, LearnedWeight
from lightning_compress.quantization.training import given, input_quantizers, quantizer_of
from lightning_compress.targets import Target


@torch.no_grad()
def measure(target: Target) -> dict[str, float]:
    """How well the grid of a weight serves it.

    - ``sqnr_db``: ``10 log10(sum w^2 / sum (w - w^)^2)``, left out where nothing is lost
    - ``levels_used``: distinct integers / integers of the grid; a range that was lost shows as few
    - ``step``: mean learned step

    Args:
        target: one that ``install`` returned.

    Returns:
        Quantity -> value.
    """
    quantizer, weight = quantizer_of(target), given(target)
    if not quantizer.enabled:
        return {}
    found = {}
    values = real(weight).double()
    lost = float((values - real(quantizer(weight)).double()).square().sum())
    if lost > 0:
        found["sqnr_db"] = 10 * math.log10(max(float(values.square().sum()), 1e-300) / lost)
    code = quantizer.code(weight)
    integers = code.arrays(weight)["codes"].flatten().long()
    levels = 2 if code.width == 1 else getattr(code, "qmax", 2**code.width - 1) - getattr(code, "qmin", 0) + 1
    found["levels_used"] = len(torch.unique(integers)) / levels
    if isinstance(quantizer, LearnedWeight) and quantizer.bits > 1:
        found["step"] = float(quantizer.step.mean())
    return found


def measure_all(targets: Iterable[Target]) -> dict[str, float]:
    """``measure`` of every weight, and the grid of its layer's input, where they are finite.

    Args:
        targets: those that ``install`` returned.

    Returns:
        ``<quantity>/<layer>`` -> value; quantities of ``measure``, and ``input_step`` or PACT's ``alpha``.
    """
    values: dict[str, float] = {}
    for target in targets:
        layer = target.name or target.param
        values |= {f"{quantity}/{layer}": value for quantity, value in measure(target).items()}
        for quantizer in input_quantizers(target)[:1]:
            clip = isinstance(quantizer, ClippedInput)
            learned: Any = quantizer.alpha if clip else quantizer.scale
            if quantizer.active:
                values[f"{'alpha' if clip else 'input_step'}/{layer}"] = float(learned.detach())
    return {tag: value for tag, value in values.items() if math.isfinite(value)}
