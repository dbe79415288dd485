"""A circuit of int8 gates on a grid: what it computes, which gates take part, and what that costs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.functions import CALLS, FUNCTIONS, WIRE, Int8, apply
from lightning_compress.energy import EnergyTable

Ints = npt.NDArray[np.int64]
GENES = 3  # of a gate: two pins and a function
_MOST = 2**31 - 1  # numbers of pins are int32
_USES_A = {number for number, function in FUNCTIONS.items() if function.uses_a}
_USES_B = {number for number, function in FUNCTIONS.items() if function.uses_b}


@dataclass(frozen=True)
class Grid:
    """Gates in columns; gate g stands in column ``g // rows``, and pin ``inputs + g`` is its value.

    Args:
        inputs: pins 0 to inputs - 1.
        outputs: how many pins are looked at, >= 0.
        rows: gates of a column, >= 1.
        cols: columns, >= 1.
        look_back: how many columns to the left a gate may look, and how many of the last the outputs; None: all.
        datasets: how many rows of inputs share the gates; multiplexers (functions 27 and 28) know which one it is.

    Raises:
        ValueError: a number is out of range.
    """

    inputs: int
    outputs: int
    rows: int
    cols: int
    look_back: int | None = None
    datasets: int = 1

    def __post_init__(self) -> None:
        small = {"inputs": 0, "outputs": 0, "rows": 1, "cols": 1, "datasets": 1}
        bad = [
            f"{name}={getattr(self, name)}" for name, least in small.items() if getattr(self, name) < least
        ]
        if self.inputs + self.gates > _MOST:
            bad.append(f"{self.inputs} inputs and {self.gates} gates")
        if bad or (self.look_back is not None and self.look_back < 1):
            raise ValueError(
                f"Grid({', '.join(bad) or f'look_back={self.look_back}'}): allowed are inputs and outputs >= 0, all "
                f"others >= 1, and at most {_MOST} pins."
            )

    @property
    def gates(self) -> int:
        """How many there are."""
        return self.rows * self.cols

    @property
    def reach(self) -> int:
        """Columns that can be looked back."""
        return self.cols if self.look_back is None else min(self.look_back, self.cols)

    @property
    def genes(self) -> int:
        """Length of a genome."""
        return GENES * self.gates + self.outputs

    def legal(self, column: int) -> tuple[int, int, int]:
        """The pins that a gate of a column may use; the outputs stand in column ``cols``.

        Args:
            column: 0 to cols.

        Returns:
            How many inputs (all or none), and the first and the last pin but one of gates.
        """
        first = max(0, column - self.reach)
        inputs = self.inputs if column - self.reach <= 0 else 0
        return inputs, self.inputs + first * self.rows, self.inputs + column * self.rows

    def legal_pins(self) -> Ints:
        """What ``legal`` says of all columns, int64 [cols + 1, 3]."""
        return np.array([self.legal(column) for column in range(self.cols + 1)], dtype=np.int64)


@dataclass(frozen=True)
class CircuitCost:
    """What a circuit costs; gates that no output needs cost nothing, and wires are no gates.

    Args:
        energy_pj: of all gates, each once.
        area_um2: likewise; NaN where an area is unknown.
        delay: longest path, relative to an addition.
        depth: gates on the path with the most of them.
        gate_count: gates.
    """

    energy_pj: float
    area_um2: float
    delay: float
    depth: int
    gate_count: int


@dataclass(frozen=True, eq=False)
class Circuit:
    """Gates and their connections.

    Args:
        genome: int32 [3 rows cols + outputs]: of every gate, column by column, the pins of a and b and the id of its
            function; then the pin of every output.
        grid: sizes.

    Raises:
        ValueError: a genome of another length, an unknown function, or a pin that is not allowed there; says where.

    Examples:
        >>> from lightning_compress.cgp.gates.circuit import Circuit, Grid
        >>> circuit = Circuit.from_text("{2,1,2,1,2,2,1}([2]0,1,1)([3]2,2,12)(3)")
        >>> circuit.evaluate([3, 4]).tolist(), circuit.cost().energy_pj
        ([14], 0.03)

    References:
        Miller and Thomson, "Cartesian genetic programming", EuroGP 2000.
    """

    genome: npt.NDArray[np.signedinteger[Any]]
    grid: Grid

    def __post_init__(self) -> None:
        given, grid = np.asarray(self.genome), self.grid
        if given.shape != (grid.genes,) or given.dtype.kind not in "iu":
            raise ValueError(
                f"a genome of shape {given.shape} and dtype {given.dtype}; {grid} needs ({grid.genes},) whole numbers."
            )
        genes = np.clip(given, -1, _MOST).astype(np.int32)  # too large numbers stay wrong ones
        genes.flags.writeable = False  # what follows from it is remembered
        object.__setattr__(self, "genome", genes)
        numbers = self.gates[:, 2]
        unknown = np.flatnonzero(~np.isin(numbers, list(FUNCTIONS)))
        if len(unknown):
            raise ValueError(
                f"gate {grid.inputs + unknown[0]} has function {numbers[unknown[0]]}; allowed: "
                f"{', '.join(map(str, FUNCTIONS))}."
            )
        column, gate = np.arange(grid.gates) // grid.rows, grid.inputs + np.arange(grid.gates)
        for part, used in ((0, _USES_A), (1, _USES_B)):
            at, pins = np.isin(numbers, list(used)), self.gates[:, part]
            self._check(pins[at], column[at], "gate", gate[at])
            self._check(pins[~at], None, "gate", gate[~at])
        self._check(self.outputs, np.full(grid.outputs, grid.cols), "output", np.arange(grid.outputs))

    def _check(self, pins: npt.NDArray[Any], column: npt.NDArray[Any] | None, what: str, which: Ints) -> None:
        """Pins that are read must be legal in their columns; others (without columns) must exist."""
        if column is None:
            inputs = first = np.zeros(len(pins), dtype=np.int64)
            end = first + self.grid.inputs + self.grid.gates
        else:
            inputs, first, end = self.grid.legal_pins()[column].T
        bad = np.flatnonzero(~(((pins >= 0) & (pins < inputs)) | ((first <= pins) & (pins < end))))
        if len(bad):
            i = bad[0]
            named = [
                f"{low} to {high - 1}" for low, high in ((0, inputs[i]), (first[i], end[i])) if low < high
            ]
            raise ValueError(
                f"{what} {which[i]} uses pin {pins[i]}; allowed there: {' and '.join(named) or 'none'}."
            )

    def check_all(self) -> None:
        """ValueError if an operand that nothing reads is none that its gate may read: mutations put such to use."""
        column, gate = (
            np.arange(self.grid.gates) // self.grid.rows,
            self.grid.inputs + np.arange(self.grid.gates),
        )
        for part in (0, 1):
            self._check(self.gates[:, part], column, "gate", gate)

    @property
    def gates(self) -> npt.NDArray[np.int32]:
        """[gates, 3]: pin of a, pin of b, function."""
        return self.genome[: GENES * self.grid.gates].reshape(-1, GENES)

    @property
    def outputs(self) -> npt.NDArray[np.int32]:
        """Pins."""
        return self.genome[GENES * self.grid.gates :]

    def operands(self, gate: int) -> list[int]:
        """The pins that a gate really uses."""
        a, b, number = (int(v) for v in self.gates[gate])
        function = FUNCTIONS[number]
        return [pin for pin, used in ((a, function.uses_a), (b, function.uses_b)) if used]

    def active(self) -> npt.NDArray[np.bool_]:
        """Which gates some output needs: reached backwards from the outputs through operands that are used.

        Returns:
            Bool [gates].
        """
        found = np.zeros(self.grid.gates, dtype=np.bool_)
        found[[pin - self.grid.inputs for pin, *_ in self._taking_part]] = True
        return found

    @cached_property
    def _taking_part(self) -> list[tuple[int, int, int, int]]:
        """Of every gate that some output needs, in order: its pin, a, b, and its function."""
        inputs, gates = self.grid.inputs, self.gates.tolist()
        needed = [False] * len(gates)
        for pin in self.outputs.tolist():
            if pin >= inputs:
                needed[pin - inputs] = True
        found = []
        for gate in range(len(gates) - 1, -1, -1):
            if needed[gate]:
                a, b, number = gates[gate]
                if a >= inputs and number in _USES_A:
                    needed[a - inputs] = True
                if b >= inputs and number in _USES_B:
                    needed[b - inputs] = True
                found.append((inputs + gate, a, b, number))
        return found[::-1]

    def evaluate(self, x: npt.ArrayLike) -> Int8:
        """The outputs; one gate after the other, to compare faster ways with.

        Args:
            x: int8 [..., inputs]; with several data sets [..., datasets, inputs].

        Returns:
            int8 [..., outputs]; with several data sets [..., datasets, outputs].

        Raises:
            ValueError: another number of inputs, or values outside int8.
        """
        given, sets = np.asarray(x), self.grid.datasets
        shape = (self.grid.inputs,) if sets == 1 else (sets, self.grid.inputs)
        if given.shape[-len(shape) :] != shape or (
            given.size and (given.dtype.kind not in "iu" or not -128 <= given.min() <= given.max() <= 127)
        ):
            raise ValueError(
                f"inputs of shape {given.shape} and dtype {given.dtype}; needed are whole numbers from -128 to 127 of "
                f"shape [..., {', '.join(map(str, shape))}]."
            )
        if sets == 1:
            return self._evaluate(given, 0)
        return np.stack([self._evaluate(given[..., d, :], d % 2) for d in range(sets)], axis=-2)

    def _evaluate(self, given: npt.NDArray[Any], s: int) -> Int8:
        if given.ndim == 1:  # plain numbers are faster than small arrays
            return self._numbers(given.tolist(), s)
        pins = np.zeros((*given.shape[:-1], self.grid.inputs + self.grid.gates), dtype=np.int8)
        pins[..., : self.grid.inputs] = given
        for pin, a, b, number in self._taking_part:
            pins[..., pin] = apply(number, pins[..., a], pins[..., b], s)
        return pins[..., self.outputs]

    def _numbers(self, given: list[int], s: int) -> Int8:
        pins = given + [0] * self.grid.gates
        for pin, a, b, number in self._taking_part:
            pins[pin] = (CALLS[number](pins[a], pins[b], s) + 128 & 255) - 128
        return np.array([pins[p] for p in self.outputs.tolist()], dtype=np.int8)

    def cost(self, table: EnergyTable | None = None) -> CircuitCost:
        """Energy, area, delay, depth and number of the gates that take part.

        Args:
            table: costs of the functions; None takes the default ones.

        Returns:
            The costs.
        """
        table = table or EnergyTable.default()
        delay: dict[int, float] = {}
        depth: dict[int, int] = {}
        used = []
        for pin, number, before in self.lines():
            used.append((table[number], number != WIRE))
            delay[pin] = max((delay.get(p, 0.0) for p in before), default=0.0) + table[number].delay
            depth[pin] = max((depth.get(p, 0) for p in before), default=0) + (number != WIRE)
        ends = self.outputs.tolist()
        return CircuitCost(
            energy_pj=math.fsum(operation.energy_pj for operation, _ in used),
            area_um2=math.fsum(operation.area_um2 for operation, counts in used if counts),
            delay=max((delay.get(p, 0.0) for p in ends), default=0.0),
            depth=max((depth.get(p, 0) for p in ends), default=0),
            gate_count=sum(counts for _, counts in used),
        )

    def to_text(self) -> str:
        """One line: ``{inputs,outputs,cols,rows,2,look_back,datasets}([pin]a,b,function)...(output,...)``."""
        grid = self.grid
        head = grid.inputs, grid.outputs, grid.cols, grid.rows, 2, grid.reach, grid.datasets
        gates = (
            f"([{grid.inputs + g}]{a},{b},{number})" for g, (a, b, number) in enumerate(self.gates.tolist())
        )
        return f"{{{','.join(map(str, head))}}}{''.join(gates)}({','.join(map(str, self.outputs.tolist()))})"

    @classmethod
    def from_text(cls, text: str) -> Circuit:
        """Inverse of ``to_text``.

        Args:
            text: one line.

        Returns:
            The circuit.

        Raises:
            ValueError: the text is malformed (names the position), or the genome is not allowed.
        """
        head, at = _numbers(
            text, 0, r"\{([^{}]*)\}", "the sizes, {inputs,outputs,cols,rows,2,look_back,datasets}"
        )
        if len(head) != 7 or head[4] != 2:
            raise ValueError(f"sizes {head} at position 0; needed are 7, the fifth of them 2 (operands).")
        grid = Grid(head[0], head[1], head[3], head[2], head[5], head[6])
        genes: list[int] = []
        for gate in range(grid.gates):
            start = at
            values, at = _numbers(text, at, r"\(\[(\d+\][^()]*)\)", f"gate {grid.inputs + gate}")
            if len(values) != 1 + GENES or values[0] != grid.inputs + gate:
                raise ValueError(
                    f"position {start}: needed is ([{grid.inputs + gate}]a,b,function), given {text[start:at]!r}."
                )
            genes += values[1:]
        start = at
        pins, at = _numbers(text, at, r"\(([^()\[\]]*)\)", f"the {grid.outputs} outputs")
        if len(pins) != grid.outputs or text[at:].strip():
            raise ValueError(
                f"position {start}: {len(pins)} outputs and {text[at:]!r:.40}; needed are {grid.outputs}."
            )
        return cls(np.array([*genes, *pins], dtype=np.int64), grid)

    def compact(self) -> Circuit:
        """The same circuit with the gates that take part only.

        Returns:
            A circuit of one row without limits to looking back; operands that a function does not use are pin 0. Where
            no gate takes part, it has one that nobody reads.
        """
        inputs = self.grid.inputs
        place: dict[int, int] = {}
        genes: list[int] = []
        for pin, number, _ in self.lines():
            function, (a, b) = FUNCTIONS[number], self.gates[pin - inputs, :2].tolist()
            genes += [
                place.get(a, a) if function.uses_a else 0,
                place.get(b, b) if function.uses_b else 0,
                number,
            ]
            place[pin] = inputs + len(place)
        genes = genes or [0, 0, WIRE if inputs else 24]
        outputs = [place.get(p, p) for p in self.outputs.tolist()]
        grid = Grid(inputs, len(outputs), 1, len(genes) // GENES, None, self.grid.datasets)
        return Circuit(np.array([*genes, *outputs], dtype=np.int64), grid)

    def lines(self) -> Iterator[tuple[int, int, list[int]]]:
        """The gates that take part, in order: pin, function, pins of its operands."""
        for pin, a, b, number in self._taking_part:
            operands = ((a, number in _USES_A), (b, number in _USES_B))
            yield pin, number, [operand for operand, used in operands if used]


def _numbers(text: str, at: int, pattern: str, what: str) -> tuple[list[int], int]:
    """Whole numbers in brackets at a position, and the position behind them."""
    found = re.compile(pattern).match(text, at)
    if found is None:
        raise ValueError(f"position {at}: needed is {what}, given {text[at : at + 24]!r}.")
    parts = re.split(r"\]|,", found[1]) if found[1] else []
    if not all(re.fullmatch(r"\s*-?[0-9]{1,10}\s*", part) for part in parts):
        raise ValueError(
            f"position {at}: {found[0]!r:.60} holds something that is no whole number of at most 10 digits."
        )
    return [int(part) for part in parts], found.end()


def pretty(cost: CircuitCost) -> str:
    """A cost in words, for comments in exported code."""
    area = "" if math.isnan(cost.area_um2) else f", {cost.area_um2:g} um2"
    return f"{cost.gate_count} gates, {cost.energy_pj:g} pJ{area}, delay {cost.delay:g} additions, depth {cost.depth}"
