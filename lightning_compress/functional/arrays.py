"""Arrays as coded streams: the shortest of several layouts, and a description to check before decoding.

An array is cut into blocks of whole rows, about 2^19 elements each, so that coding one takes the memory of a block.
Layouts of a block:

- ``symbols``: integers minus the smallest of them, one stream.
- ``planes``: the byte planes of ``lightning_compress.functional.entropy.byte_planes``, one stream each.
- ``sparse``: which elements have a bit that is not zero, as one stream, then the planes of these elements.

An array of fewer than ``MAX_POOLED`` bytes has no blocks: its elements lie in a pool that many small arrays share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.entropy import (
    CODERS,
    byte_planes,
    decode,
    encode,
    from_byte_planes,
)
from lightning_compress.functional.frequencies import MAX_ALPHABET

# dtype -> numpy type of the same width that carries its bits, little endian
CARRIERS = {
    **{"bool": "?", "uint8": "u1", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8"},
    **{"uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "float8_e4m3fn": "u1", "float8_e5m2": "u1"},
    **{"float16": "<u2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"},
    **{"complex64": "<c8", "complex128": "<c16"},
}
_SIZES = {name: np.dtype(carrier).itemsize for name, carrier in CARRIERS.items()}  # bytes
LAYOUTS = ("symbols", "planes", "sparse")
MAX_POOLED = 1 << 12  # arrays of fewer bytes lie in a pool
BLOCK = 1 << 19  # elements
_PLANE_WORDS = {1: "u1", 2: "<u2", 4: "<f4", 8: "<f8"}
_MAX_COUNT = 1 << 48
MAX_DIMS = 32
# A stream that is coded badly has so many bytes for each one of its block, and so many more.
_MAX_EXPANSION, _SPARE = 16, 64
_SURE = 1.05  # a layout is tried if its estimate is at most so many times the smallest

Words = npt.NDArray[Any]


class Stream(NamedTuple):
    """Coder, and length in bytes."""

    coder: str
    length: int


@dataclass(frozen=True, slots=True)
class Block:
    """How one block is stored.

    Args:
        layout: one of ``LAYOUTS``.
        number: "symbols": what was subtracted; "sparse": how many elements are stored; otherwise 0.
        streams: in order.
    """

    layout: str
    number: int
    streams: tuple[Stream, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """How one array is stored.

    Args:
        name: what it is, unique among its neighbours.
        dtype: key of ``CARRIERS``.
        shape: extents.
        blocks: in order; none if it lies in a pool.
        offset: where it begins: byte of the payload, or element of the pool. Not stored: it follows from the
            arrays before.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    offset: int = field(default=0, compare=False)

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.count * _SIZES[self.dtype]

    @property
    def pooled(self) -> bool:
        """Whether it is small enough for a pool."""
        return self.nbytes < MAX_POOLED

    @property
    def stored_bytes(self) -> int:
        """Bytes of its own streams."""
        return sum(stream.length for block in self.blocks for stream in block.streams)

    @property
    def rows(self) -> int:
        """Elements of a row: all but the first axis; 1 with fewer than two axes."""
        return max(1, math.prod(self.shape[1:]))

    @property
    def block_size(self) -> int:
        """Elements of every block but the last: as many whole rows as ``BLOCK`` has room for."""
        return BLOCK // self.rows * self.rows or BLOCK

    def extents(self) -> Iterator[int]:
        """Number of elements of each block."""
        size = self.block_size
        for start in range(0, self.count, size):
            yield min(size, self.count - start)

    def check(self) -> None:
        """Refuse dtypes and shapes that cannot be.

        Raises:
            ValueError: names the array.
        """
        if self.dtype not in CARRIERS:
            raise ValueError(f"{self.name!r}: unknown dtype {self.dtype!r:.60}; known: {', '.join(CARRIERS)}")
        possible = len(self.shape) <= MAX_DIMS and all(0 <= n < _MAX_COUNT for n in self.shape)
        if not possible or math.prod(self.shape) >= _MAX_COUNT:
            raise ValueError(f"{self.name!r}: impossible shape {self.shape!s:.80}")

    def check_block(self, block: Block, count: int) -> None:
        """Refuse what no block of this array can be, before anything is allocated for it.

        Args:
            block: untrusted.
            count: its elements.

        Raises:
            ValueError: layout, number, coders or lengths that are not allowed; names the array.
        """
        kind = np.dtype(CARRIERS[self.dtype])
        allowed: dict[str, tuple[int, int]] = {}  # layout -> smallest and largest number
        if kind.kind in "iub":
            allowed["symbols"] = _limits(kind)
        if kind.itemsize > 1:
            allowed |= {"planes": (0, 0), "sparse": (0, count)}
        if block.layout not in allowed:
            raise ValueError(
                f"{self.name!r}: layout {block.layout!r}; allowed for {self.dtype}: {', '.join(allowed)}"
            )
        least, most = allowed[block.layout]
        if not least <= block.number <= most:
            raise ValueError(
                f"{self.name!r}: number {block.number}; {block.layout!r} allows {least} to {most}"
            )
        if len(block.streams) != streams_of(self.dtype, block.layout):
            raise ValueError(f"{self.name!r}: {len(block.streams)} streams in layout {block.layout!r}")
        longest = _MAX_EXPANSION * count * kind.itemsize + _SPARE
        for coder, length in block.streams:
            if coder not in CODERS:
                raise ValueError(f"{self.name!r}: unknown coder {coder!r}; known: {', '.join(CODERS)}")
            if not 0 <= length <= longest:
                raise ValueError(f"{self.name!r}: a stream of {length} bytes; allowed are {longest}")


