"""What a search has tried and the best of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.plots import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pareto_front(
    points: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    names: tuple[str, str],
    bound: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """What a search has tried (pale) and the best compromises among it (strong), in the order of the first quantity.

    Args:
        points: pairs of values, both better when smaller.
        front: those that no other one beats in both.
        names: of the two quantities.
        bound: largest value of the first that is wanted; drawn as a line.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> ax = pareto_front([(1, 3), (2, 2), (3, 3)], [(1, 3), (2, 2)], ("size_fraction", "error"))
        >>> ax.get_xlabel(), len(ax.lines), len(ax.collections)
        ('size_fraction', 1, 1)
    """
    ax = canvas.figure(6.4, 10).subplots() if ax is None else ax
    ax.scatter(
        [x for x, _ in points],
        [y for _, y in points],
        s=14,
        color=canvas.PALE,
        label=f"tried ({len(points)})",
    )
    best = sorted(front)
    label = f"best ({len(front)})"
    ax.plot([x for x, _ in best], [y for _, y in best], "o-", color=canvas.STRONG, markersize=4, label=label)
    if bound is not None:
        ax.axvline(bound, color="black", linewidth=0.8, linestyle="--", label=f"target {bound:g}")
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=canvas.SMALL)
    ax.legend(frameon=False, fontsize=canvas.SMALL)
    return ax
