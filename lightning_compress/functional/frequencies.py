"""Order-0 symbol models as integer frequencies, and the compact table that stores them.

A model of n distinct symbols is n integers f_i ≥ 1 with Σ f_i = 2^k; symbol i has probability f_i / 2^k.
Both sides of a coder use these integers exactly, so a file does not depend on anybody's floating point.

Table layout: u16 n − 1 and u8 k, little endian, then a bit stream, highest bit first, padded with zero bits
to a byte: n symbols in increasing order, each as G(symbol − previous − 1, 0) with previous = −1 at the
start, then n frequencies, each as G(f − 1, max(0, bits(previous f) − 2)) with previous f = 1 at the start.
G(v, e) is the exponential Golomb code of order e, see `golomb`.
Neighbours are alike in the histograms of weights, so the previous frequency chooses the order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.golomb import MAX_CODE, GolombReader, bit_length, golomb, pack

MAX_ALPHABET = 65_536
MAX_PRECISION = 24

_HEADER = 3  # bytes

IntArray = npt.NDArray[np.int64]


class Model(NamedTuple):
    """An order-0 model: `symbols` (n,) increasing, `frequencies` (n,) ≥ 1 that sum to 2**`precision`."""

    symbols: IntArray
    frequencies: IntArray
    precision: int


def fit(symbols: IntArray, counts: IntArray) -> tuple[Model, bytes]:
    """Choose the model that makes table and coded symbols together shortest.

    For k from ⌈log2 n⌉ to 24: f = `quantize`(counts, k), cost = table bits + Σ c_i (k − log2 f_i); the
    lowest wins. So a short stream gets coarse frequencies and a short table, a long one gets fine ones.

    Args:
        symbols: (n,) distinct symbols in increasing order, each in 0..65535.
        counts: (n,) how often each occurs, ≥ 1, with a sum below 2^38.

    Returns:
        The model and its table.

    Examples:
        >>> model, table = fit(np.array([0, 7]), np.array([300, 100]))
        >>> model.frequencies.tolist(), model.precision, len(table)
        ([3, 1], 2, 5)
    """
    entropy = float(np.sum(counts * np.log2(counts.sum() / counts)))
    best, chosen = np.inf, Model(symbols, counts, 0)
    for precision in range((len(symbols) - 1).bit_length(), MAX_PRECISION + 1):
        frequencies = quantize(counts, precision)
        table = int(_frequency_codes(frequencies)[1].sum())
        if entropy + table >= best:
            break  # the table only grows from here
        cost = table + float(np.sum(counts * (precision - np.log2(frequencies))))
        if cost < best:
            best, chosen = cost, Model(symbols, frequencies, precision)
    return chosen, _write(chosen)


def quantize(counts: IntArray, precision: int) -> IntArray:
    """Round counts to integer frequencies ≥ 1 with sum 2^precision.

    Symbols whose proportional share is below 1 get 1; the others divide the rest in proportion to their
    counts, rounded by the largest remainder (ties: the lower symbol). Integer arithmetic throughout.

    Args:
        counts: (n,) ≥ 1, with a sum below 2^38.
        precision: k with 2^k ≥ n, at most 24.

    Returns:
        (n,) frequencies.

    Examples:
        >>> quantize(np.array([1, 1, 998]), 4).tolist()
        [1, 1, 14]
    """
    total = 1 << precision
    free = np.ones(len(counts), dtype=bool)
    while True:
        budget = total - int(np.count_nonzero(~free))
        share, remainder = np.divmod(counts * budget, int(counts[free].sum()))
        small = free & (share < 1)
        if not small.any():
            break
        free &= ~small
    frequencies = np.where(free, share, 1)
    places = np.flatnonzero(free)
    missing = total - int(frequencies.sum())
    frequencies[places[np.argsort(-remainder[places], kind="stable")[:missing]]] += 1
    return frequencies


def read(data: bytes) -> tuple[Model, int]:
    """Read a table from the start of `data` and check all of it.

    Args:
        data: Bytes that begin with a table, untrusted.

    Returns:
        The model and the number of bytes that its table takes.

    Raises:
        ValueError: If the table is truncated or describes no valid model.

    Examples:
        >>> model, table = fit(np.array([0, 7]), np.array([300, 100]))
        >>> read(table + b"payload")[1] == len(table)
        True
    """
    if len(data) < _HEADER:
        raise ValueError(f"frequency table: {len(data)} bytes, shorter than its header of {_HEADER}")
    size, precision = int.from_bytes(data[:2], "little") + 1, data[2]
    if precision > MAX_PRECISION or size > 1 << precision:
        raise ValueError(f"frequency table: {size} symbols with precision {precision} are not possible")
    bits = GolombReader(data[_HEADER : _HEADER + (2 * size * MAX_CODE + 7) // 8], "frequency table")
    symbols, previous = np.empty(size, dtype=np.int64), -1
    for i in range(size):
        previous += 1 + bits.next(0)
        if previous >= MAX_ALPHABET:
            raise ValueError(f"frequency table: symbol {previous} is above {MAX_ALPHABET - 1}")
        symbols[i] = previous
    frequencies, previous, total = np.empty(size, dtype=np.int64), 1, 0
    for i in range(size):
        previous = 1 + bits.next(max(0, previous.bit_length() - 2))
        total += previous
        if total > 1 << precision:
            raise ValueError(f"frequency table: frequencies exceed 2**{precision}")
        frequencies[i] = previous
    if total != 1 << precision:
        raise ValueError(f"frequency table: frequencies sum to {total}, not to 2**{precision}")
    return Model(symbols, frequencies, precision), _HEADER + bits.finish()


def _write(model: Model) -> bytes:
    gaps, widths = golomb(np.diff(model.symbols, prepend=-1) - 1, 0)
    codes, more = _frequency_codes(model.frequencies)
    stream = pack(np.concatenate([gaps, codes]), np.concatenate([widths, more]))
    return (len(gaps) - 1).to_bytes(2, "little") + bytes([model.precision]) + stream


def _frequency_codes(frequencies: IntArray) -> tuple[IntArray, IntArray]:
    """Codes of `golomb`, and their widths."""
    order = np.maximum(bit_length(np.concatenate([[1], frequencies[:-1]])) - 2, 0)
    return golomb(frequencies - 1, order)
