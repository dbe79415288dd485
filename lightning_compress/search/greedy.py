"""Good points to start from: for several sizes, the settings of every layer that lose least, layer by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress import archive
from lightning_compress.functional.allocate import multiple_choice_knapsack
from lightning_compress.search.assemble import Assembler
from lightning_compress.search.space import Genome, Space
from lightning_compress.stats.running import call, evaluating, first_tensor, observing
from lightning_compress.targets import find

_SETTINGS = 16  # at most so many combinations of settings are tried on every layer
_SAMPLES = 8


def greedy(assembler: Assembler, space: Space, batches: Sequence[Any], count: int) -> list[Genome]:
    r"""Genomes of several sizes, chosen layer by layer.

    All layers are given the same strength of every setting, for up to 16 combinations of strengths. For each layer, the
    relative squared error of its own output on inputs of the original, ``|y - y'|^2 / |y|^2``, and the length of its
    own archive are measured; then a multiple-choice knapsack picks a combination for every layer, so that the sum of
    errors is smallest for a sum of bytes. Sums of bytes are spaced geometrically from the least to the most.

    Args:
        assembler: makes models.
        space: the genes.
        batches: inputs; without any, the combinations themselves are returned.
        count: how many genomes.

    Returns:
        Different genomes, at most ``count``, from the smallest to the largest.
    """
    kinds = list(dict.fromkeys(gene.kind for gene in space.genes if gene.kind != "keep"))
    steps = max(2, math.floor(_SETTINGS ** (1 / max(1, len(kinds)))))
    grid = [
        dict(zip(kinds, strengths, strict=True))
        for strengths in itertools.product(np.linspace(0, 1, steps), repeat=len(kinds))
    ]
    uniform = [tuple(gene.at(float(row.get(gene.kind, 0))) for gene in space.genes) for row in grid]
    uniform = list(dict.fromkeys(uniform))
    layers = list(dict.fromkeys(gene.layer for gene in space.genes if gene.kind != "keep"))
    if not batches or not layers:
        return uniform[:count]
    owner = {t.key: t.name for t in find(assembler.model, ["*", *layers])}
    seen = _inputs(assembler.model, [owner[key] for key in layers], batches[0])
    losses = np.full((len(layers), len(uniform)), np.inf)
    sizes = np.zeros((len(layers), len(uniform)), dtype=np.int64)
    for j, genome in enumerate(uniform):
        model, _ = assembler.build(space.settings(genome))
        for i, key in enumerate(layers):
            before, after = assembler.model.get_submodule(owner[key]), model.get_submodule(owner[key])
            losses[i, j] = _loss(before, after, seen.get(owner[key]))
            sizes[i, j] = archive.size_of(after, "auto")
    losses = np.nan_to_num(losses, nan=1e6, posinf=1e6).clip(max=1e6)
    least, most = int(sizes.min(1).sum()), int(sizes[:, 0].sum())
    found: list[Genome] = []
    for budget in np.geomspace(least, max(least, most), count):
        chosen = multiple_choice_knapsack(losses.tolist(), sizes.tolist(), math.ceil(budget)).choice
        pick = dict(zip(layers, chosen, strict=True))
        found.append(
            tuple(
                gene.at(0) if gene.kind == "keep" else uniform[pick[gene.layer]][i]
                for i, gene in enumerate(space.genes)
            )
        )
    return list(dict.fromkeys(found))


def _inputs(model: nn.Module, names: Sequence[str], batch: Any) -> dict[str, tuple[Any, Any]]:
    """Arguments of the first call of every layer, for a few samples."""
    seen: dict[str, tuple[Any, Any]] = {}

    def hook(name: str) -> Any:
        return lambda module, args, kwargs: seen.setdefault(name, (args, kwargs)) and None

    with observing(model):
        handles = [
            model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
            for name in dict.fromkeys(names)
        ]
        try:
            call(model, _few(batch))
        finally:
            for handle in handles:
                handle.remove()
    return seen


def _few(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:_SAMPLES]
    if isinstance(batch, dict):
        return {k: _few(v) for k, v in batch.items()}
    return tuple(map(_few, batch)) if isinstance(batch, tuple) else batch


def _loss(before: nn.Module, after: nn.Module, arguments: tuple[Any, Any] | None) -> float:
    """``|y - y'|^2 / |y|^2``; 0 for a layer that was not reached."""
    if arguments is None:
        return 0.0
    args, kwargs = arguments
    with evaluating(before), evaluating(after):
        y, other = (first_tensor(layer(*args, **kwargs)) for layer in (before, after))
    if y is None or other is None:
        return 0.0
    scale = float(torch.linalg.vector_norm(y)) ** 2
    return float(torch.linalg.vector_norm(y - other)) ** 2 / scale if scale else 0.0
