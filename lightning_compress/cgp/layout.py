"""Moving the gates of a circuit to another grid, within what its columns hold and may look back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.circuit import GENES, Circuit, Grid
from lightning_compress.cgp.functions import FUNCTIONS, WIRE
from lightning_compress.energy import EnergyTable

_SLACKS = (0, 1, 2, 4, 8)


def random_circuit(grid: Grid, functions: Sequence[int], random: np.random.Generator) -> Circuit:
    """A circuit whose genes are drawn evenly from those that are allowed.

    Args:
        grid: sizes.
        functions: ids that may be used.
        random: generator.

    Returns:
        The circuit; where a column has no pin to look at, its gates are constants.

    Raises:
        ValueError: no functions, or gates that need a pin in a column that has none.

    Examples:
        >>> import numpy as np
        >>> from lightning_compress.cgp.circuit import Grid
        >>> from lightning_compress.cgp.layout import random_circuit
        >>> circuit = random_circuit(Grid(3, 2, 4, 5, look_back=2), range(27), np.random.default_rng(0))
        >>> circuit.genome.shape, circuit.evaluate([1, 2, 3]).shape
        ((62,), (2,))
    """
    ids = np.array(sorted(set(functions)), dtype=np.int32)
    constants = np.array(
        [f for f in ids.tolist() if not (FUNCTIONS[f].uses_a or FUNCTIONS[f].uses_b)], np.int32
    )
    legal = np.array([grid.legal(c) for c in range(grid.cols + 1)], dtype=np.int64)
    inputs, first = legal[:, 0], legal[:, 1]
    span = inputs + legal[:, 2] - first
    if not len(ids) or (not len(constants) and not span.all()):
        raise ValueError(
            f"functions={ids.tolist()}: gates without a pin to look at need a constant (22 to 26); {grid} has such."
        )

    def pins(columns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        drawn = (random.random(columns.shape) * span[columns]).astype(np.int64)
        return np.where(drawn < inputs[columns], drawn, drawn - inputs[columns] + first[columns]) * (
            span[columns] > 0
        )

    columns = np.arange(grid.gates) // grid.rows
    numbers = ids[random.integers(0, len(ids), grid.gates)]
    empty = span[columns] == 0
    if empty.any():
        numbers[empty] = constants[random.integers(0, len(constants), int(empty.sum()))]
    gates = np.stack([pins(columns), pins(columns), numbers], axis=1)
    ends = pins(np.full(grid.outputs, grid.cols))
    return Circuit(np.concatenate([gates.reshape(-1), ends]).astype(np.int32), grid)


def carriers(functions: Sequence[int], table: EnergyTable) -> int | None:
    """The function that costs least of those which can hand a value on: a wire, or ``a and a``, ``a or a``.

    Args:
        functions: ids that may be used.
        table: costs.

    Returns:
        Its id; None if there is none.
    """
    return min((f for f in (WIRE, 8, 9) if f in functions), key=lambda f: table[f].energy_pj, default=None)


def place(circuit: Circuit, grid: Grid, carrier: int | None, spare: npt.NDArray[np.int32]) -> Circuit | None:
    """The gates that take part, on another grid.

    Columns are filled from the left, longest paths first; values that would come out of sight are handed on.

    Args:
        circuit: any, with the inputs, outputs and data sets of the grid.
        grid: where its gates shall stand.
        carrier: function that hands values on; None: none is allowed.
        spare: genome for that grid, which fills all other gates.

    Returns:
        A circuit with the same outputs, or None where it finds no place for all gates.

    Examples:
        >>> from lightning_compress.cgp.circuit import Circuit, Grid
        >>> from lightning_compress.cgp.layout import place, random_circuit
        >>> circuit = Circuit.from_text("{1,1,2,1,2,2,1}([1]0,0,12)([2]1,1,12)(2)")  # 4 x
        >>> grid = Grid(1, 1, rows=2, cols=3)
        >>> spare = random_circuit(grid, [12], np.random.default_rng(0)).genome
        >>> place(circuit, grid, None, spare).evaluate([5]).tolist()
        [20]
    """
    slacks = (None,) if grid.reach == grid.cols else (None, *_SLACKS)  # late gates have less to hand on
    plan = _Plan(circuit)
    for slack in slacks:
        genome = plan.fill(grid, carrier, spare, slack)
        if genome is not None:
            return Circuit(genome, grid)
    return None


class _Plan:
    """Gates in order, with the pins that they read; pins below ``inputs`` are those of the circuit."""

    def __init__(self, circuit: Circuit) -> None:
        self.inputs = circuit.grid.inputs
        self.lines = list(circuit.lines())
        self.ends = circuit.outputs.tolist()
        self.height: dict[int, int] = {}  # columns that are needed from a gate on, itself among them
        self.readers: dict[int, int] = dict.fromkeys(range(self.inputs), 0)
        for pin, _, operands in reversed(self.lines):
            self.height.setdefault(pin, 1)
            for p in operands:
                self.height[p] = max(self.height.get(p, 1), self.height[pin] + 1)
        for pin, _, operands in self.lines:
            self.readers.setdefault(pin, 0)
            for p in set(operands):
                self.readers[p] += 1
        for p in set(self.ends):
            self.readers[p] += 1  # never read before the end

    def fill(
        self, grid: Grid, carrier: int | None, spare: npt.NDArray[np.int32], slack: int | None
    ) -> npt.NDArray[np.int32] | None:
        """The genome; with a slack, gates wait until their paths leave no more columns than that."""
        if len(self.lines) > grid.gates:
            return None
        genome, left = spare.copy(), dict(self.readers)
        gates = genome[: GENES * grid.gates].reshape(-1, GENES)
        seat = {p: p for p in range(self.inputs)}  # pin of the circuit -> its latest pin on the grid
        waiting = sorted(self.lines, key=lambda line: -self.height[line[0]])
        constant = {pin: number for pin, number, operands in self.lines if not operands}
        for column in range(grid.cols):
            inputs, first, _ = grid.legal(column)
            inputs_after, first_after, _ = grid.legal(column + 1)
            free, next_pin = grid.rows, grid.inputs + column * grid.rows
            fading = {
                p
                for p, at in seat.items()
                if left[p] and not (at >= first_after if at >= grid.inputs else inputs_after)
            }
            before, rest = dict(seat), []

            def put(pin: int, a: int, b: int, number: int, row: int, base: int = next_pin) -> None:
                gates[base + row - grid.inputs] = a, b, number
                seat[pin] = base + row

            for line in waiting:
                pin, number, operands = line
                ready = all(p in before for p in operands)
                late = slack is None or grid.cols - column <= self.height[pin] + slack
                done = {p for p in set(operands) & fading if left[p] == 1}
                if not (ready and late and free + len(done) > len(fading)):
                    rest.append(line)
                    continue
                a, b = gates[next_pin + grid.rows - free - grid.inputs, :2].tolist()
                function, names = FUNCTIONS[number], iter(operands)
                a = before[next(names)] if function.uses_a else a
                b = before[next(names)] if function.uses_b else b
                put(pin, a, b, number, grid.rows - free)
                free -= 1
                fading -= done
                for p in set(operands):
                    left[p] -= 1
            waiting = rest
            for p in sorted(fading):
                if free == 0 or (p not in constant and carrier is None):
                    return None
                put(p, before[p], before[p], constant.get(p, carrier or 0), grid.rows - free)
                free -= 1
            for p in [p for p in seat if not left[p]]:
                del seat[p]
        if waiting:
            return None
        genome[GENES * grid.gates :] = [seat[p] for p in self.ends]
        return genome
