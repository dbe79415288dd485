"""The two figures of an analysis, put together from its panels."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lightning_compress.plots import axes, canvas
from lightning_compress.plots.choices import best_bytes, summary
from lightning_compress.plots.combined import pipeline_ratios
from lightning_compress.plots.limits import error_front, ratio_per_threshold, saving_against_error
from lightning_compress.plots.measured import Found
from lightning_compress.plots.rows import groups, scored, stored
from lightning_compress.plots.scatter import error_against_ratio
from lightning_compress.plots.space import space
from lightning_compress.plots.strength import sparsity_reached
from lightning_compress.plots.techniques import error_bars, ratio_bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MANY = 16  # rows whose names need the whole height of a figure


def compression_analysis(outcome: Found) -> Figure:
    """Eight panels: ratio and error of every technique, best of each group, sparsity, three trade-offs, a summary.

    Few rows stand in two lines of four panels; many rows get the whole height for their bars.

    Args:
        outcome: of an analysis.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.outcome import About, Outcome
        >>> about = About("LeNet5", 61706, 246824, 230000, 281640.0, "classification", "", "test set", 1000, ())
        >>> len(plots.compression_analysis(Outcome(about, ())).axes)
        8
    """
    rows = outcome.rows
    count = len(stored(rows))
    grid = ["ABCD", "EFGH"] if count <= _MANY else ["ADBC", "ADEF", "ADGH"]
    figure = canvas.figure(24, max(44 if count <= _MANY else 56, 0.75 * count + 4))
    panels = figure.subplot_mosaic(
        [list(line) for line in grid],
        per_subplot_kw={"E": {"projection": "3d"}},
    )
    ratio_bars(rows, panels["A"])
    best_bytes(rows, panels["B"])
    sparsity_reached(rows, panels["C"], params=outcome.about.params)
    error_bars(rows, panels["D"])
    space(rows, panels["E"])
    pipeline_ratios(rows, panels["F"])
    error_against_ratio(rows, panels["G"])
    summary(rows, panels["H"])
    _head(figure, outcome)
    return figure


def ber_compression_analysis(outcome: Found) -> Figure:
    """Three panels: the front, the largest ratio per limit, the size reduction.

    Args:
        outcome: of an analysis.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.outcome import About, Outcome
        >>> about = About("LeNet5", 61706, 246824, 230000, 281640.0, "classification", "", "test set", 1000, (0.1,))
        >>> len(plots.ber_compression_analysis(Outcome(about, ())).axes)
        3
    """
    rows = outcome.rows
    figure = canvas.figure(21, max(24, 2.5 * len(outcome.about.thresholds)))
    front, limits, saving = figure.subplots(1, 3)
    error_front(rows, outcome.about.thresholds, front)
    ratio_per_threshold(rows, outcome.about.thresholds, limits)
    saving_against_error(rows, saving)
    _head(figure, outcome)
    return figure


def _head(figure: Figure, outcome: Found) -> None:
    """What was measured, and the colours of the groups."""
    from matplotlib.lines import Line2D

    about, rows = outcome.about, outcome.rows
    shown = stored(rows)
    words = f"{about.model}: {len(shown)} of {len(rows)} techniques gave a model"
    words += f", {len(scored(rows))} with an output error rate"
    words += f"\ninputs: {textwrap.shorten(about.inputs, 180, placeholder=' …')}" if about.n_samples else ""
    figure.suptitle(words, fontsize=canvas.SMALL + 3)
    if shown:
        handles = [
            Line2D([], [], linestyle="", marker=axes.marker(name), color=axes.colour(name), label=name)
            for name in groups(shown)
        ]
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            frameon=False,
            fontsize=canvas.SMALL + 1,
        )
