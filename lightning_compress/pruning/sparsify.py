"""Unstructured pruning: exactly so many zeros, in place, with the mask as the weight's code."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.functional.masks import count_pruned, row_mask, topk_mask
from lightning_compress.names import lookup, matches, name_of
from lightning_compress.plans import Plan
from lightning_compress.pruning.criteria import Criterion, criterion
from lightning_compress.stats import Calibration, Stats, collect
from lightning_compress.tables import listing
from lightning_compress.targets import Target, locate, survey
from lightning_compress.transform import Transform

_SCOPES = ("global", "layer", "row")
_UNITS = ("absolute", "row_mean")


@dataclass(frozen=True)
class Prune(Transform):
    r"""Set the weights with the lowest scores to zero.

    Of a set of N elements at sparsity s exactly ``k = floor(s N + 0.5)`` are zero afterwards: the k lowest
    by (score, target order, flat index). Elements that an earlier mask already holds at zero count among
    the k. A global ranking never mixes complex and real weights. Masked weights make the archive smaller;
    they do not make the forward pass faster.

    Args:
        sparsity: share of zeros in [0, 1), of the dense count; or a mapping from name pattern to share.
        criterion: "magnitude", "random", or a function ``(target, stats) -> scores``, higher = keep.
        scope: what is ranked together: "global" (all targets), "layer" (each target) or "row" (each output
            row).
        threshold: instead of ``sparsity``: an element goes if its score is below this, > 0.
        threshold_unit: "absolute", or "row_mean" (threshold times the mean score of the output row).
        max_layer_sparsity: cap per target under scope="global", in (0, 1].
        infer_masks: take zeros that are present as an earlier mask (a sparse checkpoint from elsewhere).
        samples: calibration inputs, for criteria that need them.
        seed: for criterion="random".
        include: patterns of layer names to prune.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: an option outside its range; a score that is not finite, with the layer's name.

    Examples:
        >>> net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> pruned = compress(net, [Prune(sparsity=0.5)]).model
        >>> sum(int((p == 0).sum()) for p in (pruned[0].weight, pruned[2].weight))
        60

    Source: Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks.
    """

    sparsity: float | Mapping[str, float] = 0.5
    criterion: str | Criterion = "magnitude"
    scope: str = "global"
    threshold: float | None = None
    threshold_unit: str = "absolute"
    max_layer_sparsity: float = 1.0
    infer_masks: bool = False
    samples: int = 256
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    stage: ClassVar[str] = "mask"
    refuses_after: ClassVar[Mapping[str, str]] = {
        "grid": "new zeros would leave the grid or codebook of the quantized weights; prune first, then quantize"
    }

    def __post_init__(self) -> None:
        shares = self.sparsity if isinstance(self.sparsity, Mapping) else {"": self.sparsity}
        for pattern, share in shares.items():
            if not 0 <= share < 1:
                where = f" for {pattern!r}" if pattern else ""
                extra = " (1 would remove the layer): use DropLayers for that" if share == 1 else ""
                raise ValueError(f"sparsity={share}{where}: allowed is 0 <= sparsity < 1{extra}.")
        if self.scope not in _SCOPES:
            raise ValueError(f"scope={self.scope!r} is unknown; allowed: {', '.join(_SCOPES)}.")
        if self.threshold_unit not in _UNITS:
            raise ValueError(
                f"threshold_unit={self.threshold_unit!r} is unknown; allowed: {', '.join(_UNITS)}."
            )
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold}: allowed is > 0 (None prunes by sparsity).")
        if not 0 < self.max_layer_sparsity <= 1:
            raise ValueError(
                f"max_layer_sparsity={self.max_layer_sparsity}: allowed is 0 < max_layer_sparsity <= 1."
            )
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: allowed is >= 1.")
        criterion(self.criterion, self.seed)

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide which elements go; writes nothing.

        Args:
            model: any module.
            data: calibration inputs, for criteria that need them.

        Returns:
            A mask for every target that loses an element.

        Raises:
            ValueError: scores that are not finite, or a criterion that needs inputs and got none.
        """
        found = survey(model, self.include, self.exclude)
        shares, skipped = self.shares(found.targets)
        targets = [t for t in found.targets if t.key in shares]
        old = {t.key: self.present_mask(t) for t in targets}
        scores, source = self.scores(model, targets, data)
        masks = self.masks(targets, scores, old, shares)
        layers: dict[str, dict[str, Any]] = {}
        for t in targets:
            if bool(masks[t.key].all()):
                skipped[t.key] = "none of its elements are among those that go"
            else:
                layers[t.key] = {"layer": t.name, "param": t.param, "mask": masks[t.key].cpu()}
        reached = bool(targets) and all(torch.equal(masks[t.key], old[t.key]) for t in targets)
        return Plan(layers, found.skipped | skipped, identity=reached, data=source)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Write the zeros in place and attach the masks.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model has no such weight, or of another shape; nothing is written then.
        """
        todo = []
        for key, decided in plan.layers.items():
            module, weight = locate(model, decided["layer"], decided["param"])
            if weight.shape != decided["mask"].shape:
                raise ValueError(
                    f"the mask of {key} has shape {tuple(decided['mask'].shape)}, its weight {tuple(weight.shape)}: "
                    "apply the plan to the architecture it was made for."
                )
            todo.append((module, decided["param"], decided["mask"]))
        for module, param, mask in todo:
            codes.set_mask(module, param, mask)

    def shares(self, targets: Sequence[Target]) -> tuple[dict[str, float], dict[str, str]]:
        """The final sparsity of every target, and why some have none.

        Args:
            targets: candidate weights.

        Returns:
            Target key -> share of zeros, and target key -> reason.

        Raises:
            ValueError: a pattern of ``sparsity`` fits none of them.
        """
        if not isinstance(self.sparsity, Mapping):
            return {t.key: float(self.sparsity) for t in targets}, {}
        used = {
            p for p in self.sparsity for t in targets if p in (t.name, t.key) or matches(p, t.name, t.key)
        }
        unused = [p for p in self.sparsity if p not in used and p != "*"]
        if unused:
            names = listing([t.name or t.key for t in targets])
            raise ValueError(f"sparsity has {unused[0]!r}, which fits no layer to prune; these are: {names}.")
        shares: dict[str, float] = {}
        skipped: dict[str, str] = {}
        for t in targets:
            share = lookup(self.sparsity, t.name, t.key)
            if share is None:
                skipped[t.key] = f"no pattern of sparsity={dict(self.sparsity)} fits"
            else:
                shares[t.key] = float(share)
        return shares, skipped

    def scores(
        self, model: nn.Module, targets: Sequence[Target], data: Calibration | None = None
    ) -> tuple[dict[str, Tensor], str]:
        """Score every target by the criterion, after measuring what it needs.

        Args:
            model: the model the targets belong to.
            targets: weights.
            data: calibration inputs, for criteria that need them.

        Returns:
            Target key -> real scores, and which inputs were used ("" if none).

        Raises:
            ValueError: scores of a wrong shape or not finite, with the layer and the count.
        """
        rule = criterion(self.criterion, self.seed)
        needs: Sequence[str] = getattr(rule, "needs", ())
        measured: Mapping[str, Stats] = {}
        source = ""
        if needs:
            inputs = dataclasses.replace(data or Calibration(), samples=self.samples)
            measured, source = collect(model, targets, inputs, needs), inputs.describe(model)
        scores = {}
        for t in targets:
            score = rule(t, measured.get(t.key))
            if score.shape != t.weight.shape or score.is_complex():
                raise ValueError(
                    f"criterion {name_of(self.criterion)} gave {t.key} scores of shape "
                    f"{tuple(score.shape)}, dtype {score.dtype}; "
                    f"needed are real scores of shape {tuple(t.weight.shape)}."
                )
            bad = int((~score.isfinite()).sum())
            if bad:
                raise ValueError(
                    f"{bad} of {score.numel()} scores of {t.key} are not finite (criterion {name_of(self.criterion)}): "
                    "are its weights finite? Leave it out with exclude."
                )
            scores[t.key] = score
        return scores, source

    def masks(
        self,
        targets: Sequence[Target],
        scores: Mapping[str, Tensor],
        old: Mapping[str, Tensor],
        shares: Mapping[str, float],
    ) -> dict[str, Tensor]:
        """New masks: what the ranking keeps and the old masks kept.

        Args:
            targets: weights.
            scores: target key -> scores.
            old: target key -> present mask, True = kept.
            shares: target key -> share of zeros wanted.

        Returns:
            Target key -> mask on the weight's device.

        Raises:
            ValueError: max_layer_sparsity leaves less room than the sparsity asks for.
        """
        ranked = {t.key: scores[t.key].masked_fill(~old[t.key], -torch.inf) for t in targets}
        if self.threshold is not None:
            kept = {t.key: ranked[t.key] >= self._thresholds(t, scores[t.key]) for t in targets}
        elif self.scope == "row":
            kept = {t.key: self._row(t, ranked[t.key], shares[t.key]) for t in targets}
        elif self.scope == "layer":
            kept = {
                t.key: topk_mask([ranked[t.key]], count_pruned(shares[t.key], t.weight.numel()))[0]
                for t in targets
            }
        else:
            kept = self._global(targets, ranked, shares)
        return {t.key: kept[t.key] & old[t.key] for t in targets}

    def present_mask(self, target: Target) -> Tensor:
        """The mask a weight has now: its code's unless stale, its zeros too with ``infer_masks``, else everything kept.

        Args:
            target: the weight.

        Returns:
            Bool tensor on the weight's device, True = kept.
        """
        mask = codes.current_mask(target)
        weight = target.weight.detach()
        if self.infer_masks:
            return (weight != 0) if mask is None else mask & (weight != 0)
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device) if mask is None else mask

    def _thresholds(self, target: Target, scores: Tensor) -> Tensor | float:
        assert self.threshold is not None
        if self.threshold_unit == "absolute":
            return self.threshold
        others = [a for a in range(scores.dim()) if a != target.axes.out]
        return self.threshold * scores.mean(dim=others, keepdim=True)

    @staticmethod
    def _row(target: Target, scores: Tensor, share: float) -> Tensor:
        size = scores.numel() // scores.shape[target.axes.out]
        return row_mask(scores, count_pruned(share, size), target.axes.out)

    def _global(
        self, targets: Sequence[Target], ranked: Mapping[str, Tensor], shares: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """One ranking for each set of targets that have the same share and are alike (complex or real)."""
        sets: dict[tuple[float, bool], list[Target]] = {}
        for t in targets:
            sets.setdefault((shares[t.key], t.weight.is_complex()), []).append(t)
        kept: dict[str, Tensor] = {}
        for (share, _), members in sets.items():
            scores = [self._capped(ranked[t.key]) for t in members]
            k = count_pruned(share, sum(s.numel() for s in scores))
            room = sum(int((s < torch.inf).sum()) for s in scores)
            if k > room:
                raise ValueError(
                    f"sparsity={share} asks for {k} zeros, but max_layer_sparsity="
                    f"{self.max_layer_sparsity} allows {room}: raise it."
                )
            device = scores[0].device
            for t, mask in zip(members, topk_mask([s.to(device) for s in scores], k), strict=True):
                kept[t.key] = mask.to(t.weight.device)
                if not bool(mask.any()):
                    warnings.warn(
                        f"{t.key} has no weight left: set max_layer_sparsity below 1 to keep some "
                        f"(now {self.max_layer_sparsity}).",
                        stacklevel=2,
                    )
        return kept

    def _capped(self, scores: Tensor) -> Tensor:
        """Scores in which the elements that the cap protects are out of reach."""
        most = math.floor(self.max_layer_sparsity * scores.numel())
        if most == scores.numel():
            return scores
        protected = topk_mask([scores], most)[0]
        return scores.masked_fill(protected, torch.inf)
