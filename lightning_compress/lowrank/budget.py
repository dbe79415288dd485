"""The ranks of all layers together: what loses least under a budget of parameters, MACs or ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.cost import cost
from lightning_compress.functional.allocate import multiple_choice_knapsack
from lightning_compress.lowrank.ranks import Cut, Rule, numbers, option
from lightning_compress.lowrank.schemes import Decomposition, Option, Scheme, Shapes
from lightning_compress.stats import Stats
from lightning_compress.targets import Target

COSTS = ("params", "macs", "rank")


def present_costs(
    model: nn.Module,
    targets: Sequence[Target],
    candidates: Mapping[str, Sequence[Scheme]],
    unit: str,
    x: Any,
) -> dict[str, int]:
    """What every target costs as it is.

    Args:
        model: the model.
        targets: all targets, also those without a scheme.
        candidates: target key -> schemes.
        unit: "params", "macs" (Fourier transforms left out) or "rank" (0 without a scheme).
        x: one input, for "macs".

    Returns:
        Target key -> cost. The MACs of a layer stand at its first weight.
    """
    if unit == "params":
        return {t.key: numbers(t.weight) for t in targets}
    if unit == "rank":
        return {
            t.key: max((sum(s.full(t.module, t.weight)) for s in candidates.get(t.key, ())), default=0)
            for t in targets
        }
    counted = {layer.name: layer.macs - layer.fft_macs for layer in cost(model, x).layers}
    return {t.key: int(counted.pop(t.name, 0)) for t in targets}


def allocate(
    rule: Rule,
    budget: tuple[str, float],
    targets: Sequence[Target],
    candidates: Mapping[str, Sequence[Scheme]],
    present: Mapping[str, int],
    seen: Mapping[str, Stats],
    calls: Mapping[str, Sequence[Shapes]],
) -> tuple[dict[str, Cut], str]:
    """``min sum_l e_l(r_l)`` subject to ``sum_l cost_l(r_l) <= share sum_l cost_l``; every layer may stay dense.

    Args:
        rule: bounds of the ranks.
        budget: unit and share.
        targets: all targets.
        candidates: target key -> schemes, for those that have any.
        present: what they cost now.
        seen: target key -> statistics of inputs.
        calls: target key -> shapes.

    Returns:
        Target key -> factors, for those that do not stay dense; and what was spent, in words.

    Raises:
        ValueError: the budget is below the smallest cost that can be reached.
    """
    unit, share = budget
    items: list[list[tuple[Decomposition | None, Option]]] = []
    costs: list[list[int]] = []
    for t in targets:
        now = present[t.key]
        entries: list[tuple[Decomposition | None, Option]] = [(None, Option("dense", (), 0, 0.0, 0.0))]
        prices = [now]
        for scheme in candidates.get(t.key, ()):
            cut = rule.decomposed(t, scheme, seen.get(t.key))
            for ranks in dict.fromkeys(rule.clip(r, cut.full) for r in cut.path()):
                choice = option(t, scheme, cut, ranks, calls.get(t.key, ()))
                spent = sum(ranks) if unit == "rank" else getattr(choice, unit)
                if spent < now:
                    entries.append((cut, choice))
                    prices.append(int(spent))
        items.append(entries)
        costs.append(prices)
    total, least = sum(present.values()), sum(map(min, costs))
    limit = math.floor(share * total)
    if least > limit:
        raise ValueError(
            f"budget={budget} allows {limit:,} {unit} of {total:,}, but rank {rule.min_rank} everywhere still "
            f"costs {least:,}: the smallest share that can be reached is {least / total:.4f}."
        )
    solved = multiple_choice_knapsack([[o.error for _, o in row] for row in items], costs, limit)
    chosen: dict[str, Cut] = {}
    for t, entries, k in zip(targets, items, solved.choice, strict=True):
        best, choice = entries[k]
        if best is not None:
            chosen[t.key] = best, choice
    gap = solved.gap / solved.loss if solved.loss else 0.0
    return chosen, (
        f"{unit}={solved.cost} budget={limit} of={total} error={solved.loss:.4g} bound={solved.bound:.4g} gap={gap:.2%}"
    )
