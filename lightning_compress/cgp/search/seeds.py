"""Where an evolution starts: a circuit that was built to give every wanted value, or a random one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from lightning_compress.cgp.gates.circuit import GENES, Circuit, Grid
from lightning_compress.cgp.gates.functions import FUNCTIONS, WIRE
from lightning_compress.cgp.search.derivation import LOW, derive
from lightning_compress.cgp.search.layout import place
from lightning_compress.cgp.search.problem import Ints, Problem
from lightning_compress.energy import EnergyTable

Source = tuple[str, int]  # ("pin", number of an input) or ("value", v + 128)
Need = tuple[Source, ...]  # what an output gives: one source, or those of even and odd data sets
_PASSING = (WIRE, 8, 9)  # what gives x of x and x
# How values are derived, and the price of a gate in pJ; those with a price are for small grids.
_WAYS: tuple[tuple[str, float | None], ...] = (
    ("dense", None),
    ("plain", None),
    *(("dense", price) for price in (0.002, 0.01, 0.05, 100.0)),
    *(("shallow", price) for price in (0.0, 0.01, 100.0)),
)
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
        >>> from lightning_compress.cgp.gates.circuit import Grid
        >>> from lightning_compress.cgp.search.seeds import random_circuit
        >>> circuit = random_circuit(Grid(3, 2, 4, 5, look_back=2), range(27), np.random.default_rng(0))
        >>> circuit.genome.shape, circuit.evaluate([1, 2, 3]).shape
        ((62,), (2,))
    """
    ids = np.array(sorted(set(functions)), dtype=np.int64)
    constants = [f for f in ids.tolist() if not (FUNCTIONS[f].uses_a or FUNCTIONS[f].uses_b)]
    inputs, first, end = grid.legal_pins().T
    span = inputs + end - first
    if not len(ids) or not (constants or span.all()):
        raise ValueError(
            f"functions={ids.tolist()}: {grid} has gates without a pin to look at, which need a constant (22 to 26)."
        )

    def pins(column: Ints) -> Ints:
        drawn: Ints = (random.random(column.shape) * span[column]).astype(np.int64)
        drawn += (first - inputs)[column] * (drawn >= inputs[column])
        return drawn

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
        >>> from lightning_compress.cgp.search.problem import Ints, Problem
        >>> from lightning_compress.cgp.search.seeds import adder
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
    low, high, best = 0, len(needs), None
    if high <= grid.rows * grid.reach:  # pins that outputs can see
        best = builder.build(needs)
    if best is None:
        high, best = min(high, grid.rows * grid.reach + 1), builder.build([])
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
        self.inputs_seen = grid.legal(grid.cols)[0] > 0
        common = (self.x == self.x[:1]).all(0)
        self.pin = np.full(256, -1, np.int64)  # value -> first input that has it in every data set
        for p in np.flatnonzero(common)[::-1]:
            self.pin[self.x[0, p]] = p
        passing = [f for f in _PASSING if f in functions]
        self.carrier = min(passing, key=lambda f: table[f].energy_pj, default=None)

    def needs(self) -> list[Need]:
        """What the outputs need, each once, the most used first."""
        columns, counts = np.unique(
            np.concatenate([self.wanted, self.problem.counts > 0]), axis=1, return_inverse=True
        )
        uses = np.bincount(counts.reshape(-1), self.problem.counts.sum(0), columns.shape[1])
        found: dict[Need, float] = {}
        for (*column,), use in zip(columns.T, uses, strict=True):
            wanted, matters = np.split(np.array(column), 2)
            need = self._need(wanted, np.flatnonzero(matters))
            if need is not None:
                found[need] = found.get(need, 0) + float(use)
        self.uses = found
        return sorted(found, key=lambda need: (-found[need], need))

    def _need(self, wanted: Ints, sets: Ints) -> Need | None:
        """What gives the values that some data sets want; None: nothing, or no circuit does."""
        if not len(sets):
            return None
        whole = self._source(wanted, sets)
        if whole is not None:
            return None if whole[0] == "pin" and self.inputs_seen else (whole,)
        even, odd = (self._source(wanted, sets[sets % 2 == s]) for s in (0, 1))
        return None if even is None or odd is None else (even, odd)

    def _source(self, wanted: Ints, sets: Ints) -> Source | None:
        """An input with the wanted values in some data sets, else the one value that all of them want."""
        same = (self.x[sets] == wanted[sets, None]).all(0)
        if same.any():
            return "pin", int(np.argmax(same))
        return ("value", int(wanted[sets[0]])) if (wanted[sets] == wanted[sets[0]]).all() else None

    def build(self, needs: Sequence[Need]) -> Circuit | None:
        """The best circuit for some needs, as outputs; None: the grid is too small."""
        best, found = (math.inf, math.inf, 0), None
        for way, price in _WAYS:
            if price is not None and best[0] == 0:
                break  # everything is there, with the least energy that these ways find
            for given in self._choices(needs):
                net, lacking = self._net(given, way, price or 0.0)
                energy = sum(self.table[number].energy_pj for number in net.gates[:, 2].tolist())
                if (lacking, round(energy, 9), net.grid.gates) >= best:
                    continue
                grid = replace(self.grid, outputs=net.grid.outputs)
                placed = place(net, grid, self.carrier, np.resize(self.spare, grid.genes))
                if placed is not None:
                    cost = placed.cost(self.table)  # with what hands values on
                    rank = lacking, round(cost.energy_pj, 9), cost.gate_count
                    best, found = min((best, found), (rank, placed), key=lambda pair: pair[0])
        return found

    def _choices(self, needs: Sequence[Need]) -> Iterator[Sequence[Need]]:
        """The needs; and again with multiplexers of inputs in the place of values that all data sets want."""
        yield needs
        if _MULTIPLEXER in self.functions and self.problem.datasets > 1:
            everywhere = np.arange(self.problem.datasets)
            halves = [everywhere[s::2] for s in (0, 1)]
            changed: list[Need] = []
            for need in needs:
                wanted = np.full(self.problem.datasets, need[0][1])
                found = [self._source(wanted, half) for half in halves] if need[0][0] == "value" else []
                pins = tuple(source for source in found if source is not None and source[0] == "pin")
                changed.append(pins if len(need) == 1 and len(pins) == 2 else need)
            if changed != list(needs):
                yield changed

    def _net(self, needs: Sequence[Need], way: str, price: float) -> tuple[Circuit, float]:
        """Gates in one row, an output for each need that can be met, and how many weights lack theirs."""
        selecting: dict[Need, int | None] = {need: self._selecting(need) for need in needs if len(need) == 2}
        wanted = np.zeros(256, dtype=np.bool_)
        for need in needs:
            for kind, v in need[:1] if selecting.get(need) == _DEMULTIPLEXER else need:
                wanted[v] |= kind == "value" and selecting.get(need, WIRE) is not None
        levels = max(1, self.grid.cols - bool(selecting))
        plan = derive(
            self.pin >= 0,
            wanted,
            self.functions,
            self.table,
            levels=levels,
            gate_pj=price,
            way=way,
        )
        genes: list[int] = []
        pins = {("value", int(v)): int(self.pin[v]) for v in np.flatnonzero(self.pin >= 0)}
        pins |= {("pin", p): p for p in range(self.grid.inputs)}

        def gate(a: int, b: int, number: int) -> int:
            genes.extend((a, b, number))
            return self.grid.inputs + len(genes) // GENES - 1

        for v in sorted(np.flatnonzero(plan.function >= 0).tolist(), key=lambda v: int(plan.level[v])):
            a, b = (pins.get(("value", int(operand[v])), 0) for operand in (plan.a, plan.b))
            pins["value", v] = gate(a, b, int(plan.function[v]))
        ends, lacking = [], 0.0
        for need in needs:
            number = selecting.get(need, WIRE)
            sources = need[:1] if number == _DEMULTIPLEXER else need
            if number is None or not all(source in pins for source in sources):
                lacking += self.uses.get(need, 0.0)
            elif len(need) == 1:
                ends.append(pins[need[0]])
            else:
                ends.append(gate(pins[sources[0]], pins[sources[-1]], number))
        if not genes:
            gate(0, 0, int(self.spare[GENES - 1]))  # a grid has a gate
        net = Grid(self.grid.inputs, len(ends), 1, len(genes) // GENES, None, self.grid.datasets)
        return Circuit(np.array([*genes, *ends], dtype=np.int32), net), lacking

    def _selecting(self, need: Need) -> int | None:
        """The function that tells even from odd data sets; None: none is allowed."""
        allowed = [_MULTIPLEXER] if need[1] != ("value", LOW) else [_MULTIPLEXER, _DEMULTIPLEXER]
        found = [f for f in allowed if f in self.functions]
        return min(found, key=lambda f: self.table[f].energy_pj, default=None)

    def finish(self, placed: Circuit) -> Circuit:
        """The same gates with an output for each of the problem: the pin that is nearest to what it should give."""
        grid, gates = self.grid, placed.genome[: GENES * self.grid.gates]
        inputs, first, end = grid.legal(grid.cols)
        active = grid.inputs + np.flatnonzero(placed.active())
        pins = np.concatenate([np.arange(inputs), active[(active >= first) & (active < end)]])
        if not len(pins):
            pins = np.arange(first, end)
        look = Circuit(np.concatenate([gates, pins]), replace(grid, outputs=len(pins)))
        x = self.problem.inputs
        values = (
            look.evaluate(x if self.problem.datasets > 1 else x[0]).reshape(len(x), -1).astype(np.int64) + LOW
        )
        asked = np.concatenate([self.wanted, self.problem.counts])
        columns, place_of = np.unique(asked, axis=1, return_inverse=True)
        wanted, counts = np.split(columns, 2)
        error = sum(
            counts[d, :, None] * (wanted[d, :, None] - values[d]) ** 2 for d in range(self.problem.datasets)
        )
        nearest = pins[np.argmin(error, axis=1)]
        taken = np.flatnonzero(counts.any(0))
        if len(taken):
            nearest[~counts.any(0)] = nearest[taken[0]]
        return Circuit(np.concatenate([gates, nearest[place_of.reshape(-1)]]), grid)
