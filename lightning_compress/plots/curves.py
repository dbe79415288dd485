"""What a method costs and saves over its strength."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_compress.plots import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def trade_off(
    strengths: Sequence[float | str],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    xlabel: str = "strength",
) -> tuple[Axes, ...]:
    """What a method costs and what it saves over its strength: one panel for each quantity, two beside each other.

    Args:
        strengths: settings, in order; names stand at equal distances.
        panels: quantity -> name of a curve -> one value for each strength; NaN leaves a gap.
        xlabel: what the strength is.

    Returns:
        One Axes for each panel.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no panel, or a curve has not one value for each strength.

    Examples:
        >>> axes = trade_off([0.1, 0.5], {"error": {"16": [1.0, 3.0]}, "bytes": {"16": [90.0, 50.0]}}, "sparsity")
        >>> [ax.get_title() for ax in axes]
        ['error', 'bytes']
    """
    sizes = {len(values) for curves in panels.values() for values in curves.values()}
    if not panels or sizes - {len(strengths)}:
        raise ValueError(
            f"{len(panels)} panels, curves with {sorted(sizes)} values for {len(strengths)} strengths: give at least "
            "one panel, and one value for each strength."
        )
    down = -(-len(panels) // 2)
    axes = (
        canvas.figure(9, 12 * down).subplots(down, min(2, len(panels)), sharex=True, squeeze=False).flatten()
    )
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        for (name, values), marker in zip(curves.items(), itertools.cycle("os^Dv")):
            ax.plot(strengths, values, marker=marker, label=name)
        ax.set_title(title, fontsize=canvas.SMALL + 1)
        if all(value >= 0 for values in curves.values() for value in values):
            ax.set_ylim(bottom=0)  # so that heights compare
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=canvas.SMALL)
        if len(curves) > 1:
            ax.legend(frameon=False, fontsize=canvas.SMALL)
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.set_xlabel(xlabel)
    return tuple(axes[: len(panels)])
