"""Whole layers, blocks and spectral paths left out: the ones whose absence changes the output least."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.connections import tensors_in
from lightning_compress.functional.masks import count_pruned
from lightning_compress.names import clean, matches
from lightning_compress.plans import Plan
from lightning_compress.pruning.criteria import Criterion
from lightning_compress.pruning.dropping import drop
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.pruning.units import Unit, units
from lightning_compress.stats import Calibration
from lightning_compress.stats.running import call, evaluating
from lightning_compress.tables import listing
from lightning_compress.targets import find
from lightning_compress.transform import Transform

_UNITS = ("block", "spectral", "layer")
_BYPASS = "bypass_error"
_Units = dict[str, Unit]


@dataclass(frozen=True)
class DropLayers(Transform):
    r"""Leave out whole layers, blocks or spectral paths.

    Of n units ``k = floor(ratio n + 0.5)`` go, at most n - 1. By bypass error they are taken one after the other: the
    one without which the output changes least, ``mean ||f(x) - f_without(x)|| / ||f(x)||`` over calibration inputs,
    measured again after each.

    - "block": a block of an FNO or TFNO, or an attention layer of a CODANO, goes from all its lists, and ``n_layers``
      falls; elsewhere an element of ``nn.Sequential`` or ``nn.ModuleList`` that has layers of its own and gives its
      input's shape back (residual blocks, transformer layers) lets its input through.
    - "spectral": a spectral convolution of neuraloperator gives zeros; the skip connection beside it stays.
    - "layer": a linear, convolution or spectral layer that gives its input's shape back lets its input through.

    Args:
        unit: "block", "spectral" or "layer".
        ratio: share of the units to leave out, in [0, 1).
        count: instead: how many.
        layers: instead: their names.
        criterion: "bypass_error"; or, like that of ``Prune``, "magnitude", "random" or a function
            ``(target, stats) -> scores``: the units with the lowest mean score of their weights go.
        iterative: measure the bypass error again after each unit.
        samples: calibration inputs.
        seed: for criterion="random".
        include: patterns of unit names to choose from.
        exclude: patterns of unit names to keep.

    Raises:
        ValueError: not exactly one of ratio, count and layers; an option outside its range; a name that is no unit.

    Examples:
        >>> from neuralop.models import FNO
        >>> net = FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=4, n_layers=3)
        >>> result = compress(net, [DropLayers(ratio=0.3)], example_input=torch.randn(1, 1, 8, 8))
        >>> result.model.n_layers, len(result.model.fno_blocks.convs)
        (2, 2)

    Source: Fan et al. 2020, Reducing Transformer Depth on Demand with Structured Dropout; Veit et al. 2016, Residual
        Networks Behave Like Ensembles of Relatively Shallow Networks.
    """

    unit: str = "block"
    ratio: float | None = None
    count: int | None = None
    layers: Sequence[str] = ()
    criterion: str | Criterion = _BYPASS
    iterative: bool = True
    samples: int = 64
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    structural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.unit not in _UNITS:
            raise ValueError(f"unit={self.unit!r} is unknown; allowed: {', '.join(_UNITS)}.")
        if len(self._given()) > 1:
            raise ValueError(f"DropLayers got {' and '.join(self._given())}: give one of them.")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}: allowed is 0 <= ratio < 1, since one unit must stay.")
        if self.count is not None and self.count < 0:
            raise ValueError(f"count={self.count}: allowed is >= 0.")
        if isinstance(self.layers, str):
            raise ValueError(f"layers={self.layers!r}: give a sequence of names, such as ({self.layers!r},).")
        if self.criterion != _BYPASS:
            self._ranking()

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide which units go; writes nothing. Every choice is tried out on a copy if there is an input.

        Args:
            model: any module.
            data: calibration inputs, for "bypass_error" and criteria that look at activations; an input gives the
                shapes that "layer" and most blocks are found by.

        Returns:
            Unit name -> how it is left out, and its score. Skipped are the others, with theirs.

        Raises:
            ValueError: none of ratio, count and layers is given; too many are asked for; a named unit cannot go.
        """
        if not self._given():
            raise ValueError("DropLayers needs one of ratio, count, layers.")
        inputs = dataclasses.replace(data or Calibration(), samples=self.samples)
        x = inputs.example(model) if inputs.available else None
        found, skipped = units(model, self.unit, x)
        found, left = self._selected(model, found, skipped)
        skipped |= left
        if not found and not skipped:
            skipped[type(model).__name__] = f"it has no {self.unit} that could be left out"
        scores: dict[str, float] = {}
        source = ""
        if self.layers:
            chosen = self._named(model, found, skipped, x)
        elif (wanted := self._wanted(len(found))) == 0:
            why = "the only one stays" if len(found) == 1 else f"ratio={self.ratio} of {len(found)} is none"
            nothing = not (self.ratio or self.count)
            return Plan(
                {}, skipped if nothing else skipped | dict.fromkeys(found, why), bool(found) and nothing
            )
        elif self.criterion == _BYPASS:
            chosen, scores = self._by_error(model, found, wanted, inputs, skipped)
            source = inputs.describe(model)
        else:
            chosen, scores, source = self._by_score(model, found, wanted, inputs, x, skipped)
        for name in found:
            if name not in chosen and name in scores:
                skipped[name] = f"its {self._scale()} of {scores[name]:.3g} is not among the lowest"
        decided = {n: found[n].how | ({"score": scores[n]} if n in scores else {}) for n in chosen}
        return Plan(decided, skipped, data=source)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Leave the units out, in place.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model does not have such a unit, or none would be left; nothing is changed then.
        """
        drop(model, plan.layers)

    def _given(self) -> list[str]:
        counts = [name for name in ("ratio", "count") if getattr(self, name) is not None]
        return counts + (["layers"] if self.layers else [])

    def _scale(self) -> str:
        return "bypass error" if self.criterion == _BYPASS else "mean score"

    def _ranking(self) -> Prune:
        return Prune(criterion=self.criterion, samples=self.samples, seed=self.seed)

    def _wanted(self, total: int) -> int:
        if self.ratio is not None:
            return max(0, min(count_pruned(self.ratio, total), total - 1))
        assert self.count is not None
        if total and self.count >= total:
            raise ValueError(
                f"count={self.count}: the model has {total} of unit={self.unit!r} to choose from, and one must stay."
            )
        return self.count if total else 0

    def _selected(
        self, model: nn.Module, found: _Units, skipped: Mapping[str, str]
    ) -> tuple[_Units, dict[str, str]]:
        """The units that the patterns leave, and why the others stay."""
        include, exclude = ([p] if isinstance(p, str) else list(p) for p in (self.include, self.exclude))
        known = {*found, *skipped, *(clean(n) for n, _ in model.named_modules())}
        known |= {clean(n) for n, _ in model.named_parameters()}
        for pattern in (*include, *exclude):
            if pattern != "*" and not any(matches(pattern, name) for name in known):
                raise ValueError(f"pattern {pattern!r} fits no unit; these are: {listing(list(found))}.")
        left = {}
        for name in found:
            blocked = [p for p in exclude if matches(p, name)]
            if blocked:
                left[name] = f"excluded by {blocked[0]!r}"
            elif not any(matches(p, name) for p in include):
                left[name] = f"no include pattern of {include} fits"
        return {name: unit for name, unit in found.items() if name not in left}, left

    def _named(self, model: nn.Module, found: _Units, skipped: Mapping[str, str], x: Any) -> list[str]:
        for name in self.layers:
            if name not in found:
                reason = skipped.get(name, f"these are: {listing(list(found))}")
                raise ValueError(f"layers has {name!r}, which cannot be left out as {self.unit!r}: {reason}.")
        chosen = list(dict.fromkeys(self.layers))
        why = _failure(model, found, chosen, x)
        if why:
            raise ValueError(f"without {', '.join(chosen)} {why}.")
        return chosen

    def _by_score(
        self,
        model: nn.Module,
        found: _Units,
        wanted: int,
        inputs: Calibration,
        x: Any,
        skipped: dict[str, str],
    ) -> tuple[list[str], dict[str, float], str]:
        """The lowest mean scores of the units' weights."""
        members = {n: {m for part in unit.members for m in part.modules()} for n, unit in found.items()}
        targets = {n: [t for t in find(model) if t.module in inside] for n, inside in members.items()}
        every = list({t.key: t for held in targets.values() for t in held}.values())
        scored, source = self._ranking().scores(model, every, inputs)
        scores = {}
        for name, held in targets.items():
            count = sum(scored[t.key].numel() for t in held)
            total = sum(float(scored[t.key].double().sum()) for t in held)
            scores[name] = total / count if count else math.inf
        chosen: list[str] = []
        for name in sorted(scores, key=lambda n: scores[n]):
            if len(chosen) == wanted:
                break
            why = _failure(model, found, [*chosen, name], x)
            if why:
                skipped[name] = f"without it {why}"
                del scores[name]
            else:
                chosen.append(name)
        return chosen, scores, source

    def _by_error(
        self, model: nn.Module, found: _Units, wanted: int, inputs: Calibration, skipped: dict[str, str]
    ) -> tuple[list[str], dict[str, float]]:
        """The smallest changes of the output."""
        batches = list(inputs.batches(model))
        outputs = [_output(model, batch) for batch in batches]
        chosen: list[str] = []
        last: dict[str, float] = {}
        while len(chosen) < wanted:
            errors: dict[str, float] = {}
            for name in found:
                if name in chosen or name in skipped:
                    continue
                tried = [*chosen, name]
                probe = _without(model, {n: found[n].how for n in tried})
                try:
                    errors[name] = _change(outputs, [_output(probe, batch) for batch in batches])
                except Exception as error:  # the user's forward may fail in any way
                    skipped[name] = f"without it the model fails: {error!r}"
            if not errors:
                break
            ranked = sorted(errors, key=lambda n: errors[n])
            last.update(errors)
            chosen += ranked[:1] if self.iterative else ranked[: wanted - len(chosen)]
        why = _failure(model, found, chosen, inputs.example(model))
        if why:
            raise ValueError(f"without {', '.join(chosen)} {why}: set iterative=True.")
        return chosen, last