def streams_of(dtype: str, layout: str) -> int:
    """Number of streams of a block.

    Args:
        dtype: key of ``CARRIERS``.
        layout: one of ``LAYOUTS``.

    Returns:
        1 for symbols; the bytes of a word (of a complex number, of half of it), and one more if sparse.

    Examples:
        >>> streams_of("float32", "planes"), streams_of("complex64", "sparse")
        (4, 5)
    """
    return 1 if layout == "symbols" else _word(np.dtype(CARRIERS[dtype])).itemsize + (layout == "sparse")


def encode_array(
    name: str,
    dtype: str,
    shape: Sequence[int],
    words: Words,
    coder: str = "auto",
    *,
    write: Callable[[bytes], Any],
) -> Array:
    """Store an array, every block in the layout that takes the fewest bytes.

    Args:
        name: what it is.
        dtype: key of ``CARRIERS``.
        shape: extents.
        words: (count,) contiguous, of the carrier type.
        coder: "auto", or a key of ``CODERS``; streams beyond its alphabet take "auto".
        write: takes every stream, in order.

    Returns:
        The description.

    Examples:
        >>> words, streams = np.where(np.arange(6000) % 20, 0, np.arange(6000)).astype(np.float32), []
        >>> array = encode_array("weight", "float32", (60, 100), words, write=streams.append)
        >>> array.blocks[0].layout, array.blocks[0].number
        ('sparse', 299)
        >>> stored = iter(streams)
        >>> bool((decode_array(array, lambda length: next(stored)) == words).all())
        True
    """
    array = Array(name, dtype, tuple(shape))
    blocks, start = [], 0
    for count in array.extents():
        layout, number, coded = _encode_block(words[start : start + count], coder)
        for _, data in coded:
            write(data)
        blocks.append(Block(layout, number, tuple(Stream(used, len(data)) for used, data in coded)))
        start += count
    return Array(name, dtype, tuple(shape), tuple(blocks))


