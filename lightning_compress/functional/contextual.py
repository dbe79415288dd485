"""The "adaptive" coder: a range coder whose probabilities follow the data; no table is stored.

A symbol s is coded as its distance x = s − c from the centre c, the median of all symbols, in the context of how
large the distances were lately, m ← m + (|x| − m) / 8, in half octaves: the weights of one row are alike. A context
has a shift b and 32 tokens: x = 2^b h + l, with a token for each h in −15..15 and one for all others, whose h follows
as an exponential Golomb code of order 1 and a sign; these and the b bits of l are written as they are.

Each context has the cumulative frequencies of its tokens, of 2^15 and with 8 more bits behind the point, and the
number n of tokens that it has seen. They begin with a geometric distribution as wide as the context says, and move
towards the token that was met by 2^-r, r = 3 to 7 as n grows. All of it is integer arithmetic, the same on every
machine.

Layout: the centre as a variable-length integer (7 bits a byte, lowest first, high bit = more follow), then the bytes
of the range coder: 32-bit range, renormalized below 2^24; the first byte, always 0, and up to four zero bytes at the
end are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.compiled import compiled

Array = npt.NDArray[Any]

CHUNK = 1 << 16

_TOKENS = 32
_FAR = _TOKENS // 2  # |h| of the nearest distance without a token of its own
_POINT = 8  # bits behind the point of a frequency
_LEAST = (
    2 << _POINT
)  # a token moves towards no less; rounding takes at most 2^7 away, so that 1 of 2^15 is left
_WHOLE = 1 << 15 + _POINT
_SPARE = 4  # zero bytes that may be left out at the end
_WORST = 12  # bytes that one symbol may take
_RATES = np.array([min(7, (n // 8 + 1).bit_length() + 2) for n in range(121)], dtype=np.int32)
# Where contexts begin, m in 256ths: half octaves of 4 m + 1.
_EDGES = (
    *(27, 64, 118, 192, 299, 448, 661, 960, 1385, 1984, 2833, 4032, 5729, 8128, 11522, 16384),
    *(int(16384 * 1.5 ** (c % 2)) << c // 2 for c in range(1, 20)),
)
_FINE = np.searchsorted(_EDGES, np.arange(1 << 14), side="right").astype(np.uint8)
_COARSE = np.searchsorted(_EDGES, np.arange(1 << 16) << 8, side="right").astype(np.uint8)


def _start() -> tuple[Array, Array, Array]:
    """Shift of every context; cumulative frequencies [contexts, tokens] and counts before the first symbol."""
    shifts, tables = _prior()
    return shifts, tables.copy(), np.zeros(len(shifts), dtype=np.int64)


@cache
def _prior() -> tuple[Array, Array]:
    middles = [(low + high) // 2 for low, high in zip((0, *_EDGES), (*_EDGES, 1 << 24), strict=True)]
    shifts = np.array([max(0, (3 * m // 256).bit_length() - 3) for m in middles], dtype=np.int64)
    tables = np.empty((len(middles), _TOKENS), dtype=np.int32)
    for c, m in enumerate(middles):
        # P(h) ~ t^|h| with the mean |h| of the context, in integers: t = m / (m + 1), of 2^16.
        mean = max(m >> int(shifts[c]), 16)
        step = (mean << 16) // (mean + 256)
        weights, weight = [1 << 24], 1 << 24
        for _ in range(_FAR):
            weight = weight * step >> 16
            weights.append(weight)
        order = [weights[abs(h)] for h in range(1 - _FAR, _FAR)] + [weights[_FAR]]
        total, spare = sum(order), _WHOLE - _LEAST * _TOKENS
        sums = np.cumsum(np.array(order, dtype=np.int64)) * spare // total
        tables[c] = sums + _LEAST * np.arange(1, _TOKENS + 1)
    return shifts, tables


def adaptive_encode(symbols: Array) -> bytes:
    """The layout at the top of this file."""
    counts = np.cumsum(np.bincount(symbols))
    centre = int(np.searchsorted(counts, (symbols.size + 1) // 2))
    head, rest = bytearray(), centre
    while rest > 127:
        head.append(128 | rest & 127)
        rest >>= 7
    head.append(rest)
    tables = _start()
    state = np.array([0, 0xFFFFFFFF, 0, 0, 0], dtype=np.int64)  # low, range, cache, pending, level
    out, parts = np.empty(_WORST * CHUNK + 64, dtype=np.uint8), []
    for start in range(0, symbols.size, CHUNK):
        piece = symbols[start : start + CHUNK]
        if state[3] > 32:  # bytes that wait for a carry: make room for them
            out = np.empty(_WORST * CHUNK + 64 + int(state[3]), dtype=np.uint8)
        parts.append(out[: _encode(piece, centre, *tables, state, out)].tobytes())
    data = (b"".join(parts) + _finish(state))[1:]
    kept = max(0, len(data) - _SPARE)
    return bytes(head) + data[:kept] + data[kept:].rstrip(b"\0")


def _end(low: int, span: int) -> int:
    """The number in [low, low + span) with the most zero bits at its end."""
    ends = ((low + (1 << bits) - 1) >> bits << bits for bits in range(32, -1, -1))
    return next(end for end in ends if end < low + span)


def _finish(state: Array) -> bytes:
    """The bytes that were not written yet."""
    low, span, cache, pending = (int(v) for v in state[:4])
    low = _end(low, span)
    carry = low >> 32
    waiting = bytes([cache + carry & 255]) + bytes([255 + carry & 255]) * pending
    return waiting + (low & 0xFFFFFFFF).to_bytes(4, "big")


def adaptive_decode(data: bytes, count: int) -> Iterator[Array]:
    """Inverse of `adaptive_encode`."""
    centre = used = 0
    while True:
        if used >= min(len(data), 3):
            raise ValueError("adaptive: the centre is truncated or too long")
        centre |= (data[used] & 127) << 7 * used
        used += 1
        if data[used - 1] < 128:
            break
    if centre > 0xFFFF:
        raise ValueError(f"adaptive: centre {centre} is above 65535")
    size = len(data) - used
    padded = np.frombuffer(data[used:] + bytes(_SPARE + 1), dtype=np.uint8)
    tables = _start()
    state = np.array([int.from_bytes(padded[:4].tobytes(), "big"), 0xFFFFFFFF, 4, 0], dtype=np.int64)
    for start in range(0, count, CHUNK):
        out = np.empty(min(CHUNK, count - start), dtype=np.uint16)
        if not _decode(out, centre, *tables, state, padded):
            raise ValueError("adaptive: truncated, or a symbol outside 0..65535")
        yield out
    code, span, at, _ = (int(v) for v in state)
    last = int.from_bytes(padded[at - 4 : at].tobytes(), "big")
    left_out = at - size
    shortest = left_out == _SPARE or not size or padded[size - 1]
    ends_so = _end((last - code) % (1 << 32), span) % (1 << 32) == last
    if not (0 <= left_out <= _SPARE and shortest and ends_so):
        raise ValueError(f"adaptive: {size} bytes, of which {at} are used, or they do not end so")


@compiled()
def _context(level: int) -> int:
    return int(_FINE[level]) if level < 16384 else int(_COARSE[level >> 8])


@compiled()
def _learn(table: Array, token: int, rate: int) -> None:
    for i in range(_TOKENS):  # the last entry stays: its goal is the whole
        goal = _LEAST * (i + 1) + (_WHOLE - _LEAST * _TOKENS if i >= token else 0)
        table[i] += (goal - table[i]) >> rate


@compiled()
def _emit(low: int, cache: int, pending: int, at: int, out: Array) -> tuple[int, int, int, int]:
    """Move the highest byte of ``low`` out; bytes of 255 wait until it is known whether a carry reaches them."""
    if low < 0xFF000000 or low > 0xFFFFFFFF:
        carry = low >> 32
        out[at] = (cache + carry) & 255
        for i in range(pending):
            out[at + 1 + i] = (255 + carry) & 255
        return (low & 0x00FFFFFF) << 8, (low >> 24) & 255, 0, at + 1 + pending
    return (low & 0x00FFFFFF) << 8, cache, pending + 1, at


@compiled()
def _encode(
    symbols: Array, centre: int, shifts: Array, tables: Array, seen: Array, state: Array, out: Array
) -> int:
    """Code symbols and go on where ``state`` says; returns the number of bytes in ``out``."""
    low, span, cache, pending, level = state[0], state[1], state[2], state[3], state[4]
    at = 0
    for s in range(symbols.size):
        x = int(symbols[s]) - centre
        c = _context(level)
        b, table = shifts[c], tables[c]
        h = x >> b
        token = h + _FAR - 1 if -_FAR < h < _FAR else _TOKENS - 1
        unit = span >> 15
        first = table[token - 1] >> _POINT if token else 0
        low += unit * first
        span = unit * ((table[token] >> _POINT) - first)
        _learn(table, token, _RATES[seen[c]])
        seen[c] = min(seen[c] + 1, 120)
        while span < 16777216:
            span <<= 8
            low, cache, pending, at = _emit(low, cache, pending, at, out)
        if (
            token == _TOKENS - 1
        ):  # e + 2 >= 2 as so many zeros, a one, the bits below its highest; then the sign
            value = abs(h) - _FAR + 2
            width = 1
            while value >> (width + 1):
                width += 1
            for i in range(2 * width + 1):
                if i < width:
                    bit = 1 if i == width - 1 else 0
                elif i < 2 * width:
                    bit = (value >> (2 * width - 1 - i)) & 1
                else:
                    bit = 1 if h < 0 else 0
                span >>= 1
                low += span * bit
                while span < 16777216:
                    span <<= 8
                    low, cache, pending, at = _emit(low, cache, pending, at, out)
        if b:
            span >>= b
            low += span * (x & ((1 << b) - 1))
            while span < 16777216:
                span <<= 8
                low, cache, pending, at = _emit(low, cache, pending, at, out)
        level += ((abs(x) << 8) - level) >> 3
    state[0], state[1], state[2], state[3], state[4] = low, span, cache, pending, level
    return at


@compiled()
def _word(data: Array, at: int) -> int:
    """Two bytes; zeros behind the end."""
    high = np.int64(data[at]) << 8 if at < data.size else np.int64(0)
    return int(high | np.int64(data[at + 1]) if at + 1 < data.size else high)


@compiled()
def _decode(
    out: Array, centre: int, shifts: Array, tables: Array, seen: Array, state: Array, data: Array
) -> bool:
    """Fill ``out``, and go on where ``state`` says; False for bytes that nothing encodes to."""
    code, span, at, level = state[0], state[1], state[2], state[3]
    for s in range(out.size):
        c = _context(level)
        b, table = shifts[c], tables[c]
        unit = span >> 15
        reach = (np.int64(np.uint32(code) // np.uint32(unit)) + 1) << _POINT  # 32 bits divide faster
        token = 0
        for i in range(_TOKENS // 8 - 1):  # eight tokens at a time, then the seven that are left
            token += 8 if table[8 * i + 7] < reach else 0
        start = token
        for i in range(7):
            token += 1 if table[start + i] < reach else 0
        first = table[token - 1] >> _POINT if token else 0
        code -= unit * first
        span = unit * ((table[token] >> _POINT) - first)
        _learn(table, token, _RATES[seen[c]])
        seen[c] = min(seen[c] + 1, 120)
        more = (
            np.int64(span < 16777216) + np.int64(span < 65536)
        ) << 3  # no branch: it could not be foreseen
        span <<= more
        code = code << more | _word(data, at) >> (16 - more)
        at += more >> 3
        h = token - _FAR + 1
        if token == _TOKENS - 1:
            width, value, left = (
                0,
                1,
                -1,
            )  # zeros so far; the number; bits of it still to come, -1: not known yet
            while left:
                span >>= 1
                bit = 1 if code >= span else 0
                code -= span * bit
                while span < 16777216:
                    span <<= 8
                    code = code << 8 | (data[at] if at < data.size else 0)
                    at += 1
                if left > 0:
                    value = value << 1 | bit
                    left -= 1
                elif bit:
                    left = width + 2
                elif width > 16:
                    return False
                else:
                    width += 1
            h = (value >> 1) - 2 + _FAR
            if value & 1:
                h = -h
        x = h << b
        if b:
            span >>= b
            rest = min(code // span, (1 << b) - 1)
            code -= span * rest
            x += rest
            while span < 16777216:
                span <<= 8
                code = code << 8 | (data[at] if at < data.size else 0)
                at += 1
        value = centre + x
        if value < 0 or value > 65535 or code >= span or at > data.size:
            return False
        out[s] = value
        level += ((abs(x) << 8) - level) >> 3
    state[0], state[1], state[2], state[3] = code, span, at, level
    return True
