"""Models into files."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_compress import contents, transform
from lightning_compress.archive.info import ArchiveInfo, describe
from lightning_compress.codes import same_bits
from lightning_compress.container import Reader, Sink, Writer, naming, replacing
from lightning_compress.functional.entropy import CODERS
from lightning_compress.functional.freeing import Freeing


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
        sidecar: also write ``<stem>_metadata.json`` beside it: sizes, steps with all options and coverage, versions,
            seed (that of ``metadata``, or of the first step that has one).
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
        with replacing(path) as file:
            _write(model, file, coder, metadata)
            file.flush()
            reader = Reader(file)
            if verify:
                _verify(model, reader)
            info = describe(reader)
        if sidecar:
            with replacing(path.with_name(f"{path.stem}_metadata.json")) as file:
                file.write(_sidecar(path, model, info))
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
        return _write(model, _Nowhere(), coder, metadata).written


def _verify(model: nn.Module, reader: Reader) -> None:
    """Compare every bit of a file with the model."""
    (state, _), freeing = contents.state_of(model), Freeing()
    for stored in reader.header.tensors:
        name = stored.tensor.name
        if not same_bits(contents.decode(stored, reader)[0], state[name]):
            raise ValueError(f"{name!r}: what was written does not give its bits back")
        freeing.worked_on(stored.tensor.nbytes)


class _Nowhere:
    """Takes bytes and keeps none."""

    def write(self, data: bytes, /) -> int:
        return len(data)


def _write(model: nn.Module, file: Sink, coder: str, metadata: Any) -> Writer:
    """Write a whole file."""
    if coder not in ("auto", *CODERS):
        raise ValueError(f"unknown coder {coder!r}; allowed: auto, {', '.join(CODERS)}")
    try:
        metadata = json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata is not JSON: {error}") from None
    writer = Writer(file, coder)
    writer.finish(contents.encode(model, writer, metadata))
    return writer


def _sidecar(path: Path, model: nn.Module, info: ArchiveInfo) -> bytes:
    """All that is known, for people and other programs: options and coverage are complete here."""
    steps = list(transform.applied(model))
    applied = [
        {
            "module": part,
            "name": step.name,
            "config": step.config,
            "coverage": dataclasses.asdict(step.coverage),
        }
        for part, step in steps
    ]
    named = info.metadata if isinstance(info.metadata, dict) else {}
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    values = dataclasses.asdict(info) | {
        "file": path.name,
        "compression_ratio": info.compression_ratio,
        "size_fraction": info.size_fraction,
        "techniques": [step.name for _, step in steps],
        "applied": applied,
        "seed": named.get("seed", next((s.config["seed"] for _, s in steps if "seed" in s.config), None)),
        "versions": versions | {"format": info.version, "lightning_compress": own_version()},
    }
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False).encode()


def own_version() -> str | None:
    """Of the installed package; None where it is used without being installed."""
    try:
        return packages.version("lightning-compress")
    except packages.PackageNotFoundError:
        return None
