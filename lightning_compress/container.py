"""The bytes of an `.lcz` file: prefix, header, payload, checksum, and every check that needs no model.

docs/file-format.md describes them. A header is data: nothing in it names code to import, and what it declares
is checked before anything of that size is allocated. Functions here raise ValueError; `naming` turns that into
an `ArchiveError`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lightning_compress.functional.arrays import MAX_POOLED, Array, Words, decode_array, encode_array, typed

MAGIC = b"\x89LCZ\r\n\x1a\n"
VERSION = (1, 0)
MAX_HEADER = 64 << 20  # bytes, inflated
MAX_DEPTH = 32
MAX_MARKS = 1 << 22  # commas, quotes and opening brackets: they bound what parsing allocates
_PREFIX = struct.Struct("<8sHHIQQ")  # magic, major, minor, flags, header length, payload length
_INFLATED = struct.Struct("<I")
_DIGEST = hashlib.sha256().digest_size
_CHUNK = 1 << 20
# Fields of a code may take so many bytes for each element of its tensor, and so many more.
_FIELD_BYTES, _FIELD_SPARE = 16, 1 << 16


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


@dataclass(frozen=True)
class Coded:
    """A tensor that is stored as the fields of its code.

    Args:
        tensor: name, dtype and shape; it has no streams of its own.
        kind: of the code.
        param: name of the parameter inside the layer that carries the code.
        config: options of the code.
        arrays: fields of the code.
    """

    tensor: Array
    kind: str
    param: str
    config: dict[str, Any]
    arrays: tuple[Array, ...]

    @property
    def layer(self) -> str:
        """Name of the layer that carries the code."""
        return self.tensor.name.removesuffix(self.param).removesuffix(".")

    def to_json(self) -> list[Any]:
        """``[name, dtype, shape, kind, param, config, fields]``."""
        arrays = [array.to_json() for array in self.arrays]
        return [*self.tensor.to_json(), self.kind, self.param, self.config, arrays]

    @classmethod
    def from_json(cls, value: Any) -> Coded:
        """Inverse of `to_json`; ValueError if malformed, or with fields out of proportion to the tensor."""
        parts = typed(value, list, "a coded tensor")
        if len(parts) != 7:
            raise ValueError(f"a coded tensor has {len(parts)} parts, not 7: {parts!r:.60}")
        tensor = Array.described(*parts[:3])
        arrays = tuple(Array.from_json(array) for array in typed(parts[6], list, f"{tensor.name!r}: fields"))
        _unique([array.name for array in arrays], f"{tensor.name!r}: field")
        needed, most = sum(a.nbytes for a in arrays), _FIELD_BYTES * tensor.count + _FIELD_SPARE
        if needed > most:
            raise ValueError(
                f"{tensor.name!r}: code of {needed} bytes for {tensor.count} elements; at most {most}"
            )
        kind, param = (typed(text, str, f"{tensor.name!r}: kind or param") for text in parts[3:5])
        return cls(tensor, kind, param, typed(parts[5], dict, f"{tensor.name!r}: config"), arrays)


@dataclass(frozen=True)
class Header:
    """All of a file but the streams.

    Args:
        library: name of the writer.
        coded: tensors that are stored through a code.
        tensors: those stored as they are.
        pools: streams that small arrays share; name: field of a code, or "" for tensors.
        aliases: other name of a tied tensor -> the name it is stored under.
        skipped: entry of the state dict that is not stored -> reason.
        stale: tensor whose code did not fit it -> reason.
        applied: (submodule, step as JSON), in order.
        metadata: the caller's.
    """

    library: str
    coded: tuple[Coded, ...]
    tensors: tuple[Array, ...]
    pools: tuple[Array, ...]
    aliases: dict[str, str]
    skipped: dict[str, str]
    stale: dict[str, str]
    applied: tuple[tuple[str, dict[str, Any]], ...]
    metadata: Any
    payload_bytes: int = field(default=0, compare=False)

    @property
    def described(self) -> list[Array]:
        """Name, dtype and shape of every stored tensor."""
        return [*(coded.tensor for coded in self.coded), *self.tensors]

    def to_json(self) -> dict[str, Any]:
        """One key for each attribute that is compared."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return values | {name: [v.to_json() for v in values[name]] for name in ("coded", "tensors", "pools")}

    @classmethod
    def from_json(cls, value: Any) -> Header:
        """Inverse of `to_json`; ValueError if it is malformed or its parts contradict each other."""
        given, known = typed(value, dict, "the header"), {f.name for f in fields(cls) if f.compare}
        if given.keys() != known:
            raise ValueError(f"the header lacks, or has unknown, keys: {sorted(given.keys() ^ known)!s:.200}")
        listed = {name: typed(given[name], list, name) for name in ("coded", "tensors", "pools", "applied")}
        tables = {name: typed(given[name], dict, name) for name in ("aliases", "skipped", "stale")}
        for name, table in tables.items():
            for text in table.values():
                typed(text, str, f"an entry of {name}")
        steps = [typed(step, list, "an applied step") for step in listed["applied"]]
        if any(len(step) != 2 for step in steps):
            raise ValueError("an applied step is no pair of submodule and step")
        applied = tuple((typed(a, str, "a submodule"), typed(b, dict, "an applied step")) for a, b in steps)

        coded = [Coded.from_json(v) for v in listed["coded"]]
        tensors, pools = ([Array.from_json(v) for v in listed[name]] for name in ("tensors", "pools"))
        names = [array.name for array in (*(c.tensor for c in coded), *tensors)]
        _unique([*names, *tables["aliases"]], "tensor")
        if lost := set(tables["aliases"].values()) - set(names):
            raise ValueError(f"tied to tensors that are not stored: {sorted(lost)!s:.200}")
        place = _Placer(pools)
        coded = [replace(c, arrays=tuple(place(a, a.name) for a in c.arrays)) for c in coded]
        tensors, pools = [place(a, "") for a in tensors], [place(a, "") for a in pools]
        place.check_pools()
        return cls(
            library=typed(given["library"], str, "library"),
            coded=tuple(coded),
            tensors=tuple(tensors),
            pools=tuple(pools),
            aliases=tables["aliases"],
            skipped=tables["skipped"],
            stale=tables["stale"],
            applied=applied,
            metadata=given["metadata"],
            payload_bytes=place.payload,
        )


