"""Exponential Golomb codes of small numbers: the tables of the entropy coders.

G(v, e), v >= 0 of order e, is x = v + 2^e in binary, with bits(x) - e - 1 zeros in front. Codes stand one after the
other in a bit stream, highest bit first, padded with zero bits to a byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CODE = 50  # bits; no table has a longer code

IntArray = npt.NDArray[np.int64]


def bit_length(x: npt.NDArray[Any]) -> IntArray:
    """Bits of each number, 0 for 0.

    Args:
        x: integers from 0 to 2^53.

    Returns:
        Shape of x.

    Examples:
        >>> bit_length(np.array([0, 1, 255, 256])).tolist()
        [0, 1, 8, 9]
    """
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)


def golomb(values: IntArray, orders: npt.ArrayLike) -> tuple[IntArray, IntArray]:
    """The codes of numbers, as numbers x and their widths in bits.

    Args:
        values: (n,) v >= 0.
        orders: e of each, or one for all.

    Returns:
        x and widths, (n,) each.

    Examples:
        >>> codes, widths = golomb(np.array([0, 5]), 0)
        >>> codes.tolist(), widths.tolist()
        ([1, 6], [1, 5])
    """
    order = np.asarray(orders, dtype=np.int64)
    codes = values + (1 << order)
    return codes, 2 * bit_length(codes) - order - 1


def pack(codes: IntArray, widths: IntArray) -> bytes:
    """Numbers of given widths as a bit stream, with zero bits at its end.

    Args:
        codes: (n,) what ``golomb`` returned.
        widths: (n,) what ``golomb`` returned.

    Returns:
        Bytes.

    Examples:
        >>> pack(*golomb(np.array([0, 5]), 0)).hex()  # 1, 00110
        '98'
    """
    ends = np.cumsum(widths)
    if not ends.size:
        return b""
    shifts = np.repeat(ends, widths) - np.arange(ends[-1]) - 1
    return np.packbits(((np.repeat(codes, widths) >> shifts) & 1).astype(np.uint8)).tobytes()


class GolombReader:
    """Codes from the front of a byte string.

    Args:
        data: untrusted bytes; all of them are looked at, so pass no more than the codes may take.
        what: is read, for messages.

    Examples:
        >>> reader = GolombReader(pack(*golomb(np.array([0, 5]), 0)), "table")
        >>> reader.next(0), reader.next(0), reader.finish()
        (0, 5, 1)
    """

    def __init__(self, data: bytes, what: str) -> None:
        # A string of "0" and "1" is searched and converted in C; the "1" in front keeps leading zeros.
        self._text = format(int.from_bytes(b"\x01" + data, "big"), "b")
        self._position, self._what = 1, what

    def next(self, order: int) -> int:
        """Value of the next code; ValueError where no valid code follows."""
        first = self._text.find("1", self._position)
        end = 2 * first - self._position + order + 1
        if first < 0 or end > len(self._text):
            raise ValueError(f"{self._what}: truncated")
        if end - self._position > MAX_CODE:
            raise ValueError(f"{self._what}: a code of {end - self._position} bits")
        self._position = end
        return int(self._text[first:end], 2) - (1 << order)

    def finish(self) -> int:
        """Bytes used, after checking that the rest of the last one is zero."""
        size = (self._position + 6) // 8
        if "1" in self._text[self._position : 1 + 8 * size]:
            raise ValueError(f"{self._what}: padding bits are not zero")
        return size
