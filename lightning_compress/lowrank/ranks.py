"""The rank of one layer by a criterion, and the scheme that loses least at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lightning_compress.functional.factor import rank_from_ratio
from lightning_compress.lowrank.schemes import Decomposition, Option, Ranks, Scheme, Shapes
from lightning_compress.stats import Stats
from lightning_compress.targets import Target

Cut = tuple[Decomposition, Option]


@dataclass(frozen=True)
class Rule:
    """How ranks are chosen; the fields are those of ``Factorize``.

    Args:
        criterion: "rank_ratio", "energy_ratio", "params_ratio" or "rank".
        min_rank: lower bound.
        max_rank: upper bound or None.
        force: also where nothing is saved.
        damping: of the Gram matrices.
    """

    criterion: str
    min_rank: int
    max_rank: int | None
    force: bool
    damping: float

    def choose(
        self,
        target: Target,
        schemes: Sequence[Scheme],
        value: float,
        seen: Stats | None,
        calls: Sequence[Shapes],
    ) -> tuple[Cut | None, str]:
        """The scheme that loses least per number saved, at the rank of the criterion.

        Args:
            target: the weight.
            schemes: its candidates.
            value: of the criterion.
            seen: statistics of the layer's inputs.
            calls: shapes that the layer saw.

        Returns:
            The factors and their option, or None and why.
        """
        dense = numbers(target.weight)
        cuts: list[Cut] = []
        reasons = []
        for scheme in schemes:
            size = partial(scheme.params, target.module, target.weight)
            cut = self.decomposed(target, scheme, seen)
            ranks = self._ranks(cut, value, [r for r in cut.path() if size(r) <= value * dense])
            if ranks is None:
                least = cut.path()[0]
                reasons.append(
                    f"even rank {_written(least)} ({scheme.name}) stores {size(least)} numbers, "
                    f"{size(least) / dense:.2f} of the layer's {dense}: params_ratio={value} is below that"
                )
            elif size(ranks) >= dense and not self.force:
                saving = [r for r in cut.path() if size(r) < dense]
                most = f"the largest that saves is {_written(saving[-1])}" if saving else "no rank saves"
                reasons.append(
                    f"rank {_written(ranks)} of {_written(cut.full)} ({scheme.name}) stores {size(ranks)} numbers, "
                    f"the layer {dense}: {most}"
                )
            else:
                cuts.append((cut, option(target, scheme, cut, ranks, calls)))
        if not cuts:
            return None, reasons[0]

        def per_saved(cut: Cut) -> float:
            saved = dense - cut[1].params
            return cut[1].error / saved if saved > 0 else math.inf

        return min(cuts, key=per_saved), ""

    def _ranks(self, cut: Decomposition, value: float, small_enough: list[Ranks]) -> Ranks | None:
        if self.criterion == "params_ratio":
            return self.clip(small_enough[-1], cut.full) if small_enough else None
        if self.criterion == "energy_ratio":
            return self.clip(cut.at_energy(value), cut.full)
        wanted = rank_from_ratio if self.criterion == "rank_ratio" else lambda r, full: int(min(r, full))
        return self.clip(tuple(wanted(value, f) for f in cut.full), cut.full)

    def clip(self, ranks: Ranks, full: Ranks) -> Ranks:
        """Ranks within the bounds.

        Args:
            ranks: of every axis.
            full: their largest values.

        Returns:
            Ranks in [min_rank, max_rank] as far as full rank allows.
        """
        most = math.inf if self.max_rank is None else self.max_rank
        return tuple(int(min(max(r, self.min_rank), most, f)) for r, f in zip(ranks, full, strict=True))

    def decomposed(self, target: Target, scheme: Scheme, seen: Stats | None) -> Decomposition:
        """The weight under a scheme.

        Args:
            target: the weight.
            scheme: one that fits it.
            seen: statistics of the layer's inputs.

        Returns:
            The decomposition.

        Raises:
            ValueError: something is not finite; names the weight.
        """
        try:
            return scheme.decompose(target, seen, self.damping)
        except ValueError as error:
            raise ValueError(f"{target.key}: {error}") from error


def option(
    target: Target, scheme: Scheme, cut: Decomposition, ranks: Ranks, calls: Sequence[Shapes]
) -> Option:
    """What a scheme costs and loses at some ranks.

    Args:
        target: the weight.
        scheme: the scheme.
        cut: the weight under it.
        ranks: of every axis.
        calls: shapes that the layer saw; without any, MACs are NaN.

    Returns:
        The option.
    """
    of = target.module, target.weight, ranks
    macs = scheme.macs(*of, calls) if calls else math.nan
    return Option(scheme.name, ranks, scheme.params(*of), macs, max(cut.error(ranks), 0.0))


def numbers(weight: Tensor) -> int:
    """Real numbers of a weight.

    Args:
        weight: real or complex.

    Returns:
        Entries; twice as many if complex.
    """
    return weight.numel() * (2 if weight.is_complex() else 1)


def _written(ranks: Ranks) -> str:
    return str(ranks[0]) if len(ranks) == 1 else str(ranks)
