"""Combined pipelines: what was measured beside what multiplying their parts would have promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.plots import axes, canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import stored

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pipeline_ratios(rows: Sequence[Measured], ax: Axes | None = None) -> Axes:
    """Measured ratio of every combined pipeline (strong) beside the product of the ratios of its parts (pale).

    Args:
        rows: of an analysis; those of the group "combined" are shown.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> row = Row("maximum", "combined", file_bytes=25, dense_bytes=100, product_of_ratios=6.0)
        >>> [round(float(bar.get_width()), 3) for bar in plots.pipeline_ratios([row]).patches]  # from 1
        [3.0, 5.0]
    """
    shown = [row for row in stored(rows) if row.group == "combined"]
    ax = axes.begin(ax, "Combined pipelines: measured and promised", max(8, 3 * len(shown)))
    if not shown:
        return axes.message(ax, "No combined pipeline was measured.")
    measured = [row.compression_ratio for row in shown]
    promised = [row.product_of_ratios for row in shown]
    kinds = (
        ("measured", measured, canvas.STRONG, -0.2),
        ("product of the parts' ratios", promised, canvas.PALE, 0.2),
    )
    for label, ratios, colour, shift in kinds:
        known = [i for i, ratio in enumerate(ratios) if math.isfinite(ratio)]
        spots = [i + shift for i in known]
        ax.barh(spots, [ratios[i] - 1 for i in known], left=1, height=0.38, color=colour, label=label)
        for i, spot in zip(known, spots, strict=True):
            ax.annotate(
                f"{ratios[i]:.3g}",
                (max(ratios[i], 1.0), spot),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=canvas.SMALL - 2,
            )
    axes.ratio_axis(ax.xaxis, [ratio for ratio in (*measured, *promised) if math.isfinite(ratio)], room=0.12)
    ax.set_yticks(range(len(shown)), labels=[row.name for row in shown])
    ax.tick_params(axis="y", labelsize=canvas.SMALL - 1, length=0)
    ax.set_ylim(max(len(shown), 4) + 0.4, -0.6)  # with room for the legend under the bars
    ax.set_xlabel(axes.RATIO, fontsize=canvas.SMALL)
    ax.legend(loc="lower right", ncols=2, frameon=False, fontsize=canvas.SMALL - 1)
    return ax
