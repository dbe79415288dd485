"""How many units of which weights go: rankings over all weights, inside each, inside their rows, or a threshold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.functional.computed import Computed
from lightning_compress.functional.masks import count_pruned, row_mask, topk_mask
from lightning_compress.functional.ranking import Cut, lowest
from lightning_compress.pruning.patterns import NM, Pattern
from lightning_compress.targets import Target


@dataclass(frozen=True)
class Selection:
    """Which units of which weights stay; the options of ``lightning_compress.Prune``.

    Args:
        pattern: which elements are a unit.
        scope: "global", "layer" or "row".
        threshold: instead of a share: units with lower scores go.
        threshold_unit: "absolute" or "row_mean".
        max_layer_sparsity: cap per weight under scope="global".
        normalize_layers: divide the scores of every weight by their mean size first.
    """

    pattern: Pattern
    scope: str | None
    threshold: float | None
    threshold_unit: str
    max_layer_sparsity: float
    normalize_layers: bool

    def kept(
        self,
        targets: Sequence[Target],
        scores: Mapping[str, Tensor],
        alive: Mapping[str, Tensor],
        shares: Mapping[str, float],
    ) -> Mapping[str, Tensor]:
        """The units that stay.

        Args:
            targets: weights.
            scores: target key -> score of every unit; may be made when asked for, several times.
            alive: target key -> whether something of the unit is kept now; others go first.
            shares: target key -> share of zeros.

        Returns:
            Target key -> bool tensor, one entry per unit; made when asked for.

        Raises:
            ValueError: max_layer_sparsity leaves less room than the shares ask for.
        """
        named = {t.key: t for t in targets}
        comparable = scores
        if self.normalize_layers:
            comparable = Computed(named, lambda key: _comparable(scores[key], alive[key]))

        def rank(key: str) -> Tensor:
            living = alive[key]
            return comparable[key] if bool(living.all()) else comparable[key].masked_fill(~living, -torch.inf)

        ranked: Mapping[str, Tensor] = Computed(named, rank)
        if not isinstance(scores, Computed):  # they are held anyway
            ranked = dict(ranked)
        if isinstance(self.pattern, NM):
            zeros = self.pattern
            return Computed(named, lambda key: zeros.kept(named[key], ranked[key], shares[key]))
        if self.threshold is not None:
            return Computed(named, lambda key: self._above(named[key], comparable[key], ranked[key]))
        if self.scope == "row":
            return Computed(named, lambda key: _row(named[key], ranked[key], shares[key]))
        if self.scope == "layer":
            return Computed(named, lambda key: self._layer(ranked[key], shares[key]))
        return self._global(targets, ranked, alive, shares)

    def _above(self, target: Target, scores: Tensor, ranked: Tensor) -> Tensor:
        assert self.threshold is not None
        limit: Tensor | float = self.threshold
        if self.threshold_unit == "row_mean":
            others = [a for a in range(scores.dim()) if a != target.axes.out]
            limit = self.threshold * scores.mean(dim=others, keepdim=True)
        kept = ranked >= limit
        spared = kept.numel() - self.pattern.most(kept.numel(), 1.0)  # of channels, one stays
        return kept | topk_mask([ranked], kept.numel() - spared)[0] if spared else kept

    def _layer(self, ranked: Tensor, share: float) -> Tensor:
        total = ranked.numel()
        return topk_mask([ranked], min(count_pruned(share, total), self.pattern.most(total, 1.0)))[0]

    def _global(
        self,
        targets: Sequence[Target],
        ranked: Mapping[str, Tensor],
        alive: Mapping[str, Tensor],
        shares: Mapping[str, float],
    ) -> Mapping[str, Tensor]:
        """One ranking for each set of targets that have the same share and are alike (complex or real)."""
        sets: dict[tuple[float, bool], list[Target]] = {}
        for t in targets:
            sets.setdefault((shares[t.key], t.weight.is_complex()), []).append(t)
        cuts: dict[str, tuple[Cut, int]] = {}
        for (share, _), members in sets.items():
            sizes = [alive[t.key].numel() for t in members]
            k = min(count_pruned(share, sum(sizes)), sum(self.pattern.most(n, 1.0) for n in sizes))
            room = sum(self.pattern.most(n, self.max_layer_sparsity) for n in sizes)
            if k > room:
                raise ValueError(
                    f"sparsity={share} asks for {k} zeros, but max_layer_sparsity="
                    f"{self.max_layer_sparsity} allows {room}: raise it."
                )
            cut = lowest(_Scores([t.key for t in members], ranked, self._capped), k)
            for place, (t, size) in enumerate(zip(members, sizes, strict=True)):
                cuts[t.key] = cut, place
                if cut.dropped[place] == size:
                    warnings.warn(
                        f"{t.key} has no weight left: set max_layer_sparsity below 1 to keep some "
                        f"(now {self.max_layer_sparsity}).",
                        stacklevel=2,
                    )
        return Computed(
            (t.key for t in targets),
            lambda key: cuts[key][0].mask(cuts[key][1], self._capped(ranked[key])),
        )

    def _capped(self, scores: Tensor) -> Tensor:
        """Scores in which the units that may not go are out of reach."""
        most = self.pattern.most(scores.numel(), self.max_layer_sparsity)
        if most == scores.numel():
            return scores
        return scores.masked_fill(topk_mask([scores], most)[0], torch.inf)


class _Scores(Sequence[Tensor]):
    """Some of the scores in order, made when they are asked for."""

    def __init__(
        self, keys: Sequence[str], scores: Mapping[str, Tensor], change: Callable[[Tensor], Tensor]
    ) -> None:
        self._keys, self._scores, self._change = keys, scores, change

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: Any) -> Any:
        return self._change(self._scores[self._keys[place]])


def _row(target: Target, ranked: Tensor, share: float) -> Tensor:
    axis = target.axes.out
    return row_mask(ranked, count_pruned(share, ranked.numel() // ranked.shape[axis]), axis)


def _comparable(scores: Tensor, alive: Tensor) -> Tensor:
    """Scores divided by the mean size of those that are alive."""
    mean = scores[alive].abs().mean() if bool(alive.any()) else scores.new_zeros(())
    return scores / mean if float(mean) > 0 else scores
