"""The same generations in plain Python, one child after the other evaluated as a whole: to compare the engine with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.gates.functions import FUNCTIONS, WIRE
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.settings import MILLI, PICO, Settings

Array = npt.NDArray[Any]
Cost = tuple[int, int, int, int, int]  # error, energy, delay, gates, depth
_MASK = 2**64 - 1
_USED = np.array(
    [[n in FUNCTIONS and getattr(FUNCTIONS[n], u) for n in range(WIRE + 1)] for u in ("uses_a", "uses_b")]
)


class Reference:
    """A parent and its offspring; arguments and methods are those of ``engine.Compiled``.

    Args:
        problem: what is asked for.
        settings: of the search.
        genome: of the first parent.
        seed: of the random numbers, != 0.
    """

    def __init__(self, problem: Problem, settings: Settings, genome: Array, seed: int) -> None:
        self.grid = settings.grid(problem)
        self._problem, self._settings, self._random = problem, settings, seed
        self._ids = settings.ids(problem.datasets)
        self._table = settings.table
        self._parent = Circuit(genome, self.grid)
        self._weights, self._limit = np.zeros(problem.targets.shape, np.int64), 0
        self._cost: Cost = (0, 0, 0, 0, 0)
        self._front: list[tuple[Cost, Array]] = []
        self._improved = self._evaluated = self._inherited = self._stagnation = 0

    def weigh(self, weights: Array, limit: int) -> None:
        """Begin a phase."""
        self._weights, self._limit = np.array(weights), limit
        self._cost, self._stagnation = self._measure(self._parent), 0

    def collect(self) -> None:
        """Put the parent among the trade-offs."""
        self._keep(self._cost, self._parent.genome, delays=True)

    def advance(self, most: int, patience: int, phase: int) -> int:
        """Up to so many generations."""
        self._improved = 0
        for done in range(most):
            perfect = self._cost[0] == 0 and (phase == 1 or self._cost[1] == 0)
            if perfect or self._stagnation >= patience:
                return done
            parent, best, better = self._cost, (self._cost, self._parent), False
            for _ in range(self._settings.offspring):
                child = Circuit(self._mutated(), self.grid)
                cost = parent
                if self._same(child):
                    self._inherited += 1
                else:
                    self._evaluated += 1
                    cost = self._measure(child)
                    if phase == 2 and any(cost[k] < parent[k] for k in (0, 1, 3)):
                        self._keep(cost, child.genome, delays=False)
                if self._key(cost, best[0]) <= self._key(best[0], cost):
                    better = better or self._key(cost, best[0]) < self._key(best[0], cost)
                    best = cost, child
            self._cost, self._parent = best
            self._stagnation += 1
            if better:
                self._stagnation, self._improved = 0, 1
                if phase == 2:
                    self._keep(self._cost, self._parent.genome, delays=True)
                return done + 1
        return most

    def cost(self) -> list[int]:
        """Of the parent: error, energy, delay, gates, depth."""
        return list(self._cost)

    @property
    def counters(self) -> list[int]:
        """Whether the last generation was an improvement, children evaluated and not, generations without one."""
        return [self._improved, self._evaluated, self._inherited, self._stagnation]

    def genome(self) -> Array:
        """Of the parent."""
        return self._parent.genome.copy()

    def trade_offs(self) -> list[tuple[list[int], Array]]:
        """Error, energy, delay and gates of those that are kept, and their genomes."""
        return [(list(cost[:4]), genes.copy()) for cost, genes in self._front]

    def dump(self) -> dict[str, Array]:
        """All that ``restore`` needs."""
        return {
            "genes": self.genome(),
            "random": np.array([self._random], np.uint64),
            "counters": np.array([*self.counters, len(self._front), 0], np.int64),
            "front": np.array([cost[:4] for cost, _ in self._front], np.int64).reshape(-1, 4),
            "kept": np.array([genes for _, genes in self._front], np.int32).reshape(-1, self.grid.genes),
        }

    def restore(self, saved: Mapping[str, Array], weights: Array, limit: int) -> None:
        """Go on where ``dump`` was called."""
        self._parent, self._random = Circuit(saved["genes"], self.grid), int(saved["random"][0])
        self._front = [
            ((*row, 0), genes) for row, genes in zip(saved["front"].tolist(), saved["kept"], strict=True)
        ]
        self.weigh(weights, limit)
        self._improved, self._evaluated, self._inherited, self._stagnation = saved["counters"].tolist()[:4]

    def _key(self, cost: Cost, other: Cost) -> tuple[int, ...]:
        """What decides between a cost and another one, the first number first."""
        error, energy, delay, gates, depth = cost
        if max(error, other[0]) > self._limit:
            return (error,)
        return energy, error, delay, gates, depth

    def _measure(self, circuit: Circuit) -> Cost:
        gaps = np.abs(self._problem.outputs(circuit).astype(np.int64) - self._problem.targets)
        error = int((self._weights * (gaps if self._settings.fitness == "AE" else gaps**2)).sum())
        cost = circuit.cost(self._table)
        energy, delay = round(cost.energy_pj * PICO), round(cost.delay * MILLI)
        return error, energy, delay, cost.gate_count, cost.depth

    def _same(self, child: Circuit) -> bool:
        """Whether no gene that matters in the parent has another value."""
        if (self._parent.outputs != child.outputs).any():
            return False
        differ = self._parent.gates != child.gates
        matters = np.stack([*_USED[:, self._parent.gates[:, 2]], np.ones(len(differ), np.bool_)], axis=1)
        return not (differ & matters)[self._parent.active()].any()

    def _draw(self) -> tuple[int, int]:
        """Two random numbers of 32 bits (xorshift64*)."""
        x = self._random
        x = (x ^ x << 13) & _MASK
        x ^= x >> 7
        x = (x ^ x << 17) & _MASK
        self._random = x
        x = x * 0x2545F4914F6CDD1D & _MASK
        return x >> 32, x & 0xFFFFFFFF

    def _mutated(self) -> Array:
        grid, genes = self.grid, self.genome()
        for _ in range(1 + (self._draw()[0] * max(1, int(grid.genes * self._settings.mutation)) >> 32)):
            high, low = self._draw()
            place = high * grid.genes >> 32
            if place < 3 * grid.gates and place % 3 == 2:
                genes[place] = self._ids[low * len(self._ids) >> 32]
            else:
                inputs, first, end = grid.legal(
                    place // 3 // grid.rows if place < 3 * grid.gates else grid.cols
                )
                chosen = low * (inputs + end - first) >> 32
                genes[place] = chosen if chosen < inputs else first + chosen - inputs
        return genes

    def _keep(self, cost: Cost, genes: Array, *, delays: bool) -> None:
        kept = [0, 1, 2, 3] if delays else [0, 1, 3]
        if any(all(other[k] <= cost[k] for k in kept) for other, _ in self._front):
            return
        k = 0
        while k < len(self._front):
            if all(a >= b for a, b in zip(self._front[k][0][:4], cost[:4], strict=True)):
                self._front[k] = self._front[-1]
                self._front.pop()
            else:
                k += 1
        self._front.append((cost, genes.copy()))
        if len(self._front) > self._settings.front:
            worst = _crowded(np.array([row[:4] for row, _ in self._front]))
            self._front[worst] = self._front[-1]
            self._front.pop()


def _crowded(points: Array) -> int:
    """The last of the rows with the least crowding distance."""
    distance = np.zeros(len(points))
    for column in points.T:
        rank = np.argsort(column, kind="stable")
        width = column[rank[-1]] - column[rank[0]]
        if width:
            distance[rank[[0, -1]]] = np.inf
            distance[rank[1:-1]] += (column[rank[2:]] - column[rank[:-2]]) / width
    return int(np.flatnonzero(distance == distance.min())[-1])
