"""Channels that can be removed: sets of entries that go together, gathered into families that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_compress.channels.labels import Ids
from lightning_compress.channels.watcher import Trace
from lightning_compress.targets import Target

Keep = dict[str, dict[int, Ids]]  # full tensor name -> axis -> indices that stay


@dataclass(frozen=True, eq=False)
class Family:
    """Channels that live in the same places, such as the outputs of one layer.

    Args:
        name: of the first layer that makes them; with #2 and so on if it makes others too.
        makers: names of all layers that make them.
        classes: class of each channel in the trace; a channel of a family is whatever must go together (an attention
            head, the same channel of several layers).
        members: full tensor name, axis -> for each channel, its indices there.
    """

    name: str
    makers: tuple[str, ...]
    classes: tuple[int, ...]
    members: Mapping[tuple[str, int], tuple[Ids, ...]]

    def __len__(self) -> int:
        return len(self.classes)


@dataclass(frozen=True)
class Channels:
    """The channels of a model.

    Args:
        families: those that can go.
        fixed: full parameter name of a layer whose outputs stay -> why.
        trace: what they were found by.
    """

    families: list[Family]
    fixed: dict[str, str]
    trace: Trace

    def keep(self, gone: Sequence[int]) -> Keep:
        """What stays of every tensor when some classes go.

        Args:
            gone: classes.

        Returns:
            Indices to keep, of the axes that lose some.
        """
        lost = self._lost(gone)
        kept: Keep = {}
        for key, axes in self.trace.axes.items():
            for axis, ids in enumerate(axes):
                if ids is not None and (goes := lost[self.trace.classes[ids]]).any():
                    kept.setdefault(key, {})[axis] = np.flatnonzero(~goes)
        return kept

    def attributes(self, gone: Sequence[int]) -> dict[str, dict[str, int | list[int]]]:
        """The numbers of modules that count channels, after some classes have gone.

        Args:
            gone: classes.

        Returns:
            Module name -> attribute -> [index in a tuple or -1, old value, new value], where it changes.
        """
        lost = self._lost(gone)
        found: dict[str, dict[str, list[int]]] = {}
        counted = [(a, int(lost[self.trace.classes[a.labels]].sum())) for a in self.trace.attributes]
        for a, goes in sorted(
            counted, key=lambda pair: (pair[0].sure, pair[1] > 0)
        ):  # what is certain is written last
            name = a.name if a.index is None else f"{a.name}[{a.index}]"
            if goes:
                entry = [-1 if a.index is None else a.index, len(a.labels), len(a.labels) - goes]
                found.setdefault(a.module, {})[name] = entry
            elif a.sure:
                found.get(a.module, {}).pop(name, None)
        found = {module: entries for module, entries in found.items() if entries}
        return found  # type: ignore[return-value]

    def macs(self, gone: Sequence[int]) -> float:
        """Multiplications that are left.

        Args:
            gone: classes.

        Returns:
            MACs for the input of the trace.
        """
        lost = self._lost(gone)
        total = 0.0
        for work in self.trace.work:
            left = work.constant
            for ids in work.axes:
                left *= len(ids) - int(lost[self.trace.classes[ids]].sum())
            total += left
        return total

    def params(self, gone: Sequence[int], sizes: Mapping[str, Sequence[int]]) -> int:
        """Parameters that are left.

        Args:
            gone: classes.
            sizes: full parameter name -> its shape now.

        Returns:
            Their number, a complex one counted once.
        """
        kept = self.keep(gone)
        total = 0
        for key, shape in sizes.items():
            axes = kept.get(key, {})
            total += int(
                np.prod([len(axes[i]) if i in axes else n for i, n in enumerate(shape)], dtype=np.int64)
            )
        return total

    def _lost(self, gone: Sequence[int]) -> NDArray[np.bool_]:
        lost = np.zeros(len(self.trace.classes), bool)
        lost[list(gone)] = True
        return lost


def find_channels(seen: Trace, targets: Sequence[Target]) -> Channels:
    """Gather what a trace has shown into families.

    Args:
        seen: the trace.
        targets: weights whose output channels name the families.

    Returns:
        Families in the order of the model's parameters, and why other outputs stay.
    """
    places: dict[int, dict[tuple[str, int], Ids]] = {}
    for key, axes in seen.axes.items():
        for axis, ids in enumerate(axes):
            if ids is None:
                continue
            classes = seen.classes[ids]
            by_class = np.argsort(classes, kind="stable")
            distinct, starts = np.unique(classes[by_class], return_index=True)
            for value, indices in zip(distinct.tolist(), np.split(by_class, starts[1:]), strict=True):
                places.setdefault(value, {})[key, axis] = indices
    made = {(t.key, t.axes.out): t.name or t.key for t in targets}
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for value, where in places.items():
        if value not in seen.frozen and any(place in made for place in where):
            alike.setdefault(tuple(where), []).append(value)
    families: list[Family] = []
    for spots, values in alike.items():
        makers = tuple(dict.fromkeys(made[spot] for spot in spots if spot in made))
        members = {spot: tuple(places[v][spot] for v in values) for spot in spots}
        again = sum(f.makers[0] == makers[0] for f in families)
        name = f"{makers[0]}#{again + 1}" if again else makers[0]
        families.append(Family(name, makers, tuple(values), members))
    fixed = {}
    for target in targets:
        labels = seen.axes.get(target.key, ())
        out = labels[target.axes.out] if len(labels) > target.axes.out else None
        stays = [] if out is None else seen.classes[out].tolist()
        if all(c in seen.frozen for c in stays):
            fixed[target.key] = seen.frozen[stays[0]] if stays else "it has one output"
    order = {t.name or t.key: i for i, t in enumerate(targets)}
    families.sort(key=lambda f: order[f.makers[0]])
    return Channels(families, fixed, seen)
