"""How many bytes arrays take in a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_compress.functional.arrays import CARRIERS, encode_array


def encoded_bytes(arrays: Mapping[str, Tensor]) -> int:
    """Length of the streams of some tensors, each encoded by the best coder.

    Args:
        arrays: name -> tensor on the CPU.

    Returns:
        Bytes, without what describes the streams.

    Examples:
        >>> from lightning_compress.functional.lengths import encoded_bytes
        >>> encoded_bytes({"codes": torch.zeros(10_000, dtype=torch.uint8)}) < 100
        True
    """
    total = 0
    for name, tensor in arrays.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        words = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(CARRIERS[dtype])
        total += encode_array(name, dtype, tuple(tensor.shape), words, write=len).stored_bytes
    return total
