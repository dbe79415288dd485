"""Where zeros may fall: anywhere, n of every m in a row, in blocks, or in whole output channels.

A pattern says which units of a weight go together, how they are scored, and what a mask of units is for the elements.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_compress.functional.masks import blocks, count_pruned, nm_mask, spread
from lightning_compress.pruning.criteria import channel_scores, element_scores
from lightning_compress.pruning.rules import Criterion, grouped
from lightning_compress.stats import Stats
from lightning_compress.targets import Target


class Pattern(ABC):
    """Which elements of a weight are kept or dropped together."""

    by_row: ClassVar[bool] = True  # whether units lie in the rows of the weight

    def refusal(self, target: Target) -> str | None:
        """Why a weight cannot have this pattern.

        Args:
            target: the weight.

        Returns:
            A sentence, or None if it can.
        """
        return None

    @abstractmethod
    def scores(
        self, rule: Criterion, target: Target, stats: Stats | None, norm: str, normalize: bool
    ) -> Tensor:
        """Score of every unit.

        Args:
            rule: the criterion.
            target: the weight.
            stats: what was measured for it.
            norm: "l2" or "l1", how element scores are put together.
            normalize: divide by sizes.

        Returns:
            Real tensor, one entry per unit.
        """

    @abstractmethod
    def units(self, target: Target, mask: Tensor) -> Tensor:
        """Which units have an element that is kept.

        Args:
            target: the weight.
            mask: of its elements.

        Returns:
            Bool tensor, one entry per unit.
        """

    @abstractmethod
    def elements(self, target: Target, kept: Tensor) -> Tensor:
        """The mask of the elements.

        Args:
            target: the weight.
            kept: bool, one entry per unit.

        Returns:
            Bool tensor, shape of the weight.
        """

    def most(self, units: int, cap: float) -> int:
        """How many units of one weight may go.

        Args:
            units: how many it has.
            cap: allowed share.

        Returns:
            A number from 0 to ``units``.
        """
        return math.floor(cap * units)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every element by itself."""

    def scores(
        self, rule: Criterion, target: Target, stats: Stats | None, norm: str, normalize: bool
    ) -> Tensor:
        """Of the elements."""
        return element_scores(rule, target, stats)

    def units(self, target: Target, mask: Tensor) -> Tensor:
        """The mask itself."""
        return mask

    def elements(self, target: Target, kept: Tensor) -> Tensor:
        """The mask itself."""
        return kept


@dataclass(frozen=True)
class NM(Unstructured):
    """In every ``m`` consecutive elements along an axis, the ``n`` with the highest scores stay.

    Args:
        n: elements that stay, 1 <= n < m.
        m: elements of a block.
        axis: of the weight tensor; None takes its input axis: the features of a linear layer, the input channels at
            each kernel position of a convolution.

    Raises:
        ValueError: n or m out of range.

    Examples:
        >>> net = nn.Linear(8, 8)
        >>> pruned = compress(net, Prune(pattern=lc.pruning.patterns.NM(2, 4))).model
        >>> (pruned.weight.view(8, 2, 4) != 0).sum(2).unique()
        tensor([2])

    Source: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks.
    """

    n: int = 2
    m: int = 4
    axis: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"NM(n={self.n}, m={self.m}): allowed is 1 <= n < m.")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of zeros, ``1 - n / m``."""
        return 1 - self.n / self.m

    def refusal(self, target: Target) -> str | None:
        """Its input size does not divide, or it has no such axis."""
        axis, shape = self._axis(target), tuple(target.weight.shape)
        if axis is None:
            return "it has no input axis (one of depth-wise weights is of size 1): choose one, NM(n, m, axis)"
        if not -len(shape) <= axis < len(shape):
            return f"its shape {shape} has no axis {axis}"
        if shape[axis] % self.m:
            return f"its size {shape[axis]} along axis {axis % len(shape)} is no multiple of {self.m}"
        return None

    def kept(self, target: Target, scores: Tensor, share: float) -> Tensor:
        """Which elements stay at a share of zeros below the pattern's own, too: ``floor(s m + 0.5)`` go of every m.

        Args:
            target: the weight.
            scores: of its elements.
            share: of zeros.

        Returns:
            Bool tensor, shape of the weight.
        """
        axis = self._axis(target)
        assert axis is not None
        dropped = min(count_pruned(share, self.m), self.m - self.n)
        return nm_mask(scores, self.m - dropped, self.m, axis)

    def _axis(self, target: Target) -> int | None:
        return target.axes.in_ if self.axis is None else self.axis


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of equal size, each kept or dropped as a whole.

    Args:
        shape: size along the output axis, the input axis, then the others in order; those not given are 1.

    Raises:
        ValueError: a size below 1.

    Examples:
        >>> net = nn.Linear(4, 8)
        >>> pruned = compress(net, Prune(0.5, pattern="block:4x1")).model
        >>> (pruned.weight.view(2, 4, 4) == 0).sum(1).unique()
        tensor([0, 4])

    Source: Narang et al. 2017, Block-Sparse Recurrent Neural Networks.
    """

    shape: tuple[int, ...] = (4, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"Block({self.shape}): allowed are sizes >= 1, such as (4, 1).")

    def refusal(self, target: Target) -> str | None:
        """Its shape does not divide into such blocks."""
        shape = tuple(target.weight.shape)
        if len(self.shape) > len(shape):
            return f"its shape {shape} has fewer axes than a block of {self.shape}"
        sizes = self._sizes(target)
        wrong = next((a for a in range(len(shape)) if shape[a] % sizes[a]), None)
        return (
            None
            if wrong is None
            else f"its size {shape[wrong]} along axis {wrong} is no multiple of {sizes[wrong]}"
        )

    def scores(
        self, rule: Criterion, target: Target, stats: Stats | None, norm: str, normalize: bool
    ) -> Tensor:
        """``||s||_2 / sqrt(m)`` or ``||s||_1 / m`` of the m element scores of a block."""
        split = blocks(element_scores(rule, target, stats), self._sizes(target))
        return grouped(split.flatten(0, -2), 0, norm, normalize).view(split.shape[:-1])

    def units(self, target: Target, mask: Tensor) -> Tensor:
        """Blocks in which something is kept."""
        return blocks(mask, self._sizes(target)).any(-1)

    def elements(self, target: Target, kept: Tensor) -> Tensor:
        """Every block in full size."""
        return spread(kept, self._sizes(target))

    def _sizes(self, target: Target) -> tuple[int, ...]:
        first = [a for a in target.axes if a is not None]
        order = [*first, *(a for a in range(target.weight.dim()) if a not in first)]
        sizes = [1] * len(order)
        for axis, size in zip(order, self.shape, strict=False):
            sizes[axis] = size
        return tuple(sizes)


