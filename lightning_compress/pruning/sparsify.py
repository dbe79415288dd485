"""Pruning by masks: exactly so many zeros, in place, with the mask as the weight's code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.functional.computed import Computed
from lightning_compress.functional.freeing import Freeing
from lightning_compress.functional.masks import apply_mask_, pack_bits, unpack_bits
from lightning_compress.names import lookup, matches, name_of
from lightning_compress.plans import Plan
from lightning_compress.pruning.criteria import Criterion, criterion, measure
from lightning_compress.pruning.followers import companions, silent
from lightning_compress.pruning.patterns import NM, Channel, Pattern, pattern
from lightning_compress.pruning.rules import magnitude, wanda
from lightning_compress.pruning.selection import Selection
from lightning_compress.stats import Calibration, Stats
from lightning_compress.tables import listing
from lightning_compress.targets import Target, locate, survey
from lightning_compress.transform import Transform

_SCOPES = ("global", "layer", "row")
_UNITS = ("absolute", "row_mean")
_NORMS = ("l2", "l1")


@dataclass(frozen=True)
class Prune(Transform):
    r"""Set the weights with the lowest scores to zero.

    Of a set of N elements at sparsity s exactly ``k = floor(s N + 0.5)`` are zero afterwards: the k lowest
    by (score, target order, flat index). Elements that an earlier mask already holds at zero count among
    the k. A global ranking never mixes complex and real weights. Masked weights make the archive smaller;
    they do not make the forward pass faster.

    Blocks are counted and ranked like elements. Of channels ``k = min(floor(s C + 0.5), C - 1)`` go: one of every layer
    stays. With a channel go its bias, and gamma and beta of a BatchNorm that directly follows, so that it is silent.
    In N:M, n of every m stay.

    Args:
        sparsity: share of zeros in [0, 1), of the dense count; or a mapping from name pattern to share. None is 0.5, or
            what the pattern is: ``1 - n / m``. Below that, ``floor(s m + 0.5)`` of every m go.
        criterion: "magnitude", "taylor", "fisher", "wanda", "random", of channels also "activation",
            "batchnorm_scale", "redundancy"; or a function ``(target, stats) -> scores``, higher = keep, or its
            import path.
        scope: what is ranked together: "global" (all targets), "layer" (each target) or "row" (each output
            row). None is "row" for "wanda" and "global" for the others.
        pattern: where zeros may fall: "unstructured", "channel" (whole output channels), "2:4" or ``NM(2, 4)``,
            "block:4x1" or ``Block((4, 1))``.
        norm: "l2" or "l1": how a block or channel puts element scores together.
        normalize: divide by the square root of the number of elements (l2), or by their number (l1).
        normalize_layers: divide the scores of every target by their mean before a ranking over all. None does so for
            channels.
        threshold: instead of ``sparsity``: an element (block, channel) goes if its score is below this, > 0.
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
        >>> channels = compress(net, [Prune(0.3, pattern="channel", exclude="2")]).model
        >>> int((channels[0].weight == 0).all(dim=1).sum()), int((channels[0].bias == 0).sum())
        (3, 3)

    Source: Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks; of the criteria and
    patterns at ``pruning.rules`` and ``pruning.patterns``.
    """

    sparsity: float | Mapping[str, float] | None = None
    criterion: str | Criterion = "magnitude"
    scope: str | None = None
    threshold: float | None = None
    threshold_unit: str = "absolute"
    max_layer_sparsity: float = 1.0
    infer_masks: bool = False
    samples: int = 256
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    pattern: str | Pattern = "unstructured"
    norm: str = "l2"
    normalize: bool = True
    normalize_layers: bool | None = None

    stage: ClassVar[str] = "mask"
    refuses_after: ClassVar[Mapping[str, str]] = {
        "grid": "new zeros would leave the grid or codebook of the quantized weights; prune first, then quantize"
    }

    def __post_init__(self) -> None:
        zeros, rule = pattern(self.pattern), criterion(self.criterion, self.seed)
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", zeros.sparsity if isinstance(zeros, NM) else 0.5)
        if self.scope is None and not isinstance(zeros, NM):
            object.__setattr__(self, "scope", "row" if rule is wanda and zeros.by_row else "global")
        self._check_shares(zeros)
        for option, allowed in (("scope", _SCOPES), ("threshold_unit", _UNITS), ("norm", _NORMS)):
            value = getattr(self, option)
            if value not in allowed and not (option == "scope" and value is None):
                raise ValueError(f"{option}={value!r} is unknown; allowed: {', '.join(allowed)}.")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold}: allowed is > 0 (None prunes by sparsity).")
        if not 0 < self.max_layer_sparsity <= 1:
            raise ValueError(
                f"max_layer_sparsity={self.max_layer_sparsity}: allowed is 0 < max_layer_sparsity <= 1."
            )
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: allowed is >= 1.")
        if getattr(rule, "whole", False) and not isinstance(zeros, Channel):
            raise ValueError(
                f"criterion={name_of(self.criterion)!r} scores whole channels: give pattern='channel' (here "
                f"pattern={self.pattern!r}), or another criterion."
            )
        self._check_pattern(zeros)

    def _check_shares(self, zeros: Pattern) -> None:
        shares = self.sparsity if isinstance(self.sparsity, Mapping) else {"": self.sparsity}
        for name, share in shares.items():
            where = f" for {name!r}" if name else ""
            if share is None or not 0 <= share < 1:
                extra = " (1 would remove the layer): use DropLayers for that" if share == 1 else ""
                raise ValueError(f"sparsity={share}{where}: allowed is 0 <= sparsity < 1{extra}.")
            if isinstance(zeros, NM) and share > zeros.sparsity:
                raise ValueError(
                    f"sparsity={share}{where}: {zeros} has {zeros.sparsity:.4g} zeros at most; leave sparsity out."
                )

    def _check_pattern(self, zeros: Pattern) -> None:
        """Refuse options that the pattern gives no meaning to."""
        senseless = {}
        if isinstance(zeros, NM):
            senseless = {"scope": self.scope, "threshold": self.threshold}
            senseless["normalize_layers"] = self.normalize_layers or None
        elif not zeros.by_row:
            senseless["scope"] = self.scope if self.scope == "row" else None
            senseless["threshold_unit"] = self.threshold_unit if self.threshold_unit != "absolute" else None
        for option, value in senseless.items():
            if value is not None:
                raise ValueError(
                    f"{option}={value!r} has no meaning with pattern={self.pattern!r}: leave it out."
                )

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
        scores, source = self._scores(model, targets, data)
        skipped |= {t.key: "no BatchNorm directly follows it" for t in targets if t.key not in scores}
        targets = [t for t in targets if t.key in scores]
        named = {t.key: t for t in targets}
        old = Computed(named, lambda key: self.present_mask(named[key]))
        masks = self._masks(targets, scores, old, shares)
        layers: dict[str, dict[str, Any]] = {}
        reached, freeing = bool(targets), Freeing()
        for t in targets:
            freeing.worked_on(t.weight.nbytes)
            mask = masks[t.key]
            reached = reached and torch.equal(mask, old[t.key])
            if bool(mask.all()):
                skipped[t.key] = "none of its elements are among those that go"
            else:
                layers[t.key] = _decision(t, mask)
        if isinstance(pattern(self.pattern), Channel):
            x = None if data is None or not data.available else data.example(model)
            for part, mask in self.silenced(model, targets, masks, x, skipped):
                before = codes.current_mask(part)
                mask = mask if before is None else mask & before
                if part.key in layers:
                    mask = mask & unpack_bits(layers[part.key]["packed"], mask.shape).to(mask.device)
                layers[part.key] = _decision(part, mask)
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
            shape = tuple(decided["shape"])
            if weight.shape != shape:
                raise ValueError(
                    f"the mask of {key} has shape {shape}, its weight {tuple(weight.shape)}: apply the plan to the "
                    "architecture it was made for."
                )
            try:
                code = codes.Mask.of_bits(decided["packed"], weight.shape)
            except (AttributeError, ValueError) as error:
                raise ValueError(f"the mask of {key}: {error}") from None
            todo.append((module, decided["param"], weight, code))
        freeing = Freeing()
        for module, param, weight, code in todo:
            freeing.worked_on(weight.nbytes)
            apply_mask_(weight, code.mask.to(weight.device))
            codes.attach(module, param, code)

    def shares(self, targets: Sequence[Target]) -> tuple[dict[str, float], dict[str, str]]:
        """The final sparsity of every target, and why some have none: no pattern of names or of zeros fits.

        Args:
            targets: candidate weights.

        Returns:
            Target key -> share of zeros, and target key -> reason.

        Raises:
            ValueError: a pattern of ``sparsity`` fits none of them.
        """
        zeros = pattern(self.pattern)
        skipped = {t.key: why for t in targets if (why := zeros.refusal(t))}
        if not isinstance(self.sparsity, Mapping):
            assert self.sparsity is not None
            return {t.key: float(self.sparsity) for t in targets if t.key not in skipped}, skipped
        used = {
            p for p in self.sparsity for t in targets if p in (t.name, t.key) or matches(p, t.name, t.key)
        }
        unused = [p for p in self.sparsity if p not in used and p != "*"]
        if unused:
            names = listing([t.name or t.key for t in targets])
            raise ValueError(f"sparsity has {unused[0]!r}, which fits no layer to prune; these are: {names}.")
        shares: dict[str, float] = {}
        for t in (t for t in targets if t.key not in skipped):
            share = lookup(self.sparsity, t.name, t.key)
            if share is None:
                skipped[t.key] = f"no pattern of sparsity={dict(self.sparsity)} fits"
            else:
                shares[t.key] = float(share)
        return shares, skipped

    def scores(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        data: Calibration | None = None,
        measured: Mapping[str, Stats] | None = None,
    ) -> tuple[dict[str, Tensor], str]:
        """Score the units of every target by the criterion, after measuring what it needs.

        Args:
            model: the model the targets belong to.
            targets: weights.
            data: calibration inputs, for criteria that need them.
            measured: target key -> what the criterion needs, where it is known already.

        Returns:
            Target key -> real scores, shape of the weight (blocks: one for each, channels: [out channels]), and which
            inputs were used ("" if none). For "batchnorm_scale", targets that no BatchNorm follows are left out.

        Raises:
            ValueError: scores of a wrong shape or not finite, with the layer and the count.
        """
        found, source = self._scores(model, targets, data, measured)
        return dict(found), source

    def _scores(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        data: Calibration | None = None,
        measured: Mapping[str, Stats] | None = None,
    ) -> tuple[Mapping[str, Tensor], str]:
        """As ``scores``; those of the magnitude, which are made in no time, are not kept."""
        rule, zeros, source = criterion(self.criterion, self.seed), pattern(self.pattern), ""
        if measured is None:
            measured, source = measure(rule, model, targets, data, self.samples)
        scaled = "norm_scale" not in getattr(rule, "needs", ())
        known = {t.key: t for t in targets if scaled or measured[t.key].norm_scale is not None}
        seen = measured
        found = Computed(
            known, lambda key: zeros.scores(rule, known[key], seen.get(key), self.norm, self.normalize)
        )
        return found if rule is magnitude else dict(found), source

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
            scores: target key -> scores of its units.
            old: target key -> present mask, True = kept.
            shares: target key -> share of zeros wanted.

        Returns:
            Target key -> mask on the weight's device.

        Raises:
            ValueError: max_layer_sparsity leaves less room than the sparsity asks for.
        """
        return dict(self._masks(targets, scores, old, shares))

    def _masks(
        self,
        targets: Sequence[Target],
        scores: Mapping[str, Tensor],
        old: Mapping[str, Tensor],
        shares: Mapping[str, float],
    ) -> Mapping[str, Tensor]:
        """As ``masks``, each made when it is asked for."""
        zeros, layers = pattern(self.pattern), self.normalize_layers
        if layers is None:
            layers = isinstance(zeros, Channel) and self.scope == "global" and self.threshold is None
        selection = Selection(
            zeros, self.scope, self.threshold, self.threshold_unit, self.max_layer_sparsity, layers
        )
        named = {t.key: t for t in targets}
        alive = Computed(named, lambda key: zeros.units(named[key], old[key]))
        kept = selection.kept(targets, scores, alive, shares)
        return Computed(named, lambda key: zeros.elements(named[key], kept[key]) & old[key])

    def silenced(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        masks: Mapping[str, Tensor],
        x: Any = None,
        skipped: dict[str, str] | None = None,
    ) -> list[tuple[Target, Tensor]]:
        """What goes with masked channels: biases, and gamma and beta of BatchNorm layers that directly follow.

        Args:
            model: the model the targets belong to.
            targets: weights.
            masks: target key -> mask.
            x: one input, to see what follows what; None reads the code.
            skipped: takes parameter name -> why it is left alone.

        Returns:
            Parameters with their masks, each once; none for patterns other than "channel".
        """
        zeros = pattern(self.pattern)
        found: dict[str, tuple[Target, Tensor]] = {}
        if not isinstance(zeros, Channel):
            return []
        for key, what in companions(model, targets, x, self.exclude).items():
            target = next(t for t in targets if t.key == key)
            kept = zeros.units(target, masks[key])
            if bool(kept.all()):
                continue
            if skipped is not None:
                skipped |= what.skipped
            if what.outputs:
                warnings.warn(
                    f"{int((~kept).sum())} of {len(kept)} outputs of the model are constant zero now ({key}): leave "
                    f"that layer out, exclude={target.name!r}.",
                    stacklevel=4,
                )
            for part in what.parts:
                mask = silent(part, kept)
                other = found.get(part[0].key)
                found[part[0].key] = part[0], mask if other is None else mask & other[1]
        return list(found.values())

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


def _decision(target: Target, mask: Tensor) -> dict[str, Any]:
    """The mask of a target in a plan, with one bit an entry."""
    return {"layer": target.name, "param": target.param, "shape": list(mask.shape), "packed": pack_bits(mask)}
