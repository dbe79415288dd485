"""How an evolved weight is stored: a circuit, its inputs, and which of its values every weight takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_compress.cgp.gates.circuit import GENES, Circuit, CircuitCost, Grid
from lightning_compress.cgp.gates.functions import FUNCTIONS, WIRE, Int8
from lightning_compress.cgp.layers.integers import tensors_of, widened
from lightning_compress.cgp.layers.ordering import in_runs, needed, origin, uses
from lightning_compress.cgp.search.problem import Ints, Problem
from lightning_compress.codes import Code
from lightning_compress.energy import EnergyTable
from lightning_compress.functional.bit_errors import Word

_DISTANCES = (torch.uint8, torch.int16, torch.int32)
_MOST = 1 << 16  # gates: they are evaluated one after the other when a file is read


@dataclass(frozen=True, eq=False)
class CircuitCode(Code):
    """Integers that a circuit computes: weight i is ``s v[k_i]``, v the values of the pins that weights take.

    The integers themselves are not there: the circuit is evaluated when a weight is rebuilt. The index k follows from
    the weight, as no two of these values are equal.

    Args:
        base: what makes weights of integers: their scales.
        inputs: bool [256], which of -128 to 127 the circuit computes from; they are its pins in this order.
        functions: uint8 [gates], their ids; wires are none; at most 65,536.
        a: how many pins before its own every gate finds its first operand, of those that have one: uint8, int16 or
            int32.
        b: likewise the second.
        taken: bool [inputs + gates]: pins that weights take, 1 to 256.
        loaded: how many inputs are read from memory; the others are constants.

    Raises:
        ValueError: arrays that are no circuit, or values that are not all different; says where.

    Examples:
        >>> from lightning_compress.cgp import Circuit
        >>> from lightning_compress.cgp.layers.codes import CircuitCode
        >>> from lightning_compress.cgp.layers.integers import read_int8
        >>> _, base = read_int8(compress(nn.Sequential(nn.Linear(2, 2)), [Quantize(8)]).model[0], "weight")
        >>> circuit = Circuit.from_text("{1,2,1,2,2,1,1}([1]0,0,7)([2]0,0,6)(1,2)")
        >>> halves = np.array([63, 31, 127, 127], dtype=np.int8).reshape(2, 2)
        >>> code = CircuitCode.of(base, circuit, np.array([127], dtype=np.int8), halves, loaded=1)
        >>> code.values.tolist(), code.cost().gate_count
        ([31, 63, 127], 2)

    Source: Miller and Thomson 2000, Cartesian Genetic Programming.
    """

    base: Code
    inputs: Tensor
    functions: Tensor
    a: Tensor
    b: Tensor
    taken: Tensor
    loaded: int
    kind: ClassVar[str] = "circuit"
    stage: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        wanted = {"functions": (torch.uint8,), "a": _DISTANCES, "b": _DISTANCES}
        for name, kinds in {"inputs": (torch.bool,), "taken": (torch.bool,), **wanted}.items():
            array = getattr(self, name)
            if not isinstance(array, Tensor) or array.dtype not in kinds or array.dim() != 1:
                what = f"{array.dtype} {tuple(array.shape)}" if isinstance(array, Tensor) else repr(array)
                raise ValueError(f"{name} is {what:.60}; allowed: {', '.join(map(str, kinds))} of one axis.")
        count = int(self.inputs.sum())
        if len(self.inputs) != 256 or not count or len(self.taken) != count + len(self.functions):
            raise ValueError(
                f"{count} inputs of {len(self.inputs)} values, {len(self.functions)} gates and {len(self.taken)} pins "
                "that may be taken: needed are an input, 256 values, and as many pins as inputs and gates."
            )
        if len(self.functions) > _MOST:
            raise ValueError(f"{len(self.functions)} gates; allowed are {_MOST}.")
        unknown = set(self.functions.tolist()) - set(FUNCTIONS)
        if unknown:
            raise ValueError(f"unknown function {min(unknown)}; allowed: {', '.join(map(str, FUNCTIONS))}.")
        if type(self.loaded) is not int or not 0 <= self.loaded <= count:
            raise ValueError(f"loaded={self.loaded!r}: allowed is 0 to {count}, the inputs.")
        if not (hasattr(self.base, "qmin") and self.base.stage == "grid"):
            raise ValueError(f"{self.base.kind!r} is no code of integers.")
        values = self.values
        if not len(values) or len(np.unique(values)) != len(values):
            raise ValueError(
                f"the {len(values)} pins that weights take have {len(np.unique(values))} different values: needed is "
                "one value for each, and at least one."
            )

    @classmethod
    def of(cls, base: Code, circuit: Circuit, inputs: Int8, weights: Int8, loaded: int) -> CircuitCode:
        """The code of weights that a circuit and its inputs give.

        A value that is among the inputs is taken from there, another from the first output that has it. Gates that no
        weight needs, wires, inputs that nothing reads and all but one of equal inputs are left out, so this never takes
        more energy than the circuit.

        Args:
            base: what makes weights of integers.
            circuit: of one data set.
            inputs: int8 [inputs].
            weights: int8, all weights of the layer; each is an input or an output of the circuit.
            loaded: how many inputs are read from memory.

        Returns:
            The code.

        Raises:
            ValueError: a weight is neither an input nor an output.
        """
        pins: dict[int, int] = {}  # value -> the first pin
        for pin, value in enumerate(inputs.tolist()):
            pins.setdefault(value, pin)
        first = [pins[value] for value in inputs.tolist()]
        for pin, value in sorted(
            zip(circuit.outputs.tolist(), circuit.evaluate(inputs).tolist(), strict=True)
        ):
            pins.setdefault(value, pin)
        missing = [value for value in np.unique(weights).tolist() if value not in pins]
        if missing:
            raise ValueError(
                f"a weight is {missing[0]}, which is neither among the inputs nor among the outputs of the circuit."
            )
        wanted = {origin(circuit, pins[value], first) for value in np.unique(weights).tolist()}
        gates = needed(circuit, wanted, first)
        order = in_runs(gates)
        read = wanted.union(*(gate.operands for gate in gates.values())) - gates.keys()
        kept = sorted(read, key=lambda pin: int(inputs[pin]))
        used, kept = len(kept), kept or first[:1]
        place = {pin: i for i, pin in enumerate([*kept, *order])}
        far: tuple[list[int], list[int]] = ([], [])
        for pin in order:
            for which, operand in zip(
                np.flatnonzero(uses(gates[pin].function)), gates[pin].operands, strict=True
            ):
                far[which].append(place[pin] - place[operand])
        given, taken = torch.zeros(256, dtype=torch.bool), torch.zeros(len(place), dtype=torch.bool)
        given[inputs[kept].astype(np.int64) + 128] = True
        taken[[place[pin] for pin in wanted]] = True
        return cls(
            widened(base, weights),
            given,
            torch.tensor([gates[pin].function for pin in order], dtype=torch.uint8),
            _small(far[0]),
            _small(far[1]),
            taken,
            min(loaded, used),
        )

    # -- the circuit -------------------------------------------------------------------------------------------

    @cached_property
    def given(self) -> Int8:
        """What the circuit computes from: int8, ascending."""
        return (np.flatnonzero(self.inputs.numpy()) - 128).astype(np.int8)

    @cached_property
    def circuit(self) -> Circuit:
        """The gates, in one row; its outputs are the values that weights take, by rising pin."""
        count, gates = len(self.given), len(self.functions)
        genes = np.zeros((max(gates, 1), GENES), dtype=np.int64)
        genes[:, 2] = WIRE
        genes[:gates, 2] = self.functions.numpy()
        has = np.array([uses(n) for n in self.functions.tolist()], dtype=np.bool_).reshape(-1, 2)
        for which, distances in enumerate((self.a, self.b)):
            there = np.flatnonzero(has[:, which])
            if len(distances) != len(there):
                raise ValueError(f"{len(distances)} operands {'ab'[which]} for {len(there)} gates with one.")
            genes[there, which] = count + there - distances.numpy().astype(np.int64)
        outputs = np.flatnonzero(self.taken.numpy())
        grid = Grid(count, len(outputs), 1, len(genes))
        return Circuit(np.concatenate([genes.reshape(-1), outputs]).astype(np.int32), grid)

    @cached_property
    def values(self) -> Int8:
        """What the pins that weights take give: int8, ascending, one for each index."""
        return np.sort(self.circuit.evaluate(self.given))

    def cost(self, table: EnergyTable | None = None) -> CircuitCost:
        """Energy, delay and gates of the circuit; inputs that are read from memory are not in it.

        Args:
            table: costs of the functions; None takes the default ones.

        Returns:
            The costs.
        """
        return self.circuit.cost(table)

    def problem(self, weight: Tensor) -> Problem:
        """What the circuit is for, as ``break_even`` takes it.

        Args:
            weight: the layer's weight.

        Returns:
            A problem whose inputs are those that something reads; ``circuit`` has as many more outputs as there are
            values that are inputs.
        """
        pins = self.circuit.outputs[np.argsort(self.circuit.evaluate(self.given))].astype(np.int64)
        made = pins >= len(self.given)
        wires = np.where(made, len(self.given) + np.cumsum(made) - 1, pins)
        codes = self.arrays(weight)["codes"].numpy().reshape(-1)
        uses = np.bincount(codes, minlength=len(pins)).astype(np.int64)
        taken: Ints = wires[codes]
        return Problem(self.given[None], self.values[made][None], uses[made][None], (taken,), self.loaded)

    # -- the weight --------------------------------------------------------------------------------------------

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Which value every weight takes, the circuit, and what belongs to the integers."""
        integers = self.base.arrays(weight)["codes"].numpy().astype(np.int64) + 128
        place = np.full(256, -1, dtype=np.int64)
        place[self.values.astype(np.int64) + 128] = np.arange(len(self.values))
        codes = place[integers]
        if bool((codes < 0).any()):
            wrong = int(integers[codes < 0][0]) - 128
            raise ValueError(f"a weight is {wrong}, which the circuit does not give.")
        own = {name: getattr(self, name) for name in ("inputs", "functions", "a", "b", "taken")}
        return {"codes": torch.from_numpy(codes.astype(np.uint8)), **own, **tensors_of(self.base)}

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``s v[k]``."""
        codes = arrays.get("codes")
        if codes is None or codes.dtype != torch.uint8:
            raise ValueError(f"indices are {None if codes is None else codes.dtype}; allowed is torch.uint8.")
        if codes.numel() and int(codes.max()) >= len(self.values):
            raise ValueError(f"an index is {int(codes.max())}; allowed are 0 to {len(self.values) - 1}.")
        integers = torch.from_numpy(self.values)[codes.to(torch.int64)]
        try:
            return self.base.rebuild({**tensors_of(self.base), "codes": integers}, dtype)
        except (IndexError, RuntimeError) as error:  # such as too few scales
            raise ValueError(f"integers of shape {tuple(codes.shape)} are no weight: {error!r}.") from None

    def matches(self, weight: Tensor) -> bool:
        """Whether the weight still is what the circuit gives, bit for bit."""
        try:
            return super().matches(weight)
        except ValueError:  # a value that the circuit does not give
            return False

    @property
    def word(self) -> Word:
        """An index."""
        return Word(self._width, count=len(self.values))

    @property
    def _width(self) -> int:
        return max((len(self.values) - 1).bit_length(), 1)

    def bits(self, weight: Tensor) -> int:
        """``N ceil(log2 V)`` for V values, the circuit and its inputs, and what belongs to the integers."""
        arrays = self.arrays(weight)
        indices = arrays.pop("codes").numel()
        return self._width * indices + sum(
            t.numel() * (1 if t.dtype == torch.bool else 8 * t.element_size()) for t in arrays.values()
        )

    def scaled(self, weight: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Code] | None:
        """Scales take the factors in, unless one is negative: the integers stay what the circuit gives."""
        made = None if bool((factor < 0).any()) else self.base.scaled(weight, factor, axis)
        if made is None:
            return None
        return made[0], CircuitCode(
            made[1], self.inputs, self.functions, self.a, self.b, self.taken, self.loaded
        )

    @property
    def arithmetic(self) -> Code:
        """That of the integers."""
        return self.base

    def config(self) -> dict[str, Any]:
        """The code of the integers by its kind and options, and how many inputs are loaded."""
        return {"base": self.base.kind, "options": self.base.config(), "loaded": self.loaded}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> CircuitCode:
        """The code that ``arrays`` and ``config`` came from.

        Args:
            arrays: what ``arrays`` returned; untrusted.
            config: what ``config`` returned; untrusted.

        Returns:
            An equal code.

        Raises:
            ValueError: something is missing, or they are no circuit.
        """
        try:
            kind = config["base"]
            base = Code.registry[kind].restore(arrays, config["options"])
            own = {name: arrays[name] for name in ("inputs", "functions", "a", "b", "taken")}
            return cls(base, **own, loaded=config["loaded"])
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            raise ValueError(f"the parts of a circuit code do not fit together: {error!r}.") from None


def _small(distances: Sequence[int]) -> Tensor:
    """In the smallest type."""
    most = max(distances, default=0)
    kind = next(kind for kind in _DISTANCES if most <= torch.iinfo(kind).max)
    return torch.tensor(distances, dtype=kind)
