"""What a search makes small: of a compressed model, one number for each objective."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress import archive
from lightning_compress.cost import cost
from lightning_compress.names import name_of
from lightning_compress.pipelines.errors import OutputError
from lightning_compress.pipelines.keys import unknown
from lightning_compress.search.assemble import Assembler
from lightning_compress.search.space import Genome, Space
from lightning_compress.stats.running import call, evaluating

Objective = str | Callable[[nn.Module], float]
NAMES = ("size_fraction", "error", "macs", "latency_ms")
WORST = 1e30
_TIMED = 11


@dataclass
class Problem:
    """A model, what may be chosen for it, and what is to be small. Can be pickled if its objectives can.

    Args:
        assembler: makes models.
        space: the genes.
        objectives: names, or functions of the compressed model.
        error: output error against the original, if it is an objective.
        x: an input, to count and to time with.
        dense_bytes: of the original.
        coder: entropy coder of the archives that are measured.
    """

    assembler: Assembler
    space: Space
    objectives: tuple[Objective, ...]
    error: OutputError | None
    x: Any
    dense_bytes: int
    coder: str

    def __call__(self, genome: Genome) -> tuple[float, ...]:
        """The value of every objective, in order.

        Args:
            genome: numbers, one for each gene.

        Returns:
            Finite values; ``WORST`` where something is not, such as the outputs of a model.
        """
        return self.values(self.assembler.build(self.space.settings(genome))[0])

    def values(self, model: nn.Module) -> tuple[float, ...]:
        """The objectives of a model."""
        found = (self._value(objective, model) for objective in self.objectives)
        return tuple(v if math.isfinite(v) else WORST for v in found)

    def _value(self, objective: Objective, model: nn.Module) -> float:
        if not isinstance(objective, str):
            return float(objective(model))
        if objective == "size_fraction":
            return archive.size_of(model, self.coder) / self.dense_bytes
        if objective == "error":
            assert self.error is not None
            return self.error(model)
        if objective == "macs":
            return float(cost(model, self.x).macs)
        return latency(model, self.x)


def names_of(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """A name for every objective.

    Args:
        objectives: names or functions.

    Returns:
        Names, all different.

    Raises:
        ValueError: an unknown or repeated name.

    Examples:
        >>> from lightning_compress.search.objectives import names_of
        >>> names_of(["error", len])
        ('error', 'len')
    """
    names = tuple(name_of(objective) for objective in objectives)
    for objective in objectives:
        if isinstance(objective, str) and objective not in NAMES:
            raise ValueError(unknown(objective, NAMES, "unknown objective"))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"objectives={list(names)}: give at least one, each once.")
    return names


def latency(model: nn.Module, x: Any) -> float:
    """Median time of a forward pass in ms, noisy: other work on the machine counts.

    Args:
        model: any module.
        x: an input.

    Returns:
        Milliseconds.
    """
    times = []
    with evaluating(model):
        for _ in range(_TIMED):
            start = time.perf_counter()
            call(model, x)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])
