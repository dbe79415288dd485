"""The bytes of an `.lcz` file: streams first, then the header, and every check that needs no model.

docs/file-format.md describes them. Functions here raise ValueError; `naming` turns that into an `ArchiveError`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import uuid
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from lightning_compress.functional.arrays import MAX_POOLED, Array, Words, decode_array, encode_array
from lightning_compress.functional.headers import CHECK, SEGMENT, Header
from lightning_compress.functional.packing import pack, unpack

MAGIC = b"\x89LCZ"
VERSION = (1, 0)
PREFIX = len(MAGIC) + 2
_LENGTH = 4
TRAILER = _LENGTH + CHECK


class ArchiveError(ValueError):
    """A file that cannot be written, read or loaded into a model; it names file, tensor and reason."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside, and forged files can cause anything, becomes an `ArchiveError`."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = f"{path}: {kind}{error}"
        raise ArchiveError(message if message.endswith((".", "?")) else f"{message}.") from error


class Sink(Protocol):
    """Takes bytes in order."""

    def write(self, data: bytes, /) -> int:
        """Take some."""
        ...


class Writer:
    """Writes a file from front to back: every stream as soon as it is made, then the header.

    Arrays must be stored in the order in which the header lists them.

    Args:
        file: takes the bytes.
        coder: "auto" or a key of ``CODERS``.
    """

    def __init__(self, file: Sink, coder: str) -> None:
        self._file, self._coder = file, coder
        self.written = 0
        self._pooled: dict[tuple[str, str], list[Words]] = {}
        self._segment = _hash()
        self._segment_bytes = 0
        self._checks: list[bytes] = []
        self._write(MAGIC + bytes(VERSION))

    def store(self, name: str, dtype: str, shape: tuple[int, ...], words: Words, *, pool: str) -> Array:
        """Encode and write one array, or put it into a pool when it is small."""
        if words.nbytes >= MAX_POOLED:
            return encode_array(name, dtype, shape, words, self._coder, write=self._stream)
        if words.size:
            self._pooled.setdefault((dtype, pool), []).append(words.copy())
        return Array(name, dtype, shape)

    def finish(self, header: Header) -> None:
        """Write the pools and the header, in which pools and checks are filled in.

        Raises:
            ValueError, TypeError: the header is no JSON, or more than a reader takes.
        """
        pools = []
        for (dtype, name), parts in self._pooled.items():
            words = np.concatenate(parts)
            pools.append(encode_array(name, dtype, words.shape, words, self._coder, write=self._stream))
        if self._segment_bytes:
            self._close()
        packed = pack(replace(header, pools=tuple(pools), checks=tuple(self._checks)).to_bytes())
        end = packed + len(packed).to_bytes(_LENGTH, "little")
        self._write(end + _hash(MAGIC + bytes(VERSION) + end).digest())

    def _stream(self, data: bytes) -> None:
        self._write(data)
        self._segment.update(data)
        self._segment_bytes += len(data)
        if self._segment_bytes >= SEGMENT:
            self._close()

    def _close(self) -> None:
        self._checks.append(self._segment.digest())
        self._segment, self._segment_bytes = _hash(), 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.written += len(data)


def _hash(data: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=CHECK)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of ``path`` unless the block raises."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Reader:
    """A file whose header is sound (or ValueError); decodes array by array.

    Only the segments that hold the streams of an array are read for it, and each is checked before its bytes are used.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pools: dict[tuple[str, str], Words] = {}
        self.file_bytes = file.seek(0, os.SEEK_END)
        prefix = self._read(0, min(PREFIX, self.file_bytes))
        if prefix[: len(MAGIC)] != MAGIC:
            raise ValueError("no .lcz file, or its first bytes are damaged")
        if self.file_bytes < PREFIX + TRAILER:
            raise ValueError(f"the file ends after {self.file_bytes} bytes")
        major, minor = prefix[len(MAGIC) :]
        self.version = f"{major}.{minor}"
        if major != VERSION[0]:
            raise ValueError(f"format {self.version}; this library reads {VERSION[0]}.x")
        trailer = self._read(self.file_bytes - TRAILER, TRAILER)
        self.header_bytes = int.from_bytes(trailer[:_LENGTH], "little")
        self._payload = self.file_bytes - PREFIX - self.header_bytes - TRAILER
        if self._payload < 0:
            raise ValueError("damaged or cut off: the length of its header is more than the file has")
        packed = self._read(PREFIX + self._payload, self.header_bytes)
        if _hash(prefix + packed + trailer[:_LENGTH]).digest() != trailer[_LENGTH:]:
            raise ValueError("damaged or cut off: the check at its end does not fit")
        self.header = Header.from_bytes(unpack(packed))
        if self.header.payload_bytes != self._payload:
            raise ValueError(f"streams of {self.header.payload_bytes} bytes in a payload of {self._payload}")
        self._starts = list(itertools.accumulate(self.header.segments(), initial=0))
        self._held = -1, b""  # the last segment that was read

    def check(self) -> None:
        """Read the whole payload once; ValueError where it is damaged."""
        for number in range(len(self._starts) - 1):
            self._segment(number)

    def words(self, array: Array, *, pool: str) -> Words:
        """Decode one array of the header; ``pool`` names the pool that it may lie in."""
        if array.blocks:
            place = array.offset

            def following(length: int) -> bytes:
                nonlocal place
                place += length
                return self._stream(place - length, length)

            return decode_array(array, following)
        if not array.count:
            return decode_array(array, lambda length: b"")
        if (array.dtype, pool) not in self._pools:
            whole = next(p for p in self.header.pools if (p.dtype, p.name) == (array.dtype, pool))
            self._pools[array.dtype, pool] = self.words(whole, pool="")
        return self._pools[array.dtype, pool][array.offset : array.offset + array.count].copy()

    def _stream(self, start: int, length: int) -> bytes:
        if not length:
            return b""
        number = bisect_right(self._starts, start) - 1
        begin = start - self._starts[number]
        return self._segment(number)[begin : begin + length]

    def _segment(self, number: int) -> bytes:
        if self._held[0] != number:
            start, end = self._starts[number : number + 2]
            self._held = -1, b""
            data = self._read(PREFIX + start, end - start)
            if _hash(data).digest() != self.header.checks[number]:
                raise ValueError(f"damaged: the check of bytes {start} to {end} of its streams does not fit")
            self._held = number, data
        return self._held[1]

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(length)
        if len(data) != length:
            raise ValueError("it became shorter while it was read")
        return data
