"""Which layer bears how much: one of them compressed at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_compress.analysis.inputs import Source, read
from lightning_compress.analysis.outcome import marked
from lightning_compress.analysis.result import Analysis
from lightning_compress.analysis.sweep import Run, prepare_workshop
from lightning_compress.analysis.techniques import Technique
from lightning_compress.analysis.workshop import Training
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.search.journal import Lines
from lightning_compress.targets import Target, find


def sensitivity(
    source: Source | None = None,
    *,
    levels: Sequence[int | float] = (4, 0.5),
    model: nn.Module | None = None,
    example_input: Any = None,
    input_sampler: str | Callable[[int, torch.Generator], Any] = "auto",
    data: Any = None,
    task: str = "auto",
    samples: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """The output error of compressing one layer and leaving the others: which layers to spare.

    Args:
        source: as for ``analyze``.
        levels: an integer is a number of bits (``Quantize``), a number in (0, 1) a share of zeros (``Prune``).
        model: as for ``analyze``.
        example_input: as for ``analyze``.
        input_sampler: as for ``analyze``.
        data: as for ``analyze``.
        task: as for ``analyze``.
        samples: as for ``analyze``.
        seed: of everything.
        progress: show a progress bar on a terminal.

    Returns:
        A row for every layer and level, named such as "fc1.weight int4" and "fc1.weight zeros 0.5"; layer and level are
        in its ``parameters``.

    Raises:
        ValueError: a level that neither method takes, or as ``analyze``.

    Examples:
        >>> from lightning_compress.analysis import sensitivity
        >>> net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> found = sensitivity(net, levels=[2], example_input=torch.zeros(1, 20), samples=100)
        >>> [(row.name, row.ber > 0) for row in found.rows]
        [('0.weight int2', True), ('2.weight int2', True)]
    """
    subject = read(source, model)
    techniques = [_alone(target, level) for target in find(subject.model) for level in levels]
    if not techniques:
        raise ValueError(f"levels={list(levels)}: nothing to try on {subject.name}.")
    prepared = prepare_workshop(
        subject, example_input, data, input_sampler, task, samples, Training(), {}, seed
    )
    keeper = tempfile.TemporaryDirectory(prefix="lightning-compress-")
    prepared.workshop.folder = Path(keeper.name)
    rows = Run(prepared.workshop, Lines(None, {}), None, progress)(techniques)
    return Analysis(prepared.about, marked(rows), workshop=prepared.workshop, keeper=keeper)


def _alone(target: Target, level: int | float) -> Technique:
    """One layer at one level."""
    parameters = {"layer": target.key, "level": level}
    if isinstance(level, int):
        return Technique(
            f"{target.key} int{level}", "quantization", parameters, (Quantize(level, include=target.key),)
        )
    if not 0 < level < 1:
        raise ValueError(f"levels has {level}: allowed are numbers of bits, and shares of zeros in (0, 1).")
    zeros = Prune(level, scope="layer", include=target.key)
    return Technique(f"{target.key} zeros {level:g}", "pruning", parameters, (zeros,))
