"""Bits by measurement: what every layer loses at every number of bits, and the best choice under a size budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from lightning_compress.functional.allocate import Allocation, multiple_choice_knapsack
from lightning_compress.functional.groups import real
from lightning_compress.stats import Calibration
from lightning_compress.stats.sensitivity import MEASURES
from lightning_compress.stats.sensitivity import losses as losses_of
from lightning_compress.targets import Target

__all__ = ["MEASURES", "allocate", "measure"]

Rounded = Callable[[Target, int], Tensor]  # a target's weight at so many bits


def measure(
    model: nn.Module,
    targets: Sequence[Target],
    candidates: Sequence[int],
    rounded: Rounded,
    how: str,
    data: Calibration | None,
) -> list[list[float]]:
    """The loss of every layer at every number of bits, all other layers left alone.

    Args:
        model: any module; it is left as it was.
        targets: its weights.
        candidates: numbers of bits.
        rounded: gives the weight of a target at so many bits.
        how: a measure of ``lightning_compress.stats.sensitivity.losses``.
        data: calibration inputs, for "output" and "fisher".

    Returns:
        One row per target, one entry per candidate.

    Source: Cai et al. 2020, ZeroQ; Dong et al. 2019, HAWQ.
    """
    pairs = [(t, b) for t in targets for b in candidates]
    found, width = losses_of(model, pairs, rounded, how, data), len(candidates)
    return [found[i : i + width] for i in range(0, len(found), width)]


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
