"""Names of points that never lie on each other: placed anew at every drawing, whatever the size of the figure.

The only module of figures that imports matplotlib at its top; import it inside the function that needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

Point = tuple[float, float]
_Drawn = TypeVar("_Drawn", bound=Artist)
_SIDES = (
    (1, -1),
    (1, 1),
    (-1, -1),
    (-1, 1),
    (1, 0),
    (0, -1),
    (0, 1),
    (-1, 0),
)  # right and below is emptiest on a front
_DISTANCES = (6, 14, 26, 40, 58)  # points


class Labels(Artist):
    """Texts beside points, the first that fit; one that fits nowhere is left out.

    Args:
        ax: where the points are.
        points: in data coordinates, one for each text.
        texts: one for each point, in order of importance.
        path: corners of a line that no text may cross, in data coordinates.
        size: of the letters, points.
    """

    def __init__(
        self,
        ax: Axes,
        points: Sequence[Point],
        texts: Sequence[str],
        path: Sequence[Point] = (),
        size: float = 7,
    ) -> None:
        super().__init__()
        self.set_in_layout(False)
        self.set_zorder(10)
        self._points, self._texts, self._route, self._size = list(points), list(texts), list(path), size
        self.placed: list[tuple[str, Bbox]] = []
        ax.add_artist(self)

    def draw(self, renderer: RendererBase) -> None:
        """Find a place for each text, and draw it with a line to its point.

        Args:
            renderer: of the figure.
        """
        assert self.axes is not None and self.figure is not None
        self.placed = []
        if not self._points:
            return
        scale = self.figure.dpi / 72  # pixels of a point
        frame = self.axes.get_window_extent(renderer)
        anchors = [(float(x), float(y)) for x, y in self.axes.transData.transform(self._points)]
        line = Path(self.axes.transData.transform(self._route)) if len(self._route) > 1 else None
        taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in anchors]
        for (x, y), words in zip(anchors, self._texts, strict=True):
            for distance, (right, up) in itertools.product(_DISTANCES, _SIDES):
                label = self._written(
                    (x + right * distance * scale, y + up * distance * scale), words, right, up
                )
                box = label.get_window_extent(renderer).padded(scale)
                inside = frame.containsx(box.x0) and frame.containsx(box.x1)
                inside = inside and frame.containsy(box.y0) and frame.containsy(box.y1)
                crossed = line is not None and line.intersects_bbox(box, filled=False)
                if inside and not crossed and not box.count_overlaps(taken):
                    if distance > _DISTANCES[0]:
                        self._joint((x, y), label.get_position()).draw(renderer)
                    label.draw(renderer)
                    taken.append(box)
                    self.placed.append((words, box))
                    break

    def _written(self, place: Point, words: str, right: int, up: int) -> Text:
        horizontal = {1: "left", 0: "center", -1: "right"}[right]
        vertical = {1: "bottom", 0: "center", -1: "top"}[up]
        label = Text(*place, words, fontsize=self._size, ha=horizontal, va=vertical)
        return self._own(label)

    def _joint(self, start: Point, end: Point) -> Line2D:
        return self._own(Line2D(*zip(start, end, strict=True), color="grey", linewidth=0.5))

    def _own(self, artist: _Drawn) -> _Drawn:
        artist.set_figure(self.figure)
        artist.set_transform(IdentityTransform())
        return artist
