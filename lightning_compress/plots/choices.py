"""The best row of each group: bytes before and after, and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress import tables
from lightning_compress.plots import axes, canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import (
    WANTED,
    AnyRow,
    best,
    error_field,
    error_name,
    gentlest,
    groups,
    stored,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAVES = 1.5  # a ratio from which on something is saved


def best_bytes(rows: Sequence[Measured], ax: Axes | None = None) -> Axes:
    """Bytes before (pale) and after the best technique of each group: the largest ratio with an error of at most 10 %.

    Args:
        rows: of an analysis.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> ax = plots.best_bytes([Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02)])
        >>> [float(bar.get_width()) for bar in ax.patches]
        [100.0, 25.0]
    """
    field = error_field(rows)
    title = f"Best of each group ({error_name(field)} ≤ {axes.percent(WANTED)} %)"
    ax = axes.begin(ax, title, max(8, 2.5 * len(groups(rows))))
    if not stored(rows):
        return axes.message(ax, "No technique gave a model.")
    from matplotlib.ticker import EngFormatter

    write = EngFormatter(unit="B", places=1)
    dense = max(row.dense_bytes for row in stored(rows))
    names = []
    for i, (group, row) in enumerate(_best_of_groups(rows, field)):
        names.append(f"{group}\n{row.name if row else 'none'}")
        ax.barh(i, dense, height=0.8, color=canvas.PALE)
        if row:
            ax.barh(i, row.file_bytes, height=0.5, color=axes.colour(group))
        words = (
            f"{write(row.file_bytes)}\nratio {row.compression_ratio:.3g}" if row else "none keeps\nthe limit"
        )
        ax.annotate(
            words, (dense, i), (4, 0), textcoords="offset points", va="center", fontsize=canvas.SMALL - 1
        )
    ax.set_yticks(range(len(names)), labels=names)
    ax.tick_params(axis="y", labelsize=canvas.SMALL - 1, length=0)
    ax.set_ylim(max(len(names), 4) - 0.4, -0.6)
    ax.set_xlim(0, 1.3 * dense)
    ax.xaxis.set_major_formatter(EngFormatter(unit="B"))
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"bytes, before (pale, {write(dense)}) and after", fontsize=canvas.SMALL)
    return ax


def summary(rows: Sequence[Measured], ax: Axes | None = None) -> Axes:
    """A table: best overall, best of each group, lowest error that still saves, with original and final bytes.

    Args:
        rows: of an analysis.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> ax = plots.summary([Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02)])
        >>> ax.texts[0].get_text().splitlines()[2]
        'overall          a              4       2     25'
    """
    field = error_field(rows)
    ax = axes.begin(ax, "Summary", 2 * len(groups(rows)) + 8)
    if not stored(rows):
        return axes.message(ax, "No technique gave a model.")
    ax.set_axis_off()
    picks = [("overall", best(rows, field=field)), *_best_of_groups(rows, field)]
    picks.append((f"gentlest > {_SAVES:g}x", gentlest(rows, _SAVES, field)))
    header = ["", "technique", "ratio", "error %", "bytes"]
    body = [
        [name, row.name, row.compression_ratio, 100 * float(getattr(row, field)), row.file_bytes]
        if row
        else [name, "none", None, None, None]
        for name, row in picks
    ]
    dense = max(row.dense_bytes for row in stored(rows))
    lines = [
        tables.text(header, body),
        "",
        f"original, float32: {dense:,} bytes",
        f"error: {error_name(field)}",
        f"overall and groups: largest ratio with error <= {axes.percent(WANTED)} %",
        f"gentlest: lowest error with ratio > {_SAVES:g}",
    ]
    ax.text(
        0,
        0.98,
        "\n".join(lines),
        transform=ax.transAxes,
        family="monospace",
        va="top",
        fontsize=canvas.SMALL - 2,
        linespacing=1.5,
    )
    return ax


def _best_of_groups(rows: Sequence[AnyRow], field: str) -> list[tuple[str, AnyRow | None]]:
    shown = stored(rows)
    return [(group, best([r for r in shown if r.group == group], field=field)) for group in groups(shown)]
