"""Back from factors to one weight: for exporters, for another factorization, or for layers that train dense."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_compress import codes
from lightning_compress.lowrank.all_schemes import maker
from lightning_compress.names import clean, matches
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.steps import run_step
from lightning_compress.targets import replace_modules, survey
from lightning_compress.transform import Transform


@dataclass(frozen=True)
class MergeFactors(Transform):
    r"""Multiply factors back into one layer of the original type: ``W = A B``; outputs are equal up to rounding.

    Takes what ``Factorize`` made, and the Tucker, CP and tensor-train weights that neuraloperator builds (TFNO,
    CODANO), which become dense. The bias Parameter stays.

    Args:
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: a pattern fits no layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        >>> thin = compress(net, [Factorize(rank_ratio=0.25)])
        >>> list(compress(thin.model, [MergeFactors()]).model.state_dict())
        ['0.weight', '0.bias']
    """

    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    structural: ClassVar[bool] = True
    refuses_after: ClassVar[dict[str, str]] = {}

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Find the factors; writes nothing.

        Args:
            model: any module.
            data: not used.

        Returns:
            The layers that are merged.

        Raises:
            ValueError: a pattern fits no layer.
        """
        survey(model, self.include, self.exclude)  # raises for a pattern that fits nothing
        include, exclude = ([p] if isinstance(p, str) else list(p) for p in (self.include, self.exclude))
        layers: dict[str, dict[str, Any]] = {}
        skipped = {}
        for raw, layer in model.named_modules():
            scheme, name = maker(layer), clean(raw)
            if scheme is None:
                continue
            if not any(matches(p, name) for p in include) or any(matches(p, name) for p in exclude):
                skipped[name] = "not asked for"
            elif any(True for _ in codes.of(layer)):
                skipped[name] = "its factors are pruned or quantized: the product would be neither"
            else:
                layers[name] = {"scheme": type(scheme).__name__}
        return Plan(layers, skipped or ({} if layers else {type(model).__name__: "it has no factors"}))

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Multiply the factors, in place.

        Args:
            model: the model of the plan, or one with the same factors.
            plan: what ``plan`` returned.

        Raises:
            ValueError: a layer of the plan is missing or holds no such factors; nothing is written then.
        """
        modules = {clean(name): module for name, module in model.named_modules()}
        todo = []
        for name, decided in plan.layers.items():
            layer = modules.get(name)
            scheme = None if layer is None else maker(layer)
            if layer is None or scheme is None or type(scheme).__name__ != decided["scheme"]:
                raise ValueError(
                    f"the plan merges the factors of {name}, which in this model is {type(layer).__name__}: apply it "
                    "to the architecture it was made for."
                )
            todo.append((layer, scheme))
        with torch.no_grad():
            merged = {layer: scheme.merge(layer) for layer, scheme in todo}
        replace_modules(model, {old: new for old, new in merged.items() if old is not new})


def merge_factors(model: nn.Module, include: str | Sequence[str] = "*", inplace: bool = False) -> nn.Module:
    """``MergeFactors`` as a function.

    Args:
        model: any module.
        include: patterns of layer names to take.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model, with the step recorded so that archives and checkpoints repeat it.

    Raises:
        NothingChangedError: no layer that fits holds factors.

    Examples:
        >>> net = compress(nn.Sequential(nn.Linear(32, 32)), [Factorize(rank_ratio=0.25)]).model
        >>> type(merge_factors(net)[0]).__name__
        'Linear'
    """
    model = model if inplace else copy.deepcopy(model)
    run_step(model, MergeFactors(include))
    return model
