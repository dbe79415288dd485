"""Every technique as a point: error against ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.plots import axes, canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import AnyRow, error_field, error_name, groups, stored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTHING = "No technique gave both a model and an error."


def error_against_ratio(rows: Sequence[Measured], ax: Axes | None = None) -> Axes:
    """Output error rate over compression ratio, one point per row; down and to the right is better.

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
        >>> ax = plots.error_against_ratio([Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02)])
        >>> ax.collections[0].get_offsets().tolist()
        [[4.0, 0.02]]
    """
    own = ax is None
    field = error_field(rows)
    shown = with_error(rows, field)
    ax = axes.begin(ax, f"{error_name(field).capitalize()} against compression ratio")
    if not shown:
        return axes.message(ax, NOTHING)
    points(ax, shown, field)
    if own:
        axes.legend(ax, shown)
    return ax


def points(ax: Axes, rows: Sequence[Measured], field: str, pale: bool = False) -> None:
    """One mark per row, with both axes set up for them.

    Args:
        ax: to draw on.
        rows: that have a ratio and an error.
        field: which error; see ``error_field``.
        pale: as a background for what is drawn over it.
    """
    for group in groups(rows):
        members = [row for row in rows if row.group == group]
        ax.scatter(
            [row.compression_ratio for row in members],
            [getattr(row, field) for row in members],
            s=22,
            marker=axes.marker(group),
            color=axes.colour(group),
            alpha=0.35 if pale else 0.85,
            linewidths=0,
        )
    axes.ratio_axis(ax.xaxis, [row.compression_ratio for row in rows])
    axes.error_axis(ax.yaxis, [getattr(row, field) for row in rows], error_name(field))
    ax.set_xlabel(axes.RATIO, fontsize=canvas.SMALL)


def with_error(rows: Sequence[AnyRow], field: str) -> list[AnyRow]:
    """Rows that became a file and whose error is a number.

    Args:
        rows: of an analysis.
        field: which error; see ``error_field``.

    Returns:
        Those rows.
    """
    return [row for row in stored(rows) if math.isfinite(getattr(row, field))]
