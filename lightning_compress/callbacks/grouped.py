"""Weights with their groups of entries, as sparsity penalties see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_compress.functional.groups import PerGroup
from lightning_compress.functional.layouts import Layout
from lightning_compress.names import clean, matches
from lightning_compress.tables import listing
from lightning_compress.targets import Patterns, Survey, Target, survey

_STACKED = 1 << 18  # entries of a weight up to which it is computed together with others


@dataclass(frozen=True)
class Grouped:
    """A weight and its groups.

    Args:
        layer: name of its layer, for logs.
        weight: the user's own Parameter.
        layout: which of its entries are one group.
    """

    layer: str
    weight: nn.Parameter
    layout: Layout

    @staticmethod
    def of(target: Target, grouping: str | PerGroup) -> Grouped:
        """The groups of a target.

        Args:
            target: a weight.
            grouping: what ``Layout.of`` takes.

        Returns:
            The weight with them.
        """
        split = target.module.groups if isinstance(target.module, _ConvNd) and target.weight.dim() > 1 else 1
        layout = Layout.of(grouping, target.weight.shape, *target.axes, split=split)
        return Grouped(target.key.removesuffix(".tensor").removesuffix(".weight"), target.weight, layout)


def stacks(weights: Mapping[str, Grouped]) -> Iterator[tuple[list[str], Layout, Tensor]]:
    """Weights of one layout together, because few operations on many entries cost less; large ones by themselves.

    Args:
        weights: name -> weight.

    Yields:
        Names, their layout, and the weights [L, *shape], detached.
    """
    found: dict[object, list[str]] = {}
    for key, w in weights.items():
        alone = key if w.weight.numel() > _STACKED else ""
        found.setdefault((w.layout, w.weight.dtype, w.weight.device, alone), []).append(key)
    for keys in found.values():
        values = [weights[key].weight.detach() for key in keys]
        yield keys, weights[keys[0]].layout, torch.stack(values) if len(values) > 1 else values[0][None]


def batchnorm_scales(model: nn.Module, include: Patterns, exclude: Patterns) -> Survey:
    """The scales gamma [C] of BatchNorm layers, as targets.

    Args:
        model: any module.
        include: patterns of names of these layers.
        exclude: patterns to leave.

    Returns:
        The survey of these layers alone.

    Raises:
        ValueError: a pattern fits none of them.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False))
        >>> found = batchnorm_scales(net, "*", ())
        >>> [t.key for t in found.targets], found.skipped
        (['1.weight'], {'2': 'it has no scale (affine=False)'})
    """
    norms = {clean(n): m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    wanted, unwanted = ((p,) if isinstance(p, str) else tuple(p) for p in (include, exclude))
    for pattern in (*wanted, *unwanted):
        if pattern != "*" and not any(matches(pattern, name, f"{name}.weight") for name in norms):
            raise ValueError(
                f"pattern {pattern!r} fits no BatchNorm layer; these are: {listing(list(norms))}."
            )
    keys, skipped = [], {}
    for name, norm in norms.items():
        misses = [p for p in unwanted if matches(p, name, f"{name}.weight")]
        if norm.weight is None:
            skipped[name] = "it has no scale (affine=False)"
        elif misses:
            skipped[f"{name}.weight"] = f"excluded by {misses[0]!r}"
        elif not any(matches(p, name, f"{name}.weight") for p in wanted):
            skipped[f"{name}.weight"] = f"no include pattern of {list(wanted)} fits"
        else:
            keys.append(f"{name}.weight")
    return Survey(survey(model, keys).targets if keys else [], skipped)
