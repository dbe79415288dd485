"""The "huffman" coder: canonical prefix codes of whole bits, for decoders that want nothing more.

The lengths of the codes are those with the fewest bits among all of at most 32, found by package-merge. Codes are given
out in the order of (length, symbol): the first is all zeros, and each of the others is the one before it plus one,
with zeros behind as it gets longer.

Layout: the table, then the code of each symbol, both as bit streams, highest bit first, padded with zero bits to a
byte. The table has runs of symbols, from symbol 0 on: G(v, 1) and G(run - 1, 0), in exponential Golomb codes of
`golomb`. v = 0: these do not occur. Otherwise v - 1 = 0, 1, 2, 3, ... says that their length is that of the last
symbols that occur (0 at first) and 0, -1, 1, -2, ... more. The table ends where the codes are complete,
sum 2^-length = 1. A symbol that is alone has a code of length 0, and nothing follows the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.compiled import compiled
from lightning_compress.functional.golomb import GolombReader, golomb, pack

Array = npt.NDArray[Any]

CHUNK = 1 << 16
LONGEST = 32  # bits of a code

_SYMBOLS = 1 << 16
_FAST = 12  # bits that are looked up at once
_SPARE = 5  # bytes behind the data that are read
_MOST = 2 * _SYMBOLS  # bytes of a table: each symbol takes at most 16 bits of it


class _Codes(NamedTuple):
    """Canonical codes.

    Args:
        symbols: in the order of their codes.
        lengths: of the codes.
        starts: the codes, with zeros behind up to 32 bits.
    """

    symbols: Array
    lengths: Array
    starts: Array


def code_lengths(counts: Array) -> Array:
    """Lengths of the prefix code with the fewest bits, ``min sum_i n_i l_i``, none longer than 32 bits.

    Args:
        counts: (n,) how often each symbol occurs, >= 1, with a sum below 2^38; n of 1 to 65,536.

    Returns:
        (n,) bits of each code; 0 if there is one symbol alone.

    Examples:
        >>> code_lengths(np.array([1, 1, 2, 4])).tolist()
        [3, 3, 2, 1]

    Source: Larmore & Hirschberg 1990, A fast algorithm for optimal length-limited Huffman codes (package-merge).
    """
    n = len(counts)
    order = np.argsort(counts, kind="stable")
    coins = counts[order].astype(np.int64)
    packages, levels = np.zeros(0, dtype=np.int64), []
    for _ in range(min(LONGEST, n - 1)):
        items = np.concatenate([coins, packages])
        places = np.argsort(items, kind="stable")
        levels.append(places < n)  # which of them are coins
        items = items[places]
        packages = items[: len(items) // 2 * 2].reshape(-1, 2).sum(axis=1)
    taken, lengths = 2 * n - 2, np.zeros(n, dtype=np.int64)
    for are_coins in reversed(levels):
        number = int(np.count_nonzero(are_coins[:taken]))
        lengths[order[:number]] += 1  # the lightest ones
        taken = 2 * (taken - number)
    return lengths


def huffman_encode(symbols: Array) -> bytes:
    """The layout at the top of this file."""
    counts = np.bincount(symbols)
    alphabet = np.flatnonzero(counts)
    lengths = code_lengths(counts[alphabet])
    table = _table(alphabet, lengths)
    if len(alphabet) == 1:
        return table
    codes = _canonical(alphabet, lengths)
    bits, width = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts), dtype=np.int64)
    bits[codes.symbols], width[codes.symbols] = codes.starts >> LONGEST - codes.lengths, codes.lengths
    state = np.zeros(2, dtype=np.int64)  # bits that make no byte yet, and their number
    out, parts = np.empty(LONGEST // 8 * CHUNK + 1, dtype=np.uint8), [table]
    for start in range(0, symbols.size, CHUNK):
        size = _write(symbols[start : start + CHUNK], bits, width, state, out)
        parts.append(out[:size].tobytes())
    rest, left = state.tolist()
    return b"".join([*parts, bytes([rest << 8 - left]) if left else b""])


def huffman_decode(data: bytes, count: int) -> Iterator[Array]:
    """Inverse of `huffman_encode`."""
    codes, used = _read_table(data)
    sizes = (min(CHUNK, count - start) for start in range(0, count, CHUNK))
    if len(codes.symbols) == 1:
        if len(data) > used:
            raise ValueError(f"huffman: {len(data) - used} bytes after the table of a constant")
        for size in sizes:
            yield np.full(size, codes.symbols[0])
        return
    padded = np.frombuffer(data[used:] + bytes(_SPARE), dtype=np.uint8)
    tables, state = _lookup(codes), np.zeros(1, dtype=np.int64)
    for size in sizes:
        out = np.empty(size, dtype=np.uint16)
        if not _read(out, padded, state, *tables):
            raise ValueError(f"huffman: truncated, {len(data) - used} bytes for {count} symbols")
        yield out
    end = int(state[0])
    if (end + 7) // 8 != len(data) - used:
        raise ValueError(f"huffman: {len(data) - used} bytes, of which {(end + 7) // 8} are used")
    if end % 8 and data[-1] & (0xFF >> end % 8):
        raise ValueError("huffman: padding bits are not zero")


def _canonical(symbols: Array, lengths: Array) -> _Codes:
    """Codes of a complete set of lengths; symbols in increasing order."""
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    sizes = 1 << LONGEST - lengths
    return _Codes(symbols[order], lengths, np.cumsum(sizes) - sizes)


def _table(alphabet: Array, lengths: Array) -> bytes:
    dense = np.full(int(alphabet[-1]) + 1, -1, dtype=np.int64)
    dense[alphabet] = lengths
    starts = np.flatnonzero(np.diff(dense, prepend=-2))
    runs, values = np.diff(starts, append=len(dense)), dense[starts]
    occur = values >= 0
    change = np.diff(values[occur], prepend=0)
    kinds = np.zeros(len(runs), dtype=np.int64)
    kinds[occur] = 1 + np.where(change >= 0, 2 * change, -2 * change - 1)
    parts = zip(golomb(kinds, 1), golomb(runs - 1, 0), strict=True)
    codes, widths = (np.stack(part, axis=1).reshape(-1) for part in parts)
    return pack(codes, widths)


def _read_table(data: bytes) -> tuple[_Codes, int]:
    """Canonical codes, and the bytes that their table takes; ValueError if it is none."""
    bits = GolombReader(data[:_MOST], "huffman: table")
    symbols, lengths = [], []
    symbol, length, room = 0, 0, 1 << LONGEST
    while room:
        kind, run = bits.next(1), 1 + bits.next(0)
        if symbol + run > _SYMBOLS:
            raise ValueError(f"huffman: table: symbol {symbol + run - 1} is above {_SYMBOLS - 1}")
        if kind:
            length += -(kind >> 1) if kind % 2 == 0 else kind >> 1
            if not 0 <= length <= LONGEST:
                raise ValueError(f"huffman: table: a code of {length} bits")
            room -= run << LONGEST - length
            if room < 0:
                raise ValueError("huffman: table: more codes than there can be")
            symbols.append(np.arange(symbol, symbol + run))
            lengths.append(np.full(run, length))
        symbol += run
    return _canonical(np.concatenate(symbols), np.concatenate(lengths)), bits.finish()


def _lookup(codes: _Codes) -> tuple[Array, ...]:
    """Tables for decoding.

    Symbol and length of the code that each 12 bits begin with (length 0: a longer one); for each length, where its
    codes begin and end as 32 bits, and the place of its first symbol; the symbols.
    """
    short = codes.lengths <= _FAST
    wide = 1 << _FAST - codes.lengths[short]
    symbols, lengths = np.zeros(1 << _FAST, dtype=np.uint16), np.zeros(1 << _FAST, dtype=np.int64)
    covered = int(wide.sum())
    symbols[:covered] = np.repeat(codes.symbols[short], wide)
    lengths[:covered] = np.repeat(codes.lengths[short], wide)
    number = np.bincount(codes.lengths, minlength=LONGEST + 1)
    ends = np.cumsum(number << LONGEST - np.arange(LONGEST + 1))
    begins = np.concatenate([[0], ends[:-1]])
    return symbols, lengths, begins, ends, np.cumsum(number) - number, codes.symbols.astype(np.uint16)


@compiled()
def _write(symbols: Array, bits: Array, widths: Array, state: Array, out: Array) -> int:
    """Append the codes of symbols; returns the number of whole bytes in ``out``."""
    held, left = state[0], state[1]
    at = 0
    for symbol in symbols:
        held = held << widths[symbol] | bits[symbol]
        left += widths[symbol]
        while left >= 8:
            left -= 8
            out[at] = held >> left
            held &= (1 << left) - 1
            at += 1
    state[0], state[1] = held, left
    return at


@compiled()
def _read(
    out: Array,
    data: Array,
    state: Array,
    fast_symbols: Array,
    fast_lengths: Array,
    begins: Array,
    ends: Array,
    places: Array,
    symbols: Array,
) -> bool:
    """Fill ``out`` from the bit where ``state`` says; False if the data end before."""
    at, last = state[0], 8 * (data.size - 5)
    for s in range(out.size):
        byte = at >> 3
        window = np.int64(0)
        for i in range(5):
            window = window << 8 | data[byte + i]
        window = (window >> (8 - (at & 7))) & 0xFFFFFFFF
        length = fast_lengths[window >> 20]
        if length:
            out[s] = fast_symbols[window >> 20]
        else:
            length = 13
            while window >= ends[length]:
                length += 1
            out[s] = symbols[places[length] + ((window - begins[length]) >> (32 - length))]
        at += length
        if at > last:
            return False
    state[0] = at
    return True
