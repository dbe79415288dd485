"""What each limit on the output error allows: the front, the largest ratio per limit, what is saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.plots import axes, canvas
from lightning_compress.plots.measured import Measured
from lightning_compress.plots.rows import AnyRow, best, groups, scored, stored
from lightning_compress.plots.scatter import points

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def error_front(rows: Sequence[Measured], thresholds: Sequence[float] = (), ax: Axes | None = None) -> Axes:
    """Output error rate over ratio with the front (stars, dashed), its knee (ring) and the limits as lines.

    Args:
        rows: of an analysis, with ``pareto`` and ``knee`` filled in.
        thresholds: limits on the output error rate.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> row = Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02, pareto=True)
        >>> plots.error_front([row], (0.1,)).get_title(loc="left")
        'Front: 1 of 1 techniques'
    """
    own = ax is None
    shown = scored(rows)
    front = _front(rows)
    ax = axes.begin(ax, f"Front: {len(front)} of {len(shown)} techniques", 20)
    if not shown:
        return axes.message(ax, _nothing(rows))
    points(ax, shown, "ber", pale=True)
    _draw_front(ax, [(row.compression_ratio, row.ber) for row in front], front)
    top = ax.get_ylim()[1]
    for limit in thresholds:
        if limit < top:
            ax.axhline(limit, color="grey", linewidth=0.7, linestyle=":")
            ax.annotate(
                f"≤ {axes.percent(limit)} %",
                (1, limit),
                (3, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=canvas.SMALL - 2,
                color="dimgrey",
            )
    _name_points(ax, [(row.compression_ratio, row.ber) for row in front], front)
    if own:
        axes.legend(ax, shown)
    return ax


def ratio_per_threshold(
    rows: Sequence[Measured], thresholds: Sequence[float], ax: Axes | None = None
) -> Axes:
    r"""The largest ratio that each limit on the output error rate allows, with the technique's name.

    Args:
        rows: of an analysis.
        thresholds: limits on the output error rate.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> ax = plots.ratio_per_threshold([Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02)], (0.01, 0.1))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['≤ 1 %\nnone', '≤ 10 %\na']
    """
    ax = axes.begin(ax, "Largest ratio for each limit on the output error rate", max(8, 3 * len(thresholds)))
    if not scored(rows) or not thresholds:
        return axes.message(ax, _nothing(rows) if thresholds else "No limits were given.")
    picks = [(limit, best(rows, limit)) for limit in sorted(thresholds)]
    for i, (_, row) in enumerate(picks):
        ratio = row.compression_ratio if row else 1.0
        ax.barh(i, ratio - 1, left=1, height=0.6, color=axes.colour(row.group if row else ""))
        words = f"{ratio:.3g}\nerror {axes.percent(float(f'{row.ber:.3g}'))} %" if row else "none keeps it"
        spot = (max(ratio, 1.0), i)
        ax.annotate(words, spot, (4, 0), textcoords="offset points", va="center", fontsize=canvas.SMALL - 1)
    names = [f"≤ {axes.percent(limit)} %\n{row.name if row else 'none'}" for limit, row in picks]
    ax.set_yticks(range(len(picks)), labels=names)
    ax.tick_params(axis="y", labelsize=canvas.SMALL - 1, length=0)
    ax.set_ylim(max(len(picks), 4) - 0.4, -0.6)
    axes.ratio_axis(ax.xaxis, [row.compression_ratio for _, row in picks if row], room=0.22)
    ax.set_xlabel(axes.RATIO, fontsize=canvas.SMALL)
    return ax


def saving_against_error(rows: Sequence[Measured], ax: Axes | None = None) -> Axes:
    """Size reduction in percent over the output error rate, with the front.

    Args:
        rows: of an analysis, with ``pareto`` and ``knee`` filled in.
        ax: where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress import plots
        >>> from lightning_compress.analysis.rows import Row
        >>> ax = plots.saving_against_error([Row("a", "pruning", file_bytes=25, dense_bytes=100, ber=0.02)])
        >>> ax.collections[0].get_offsets().tolist()
        [[0.02, 75.0]]
    """
    own = ax is None
    shown = scored(rows)
    ax = axes.begin(ax, "Size reduction against output error rate", 20)
    if not shown:
        return axes.message(ax, _nothing(rows))
    for group in groups(shown):
        members = [row for row in shown if row.group == group]
        ax.scatter(
            [row.ber for row in members],
            [_saved(row) for row in members],
            s=22,
            marker=axes.marker(group),
            color=axes.colour(group),
            alpha=0.35,
            linewidths=0,
        )
    front = _front(rows)
    _draw_front(ax, [(row.ber, _saved(row)) for row in front], front)
    axes.error_axis(ax.xaxis, [row.ber for row in shown], "output error rate")
    ax.set_ylim(min([0.0, *(_saved(row) - 4 for row in shown)]), 104)
    ax.grid(visible=True, axis="y", alpha=0.3)
    ax.set_ylabel("size reduction (% of the dense bytes)", fontsize=canvas.SMALL)
    if own:
        axes.legend(ax, shown)
    return ax


def _saved(row: Measured) -> float:
    return 100 * (1 - row.size_fraction)


def _front(rows: Sequence[AnyRow]) -> list[AnyRow]:
    return sorted(
        (row for row in scored(rows) if row.pareto), key=lambda row: (row.compression_ratio, row.ber)
    )


def _draw_front(ax: Axes, places: Sequence[tuple[float, float]], front: Sequence[Measured]) -> None:
    """Stars of the front, joined by a dashed line, and a ring around the knee."""
    if not front:
        return
    x, y = zip(*places, strict=True)
    ax.plot(x, y, color="dimgrey", linewidth=0.9, linestyle="--", zorder=3)
    colours = [axes.colour(row.group) for row in front]
    ax.scatter(x, y, s=90, marker="*", c=colours, edgecolors="white", linewidths=0.5, zorder=4)
    for place, row in zip(places, front, strict=True):
        if row.knee:
            ax.plot(*place, "o", ms=14, mfc="none", mec="black", mew=1.2, zorder=5, label="knee")
            ax.legend(loc="upper left", frameon=False, fontsize=canvas.SMALL - 1)


def _name_points(ax: Axes, places: Sequence[tuple[float, float]], front: Sequence[Measured]) -> None:
    from lightning_compress.plots.labels import Labels

    order = sorted(range(len(front)), key=lambda i: not front[i].knee)  # the knee finds its place first
    Labels(ax, [places[i] for i in order], [front[i].name for i in order], places)


def _nothing(rows: Sequence[Measured]) -> str:
    """Why there is no error to show."""
    if not stored(rows):
        return "No technique gave a model."
    reasons = sorted({row.reason for row in stored(rows) if row.reason})
    return "No output error rate was measured" + (f":\n{'; '.join(reasons[:2])}" if reasons else ".")
