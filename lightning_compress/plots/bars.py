"""Sparsity and bytes of every layer as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_compress.cost import Cost
from lightning_compress.plots import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    bars = ax.barh(names, values, color=canvas.STRONG)
    ax.bar_label(bars, labels=[f"{v:.3f}" for v in values], padding=3, fontsize=canvas.SMALL)
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
    pale = ax.barh(names, dense, color=canvas.PALE, label="dense float32")
    ax.barh(names, counted, color=canvas.STRONG, label="counted")
    write = EngFormatter(unit="B", places=1)
    labels = [f"{write(c)} of {write(d)}" for c, d in zip(counted, dense, strict=True)]
    ax.bar_label(pale, labels=labels, padding=3, fontsize=canvas.SMALL)
    ax.set_xlim(0, 1.5 * max(dense, default=1))  # room for the label of the longest bar
    ax.xaxis.set_major_formatter(EngFormatter(unit="B"))
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"bytes (total {write(sum(counted))} of {write(sum(dense))})")
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=canvas.SMALL
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
    left, right = canvas.figure(10, _rows(cost)).subplots(1, 2, sharey=True)
    layer_sparsity(cost, left)
    layer_bytes(cost, right)
    return left, right


def _rows(cost: Cost) -> int:
    return sum(layer.params > 0 for layer in cost.layers)


def _prepare(cost: Cost, ax: Axes | None) -> tuple[list[str], Axes]:
    """Names of the layers, first on top, and the Axes without what does not inform."""
    ax = canvas.figure(6.4, _rows(cost)).subplots() if ax is None else ax
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=canvas.SMALL)
    ax.margins(y=0.01)
    return [layer.name or "(model)" for layer in cost.layers if layer.params], ax
