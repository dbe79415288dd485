"""What was measured, for methods that are tried several times on one model."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.stats.fields import Stats

_ROOM = 1 << 29  # bytes


class Kept:
    """Statistics by what they were measured on; the oldest go when there is no more room.

    Args:
        room: bytes.

    Examples:
        >>> from lightning_compress.stats.keeping import Kept
        >>> kept = Kept()
        >>> kept.put("gram", {"weight": Stats(count=3)})
        >>> kept.get("gram")["weight"].count, kept.get("gradient")
        (3, None)
    """

    def __init__(self, room: int = _ROOM) -> None:
        self._room = room
        self._found: dict[Hashable, tuple[int, dict[str, Stats]]] = {}

    def get(self, key: Hashable) -> dict[str, Stats] | None:
        """What was put there; nobody may change its tensors."""
        return dict(self._found[key][1]) if key in self._found else None

    def put(self, key: Hashable, found: Mapping[str, Stats]) -> None:
        """Keep statistics, unless they alone take more than all the room."""
        size = sum(map(_bytes, found.values()))
        if size > self._room:
            return
        self._found[key] = size, dict(found)
        while sum(size for size, _ in self._found.values()) > self._room:
            del self._found[next(iter(self._found))]


def _bytes(stats: Stats) -> int:
    parts = (getattr(stats, field.name) for field in fields(stats))
    return sum(t.nbytes for part in parts for t in (part if isinstance(part, tuple) else (part,)) if _is(t))


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def state(model: nn.Module) -> bytes:
    """A digest of all that a forward pass of a model in eval mode depends on: kinds of modules, and their tensors.

    Args:
        model: any module.

    Returns:
        Equal for equal models.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__qualname__} {module.extra_repr()}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
        raw = dense.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw.numpy().data)
    return digest.digest()
