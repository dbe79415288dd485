"""The gates of a circuit in the order in which they take the fewest bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_compress.cgp.gates.circuit import GENES, Circuit
from lightning_compress.cgp.gates.functions import FUNCTIONS, SELECTING, WIRE

_ZERO = 24  # the function that is 0


class Gate(NamedTuple):
    """One gate.

    Args:
        function: its id.
        operands: the pins that it reads, in order; never those of wires.
    """

    function: int
    operands: tuple[int, ...]


def alone(circuit: Circuit, dataset: int) -> Circuit:
    """What a circuit is to one of its data sets: multiplexers are wires then.

    Args:
        circuit: of any number of data sets.
        dataset: which.

    Returns:
        A circuit of one data set on the same grid, with the same outputs.

    Examples:
        >>> from lightning_compress.cgp import Circuit
        >>> from lightning_compress.cgp.layers.ordering import alone
        >>> circuit = Circuit.from_text("{2,1,1,1,2,1,2}([2]0,1,27)(2)")
        >>> [alone(circuit, d).evaluate([3, 4]).tolist() for d in (0, 1)]
        [[3], [4]]
    """
    genome = circuit.genome.copy()
    gates = genome[: GENES * circuit.grid.gates].reshape(-1, GENES)
    either, first = (
        gates[:, 2] == number for number in SELECTING
    )  # b or a, and 0 or a, in odd data sets or others
    if dataset % 2:
        gates[either, 0] = gates[either, 1]
    gates[first, 2] = _ZERO if dataset % 2 else WIRE
    gates[either, 2] = WIRE
    return Circuit(genome, replace(circuit.grid, datasets=1))


def uses(function: int) -> tuple[bool, bool]:
    """Which operands of a function matter."""
    return FUNCTIONS[function].uses_a, FUNCTIONS[function].uses_b


def origin(circuit: Circuit, pin: int, first: Sequence[int]) -> int:
    """The pin at the other end of wires.

    Args:
        circuit: any.
        pin: of it.
        first: of every input, the one that is read in its place.

    Returns:
        An input, or the pin of a gate that is no wire.
    """
    while pin >= circuit.grid.inputs and circuit.gates[pin - circuit.grid.inputs, 2] == WIRE:
        pin = int(circuit.gates[pin - circuit.grid.inputs, 0])
    return first[pin] if pin < circuit.grid.inputs else pin


def needed(circuit: Circuit, wanted: Iterable[int], first: Sequence[int]) -> dict[int, Gate]:
    """The gates that some pins need.

    Args:
        circuit: any.
        wanted: pins, none of them of a wire.
        first: of every input, the one that is read in its place.

    Returns:
        Pin -> gate, by rising pin.

    Examples:
        >>> from lightning_compress.cgp import Circuit
        >>> from lightning_compress.cgp.layers.ordering import needed
        >>> circuit = Circuit.from_text("{1,1,3,1,2,3,1}([1]0,0,7)([2]1,0,100)([3]2,0,1)(3)")
        >>> needed(circuit, [3], first=[0])
        {1: Gate(function=7, operands=(0,)), 3: Gate(function=1, operands=(1, 0))}
    """
    inputs, stack = circuit.grid.inputs, list(wanted)
    found: dict[int, Gate] = {}
    while stack:
        pin = stack.pop()
        if pin >= inputs and pin not in found:
            read = tuple(origin(circuit, p, first) for p in circuit.operands(pin - inputs))
            found[pin] = Gate(int(circuit.gates[pin - inputs, 2]), read)
            stack += read
    return dict(sorted(found.items()))


def in_runs(gates: Mapping[int, Gate]) -> list[int]:
    """An order in which operands come first and one function stands many times in a row: both repeat, and pack well.

    Of the functions of all gates whose operands are there, the one with the most such gates comes next. What becomes
    ready queues at the end, so that the operand of a gate is about as far away as that of the gate before.

    Args:
        gates: what ``needed`` returned.

    Returns:
        Their pins.

    Examples:
        >>> from lightning_compress.cgp.layers.ordering import Gate, in_runs
        >>> in_runs({1: Gate(7, (0,)), 2: Gate(5, (0,)), 3: Gate(7, (1,)), 4: Gate(5, (3,))})
        [1, 3, 2, 4]
    """
    waits = {pin: {p for p in gate.operands if p in gates} for pin, gate in gates.items()}
    readers: dict[int, list[int]] = {}
    ready: dict[int, list[int]] = {}
    for pin, gate in gates.items():
        for p in waits[pin]:
            readers.setdefault(p, []).append(pin)
        if not waits[pin]:
            ready.setdefault(gate.function, []).append(pin)
    order: list[int] = []
    while ready:
        function = max(ready, key=lambda f: len(ready[f]))
        for pin in ready[function]:  # it grows
            order.append(pin)
            for reader in readers.get(pin, ()):
                waits[reader].discard(pin)
                if not waits[reader]:
                    ready.setdefault(gates[reader].function, []).append(reader)
        del ready[function]
    return order
