"""Settings of an evolution, and what it yields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.cgp.gates.circuit import Circuit, CircuitCost, Grid
from lightning_compress.cgp.gates.functions import FUNCTIONS, SELECTING, STANDARD
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.energy import EnergyTable

FITNESS = ("SE", "MSE", "AE")
SEEDS = ("adder", "random")
PICO = 10**6  # energies are compared as whole numbers of 1e-6 pJ
MILLI = 10**3  # and delays of 1e-3 additions


@dataclass(frozen=True)
class Settings:
    """How circuits are searched for: a (1 + offspring) evolution in two phases.

    Args:
        error_threshold: root mean square error of a weight that is good enough, in int8 steps, >= 0; of fitness "AE"
            the mean absolute error.
        rows: gates of a column, >= 1.
        cols: columns, >= 1.
        look_back: columns that a gate may look back; None: all.
        offspring: children of a generation, >= 1.
        mutation: largest share of the genes that a child draws anew, in (0, 1].
        patience: generations without improvement that end a phase, >= 1.
        generations: all of them, >= 0; None: until patience ends.
        fitness: "SE" (sum of squares), "MSE" (their mean; the same order) or "AE" (sum of absolute errors).
        functions: ids; "standard": all but the multiplexers, which join when there are several data sets.
        seed_circuit: "adder" (built to give every value), or "random".
        energy: costs; None takes the default table.
        front: how many trade-offs of error, energy, delay and gates are kept, >= 1.
        seed: of the random numbers, 0 to 2^63 - 1.

    Raises:
        ValueError: a setting out of its range.
    """

    error_threshold: float = 0.0
    rows: int = 64
    cols: int = 16
    look_back: int | None = None
    offspring: int = 8
    mutation: float = 0.01
    patience: int = 2000
    generations: int | None = None
    fitness: str = "SE"
    functions: Sequence[int] | str = "standard"
    seed_circuit: str = "adder"
    energy: EnergyTable | None = None
    front: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for option, allowed in (("fitness", FITNESS), ("seed_circuit", SEEDS)):
            if getattr(self, option) not in allowed:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} is unknown; allowed: {', '.join(allowed)}."
                )
        for option in ("rows", "cols", "offspring", "patience", "front"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)}: allowed is >= 1.")
        if self.look_back is not None and self.look_back < 1:
            raise ValueError(f"look_back={self.look_back}: allowed is >= 1, or None for all columns.")
        if not (math.isfinite(self.error_threshold) and self.error_threshold >= 0):
            raise ValueError(f"error_threshold={self.error_threshold}: allowed is >= 0.")
        if not 0 < self.mutation <= 1:
            raise ValueError(f"mutation={self.mutation}: allowed is 0 < mutation <= 1.")
        if self.generations is not None and self.generations < 0:
            raise ValueError(f"generations={self.generations}: allowed is >= 0, or None.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: allowed is 0 <= seed < 2^63.")
        if isinstance(self.functions, str):
            if self.functions != "standard":
                raise ValueError(f'functions={self.functions!r}: allowed are "standard" and a list of ids.')
        elif not self.functions or any(f not in FUNCTIONS for f in self.functions):
            known = ", ".join(map(str, FUNCTIONS))
            raise ValueError(f"functions={list(self.functions)}: allowed is a list of {known}.")

    @property
    def table(self) -> EnergyTable:
        """Costs."""
        return self.energy or EnergyTable.default()

    def ids(self, datasets: int) -> tuple[int, ...]:
        """The functions that genes may have, sorted, each once."""
        if isinstance(self.functions, str):
            return (*STANDARD, *(SELECTING if datasets > 1 else ()))
        return tuple(sorted(set(self.functions)))

    def grid(self, problem: Problem) -> Grid:
        """The grid of a problem."""
        return Grid(
            problem.inputs.shape[1],
            problem.targets.shape[1],
            self.rows,
            self.cols,
            self.look_back,
            problem.datasets,
        )

    def limit(self, weights: int) -> float:
        """The summed error that is good enough: ``t^2 N``, or ``t N`` of absolute errors."""
        return self.error_threshold * weights if self.fitness == "AE" else self.error_threshold**2 * weights

    def config(self) -> dict[str, Any]:
        """The settings as JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "energy"}
        if not isinstance(self.functions, str):
            values["functions"] = list(self.functions)
        costs = None
        if self.energy is not None:
            area = {
                o.id: None if math.isnan(o.area_um2) else o.area_um2 for o in self.energy.operations.values()
            }
            costs = [
                [o.id, o.name, o.energy_pj, o.delay, area[o.id]] for o in self.energy.operations.values()
            ]
        return values | {"energy": costs}


@dataclass(frozen=True)
class Row:
    """One line of a history: the best circuit so far.

    Args:
        generation: when it was found; 0: the circuit that evolution started from.
        phase: 1 (every wanted value counts once) or 2 (as often as it is used).
        seconds: since the start.
        error: summed error of that phase.
        energy: 1e-6 pJ.
        delay: 1e-3 additions.
        depth: gates on the longest path.
        gate_count: gates that take part.
    """

    generation: int
    phase: int
    seconds: float
    error: int
    energy: int
    delay: int
    depth: int
    gate_count: int


@dataclass(frozen=True)
class Solution:
    """A circuit that no other one met is better than in all of error, energy, delay and gates.

    Args:
        circuit: itself.
        error: summed over the weights, of the fitness.
        cost: of its gates.
    """

    circuit: Circuit
    error: int
    cost: CircuitCost


@dataclass(frozen=True)
class EvolutionResult:
    """What ``evolve`` returns.

    Args:
        problem: what was asked for.
        settings: of the search.
        best: the circuit and its costs.
        front: trade-offs, by rising error; the best one is among them.
        history: one row for the start, for every improvement and for the start of phase 2.
        generations: that took place.
        evaluations: children that were evaluated.
        inherited: children with no change that matters, which were not.
        stopped: why: "patience", "generations", "perfect" (no error, no energy), "callback" or "no outputs".
    """

    problem: Problem
    settings: Settings
    best: Solution
    front: tuple[Solution, ...]
    history: tuple[Row, ...]
    generations: int
    evaluations: int
    inherited: int
    stopped: str = field(default="")

    @property
    def met(self) -> bool:
        """Whether the error is at most the threshold."""
        return self.best.error <= self.settings.limit(self.problem.weights)

    @property
    def rms(self) -> float:
        """Root mean square error of all weights, inputs among them, in int8 steps."""
        return self.problem.rms(self.best.circuit)


def run_seed(seed: int, run: int) -> int:
    """The seed of one of several runs; it does not depend on how runs are split over processes or batches.

    Args:
        seed: of all of them.
        run: number of the run, >= 0.

    Returns:
        A seed, 0 to 2^63 - 1; run 0 has ``seed`` itself.

    Examples:
        >>> from lightning_compress.cgp.search.settings import run_seed
        >>> run_seed(7, 0), run_seed(7, 1) == run_seed(7, 2)
        (7, False)

    Source: Steele, Lea and Flood 2014, Fast Splittable Pseudorandom Number Generators.
    """
    mixed = seed + run * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    if run == 0:
        return seed
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 31) >> 1
