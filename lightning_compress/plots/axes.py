"""Axes of ratios and of errors with plain tick labels, and what every panel of an analysis has in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_compress.plots import canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import COLOURS, MARKERS, OTHER, groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

RATIO = "compression ratio (dense bytes / file bytes)"
_MOST = 7  # labelled ticks


def begin(ax: Axes | None, title: str, height: float = 14, width: float = 7.5) -> Axes:
    """The Axes to draw on, with a title and without what does not inform.

    Args:
        ax: where to draw; a new figure if None.
        title: of the panel.
        height: of a new figure, in rows of text.
        width: of a new figure, inches.

    Returns:
        The Axes.
    """
    ax = canvas.figure(width, height).subplots() if ax is None else ax
    ax.set_title(title, fontsize=canvas.SMALL + 1, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=canvas.SMALL - 1)
    return ax


def message(ax: Axes, text: str) -> Axes:
    """A panel that has nothing to show says so.

    Args:
        ax: of the panel.
        text: why there is nothing.

    Returns:
        The Axes.
    """
    ax.set_axis_off()
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=canvas.SMALL, wrap=True
    )
    return ax


def legend(ax: Axes, rows: Sequence[Measured]) -> None:
    """Colour and marker of every group, to the right of the panel.

    Args:
        ax: of the panel.
        rows: that are shown.
    """
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=marker(group), color=colour(group), label=group)
        for group in groups(rows)
    ]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=canvas.SMALL)


def colour(group: str) -> str:
    """Of a group, the same in every figure."""
    return COLOURS.get(group, OTHER)


def marker(group: str) -> str:
    """Of a group, the same in every figure."""
    return MARKERS.get(group, "X")


def ratio_axis(axis: Axis, values: Iterable[float], room: float = 0.04) -> None:
    """Logarithmic, from at most 1, labelled with plain numbers.

    Args:
        axis: ``ax.xaxis`` or ``ax.yaxis``.
        values: ratios that are shown, > 0.
        room: share of the axis to leave free behind the largest value.
    """
    known = [1.0, *values]
    low, high = min(known), max(max(known), 1.25)
    octaves = math.log2(high / low)
    _set_scale(axis, "log", base=2)
    _set_limits(axis, low * 2 ** (-0.03 * octaves), high * 2 ** (octaves * room / (1 - room)))
    _set_ticks(axis, ratio_ticks(low, high), [f"{v:g}" for v in ratio_ticks(low, high)])


def ratio_ticks(low: float, high: float) -> list[float]:
    """Plain numbers inside a range of ratios: powers of two, or finer steps if these would be too few.

    Args:
        low: smallest ratio, > 0.
        high: largest ratio.

    Returns:
        At most seven values.

    Examples:
        >>> from lightning_compress.plots.axes import ratio_ticks
        >>> ratio_ticks(1, 20), ratio_ticks(1, 1.7)
        ([1, 2, 4, 8, 16], [1.0, 1.2, 1.4, 1.6])
    """
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    step = max(1, -(-(last - first + 1) // _MOST))
    powers: list[float] = [2**k if k >= 0 else 2.0**k for k in range(first, last + 1, step)]
    if len(powers) >= 3:
        return powers
    fine = next(s for s in (0.05, 0.1, 0.2, 0.5, 1) if (high - low) / s <= _MOST - 1)
    return [
        round(k * fine, 2) for k in range(math.ceil(low / fine - 1e-9), math.floor(high / fine + 1e-9) + 1)
    ]


def error_axis(axis: Axis, values: Iterable[float], label: str, room: float = 0.04) -> None:
    """Percent; linear near zero and logarithmic beyond, so that 0, 1 % and 300 % can be told apart.

    Args:
        axis: ``ax.xaxis`` or ``ax.yaxis``.
        values: errors that are shown, >= 0, as fractions.
        label: what they are.
        room: share of the axis to leave free behind the largest value.
    """
    known = [value for value in values if value > 0]
    smallest, high = min([0.01, *known]), max([0.02, *known])
    start = 10.0 ** max(-6, math.floor(math.log10(smallest)))
    _set_scale(axis, "symlog", linthresh=start, linscale=0.4)
    decades = math.log10(high / start) + 0.4
    _set_limits(axis, -start * 0.2, high * 10 ** (decades * room / (1 - room)))
    steps = (1, 2, 5) if decades <= 2.5 else (1,)
    tens = range(round(math.log10(start)), math.ceil(math.log10(high)) + 1)
    ticks = [0.0, *(float(f"{m}e{k}") for k in tens[:: max(1, len(tens) // _MOST)] for m in steps)]
    ticks = [tick for tick in ticks if tick <= high * 1.001]
    _set_ticks(axis, ticks, [percent(tick) for tick in ticks])
    axis.set_label_text(f"{label} (%)", fontsize=canvas.SMALL)


def percent(value: float) -> str:
    """A fraction in percent, without the sign.

    Args:
        value: such as 0.05.

    Returns:
        Digits.

    Examples:
        >>> from lightning_compress.plots.axes import percent
        >>> percent(0.05), percent(1e-6), percent(12.0)
        ('5', '0.0001', '1,200')
    """
    return (
        np.format_float_positional(100 * value, precision=6, trim="-")
        if value < 10
        else f"{100 * value:,.0f}"
    )


def _is_x(axis: Axis) -> bool:
    return axis is axis.axes.xaxis


def _set_scale(axis: Axis, scale: str, **options: float) -> None:
    (axis.axes.set_xscale if _is_x(axis) else axis.axes.set_yscale)(scale, **options)


def _set_limits(axis: Axis, low: float, high: float) -> None:
    (axis.axes.set_xlim if _is_x(axis) else axis.axes.set_ylim)(low, high)


def _set_ticks(axis: Axis, ticks: Sequence[float], labels: Sequence[str]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_ticks(ticks, labels=labels)
    axis.set_minor_locator(NullLocator())
    axis.axes.grid(visible=True, axis="x" if _is_x(axis) else "y", alpha=0.3)
    axis.axes.set_axisbelow(True)
