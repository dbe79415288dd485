"""Figures of an analysis: what they show are the rows, and every word can be read."""

import itertools
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from outcomes import KINDS, outcome, row

from lightning_compress import plots
from lightning_compress.plots.axes import error_axis, percent, ratio_axis, ratio_ticks
from lightning_compress.plots.labels import Labels
from lightning_compress.plots.rows import best, error_field, gentlest, groups, scored, stored

FIGURES = (plots.compression_analysis, plots.ber_compression_analysis)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", FIGURES)
def test_words_are_inside_the_figure_and_apart(draw, kind):
    """Titles, tick labels and notes of all panels: none is cut off, none lies on another."""
    figure = draw(outcome(kind))
    figure.draw_without_rendering()
    assert len(figure.axes) == (8 if draw is plots.compression_analysis else 3)
    frame = figure.bbox.padded(1)
    boxes = []
    for ax in figure.axes:
        if ax.name == "3d":
            continue  # its tick labels are placed by projection; looked at, not measured
        found = [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        if ax.axison:
            for axis in (ax.xaxis, ax.yaxis):
                found += [t.label1 for t in axis._update_ticks()]  # those in view
        if ax.get_legend():
            found += ax.get_legend().texts
        boxes += [(t, t.get_window_extent()) for t in found if t.get_visible() and t.get_text().strip()]
    boxes += [(figure._suptitle, figure._suptitle.get_window_extent())]
    for text, box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)


@pytest.mark.parametrize("kind", ["many", "five", "regression"])
def test_names_on_the_front_do_not_touch(kind):
    found = outcome(kind)
    ax = plots.error_front(found.rows, found.about.thresholds)
    ax.figure.draw_without_rendering()
    (labels,) = [artist for artist in ax.artists if isinstance(artist, Labels)]
    assert {name for name, _ in labels.placed} == {r.name for r in found.pareto}
    boxes = [box for _, box in labels.placed]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = ax.get_window_extent()
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)


def test_a_name_without_room_is_left_out():
    ax = Figure(figsize=(1, 1)).subplots()
    labels = Labels(ax, [(0.5, 0.5), (0.5, 0.5)], ["x" * 80, "y"])
    ax.figure.draw_without_rendering()
    assert [name for name, _ in labels.placed] == ["y"]


def test_bars_are_the_rows():
    found = outcome("many")
    shown = stored(found.rows)
    assert len(shown) == len(found.rows) - 2  # a failed and a skipped one
    ax = plots.ratio_bars(found.rows)
    assert [bar.get_x() + bar.get_width() for bar in ax.patches] == pytest.approx(
        [r.compression_ratio for r in shown]
    )
    assert [t.get_text() for t in ax.get_yticklabels()] == [r.name for r in shown]
    assert ax.yaxis_inverted()  # the first on top
    ax = plots.error_bars(found.rows)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([r.ber for r in shown])
    (container,) = (c for c in ax.containers if hasattr(c, "patches"))
    spread = container.errorbar.lines[2][0].get_segments()
    half = [(b[0] - a[0]) / 2 for a, b in spread]
    assert half == pytest.approx([r.ber_se for r in shown])
    assert any(line.get_xdata()[0] == 0.10 for line in ax.lines)


def test_points_are_the_rows():
    found = outcome("many")
    expected = sorted((r.compression_ratio, r.ber) for r in scored(found.rows))
    ax = plots.error_against_ratio(found.rows)
    shown = sorted(tuple(p) for c in ax.collections for p in c.get_offsets())
    np.testing.assert_allclose(shown, expected)
    ax = plots.error_front(found.rows, (0.1,))
    stars = ax.collections[len(groups(scored(found.rows)))]
    front = [(r.compression_ratio, r.ber) for r in found.pareto]
    np.testing.assert_allclose(stars.get_offsets(), front)
    assert sum(line.get_label() == "knee" for line in ax.lines) == found.has_knee


def test_each_limit_shows_the_best_row():
    found = outcome("many")
    ax = plots.ratio_per_threshold(found.rows, found.about.thresholds)
    picks = [found.best(limit) for limit in sorted(found.about.thresholds)]
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends == pytest.approx([r.compression_ratio if r else 1 for r in picks])
    names = [t.get_text().splitlines()[1] for t in ax.get_yticklabels()]
    assert names == [r.name if r else "none" for r in picks]


