"""`.lcz` archives: what the weights of a model *are*, in as few bytes as the coders can, safe to open.

`save` writes the whole state dict and the applied steps; `load` gives a fresh model the same structure and the same
bits; `inspect` reads the description. What goes in is decided in contents.py, the bytes in container.py.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import io
import json
import lzma
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import codes, contents, tables, transform
from lightning_compress.codes import Code, same_bits
from lightning_compress.container import ArchiveError, Header, Reader, naming, replacing, write
from lightning_compress.functional.arrays import Array
from lightning_compress.functional.entropy import CODERS
from lightning_compress.targets import locate
from lightning_compress.transform import Step

__all__ = [
    "ArchiveError",
    "ArchiveInfo",
    "StoredTensor",
    "baseline_sizes",
    "inspect",
    "load",
    "save",
    "size_of",
]


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
class ArchiveInfo:
    """What an archive holds, and how large it is.

    Args:
        file_bytes: length of the file.
        dense_bytes: 4 × real numbers in all floating-point and complex tensors, tied ones once: their size as
            dense float32.
        version: of the format.
        library: name of the writer.
        tensors: every stored tensor.
        aliases: other name of a tied tensor -> the name it is stored under.
        applied: (submodule, step as JSON), in order.
        skipped: entry of the state dict that is not stored -> reason.
        stale: tensor whose code did not fit it any more, so that it is stored as it is -> reason.
        metadata: the caller's.
    """

    file_bytes: int
    dense_bytes: int
    version: str
    library: str
    tensors: tuple[StoredTensor, ...]
    aliases: dict[str, str]
    applied: tuple[tuple[str, dict[str, Any]], ...]
    skipped: dict[str, str]
    stale: dict[str, str]
    metadata: Any

    @property
    def compression_ratio(self) -> float:
        """``dense_bytes / file_bytes``; above 1 is smaller."""
        return self.dense_bytes / self.file_bytes

    @property
    def size_fraction(self) -> float:
        """``file_bytes / dense_bytes``; NaN for a model without floating-point numbers."""
        return self.file_bytes / self.dense_bytes if self.dense_bytes else float("nan")

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
        ]
        return "\n".join(lines)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    coder: str = "auto",
    metadata: Any = None,
    sidecar: bool = False,
    verify: bool = True,
) -> ArchiveInfo:
    """Write all parameters and persistent buffers of a model, bit for bit, and the steps applied to it.

    A tensor goes through the code attached to it if that gives the same bits back; a stale code is reported.
    Otherwise it takes the layout with the fewest bytes. Same model, same bytes. An old file stays until the new
    one is complete.

    Args:
        model: any module on any device, also compiled or wrapped.
        path: file to write, usually ``*.lcz``; its folder must exist.
        coder: entropy coder of all streams, a key of ``functional.entropy.CODERS``; "auto": the best for each.
        metadata: anything that JSON can say, stored as it is.
        sidecar: also write ``<stem>_metadata.json`` beside it: sizes, steps, versions.
        verify: read the file back and compare every bit before it takes its place.

    Returns:
        Sizes and contents; ``file_bytes`` is the length of the file.

    Raises:
        ArchiveError: the folder does not exist; a tensor has no values (meta device, lazy layer) or a dtype
            that the format does not know; metadata is not JSON.

    Examples:
        >>> import tempfile
        >>> net = nn.Linear(64, 64)
        >>> info = save(compress(net, [Prune(0.9)]).model, tempfile.mkdtemp() + "/net.lcz")
        >>> info.compression_ratio > 4, info.tensors[0].kind
        (True, 'mask')
    """
    path = Path(path)
    with naming(path):
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist: make it first")
        if path.is_dir():
            raise ValueError("this is a folder: give the name of a file")
        header, chunks = _encoded(model, coder, metadata)
        with replacing(path) as file:
            write(file, header, chunks)
            reader = Reader(file)
            if verify:
                state, _ = contents.state_of(model)
                for name, tensor, _ in contents.decode(reader):
                    if not same_bits(tensor, state[name]):
                        raise ValueError(f"{name!r}: what was written does not give its bits back")
            info = _info(reader)
        if sidecar:
            with replacing(path.with_name(f"{path.stem}_metadata.json")) as file:
                file.write(_sidecar(path, info))
    return info


def size_of(model: nn.Module, coder: str = "auto", metadata: Any = None) -> int:
    """Length of the file that `save` would write, to the byte; nothing is written.

    Args:
        model: any module on any device, also compiled or wrapped.
        coder: as in `save`.
        metadata: as in `save`.

    Returns:
        Bytes.

    Raises:
        ArchiveError: as in `save`.

    Examples:
        >>> import tempfile
        >>> net = nn.Linear(64, 64)
        >>> size_of(net) == save(net, tempfile.mkdtemp() + "/net.lcz").file_bytes
        True
    """
    with naming(Path(type(model).__name__)):
        buffer = io.BytesIO()
        write(buffer, *_encoded(model, coder, metadata))
        return buffer.tell()


def _encoded(model: nn.Module, coder: str, metadata: Any) -> tuple[Header, list[bytes]]:
    """Header and streams of a model."""
    if coder not in ("auto", *CODERS):
        raise ValueError(f"unknown coder {coder!r}; allowed: auto, {', '.join(CODERS)}")
    try:
        metadata = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata is not JSON: {error}") from None
    return contents.encode(model, coder, metadata)


def load(path: str | os.PathLike[str], into: nn.Module, *, max_bytes: int = 4 * 2**30) -> nn.Module:
    """Read an archive into a model of the original architecture: all of it, or on any error nothing.

    Structural steps are replayed, on a copy before they touch ``into``; then values are copied in place, so
    every ``Parameter`` stays the same object unless its structure changes; codes are attached again.

    Args:
        path: file that ``save`` wrote. It may come from anywhere: no code in it is run.
        into: a model of the architecture that was compressed, on any device.
        max_bytes: refuse archives that declare more bytes of tensors.

    Returns:
        ``into``.

    Raises:
        ArchiveError: the file is damaged or forged, or does not fit ``into``; names tensor and both shapes.

    Examples:
        >>> import tempfile
        >>> net, path = nn.Linear(8, 8), tempfile.mkdtemp() + "/net.lcz"
        >>> _ = save(net, path)
        >>> torch.equal(load(path, into=nn.Linear(8, 8)).weight, net.weight)
        True
    """
    path = Path(path)
    with naming(path), path.open("rb") as file:
        reader = Reader(file)
        header = reader.header
        declared = sum(array.nbytes for array in header.described)
        if declared > max_bytes:
            raise ValueError(
                f"{declared:,} bytes of tensors are declared; allowed are max_bytes={max_bytes:,}"
            )
        contents.check_plans(header, into)
        steps = [(part, Step.from_json(step)) for part, step in header.applied]
        rehearsal = into
        if any(step.structural for _, step in steps):
            rehearsal = copy.deepcopy(into)
            transform.replay(rehearsal, steps)
        tied = contents.check_fit(header, rehearsal, steps)
        del rehearsal
        tensors: dict[str, Tensor] = {}
        found: dict[str, Code] = {}
        for name, tensor, code in contents.decode(reader):
            tensors[name] = tensor
            if code is not None:
                found[name] = code
        for one, other in tied:
            if not same_bits(tensors[one], tensors[other]):
                raise ValueError(f"{one!r} and {other!r} differ, but are one tensor in the model")
        # Nothing was changed so far; what follows was rehearsed.
        transform.replay(into, steps)
        with torch.no_grad():
            for name, target in contents.state_of(into)[0].items():
                target.copy_(tensors[header.aliases.get(name, name)])
        for _, module, param, _ in list(codes.of(into)):
            codes.remove(module, param)
        for coded in header.coded:
            layer, _ = locate(into, coded.layer, coded.param)
            codes.attach(layer, coded.param, found[coded.tensor.name])
        transform.restore(into, steps)
    return into


def inspect(path: str | os.PathLike[str]) -> ArchiveInfo:
    """Read the description of an archive, and its checksum; no tensor is decoded.

    Args:
        path: file that ``save`` wrote.

    Returns:
        Sizes and contents.

    Raises:
        ArchiveError: the file is damaged or no archive.

    Examples:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/net.lcz"
        >>> save(nn.Linear(8, 8), path) == inspect(path)
        True
    """
    path = Path(path)
    with naming(path), path.open("rb") as file:
        return _info(Reader(file))


def dense_bytes(model: nn.Module) -> int:
    """Bytes of a model's numbers as float32: ``4 x real numbers`` of parameters and floating-point buffers.

    Args:
        model: any module; a tensor that is held twice counts once.

    Returns:
        Bytes; for a model that was never changed, the ``dense_bytes`` of its archive.

    Examples:
        >>> dense_bytes(nn.Linear(3, 2))
        32
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    floats = (t for t in tensors if t.is_floating_point() or t.is_complex())
    return 4 * sum(t.numel() * (2 if t.is_complex() else 1) for t in floats)


