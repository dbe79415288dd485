"""Whether a circuit pays: the energy of reading weights from memory against that of computing them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lightning_compress.cgp.gates.circuit import CircuitCost
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.energy import EnergyTable

MEMORIES = ("sram", "dram")
WIRINGS = ("unrolled", "indexed")
Range = tuple[float, float]
_MULTIPLEXER = 27  # of two bytes
_CAVEAT = (
    "A hardware synthesizer ties off constants for nothing, too: the comparison is about memory traffic,\n"
    "and it is simulated."
)


@dataclass(frozen=True)
class BreakEven:
    """Energies of one inference, in pJ; pairs are a lower and an upper bound.

    Args:
        weights: that are not read one by one: gates give them, or they take the value of an input.
        wired: those of them that take the value of an input.
        loaded: inputs that are read from memory.
        already_loaded: those of them that are read for a layer of their own anyhow.
        reads: how often each weight and input is read.
        wiring: "unrolled" or "indexed".
        memory: "sram" or "dram".
        memory_pj_per_byte: price of reading there.
        prices: pJ per byte of SRAM and DRAM.
        saved_pj: reading the weights.
        circuit_pj: all gates, once for every data set.
        inputs_pj: reading all loaded inputs.
        index_pj: reading which value each weight takes.
        choice_pj: multiplexers that choose it.
        coded_saved_pj: reading the weights entropy-coded; None: unknown.
    """

    weights: int
    wired: int
    loaded: int
    already_loaded: int
    reads: int
    wiring: str
    memory: str
    memory_pj_per_byte: float
    prices: Range
    saved_pj: float
    circuit_pj: float
    inputs_pj: float
    index_pj: float
    choice_pj: Range
    coded_saved_pj: float | None = None

    @property
    def selection_pj(self) -> Range:
        """Reading indices and choosing values."""
        return self.index_pj + self.choice_pj[0], self.index_pj + self.choice_pj[1]

    @property
    def paid_pj(self) -> Range:
        """Circuit, inputs and selection."""
        return self._paid(self.inputs_pj)

    @property
    def shared_paid_pj(self) -> Range:
        """The same without those inputs that are read anyhow."""
        share = 1 - self.already_loaded / self.loaded if self.loaded else 1.0
        return self._paid(self.inputs_pj * share)

    @property
    def net_pj(self) -> Range:
        """Saved less paid; below zero the circuit loses."""
        return _less(self.saved_pj, self.paid_pj)

    @property
    def shared_net_pj(self) -> Range:
        """The same where inputs that are read anyhow cost nothing."""
        return _less(self.saved_pj, self.shared_paid_pj)

    @property
    def coded_net_pj(self) -> Range | None:
        """Like ``net_pj``, compared with reading weights entropy-coded; what decoding costs is left out."""
        return None if self.coded_saved_pj is None else _less(self.coded_saved_pj, self.paid_pj)

    @property
    def pj_per_byte(self) -> Range:
        """Paid for each weight and read: below the price of the memory, the circuit pays."""
        return _each(self.paid_pj, self.weights * self.reads)

    @property
    def coded_pj_per_byte(self) -> Range | None:
        """Paid for each byte that would be read entropy-coded."""
        if self.coded_saved_pj is None:
            return None
        return _each(self.paid_pj, self.coded_saved_pj / self.memory_pj_per_byte)

    @property
    def pays_from_pj_per_byte(self) -> Range:
        """The price of memory from which on the circuit pays, with inputs and indices at that price; inf: at none."""
        bytes_left = (self.saved_pj - self.inputs_pj - self.index_pj) / self.memory_pj_per_byte
        low, high = self.circuit_pj + self.choice_pj[0], self.circuit_pj + self.choice_pj[1]
        return _each((low, high), bytes_left)

    def _paid(self, inputs_pj: float) -> Range:
        fixed = self.circuit_pj + inputs_pj
        return fixed + self.selection_pj[0], fixed + self.selection_pj[1]

    def __str__(self) -> str:
        sram, dram = self.prices
        times = "once" if self.reads == 1 else f"{self.reads:,} times"
        beside = f"   ({self.memory} {self.memory_pj_per_byte:g}; SRAM {sram:g}, DRAM {dram:g})"
        rows: list[tuple[str, str]] = [
            (f"saved: weights not read one by one, {self.weights:,}", _number(self.saved_pj)),
            ("paid: circuit", _number(self.circuit_pj)),
            (f"paid: inputs read, {self.loaded:,}", _number(self.inputs_pj)),
            (f"paid: selection, {self.wiring} wiring", _span(self.selection_pj)),
            ("net", _span(self.net_pj)),
        ]
        if self.already_loaded:
            rows.append((f"net, with {self.already_loaded:,} inputs read anyhow", _span(self.shared_net_pj)))
        if self.coded_saved_pj is not None and self.coded_net_pj and self.coded_pj_per_byte:
            rows.append(("saved, if weights were read entropy-coded", _number(self.coded_saved_pj)))
            rows.append(("net, if weights were read entropy-coded", _span(self.coded_net_pj)))
        rows.append(("paid per weight", _span(self.pj_per_byte) + beside))
        if self.coded_pj_per_byte:
            rows.append(("paid per entropy-coded byte", _span(self.coded_pj_per_byte) + beside))
        rows.append(("pays from a memory price per byte of", _span(self.pays_from_pj_per_byte)))
        width = max(len(label) for label, _ in rows)
        head = f"pJ per inference, each weight read {times}; weights that take the value of an input: {self.wired:,}"
        return "\n".join([head, *(f"  {label:<{width}}  {value}" for label, value in rows), _CAVEAT])


def break_even(
    problem: Problem,
    cost: CircuitCost,
    *,
    reads: int = 1,
    wiring: str = "unrolled",
    memory: str = "sram",
    table: EnergyTable | None = None,
    coded_bytes: int | None = None,
    already_loaded: int = 0,
) -> BreakEven:
    """Energy that computing weights saves, and what it costs instead.

    ``net = N r e - (circuit + n r e + selection)`` with N weights, n inputs that are loaded, r reads, and e pJ for
    reading a byte. In an unrolled array a wire leads to each weight, and selection is free. With one weight in a cycle,
    its index is read, ``ceil(log2 V)`` bits for V values, and ``log2 V`` to ``V - 1`` multiplexers of two bytes choose
    the value. Inputs are always paid for: a weight that is itself an input gains nothing.

    Args:
        problem: what the circuit is for.
        cost: of the circuit.
        reads: how often each weight is read in an inference, >= 1; inputs are, too.
        wiring: "unrolled" or "indexed".
        memory: "sram" or "dram".
        table: costs; None takes the default ones.
        coded_bytes: bytes of all weights of the problem, entropy-coded, such as those of the layer in an archive.
        already_loaded: inputs that are read for a layer of their own anyhow, 0 to ``problem.loaded``.

    Returns:
        All terms; printing it shows a table.

    Raises:
        ValueError: an unknown wiring or memory, or a number out of its range.

    Examples:
        >>> from lightning_compress.cgp.balance import break_even
        >>> from lightning_compress.cgp.gates.circuit import CircuitCost
        >>> from lightning_compress.cgp.search.problem import Problem
        >>> problem = Problem.of([[3]], [[12, -116, 12, 12]])  # four bytes from one
        >>> circuit = CircuitCost(energy_pj=0.0005, area_um2=0.0, delay=0.05, depth=2, gate_count=2)
        >>> print(break_even(problem, circuit))
        pJ per inference, each weight read once; weights that take the value of an input: 0
          saved: weights not read one by one, 4  5
          paid: circuit                          0.0005
          paid: inputs read, 1                   1.25
          paid: selection, unrolled wiring       0
          net                                    3.7495
          paid per weight                        0.312625   (sram 1.25; SRAM 1.25, DRAM 160)
          pays from a memory price per byte of   0.000166667
        A hardware synthesizer ties off constants for nothing, too: the comparison is about memory traffic,
        and it is simulated.

    References:
        Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014; Chen et al., "Eyeriss", ISSCC
        2016.
    """
    for option, value, allowed in (("wiring", wiring, WIRINGS), ("memory", memory, MEMORIES)):
        if value not in allowed:
            raise ValueError(f"{option}={value!r} is unknown; allowed: {', '.join(allowed)}.")
    if (
        reads < 1
        or not 0 <= already_loaded <= problem.loaded
        or (coded_bytes is not None and coded_bytes < 0)
    ):
        raise ValueError(
            f"reads={reads}, already_loaded={already_loaded}, coded_bytes={coded_bytes}: allowed are reads >= 1, "
            f"0 <= already_loaded <= {problem.loaded} (the inputs that are loaded) and coded_bytes >= 0."
        )
    table = table or EnergyTable.default()
    prices = table.sram_pj_per_byte, table.dram_pj_per_byte
    price = prices[MEMORIES.index(memory)]
    read = reads * price
    bits, fewest, most = _selection(problem) if wiring == "indexed" else (0, 0.0, 0)
    multiplexer = reads * table[_MULTIPLEXER].energy_pj
    coded = None
    if coded_bytes is not None:
        coded = coded_bytes * read
    return BreakEven(
        weights=problem.weights,
        wired=problem.weights - problem.computed,
        loaded=problem.loaded,
        already_loaded=already_loaded,
        reads=reads,
        wiring=wiring,
        memory=memory,
        memory_pj_per_byte=price,
        prices=prices,
        saved_pj=problem.weights * read,
        circuit_pj=cost.energy_pj * problem.datasets,
        inputs_pj=problem.loaded * read,
        index_pj=bits / 8 * read,
        choice_pj=(fewest * multiplexer, most * multiplexer),
        coded_saved_pj=coded,
    )


def _selection(problem: Problem) -> tuple[int, float, int]:
    """Bits of the indices of all weights, and how many multiplexers choose their values at least and most."""
    bits, fewest, most = 0, 0.0, 0
    for row in problem.decode(problem.targets):
        values = len(np.unique(row))
        if values:
            bits += len(row) * (values - 1).bit_length()
            fewest += len(row) * math.log2(values)
            most += len(row) * (values - 1)
    return bits, fewest, most


def _less(saved: float, paid: Range) -> Range:
    return saved - paid[1], saved - paid[0]


def _each(pj: Range, count: float) -> Range:
    return (pj[0] / count, pj[1] / count) if count > 0 else (math.inf, math.inf)


def _number(value: float) -> str:
    return f"{value:,.6g}"


def _span(values: Range) -> str:
    low, high = (_number(value) for value in values)
    return low if low == high else f"{low} to {high}"
