"""Bits by measurement: what every layer loses at every number of bits, and the best choice under a size budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_compress.functional.allocate import Allocation, multiple_choice_knapsack
from lightning_compress.functional.groups import real
from lightning_compress.stats import Calibration, collect
from lightning_compress.stats.running import call, evaluating, first_tensor
from lightning_compress.targets import Target

MEASURES = ("auto", "weight", "output", "fisher")
_OUTPUT_SAMPLES = 128  # one forward pass per layer and candidate: more would take long and rank no better

Rounded = Callable[[Target, int], Tensor]  # a target's weight at so many bits


def measure(
    model: nn.Module,
    targets: Sequence[Target],
    candidates: Sequence[int],
    rounded: Rounded,
    how: str,
    data: Calibration | None,
) -> list[list[float]]:
    r"""The loss Omega_l(b) of every layer at every number of bits, all other layers left alone.

    - "weight": ``|W - W^|^2 / |W|^2``
    - "fisher": ``sum E[g^2] (w - w^)^2``
    - "output": ``|f(x) - f_l(x)|^2 / |f(x)|^2`` over at most 128 samples

    Args:
        model: any module; it is left as it was.
        targets: its weights.
        candidates: numbers of bits.
        rounded: gives the weight of a target at so many bits.
        how: one of ``MEASURES`` but "auto".
        data: calibration inputs, for "output" and "fisher".

    Returns:
        One row per target, one entry per candidate.

    Source: Cai et al. 2020, ZeroQ; Dong et al. 2019, HAWQ.
    """
    if how == "weight":

        def lost(target: Target, bits: int) -> float:
            weight = target.weight.detach()
            return float(_square(weight - rounded(target, bits)) / _square(weight).clamp_min(1e-30))

    elif how == "fisher":
        assert data is not None
        seen = collect(model, targets, data, ["gradient"])

        def lost(target: Target, bits: int) -> float:
            gradient = seen[target.key].gradient
            assert gradient is not None
            error = (target.weight.detach() - rounded(target, bits)).abs().double().square()
            return float((gradient.double() * error).sum())

    else:
        assert data is not None
        few = replace(data, samples=min(data.samples, _OUTPUT_SAMPLES))
        batches = list(few.batches(model))
        reference = _outputs(model, batches)
        size = _square(reference).clamp_min(1e-30)

        def lost(target: Target, bits: int) -> float:
            weight = target.weight
            kept = weight.detach().clone()
            try:
                weight.data.copy_(rounded(target, bits))
                return float(_square(_outputs(model, batches) - reference) / size)
            finally:
                weight.data.copy_(kept)

    pairs = [(t, b) for t in targets for b in candidates]
    shown = tqdm(pairs, desc="sensitivity", unit="layer", leave=False, disable=how == "weight", delay=2)
    losses = [lost(target, bits) for target, bits in shown]
    width = len(candidates)
    return [losses[i : i + width] for i in range(0, len(losses), width)]


def allocate(
    losses: Sequence[Sequence[float]],
    targets: Sequence[Target],
    candidates: Sequence[int],
    budget: float,
    fixed: Mapping[str, int],
) -> tuple[dict[str, int], Allocation]:
    """The bits of least total loss whose mean, weighted by entries, is at most the budget.

    A loss that rises with the bits is measurement noise: more bits never count as worse.

    Args:
        losses: from ``measure``, for targets that are not fixed.
        targets: all targets.
        candidates: numbers of bits, ascending.
        budget: mean bits per entry.
        fixed: target key -> bits that are given; they count in the mean.

    Returns:
        Target key -> bits, and the solved problem with its gap.

    Raises:
        ValueError: a budget below what can be reached.
    """
    sizes = {t.key: real(t.weight).numel() for t in targets}
    free = [t for t in targets if t.key not in fixed]
    spent = sum(sizes[key] * bits for key, bits in fixed.items())
    total = math.floor(budget * sum(sizes.values()) + 1e-9)
    least = spent + sum(sizes[t.key] * min(candidates) for t in free)
    if least > total:
        raise ValueError(
            f"budget={budget} bits per weight is below what candidates={tuple(candidates)} and the fixed layers can "
            f"reach: allowed is >= {least / sum(sizes.values()):.4g}."
        )
    monotone = [[max(row[i:]) for i in range(len(row))] for row in losses]
    costs = [[sizes[t.key] * b for b in candidates] for t in free]
    solved = multiple_choice_knapsack(monotone, costs, total - spent)
    chosen = {t.key: candidates[i] for t, i in zip(free, solved.choice, strict=True)}
    return {**fixed, **chosen}, solved


def _square(x: Tensor) -> Tensor:
    return x.detach().abs().double().square().sum()


def _outputs(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    with evaluating(model):
        found = [first_tensor(call(model, batch)) for batch in batches]
    return torch.cat([t.double().flatten() for t in found if t is not None])
