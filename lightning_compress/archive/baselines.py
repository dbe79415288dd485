"""Sizes of a model without this library."""

from __future__ import annotations

import gzip
import io
import lzma

import torch
from torch import Tensor, nn

from lightning_compress import contents


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