class _Placer:
    """Goes through payload and pools, array by array, and notes where each begins."""

    def __init__(self, pools: Sequence[Array]) -> None:
        self.payload = 0
        self._sizes = {(p.dtype, p.name): p.count for p in pools}
        self._taken: Counter[tuple[str, str]] = Counter()
        if len(self._sizes) != len(pools) or any(p.layout == "pool" for p in pools):
            raise ValueError("two pools of one dtype and name, or a pool without streams")

    def __call__(self, array: Array, pool: str) -> Array:
        if array.layout == "pool":
            start = self._taken[array.dtype, pool]
            self._taken[array.dtype, pool] += array.count
        else:
            start = self.payload
            self.payload += array.stored_bytes
        return replace(array, offset=start)

    def check_pools(self) -> None:
        if self._sizes != dict(self._taken):
            raise ValueError(
                f"pools of {self._sizes!s:.200} elements, of which {dict(self._taken)!s:.200} are taken"
            )


def _unique(names: Sequence[str], what: str) -> None:
    name, count = next(iter(Counter(names).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"{what} {name!r} is declared {count} times")


class Payload:
    """Collects streams; arrays must be stored in the order in which the header lists them.

    Args:
        coder: "auto" or a key of ``CODERS``.
    """

    def __init__(self, coder: str) -> None:
        self.coder = coder
        self.chunks: list[bytes] = []
        self._pooled: dict[tuple[str, str], list[Words]] = {}

    def store(self, name: str, dtype: str, shape: tuple[int, ...], words: Words, *, pool: str) -> Array:
        """Encode one array, or put it into a pool when it is small."""
        if words.nbytes < MAX_POOLED:
            self._pooled.setdefault((dtype, pool), []).append(words)
            return Array(name, dtype, shape)
        array, streams = encode_array(name, dtype, shape, words, self.coder)
        self.chunks += streams
        return array

    def pools(self) -> tuple[Array, ...]:
        """Encode the pools, after everything else."""
        made = []
        for (dtype, name), parts in self._pooled.items():
            words = np.concatenate(parts)
            array, streams = encode_array(name, dtype, words.shape, words, self.coder)
            self.chunks += streams
            made.append(array)
        return tuple(made)


def write(file: BinaryIO, header: Header, chunks: Sequence[bytes]) -> None:
    """Write a whole file; ValueError or TypeError if the header is no JSON, or more than a reader takes."""
    options: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    text = json.dumps(header.to_json(), allow_nan=False, **options).encode()
    _check_text(text)
    packed = _INFLATED.pack(len(text)) + zlib.compress(text, 9)
    prefix = _PREFIX.pack(MAGIC, *VERSION, 0, len(packed), sum(map(len, chunks)))
    digest = hashlib.sha256()
    for part in (prefix, packed, *chunks):
        digest.update(part)
        file.write(part)
    file.write(digest.digest())
    file.flush()


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
    """A file whose prefix, lengths, checksum and header are sound (or ValueError); decodes array by array."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pools: dict[tuple[str, str], Words] = {}
        self.file_bytes = os.fstat(file.fileno()).st_size
        file.seek(0)
        prefix = file.read(_PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC:
            raise ValueError("no .lcz file, or its first bytes are damaged")
        if len(prefix) < _PREFIX.size:
            raise ValueError(f"the file ends after {len(prefix)} bytes")
        _, major, minor, flags, packed, payload = _PREFIX.unpack(prefix)
        self.version = f"{major}.{minor}"
        if major != VERSION[0] or flags:
            raise ValueError(
                f"format {self.version} with flags {flags}; this library reads {VERSION[0]}.x with flags 0"
            )
        self._payload = _PREFIX.size + packed
        end = self._payload + payload
        if end + _DIGEST != self.file_bytes:
            raise ValueError(
                f"{self.file_bytes} bytes, but its lengths make {end + _DIGEST}: truncated or extended"
            )
        digest = hashlib.sha256()
        for start in range(0, end, _CHUNK):
            digest.update(self._read(start, min(_CHUNK, end - start)))
        if digest.digest() != self._read(end, _DIGEST):
            raise ValueError("the SHA-256 at its end does not fit: damaged")
        self.header = Header.from_json(self._parse(packed))
        if self.header.payload_bytes != payload:
            raise ValueError(f"streams of {self.header.payload_bytes} bytes in a payload of {payload}")

    def words(self, array: Array, *, pool: str) -> Words:
        """Decode one array of the header; ``pool`` names the pool that it may lie in."""
        if array.layout == "pool":
            if (array.dtype, pool) not in self._pools:
                whole = next(p for p in self.header.pools if (p.dtype, p.name) == (array.dtype, pool))
                self._pools[array.dtype, pool] = self.words(whole, pool="")
            return self._pools[array.dtype, pool][array.offset : array.offset + array.count].copy()
        lengths = [length for _, length in array.streams]
        ends = itertools.accumulate(lengths, initial=self._payload + array.offset)
        return decode_array(array, [self._read(*part) for part in zip(ends, lengths, strict=False)])

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(length)
        if len(data) != length:
            raise ValueError("it became shorter while it was read")
        return data

    def _parse(self, packed: int) -> Any:
        if not _INFLATED.size <= packed <= MAX_HEADER:
            raise ValueError(f"a header of {packed} bytes; allowed are {_INFLATED.size} to {MAX_HEADER}")
        data = self._read(_PREFIX.size, packed)
        (length,) = _INFLATED.unpack_from(data)
        if length > MAX_HEADER:
            raise ValueError(f"a header that inflates to {length} bytes; allowed are {MAX_HEADER}")
        inflater = zlib.decompressobj()
        try:
            text = inflater.decompress(data[_INFLATED.size :], length + 1)
        except zlib.error as error:
            raise ValueError(f"the header does not inflate: {error}") from None
        if len(text) != length or not inflater.eof or inflater.unused_data:
            raise ValueError(f"the header does not inflate to its {length} bytes")
        _check_text(text)
        return json.loads(text.decode("utf-8"), parse_constant=_no_constant)


def _check_text(text: bytes) -> None:
    """Bounds on what parsing may cost: size, number of values, depth."""
    marks = sum(map(text.count, (b",", b'"', b"[", b"{")))
    if len(text) > MAX_HEADER or marks > MAX_MARKS:
        raise ValueError(
            f"a header of {len(text)} bytes, {marks} marks; allowed are {MAX_HEADER}, {MAX_MARKS}"
        )
    bare = re.sub(rb'"(?:[^"\\]++|\\.)*+"', b"", text, flags=re.DOTALL)  # brackets in strings do not count
    steps = (1 if bracket in b"[{" else -1 for bracket in re.findall(rb"[][{}]", bare))
    depth = max(itertools.accumulate(steps), default=0)
    if depth > MAX_DEPTH:
        raise ValueError(f"the header nests {depth} deep; allowed are {MAX_DEPTH}")


def _no_constant(name: str) -> None:
    raise ValueError(f"the header holds {name}, which is no JSON")
