"""Moving the gates of a circuit to another grid, within what its columns hold and may look back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.circuit import GENES, Circuit, Grid
from lightning_compress.cgp.gates.functions import FUNCTIONS, WIRE

Genes = npt.NDArray[np.int32]
_SLACKS = (None, 0, 1, 2, 4, 8)


def place(circuit: Circuit, grid: Grid, carrier: int | None, spare: Genes) -> Circuit | None:
    """The gates of a circuit that take part, on another grid.

    Columns are filled from the left, longest paths first. A value that comes out of sight while it is needed is handed
    on by a gate more; where that takes too many, another attempt starts gates later.

    Args:
        circuit: any, with the inputs, outputs and data sets of the grid.
        grid: where its gates shall stand.
        carrier: function that hands on its operand, such as a wire; None: there is none.
        spare: genome for that grid, which all other gates keep.

    Returns:
        A circuit with the same outputs, or None if no attempt found a place for every gate.

    Examples:
        >>> import numpy as np
        >>> from lightning_compress.cgp.gates.circuit import Circuit, Grid
        >>> from lightning_compress.cgp.search.layout import place
        >>> from lightning_compress.cgp.search.seeds import random_circuit
        >>> circuit = Circuit.from_text("{1,1,2,1,2,2,1}([1]0,0,12)([2]1,1,12)(2)")  # 4 x
        >>> grid = Grid(1, 1, rows=2, cols=3)
        >>> place(circuit, grid, None, random_circuit(grid, [11], np.random.default_rng(0)).genome).evaluate([5])
        array([20], dtype=int8)
    """
    plan = _Plan(circuit)
    for slack in _SLACKS if grid.reach < grid.cols else _SLACKS[:1]:
        genome = plan.fill(grid, carrier, spare, slack)
        if genome is not None:
            return Circuit(genome, grid)
    return None


class _Plan:
    """The gates that take part, with how far it is from each to the outputs and how often it is read."""

    def __init__(self, circuit: Circuit) -> None:
        self.lines = list(circuit.lines())
        self.ends = circuit.outputs.tolist()
        self.inputs = circuit.grid.inputs
        self.height = dict.fromkeys((pin for pin, _, _ in self.lines), 1)  # columns from a gate on
        self.height |= dict.fromkeys(range(self.inputs), 1)
        self.readers = dict.fromkeys(self.height, 0)
        for pin, _, operands in reversed(self.lines):
            for p in set(operands):
                self.height[p] = max(self.height[p], self.height[pin] + 1)
                self.readers[p] += 1
        for p in set(self.ends):
            self.readers[p] += 1  # who reads behind the last column

    def fill(self, grid: Grid, carrier: int | None, spare: Genes, slack: int | None) -> Genes | None:
        """The genome; with a slack, a gate waits until its path leaves no more columns than that."""
        if len(self.lines) > grid.gates:
            return None
        genome, left = spare.copy(), dict(self.readers)
        gates = genome[: GENES * grid.gates].reshape(-1, GENES)
        seat = {p: p for p in range(self.inputs) if left[p]}  # pin of the circuit -> pin of the grid
        constants = {pin: number for pin, number, operands in self.lines if not operands}
        waiting = sorted(self.lines, key=lambda line: -self.height[line[0]])
        for column in range(grid.cols):
            inputs_stay, first, _ = grid.legal(column + 1)
            fading = {p for p, at in seat.items() if not (inputs_stay if at < grid.inputs else at >= first)}
            seen, rest = dict(seat), []
            gate, end = column * grid.rows, (column + 1) * grid.rows
            for line in waiting:
                pin, number, operands = line
                done = {p for p in set(operands) & fading if left[p] == 1}
                if (
                    not all(p in seen for p in operands)
                    or (slack is not None and grid.cols - column > self.height[pin] + slack)
                    or end - gate + len(done) <= len(fading)
                ):
                    rest.append(line)
                    continue
                pins = [seen[p] for p in operands]
                if FUNCTIONS[number].uses_b:
                    gates[gate, 1] = pins.pop()
                if FUNCTIONS[number].uses_a:
                    gates[gate, 0] = pins.pop()
                gates[gate, 2] = number
                seat[pin] = grid.inputs + gate
                gate += 1
                fading -= done
                for p in set(operands):
                    left[p] -= 1
            waiting = rest
            for p in sorted(fading):
                hand_on = WIRE if carrier == WIRE else constants.get(p, carrier)
                if gate == end or hand_on is None:
                    return None
                gates[gate] = seen[p], seen[p], hand_on
                seat[p] = grid.inputs + gate
                gate += 1
            seat = {p: at for p, at in seat.items() if left[p]}
        if waiting:
            return None
        genome[GENES * grid.gates :] = [seat[p] for p in self.ends]
        return genome
