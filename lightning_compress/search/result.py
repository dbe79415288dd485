"""What a search found: the best compromises, how they were found, and the models they stand for."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lightning_compress import plots, tables
from lightning_compress.container import replacing
from lightning_compress.functional.tradeoff import pareto
from lightning_compress.search.objectives import Problem
from lightning_compress.search.space import Genome, Settings
from lightning_compress.transform import Transform

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """One model that was tried.

    Args:
        genome: numbers, one for each gene.
        values: objective -> value.
        settings: layer or block -> setting -> value.
    """

    genome: Genome
    values: Mapping[str, float]
    settings: Settings = field(repr=False)


@dataclass(frozen=True)
class SearchResult:
    """What ``search`` returns; iterating goes over the Pareto rows.

    Args:
        problem: model, space and objectives.
        objectives: their names.
        rows: the Pareto set: rows that no other one beats everywhere, sorted by the first objective.
        evaluated: every row, in the order of evaluation.
        hypervolume: after each generation, against ``reference``.
        reference: what the hypervolume is measured from, one value for each objective.
        target: objective -> bound that was asked for.
        backend: how genomes were proposed.
        seed: of everything drawn.
    """

    problem: Problem = field(repr=False)
    objectives: tuple[str, ...]
    rows: tuple[Row, ...]
    evaluated: tuple[Row, ...] = field(repr=False)
    hypervolume: tuple[float, ...]
    reference: tuple[float, ...]
    target: Mapping[str, float]
    backend: str
    seed: int

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def best(self, **bounds: float) -> Row | None:
        """The row that is best in the objectives without a bound, the first of them first.

        Args:
            **bounds: objective -> largest value; without any, the target of the search.

        Returns:
            The row; None if no row keeps the bounds.

        Raises:
            ValueError: a bound on something that is no objective.
        """
        limits = bounds or dict(self.target)
        for name in limits:
            if name not in self.objectives:
                raise ValueError(f"{name} is no objective here; these are: {', '.join(self.objectives)}.")
        free = [name for name in self.objectives if name not in limits] or list(self.objectives)
        fits = [row for row in self.rows if all(row.values[n] <= v for n, v in limits.items())]
        return min(fits, key=lambda row: [row.values[name] for name in free], default=None)

    @property
    def target_met(self) -> bool:
        """Whether a row keeps the target; True without one."""
        return self.best() is not None

    def model(self, row: Row) -> nn.Module:
        """The compressed model of a row, made again, with its steps and codes.

        Args:
            row: any row of this result.

        Returns:
            A new model, to be saved or used.
        """
        return self.problem.assembler.build(row.settings)[0]

    def transforms(self, row: Row) -> list[Transform]:
        """What ``compress`` takes to make the model of a row.

        Args:
            row: any row of this result.

        Returns:
            Transforms in order.
        """
        return self.problem.assembler.build(row.settings)[1]

    def to_json(self) -> dict[str, Any]:
        """Everything but models, as JSON values."""
        return {
            "objectives": list(self.objectives),
            "backend": self.backend,
            "seed": self.seed,
            "evaluations": len(self.evaluated),
            "reference": list(self.reference),
            "hypervolume": list(self.hypervolume),
            "target": dict(self.target),
            "target_met": self.target_met,
            "rows": [{"values": dict(row.values), "settings": row.settings} for row in self.rows],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the Pareto set: as CSV, a column for each objective and each gene, or as JSON.

        Args:
            path: ``*.csv`` or ``*.json``; its folder must exist.

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_json(), indent=2) + "\n"
        elif path.suffix == ".csv":
            buffer = io.StringIO()
            genes = self.problem.space.genes
            writer = csv.writer(buffer, lineterminator="\n")
            writer.writerow([*self.objectives, *(f"{gene.layer} {gene.kind}" for gene in genes)])
            for row in self.rows:
                numbers = (g.value(number) for g, number in zip(genes, row.genome, strict=True))
                writer.writerow([*row.values.values(), *numbers])
            text = buffer.getvalue()
        else:
            raise ValueError(f"{path}: allowed endings are .csv and .json.")
        with replacing(path) as file:
            file.write(text.encode())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Every row and the Pareto set, over the first two objectives.

        Args:
            ax: where to draw; a new figure if None.

        Returns:
            The Axes.

        Raises:
            ValueError: there is only one objective.
        """
        if len(self.objectives) < 2:
            raise ValueError("one objective has no front: see hypervolume instead.")
        x, y = self.objectives[:2]
        every = [(row.values[x], row.values[y]) for row in self.evaluated]
        front = np.array(every)[pareto(np.array(every))]
        bound = self.target.get(x)
        return plots.pareto_front(every, [(float(a), float(b)) for a, b in front], (x, y), bound, ax)

    def __str__(self) -> str:
        rows = [list(row.values.values()) for row in self.rows]
        lines = [
            f"{len(self.evaluated)} models tried ({self.backend}, seed {self.seed}), {len(self.rows)} of them on the "
            f"front; hypervolume {self.hypervolume[-1]:.4f}",
            tables.text(list(self.objectives), rows),
        ]
        if self.target:
            best = self.best()
            bounds = ", ".join(f"{name} <= {value:g}" for name, value in self.target.items())
            found = ", ".join(f"{n} {v:.4g}" for n, v in best.values.items()) if best else "no row"
            lines.append(f"best with {bounds}: {found}")
        return "\n\n".join(lines)
