"""The texts of an analysis: everything that was measured here, what each limit on the error allows in `limits`.

Numbers are those of the JSON file, counts in full and others with four significant digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_compress import tables
from lightning_compress.analysis import paragraphs
from lightning_compress.analysis.advice import ERROR_BANDS, RATIO_BANDS, Band, cases, caveats, word
from lightning_compress.analysis.limits import ber_text
from lightning_compress.analysis.outcome import About, Outcome
from lightning_compress.analysis.rows import Row
from lightning_compress.plots.rows import (
    WANTED,
    best,
    error_field,
    error_name,
    gentlest,
    groups,
    scored,
    stored,
)

__all__ = ["ber_text", "report_text"]

FEW = 5  # recommended rows
RECOMMENDED = (1.5, 0.30)  # a ratio above and an error below
TIMINGS = "Timings, which differ from run to run:"  # begins the only line that two equal runs may not share


def report_text(outcome: Outcome) -> str:
    """Everything that was measured, in words and tables: ``compression_report.txt``.

    Args:
        outcome: of an analysis.

    Returns:
        Lines; the one that begins with ``TIMINGS`` is the only one that holds times.

    Examples:
        >>> from lightning_compress.analysis.outcome import About, Outcome
        >>> from lightning_compress.analysis.report import report_text
        >>> about = About("LeNet5", 61706, 246824, 230000, 281640.0, "classification", "", "test set", 1000, ())
        >>> print(report_text(Outcome(about, ())).splitlines()[0])
        Compression of LeNet5
    """
    about, rows = outcome.about, outcome.rows
    field = error_field(rows)
    parts = [
        paragraphs.title(f"Compression of {about.model}"),
        _facts(about),
        paragraphs.section("What to know before reading on", [f"- {line}" for line in caveats(outcome)]),
        paragraphs.section(
            "Best of each group",
            [f"The largest ratio with {error_name(field)} of at most {WANTED:g}.", _bests(rows, field)],
        ),
        paragraphs.section("Combined pipelines, run and measured", _pipelines(outcome.combined)),
        paragraphs.section("All rows", [_all(rows)]),
        paragraphs.section("Measured on test data and by further metrics", _further(about, rows)),
        paragraphs.section("Bands of compression ratio", _bands(RATIO_BANDS, rows, "compression_ratio")),
        paragraphs.section("Bands of output error rate", _bands(ERROR_BANDS, rows, "ber")),
        paragraphs.section("Recommended", _recommended(rows)),
        paragraphs.section("Skipped and failed", _left_out(rows)),
        paragraphs.section("Remarks on rows", _remarks(rows)),
        paragraphs.section("Advice", _advice(outcome)),
        _timings(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(about: About) -> str:
    entries: list[tuple[str, Any]] = [
        ("parameters", about.params),
        ("dense bytes (float32)", about.dense_bytes),
        ("own archive, bytes", about.file_bytes),
        ("multiply-accumulates for one input", paragraphs.whole(about.macs)),
        ("task", f"{about.task} ({about.task_reason})" if about.task else about.task_reason or "unknown"),
        ("inputs", about.inputs or "none"),
        ("number of inputs", about.n_samples),
        (f"{about.metric_name} on test data", about.metric) if about.metric_name else ("test data", "none"),
        ("seed", about.seed),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in sorted(about.versions.items())) or None,
        ),
        ("machine", about.machine or None),
    ]
    return _columns([(name, tables.cell(value)) for name, value in entries])


def _columns(entries: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in entries)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in entries)


def _bests(rows: Sequence[Row], field: str) -> str:
    picks: list[tuple[str, Row | None]] = [("overall", best(rows, field=field))]
    picks += [(group, best([r for r in rows if r.group == group], field=field)) for group in groups(rows)]
    picks.append((f"lowest error with ratio > {RECOMMENDED[0]:g}", gentlest(rows, RECOMMENDED[0], field)))
    return paragraphs.table(
        ["group", "technique", "ratio", field, "file_bytes"],
        [
            [name, row.name, row.compression_ratio, getattr(row, field), row.file_bytes]
            if row
            else [name, "none", None, None, None]
            for name, row in picks
        ],
    )


def _pipelines(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    header = ["pipeline", "measured_ratio", "product_of_ratios", "ber", "ber_se", "file_bytes"]
    body = [
        [r.name, r.compression_ratio, r.product_of_ratios, r.ber, r.ber_se, r.file_bytes]
        for r in stored(rows)
    ]
    if not body:
        return ["None could be run; see the reasons below."]
    note = (
        "The product is what multiplying the ratios of the parts would have promised; it is no measurement."
    )
    return [paragraphs.table(header, body), note]


def _all(rows: Sequence[Row]) -> str:
    header = ["technique", "group", "file_bytes", "ratio", "sparsity", "bits_mean", "params", "macs"]
    header += ["weight_sqnr_db", "weight_relative_error", "ber", "ber_se", "front"]
    body: list[list[Any]] = [
        [
            r.name,
            r.group,
            r.file_bytes,
            r.compression_ratio,
            r.sparsity,
            r.bits_mean,
            r.params,
            paragraphs.whole(r.macs),
        ]
        for r in stored(rows)
    ]
    for line, r in zip(body, stored(rows), strict=True):
        line += [
            r.weight_sqnr_db,
            r.weight_relative_error,
            r.ber,
            r.ber_se,
            "knee" if r.knee else "front" if r.pareto else "",
        ]
    return paragraphs.table(header, body) if body else "No technique gave a model."


def _further(about: About, rows: Sequence[Row]) -> list[str]:
    """Columns that only some runs have: those of test data and of the user's metrics."""
    names = sorted({name for row in rows for name in row.extra})
    if not about.metric_name and not names:
        return []
    tested = [f"{about.metric_name} (metric)", "metric_change"] if about.metric_name else []
    body = [
        [r.name, *([r.metric, r.metric_change] if tested else []), *(r.extra.get(name) for name in names)]
        for r in stored(rows)
    ]
    return [paragraphs.table(["technique", *tested, *names], body)]


