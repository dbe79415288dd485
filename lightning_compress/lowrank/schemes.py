"""What a scheme is: one way of writing a layer's weight as a product of thinner ones."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lightning_compress.stats import Stats
from lightning_compress.targets import Target

Ranks = tuple[int, ...]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of the input and the output of one call of a layer


class Option(NamedTuple):
    """A layer under one scheme at one choice of ranks.

    Args:
        scheme: name of the scheme; "dense" for the layer as it is.
        ranks: one for every factorized axis.
        params: real numbers stored, without the bias.
        macs: multiply-adds for the example input; NaN without one.
        error: share of the energy that is lost, ``sum_{i>r} s_i^2 / sum s_i^2``.
    """

    scheme: str
    ranks: Ranks
    params: int
    macs: float
    error: float


class Decomposition(ABC):
    """One weight under one scheme, ready to be cut at any rank.

    Attributes:
        full: largest rank of every factorized axis.
    """

    full: Ranks

    @abstractmethod
    def error(self, ranks: Ranks) -> float:
        """Share of the energy lost at these ranks, of the weight or (with input statistics) of the output."""

    @abstractmethod
    def at_energy(self, ratio: float) -> Ranks:
        """Smallest ranks that keep this share of the energy."""

    @abstractmethod
    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        """The factors: name inside the new layer (``"first.weight"``) -> tensor in the weight's dtype, on the CPU."""

    @abstractmethod
    def product(self, ranks: Ranks) -> Tensor:
        """The weight that the factors stand for, of the dense shape, in double precision."""

    def path(self) -> list[Ranks]:
        """Ranks from the smallest to full, every axis at the same share; what automatic ranks choose from."""
        return equal_shares(self.full)


class Scheme(ABC):
    """How layers of some types are written as products; stateless.

    Attributes:
        name: what users call it.
        gram: whether ``decompose`` can use the Gram matrix of the inputs.
        automatic: whether "auto" tries it; those that iterate are slow.
    """

    name: ClassVar[str]
    gram: ClassVar[bool] = True
    automatic: ClassVar[bool] = True

    @abstractmethod
    def fits(self, target: Target) -> str | None:
        """Why this scheme is not for this weight: "" for another kind of layer, a sentence, or None if it is."""

    @abstractmethod
    def full(self, layer: Any, weight: Tensor) -> Ranks:
        """Largest rank of every factorized axis."""

    @abstractmethod
    def params(self, layer: Any, weight: Tensor, ranks: Ranks) -> int:
        """Real numbers of the factors, without the bias."""

    @abstractmethod
    def macs(self, layer: Any, weight: Tensor, ranks: Ranks, calls: Sequence[Shapes]) -> int:
        """Multiply-adds of the factors in these calls, Fourier transforms left out."""

    @abstractmethod
    def decompose(self, target: Target, seen: Stats | None, damping: float) -> Decomposition:
        """Factorize the weight, for its outputs if the layer's inputs have been seen."""

    @abstractmethod
    def build(self, layer: Any, param: str, ranks: Ranks) -> nn.Module:
        """The layer that takes its place, with factors still to be filled; it takes the bias over.

        It may be the layer itself with another weight.
        """

    @abstractmethod
    def merge(self, factors: Any) -> nn.Module:
        """One layer of the original type, equal to what ``build`` made."""


def equal_shares(full: Ranks) -> list[Ranks]:
    """Ranks ``ceil(t R_d / max R)`` for t = 1 ... max R.

    Args:
        full: R_d of every axis.

    Returns:
        From the smallest to full.

    Examples:
        >>> equal_shares((2, 4))
        [(1, 1), (1, 2), (2, 3), (2, 4)]
    """
    most = max(full)
    return [tuple(math.ceil(t * r / most) for r in full) for t in range(1, most + 1)]
