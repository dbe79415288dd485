"""Removing channels for good: fewer MACs and parameters, in a model of the same kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.channels.check import plan_entries
from lightning_compress.channels.families import Channels, Family, find_channels
from lightning_compress.channels.surgery import cut
from lightning_compress.channels.trace import trace
from lightning_compress.channels.trials import Trials
from lightning_compress.channels.watcher import tensors_of
from lightning_compress.names import lookup, matches
from lightning_compress.plans import Plan
from lightning_compress.pruning.criteria import Criterion, channel_scores, criterion, measure
from lightning_compress.pruning.order import Limits, RemovalOrder
from lightning_compress.pruning.reconstruct import can_reconstruct, reconstruct
from lightning_compress.pruning.silence import silent
from lightning_compress.stats import Calibration, Stats
from lightning_compress.stats.drawing import one_sample
from lightning_compress.tables import listing
from lightning_compress.targets import Target, survey
from lightning_compress.transform import Transform

_SCOPES = ("layer", "global")
_CONFLICTS = ("skip", "error")
_SILENT = "silent"


@dataclass(frozen=True)
class RemoveChannels(Transform):
    r"""Remove whole channels, neurons and attention heads from a model, everywhere they occur.

    One forward pass shows which entries of which parameters must go together: the outputs of a layer, the statistics
    of its BatchNorm, the inputs of the next layer, all layers that meet in a residual connection. What shares its
    places is a family; ``k = floor(ratio C + 0.5)`` of its C channels go, those with the lowest scores, at least one
    stays. A channel's score is the mean over the layers that make it of the layer's channel score, divided by the
    layer's mean. The inputs and outputs of the model stay.

    Every choice is tried out on a copy: the small model must run, forward and backward and for twice as many samples,
    give the shapes it gave before, and bring the same channels together. What does not pass is left alone and listed,
    with the reason.

    The result equals the original with the removed channels set to zero wherever they occur, except where layers
    normalize over channels. Masks of the weights are cut along; Parameters stay the same objects.

    Args:
        ratio: share of the channels of each family to remove, in [0, 1); a mapping from name pattern to share; or
            "silent": those whose weights are all zero already, such as masked ones.
        budget: instead: ("macs" or "params" or "latency", share to keep in (0, 1]): as many channels as it takes.
        criterion: "magnitude", "random", "taylor", "fisher", "wanda", "activation", "batchnorm_scale", "redundancy",
            or a function ``(target, stats) -> scores``, higher = keep.
        scope: "layer": every family loses the same share; "global": one ranking over all.
        norm: "l2" or "l1", how the scores of a channel's elements are put together.
        normalize: divide a layer's scores by their mean; None does so for all criteria but "taylor" and "fisher",
            which estimate a loss and are summed over layers instead.
        per: "channel", or "mac": under scope="global", scores are divided by the MACs that a channel costs.
        round_to: families keep a multiple of so many channels, where they have that many.
        max_layer_ratio: cap per family, in (0, 1].
        reconstruct: fit the weights of the layers that lose inputs so that they give what they gave before, by least
            squares over calibration inputs (give real ones if there are any).
        damping: > 0, how strongly the weights hold against that fit, relative to the mean square of the inputs.
        on_conflict: what to do with channels whose removal does not pass: "skip" leaves them, "error" raises.
        samples: calibration inputs, for criteria that need them.
        seed: for criterion="random".
        include: patterns of layer names whose outputs may go.
        exclude: patterns of layer names whose outputs stay.

    Raises:
        ValueError: an option outside its range; no input to run the model with; a budget that cannot be met.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = compress(net, [RemoveChannels(0.5)], example_input=torch.randn(1, 4)).model
        >>> small
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets; Fang et al. 2023, DepGraph: Towards Any Structural
    Pruning.
    """

    ratio: float | Mapping[str, float] | str = 0.5
    budget: tuple[str, float] | None = None
    criterion: str | Criterion = "magnitude"
    scope: str = "layer"
    norm: str = "l2"
    normalize: bool | None = None
    per: str = "channel"
    round_to: int = 1
    max_layer_ratio: float = 0.9
    reconstruct: bool = False
    damping: float = 1e-3
    on_conflict: str = "skip"
    samples: int = 256
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    structural: ClassVar[bool] = True
    refuses_after: ClassVar[Mapping[str, str]] = {
        "grid": "the scales and codebooks of quantized weights belong to their channels; remove channels first"
    }

    def __post_init__(self) -> None:
        shares = self.ratio if isinstance(self.ratio, Mapping) else {"": self.ratio}
        for pattern, share in shares.items():
            fits = self.ratio == _SILENT or (not isinstance(share, str) and 0 <= share < 1)
            if not fits:
                where = f" for {pattern!r}" if pattern else ""
                raise ValueError(f"ratio={share!r}{where}: allowed is 0 <= ratio < 1, or {_SILENT!r}.")
        for value, allowed, option in (
            (self.scope, _SCOPES, "scope"),
            (self.on_conflict, _CONFLICTS, "on_conflict"),
            (self.norm, ("l2", "l1"), "norm"),
            (self.per, ("channel", "mac"), "per"),
        ):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is unknown; allowed: {', '.join(allowed)}.")
        if self.budget is not None:
            kind, share = self.budget
            if kind not in ("macs", "params", "latency") or not 0 < share <= 1:
                raise ValueError(
                    f"budget={self.budget!r}: allowed is ('macs', 'params' or 'latency', share in (0, 1])."
                )
        if self.round_to < 1 or self.samples < 1:
            raise ValueError(f"round_to={self.round_to}, samples={self.samples}: allowed is >= 1.")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping}: allowed is > 0.")
        if not 0 < self.max_layer_ratio <= 1:
            raise ValueError(f"max_layer_ratio={self.max_layer_ratio}: allowed is 0 < max_layer_ratio <= 1.")
        if isinstance(self.ratio, Mapping) and self.scope == "global":
            raise ValueError("a ratio for each pattern needs scope='layer': one ranking has one ratio.")
        criterion(self.criterion, self.seed)

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide which channels go; writes nothing.

        Args:
            model: any module that runs.
            data: an example input, or calibration inputs for criteria that need them.

        Returns:
            For every tensor that is cut, the indices that stay; for every module, its new numbers.

        Raises:
            ValueError: no input; a budget that cannot be met; with on_conflict="error", channels that cannot go.
        """
        found, skipped, trials = self.find(model, data)
        scores, source = self.scores(model, found, data)
        gone = self.choose(model, found, scores, trials)
        plan, _ = self.planned(model, found, skipped, gone, data, trials)
        return dataclasses.replace(plan, data=source)

    def planned(
        self,
        model: nn.Module,
        found: Channels,
        skipped: Mapping[str, str],
        gone: Sequence[int],
        data: Calibration | None,
        trials: Trials,
    ) -> tuple[Plan, list[int]]:
        """The plan that removes chosen channels, as far as that passes.

        Args:
            model: the model they belong to.
            found: its channels.
            skipped: layer or parameter name -> why channels stay.
            gone: classes that are to go.
            data: calibration inputs, to fit weights with.
            trials: what tries the choice out.

        Returns:
            The plan, and the classes that go by it.

        Raises:
            ValueError: with on_conflict="error", channels that cannot go.
        """
        reasons = dict(skipped)
        conflicts = trials.conflicts(gone)
        if conflicts:
            reasons |= self._refused(conflicts, found)
            bad = {c for family in conflicts for c in family.classes}
            gone = [c for c in gone if c not in bad]
        lost = set(gone)
        for family in found.families:
            if not lost & set(family.classes) and family not in conflicts:
                none = "none of its channels are among those that go"
                why = none if len(family) > 1 else "all of its channels go together"
                reasons |= dict.fromkeys(family.makers, why)
        keys = {t.name: t.key for t in survey(model).targets}
        shapes = {key: tuple(t.shape) for key, t in tensors_of(model).items()}
        layers = plan_entries(shapes, found.keep(gone), found.attributes(gone))
        if self.reconstruct and gone:
            fitted = self._fit(model, trials.small(gone), layers, data or Calibration())
            for key, value in fitted.items():
                layers.setdefault(key, {})["value"] = value
        identity = not gone and (self.ratio == 0 or self.ratio == _SILENT or self.budget == ("macs", 1.0))
        named = {}
        for name, why in reasons.items():
            key = keys.get(name, name)
            named[f"outputs of {key}" if key in layers else key] = why
        return Plan(layers, named, identity=identity), list(gone)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Cut the tensors in place and set the numbers of their modules.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model does not have such a tensor or number; nothing is changed then.
        """
        cut(model, plan.layers)

    @classmethod
    def structure(cls, plan: Plan) -> Plan:
        """The cuts and numbers, without fitted weights.

        Args:
            plan: what ``plan`` returned.

        Returns:
            What a fresh model needs.
        """
        layers = {k: {n: v for n, v in e.items() if n != "value"} for k, e in plan.layers.items()}
        return dataclasses.replace(plan, layers={k: e for k, e in layers.items() if e})

    def _fit(
        self, model: nn.Module, small: nn.Module, layers: Mapping[str, Mapping[str, Any]], inputs: Calibration
    ) -> dict[str, Tensor]:
        """Fitted weights of the layers that lose inputs."""
        cut_at = {
            t.name: t
            for t in survey(model).targets
            if str(t.axes.in_) in layers.get(t.key, {}).get("keep", {})
        }
        names = [name for name, t in cut_at.items() if can_reconstruct(t.module) and t.param == "weight"]

        def rows(name: str) -> Tensor:
            target = cut_at[name]
            everything = torch.arange(target.weight.shape[target.axes.out])
            kept: Tensor = layers[target.key]["keep"].get(str(target.axes.out), everything)
            return kept.long().to(target.weight.device)

        limited = dataclasses.replace(inputs, samples=self.samples)
        return reconstruct(model, small, names, rows, limited, self.damping)

    def find(self, model: nn.Module, data: Calibration | None) -> tuple[Channels, dict[str, str], Trials]:
        """The channels that may go.

        Args:
            model: any module that runs.
            data: an example input.

        Returns:
            Channels whose removal passes, layer or parameter name -> why others stay, and what tries a choice out.

        Raises:
            ValueError: no input, or a pattern that fits no layer.
        """
        inputs = data or Calibration()
        if not inputs.available:
            raise ValueError(
                "RemoveChannels runs the model to see which channels belong together: give compress() an "
                "example_input= or data=."
            )
        survey(model, self.include, self.exclude)  # raises for a pattern that fits nothing
        x = one_sample(inputs.example(model))
        seen = trace(model, x)
        found = find_channels(seen, survey(model).targets)
        skipped = dict(found.fixed)
        families = []
        for family in found.families:
            why = self._left_out(family)
            if why:
                skipped |= dict.fromkeys(family.makers, why)
            else:
                families.append(family)
        found = Channels(families, skipped, seen)
        trials = Trials(model, x, found)
        conflicts = trials.conflicts([family.classes[-1] for family in families if len(family) > 1])
        if conflicts:
            skipped |= self._refused(conflicts, found)
            found = Channels([f for f in families if f not in conflicts], skipped, seen)
        return found, skipped, trials

    def scores(
        self, model: nn.Module, found: Channels, data: Calibration | None
    ) -> tuple[dict[str, Tensor], str]:
        """Score every channel of every family.

        Args:
            model: the model they belong to.
            found: its channels.
            data: calibration inputs, for criteria that need them.

        Returns:
            Family name -> scores [channels], comparable between families under scope="global"; which inputs were used.

        Raises:
            ValueError: scores that are not finite.
        """
        rule = criterion(self.criterion, self.seed)
        places = {(t.key, t.axes.out): t for t in survey(model).targets}
        wanted = {p: places[p] for family in found.families for p in family.members if p in places}
        measured, source = measure(rule, model, list(wanted.values()), data, self.samples)
        return {f.name: self.family_scores(f, wanted, rule, measured) for f in found.families}, source

    def family_scores(
        self,
        family: Family,
        places: Mapping[tuple[str, int], Target],
        rule: Criterion,
        measured: Mapping[str, Stats],
    ) -> Tensor:
        """The scores of one family from those of the layers that make its channels.

        Args:
            family: channels.
            places: (parameter name, output axis) -> target.
            rule: the criterion.
            measured: what it needs.

        Returns:
            float64 [channels].
        """
        estimates = self.criterion in ("taylor", "fisher")
        relative = not estimates if self.normalize is None else self.normalize
        total, makers = torch.zeros(len(family), dtype=torch.float64), 0
        for place, indices in family.members.items():
            target = places.get(place)
            if target is None:
                continue
            one = channel_scores(rule, target, measured.get(target.key), place[1], self.norm)
            one = one.detach().double().cpu()
            if not bool(one.isfinite().all()):
                raise ValueError(
                    f"{int((~one.isfinite()).sum())} of {one.numel()} channel scores of {target.key} are not finite: "
                    "are its weights finite? Leave it out with exclude."
                )
            mean = one.mean()
            one = one / mean if relative and float(mean) > 0 else one
            total += torch.stack([one[torch.from_numpy(i)].sum() for i in indices])
            makers += 1
        return total if estimates else total / max(makers, 1)

    def choose(
        self, model: nn.Module, found: Channels, scores: Mapping[str, Tensor], trials: Trials
    ) -> list[int]:
        """Which channels go.

        Args:
            model: the model they belong to.
            found: channels that may go.
            scores: family name -> scores.
            trials: what makes small copies, for the latency.

        Returns:
            Classes, those with the lowest scores first.

        Raises:
            ValueError: the budget cannot be met.
        """
        if self.ratio == _SILENT and self.budget is None:
            return silent(model, found)
        order = RemovalOrder(found, scores, Limits(self.scope, self.per, self.round_to, self.max_layer_ratio))
        return order.by_ratio(self.share) if self.budget is None else order.by_budget(*self.budget, trials)

    def share(self, family: Family) -> float:
        """The share of a family's channels that is to go.

        Args:
            family: channels.

        Returns:
            ratio, or that of the pattern that fits one of its layers; 0 if none does.
        """
        if not isinstance(self.ratio, Mapping):
            return float(self.ratio)
        if family.name in self.ratio:
            return float(self.ratio[family.name])
        found = [lookup(self.ratio, name, name) for name in family.makers]
        return max((float(s) for s in found if s is not None), default=0.0)

    def _left_out(self, family: Family) -> str:
        """Why the patterns leave a family alone, or ""."""
        include = (self.include,) if isinstance(self.include, str) else tuple(self.include)
        exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        for name in family.makers:
            bad = next((p for p in exclude if matches(p, name)), None)
            if bad is not None:
                shared = f" with {name}" if len(family.makers) > 1 else ""
                return f"excluded{shared} by {bad!r}"
        if not any(matches(p, name) for p in include for name in family.makers):
            return f"no include pattern of {list(include)} fits"
        return ""

    def _refused(self, conflicts: Mapping[Family, str], found: Channels) -> dict[str, str]:
        """Reasons by layer; an error if that is asked for."""
        if self.on_conflict == "error":
            family, why = next(iter(conflicts.items()))
            names = listing([name for f in conflicts for name in f.makers])
            raise ValueError(
                f"the channels of {family.name} cannot be removed: {why}. Leave them with "
                f"exclude={[name for f in conflicts for name in f.makers]!r}, or set on_conflict='skip'. All of these "
                f"fail: {names}."
            )
        return {
            name: f"its channels cannot go: {why}"
            for family, why in conflicts.items()
            for name in family.makers
        }
