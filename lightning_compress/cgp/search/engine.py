"""A parent and its offspring in the arrays of `loops`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.circuit import Circuit, Grid
from lightning_compress.cgp.gates.functions import FUNCTIONS, WIRE
from lightning_compress.cgp.search import loops
from lightning_compress.cgp.search.loops import (
    DEBRUIJN,
    DELAY,
    KEPT,
    STAGNATION,
    UNKNOWN,
    Fixed,
    Sizes,
    State,
)
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.settings import MILLI, PICO, Settings

Array = npt.NDArray[Any]
_MAX = WIRE + 1


class Compiled:
    """A parent and its offspring, in arrays.

    Args:
        problem: what is asked for.
        settings: of the search.
        genome: of the first parent.
        seed: of the random numbers, != 0.

    Raises:
        ValueError: a genome of another length, or with a pin or function that is not allowed.
    """

    def __init__(self, problem: Problem, settings: Settings, genome: Array, seed: int) -> None:
        grid = self.grid = settings.grid(problem)
        Circuit(genome, grid).check_all()
        pins, sets, pad = grid.inputs + grid.gates, grid.datasets, -grid.inputs % 64
        words = -(-(pad + pins) // 64)
        moves = max(1, int(grid.genes * settings.mutation))
        self.sizes = Sizes(
            grid.inputs,
            pad,
            grid.gates,
            grid.outputs,
            sets,
            settings.offspring,
            moves,
            0,
            settings.fitness == "AE",
            settings.front,
        )
        self.fixed = _fixed(problem, settings, grid)
        self.state = State(
            genes=np.array(genome, dtype=np.int32),
            cost=np.zeros(5, np.int64),
            random=np.array([seed], np.uint64),
            counters=np.zeros(6, np.int64),
            values=np.zeros(pins * sets, np.int32),
            on=np.zeros(words, np.uint64),
            now=np.zeros(words, np.uint64),
            chosen=np.zeros(words, np.uint64),
            touched=np.zeros(words, np.uint64),
            changed=np.zeros(pins, np.uint8),
            log=np.zeros(grid.gates + 1, np.int32),
            old=np.zeros((grid.gates + 1) * sets, np.int32),
            moves=np.zeros((3, moves), np.int32),
            best=np.zeros((2, moves), np.int32),
            candidate=np.zeros(5, np.int64),
            champion=np.zeros(5, np.int64),
            far=np.zeros((2, pins), np.int64),
            front=np.zeros((settings.front + 1, 4), np.int64),
            kept=np.zeros((settings.front + 1, grid.genes), np.int32),
        )
        self.state.values[: grid.inputs * sets] = problem.inputs.T.reshape(-1)

    def weigh(self, weights: Array, limit: int) -> None:
        """Begin a phase: how much each output counts, and the largest error that is good enough."""
        self.fixed.weights[:] = weights
        self.sizes = self.sizes._replace(limit=limit)
        loops.settle(self.sizes, self.fixed, self.state)
        self.state.counters[STAGNATION] = 0

    def collect(self) -> None:
        """Put the parent among the trade-offs."""
        s = self.state
        if not loops.dominated(s.front, s.counters[KEPT], s.cost, True):
            s.counters[KEPT] = loops.keep(
                self.sizes.front, s.front, s.kept, s.counters[KEPT], s.cost, s.genes
            )

    def advance(self, most: int, patience: int, phase: int) -> int:
        """Up to so many generations; see ``loops.generations``."""
        return int(
            loops.generations(self.sizes, self.fixed, self.state, most, patience, phase == 2, phase == 1)
        )

    def cost(self) -> list[int]:
        """Of the parent: error, energy, delay, gates, depth."""
        t, s = self.fixed, self.state
        if s.cost[DELAY] == UNKNOWN:
            loops.farthest(self.sizes, s.genes, t.uses, t.delay, t.counts, t.places, s.on, s.far, s.cost)
        return [int(v) for v in s.cost]

    @property
    def counters(self) -> list[int]:
        """Whether the last generation was an improvement, children evaluated and not, generations without one."""
        return [int(v) for v in self.state.counters]

    def genome(self) -> Array:
        """Of the parent."""
        return self.state.genes.copy()

    def trade_offs(self) -> list[tuple[list[int], Array]]:
        """Error, energy, delay and gates of those that are kept, and their genomes."""
        count = int(self.state.counters[KEPT])
        return [([int(v) for v in self.state.front[k]], self.state.kept[k].copy()) for k in range(count)]

    def dump(self) -> dict[str, Array]:
        """All that ``restore`` needs."""
        return {name: array.copy() for name, array in self._saved(int(self.state.counters[KEPT])).items()}

    def restore(self, saved: Mapping[str, Array], weights: Array, limit: int) -> None:
        """Go on where ``dump`` was called.

        Args:
            saved: what it returned.
            weights: of that phase.
            limit: of that phase.

        Raises:
            ValueError: arrays of other shapes, or a genome that is not allowed.
        """
        s = self.state
        count = len(saved["front"])
        places = self._saved(count)
        for name, array in saved.items():
            here = places[name]
            if array.shape != here.shape:
                raise ValueError(f"{name} of shape {array.shape}: needed is {here.shape}.")
        Circuit(saved["genes"], self.grid).check_all()  # or the loops would read elsewhere
        for name, array in saved.items():
            places[name][...] = array
        counters = s.counters.copy()
        counters[KEPT] = count
        self.weigh(weights, limit)
        s.counters[:] = counters

    def _saved(self, count: int) -> dict[str, Array]:
        """The arrays that a restart needs, with so many trade-offs."""
        s = self.state
        small = {"genes": s.genes, "random": s.random, "counters": s.counters}
        return {**small, "front": s.front[:count], "kept": s.kept[:count]}


def _fixed(problem: Problem, settings: Settings, grid: Grid) -> Fixed:
    uses = np.zeros(_MAX, np.uint8)
    costs = np.zeros((3, _MAX), np.int64)
    for number, function in FUNCTIONS.items():
        uses[number] = function.uses_a + 2 * function.uses_b
        operation = settings.table[number]
        costs[:, number] = round(operation.energy_pj * PICO), round(operation.delay * MILLI), number != WIRE
    legal = np.array([grid.legal(c) for c in range(grid.cols + 1)], dtype=np.int64)
    places = np.zeros(64, np.int64)
    for bit in range(64):
        places[((1 << bit) * DEBRUIJN & (1 << 64) - 1) >> 58] = bit
    return Fixed(
        column=np.append(np.arange(grid.gates) // grid.rows, grid.cols).astype(np.int32),
        low=legal[:, 0].copy(),
        first=legal[:, 1].copy(),
        span=legal[:, 0] + legal[:, 2] - legal[:, 1],
        ids=np.array(settings.ids(grid.datasets), dtype=np.int32),
        uses=uses,
        energy=costs[0],
        delay=costs[1],
        counts=costs[2],
        targets=problem.targets.astype(np.int32),
        weights=np.zeros(problem.targets.shape, np.int64),
        places=places,
    )
