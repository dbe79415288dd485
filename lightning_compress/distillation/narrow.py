"""A thinner model of the same kind: every family of channels scaled by one multiplier, to a size that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.channels.check import plan_entries
from lightning_compress.channels.families import Channels, Family, find_channels
from lightning_compress.channels.surgery import cut
from lightning_compress.channels.trace import trace
from lightning_compress.channels.trials import Trials
from lightning_compress.channels.watcher import Trace, tensors_of
from lightning_compress.distillation.widths import (
    UnreachableError,
    Width,
    equal_steps,
    evenly,
    fit_widths,
    strongest,
)
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.stats.drawing import one_sample
from lightning_compress.tables import reasons
from lightning_compress.targets import Axes, Target, survey
from lightning_compress.transform import Transform

_CHOICES = ("norm", "even")


@dataclass(frozen=True)
class Narrow(Transform):
    r"""Cut a model to a share of its parameters, all of its layers by the same factor.

    One forward pass shows which entries of which parameters belong together (as for ``RemoveChannels``), in any
    architecture: channels of convolutions, hidden features, attention heads, frequencies of Fourier features, channels
    of neural operators. Of a family of n channels ``max(m, r round(w n / r))`` stay, with one multiplier w for all,
    found by bisection until ``|P / (ratio P_0) - 1| <= tolerance``, P and P_0 the numbers of real parameters after and
    before. Inputs and outputs of the model stay.

    Of fixed frequencies, those stay that are nearest to equal steps of ``|frequency|``, so that the range stays.

    Args:
        ratio: share of the parameters that stays, in (0, 1].
        tolerance: how far off the size may be, relative, > 0.
        round_to: r, widths are multiples of it where a family has so many.
        minimum: m, channels that every layer keeps, of those it has; halved as long as it is in the way of the ratio.
        channels: which channels stay: "norm", those with the largest weights, or "even", every so many-th, which does
            not depend on the weights.

    Raises:
        ValueError: an option outside its range; no input to run the model with; a ratio that no widths reach.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> compress(net, [Narrow(0.25)], example_input=torch.randn(1, 4)).model
        Sequential(
          (0): Linear(in_features=4, out_features=30, bias=True)
          (1): ReLU()
          (2): Linear(in_features=30, out_features=30, bias=True)
          (3): ReLU()
          (4): Linear(in_features=30, out_features=2, bias=True)
        )

    Source: Howard et al. 2017, MobileNets (the width multiplier).
    """

    ratio: float = 0.25
    tolerance: float = 0.1
    round_to: int = 1
    minimum: int = 8
    channels: str = "norm"

    structural: ClassVar[bool] = True
    refuses_after: ClassVar[Mapping[str, str]] = {
        "grid": "the scales and codebooks of quantized weights belong to their channels; make the model thinner first"
    }

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: allowed is 0 < ratio <= 1.")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance={self.tolerance}: allowed is > 0.")
        if self.round_to < 1 or self.minimum < 1:
            raise ValueError(f"round_to={self.round_to}, minimum={self.minimum}: allowed is >= 1.")
        if self.channels not in _CHOICES:
            raise ValueError(f"channels={self.channels!r} is unknown; allowed: {', '.join(_CHOICES)}.")

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide which channels stay; writes nothing.

        Args:
            model: any module that runs.
            data: an example input.

        Returns:
            For every tensor that is cut, the indices that stay; for every module, its new numbers.

        Raises:
            ValueError: no input; no widths give the ratio, with the smallest that can be had.
        """
        inputs = data or Calibration()
        if not inputs.available:
            raise ValueError(
                "Narrow runs the model to see which channels belong together: give it an example_input=, such as "
                "torch.zeros(1, 3, 32, 32)."
            )
        x = one_sample(inputs.example(model))
        seen = trace(model, x)
        targets = survey(model).targets
        keys = {t.name: t.key for t in targets}
        found = find_channels(seen, targets)
        families = [*found.families, *_unmade(model, seen, found)]
        skipped = dict(found.fixed)
        trials = Trials(model, x, Channels(families, skipped, seen))
        while True:
            gone = self._choose(model, Channels(families, skipped, seen)) if self.ratio < 1 else []
            wrong = trials.conflicts(gone)
            if not wrong:
                break
            skipped |= {
                keys.get(name, name): f"its channels cannot go: {why}"
                for family, why in wrong.items()
                for name in family.makers
            }
            families = [f for f in families if f not in wrong]
        found = trials.found
        layers = plan_entries(trials.shapes, found.keep(gone), found.attributes(gone))
        return Plan(layers, {k: v for k, v in skipped.items() if k not in layers}, identity=not gone)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Cut the tensors in place and set the numbers of their modules.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model does not have such a tensor or number; nothing is changed then.
        """
        cut(model, plan.layers)

    def _choose(self, model: nn.Module, found: Channels) -> list[int]:
        """Classes that go."""
        tensors = tensors_of(model)
        owned = {k: t for k, t in tensors.items() if isinstance(t, nn.Parameter)}
        total = sum(t.numel() * (1 + t.is_complex()) for t in owned.values())
        rules = [self._rule(family, tensors) for family in found.families]
        widths = [
            Width(len(f), min(tensors[key].shape[axis] for key, axis in f.members)) for f in found.families
        ]

        def going(kept: Sequence[int]) -> list[int]:
            lost: list[int] = []
            for family, rule, k in zip(found.families, rules, kept, strict=True):
                stays = set(rule(k))
                lost += [c for i, c in enumerate(family.classes) if i not in stays]
            return lost

        def count(kept: Sequence[int]) -> int:
            cuts, left = found.keep(going(kept)), 0
            for key, tensor in owned.items():
                axes = cuts.get(key, {})
                sizes = (len(axes[i]) if i in axes else n for i, n in enumerate(tensor.shape))
                left += math.prod(sizes) * (1 + tensor.is_complex())
            return left

        try:
            kept = fit_widths(
                widths,
                count,
                self.ratio * total,
                tolerance=self.tolerance,
                minimum=self.minimum,
                round_to=self.round_to,
            )
        except UnreachableError as error:
            stays = f" Outputs that stay:{reasons(found.fixed)}" if found.fixed else ""
            raise ValueError(
                f"no widths give ratio={self.ratio} of {total:,} parameters within tolerance={self.tolerance}: {error} "
                f"That is a ratio of {error.least / total:.4g}: ask for it, for another tolerance or round_to "
                f"(now {self.round_to}), or build the student yourself: make_student(..., factory=...).{stays}"
            ) from None
        return going(kept)

    def _rule(self, family: Family, tensors: Mapping[str, Tensor]) -> Callable[[int], list[int]]:
        """Number of channels -> which of the family stay."""
        fixed = [
            place for place in family.members if _is_fixed(tensors[place[0]]) and place[0] in family.makers
        ]
        if fixed:
            return partial(equal_steps, _norms(family, tensors, fixed))
        if self.channels == "even":
            return partial(evenly, len(family))
        return partial(
            strongest, _norms(family, tensors, [p for p in family.members if tensors[p[0]].dim() > 1])
        )


def _unmade(model: nn.Module, seen: Trace, found: Channels) -> list[Family]:
    """Families that no layer makes: of Parameters that a module uses by itself, and of fixed tensors."""
    known = {t.key for t in survey(model).targets}
    taken = {c for family in found.families for c in family.classes}
    places = [
        Target("", model, key, Axes(axis, None))
        for key, tensor in tensors_of(model).items()
        if key not in known and (tensor.is_floating_point() or tensor.is_complex())
        for axis in range(tensor.dim())
    ]
    return [f for f in find_channels(seen, places).families if not taken & set(f.classes)]


def _is_fixed(tensor: Tensor) -> bool:
    return not isinstance(tensor, nn.Parameter)


def _norms(family: Family, tensors: Mapping[str, Tensor], places: Sequence[tuple[str, int]]) -> list[float]:
    """For each channel the mean over places of the norm of its entries there, in units of that place's mean."""
    total = torch.zeros(len(family), dtype=torch.float64)
    for key, axis in places:
        entries = tensors[key].detach().abs().double().square().cpu()
        along = entries.sum([i for i in range(entries.dim()) if i != axis]) if entries.dim() > 1 else entries
        norms = torch.stack([along[torch.from_numpy(i)].sum() for i in family.members[key, axis]]).sqrt()
        total += norms / norms.mean().clamp_min(1e-300)
    found: list[float] = (total / max(len(places), 1)).tolist()
    return found
