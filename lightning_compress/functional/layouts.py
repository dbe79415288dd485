"""Groups of entries of a weight, as rows of blocks: channels, inputs, runs, single entries or all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.functional.groups import PerGroup, granularity_of

GROUPINGS = ("element", "channel", "input", "row", "layer")


def grouping_of(given: str | PerGroup) -> str | PerGroup:
    """The grouping that a name means.

    Args:
        given: "element", "channel", "input", "row", "layer", ``PerGroup(size)`` or "per_group:SIZE".

    Returns:
        The name, or the ``PerGroup``.

    Raises:
        ValueError: another name.

    Examples:
        >>> grouping_of("per_group:8"), grouping_of("channel")
        (PerGroup(size=8), 'channel')
    """
    if isinstance(given, str) and given.startswith("per_group:"):
        found = granularity_of(given)
        assert isinstance(found, PerGroup)
        return found
    if isinstance(given, PerGroup) or given in GROUPINGS:
        return given
    raise ValueError(
        f"grouping={given!r} is unknown; allowed: {', '.join(GROUPINGS)}, per_group:SIZE or PerGroup(size)."
    )


@dataclass(frozen=True)
class Layout:
    """Which entries of a tensor are one group: ``x [.., *shape]`` <-> blocks [.., G, n], one row per group.

    Args:
        shape: of the tensor.
        axes: the axes of the tensor viewed as [split, shape[0] / split, ...] along which groups differ.
        split: groups of a grouped convolution.
        size: 0, or the entries of a run: rows are cut into runs, and the shorter last ones are a block of their own.

    Examples:
        >>> layout = Layout.of("channel", (2, 3), out=0, in_=1)
        >>> layout.blocks(torch.arange(6.0).view(2, 3))[0].tolist()
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        >>> layout.counts, Layout.of("per_group:2", (2, 3), out=0, in_=1).counts
        ([(2, 3)], [(2, 2), (2, 1)])
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    split: int = 1
    size: int = 0

    @staticmethod
    def of(
        grouping: str | PerGroup, shape: Sequence[int], out: int, in_: int | None, split: int = 1
    ) -> Layout:
        """The groups that a grouping means for a weight.

        Args:
            grouping: "element": every entry; "channel": an output channel; "input": an input channel; "row": an index
                of the output axis, which differs from the channel for grouped transposed convolutions only; "layer":
                all entries; ``PerGroup(n)``: runs of n inputs of one output channel.
            shape: of the weight.
            out: its output axis.
            in_: its input axis; None for depth-wise weights and vectors.
            split: groups of a convolution, whose first axis runs over all of them.

        Returns:
            The layout.

        Raises:
            ValueError: an unknown grouping.
        """
        grouping = grouping_of(grouping)
        row = (0, 1) if out == 0 else (out + 1,)
        channel = (0, out + 1)
        inner = in_ if in_ is not None else 1 if split > 1 else out
        axes = {
            "element": tuple(range(len(shape) + 1)),
            "channel": channel,
            "input": (0, inner + 1),
            "row": row,
            "layer": (),
        }
        if isinstance(grouping, PerGroup):
            return Layout(tuple(shape), channel, split, grouping.size)
        return Layout(tuple(shape), axes[grouping], split)

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Groups and entries of a group, of every block."""
        rows, width = self._rows
        if not self.size:
            return [(rows, width)]
        blocks = [(rows * (width // self.size), self.size), (rows, width % self.size)]
        return [(groups, entries) for groups, entries in blocks if groups * entries]

    def whole(self) -> Layout:
        """All entries as one group."""
        return Layout(self.shape)

    def blocks(self, x: Tensor) -> list[Tensor]:
        """The entries by group."""
        batch = x.shape[: x.dim() - len(self.shape)]
        here = [axis + len(batch) for axis in self.axes]
        view = x.reshape(*batch, *self._view).movedim(here, tuple(range(len(batch), len(batch) + len(here))))
        groups, entries = self._rows
        rows = view.reshape(*batch, groups, entries)
        if not self.size:
            return [rows]
        full = entries // self.size * self.size
        parts = (rows[..., :full].reshape(*batch, -1, self.size) if full else None, rows[..., full:])
        return [part for part in parts if part is not None and part.shape[-1]]

    def restore(self, blocks: Sequence[Tensor]) -> Tensor:
        """Inverse of ``blocks``."""
        batch = blocks[0].shape[:-2]
        groups, _ = self._rows
        rows = torch.cat([b.reshape(*batch, groups, -1) for b in blocks], -1) if self.size else blocks[0]
        first = [self._view[axis] for axis in self.axes]
        others = [n for axis, n in enumerate(self._view) if axis not in self.axes]
        view = rows.reshape(*batch, *first, *others)
        places = tuple(range(len(batch), len(batch) + len(first)))
        return view.movedim(places, [axis + len(batch) for axis in self.axes]).reshape(*batch, *self.shape)

    @property
    def _view(self) -> tuple[int, ...]:
        return (self.split, self.shape[0] // self.split, *self.shape[1:])

    @property
    def _rows(self) -> tuple[int, int]:
        groups = math.prod([self._view[axis] for axis in self.axes])
        return groups, math.prod(self.shape) // groups


def wide(x: Tensor) -> Tensor:
    """The tensor in single precision if it has less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