def _encode_block(words: Words, coder: str) -> tuple[str, int, list[tuple[str, bytes]]]:
    """Layout, number, and coder and bytes of each stream. Layouts whose estimate is far off are not tried."""
    ways: list[tuple[float, str, int, Callable[[], list[Words]]]] = []
    if words.dtype.kind in "iub":
        low, high = int(words.min()), int(words.max())
        if high < 256 and low > 0:
            low = 0  # as short, and nothing to subtract
        if high - low < MAX_ALPHABET:
            ways.append((0.0, "symbols", low, lambda: [_minus(words, low)]))
    if words.dtype.itemsize > 1:
        word = _word(words.dtype)
        dense = byte_planes(words.view(word))
        places: Words = words.view(np.uint8).reshape(-1, words.dtype.itemsize).max(axis=1) != 0
        ways.append((_estimate(dense), "planes", 0, lambda: dense))
        stored = int(places.sum())
        if stored < words.size:
            parts = [places, *byte_planes(words[places].view(word))]
            ways.append((_estimate(parts), "sparse", stored, lambda: parts))
    least = min((w[0] for w in ways if w[1] != "symbols"), default=0.0)
    made = [
        (layout, number, [_encode(part, coder) for part in parts()])
        for estimate, layout, number, parts in ways
        if estimate <= _SURE * least or layout == "symbols"
    ]
    return min(made, key=lambda m: sum(len(data) for _, data in m[2]))


def _minus(words: Words, low: int) -> Words:
    """Modulo the range of their type."""
    if not low:
        return words
    kind = np.dtype(f"u{words.dtype.itemsize}")
    shifted: Words = words.view(kind) - kind.type(low % (1 << 8 * kind.itemsize))
    return shifted


def _estimate(planes: Sequence[Words]) -> float:
    """Bits by order-0 entropy."""
    counts = (np.bincount(plane.view(np.uint8), minlength=2) for plane in planes)
    return float(sum((n[n > 0] * np.log2(n.sum() / n[n > 0])).sum() for n in counts))


def decode_array(array: Array, read: Callable[[int], bytes]) -> Words:
    """Inverse of ``encode_array``. Allocates what the description says: the caller must agree to that.

    Args:
        array: a checked description.
        read: gives the next stream, for its length; untrusted bytes.

    Returns:
        (count,) words of the carrier type.

    Raises:
        ValueError: the streams are not what the description says.
    """
    words, start = np.empty(array.count, dtype=CARRIERS[array.dtype]), 0
    for block, count in zip(array.blocks, array.extents(), strict=True):
        words[start : start + count] = _decode_block(block, count, words.dtype, read)
        start += count
    return words


def _decode_block(block: Block, count: int, kind: np.dtype[Any], read: Callable[[int], bytes]) -> Words:
    coded = ((read(stream.length), stream.coder) for stream in block.streams)
    if block.layout == "symbols":
        ((data, coder),) = coded
        alphabet = _limits(kind)[1] - block.number + 1
        symbols = decode(data, count, coder, np.uint16 if block.number else kind, alphabet=alphabet)
        return _minus(symbols.astype(kind, copy=False), -block.number).view(kind)
    places = None
    if block.layout == "sparse":
        places = decode(*_first(coded, count), np.bool_)
        if int(places.sum()) != block.number:
            raise ValueError(f"{int(places.sum())} places for {block.number} stored elements")
    word = _word(kind)
    number = (count if places is None else block.number) * (kind.itemsize // word.itemsize)
    planes = [decode(data, number, coder, np.uint8) for data, coder in coded]
    values: Words = from_byte_planes(planes, word, (number,)).view(kind)
    if places is None:
        return values
    words = np.zeros(count, dtype=kind)
    words[places] = values
    return words


def _first(coded: Any, count: int) -> tuple[bytes, int, str]:
    data, coder = next(coded)
    return data, count, coder


def _encode(symbols: Words, coder: str) -> tuple[str, bytes]:
    fits = coder == "auto" or not symbols.size or int(symbols.max()) < CODERS[coder].alphabet
    return encode(symbols, coder if fits else "auto")


def _word(kind: np.dtype[Any]) -> np.dtype[Any]:
    """The word whose bytes are the planes; a complex number is two words."""
    return np.dtype(_PLANE_WORDS[kind.itemsize // 2 if kind.kind == "c" else kind.itemsize])


def _limits(kind: np.dtype[Any]) -> tuple[int, int]:
    return (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
