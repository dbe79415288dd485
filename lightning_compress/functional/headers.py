"""The header of an `.lcz` file: what is stored, and how it is written in few bytes.

docs/file-format.md describes the bytes. A header is data: nothing in it names code to import, and what it declares is
checked before anything of that size is allocated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from lightning_compress.functional.arrays import (
    CARRIERS,
    LAYOUTS,
    MAX_DIMS,
    Array,
    Block,
    Stream,
    streams_of,
)
from lightning_compress.functional.records import Cursor, dump, names, parse, sint, text, uint

LIBRARY = "lightning_compress"
SEGMENT = 1 << 16  # bytes of streams that are checked together, at least
CHECK = 8  # bytes of a check
MAX_ROWS = 1 << 17  # tensors, fields and blocks: they bound what reading allocates
# Numbers in a file are positions in these lists: what is added comes last.
DTYPES = tuple(CARRIERS)
CODERS_IN_FILES = ("raw", "bitpack", "ans", "range", "gaps", "zlib", "lzma", "adaptive", "huffman")
# Fields of a code may take so many bytes for each element of its tensor, and so many more.
_FIELD_BYTES, _FIELD_SPARE = 16, 1 << 16
# Other parts of a header. A reader refuses a required part that it does not know, and passes over an optional one.
_ALIASES, _STEPS, _NOTES, _METADATA = range(4)
_REQUIRED = frozenset((_ALIASES, _STEPS))
T = TypeVar("T")
_SAME, _PLANES, _LINE, _OWN = range(4)  # how the shape of a field follows from that of its tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, as it is or as the fields of a code.

    Args:
        tensor: name, dtype and shape, and its streams if it is stored as it is.
        kind: of the code, or "".
        depth: parts of the name that belong to the parameter inside the layer that carries the code.
        config: options of the code.
        fields: of the code.
    """

    tensor: Array
    kind: str = ""
    depth: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    fields: tuple[Array, ...] = ()

    @property
    def arrays(self) -> tuple[tuple[Array, str], ...]:
        """What has streams, and the name of the pool for it."""
        return tuple((a, a.name) for a in self.fields) if self.kind else ((self.tensor, ""),)

    @property
    def layer(self) -> str:
        """Name of the layer that carries the code."""
        return ".".join(self.tensor.name.split(".")[: -self.depth])

    @property
    def param(self) -> str:
        """Name of the parameter inside that layer."""
        return ".".join(self.tensor.name.split(".")[-self.depth :])

    @property
    def sort(self) -> tuple[Any, ...]:
        """All that tensors of one sort have in common."""
        fields = tuple((a.name, a.dtype, _mode(a.shape, self.tensor.shape)) for a in self.fields)
        return self.tensor.dtype, self.kind, self.depth if self.kind else 0, dump(_bare(self.config)), fields


