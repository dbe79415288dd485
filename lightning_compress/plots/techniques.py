"""Every technique as a bar: what it saves, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.plots import axes, canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import WANTED, error_field, error_name, stored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NOTHING = "No technique gave a model."


def ratio_bars(rows: Sequence[Measured], ax: Axes | None = None) -> Axes:
    """Compression ratio of every row that became a file, the first on top, coloured by group.

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
        >>> ax = plots.ratio_bars([Row("a", "pruning", file_bytes=25, dense_bytes=100)])
        >>> [float(bar.get_width()) for bar in ax.patches]  # from 1 to 4
        [3.0]
    """
    shown = stored(rows)
    own = ax is None
    ax = axes.begin(ax, "Compression ratio of every technique", max(8, 0.8 * len(shown)))
    if not shown:
        return axes.message(ax, _NOTHING)
    ratios = [row.compression_ratio for row in shown]
    bars = ax.barh(
        range(len(shown)),
        [ratio - 1 for ratio in ratios],
        left=1,  # a bar begins where nothing is saved
        color=[axes.colour(row.group) for row in shown],
    )
    labels = [f"{ratio:.3g}" for ratio in ratios]
    for bar, ratio, label in zip(bars, ratios, labels, strict=True):
        spot = (max(ratio, 1.0), bar.get_y() + bar.get_height() / 2)
        ax.annotate(label, spot, (3, 0), textcoords="offset points", va="center", fontsize=canvas.SMALL - 2)
    axes.ratio_axis(ax.xaxis, ratios, room=0.12)
    ax.set_xlabel(axes.RATIO, fontsize=canvas.SMALL)
    _names(ax, shown)
    if own:
        axes.legend(ax, shown)
    return ax


def error_bars(rows: Sequence[Measured], ax: Axes | None = None) -> Axes:
    """Output error rate of every row that became a file, with standard errors and the line of 10 %.

    Without a single output error rate the relative error of the weights is shown, and named so.

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
        >>> ax = plots.error_bars([Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02, ber_se=0.01)])
        >>> [float(bar.get_width()) for bar in ax.patches]
        [0.02]
    """
    shown = stored(rows)
    own = ax is None
    field = error_field(rows)
    name = error_name(field)
    ax = axes.begin(ax, f"{name.capitalize()} of every technique", max(8, 0.8 * len(shown)))
    if not shown:
        return axes.message(ax, _NOTHING)
    values = [float(getattr(row, field)) for row in shown]
    known = [i for i, value in enumerate(values) if math.isfinite(value)]
    spread = [row.ber_se if field == "ber" and math.isfinite(row.ber_se) else 0.0 for row in shown]
    ax.barh(
        known,
        [values[i] for i in known],
        xerr=[spread[i] for i in known] if any(spread) else None,
        color=[axes.colour(shown[i].group) for i in known],
        error_kw={"elinewidth": 0.8, "ecolor": "grey"},
    )
    for i in set(range(len(shown))) - set(known):
        ax.annotate(
            "unknown", (0, i), (3, 0), textcoords="offset points", va="center", fontsize=canvas.SMALL - 2
        )
    if field == "ber":
        ax.axvline(WANTED, color="black", linewidth=0.8, linestyle="--")
    ends = [values[i] + spread[i] for i in known]
    axes.error_axis(ax.xaxis, [*ends, WANTED], name, room=0.08)
    if field == "ber":
        ax.set_xlabel(f"{name} (%); dashed: {axes.percent(WANTED)} %", fontsize=canvas.SMALL)
    _names(ax, shown)
    if own:
        axes.legend(ax, shown)
    return ax


def _names(ax: Axes, rows: Sequence[Measured]) -> None:
    """Names of the rows, the first on top; few rows do not make thick bars."""
    ax.set_yticks(range(len(rows)), labels=[row.name for row in rows])
    ax.tick_params(axis="y", labelsize=canvas.SMALL - 2, length=0)
    ax.set_ylim(max(len(rows), 8) - 0.4, -0.6)