def baseline_sizes(model: nn.Module) -> dict[str, int]:
    """Bytes that the state dict takes without this library, to compare ``file_bytes`` with.

    Args:
        model: any module.

    Returns:
        "state_dict": as ``torch.save`` writes it, real numbers as float32 and complex ones as complex64; "gzip",
        "lzma": the same bytes through these programs.

    Examples:
        >>> sizes = baseline_sizes(nn.Linear(64, 64))
        >>> sizes["state_dict"] > 4 * 65 * 64, sizes["lzma"] < sizes["state_dict"]
        (True, True)
    """

    def single(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.detach().to("cpu", torch.complex64)
        return tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()

    buffer = io.BytesIO()
    torch.save({name: single(tensor) for name, tensor in contents.state_of(model)[0].items()}, buffer)
    data = buffer.getvalue()
    return {"state_dict": len(data), "gzip": len(gzip.compress(data)), "lzma": len(lzma.compress(data))}


def _info(reader: Reader) -> ArchiveInfo:
    header = reader.header
    pools = {(pool.dtype, pool.name): pool for pool in header.pools}

    def share(array: Array, pool: str) -> float:
        if array.layout != "pool":
            return array.stored_bytes
        whole = pools[array.dtype, pool]
        return whole.stored_bytes * array.count / max(1, whole.count)

    rows = [(c.tensor, c.kind, sum(share(a, a.name) for a in c.arrays)) for c in header.coded]
    rows += [(array, "raw", share(array, "")) for array in header.tensors]
    floats = [a for a in header.described if "float" in a.dtype or "complex" in a.dtype]
    return ArchiveInfo(
        file_bytes=reader.file_bytes,
        dense_bytes=4 * sum(a.count * (2 if "complex" in a.dtype else 1) for a in floats),
        version=reader.version,
        library=header.library,
        tensors=tuple(StoredTensor(a.name, a.shape, a.dtype, kind, round(size)) for a, kind, size in rows),
        aliases=header.aliases,
        applied=header.applied,
        skipped=header.skipped,
        stale=header.stale,
        metadata=header.metadata,
    )


def _sidecar(path: Path, info: ArchiveInfo) -> bytes:
    steps = [{"module": part} | {k: v for k, v in step.items() if k != "plan"} for part, step in info.applied]
    ratios = {"compression_ratio": info.compression_ratio, "size_fraction": info.size_fraction}
    values = dataclasses.asdict(info) | ratios | {"applied": steps, "file": path.name}
    values["torch"] = torch.__version__
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False).encode()
