"""What an evolution of circuits has found: its trade-offs, and how it came there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_compress.cgp.search.settings import PICO, Row
from lightning_compress.plots import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (canvas.STRONG, "#D55E00", "#009E73", "#CC79A7")  # stay apart for colour-blind readers


def circuit_front(
    points: Sequence[tuple[float, float, int]], threshold: float | None = None, ax: Axes | None = None
) -> Axes:
    """Energy against error of circuits, with the number of gates as colour.

    Args:
        points: of every circuit its error (any unit, >= 0), its energy in pJ and its gates.
        threshold: error that was good enough; drawn as a line.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no points.

    Examples:
        >>> from lightning_compress.plots.circuits import circuit_front
        >>> ax = circuit_front([(0.0, 0.06, 240), (1.5, 0.02, 80)], threshold=1)
        >>> ax.get_xlabel(), ax.get_ylabel(), len(ax.lines)
        ('RMS error (int8 steps)', 'energy (pJ)', 1)
    """
    if not points:
        raise ValueError("no circuits to draw: give the error, the energy and the gates of at least one.")
    ax = canvas.figure(6.4, 10).subplots() if ax is None else ax
    _clean(ax)
    errors, energies, gates = zip(*points, strict=True)
    dots = ax.scatter(errors, energies, c=gates, s=24, cmap="viridis", edgecolors="black", linewidths=0.3)
    bar = ax.figure.colorbar(dots, ax=ax)
    bar.set_label("gates", fontsize=canvas.SMALL)
    bar.ax.tick_params(labelsize=canvas.SMALL)
    if threshold is not None:
        ax.axvline(threshold, color="black", linewidth=0.8, linestyle="--", label=f"threshold {threshold:g}")
        ax.legend(frameon=False, fontsize=canvas.SMALL)
    ax.set_xlabel("RMS error (int8 steps)")
    ax.set_ylabel("energy (pJ)")
    ax.set_xlim(left=-_room(errors))
    ax.set_ylim(bottom=-_room(energies))
    return ax


def evolution_history(runs: Mapping[str, Sequence[Row]]) -> tuple[Axes, Axes]:
    """Error (above) and energy (below) of the best circuit over the generations; dots: where phase 2 begins.

    Up to four runs have colours and names; of more, all are pale but the best.

    Args:
        runs: name -> history of a run.

    Returns:
        Axes of the errors and of the energies.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a history is empty, or there is none.

    Examples:
        >>> from lightning_compress.cgp.search.settings import Row
        >>> from lightning_compress.plots.circuits import evolution_history
        >>> rows = [
        ...     Row(0, 1, 0.0, 900, 60_000, 1000, 1, 2),
        ...     Row(40, 1, 0.1, 0, 90_000, 2000, 2, 3),
        ...     Row(90, 2, 0.3, 0, 30_000, 1000, 1, 1),
        ... ]
        >>> errors, energies = evolution_history({"run 0": rows})
        >>> errors.get_ylabel(), energies.get_ylabel(), energies.lines[0].get_ydata().tolist()
        ('summed error', 'energy (pJ)', [0.06, 0.09, 0.03])
    """
    empty = [name for name, rows in runs.items() if not rows]
    if not runs or empty:
        raise ValueError(f"no history to draw{f' of {empty[0]!r}' if empty else ''}: give rows of a run.")
    upper, lower = canvas.figure(6.4, 14).subplots(2, sharex=True)
    best = min(runs, key=lambda name: (runs[name][-1].error, runs[name][-1].energy))
    few = len(runs) <= len(_COLOURS)
    for place, (name, rows) in enumerate(sorted(runs.items(), key=lambda item: item[0] == best)):
        colour = _COLOURS[place] if few else canvas.STRONG if name == best else canvas.PALE
        label = name if few else f"{name}, the best of {len(runs)}" if name == best else None
        second = next((row for row in rows if row.phase == 2), None)
        for ax, values, start in (
            (upper, [float(row.error) for row in rows], second and second.error),
            (lower, [row.energy / PICO for row in rows], second and second.energy / PICO),
        ):
            ax.step([row.generation for row in rows], values, where="post", color=colour, label=label)
            if second:
                ax.plot(second.generation, start, "o", color=colour, markersize=4)
    upper.set_yscale("symlog", linthresh=1)
    upper.set_ylabel("summed error")
    lower.set_ylabel("energy (pJ)")
    lower.set_xlabel("generation")
    lower.set_xscale("symlog", linthresh=10)  # most of it happens early
    for ax in (upper, lower):
        _clean(ax)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
    if len(runs) > 1:
        upper.legend(frameon=False, fontsize=canvas.SMALL)
    return upper, lower


def _room(values: Sequence[float]) -> float:
    """Below zero, so that a dot on the axis is seen whole."""
    return 0.04 * (max(values) or 1)


def _clean(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=canvas.SMALL)
