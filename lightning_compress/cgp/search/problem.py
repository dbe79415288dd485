"""What a circuit is asked for: inputs, the values it has to give, and which weight takes which of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.gates.functions import Int8

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs, wanted outputs, and how the weights are read from both.

    Several data sets share one circuit: row d of the inputs asks for row d of the targets.

    Args:
        inputs: int8 [datasets, inputs].
        targets: int8 [datasets, outputs], what the circuit should give.
        counts: int64 [datasets, outputs], how many weights take that output; 0: it does not matter.
        wires: of every data set, int64 [weights]: the pin that each weight takes, an input below ``inputs.shape[1]``,
            else an output of the circuit.
        loaded: how many inputs are read from memory; the others are constants.

    Raises:
        ValueError: shapes that do not fit together.

    Examples:
        >>> from lightning_compress.cgp.search.problem import Problem
        >>> problem = Problem.of([[3, 4]], [[7, 3, 7]])
        >>> problem.targets.tolist(), problem.counts.tolist(), problem.wires[0].tolist()
        ([[7]], [[2]], [2, 0, 2])
    """

    inputs: Int8
    targets: Int8
    counts: Ints
    wires: tuple[Ints, ...]
    loaded: int

    def __post_init__(self) -> None:
        sets = len(self.inputs)
        if not (
            self.inputs.ndim == 2
            and self.inputs.shape[1] >= 1
            and self.targets.ndim == 2
            and self.targets.shape == self.counts.shape
            and len(self.targets) == len(self.wires) == sets >= 1
        ):
            raise ValueError(
                f"inputs {self.inputs.shape}, targets {self.targets.shape}, counts {self.counts.shape} and "
                f"{len(self.wires)} rows of wires do not fit together: needed are as many rows of each, at least one "
                "input, and a count for every target."
            )

    @classmethod
    def of(
        cls,
        inputs: Sequence[npt.ArrayLike],
        outputs: Sequence[npt.ArrayLike],
        *,
        multiplex: bool = True,
        loaded: int | None = None,
    ) -> Problem:
        """The problem of computing some weights from others.

        Args:
            inputs: of every data set, int8 values; short rows are filled with zeros.
            outputs: of every data set, the int8 weights.
            multiplex: one output for each different value that no input has, at most 256 for each data set; False: one
                output for each weight.
            loaded: inputs that are read from memory; None: all.

        Returns:
            The problem.

        Raises:
            ValueError: no values, different numbers of rows, or values outside int8.
        """
        given = [_int8(row, "inputs") for row in inputs]
        wanted = [_int8(row, "outputs") for row in outputs]
        if len(given) != len(wanted) or not given or not any(len(row) for row in wanted):
            raise ValueError(
                f"{len(given)} rows of inputs and {len(wanted)} of outputs with {sum(map(len, wanted))} values: needed "
                "is one of each for every data set, and a value."
            )
        width = max(1, *(len(row) for row in given))
        x = np.zeros((len(given), width), dtype=np.int8)
        for row, values in zip(x, given, strict=True):
            row[: len(values)] = values
        count = sum(map(len, given)) if loaded is None else loaded
        return cls._multiplexed(x, wanted, count) if multiplex else cls._direct(x, wanted, count)

    @classmethod
    def _direct(cls, x: Int8, wanted: Sequence[Int8], loaded: int) -> Problem:
        longest = max(map(len, wanted))
        targets = np.zeros((len(x), longest), dtype=np.int8)
        counts = np.zeros(targets.shape, dtype=np.int64)
        for d, row in enumerate(wanted):
            targets[d, : len(row)], counts[d, : len(row)] = row, 1
        wires = tuple(x.shape[1] + np.arange(len(row)) for row in wanted)
        return cls(x, targets, counts, wires, loaded)

    @classmethod
    def _multiplexed(cls, x: Int8, wanted: Sequence[Int8], loaded: int) -> Problem:
        """Wires: the first input with the value, or the output of the value."""
        sets, width = x.shape
        first = np.full((sets, 256), -1, dtype=np.int64)
        for d in range(sets):
            for pin in range(width - 1, -1, -1):
                first[d, int(x[d, pin]) + 128] = pin
        uses = np.stack([np.bincount(row.astype(np.int64) + 128, minlength=256) for row in wanted])
        missing = np.where(first < 0, uses, 0)
        kept = np.flatnonzero(missing.any(0))
        place = np.full(256, -1, dtype=np.int64)
        place[kept] = width + np.arange(len(kept))
        wires = []
        for d, row in enumerate(wanted):
            value = row.astype(np.int64) + 128
            wires.append(np.where(first[d, value] >= 0, first[d, value], place[value]))
        targets = np.broadcast_to((kept - 128).astype(np.int8), (sets, len(kept))).copy()
        return cls(x, targets, missing[:, kept], tuple(wires), loaded)

    @property
    def datasets(self) -> int:
        """Rows of inputs that share the circuit."""
        return len(self.inputs)

    @property
    def weights(self) -> int:
        """How many there are, of all data sets."""
        return sum(map(len, self.wires))

    @property
    def computed(self) -> int:
        """How many weights the circuit gives; the others are inputs."""
        return int(self.counts.sum())

    def decode(self, outputs: npt.ArrayLike) -> tuple[Int8, ...]:
        """The weights that some outputs give.

        Args:
            outputs: int8 [datasets, outputs].

        Returns:
            Of every data set, int8 [weights].
        """
        pins = np.concatenate([self.inputs, np.asarray(outputs, dtype=np.int8)], axis=1)
        return tuple(pins[d, wires] for d, wires in enumerate(self.wires))

    def outputs(self, circuit: Circuit) -> Int8:
        """What a circuit gives, also with one data set as int8 [datasets, outputs].

        Args:
            circuit: of as many inputs, outputs and data sets.

        Returns:
            The values.
        """
        x = self.inputs[0] if circuit.grid.datasets == 1 else self.inputs
        return circuit.evaluate(x).reshape(self.targets.shape)

    def rms(self, circuit: Circuit) -> float:
        """Root mean square error of all weights, those that take an input among them.

        Args:
            circuit: of as many inputs, outputs and data sets.

        Returns:
            The error in int8 steps.
        """
        rows = zip(self.decode(self.targets), self.decode(self.outputs(circuit)), strict=True)
        square = sum(int(((a.astype(np.int64) - b) ** 2).sum()) for a, b in rows)
        return math.sqrt(square / self.weights)


def _int8(values: npt.ArrayLike, what: str) -> Int8:
    array = np.asarray(values)
    if array.size and (array.dtype.kind not in "iu" or not -128 <= array.min() <= array.max() <= 127):
        raise ValueError(f"{what} of dtype {array.dtype}: needed are whole numbers from -128 to 127.")
    return array.reshape(-1).astype(np.int8)
