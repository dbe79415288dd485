"""Figures, one function each; they return matplotlib Axes, so ``ax.figure.savefig("layers.png")`` stores one.

They never touch pyplot's global state: they draw on the Axes that are given, or on a new Figure of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_compress.cost import Cost

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STRONG, _PALE = "#0072B2", "#C9D7E3"  # a pair that stays apart for colour-blind readers and in grey
_SMALL = 9  # points


def layer_sparsity(cost: Cost, ax: Axes | None = None) -> Axes:
    """Sparsity of every layer as horizontal bars, the first layer on top.

    Args:
        cost: counts of a model; layers without parameters are left out.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> ax = layer_sparsity(lc.cost(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['0', '1']
    """
    names, ax = _prepare(cost, ax)
    values = [layer.sparsity for layer in cost.layers if layer.params]
    bars = ax.barh(names, values, color=_STRONG)
    ax.bar_label(bars, labels=[f"{v:.3f}" for v in values], padding=3, fontsize=_SMALL)
    ax.set_xlim(0, 1.15)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.set_xlabel(f"sparsity (total {cost.sparsity:.3f})")
    return ax


def layer_bytes(cost: Cost, ax: Axes | None = None) -> Axes:
    """Bytes of every layer as horizontal bars: dense float32 (pale) and counted under its codes (strong).

    Args:
        cost: counts of a model; layers without parameters are left out.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> ax = layer_bytes(lc.cost(nn.Linear(4, 4)))
        >>> [round(bar.get_width()) for bar in ax.patches]
        [80, 80]
    """
    names, ax = _prepare(cost, ax)
    from matplotlib.ticker import EngFormatter

    layers = [layer for layer in cost.layers if layer.params]
    dense, counted = [4 * layer.params for layer in layers], [layer.bits / 8 for layer in layers]
    pale = ax.barh(names, dense, color=_PALE, label="dense float32")
    ax.barh(names, counted, color=_STRONG, label="counted")
    write = EngFormatter(unit="B", places=1)
    labels = [f"{write(c)} of {write(d)}" for c, d in zip(counted, dense, strict=True)]
    ax.bar_label(pale, labels=labels, padding=3, fontsize=_SMALL)
    ax.set_xlim(0, 1.5 * max(dense, default=1))  # room for the label of the longest bar
    ax.xaxis.set_major_formatter(EngFormatter(unit="B"))
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"bytes (total {write(sum(counted))} of {write(sum(dense))})")
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=_SMALL
    )  # off the bars
    return ax


def layers(cost: Cost) -> tuple[Axes, Axes]:
    """``layer_sparsity`` and ``layer_bytes`` side by side on a figure as tall as the model is deep.

    Args:
        cost: counts of a model.

    Returns:
        Both Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> left, right = layers(lc.cost(nn.Linear(4, 4)))
        >>> left.figure is right.figure
        True
    """
    left, right = _figure(10, _rows(cost)).subplots(1, 2, sharey=True)
    layer_sparsity(cost, left)
    layer_bytes(cost, right)
    return left, right


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
    axes = _figure(9, 12 * down).subplots(down, min(2, len(panels)), sharex=True, squeeze=False).flatten()
    for ax, (title, curves) in zip(axes, panels.items(), strict=False):
        for (name, values), marker in zip(curves.items(), itertools.cycle("os^Dv")):
            ax.plot(strengths, values, marker=marker, label=name)
        ax.set_title(title, fontsize=_SMALL + 1)
        if all(value >= 0 for values in curves.values() for value in values):
            ax.set_ylim(bottom=0)  # so that heights compare
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=_SMALL)
        if len(curves) > 1:
            ax.legend(frameon=False, fontsize=_SMALL)
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.set_xlabel(xlabel)
    return tuple(axes[: len(panels)])


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
    ax = _figure(6.4, 10).subplots() if ax is None else ax
    ax.scatter(
        [x for x, _ in points], [y for _, y in points], s=14, color=_PALE, label=f"tried ({len(points)})"
    )
    best = sorted(front)
    label = f"best ({len(front)})"
    ax.plot([x for x, _ in best], [y for _, y in best], "o-", color=_STRONG, markersize=4, label=label)
    if bound is not None:
        ax.axvline(bound, color="black", linewidth=0.8, linestyle="--", label=f"target {bound:g}")
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=_SMALL)
    ax.legend(frameon=False, fontsize=_SMALL)
    return ax


def _rows(cost: Cost) -> int:
    return sum(layer.params > 0 for layer in cost.layers)


def _figure(width: float, rows: int) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'lightning-compress[tensorboard]'.") from None
    return Figure(figsize=(width, 0.25 * rows + 1.3), layout="constrained")


def _prepare(cost: Cost, ax: Axes | None) -> tuple[list[str], Axes]:
    """Names of the layers, first on top, and the Axes without what does not inform."""
    ax = _figure(6.4, _rows(cost)).subplots() if ax is None else ax
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=_SMALL)
    ax.margins(y=0.01)
    return [layer.name or "(model)" for layer in cost.layers if layer.params], ax
