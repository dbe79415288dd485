"""Which matrices of a model are penalized: pairs of factors, and weights under the scheme that Factorize takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_compress.callbacks.copies import part_of
from lightning_compress.callbacks.matrices import Form, PairView, View, WeightView
from lightning_compress.finalize import finalize
from lightning_compress.lowrank.all_schemes import maker, schemes
from lightning_compress.lowrank.bases import BasisScheme
from lightning_compress.lowrank.factorize import Factorize
from lightning_compress.lowrank.factors import Factors
from lightning_compress.lowrank.matrices import MatrixScheme
from lightning_compress.lowrank.schemes import Scheme
from lightning_compress.names import clean, lookup, matches
from lightning_compress.spectral import is_factorized, is_spectral
from lightning_compress.targets import Patterns, Target, survey


class SchemeChooser:
    """Picks the scheme of each weight, and remembers it: another choice after a resume would be another penalty.

    Args:
        matrix: name of a scheme, or a mapping from name pattern to name; "auto" and layers that have no such scheme
            take what ``Factorize`` takes.
        factorize: what will be carried out in the end, if known.
        attribute: the submodule it is for.
        chosen: parameter name -> name of the scheme, from earlier.

    Attributes:
        chosen: the same with the new choices; "" for weights that have no scheme.
    """

    def __init__(
        self,
        matrix: str | Mapping[str, str],
        factorize: Factorize | None,
        attribute: str | None,
        chosen: Mapping[str, str],
    ) -> None:
        self.matrix, self.factorize, self.attribute = matrix, factorize, attribute
        self.chosen = dict(chosen)

    def choose(self, model: nn.Module, targets: Sequence[Target]) -> dict[str, Scheme | None]:
        """The scheme of every target.

        Args:
            model: the LightningModule.
            targets: its weights.

        Returns:
            Parameter name -> scheme; None where none fits.
        """
        real = self.factorize is not None and self.factorize.real_channel
        fit: dict[str, dict[str, Scheme]] = {t.key: {} for t in targets}
        for t in targets:
            for scheme in schemes(real):
                if scheme.fits(t) is None:
                    fit[t.key].setdefault(scheme.name, scheme)
        undecided = []
        for t in targets:
            asked = (
                self.matrix if isinstance(self.matrix, str) else lookup(self.matrix, t.name, t.key) or "auto"
            )
            automatic = [name for name, s in fit[t.key].items() if s.automatic]
            if asked in fit[t.key]:
                self.chosen[t.key] = asked
            elif self.chosen.get(t.key) not in fit[t.key]:
                self.chosen[t.key] = automatic[0] if automatic else ""
                undecided += [t.key] if len(automatic) > 1 else []
        if undecided:
            preferred = self._preferred(model, undecided)
            self.chosen |= {key: preferred[key] for key in undecided if key in preferred}
        return {t.key: fit[t.key].get(self.chosen[t.key]) for t in targets}

    def _preferred(self, model: nn.Module, keys: list[str]) -> dict[str, str]:
        """What Factorize takes now; inputs, which are not there yet, are left out."""
        part, prefix = finalize(model), ""
        chooser = Factorize(include=keys, force=True)
        if self.factorize is not None:
            chooser = dataclasses.replace(self.factorize, activation_aware=False, force=True)
            if chooser.budget is not None:  # the same share of every layer
                unit, share = chooser.budget
                chooser = (
                    dataclasses.replace(chooser, budget=None, rank_ratio=share)
                    if unit == "rank"
                    else dataclasses.replace(chooser, budget=None, params_ratio=share)
                )
            part = part_of(part, self.attribute, "LowRankRegularization")
            prefix = f"{self.attribute}." if self.attribute else ""
        return {prefix + key: str(decided["scheme"]) for key, decided in chooser.plan(part).layers.items()}


def find_views(
    model: nn.Module, include: Patterns, exclude: Patterns, pairs_only: bool, chooser: SchemeChooser
) -> tuple[list[View], dict[str, str]]:
    """Every matrix of a model.

    Args:
        model: the LightningModule.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.
        pairs_only: leave weights that are no factors.
        chooser: of their schemes.

    Returns:
        The views, weights first and some several times, and parameter name -> why it has none.
    """
    found = survey(model, include, exclude)
    skipped = dict(found.skipped)
    pairs = _pairs(model, include, exclude)
    parts = {key for pair in pairs for key in pair.parts}
    targets = []
    for t in found.targets:
        why = _refusal(t, pairs_only)
        if t.key not in parts and why:
            skipped[t.key] = why
        elif t.key not in parts:
            targets.append(t)
    taken = chooser.choose(model, targets)
    layers = [t.name for t in targets]
    views: list[View] = []
    for t in targets:
        name = t.name if t.name and layers.count(t.name) == 1 else t.key
        forms = _forms(t, taken[t.key])
        views += [
            WeightView(name if len(forms) == 1 else f"{name}.axis{k}", t, form)
            for k, form in enumerate(forms)
        ]
    return [*views, *pairs], {key: why for key, why in skipped.items() if key not in parts}


def one_by_one(views: Sequence[View]) -> list[dict[str, View]]:
    """Groups in which no parameter occurs twice: each view of a parameter is to see what the others wrote.

    Args:
        views: any.

    Returns:
        In each group, name -> view.
    """
    groups: list[dict[str, View]] = []
    met: dict[str, int] = {}
    for view in views:
        turn = max(met.get(key, 0) for key in view.parts)
        met |= dict.fromkeys(view.parts, turn + 1)
        groups += [{}] if turn == len(groups) else []
        groups[turn][view.name] = view
    return groups


def _pairs(model: nn.Module, include: Patterns, exclude: Patterns) -> list[View]:
    """Layers that Factorize has made of two."""
    wanted, unwanted = ((p,) if isinstance(p, str) else p for p in (include, exclude))
    found: list[View] = []
    for raw, layer in model.named_modules():
        name, scheme = clean(raw), maker(layer)
        if isinstance(layer, Factors) and isinstance(scheme, MatrixScheme):
            names = (name, f"{name}.first", f"{name}.second")
            if any(matches(p, *names) for p in wanted) and not any(matches(p, *names) for p in unwanted):
                found.append(PairView(name, layer, scheme))
    return found


def _refusal(target: Target, pairs_only: bool) -> str:
    if pairs_only:
        return "it is no pair of factors: factorize first"
    if target.axes.in_ is None:
        return "each output has one input channel: there is no matrix whose rank could fall"
    if is_spectral(target.module) and is_factorized(target.module):
        return "it is a factor of a tensor, whose ranks are set already"
    return ""


def _forms(target: Target, scheme: Scheme | None) -> list[Form]:
    """The weight as [g, m, n] under a scheme, once for every axis that it makes thin; else as [first axis, others]."""
    layer, order = target.module, target.weight.dim()
    if isinstance(scheme, MatrixScheme):
        return [functools.partial(scheme.matrices, layer)]
    if isinstance(scheme, BasisScheme):
        return [functools.partial(_unfolded, scheme, layer, axis) for axis in scheme.axes(layer, order)]
    if isinstance(layer, nn.MultiheadAttention) and target.param == "in_proj_weight":
        return [lambda w: w.reshape(3, -1, w.shape[1])]  # query, key and value
    last = (
        order if scheme is not None and scheme.name == "tt" else 2
    )  # a tensor train cuts between any two axes
    return [functools.partial(_cut, axes) for axes in range(1, last)]


def _unfolded(scheme: BasisScheme, layer: nn.Module, axis: int, weight: Tensor) -> Tensor:
    return scheme.arranged(layer, weight).movedim(axis, 0).flatten(1)[None]


def _cut(axes: int, weight: Tensor) -> Tensor:
    return weight.reshape(1, math.prod(weight.shape[:axes]), -1)