@dataclass(frozen=True)
class Header:
    """All of a file but the streams.

    Args:
        tensors: in order.
        pools: streams that small arrays share, in the order in which these first need them; name: field of a code,
            or "" for tensors.
        aliases: other name of a tied tensor -> the name it is stored under.
        steps: (submodule, step as JSON), in order.
        skipped: entry of the state dict that is not stored -> reason.
        stale: tensor whose code did not fit it -> reason.
        metadata: the caller's.
        checks: of the segments of the payload.
        unknown: numbers of optional parts that this library does not know.
    """

    tensors: tuple[Stored, ...]
    pools: tuple[Array, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    steps: tuple[tuple[str, dict[str, Any]], ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)
    metadata: Any = None
    checks: tuple[bytes, ...] = ()
    unknown: tuple[int, ...] = ()

    @property
    def stored(self) -> list[tuple[Array, str]]:
        """What the tensors consist of, in order, and the name of the pool for each array."""
        return [entry for stored in self.tensors for entry in stored.arrays]

    @property
    def arrays(self) -> list[Array]:
        """Everything that may have streams, in the order of the payload."""
        return [*(array for array, _ in self.stored), *self.pools]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all streams."""
        return sum(array.stored_bytes for array in self.arrays)

    def segments(self) -> list[int]:
        """Bytes of each segment: it ends with the stream with which it reaches ``SEGMENT``, or with the payload."""
        sizes, size = [], 0
        for array in self.arrays:
            for block in array.blocks:
                for _, length in block.streams:
                    size += length
                    if size >= SEGMENT:
                        sizes.append(size)
                        size = 0
        return [*sizes, size] if size else sizes

    def to_bytes(self) -> bytes:
        """The table of tensors, then the other parts: number, whether it is required, length, bytes."""
        place = {stored.tensor.name: i for i, stored in enumerate(self.tensors)}
        notes = {name: table for name, table in (("skipped", self.skipped), ("stale", self.stale)) if table}
        made = {
            _ALIASES: names(self.aliases) + b"".join(uint(place[name]) for name in self.aliases.values()),
            _STEPS: b"".join(_step(part, step, self.tensors) for part, step in self.steps),
            _NOTES: dump(notes).encode(),
            _METADATA: dump(self.metadata).encode(),
        }
        empty = {_ALIASES: not self.aliases, _STEPS: not self.steps, _NOTES: not notes}
        empty[_METADATA] = self.metadata is None
        framed = (
            uint(2 * number + (number in _REQUIRED)) + uint(len(data)) + data
            for number, data in made.items()
            if not empty[number]
        )
        return _table(self.tensors, self.pools, self.checks) + b"".join(framed)

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """Inverse of ``to_bytes``.

        Args:
            data: untrusted.

        Returns:
            The header; offsets are filled in.

        Raises:
            ValueError: malformed, contradictory, or with a required part that is not known.
        """
        cursor = Cursor(data)
        tensors, pools = _read_table(cursor)
        header = cls(tuple(tensors), tuple(pools))
        header = replace(header, checks=tuple(cursor.take(CHECK) for _ in header.segments()))
        stored = [s.tensor.name for s in tensors]
        found: dict[int, Any] = {}
        unknown = []
        while cursor.left:
            number, required = divmod(cursor.uint(), 2)
            part = Cursor(cursor.take(cursor.uint()))
            if number in found or number in unknown:
                raise ValueError(f"the header has part {number} twice")
            if number == _ALIASES:
                found[number] = {alias: _at(stored, part.uint(), "a tie to tensor") for alias in part.names()}
            elif number == _STEPS:
                found[number] = tuple(_read_steps(part, header.tensors))
            elif number in (_NOTES, _METADATA):
                found[number] = parse(part.take(part.left))
            elif required:
                raise ValueError(
                    f"the header has part {number}, which is needed to read the file and not known to this library: "
                    "update lightning-compress"
                )
            else:
                unknown.append(number)
                continue
            if part.left:
                raise ValueError(f"part {number} of the header has {part.left} bytes too many")
        notes = found.get(_NOTES, {})
        skipped, stale = (_texts(notes, name) for name in ("skipped", "stale"))
        aliases = found.get(_ALIASES, {})
        _unique([*stored, *aliases], "tensor")
        return replace(
            header,
            aliases=aliases,
            steps=found.get(_STEPS, ()),
            skipped=skipped,
            stale=stale,
            metadata=found.get(_METADATA),
            unknown=tuple(unknown),
        )


# -- the table of tensors ------------------------------------------------------------------------------------


def _table(tensors: Sequence[Stored], pools: Sequence[Array], checks: Sequence[bytes]) -> bytes:
    sorts = list(dict.fromkeys(stored.sort for stored in tensors))
    out = [names(stored.tensor.name for stored in tensors), uint(len(sorts))]
    for dtype, kind, depth, config, fields in sorts:
        out += [uint(DTYPES.index(dtype)), text(kind)]
        if kind:
            out += [uint(depth), text(config), uint(len(fields))]
            out += [text(name) + uint(DTYPES.index(field) * 4 + mode) for name, field, mode in fields]
    if len(sorts) > 1:
        out += [uint(sorts.index(stored.sort)) for stored in tensors]
    before = 0
    for stored in tensors:
        out.append(_shape(stored.tensor.shape, before))
        before = _first(stored.tensor.shape, before)
    out += [sint(number) for stored in tensors for number in _numbers(stored.config)]
    for stored in tensors:
        shape = stored.tensor.shape
        for array in stored.fields:
            mode = _mode(array.shape, shape)
            out += [uint(n) for n in array.shape] if mode == _LINE else []
            out += [_shape(array.shape, _first(shape, 0))] if mode == _OWN else []
    for stored in tensors:
        out += [_block(block) for array, _ in stored.arrays for block in array.blocks]
    out += [_block(block) for pool in pools for block in pool.blocks]
    return b"".join([*out, *checks])


def _read_table(cursor: Cursor) -> tuple[list[Stored], list[Array]]:
    named = cursor.names()
    _unique(named, "tensor")
    rows = _Rows(len(named))
    sorts = [_read_sort(cursor) for _ in range(rows.add(cursor.uint()))]
    chosen = [cursor.uint() if len(sorts) > 1 else 0 for _ in named]
    known = [_at(sorts, n, f"{name!r}: sort") for name, n in zip(named, chosen, strict=True)]
    plain: list[Array] = []
    before = 0
    for name, (dtype, *_) in zip(named, known, strict=True):
        plain.append(Array(name, dtype, _read_shape(cursor, before)))
        plain[-1].check()
        before = _first(plain[-1].shape, before)
    configs = [_filled(bare, cursor) for _, _, _, bare, _ in known]
    places = _Places(cursor, rows)
    fields_of: list[list[Array]] = []
    for tensor, (_, _, _, _, fields) in zip(plain, known, strict=True):
        rows.add(len(fields))
        arrays = [Array(key, dtype, _field_shape(cursor, mode, tensor.shape)) for key, dtype, mode in fields]
        for array in arrays:
            array.check()
        needed, most = sum(a.nbytes for a in arrays), _FIELD_BYTES * tensor.count + _FIELD_SPARE
        if needed > most:
            raise ValueError(
                f"{tensor.name!r}: code of {needed} bytes for {tensor.count} elements; at most {most}"
            )
        fields_of.append(arrays)
    tensors = [
        Stored(tensor, kind, depth, config, tuple(places.of(a, a.name) for a in fields))
        if kind
        else Stored(places.of(tensor, ""), kind, depth, config)
        for tensor, (_, kind, depth, *_), config, fields in zip(plain, known, configs, fields_of, strict=True)
    ]
    pools = [places.of(Array(pool, dtype, (count,)), None) for (dtype, pool), count in places.pooled.items()]
    return tensors, pools


class _Places:
    """Reads the streams of arrays, in order, and says where they begin: end to end, and members of pools too."""

    def __init__(self, cursor: Cursor, rows: _Rows) -> None:
        self._cursor, self._rows, self._payload = cursor, rows, 0
        self.pooled: dict[tuple[str, str], int] = {}  # elements

    def of(self, array: Array, pool: str | None) -> Array:
        """The array with its blocks and place; ``pool``: the one it lies in if it is small."""
        if pool is not None and array.pooled:
            key = array.dtype, pool
            start = self.pooled.get(key, 0)
            if array.count:
                self.pooled[key] = start + array.count
            return Array(array.name, array.dtype, array.shape, (), start)
        cursor, blocks, start = self._cursor, [], self._payload
        self._rows.add(-(-array.count // array.block_size))
        for count in array.extents():
            layout = _at(LAYOUTS, cursor.uint(), f"{array.name!r}: layout")
            number = cursor.sint() if layout != "planes" else 0
            streams = tuple(
                Stream(_at(CODERS_IN_FILES, cursor.uint(), f"{array.name!r}: coder"), cursor.uint())
                for _ in range(streams_of(array.dtype, layout))
            )
            blocks.append(Block(layout, number, streams))
            array.check_block(blocks[-1], count)
            self._payload += sum(stream.length for stream in streams)
        return Array(array.name, array.dtype, array.shape, tuple(blocks), start)


class _Rows:
    """Counts what reading a header allocates."""

    def __init__(self, count: int) -> None:
        self._left = MAX_ROWS
        self.add(count)

    def add(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"the header has more than {MAX_ROWS} tensors, fields and blocks")
        return count


def _read_sort(cursor: Cursor) -> tuple[Any, ...]:
    dtype, kind = _at(DTYPES, cursor.uint(), "dtype"), cursor.text()
    if not kind:
        return dtype, "", 1, {}, ()
    depth, config = cursor.uint(), cursor.json()
    if not isinstance(config, dict) or not depth:
        raise ValueError(f"the options of a code {kind!r:.40} are malformed: {config!r:.60}")
    fields = []
    for _ in range(cursor.uint()):
        name, (place, mode) = cursor.text(), divmod(cursor.uint(), 4)
        fields.append((name, _at(DTYPES, place, "dtype"), mode))
    _unique([name for name, _, _ in fields], f"code {kind!r:.40}: field")
    return dtype, kind, depth, config, tuple(fields)


def _bare(value: Any) -> Any:
    """A JSON value with 0 and false in the place of whole numbers and truths: tensors of one sort differ in these."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items()}
    return list(map(_bare, value)) if isinstance(value, list) else type(value)() if _free(value) else value


def _free(value: Any) -> bool:
    """Whether tensors of one sort may differ in it."""
    return type(value) in (int, bool)


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers and truths, in the order in which the value is written."""
    if isinstance(value, dict | list):
        for inner in (value[key] for key in sorted(value)) if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif _free(value):
        yield int(value)


def _filled(value: Any, cursor: Cursor) -> Any:
    """Inverse of ``_bare``, with the numbers that follow."""
    if isinstance(value, dict):
        return {key: _filled(value[key], cursor) for key in sorted(value)}
    if isinstance(value, list):
        return [_filled(inner, cursor) for inner in value]
    return type(value)(cursor.sint()) if _free(value) else value


def _mode(shape: tuple[int, ...], whole: tuple[int, ...]) -> int:
    """How the shape of a field follows from that of its tensor."""
    if shape in (whole, (*whole, 2)):
        return _SAME if shape == whole else _PLANES
    return _LINE if len(shape) == 1 else _OWN


def _first(shape: tuple[int, ...], before: int) -> int:
    return shape[0] if shape else before


def _field_shape(cursor: Cursor, mode: int, whole: tuple[int, ...]) -> tuple[int, ...]:
    if mode == _OWN:
        return _read_shape(cursor, _first(whole, 0))
    return (cursor.uint(),) if mode == _LINE else whole if mode == _SAME else (*whole, 2)


def _shape(shape: tuple[int, ...], before: int) -> bytes:
    """Number of axes, and which of the first two are as long as the first axis of the tensor before; the others."""
    same = [i < 2 and n == before for i, n in enumerate(shape)]
    first = 4 * len(shape) + sum(1 << i for i, equal in enumerate(same) if equal)
    return uint(first) + b"".join(uint(n) for n, equal in zip(shape, same, strict=True) if not equal)


def _read_shape(cursor: Cursor, before: int) -> tuple[int, ...]:
    dims, same = divmod(cursor.uint(), 4)
    if dims > MAX_DIMS:
        raise ValueError(f"impossible shape of {dims} axes")
    return tuple(before if i < 2 and same >> i & 1 else cursor.uint() for i in range(dims))


def _block(block: Block) -> bytes:
    """Layout, number, and the coder and length of each stream."""
    out = [bytes([LAYOUTS.index(block.layout)])]
    out += [sint(block.number)] if block.layout != "planes" else []
    out += [uint(CODERS_IN_FILES.index(coder)) + uint(length) for coder, length in block.streams]
    return b"".join(out)


# -- steps, ties and notes -----------------------------------------------------------------------------------


def _step(part: str, step: dict[str, Any], tensors: Sequence[Stored]) -> bytes:
    """Submodule, name, options, plan; bytes of all parameters, of the unchanged ones; which tensors changed.

    Usually the parameters are what is stored, and what changed are those with a code: only the difference is written.
    """
    coverage = step["coverage"]
    changed, total = coverage["changed"], coverage["total_bytes"]
    flags = [(changed.get(s.tensor.name) == s.tensor.nbytes) != bool(s.kind) for s in tensors]
    packed = np.packbits(np.array(flags, dtype=np.bool_), bitorder="little").tobytes().rstrip(b"\0")
    config, plan = dump(step["config"]), dump(step["plan"]) if step["plan"] is not None else ""
    kept = total - round(coverage["share"] * total)
    words = [part, step["name"], "" if config == "{}" else config, plan]
    numbers = [sint(total - _total(tensors)), uint(kept), uint(len(packed))]
    return b"".join([*map(text, words), *numbers, packed])


def _total(tensors: Sequence[Stored]) -> int:
    return sum(stored.tensor.nbytes for stored in tensors)


def _read_steps(cursor: Cursor, tensors: Sequence[Stored]) -> Iterator[tuple[str, dict[str, Any]]]:
    while cursor.left:
        part, name, config, plan = cursor.text(), cursor.text(), cursor.json({}), cursor.json(None)
        total, kept, packed = _total(tensors) + cursor.sint(), cursor.uint(), cursor.take(cursor.uint())
        flags = np.zeros(len(tensors), dtype=np.bool_)
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[: len(tensors)]
        flags[: len(bits)] = bits
        changed = {
            s.tensor.name: s.tensor.nbytes
            for s, flag in zip(tensors, flags, strict=True)
            if flag != bool(s.kind)
        }
        share = (total - kept) / total if total else 0.0
        coverage = {"changed": changed, "skipped": {}, "total_bytes": total, "share": share}
        yield part, {"name": name, "config": config, "plan": plan, "coverage": coverage}


def _texts(notes: Any, name: str) -> dict[str, str]:
    table = notes.get(name, {}) if isinstance(notes, dict) else None
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise ValueError(f"{name!r} in the header is {table!r:.60}, not names and reasons")
    return table


def _at(values: Sequence[T], place: int, what: str) -> T:
    """An entry of a list; a place beyond it is one that a newer library knows."""
    if place >= len(values):
        raise ValueError(f"{what} number {place} is unknown to this library: update lightning-compress")
    return values[place]


def _unique(values: Sequence[str], what: str) -> None:
    name, count = next(iter(Counter(values).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"{what} {name!r} is declared {count} times")
