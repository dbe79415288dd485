"""What an archive holds, and where each of its bytes went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_compress import tables
from lightning_compress.container import PREFIX, TRAILER, Reader
from lightning_compress.functional.arrays import Array


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an archive.

    Args:
        name: as in the plain model's state dict.
        shape: extents.
        dtype: such as "float32".
        kind: of the code it is stored through, or "raw".
        stored_bytes: of its streams; for a small tensor, its share of the streams of its pool.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    stored_bytes: int


@dataclass(frozen=True)
class StoredPart:
    """Some bytes of the file and what they are for.

    Args:
        part: name of a tensor; "pool" for small arrays together, "prefix", "header" or "check".
        field: of the code, such as "codes", "scale" or "mask"; "" for what is no field.
        coders: of its streams, each once.
        elements: how many elements these are; 0 for what is no array.
        stored_bytes: their number.
    """

    part: str
    field: str
    coders: tuple[str, ...]
    elements: int
    stored_bytes: int


@dataclass(frozen=True)
class ArchiveInfo:
    """What an archive holds, and how large it is.

    Args:
        file_bytes: length of the file.
        dense_bytes: 4 × real numbers in all floating-point and complex tensors, tied ones once: their size as
            dense float32.
        version: of the format.
        tensors: every stored tensor.
        parts: what every byte of the file is for; their bytes sum to ``file_bytes``.
        aliases: other name of a tied tensor -> the name it is stored under.
        applied: (submodule, step as JSON), in order; its options are those that differed from the defaults.
        skipped: entry of the state dict that is not stored -> reason.
        stale: tensor whose code did not fit it any more, so that it is stored as it is -> reason.
        metadata: the caller's.
        unknown: numbers of optional parts of the header that this library does not know.
    """

    file_bytes: int
    dense_bytes: int
    version: str
    tensors: tuple[StoredTensor, ...]
    parts: tuple[StoredPart, ...]
    aliases: dict[str, str]
    applied: tuple[tuple[str, dict[str, Any]], ...]
    skipped: dict[str, str]
    stale: dict[str, str]
    metadata: Any
    unknown: tuple[int, ...]

    @property
    def compression_ratio(self) -> float:
        """``dense_bytes / file_bytes``; above 1 is smaller."""
        return self.dense_bytes / self.file_bytes

    @property
    def size_fraction(self) -> float:
        """``file_bytes / dense_bytes``; NaN for a model without floating-point numbers."""
        return self.file_bytes / self.dense_bytes if self.dense_bytes else float("nan")

    @property
    def size_report(self) -> str:
        """A table of ``parts``: where every byte of the file went."""
        rows = [
            [
                p.part,
                p.field,
                "+".join(p.coders),
                p.elements or None,
                8 * p.stored_bytes / p.elements if p.elements else None,
                p.stored_bytes,
                f"{p.stored_bytes / self.file_bytes:.1%}",
            ]
            for p in self.parts
        ]
        header = ["part", "field", "coders", "elements", "bits each", "bytes", "share"]
        return tables.text(header, [*rows, ["file", "", "", None, None, self.file_bytes, "100.0%"]])

    def __str__(self) -> str:
        shapes = ["×".join(map(str, t.shape)) or "scalar" for t in self.tensors]
        rows = [
            [t.name, s, t.dtype, t.kind, t.stored_bytes] for t, s in zip(self.tensors, shapes, strict=True)
        ]
        lines = [
            f"{self.file_bytes:,} bytes, {self.compression_ratio:.2f} times smaller than dense float32 "
            f"({self.dense_bytes:,} bytes); format {self.version}",
            tables.text(["tensor", "shape", "dtype", "kind", "stored bytes"], rows),
            *(f"applied {step.get('name')}{f' to {part}' if part else ''}" for part, step in self.applied),
            *(f"tied {alias} = {name}" for alias, name in self.aliases.items()),
            *(f"skipped {name}: {why}" for name, why in self.skipped.items()),
            *(f"stale {name}: {why}" for name, why in self.stale.items()),
            *(f"part {number} of the header is not known to this library" for number in self.unknown),
        ]
        return "\n".join(lines)


def describe(reader: Reader) -> ArchiveInfo:
    """The description of a file.

    Args:
        reader: of the file.

    Returns:
        What the header says.
    """
    header = reader.header
    pools = {(pool.dtype, pool.name): pool for pool in header.pools}

    def share(array: Array, pool: str) -> float:
        if array.blocks or not array.count:
            return array.stored_bytes
        whole = pools[array.dtype, pool]
        return whole.stored_bytes * array.count / whole.count

    rows = [(s.tensor, s.kind or "raw", sum(share(*a) for a in s.arrays)) for s in header.tensors]
    floats = [a for a, _, _ in rows if "float" in a.dtype or "complex" in a.dtype]
    return ArchiveInfo(
        file_bytes=reader.file_bytes,
        dense_bytes=4 * sum(a.count * (2 if "complex" in a.dtype else 1) for a in floats),
        version=reader.version,
        tensors=tuple(StoredTensor(a.name, a.shape, a.dtype, kind, round(size)) for a, kind, size in rows),
        parts=tuple(_parts(reader)),
        aliases=header.aliases,
        applied=header.steps,
        skipped=header.skipped,
        stale=header.stale,
        metadata=header.metadata,
        unknown=header.unknown,
    )


def _parts(reader: Reader) -> Iterator[StoredPart]:
    def part(name: str, field: str, array: Array) -> StoredPart:
        used = dict.fromkeys(stream.coder for block in array.blocks for stream in block.streams)
        return StoredPart(name, field, tuple(used), array.count, array.stored_bytes)

    yield StoredPart("prefix", "", (), 0, PREFIX)
    for stored in reader.header.tensors:
        for array, field in stored.arrays:
            if array.blocks:
                yield part(stored.tensor.name, field, array)
    for pool in reader.header.pools:
        yield part("pool", pool.name, pool)
    yield StoredPart("header", "", (), 0, reader.header_bytes)
    yield StoredPart("check", "", (), 0, TRAILER)
