"""Words next to the numbers: bands of ratio and error, what to do in four situations, what a reader must know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lightning_compress.analysis.outcome import Outcome
from lightning_compress.analysis.rows import Row
from lightning_compress.plots.rows import scored, stored


class Band(NamedTuple):
    """A range of values, the lower end inclusive.

    Args:
        low: first value of the band.
        high: first value of the next band.
        word: its name.
        use: what it is good for.
    """

    low: float
    high: float
    word: str
    use: str

    def holds(self, value: float) -> bool:
        """Whether a value lies in the band; NaN lies in none."""
        return self.low <= value < self.high

    def limits(self) -> str:
        """The range in figures."""
        if self.high == float("inf"):
            return f"{self.low:g} and more"
        return f"less than {self.high:g}" if self.low <= 0 else f"{self.low:g} to {self.high:g}"


_INF = float("inf")
RATIO_BANDS = (
    Band(0, 1, "larger than dense", "not worth it"),
    Band(1, 2, "modest", "where accuracy is critical"),
    Band(2, 4, "moderate", "balanced"),
    Band(4, 8, "good", "mobile devices"),
    Band(8, 16, "high", "small devices"),
    Band(16, _INF, "very high", "the smallest devices; look at the error first"),
)
ERROR_BANDS = (
    Band(0, 0.05, "excellent", "use as it is"),
    Band(0.05, 0.15, "good", "test on the task"),
    Band(0.15, 0.30, "moderate", "fine-tune"),
    Band(0.30, _INF, "poor", "do not use without training"),
)


def word(bands: Sequence[Band], value: float) -> str:
    """The name of the band that a value lies in.

    Args:
        bands: ``RATIO_BANDS`` or ``ERROR_BANDS``.
        value: a compression ratio or an output error rate.

    Returns:
        The word; "unknown" for NaN.

    Examples:
        >>> from lightning_compress.analysis.advice import ERROR_BANDS, RATIO_BANDS, word
        >>> word(RATIO_BANDS, 4.0), word(ERROR_BANDS, 0.049), word(ERROR_BANDS, float("nan"))
        ('good', 'excellent', 'unknown')
    """
    return next((band.word for band in bands if band.holds(value)), "unknown")


class Case(NamedTuple):
    """What to do in a situation, and the row that did it here.

    Args:
        name: the situation.
        advice: what to do.
        row: where it was measured; None if it was not, or failed.
    """

    name: str
    advice: str
    row: Row | None


_CASES = (
    ("maximum compression", "a small student, then quantization", "maximum"),
    ("hardware", "removed channels, then powers of two (log2)", "hardware"),
    ("minimal loss", "30 % magnitude pruning, then int8", "minimal_loss"),
)


def cases(outcome: Outcome) -> tuple[Case, ...]:
    """The four fixed pieces of advice, each with the row of this analysis that put it to the test.

    Args:
        outcome: of an analysis.

    Returns:
        Maximum compression, hardware, minimal loss, balanced.
    """
    pipelines = [row for row in stored(outcome.rows) if row.group == "combined"]

    def tried(pipeline: str) -> Row | None:
        return next((row for row in pipelines if row.name.removeprefix("combined_") == pipeline), None)

    fixed = (Case(name, advice, tried(pipeline)) for name, advice, pipeline in _CASES)
    knee = (
        "the knee of the front"
        if outcome.has_knee or not outcome.knee
        else "the lowest error, as the front has no knee"
    )
    return (*fixed, Case("balanced", knee, outcome.knee))


def caveats(outcome: Outcome) -> tuple[str, ...]:
    """What a reader must know before trusting the numbers of this run.

    Args:
        outcome: of an analysis.

    Returns:
        Sentences: the run's own notes, then what follows from its rows.
    """
    about, rows = outcome.about, outcome.rows
    found = list(about.notes)
    if about.inputs.startswith("synthetic") and not any("synthetic inputs" in note for note in found):
        found.append("Output errors were measured on synthetic inputs: not an accuracy.")
    if stored(rows) and not scored(rows):
        reasons = sorted({row.reason for row in rows if row.status == "ok" and row.reason})
        found.append(
            "No output error rate was measured"
            + (f" ({'; '.join(reasons)})" if reasons else "")
            + ": front, knee and the best per threshold are unknown; techniques are compared by the relative error "
            "of their weights, which does not say what the outputs do."
        )
    return tuple(dict.fromkeys(found))
