"""What flipped bits in the stored codes do to the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lightning_compress import codes
from lightning_compress.analysis.combined import LIMIT
from lightning_compress.analysis.judge import Judge
from lightning_compress.analysis.outcome import best_row
from lightning_compress.analysis.techniques import seed_of
from lightning_compress.metrics import inject_bit_errors

if TYPE_CHECKING:
    from lightning_compress.analysis.result import Analysis

ORIGINAL = "original"
Curve = tuple[tuple[float, float], ...]


def bit_error_curve(
    analysis: Analysis,
    rates: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2),
    kind: str = "random",
    names: Sequence[str] | None = None,
) -> dict[str, Curve]:
    """Output error rate over the rate of flipped bits, for each way to store weights.

    Inputs and the original's outputs are those of the analysis. An output that is not finite counts as wrong in a
    classification; in a regression the error is then infinite.

    Args:
        analysis: what ``analyze`` returned.
        rates: shares of flipped bits.
        kind: as ``metrics.inject_bit_errors`` takes it.
        names: of rows, and "original"; None: the original, and of each kind of code the row of largest ratio with an
            error up to 10 %.

    Returns:
        Name of the row -> (rate, output error rate) pairs.

    Raises:
        ValueError: an unknown row or kind, a rate that it cannot have, or weights alone.
    """
    judge = analysis.workshop.judge
    if judge is None:
        raise ValueError("weights alone have no outputs: pass model= to analyze.")
    chosen = _representatives(analysis) if names is None else list(names)
    found = {}
    for name in chosen:
        model = analysis.workshop.model if name == ORIGINAL else analysis.models(name)[name]
        seed = seed_of(analysis.about.seed, f"bit errors of {name}")
        found[name] = tuple((rate, _error(judge, model, rate, kind, seed)) for rate in rates)
    return found


def _representatives(analysis: Analysis) -> list[str]:
    """The original, and the best row of every kind of code."""
    rows = [row for row in analysis.rows if row.status == "ok" and row.group != "combined"]
    by_kind: dict[str, list[str]] = {}
    for row in rows:
        kinds = {code.kind for *_, code in codes.of(analysis.workshop.load(row.name))}
        if len(kinds) == 1:
            by_kind.setdefault(kinds.pop(), []).append(row.name)
    best = [best_row([row for row in rows if row.name in members], LIMIT) for members in by_kind.values()]
    return [ORIGINAL, *(row.name for row in best if row is not None)]


def _error(judge: Judge, model: nn.Module, rate: float, kind: str, seed: int) -> float:
    return judge(inject_bit_errors(model, rate, kind, seed).model, broken=True).ber
