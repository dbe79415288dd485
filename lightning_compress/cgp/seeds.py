"""Where an evolution starts: a circuit that was built to give every wanted value, or a random one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.circuit import Circuit, Grid
from lightning_compress.cgp.derivation import LOW, Derivation, derive
from lightning_compress.cgp.functions import FUNCTIONS, WIRE
from lightning_compress.cgp.layout import place
from lightning_compress.cgp.problem import Problem
from lightning_compress.energy import EnergyTable

Pin = int
Source = tuple[str, int]  # ("pin", number of an input) or ("value", v + 128)
Need = tuple[Source, ...]  # what an output gives: one source, or those of even and odd data sets
_PASSING = (WIRE, 8, 9)  # what gives x of x and x
_MULTIPLEXER, _DEMULTIPLEXER = 27, 28


def random_circuit(grid: Grid, functions: Sequence[int], random: np.random.Generator) -> Circuit:
    """A circuit whose genes are drawn evenly from those that are allowed.

    Args:
        grid: sizes.
        functions: ids that may be used.
        random: generator.

    Returns:
        The circuit; where a column has no pin to look at, its gates are constants.

    Raises:
        ValueError: no functions, or none without operands for gates that have no pin to look at.

    Examples:
        >>> import numpy as np
        >>> from lightning_compress.cgp.circuit import Grid
        >>> from lightning_compress.cgp.seeds import random_circuit
        >>> circuit = random_circuit(Grid(3, 2, 4, 5, look_back=2), range(27), np.random.default_rng(0))
        >>> circuit.genome.shape, circuit.evaluate([1, 2, 3]).shape
        ((62,), (2,))
    """
    ids = np.array(sorted(set(functions)), dtype=np.int64)
    constants = [f for f in ids.tolist() if not (FUNCTIONS[f].uses_a or FUNCTIONS[f].uses_b)]
    inputs, first, end = np.array([grid.legal(c) for c in range(grid.cols + 1)], dtype=np.int64).T
    span = inputs + end - first
    if not len(ids) or not (constants or span.all()):
        raise ValueError(
            f"functions={ids.tolist()}: {grid} has gates without a pin to look at, which need a constant (22 to 26)."
        )

    def pins(column: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        drawn = (random.random(column.shape) * span[column]).astype(np.int64)
        return np.where(drawn < inputs[column], drawn, drawn - inputs[column] + first[column])

    column = np.arange(grid.gates) // grid.rows
    numbers = ids[random.integers(0, len(ids), grid.gates)]
    gates = np.stack([pins(column), pins(column), numbers], axis=1)
    empty = span[column] == 0
    if empty.any():
        gates[empty, :2] = 0
        gates[empty, 2] = np.array(constants)[random.integers(0, len(constants), int(empty.sum()))]
    ends = pins(np.full(grid.outputs, grid.cols))
    return Circuit(np.concatenate([gates.reshape(-1), ends]).astype(np.int32), grid)


def adder(problem: Problem, grid: Grid, functions: Sequence[int], table: EnergyTable) -> Circuit:
    """A circuit that gives every wanted value, of as little energy as a few constructions find.

    Values come from inputs and constants by operations that cost little and lead to many wanted values (``derive``).
    With several data sets only inputs that are equal in all of them are computed with; an output that shall differ
    between even and odd data sets gets a multiplexer.

    Args:
        problem: what is asked for; outputs with counts of 0 in all data sets share a pin with others.
        grid: sizes, those of the problem among them.
        functions: ids that may be used.
        table: costs.

    Returns:
        The circuit, with random genes (always the same) in all gates that are not needed. Where values are missing,
        because the grid is too small or the functions do not lead there, those that most weights use are there, and the
        other outputs give the nearest value.

    Warns:
        UserWarning: values are missing; says how many.

    Raises:
        ValueError: the grid has other numbers of inputs, outputs or data sets than the problem.

    Examples:
        >>> from lightning_compress.cgp import Grid
        >>> from lightning_compress.cgp.problem import Problem
        >>> from lightning_compress.cgp.seeds import adder
        >>> from lightning_compress.energy import EnergyTable
        >>> problem = Problem.of([[3]], [[12, -116, 12]])
        >>> circuit = adder(problem, Grid(1, 2, rows=4, cols=4), range(27), EnergyTable.default())
        >>> circuit.evaluate([3]).tolist(), circuit.cost().energy_pj  # 12 = 3 << 2, -116 = 12 - 128
        ([-116, 12], 0.0005)

    References:
        Voronenko and Püschel, "Multiplierless multiple constant multiplication", ACM TALG 2007.
    """
    sizes = grid.inputs, grid.outputs, grid.datasets
    asked = problem.inputs.shape[1], problem.targets.shape[1], problem.datasets
    if sizes != asked:
        raise ValueError(f"{grid} has {sizes} inputs, outputs and data sets; the problem has {asked}.")
    builder = _Builder(problem, grid, tuple(sorted(set(functions))), table)
    needs = builder.needs()
    low, high, best = 0, len(needs), builder.build(needs)
    if best is None:
        best = builder.build([])
        while high - low > 1:  # the longest row of most-used values that fits
            middle = (low + high) // 2
            found = builder.build(needs[:middle])
            low, high, best = (low, middle, best) if found is None else (middle, high, found)
    assert best is not None  # nothing always fits
    circuit = builder.finish(best)
    wrong = (problem.outputs(circuit) != problem.targets) & (problem.counts > 0)
    if wrong.any():
        warnings.warn(
            f"the seed circuit on {grid.rows} x {grid.cols} gates lacks {len(np.unique(problem.targets[wrong]))} of "
            f"{len(np.unique(problem.targets[problem.counts > 0]))} values and gives the nearest instead: take more "
            "rows or columns, or more functions.",
            stacklevel=2,
        )
    return circuit


class _Builder:
    """Circuits for one problem on one grid."""

    def __init__(self, problem: Problem, grid: Grid, functions: tuple[int, ...], table: EnergyTable) -> None:
        self.problem, self.grid, self.functions, self.table = problem, grid, functions, table
        self.spare = random_circuit(grid, functions, np.random.default_rng(0)).genome
        self.x = problem.inputs.astype(np.int64) + LOW
        self.wanted = problem.targets.astype(np.int64) + LOW
        self.matters = problem.counts > 0
        common = (self.x == self.x[:1]).all(0)
        self.pin = np.full(256, -1, np.int64)  # value -> first input that has it in every data set
        for p in np.flatnonzero(common)[::-1]:
            self.pin[self.x[0, p]] = p
        passing = [f for f in _PASSING if f in functions]
        self.carrier = min(passing, key=lambda f: table[f].energy_pj, default=None)

    def needs(self) -> list[Need]:
        """What outputs cannot read from an input, each once, the most used first."""
        used: dict[Need, int] = {}
        for o in range(self.grid.outputs):
            need = self._need(o)
            if need:
                used[need] = used.get(need, 0) + int(self.problem.counts[:, o].sum())
        return sorted(used, key=lambda need: (-used[need], need))

    def _need(self, output: int) -> Need | None:
        sets = np.flatnonzero(self.matters[:, output])
        wanted = self.wanted[sets, output]
        if not len(sets) or (self.x[sets] == wanted[:, None]).all(0).any():
            return None
        if (wanted == wanted[0]).all():
            return (("value", int(wanted[0])),)
        halves = tuple(self._source(sets[sets % 2 == s], output) for s in (0, 1))
        return None if None in halves else halves  # type: ignore[return-value]

    def _source(self, sets: npt.NDArray[np.int64], output: int) -> Source | None:
        """An input with the wanted values of some data sets, else the one value that all of them want."""
        wanted = self.wanted[sets, output]
        same = (self.x[sets] == wanted[:, None]).all(0)
        if same.any():
            return "pin", int(np.argmax(same))
        return ("value", int(wanted[0])) if (wanted == wanted[0]).all() else None