def _bands(bands: Sequence[Band], rows: Sequence[Row], field: str) -> list[str]:
    """Which rows lie in which band."""
    body = []
    for band in bands:
        inside = [row.name for row in stored(rows) if band.holds(getattr(row, field))]
        body.append(
            [band.limits(), band.word, band.use, len(inside), tables.listing(inside) if inside else ""]
        )
    return [paragraphs.table(["range", "band", "use", "rows", "which"], body)]


def _recommended(rows: Sequence[Row]) -> list[str]:
    ratio, error = RECOMMENDED
    fit = [row for row in scored(rows) if row.ber < error and row.compression_ratio > ratio]
    fit.sort(key=lambda row: (-row.compression_ratio, row.ber, row.name))
    rule = f"Output error rate below {error:g} and ratio above {ratio:g}, the largest ratios first."
    if not fit:
        return [rule, "None."]
    body = [
        [r.name, r.compression_ratio, word(RATIO_BANDS, r.compression_ratio), r.ber, word(ERROR_BANDS, r.ber)]
        for r in fit[:FEW]
    ]
    return [rule, paragraphs.table(["technique", "ratio", "ratio_band", "ber", "error_band"], body)]


def _left_out(rows: Sequence[Row]) -> list[str]:
    lines = []
    for status in ("skipped", "failed"):
        why = {row.name: row.reason or "no reason given" for row in rows if row.status == status}
        lines += [f"{status} ({len(why)}):{tables.reasons(why)}"] if why else []
    return lines


def _remarks(rows: Sequence[Row]) -> list[str]:
    remarks = {row.name: row.reason for row in rows if row.status == "ok" and row.reason}
    return tables.reasons(remarks).splitlines()[1:]


def _advice(outcome: Outcome) -> list[str]:
    return [
        f"{case.name}: {case.advice}. "
        + (f"Here: {paragraphs.measured(case.row)}." if case.row else "Not measured here.")
        for case in cases(outcome)
    ]


def _timings(rows: Sequence[Row]) -> str:
    spent = [(row.seconds, row.name) for row in rows if math.isfinite(row.seconds)]
    if not spent:
        return ""
    longest, name = max(spent)
    total = sum(seconds for seconds, _ in spent)
    return f"{TIMINGS} {total:.1f} s for all rows, the longest {name} with {longest:.1f} s."
