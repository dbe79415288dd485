"""What operations and memory accesses cost: energy in picojoule, area, delay; each with its source."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_COLUMNS = ("id", "name", "energy_pj", "area_um2", "delay")
_HOROWITZ = "Horowitz 2014, 45 nm"
_MEMORY = "Horowitz 2014, 45 nm, quoted from memory"
_ESTIMATE = "estimate in gate equivalents, with an 8-bit addition of 0.03 pJ"
_FREE = "wiring"
_GIVEN = "given"


@dataclass(frozen=True)
class Operation:
    """One function of int8 operands.

    Args:
        id: number in a genome.
        name: in words.
        energy_pj: picojoule, >= 0.
        delay: relative to an addition, >= 0.
        area_um2: square micrometres; NaN if unknown.
        source: where the numbers come from.
    """

    id: int
    name: str
    energy_pj: float
    delay: float
    area_um2: float = math.nan
    source: str = _GIVEN


def _standard() -> Iterator[Operation]:
    shifts = {6: "a >> 2", 7: "a >> 1", 12: "a << 1", 15: "a >> 3", 16: "a >> 4", 17: "a >> 5"}
    shifts |= {18: "a << 2", 19: "a << 3", 20: "a << 4", 21: "a << 5"}
    constants = {22: "1", 23: "-1", 24: "0", 25: "-128", 26: "127"}
    yield Operation(1, "a + b", 0.03, 1.0, source=_HOROWITZ)
    yield Operation(3, "a * b", 0.20, 2.0, source=_MEMORY)
    estimated = {
        **{0: ("127 - a", 0.004, 0.05), 2: ("a - b", 0.034, 1.1), 4: ("-a", 0.026, 0.85)},
        **{5: ("-128 + a", 0.0005, 0.05), 8: ("a and b", 0.008, 0.1), 9: ("a or b", 0.008, 0.1)},
        **{10: ("a xor b", 0.015, 0.12), 11: ("not a", 0.004, 0.05), 13: ("a + 1", 0.022, 0.8)},
        **{14: ("a - 1", 0.022, 0.8), 27: ("multiplexer", 0.014, 0.1), 28: ("demultiplexer", 0.014, 0.1)},
    }
    for number, (name, energy, delay) in estimated.items():
        yield Operation(number, name, energy, delay, source=_ESTIMATE)
    for number, name in {**shifts, **constants, 100: "a"}.items():
        yield Operation(number, name, 0.0, 0.0, source=_FREE)


@dataclass(frozen=True)
class EnergyTable:
    """Costs of all functions that a circuit may use, and of reading a byte.

    The addition and both memories are measured values that Horowitz and Han published; most others are estimates, and
    ``source`` says which. Energies of another process scale all of them, so compare ratios.

    Args:
        operations: by id.
        sram_pj_per_byte: 8 kB SRAM, 10 pJ for 64 bits.
        dram_pj_per_byte: 640 pJ for 32 bits.

    Raises:
        ValueError: a cost is negative, or an energy or delay is not finite.

    Examples:
        >>> from lightning_compress.energy import EnergyTable
        >>> table = EnergyTable.default()
        >>> table[1].energy_pj, table[12].energy_pj, table.dram_pj_per_byte / table.sram_pj_per_byte
        (0.03, 0.0, 128.0)

    References:
        Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014; Han et al., "EIE", ISCA 2016.
    """

    operations: Mapping[int, Operation] = field(default_factory=lambda: {o.id: o for o in _standard()})
    sram_pj_per_byte: float = 10 / 8
    dram_pj_per_byte: float = 640 / 4

    def __post_init__(self) -> None:
        for operation in self.operations.values():
            for name in ("energy_pj", "delay"):
                value = getattr(operation, name)
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(
                        f"{name} of operation {operation.id} ({operation.name}) is {value}: allowed are numbers >= 0."
                    )
            if operation.area_um2 < 0:
                raise ValueError(f"area_um2 of operation {operation.id} is {operation.area_um2}: below 0.")

    def __getitem__(self, number: int) -> Operation:
        return self.operations[number]

    @classmethod
    def default(cls) -> EnergyTable:
        """The table with published and estimated costs."""
        return cls()

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> EnergyTable:
        """Read costs that somebody measured or estimated for another process.

        Args:
            path: file with the columns id, name, energy_pj, area_um2 (may be empty) and delay.

        Returns:
            The table; memory costs are the default ones.

        Raises:
            ValueError: a column or an id is missing, or a value is no number; names line and id.
        """
        with Path(path).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} lacks the columns {', '.join(missing)}; needed: {', '.join(_COLUMNS)}."
                )
            found = {}
            for row in reader:
                try:
                    operation = Operation(
                        int(row["id"]),
                        row["name"],
                        float(row["energy_pj"]),
                        float(row["delay"]),
                        float(row["area_um2"] or "nan"),
                    )
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {reader.line_num}: {error}.") from None
                found[operation.id] = operation
        lacking = [f"{o.id} ({o.name})" for o in _standard() if o.id not in found]
        if lacking:
            raise ValueError(
                f"{path} lacks operations {', '.join(lacking)}: give every id, 0 where it costs nothing."
            )
        return cls(found)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the costs as ``from_csv`` reads them; sources and memory costs are left out.

        Args:
            path: file to write.
        """
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            for o in sorted(self.operations.values(), key=lambda operation: operation.id):
                area = "" if math.isnan(o.area_um2) else repr(o.area_um2)
                writer.writerow([o.id, o.name, repr(o.energy_pj), area, repr(o.delay)])
