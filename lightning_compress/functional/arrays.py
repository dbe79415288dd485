"""Arrays as coded streams: the shortest of several layouts, and a description to check before decoding.

Layouts:

- ``symbols``: integers minus the smallest of them, one stream.
- ``planes``: the byte planes of ``lightning_compress.functional.entropy.byte_planes``, one stream each.
- ``sparse``: which elements have a bit that is not zero, as one stream, then the planes of these elements.
- ``pool``: none of its own; the elements follow in a pool that many small arrays share.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.entropy import CODERS, byte_planes, decode, encode, from_byte_planes
from lightning_compress.functional.frequencies import MAX_ALPHABET

# dtype -> numpy type of the same width that carries its bits, little endian
CARRIERS = {
    **{"bool": "?", "uint8": "u1", "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8"},
    **{"uint16": "<u2", "uint32": "<u4", "uint64": "<u8", "float8_e4m3fn": "u1", "float8_e5m2": "u1"},
    **{"float16": "<u2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"},
    **{"complex64": "<c8", "complex128": "<c16"},
}
MAX_POOLED = 1 << 12  # only arrays of fewer bytes may lie in a pool
_PLANE_WORDS = {1: "u1", 2: "<u2", 4: "<f4", 8: "<f8"}
_MAX_COUNT = 1 << 48
_MAX_DIMS = 32
_MAX_EXPANSION, _SPARE = (
    16,
    64,
)  # a stream that is coded badly has so many bytes for each one of the array, and more

Words = npt.NDArray[Any]
T = TypeVar("T")


def typed(value: Any, kind: type[T], what: str) -> T:
    """An untrusted JSON value, if it has the expected type.

    Args:
        value: what was read.
        kind: str, int, list or dict.
        what: how the error calls it.

    Returns:
        The value.

    Raises:
        ValueError: it has another type; True is no int.

    Examples:
        >>> typed(3, int, "length")
        3
    """
    if type(value) is not kind:
        raise ValueError(f"{what} is {value!r:.60}, which is no {kind.__name__}")
    return value


@dataclass(frozen=True)
class Array:
    """How one array is stored.

    Args:
        name: what it is, unique among its neighbours.
        dtype: key of ``CARRIERS``.
        shape: extents.
        layout: see the top of this file.
        number: "symbols": what was subtracted; "sparse": how many elements are stored; otherwise 0.
        crc32: of the decoded bytes, little endian.
        streams: (coder, length in bytes) of each stream.
        offset: where it begins: byte of the payload, or element of the pool. Not stored: it follows from the
            arrays before.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str = "pool"
    number: int = 0
    crc32: int = 0
    streams: tuple[tuple[str, int], ...] = ()
    offset: int = field(default=0, compare=False)

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.count * np.dtype(CARRIERS[self.dtype]).itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of its own streams."""
        return sum(length for _, length in self.streams)

    def to_json(self) -> list[Any]:
        """``[name, dtype, shape]``; unless pooled also ``layout, number, crc32, [coder, length, ...]``."""
        own = [self.layout, self.number, self.crc32, [part for stream in self.streams for part in stream]]
        return [self.name, self.dtype, list(self.shape), *(own if self.layout != "pool" else ())]

    @classmethod
    def from_json(cls, value: Any) -> Array:
        """Inverse of ``to_json``, with every check that the description alone allows.

        Args:
            value: untrusted.

        Returns:
            The description.

        Raises:
            ValueError: a part is missing, of a wrong type, unknown or out of range; names the array.
        """
        parts = typed(value, list, "the description of an array")
        if len(parts) not in (3, 7):
            raise ValueError(f"the description of an array has {len(parts)} parts, not 3 or 7: {parts!r:.60}")
        array = cls.described(*parts[:3])
        if len(parts) == 3:
            if array.nbytes >= MAX_POOLED:
                raise ValueError(
                    f"{array.name!r}: {array.nbytes} bytes; in a pool allowed are {MAX_POOLED - 1}"
                )
            return array
        name = array.name
        layout, number = typed(parts[3], str, f"{name!r}: layout"), typed(parts[4], int, f"{name!r}: number")
        crc32, flat = typed(parts[5], int, f"{name!r}: crc32"), typed(parts[6], list, f"{name!r}: streams")
        coders = [typed(c, str, f"{name!r}: coder") for c in flat[::2]]
        lengths = [typed(n, int, f"{name!r}: length") for n in flat[1::2]]
        if len(coders) != len(lengths):
            raise ValueError(f"{name!r}: a stream has no length")
        streams = tuple(zip(coders, lengths, strict=True))
        array = replace(array, layout=layout, number=number, crc32=crc32, streams=streams)
        array._check()
        return array

    @classmethod
    def described(cls, name: Any, dtype: Any, shape: Any) -> Array:
        """Name, dtype and shape alone, checked.

        Args:
            name: untrusted.
            dtype: untrusted.
            shape: untrusted.

        Returns:
            A description without streams.

        Raises:
            ValueError: one of them is of a wrong type, unknown or impossible.
        """
        name = typed(name, str, "the name of an array")
        if typed(dtype, str, f"{name!r}: dtype") not in CARRIERS:
            raise ValueError(f"{name!r}: unknown dtype {dtype!r:.60}; known: {', '.join(CARRIERS)}")
        extents = tuple(typed(n, int, f"{name!r}: extent") for n in typed(shape, list, f"{name!r}: shape"))
        possible = len(extents) <= _MAX_DIMS and all(0 <= n < _MAX_COUNT for n in extents)
        if not possible or math.prod(extents) >= _MAX_COUNT:
            raise ValueError(f"{name!r}: impossible shape {shape!s:.80}")
        return cls(name, dtype, extents)

    def _check(self) -> None:
        kind = np.dtype(CARRIERS[self.dtype])
        words = _word(kind).itemsize
        allowed: dict[str, tuple[int, int, int]] = {}  # layout -> streams, smallest and largest number
        if kind.kind in "iub":
            allowed["symbols"] = 1, *_limits(kind)
        if kind.itemsize > 1:
            allowed |= {"planes": (words, 0, 0), "sparse": (1 + words, 0, self.count)}
        if self.layout not in allowed:
            raise ValueError(
                f"{self.name!r}: layout {self.layout!r}; allowed for {self.dtype}: {', '.join(allowed)}"
            )
        streams, least, most = allowed[self.layout]
        if len(self.streams) != streams:
            raise ValueError(f"{self.name!r}: {len(self.streams)} streams; {self.layout!r} has {streams}")
        if not least <= self.number <= most:
            raise ValueError(f"{self.name!r}: number {self.number}; {self.layout!r} allows {least} to {most}")
        longest = _MAX_EXPANSION * self.nbytes + _SPARE
        for coder, length in self.streams:
            if coder not in CODERS:
                raise ValueError(f"{self.name!r}: unknown coder {coder!r}; known: {', '.join(CODERS)}")
            if not 0 <= length <= longest:
                raise ValueError(f"{self.name!r}: a stream of {length} bytes; allowed are {longest}")


def encode_array(
    name: str, dtype: str, shape: Sequence[int], words: Words, coder: str = "auto"
) -> tuple[Array, list[bytes]]:
    """Store an array in the layout that takes the fewest bytes.

    Args:
        name: what it is.
        dtype: key of ``CARRIERS``.
        shape: extents.
        words: (count,) contiguous, of the carrier type.
        coder: "auto", or a key of ``CODERS``; streams beyond its alphabet take "auto".

    Returns:
        The description and its streams.

    Examples:
        >>> words = np.where(np.arange(6000) % 20, 0, np.arange(6000)).astype(np.float32)
        >>> array, streams = encode_array("weight", "float32", (60, 100), words)
        >>> array.layout, array.number, bool((decode_array(array, streams) == words).all())
        ('sparse', 299, True)
    """
    made: list[tuple[str, int, list[tuple[str, bytes]]]] = []
    if words.dtype.kind in "iub":
        low, high = (int(words.min()), int(words.max())) if words.size else (0, 0)
        if high < 256 and low > 0:
            low = 0  # as short, and nothing to subtract
        if high - low < MAX_ALPHABET:
            shifted = words.astype(np.uint64) - np.uint64(low % (1 << 64)) if low else words  # modulo 2^64
            made.append(("symbols", low, [_encode(shifted, coder)]))
    if words.dtype.itemsize > 1:
        word = _word(words.dtype)
        made.append(("planes", 0, [_encode(plane, coder) for plane in byte_planes(words.view(word))]))
        places: Words = words.view(np.uint8).reshape(-1, words.dtype.itemsize).max(axis=1) != 0
        if not places.all():
            parts = [places, *byte_planes(words[places].view(word))]
            made.append(("sparse", int(places.sum()), [_encode(part, coder) for part in parts]))
    layout, number, coded = min(made, key=lambda m: sum(len(data) for _, data in m[2]))
    streams = tuple((used, len(data)) for used, data in coded)
    array = Array(name, dtype, tuple(shape), layout, number, zlib.crc32(words.data), streams)
    return array, [data for _, data in coded]


def decode_array(array: Array, streams: Sequence[bytes]) -> Words:
    """Inverse of ``encode_array``. Allocates what the description says: the caller must agree to that.

    Args:
        array: a checked description.
        streams: the bytes of each stream, untrusted.

    Returns:
        (count,) words of the carrier type.

    Raises:
        ValueError: the streams are not what the description says.
    """
    kind = np.dtype(CARRIERS[array.dtype])
    coded = [(data, coder) for data, (coder, _) in zip(streams, array.streams, strict=True)]
    if array.layout == "symbols":
        alphabet = _limits(kind)[1] - array.number + 1
        ((data, coder),) = coded
        words = decode(data, array.count, coder, np.uint16 if array.number else kind, alphabet=alphabet)
        if array.number:
            words = (words + np.uint64(array.number % (1 << 64))).astype(kind)
    else:
        sparse = array.layout == "sparse"
        count, word = array.number if sparse else array.count, _word(kind)
        number = count * (kind.itemsize // word.itemsize)
        planes = [decode(data, number, coder, np.uint8) for data, coder in coded[sparse:]]
        words = from_byte_planes(planes, word, (number,)).view(kind)
        if sparse:
            places = decode(coded[0][0], array.count, coded[0][1], np.bool_)
            if int(places.sum()) != count:
                raise ValueError(f"{int(places.sum())} places for {count} stored elements")
            values, words = words, np.zeros(array.count, dtype=kind)
            words[places] = values
    if zlib.crc32(words.data) != array.crc32:
        raise ValueError("the decoded bytes do not have the stored CRC-32")
    return words


def _encode(symbols: Words, coder: str) -> tuple[str, bytes]:
    fits = coder == "auto" or not symbols.size or int(symbols.max()) < CODERS[coder].alphabet
    return encode(symbols, coder if fits else "auto")


def _word(kind: np.dtype[Any]) -> np.dtype[Any]:
    """The word whose bytes are the planes; a complex number is two words."""
    return np.dtype(_PLANE_WORDS[kind.itemsize // 2 if kind.kind == "c" else kind.itemsize])


def _limits(kind: np.dtype[Any]) -> tuple[int, int]:
    return (0, 1) if kind.kind == "b" else (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