def _without(model: nn.Module, decided: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy without some units; it shares all tensors with the model, so it costs next to nothing."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    probe = copy.deepcopy(model, shared)
    drop(probe, decided)
    return probe


def _output(model: nn.Module, x: Any) -> list[Tensor]:
    with evaluating(model):
        found = [t for t in tensors_in(call(model, x)) if t.is_floating_point() or t.is_complex()]
    return [torch.view_as_real(t).flatten(-2) if t.is_complex() else t for t in found]


def _change(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """``mean ||f - g|| / ||f||`` over samples."""

    def norms(tensors: Iterator[Tensor]) -> Tensor:
        squares: Any = sum(t.reshape(len(t), -1).double().square().sum(1) for t in tensors)
        root: Tensor = squares.sqrt()
        return root

    changes = []
    for a, b in zip(before, after, strict=True):
        pairs = list(zip(a, b, strict=True))
        if any(p.shape != q.shape for p, q in pairs):
            raise ValueError("its output has another shape")
        changes.append(norms(q - p for p, q in pairs) / norms(iter(a)).clamp_min(1e-30))
    return float(torch.cat(changes).mean().nan_to_num(math.inf))


def _failure(model: nn.Module, found: _Units, names: Sequence[str], x: Any) -> str | None:
    """Why the model does not run without some units; None if it does, or if there is no input to try."""
    if x is None:
        return None
    try:
        probe = _without(model, {name: found[name].how for name in names})
        _change([_output(model, x)], [_output(probe, x)])
    except Exception as error:  # the user's forward may fail in any way
        return f"the model fails: {error!r}"
    return None
