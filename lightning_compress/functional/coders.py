"""The byte formats of the entropy coders: symbols → bytes, and (bytes, count) → symbols.

Every function may assume at least one symbol. Symbols come in as uint8, or uint16 if one exceeds 255.
Decoders yield pieces of some 65,536 symbols, so that decoding needs little memory beside the result and the
data; they raise ValueError on invalid bytes. `entropy.decode` checks the number and range of what they
yield.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.functional import frequencies

Array = npt.NDArray[Any]

CHUNK = 1 << 16


def raw_encode(symbols: Array) -> bytes:
    """One or two bytes per symbol, little endian; which of them follows from the length."""
    return symbols.astype(symbols.dtype.newbyteorder("<")).tobytes()


def raw_decode(data: bytes, count: int) -> Iterator[Array]:
    """Inverse of `raw_encode`."""
    if len(data) not in (count, 2 * count):
        raise ValueError(f"raw: {len(data)} bytes for {count} symbols of one or two bytes")
    yield np.frombuffer(data, dtype=f"<u{len(data) // count}")


def bitpack_encode(symbols: Array) -> bytes:
    """One byte w, then w bits per symbol, highest first, padded with zero bits; w = 0 for all zeros."""
    width = int(symbols.max()).bit_length()
    shifts = np.arange(width - 1, -1, -1, dtype=symbols.dtype)
    packed = [
        np.packbits(((symbols[start : start + CHUNK, None] >> shifts) & 1).astype(np.uint8)).tobytes()
        for start in range(0, symbols.size, CHUNK)
    ]
    return bytes([width]) + b"".join(packed)


def bitpack_decode(data: bytes, count: int) -> Iterator[Array]:
    """Inverse of `bitpack_encode`."""
    width = data[0] if data else 0
    if width > 16 or len(data) != 1 + (count * width + 7) // 8:
        raise ValueError(f"bitpack: {len(data)} bytes for {count} symbols of {width} bits")
    if count * width % 8 and data[-1] & (0xFF >> count * width % 8):
        raise ValueError("bitpack: padding bits are not zero")
    values = (1 << np.arange(width - 1, -1, -1)).astype(np.uint16)
    for start in range(0, count, CHUNK):  # starts at a whole byte, since CHUNK is a multiple of 8
        size = min(CHUNK, count - start)
        packed = np.frombuffer(data, np.uint8, count=(size * width + 7) // 8, offset=1 + start * width // 8)
        yield np.unpackbits(packed, count=size * width).reshape(size, width) @ values


def _categorical(model: frequencies.Model) -> Any:
    import constriction

    # constriction computes with probabilities of 24 bits and gives each of n symbols 1 plus a share of the
    # other 2^24 − n. These shares sum to just that, so that each is taken exactly: P = f · 2^(24 − k).
    shares = (model.frequencies << (frequencies.MAX_PRECISION - model.precision)) - 1
    return constriction.stream.model.Categorical(shares.astype(np.float64), perfect=False)


def static_encode(symbols: Array, coder: str) -> bytes:
    """A table of `frequencies`, then the 32-bit words of constriction's "ans" or "range" coder.

    Words are little endian; zero bytes at the end of the last one are left out. A constant needs no words.
    """
    import constriction

    counts = np.bincount(symbols)
    alphabet = np.flatnonzero(counts)
    model, table = frequencies.fit(alphabet, counts[alphabet])
    if len(alphabet) == 1:
        return table
    index = np.zeros(len(counts), dtype=np.int32)
    index[alphabet] = np.arange(len(alphabet))
    categorical, starts = _categorical(model), range(0, symbols.size, CHUNK)
    if coder == "ans":
        stream = constriction.stream.stack.AnsCoder()
        for start in reversed(starts):  # a stack: what goes in last comes out first
            stream.encode_reverse(index[symbols[start : start + CHUNK]], categorical)
    else:
        stream = constriction.stream.queue.RangeEncoder()
        for start in starts:
            stream.encode(index[symbols[start : start + CHUNK]], categorical)
    words = bytes(stream.get_compressed().astype("<u4"))
    kept = max(0, len(words) - 3)
    return table + words[:kept] + words[kept:].rstrip(b"\0")


def static_decode(data: bytes, count: int, coder: str) -> Iterator[Array]:
    """Inverse of `static_encode`."""
    import constriction

    model, used = frequencies.read(data)
    payload = data[used:]
    sizes = (min(CHUNK, count - start) for start in range(0, count, CHUNK))
    if len(model.symbols) == 1:
        if payload:
            raise ValueError(f"{coder}: {len(payload)} bytes after the table of a constant")
        for size in sizes:
            yield np.full(size, model.symbols[0])
        return
    words = np.frombuffer(payload + bytes(-len(payload) % 4), dtype="<u4").astype(np.uint32)
    categorical, ans = _categorical(model), coder == "ans"
    kind = constriction.stream.stack.AnsCoder if ans else constriction.stream.queue.RangeDecoder
    try:
        stream = kind(words)
        for size in sizes:
            yield model.symbols[stream.decode(categorical, size)]
    except (ValueError, AssertionError) as error:  # constriction's words for bytes that nothing encodes to
        raise ValueError(f"{coder}: invalid bytes: {error}") from error
    if not (stream.is_empty() if ans else stream.maybe_exhausted()):
        raise ValueError(f"{coder}: bytes are left after {count} symbols")


def zlib_encode(symbols: Array) -> bytes:
    """One byte w, then the `raw_encode`d symbols of w bytes as a zlib stream."""
    return bytes([symbols.itemsize]) + zlib.compress(raw_encode(symbols), 6)


def zlib_decode(data: bytes, count: int) -> Iterator[Array]:
    """Inverse of `zlib_encode`."""

    def pieces() -> Iterator[bytes]:
        stream = zlib.decompressobj()
        try:
            for start in range(1, len(data), CHUNK):
                if stream.eof:
                    raise ValueError("zlib: bytes are left after the end")
                piece = stream.decompress(data[start : start + CHUNK], CHUNK)
                while piece:
                    yield piece
                    piece = stream.decompress(stream.unconsumed_tail, CHUNK)
        except zlib.error as error:
            raise ValueError(f"zlib: invalid bytes: {error}") from error
        if not stream.eof or stream.unused_data:
            raise ValueError(f"zlib: {'bytes are left after the end' if stream.eof else 'truncated'}")

    return _from_raw(pieces(), data, "zlib")


def _lzma_filters(size: int) -> list[dict[str, int]]:
    dictionary = min(max(size, 1 << 12), 1 << 23)
    return [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": dictionary, "lc": 0, "lp": 0, "pb": 0}]


def lzma_encode(symbols: Array) -> bytes:
    """One byte w, then the `raw_encode`d symbols of w bytes as a bare LZMA2 stream.

    Its dictionary, which is the memory that decoding takes, follows from the count, not from the stream.
    """
    raw = raw_encode(symbols)
    return bytes([symbols.itemsize]) + lzma.compress(raw, lzma.FORMAT_RAW, filters=_lzma_filters(len(raw)))


def lzma_decode(data: bytes, count: int) -> Iterator[Array]:
    """Inverse of `lzma_encode`."""

    def pieces() -> Iterator[bytes]:
        stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(count * data[0]))
        try:
            piece = stream.decompress(data[1:], CHUNK)
            while piece:
                yield piece
                piece = b"" if stream.eof else stream.decompress(b"", CHUNK)
        except lzma.LZMAError as error:
            raise ValueError(f"lzma: invalid bytes: {error}") from error
        if not stream.eof or stream.unused_data:
            raise ValueError(f"lzma: {'bytes are left after the end' if stream.eof else 'truncated'}")

    return _from_raw(pieces(), data, "lzma")


def _from_raw(pieces: Iterator[bytes], data: bytes, coder: str) -> Iterator[Array]:
    width = data[0] if data else 0
    if width not in (1, 2):
        raise ValueError(f"{coder}: {width} bytes per symbol, must be 1 or 2")
    rest = b""
    for piece in pieces:
        rest += piece
        whole = len(rest) // width * width
        yield np.frombuffer(rest[:whole], dtype=f"<u{width}")
        rest = rest[whole:]
    if rest:
        raise ValueError(f"{coder}: half a symbol at the end")


def gaps_encode(symbols: Array, bits: int | None = None) -> bytes:
    """Distances between ones; layout and `bits` as in `entropy.gaps_encode`."""
    gaps = np.diff(np.flatnonzero(symbols), prepend=-1) - 1
    longest = int(gaps.max(initial=0) + 1).bit_length()  # with more bits nothing would change
    tried = range(1, min(longest, 16) + 1) if bits is None else (bits,)
    return min((_gaps_with(gaps, b) for b in tried), key=len)


def _gaps_with(gaps: Array, bits: int) -> bytes:
    filler = (1 << bits) - 1
    fillers, last = np.divmod(gaps, filler)
    ends = np.cumsum(fillers + 1)
    symbols = np.full(int(ends[-1]) if ends.size else 0, filler, dtype=np.uint8 if bits <= 8 else np.uint16)
    symbols[ends - 1] = last
    number = symbols.size.to_bytes(8, "little").rstrip(b"\0")
    coded = {0: static_encode(symbols, "ans"), 128: bitpack_encode(symbols)} if symbols.size else {0: b""}
    flag = min(coded, key=lambda key: len(coded[key]))
    return bytes([bits | flag, len(number)]) + number + coded[flag]


def gaps_decode(data: bytes, count: int) -> Iterator[Array]:
    """Inverse of `gaps_encode`."""
    bits, length = (data[0] & 127, data[1]) if len(data) > 1 else (0, 0)
    number, payload = int.from_bytes(data[2 : 2 + length], "little"), data[2 + length :]
    filler, position = (1 << bits) - 1, 0
    # Every symbol stands for at least one element.
    complete = len(data) >= 2 + length <= 10 and (number or not payload)
    if not 1 <= bits <= 16 or number > count or not complete:
        raise ValueError(f"gaps: {number} symbols of {bits} bits in {len(data)} bytes for {count} elements")
    pieces = bitpack_decode(payload, number) if data[0] & 128 else static_decode(payload, number, "ans")
    for piece in pieces if number else ():
        gaps = piece.astype(np.int64)
        ends = np.cumsum(gaps + (gaps != filler))
        if gaps.max() > filler or position + int(ends[-1]) > count:
            raise ValueError(f"gaps: positions beyond {count} elements")
        out = np.zeros(int(ends[-1]), dtype=np.uint8)
        out[ends[gaps != filler] - 1] = 1
        position += out.size
        yield out
    yield np.zeros(count - position, dtype=np.uint8)