@dataclass(frozen=True)
class Channel(Pattern):
    """Whole output channels: with the weight row go the bias, and gamma and beta of a BatchNorm that directly follows.

    One channel of every layer stays.
    """

    by_row: ClassVar[bool] = False

    def refusal(self, target: Target) -> str | None:
        """It has one channel, or none."""
        weight = target.weight
        whole = getattr(getattr(target.module, target.param.split(".")[0], None), "shape", None)
        if weight.dim() < 2 or (whole is not None and tuple(whole) != tuple(weight.shape)):
            return "it is not the whole weight of a layer: it has no output channels"
        return "it has one output channel, which stays" if weight.shape[target.axes.out] == 1 else None

    def scores(
        self, rule: Criterion, target: Target, stats: Stats | None, norm: str, normalize: bool
    ) -> Tensor:
        """Of the output channels."""
        return channel_scores(rule, target, stats, target.axes.out, norm, normalize)

    def units(self, target: Target, mask: Tensor) -> Tensor:
        """Channels in which something is kept."""
        return mask.movedim(target.axes.out, 0).flatten(1).any(1)

    def elements(self, target: Target, kept: Tensor) -> Tensor:
        """Every channel in full size."""
        shape = [-1 if a == target.axes.out else 1 for a in range(target.weight.dim())]
        return kept.view(shape).expand(target.weight.shape).clone()

    def most(self, units: int, cap: float) -> int:
        """All but one."""
        return min(super().most(units, cap), units - 1)


def pattern(value: str | Pattern) -> Pattern:
    """The pattern meant by a name.

    Args:
        value: "unstructured", "channel", "n:m" as in "2:4", "block:4x1", or a pattern.

    Returns:
        The pattern.

    Raises:
        ValueError: unknown name, or numbers out of range.

    Examples:
        >>> pattern("2:4"), pattern("block:8x8")
        (NM(n=2, m=4, axis=None), Block(shape=(8, 8)))
    """
    if isinstance(value, Pattern):
        return value
    named = {"unstructured": Unstructured(), "channel": Channel()}
    if value in named:
        return named[value]
    if found := re.fullmatch(r"(\d+):(\d+)", str(value)):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"block:(\d+(?:x\d+)*)", str(value)):
        return Block(tuple(int(size) for size in found[1].split("x")))
    raise ValueError(
        f"pattern={value!r} is unknown; allowed: unstructured, channel, n:m as in '2:4' or NM(2, 4), "
        "'block:4x1' or Block((4, 1))."
    )
