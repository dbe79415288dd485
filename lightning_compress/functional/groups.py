"""Granularity: which entries of a tensor share one scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 1 << 18  # entries


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of an axis.

    Args:
        axis: axis, or axes (a scale for each combination); None is the output axis of the weight.
    """

    axis: int | Sequence[int] | None = None


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of consecutive inputs of one output row; the last run may be shorter.

    Args:
        size: inputs that share a scale, >= 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"PerGroup(size={self.size}): allowed is size >= 1.")


Granularity = PerTensor | PerChannel | PerGroup


def granularity_of(given: Granularity | str) -> Granularity:
    """The granularity that a name means.

    Args:
        given: a granularity, "per_tensor", "per_channel" or "per_group:SIZE".

    Returns:
        The granularity.

    Raises:
        ValueError: another name.

    Examples:
        >>> granularity_of("per_group:32")
        PerGroup(size=32)
    """
    if not isinstance(given, str):
        return given
    if given in ("per_tensor", "per_channel"):
        return PerTensor() if given == "per_tensor" else PerChannel()
    kind, _, size = given.partition(":")
    if kind == "per_group" and size.isdecimal():
        return PerGroup(int(size))
    raise ValueError(
        f"granularity={given!r} is unknown; allowed: per_tensor, per_channel, per_group:SIZE, or PerTensor(), "
        "PerChannel(axis), PerGroup(size)."
    )


@dataclass(frozen=True)
class Groups:
    """The groups of one tensor shape: ``x`` <-> rows ``[G, n]`` of entries that share a scale.

    A complex tensor counts as two real planes, which share the scale of their group.

    Args:
        axes: axes along which scales differ.
        size: 0, or the inputs in a run; then ``axes`` is the output axis alone.

    Examples:
        >>> groups = Groups((0,))
        >>> groups.blocks(torch.arange(6.0).view(2, 3))[0].tolist()
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        >>> groups.expand(torch.tensor([10.0, 20.0]), (2, 3)).shape
        torch.Size([2, 1])
    """

    axes: tuple[int, ...] = ()
    size: int = 0

    @staticmethod
    def of(granularity: Granularity, shape: Sequence[int], out: int) -> Groups:
        """The groups that a granularity means for a weight.

        Args:
            granularity: which entries share a scale.
            shape: of the weight.
            out: its output axis.

        Returns:
            The groups.

        Raises:
            ValueError: an axis that the weight does not have, or a run longer than a row.
        """
        if isinstance(granularity, PerTensor):
            return Groups()
        if isinstance(granularity, PerGroup):
            inputs = math.prod(shape) // shape[out]
            if granularity.size > inputs:
                raise ValueError(
                    f"PerGroup(size={granularity.size}) is longer than the {inputs} inputs of one output row: "
                    f"allowed is 1 to {inputs}."
                )
            return Groups((out,), granularity.size)
        given = out if granularity.axis is None else granularity.axis
        axes = (given,) if isinstance(given, int) else tuple(given)
        for axis in axes:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"PerChannel(axis={granularity.axis}): a weight of shape {tuple(shape)} has axes 0 to "
                    f"{len(shape) - 1}."
                )
        return Groups(tuple(sorted({axis % len(shape) for axis in axes})))

    def count(self, shape: Sequence[int]) -> int:
        """Number of groups G of a tensor of this shape."""
        kept = math.prod([shape[axis] for axis in self.axes])  # a list: torch.compile traces no generator
        return kept * -(-(math.prod(shape) // kept) // self.size) if self.size else kept

    def blocks(self, x: Tensor) -> list[Tensor]:
        """The entries by group: one block ``[G, n]``, or two if the last run of a row is shorter."""
        rows = self._rows(real(x))
        if not self.size:
            return [rows]
        width = self.size * (2 if x.is_complex() else 1)
        full = rows.shape[1] // width * width
        parts = [rows[:, :full].reshape(-1, width)]
        return parts if full == rows.shape[1] else [*parts, rows[:, full:]]

    def join(self, parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Values ``[g]`` of every block -> values ``[G]``, in the order that ``expand`` takes."""
        if len(parts) == 1:
            return parts[0]
        rows = shape[self.axes[0]]
        return torch.cat([parts[0].view(rows, -1), parts[1].view(rows, -1)], dim=1).flatten()

    def expand(self, values: Tensor, shape: Sequence[int], is_complex: bool = False) -> Tensor:
        """Values ``[G]`` as a tensor that broadcasts against the (real view of the) weight."""
        tail = (1,) if is_complex else ()
        if not self.size:
            kept = [n if axis in self.axes else 1 for axis, n in enumerate(shape)]
            return values.reshape(*kept, *tail)
        out = self.axes[0]
        rows, inputs = shape[out], math.prod(shape) // shape[out]
        wide = values.reshape(rows, -1).repeat_interleave(self.size, dim=1)[:, :inputs]
        others = [n for axis, n in enumerate(shape) if axis != out]
        return wide.reshape(rows, *others, *tail).movedim(0, out)

    def pieces(
        self, shape: Sequence[int], *values: Tensor | None, is_complex: bool = False
    ) -> Iterator[tuple[tuple[slice, ...], list[Tensor | None]]]:
        """The tensor in pieces of some 2^18 entries, so that working on them takes little memory.

        Args:
            shape: of the tensor.
            values: [G] each, or None.
            is_complex: whether pieces are taken of the real view.

        Yields:
            Index of a piece, and the values as tensors that broadcast against it.

        Examples:
            >>> scale = torch.tensor([10.0, 20.0])
            >>> [(index, part.tolist()) for index, (part,) in Groups((0,)).pieces((2, 3), scale)]
            [((slice(None, None, None), slice(0, 3, None)), [[10.0], [20.0]])]
        """
        if not shape:
            yield (), [None if v is None else self.expand(v, shape, is_complex) for v in values]
            return
        axis = self.axes[0] if self.size else max(range(len(shape)), key=lambda a: shape[a])
        step = max(1, SMALL * shape[axis] // max(1, math.prod(shape)))
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            index = (*[slice(None)] * axis, slice(start, stop))
            yield index, [None if v is None else self._part(v, shape, index, is_complex) for v in values]

    def _part(
        self, values: Tensor, shape: Sequence[int], index: tuple[slice, ...], is_complex: bool
    ) -> Tensor:
        axis, rows = len(index) - 1, index[-1]
        if self.size:  # the values of whole rows: all of them expanded would be as large as the tensor
            part = [*shape[:axis], rows.stop - rows.start, *shape[axis + 1 :]]
            return self.expand(values.reshape(shape[axis], -1)[rows].reshape(-1), part, is_complex)
        whole = self.expand(values, shape, is_complex)
        return whole[index] if whole.shape[axis] > 1 else whole

    def _rows(self, x: Tensor) -> Tensor:
        kept = math.prod([x.shape[axis] for axis in self.axes])
        return x.movedim(self.axes, tuple(range(len(self.axes)))).reshape(kept, -1)


def real(x: Tensor) -> Tensor:
    """Real and imaginary plane on a last axis of two, for a complex tensor; a real one as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of ``real`` for a tensor that had this dtype."""
    return torch.view_as_complex(x.contiguous()).to(dtype) if dtype.is_complex else x.to(dtype)
