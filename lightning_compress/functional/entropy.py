"""Lossless coding of integer symbols: the streams of an `.lcz` archive.

`encode` turns symbols 0..65535 into bytes; `decode` turns them back and refuses whatever is not a complete,
valid stream. `CODERS` lists the coders, simplest first; a new one is one entry there. Below this file:
`coders`, `huffman` and `contextual` (the byte formats), `frequencies` (models and their tables), `planes`
(floating-point words as bytes).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.functional import coders, contextual, huffman
from lightning_compress.functional.frequencies import MAX_ALPHABET
from lightning_compress.functional.planes import byte_planes, from_byte_planes

__all__ = [
    "CODERS",
    "Coder",
    "byte_planes",
    "decode",
    "encode",
    "entropy_bits",
    "from_byte_planes",
    "gaps_decode",
    "gaps_encode",
]

Array = npt.NDArray[Any]

_PROBE = 1 << 14  # symbols that "auto" tries on lzma before it spends time on a longer stream


@dataclass(frozen=True)
class Coder:
    """A pair of inverse functions, for at least one symbol.

    Args:
        encode: Symbols (count,) as uint8, or uint16 if one exceeds 255 → bytes.
        decode: (bytes, count) → pieces of the symbols in order; raises ValueError on invalid bytes.
        alphabet: Symbols must be below this.
        automatic: Whether "auto" tries it.
        slow: Whether "auto" tries it on a long stream only if a part of that shows repetitions.
    """

    encode: Callable[[Array], bytes]
    decode: Callable[[bytes, int], Iterator[Array]]
    alphabet: int = MAX_ALPHABET
    automatic: bool = True
    slow: bool = False


CODERS: dict[str, Coder] = {
    "raw": Coder(coders.raw_encode, coders.raw_decode),
    "bitpack": Coder(coders.bitpack_encode, coders.bitpack_decode),
    # Whole bits; what its table is shorter than that of "ans", "adaptive" saves too.
    "huffman": Coder(huffman.huffman_encode, huffman.huffman_decode, automatic=False),
    "ans": Coder(partial(coders.static_encode, coder="ans"), partial(coders.static_decode, coder="ans")),
    # Never more than a word shorter than "ans".
    "range": Coder(
        partial(coders.static_encode, coder="range"),
        partial(coders.static_decode, coder="range"),
        automatic=False,
    ),
    "adaptive": Coder(contextual.adaptive_encode, contextual.adaptive_decode),
    "gaps": Coder(coders.gaps_encode, coders.gaps_decode, alphabet=2),
    "zlib": Coder(coders.zlib_encode, coders.zlib_decode, slow=True),
    "lzma": Coder(coders.lzma_encode, coders.lzma_decode, slow=True),
}


def encode(symbols: npt.ArrayLike, coder: str = "auto") -> tuple[str, bytes]:
    """Encode integers without loss.

    "auto" encodes with all coders and keeps the smallest result; ties go to the simpler coder, which stands
    first in `CODERS`. Exceptions save time: "huffman" and "range" are left out, which hardly ever are below all
    others, and streams above 16,384 symbols go to the slow coders only if lzma takes four blocks of 4,096 symbols
    below their order-0 entropy, for without repetitions they lose to "ans". The result is never longer than that
    of "raw".

    Args:
        symbols: Integers or booleans in 0..65535 of any shape, read in row-major order.
        coder: "auto" or a key of `CODERS`.

    Returns:
        The name of the coder that was used, and the bytes. No symbols give no bytes.

    Raises:
        ValueError: If the coder is unknown, or symbols are not integers or not in the coder's alphabet.

    Examples:
        >>> name, data = encode(np.array([5, 7, 5, 5] * 3))
        >>> name, len(data), decode(data, 12, name).tolist()[:4]
        ('adaptive', 5, [5, 7, 5, 5])

    References:
        Huffman, "A method for the construction of minimum-redundancy codes", 1952; Duda, "Asymmetric numeral
        systems", 2013 (ans); Martin, "Range encoding", 1979 (range, adaptive).
    """
    if coder != "auto" and coder not in CODERS:
        raise ValueError(f"unknown coder {coder!r}; allowed are 'auto', {', '.join(map(repr, CODERS))}.")
    array = _as_symbols(symbols)
    highest = int(array.max(initial=0))
    if coder != "auto":
        allowed = CODERS[coder].alphabet
        if highest >= allowed:
            raise ValueError(f"coder {coder!r} takes symbols 0..{allowed - 1}, got {highest}.")
        return coder, CODERS[coder].encode(array) if array.size else b""
    if not array.size:
        return "raw", b""
    slow = _repetitive(array)
    suitable = {
        name: entry
        for name, entry in CODERS.items()
        if entry.automatic and highest < entry.alphabet and (slow or not entry.slow)
    }
    results = ((name, entry.encode(array)) for name, entry in suitable.items())
    return min(results, key=lambda result: len(result[1]))


def decode(
    data: bytes, count: int, coder: str, dtype: npt.DTypeLike = np.uint16, *, alphabet: int = MAX_ALPHABET
) -> Array:
    """Decode what `encode` wrote, and nothing else.

    Whatever the bytes claim, it takes the memory of the result, a small multiple of the data, and constant
    buffers; "gaps" takes up to three times that of a boolean result.

    Args:
        data: The encoded bytes, untrusted.
        count: How many symbols they hold, ≥ 0. The caller checks it against what it is willing to allocate.
        coder: A key of `CODERS`.
        dtype: Integer or boolean type of the result.
        alphabet: Symbols must be below this, and fit the dtype.

    Returns:
        (count,) symbols.

    Raises:
        ValueError: If coder, count or dtype is not allowed, or the bytes are truncated, too long, corrupt
            or forged. Damage may also decode to other symbols, as most coders carry no checksum: keep one.

    Examples:
        >>> decode(encode([1, 0, 2], "ans")[1], 3, "ans").tolist()
        [1, 0, 2]
        >>> decode(b"12", 3, "raw")
        Traceback (most recent call last):
        ...
        ValueError: raw: 2 bytes for 3 symbols of one or two bytes
    """
    if coder not in CODERS:
        raise ValueError(f"unknown coder {coder!r}; allowed are {', '.join(map(repr, CODERS))}.")
    kind, count = np.dtype(dtype), operator.index(count)
    if kind.kind not in "iub":
        raise ValueError(f"{coder}: dtype must be an integer or boolean type, got {kind}.")
    if count < 0:
        raise ValueError(f"{coder}: count must be >= 0, got {count}.")
    if data and not count:
        raise ValueError(f"{coder}: {len(data)} bytes for no symbols")
    limit = min(alphabet, CODERS[coder].alphabet, 2 if kind.kind == "b" else int(np.iinfo(kind).max) + 1)
    try:
        out = np.empty(count, dtype=kind)
    except MemoryError as error:
        raise ValueError(f"{coder}: {count} symbols of type {kind} do not fit into memory") from error
    filled = 0
    for piece in CODERS[coder].decode(bytes(data), count) if count else ():
        if piece.size > count - filled:
            raise ValueError(f"{coder}: more than {count} symbols")
        if piece.size and int(piece.max()) >= limit:
            raise ValueError(f"{coder}: symbol {int(piece.max())}, the highest allowed is {limit - 1}")
        out[filled : filled + piece.size] = piece
        filled += piece.size
    if filled != count:
        raise ValueError(f"{coder}: {filled} symbols instead of {count}")
    return out


def entropy_bits(symbols: npt.ArrayLike) -> float:
    """Order-0 empirical entropy of all symbols together, in bits: Σ_s n_s log2(n / n_s).

    Args:
        symbols: Integers of any shape and sign.

    Returns:
        Bits for the whole array; 0 for an empty or constant one.

    Examples:
        >>> entropy_bits([0, 1, 0, 1])
        4.0

    References:
        Shannon, "A mathematical theory of communication", 1948.
    """
    counts = np.unique(np.asarray(symbols), return_counts=True)[1]
    return float(np.sum(counts * np.log2(counts.sum() / counts))) if counts.size else 0.0


def gaps_encode(mask: npt.ArrayLike, bits: int | None = None) -> bytes:
    """Encode the positions of True as distances between them, in symbols of b bits.

    Symbol s < 2^b − 1 stands for s times False and then True, the filler 2^b − 1 for 2^b − 1 times False.
    What follows the last True is not stored. The symbols are entropy-coded or bit-packed, whichever is
    shorter.

    Layout: one byte b, plus 128 if bit-packed; one byte l; l bytes, the number of symbols (little endian);
    the symbols as "ans" or "bitpack".

    Args:
        mask: Booleans of any shape, read in row-major order.
        bits: b in 1..16; None tries all that can differ and keeps the shortest result.

    Returns:
        The bytes; to decode them takes the number of elements too.

    Raises:
        ValueError: If the mask is not boolean or `bits` is outside 1..16.

    Examples:
        >>> mask = np.arange(10_000) % 500 == 3
        >>> data = gaps_encode(mask)
        >>> len(data) < 20, bool((gaps_decode(data, 10_000) == mask).all())
        (True, True)

    References:
        Han, Mao, Dally, "Deep compression", 2016, section 2.
    """
    array = np.asarray(mask).reshape(-1)
    if array.dtype != bool:
        raise ValueError(f"gaps: the mask must be boolean, got {array.dtype}.")
    if bits is not None and not 1 <= bits <= 16:
        raise ValueError(f"gaps: bits must be in 1..16, got {bits}.")
    return coders.gaps_encode(array, bits) if array.size else b""


def gaps_decode(data: bytes, count: int) -> npt.NDArray[np.bool_]:
    """Inverse of `gaps_encode`.

    Args:
        data: The encoded bytes, untrusted.
        count: Number of elements of the mask.

    Returns:
        (count,) booleans.

    Raises:
        ValueError: If the bytes are no valid gaps of `count` elements.

    Examples:
        >>> gaps_decode(gaps_encode(np.array([False, True, True])), 3).tolist()
        [False, True, True]
    """
    return decode(data, count, "gaps", dtype=bool)


def _as_symbols(symbols: npt.ArrayLike) -> Array:
    array = np.asarray(symbols).reshape(-1)
    if array.size == 0:
        return np.zeros(0, dtype=np.uint8)
    if array.dtype.kind not in "iub":
        raise ValueError(f"symbols must be integers, got {array.dtype}; quantize first, or use byte_planes.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= MAX_ALPHABET:
        raise ValueError(f"symbols must lie in 0..{MAX_ALPHABET - 1}, got {low}..{high}; shift them first.")
    return array.astype(np.uint8 if high < 256 else np.uint16)


def _repetitive(symbols: Array) -> bool:
    """Whether a coder that finds repetitions may win, judged by a part of a long stream."""
    if symbols.size <= _PROBE:
        return True
    block = _PROBE // 4
    starts = [i * (symbols.size - block) // 3 for i in range(4)]
    sample = np.concatenate([symbols[start : start + block] for start in starts])
    return 8 * len(coders.lzma_encode(sample)) < entropy_bits(sample)
