"""Every technique as a point in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_compress.plots import axes, canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import error_field, error_name, groups
from lightning_compress.plots.scatter import NOTHING, with_error

_BEND = 0.01  # errors far below it are drawn as next to nothing, far above it by their logarithm


def space(rows: Sequence[Measured], ax: Any = None) -> Any:
    """Bytes, compression ratio and output error rate of every row in three dimensions.

    Args:
        rows: of an analysis.
        ax: where to draw, with ``projection="3d"``; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the Axes have two dimensions.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> plots.space([Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02)]).name
        '3d'
    """
    own = ax is None
    if ax is None:
        ax = canvas.figure(7.5, 20).add_subplot(projection="3d")
    if ax.name != "3d":
        raise ValueError(f"the Axes are {ax.name}: give ones with projection='3d'.")
    field = error_field(rows)
    shown = with_error(rows, field)
    ax.set_title("Bytes, compression ratio and error", fontsize=canvas.SMALL + 1, loc="left")
    if not shown:
        ax.set_axis_off()
        ax.text2D(0.5, 0.5, NOTHING, transform=ax.transAxes, ha="center", fontsize=canvas.SMALL)
        return ax
    for group in groups(shown):
        members = [row for row in shown if row.group == group]
        x = np.log10([row.file_bytes for row in members])
        y = np.log2([row.compression_ratio for row in members])
        z = np.log10(1 + np.array([getattr(row, field) for row in members]) / _BEND)
        ax.scatter(x, y, z, s=26, marker=axes.marker(group), color=axes.colour(group), depthshade=False)
        for at in zip(x, y, z, strict=True):  # a stem says where above the floor a point is
            ax.plot(
                *([value, value] for value in at[:2]),
                [0, at[2]],
                color=axes.colour(group),
                linewidth=0.5,
                alpha=0.5,
            )
    _ticks(ax, shown, field)
    if own:
        axes.legend(ax, shown)
    return ax


def _ticks(ax: Any, rows: Sequence[Measured], field: str) -> None:
    """Plain numbers on three axes that hold logarithms, as three-dimensional Axes have no scales."""
    from matplotlib.ticker import EngFormatter

    sizes, ratios = [row.file_bytes for row in rows], [row.compression_ratio for row in rows]
    write = EngFormatter(unit="B", sep=" ")
    marks = [
        m * 10**k for k in range(13) for m in (1, 2, 5) if 0.8 * min(sizes) <= m * 10**k <= 1.25 * max(sizes)
    ]
    marks = marks[:: max(1, len(marks) // 4)] if len(marks) > 1 else sorted({min(sizes), max(sizes)})
    ax.set_xticks(np.log10(marks), labels=[write(float(f"{mark:.2g}")) for mark in marks])
    fine = axes.ratio_ticks(min([1.0, *ratios]), max(1.25, *ratios))
    ax.set_yticks(np.log2(fine), labels=[f"{v:g}" for v in fine])
    most = max([0.05, *(getattr(row, field) for row in rows)])
    errors = [0.0, *(v for v in (0.01, 0.05, 0.2, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6) if v <= 1.05 * most)]
    ax.set_zticks(np.log10(1 + np.array(errors) / _BEND), labels=[axes.percent(v) for v in errors])
    ax.set_xlabel("file bytes", labelpad=8, fontsize=canvas.SMALL)
    ax.set_ylabel("compression ratio", labelpad=6, fontsize=canvas.SMALL)
    ax.set_zlabel(f"{error_name(field)} (%)", fontsize=canvas.SMALL)
    ax.tick_params(labelsize=canvas.SMALL - 2)
    ax.set_box_aspect(None, zoom=0.82)  # room for the labels
