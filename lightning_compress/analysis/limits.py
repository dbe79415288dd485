"""What each limit on the output error allows, as text."""

from __future__ import annotations

from lightning_compress import tables
from lightning_compress.analysis import paragraphs
from lightning_compress.analysis.advice import ERROR_BANDS, caveats
from lightning_compress.analysis.outcome import About, Outcome
from lightning_compress.analysis.rows import Row
from lightning_compress.plots.rows import best, scored

UNKNOWN = "Unknown: no row has both a file and an output error rate."
FRONT = 10  # rows of the front that are spelled out


def ber_text(outcome: Outcome) -> str:
    """What each limit on the output error allows: ``ber_compression_analysis.txt``.

    Args:
        outcome: of an analysis.

    Returns:
        Lines: the largest ratio per threshold, the front, its knee, bit errors if they were injected, advice.

    Examples:
        >>> from lightning_compress.analysis.outcome import About, Outcome
        >>> from lightning_compress.analysis.report import ber_text
        >>> about = About("LeNet5", 61706, 246824, 230000, 281640.0, "classification", "", "test set", 1000, (0.1,))
        >>> print(ber_text(Outcome(about, ())).splitlines()[0])
        Output error and compression of LeNet5
    """
    about = outcome.about
    parts = [
        paragraphs.title(f"Output error and compression of {about.model}"),
        _meaning(about),
        paragraphs.section("What to know before reading on", [f"- {line}" for line in caveats(outcome)]),
        paragraphs.section("Largest ratio for each limit on the output error rate", _thresholds(outcome)),
        paragraphs.section("Front: no other row is both smaller and closer to the original", _front(outcome)),
        paragraphs.section("Knee", [_knee(outcome)]),
        paragraphs.section("Bit errors in the stored codes", _bit_errors(outcome)),
        paragraphs.section("Which one to take", _uses(outcome)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _meaning(about: About) -> str:
    what = {
        "classification": "share of the inputs whose first choice differs between original and compressed model",
        "regression": "mean over the inputs of |f(x) - g(x)| / |f(x)|, f the original and g the compressed model",
    }.get(about.task, "unknown, as there was no model to run")
    return f"Output error rate: {what}.\nInputs: {about.inputs or 'none'}."


def _thresholds(outcome: Outcome) -> list[str]:
    header = ["threshold", "technique", "ratio", "ber", "ber_se", "file_bytes", "saved_percent"]
    limits = outcome.about.thresholds
    if not limits:
        return []
    if not scored(outcome.rows):
        return [UNKNOWN]
    found = [(limit, outcome.best(limit)) for limit in limits]
    table = paragraphs.table(
        header,
        [
            [f"{limit:g}", *([row.name, *_figures(row)] if row else ["none", *[None] * 5])]
            for limit, row in found
        ],
    )
    fine = [f"{limit:g}" for limit in limits if outcome.about.n_samples and not outcome.resolves(limit)]
    if not fine:
        return [table]
    inputs = tables.cell(outcome.about.n_samples)
    return [
        table,
        f"Below the resolution of {inputs} inputs, so that only an error of 0 passes: {', '.join(fine)}.",
    ]


def _figures(row: Row) -> list[float | int]:
    return [row.compression_ratio, row.ber, row.ber_se, row.file_bytes, 100 * (1 - row.size_fraction)]


def _front(outcome: Outcome) -> list[str]:
    front = outcome.pareto
    if not front:
        return [UNKNOWN]
    body = [[row.name, *_figures(row), "yes" if row.knee else ""] for row in front[:FRONT]]
    lines = [
        paragraphs.table(["technique", "ratio", "ber", "ber_se", "file_bytes", "saved_percent", "knee"], body)
    ]
    rest = [row.name for row in front[FRONT:]]
    return [*lines, f"and {len(rest)} more: {', '.join(rest)}"] if rest else lines


def _knee(outcome: Outcome) -> str:
    if outcome.knee is None:
        return UNKNOWN
    why = (
        ""
        if outcome.has_knee
        else " No knee: the front has too few points or no bend; this is its lowest error."
    )
    return f"{paragraphs.measured(outcome.knee)}.{why}"


def _bit_errors(outcome: Outcome) -> list[str]:
    body = [[name, rate, error] for name, curve in outcome.bit_errors.items() for rate, error in curve]
    return [paragraphs.table(["format", "flipped_bits", "ber"], body)] if body else []


def _uses(outcome: Outcome) -> list[str]:
    """The largest ratio inside each band that may be used, and the knee."""
    if outcome.knee is None:
        return [UNKNOWN]
    picks = [
        (
            f"{band.word} (output error rate {band.limits()}; {band.use})",
            best([row for row in scored(outcome.rows) if band.holds(row.ber)], band.high),
        )
        for band in ERROR_BANDS[:-1]
    ]
    knee = (
        "balanced (the knee)" if outcome.has_knee else "balanced (no knee, so the lowest error of the front)"
    )
    return [
        f"{name}: {paragraphs.measured(row) if row else 'none'}."
        for name, row in [*picks, (knee, outcome.knee)]
    ]