def test_pruning_curves_and_pipelines_show_every_row():
    found = outcome("many")
    lines = {line.get_label(): line for line in plots.sparsity_reached(found.rows).lines}
    assert len(lines) == 6  # five methods and the identity
    assert list(lines["pruned_structured"].get_ydata()) == pytest.approx(
        [0.95 * a for a in (0.1, 0.3, 0.5, 0.7, 0.9)]
    )
    whole = row("pruned_random_0.2", "pruning", 2, 0.1, parameters={"amount": 0.2}, sparsity=0.2, params=100)
    thin = row(
        "pruned_structured_0.5", "pruning", 2, 0.1, parameters={"amount": 0.5}, sparsity=0.1, params=40
    )
    reached = {line.get_label(): line for line in plots.sparsity_reached([whole, thin], params=100).lines}
    assert list(reached["pruned_structured"].get_ydata()) == pytest.approx([1 - 0.9 * 0.4])
    unknown = plots.sparsity_reached([whole, thin])  # how much was removed cannot be said
    assert [line.get_label() for line in unknown.lines] == ["asked for = reached", "pruned_random"]
    bars = plots.pipeline_ratios(found.rows).patches
    expected = [r.compression_ratio for r in found.combined] + [r.product_of_ratios for r in found.combined]
    assert [bar.get_width() + 1 for bar in bars] == pytest.approx(expected)


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.1, 2.0])
def test_best_and_gentlest_against_brute_force(limit):
    rows = [r for r in outcome("many").rows if r.status == "ok"]
    fit = [r for r in rows if r.ber <= limit]
    chosen = best(rows, limit)
    assert (chosen is None) == (not fit)
    if fit:
        assert chosen.compression_ratio == max(r.compression_ratio for r in fit)
    assert gentlest(rows, 5).ber == min(r.ber for r in rows if r.compression_ratio > 5)
    assert gentlest(rows, 1e9) is None


def test_without_output_errors_weights_are_compared_and_named():
    found = outcome("weights")
    assert error_field(found.rows) == "weight_relative_error" and error_field(outcome("failed").rows) == "ber"
    ax = plots.error_bars(found.rows)
    assert ax.get_xlabel() == "relative weight error (%)"
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(
        [r.weight_relative_error for r in found.rows]
    )
    assert "no architecture given" in plots.error_front(found.rows, (0.1,)).texts[0].get_text()


def test_an_unknown_error_among_known_ones_is_said():
    rows = [row("a", "pruning", 2, 0.1), row("b", "pruning", 3, float("nan"), ber_se=float("nan"))]
    ax = plots.error_bars(rows)
    assert len(ax.patches) == 1 and "unknown" in [t.get_text() for t in ax.texts]


@pytest.mark.parametrize(
    "low, high", [(1, 1.25), (1, 1.7), (1, 3), (0.5, 20), (0.01, 4000), (1, 2**40), (0.9, 7)]
)
def test_ratio_ticks_are_few_plain_and_inside(low, high):
    ticks = ratio_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    assert low - 1e-9 <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize("values", [[0.0], [1e-9, 1e-7], [0.3, 1.0], [0.0, 3e5]])
def test_error_ticks_are_plain_numbers_inside(values):
    ax = Figure().subplots()
    error_axis(ax.xaxis, values, "error")
    ratio_axis(ax.yaxis, [2.0])
    low, high = ax.get_xlim()
    assert low < 0 and high > max(values)
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert 2 <= len(labels) <= 12 and not any("e" in label for label in labels)
    assert [float(label.replace(",", "")) / 100 for label in labels] == pytest.approx(list(ax.get_xticks()))
    assert percent(0.1) == "10"


def test_panels_draw_on_given_axes_and_leave_pyplot_alone():
    import matplotlib.pyplot as plt

    rows = outcome("five").rows
    for panel in (
        plots.ratio_bars,
        plots.error_bars,
        plots.best_bytes,
        plots.sparsity_reached,
        plots.summary,
    ):
        ax = Figure().subplots()
        assert panel(rows, ax) is ax
        assert isinstance(panel(rows).figure, Figure)
    with pytest.raises(ValueError, match="projection='3d'"):
        plots.space(rows, Figure().subplots())
    assert plt.get_fignums() == []


def test_own_figures_explain_their_colours():
    rows = outcome("five").rows
    for panel in (plots.ratio_bars, plots.error_bars, plots.error_against_ratio, plots.space):
        texts: list[Text] = panel(rows).get_legend().texts
        assert [t.get_text() for t in texts] == groups(rows)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in FIGURES:
        with pytest.raises(ImportError, match=r"pip install 'lightning-compress\[tensorboard\]'"):
            draw(outcome("single"))
