"""Files into models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_compress import codes, contents, transform
from lightning_compress.archive.info import ArchiveInfo, describe
from lightning_compress.codes import Code
from lightning_compress.container import Reader, naming
from lightning_compress.functional.freeing import Freeing
from lightning_compress.tables import listing
from lightning_compress.targets import locate
from lightning_compress.transform import Step
from lightning_compress.undo import unchanged_on_error

_HELD = 8 << 20  # bytes of decoded tensors that loading keeps between its two passes


def load(path: str | os.PathLike[str], into: nn.Module, *, max_bytes: int = 4 * 2**30) -> nn.Module:
    """Read an archive into a model of the original architecture: all of it, or on any error nothing.

    Structural steps are replayed, and undone if anything goes wrong; then values are copied in place, so every
    ``Parameter`` stays the same object unless its structure changes; codes are attached again.

    Everything is decoded twice, one tensor at a time: first to see that all of it can be, then into ``into``. The first
    8 MB are decoded once and kept.

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
        _check_size(reader, max_bytes)
        contents.check_plans(header, into)
        steps = [(part, Step.from_json(step)) for part, step in header.steps]
        structural = any(step.structural for _, step in steps)
        with unchanged_on_error(into) if structural else nullcontext():
            transform.replay(into, steps)
            state, _ = contents.state_of(into)
            tied = contents.check_fit(header, into, state, steps)
            held = _rehearse(reader, tied)
        _fill(into, state, reader, held)  # this was rehearsed
        transform.restore(into, steps)
    return into


def _rehearse(reader: Reader, tied: Sequence[tuple[str, str]]) -> dict[str, tuple[Tensor, Code | None]]:
    """Decode everything once, so that decoding again cannot fail, and keep a little of it."""
    compared = {name for pair in tied for name in pair}
    bits: dict[str, bytes] = {}
    held: dict[str, tuple[Tensor, Code | None]] = {}
    room, freeing = _HELD, Freeing()
    for stored in reader.header.tensors:
        name = stored.tensor.name
        decoded = contents.decode(stored, reader)
        if name in compared:
            bits[name] = contents.digest(decoded[0])
        if stored.tensor.nbytes <= room:
            held[name] = decoded
            room -= stored.tensor.nbytes
        del decoded
        freeing.worked_on(stored.tensor.nbytes)
    for one, other in tied:
        if bits[one] != bits[other]:
            raise ValueError(f"{one!r} and {other!r} differ, but are one tensor in the model")
    return held


def _fill(
    into: nn.Module, state: dict[str, Tensor], reader: Reader, held: dict[str, tuple[Tensor, Code | None]]
) -> None:
    """Copy the values into a model of the right structure, and attach the codes."""
    for _, module, param, _ in list(codes.of(into)):
        codes.remove(module, param)
    freeing = Freeing()
    for stored in reader.header.tensors:
        name = stored.tensor.name
        tensor, code = held.pop(name) if name in held else contents.decode(stored, reader)
        with torch.no_grad():
            state[name].copy_(tensor)
            for alias, same in reader.header.aliases.items():
                if same == name and state[alias] is not state[name]:
                    state[alias].copy_(tensor)
        if code is not None:
            layer, _ = locate(into, stored.layer, stored.param)
            codes.attach(layer, stored.param, code)
        del tensor, code
        freeing.worked_on(stored.tensor.nbytes)


def load_tensor(path: str | os.PathLike[str], name: str, *, max_bytes: int = 4 * 2**30) -> Tensor:
    """Read one tensor of an archive: of the streams, only those that it needs are read and checked.

    Args:
        path: file that ``save`` wrote. It may come from anywhere: no code in it is run.
        name: of the tensor, as ``inspect`` lists it, or of one that is tied to it.
        max_bytes: refuse a tensor of more bytes.

    Returns:
        The tensor, on the CPU.

    Raises:
        ArchiveError: there is no such tensor, or what is read is damaged or forged.

    Examples:
        >>> import tempfile
        >>> net, path = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), tempfile.mkdtemp() + "/net.lcz"
        >>> _ = save(net, path)
        >>> torch.equal(load_tensor(path, "1.weight"), net[1].weight)
        True
    """
    path = Path(path)
    with naming(path), path.open("rb") as file:
        reader = Reader(file)
        known = {stored.tensor.name: stored for stored in reader.header.tensors}
        wanted = reader.header.aliases.get(name, name)
        if wanted not in known:
            near = get_close_matches(name, [*known, *reader.header.aliases], n=3, cutoff=0.3)
            raise ValueError(f"no tensor {name!r}; nearest names: {', '.join(near) or listing(list(known))}")
        stored = known[wanted]
        if stored.tensor.nbytes > max_bytes:
            raise ValueError(
                f"{name!r}: {stored.tensor.nbytes:,} bytes are declared; allowed are max_bytes={max_bytes:,}"
            )
        return contents.decode(stored, reader)[0]


def load_tensors(path: str | os.PathLike[str], *, max_bytes: int = 4 * 2**30) -> dict[str, Tensor]:
    """Read all tensors of an archive, without a model.

    Args:
        path: file that ``save`` wrote. It may come from anywhere: no code in it is run.
        max_bytes: refuse archives that declare more bytes of tensors.

    Returns:
        Name -> tensor on the CPU, as in the state dict of the model that was saved; tied ones are one tensor.

    Raises:
        ArchiveError: the file is damaged or forged.

    Examples:
        >>> import tempfile
        >>> net, path = nn.Linear(8, 8), tempfile.mkdtemp() + "/net.lcz"
        >>> _ = save(net, path)
        >>> list(load_tensors(path))
        ['weight', 'bias']
    """
    path = Path(path)
    with naming(path), path.open("rb") as file:
        reader = Reader(file)
        _check_size(reader, max_bytes)
        found = {s.tensor.name: contents.decode(s, reader)[0] for s in reader.header.tensors}
        return found | {alias: found[name] for alias, name in reader.header.aliases.items()}


def _check_size(reader: Reader, max_bytes: int) -> None:
    declared = sum(stored.tensor.nbytes for stored in reader.header.tensors)
    if declared > max_bytes:
        raise ValueError(f"{declared:,} bytes of tensors are declared; allowed are max_bytes={max_bytes:,}")


def inspect(path: str | os.PathLike[str]) -> ArchiveInfo:
    """Read the description of an archive, and check all of its bytes; no tensor is decoded.

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
        reader = Reader(file)
        reader.check()
        return describe(reader)
