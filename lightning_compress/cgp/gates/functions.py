"""What a gate can compute: functions of int8 numbers, which wrap around; shifts to the right keep the sign."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Int8 = npt.NDArray[np.int8]
WIRE = 100
SELECTING = (27, 28)
STANDARD = (*range(27), WIRE)  # all that need no data sets


class Function(NamedTuple):
    """One function.

    Args:
        formula: of a and b, in Python, before wrapping; s is the number of the data set modulo 2.
        verilog: the same of signed 8-bit wires; s is one bit.
    """

    formula: str
    verilog: str

    @property
    def uses_a(self) -> bool:
        """Whether the first operand matters."""
        return "a" in self.formula

    @property
    def uses_b(self) -> bool:
        """Whether the second operand matters."""
        return "b" in self.formula

    @property
    def selects(self) -> bool:
        """Whether the value depends on the data set."""
        return "s" in self.formula.replace("else", "")


def _shift(direction: str, places: int) -> Function:
    return Function(f"a {direction} {places}", f"a {'>>>' if direction == '>>' else '<<'} {places}")


def _same(formula: str, verilog: str = "") -> Function:
    return Function(formula, verilog or formula)


# id -> function; numbers in genomes never change.
FUNCTIONS: dict[int, Function] = {
    0: _same("127 - a", "8'sd127 - a"),
    1: _same("a + b"),
    2: _same("a - b"),
    3: _same("a * b"),
    4: _same("-a"),
    5: _same("-128 + a", "8'sh80 + a"),
    6: _shift(">>", 2),
    7: _shift(">>", 1),
    8: _same("a & b"),
    9: _same("a | b"),
    10: _same("a ^ b"),
    11: _same("~a"),
    12: _shift("<<", 1),
    13: _same("a + 1", "a + 8'sd1"),
    14: _same("a - 1", "a - 8'sd1"),
    15: _shift(">>", 3),
    16: _shift(">>", 4),
    17: _shift(">>", 5),
    18: _shift("<<", 2),
    19: _shift("<<", 3),
    20: _shift("<<", 4),
    21: _shift("<<", 5),
    22: _same("1", "8'sd1"),
    23: _same("-1", "8'shff"),
    24: _same("0", "8'sd0"),
    25: _same("-128", "8'sh80"),
    26: _same("127", "8'sd127"),
    27: _same("b if s else a", "s ? b : a"),
    28: _same("0 if s else a", "s ? 8'sd0 : a"),
    WIRE: _same("a"),
}
CALLS = {number: eval(f"lambda a, b, s: {f.formula}") for number, f in FUNCTIONS.items()}


def wrap(values: Any) -> Int8:
    """Whole numbers of any size as int8: ``((v + 128) mod 256) - 128``.

    Args:
        values: integers.

    Returns:
        int8.

    Examples:
        >>> from lightning_compress.cgp.gates.functions import wrap
        >>> wrap([127, 128, -129]).tolist()
        [127, -128, 127]
    """
    wide = np.asarray(values, dtype=np.int64)
    return (((wide + 128) & 255) - 128).astype(np.int8)


def apply(number: int, a: npt.ArrayLike, b: npt.ArrayLike, s: int = 0) -> Int8:
    """The values of a function; slow and plain, to compare others with.

    Args:
        number: id of the function.
        a: int8, first operand.
        b: int8, second operand, of the same shape; unary functions ignore it.
        s: number of the data set modulo 2.

    Returns:
        int8 of that shape.

    Raises:
        ValueError: there is no such function.

    Examples:
        >>> from lightning_compress.cgp.gates.functions import apply
        >>> apply(1, [100, 1], [100, -3]).tolist(), apply(4, [-128], [0]).tolist()
        ([-56, -2], [-128])
    """
    if number not in CALLS:
        raise ValueError(f"no function {number}; allowed: {', '.join(map(str, FUNCTIONS))}.")
    wide = np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)
    return wrap(np.broadcast_to(CALLS[number](*wide, s), np.broadcast_shapes(wide[0].shape, wide[1].shape)))
