"""Sparsity against the amount that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.plots import axes, canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import stored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AMOUNTS = ("amount", "sparsity")  # how parameters name it
_CURVES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)


def sparsity_reached(rows: Sequence[Measured], ax: Axes | None = None, *, params: int | None = None) -> Axes:
    """Zeros that pruning made against zeros that were asked for, one curve per method, with the line where both agree.

    Args:
        rows: of an analysis; those of the group "pruning" with an ``amount`` are shown.
        ax: where to draw; a new figure if None.
        params: real numbers of the original's parameters. Weights that a row removed count as zeros then; without it
            rows that removed weights are left out.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> row = Row("pruned_magnitude_0.5", "pruning", {"amount": 0.5}, file_bytes=9, dense_bytes=9, sparsity=0.4)
        >>> [line.get_label() for line in plots.sparsity_reached([row]).lines]
        ['asked for = reached', 'pruned_magnitude']
    """
    ax = axes.begin(ax, "Sparsity reached by pruning")
    shown = stored(rows)
    whole = max((row.params for row in shown), default=0) if params is None else params
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in shown:
        amount = next((row.parameters[key] for key in _AMOUNTS if key in row.parameters), None)
        removed = row.params < whole
        if row.group != "pruning" or not isinstance(amount, int | float) or row.sparsity != row.sparsity:
            continue
        if removed and params is None:
            continue
        reached = 1 - (1 - row.sparsity) * row.params / whole if removed else row.sparsity
        curves.setdefault(row.name.rpartition("_")[0] or row.name, []).append((amount, reached))
    if not curves:
        return axes.message(ax, "No pruning with a known amount gave a model.")
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle="--", label="asked for = reached")
    for i, (name, points) in enumerate(curves.items()):
        colour, marker = _CURVES[i % len(_CURVES)]
        size = 9 - 1.5 * min(i, 4)  # markers that coincide are seen inside each other
        x, y = zip(*sorted(points), strict=True)
        ax.plot(
            x,
            y,
            marker=marker,
            markersize=size,
            markerfacecolor="none",
            color=colour,
            linewidth=1,
            label=name,
        )
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.grid(alpha=0.3)
    ax.set_xlabel("amount asked for (share of weights or channels)", fontsize=canvas.SMALL)
    ax.set_ylabel("sparsity (share of zeros; removed ones count)", fontsize=canvas.SMALL)
    ax.legend(loc="upper left", frameon=False, fontsize=canvas.SMALL - 1)
    return ax
