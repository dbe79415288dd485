"""The entries of a weight that a mask keeps, as a flat vector, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_compress.functional.groups import like, real

CHUNK = 1 << 20


def flat_mask(mask: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A mask for every number of the real view of a weight.

    Args:
        mask: bool, or None.
        shape: of the weight.
        dtype: of the weight.

    Returns:
        [numbers] on the CPU, or None.

    Raises:
        ValueError: it is no mask of this shape.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape != torch.Size(shape):
        raise ValueError(
            f"a mask of dtype {mask.dtype} and shape {tuple(mask.shape)} for a weight of shape {tuple(shape)}."
        )
    flat = mask.reshape(-1)
    return flat.repeat_interleave(2) if dtype.is_complex else flat


def kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The numbers of a weight that a mask keeps, in order.

    Args:
        weight: any, also complex: real and imaginary parts in turn.
        mask: bool, shape of the weight, True = kept; None keeps all.

    Returns:
        [numbers], on the CPU.

    Examples:
        >>> kept(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])).tolist()
        [1.0, 3.0]
    """
    flat = real(weight.detach()).cpu().reshape(-1)
    chosen = flat_mask(mask, weight.shape, weight.dtype)
    return flat if chosen is None else flat[chosen]


def count(mask: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> int:
    """How many numbers ``kept`` gives."""
    chosen = flat_mask(mask, shape, dtype)
    return int(chosen.sum()) if chosen is not None else math.prod(shape) * (2 if dtype.is_complex else 1)


def pieces(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Parts of a flat tensor and where they begin: bounds the memory of what is computed for each entry."""
    start = 0
    for piece in torch.split(flat, CHUNK):
        yield start, piece
        start += len(piece)


def spread(
    values: Tensor, mask: Tensor | None, shape: Sequence[int], dtype: torch.dtype, fill: int = 0
) -> Tensor:
    """Inverse of ``kept``, in the real view of the weight.

    Args:
        values: [numbers].
        mask: bool, shape of the weight, or None.
        shape: of the weight.
        dtype: of the weight.
        fill: what masked entries get.

    Returns:
        Shape of the real view, dtype of the values.
    """
    chosen = flat_mask(mask, shape, dtype)
    if chosen is not None:
        values, given = torch.full(chosen.shape, fill, dtype=values.dtype), values
        values[chosen] = given
    return values.view(*shape, 2) if dtype.is_complex else values.view(tuple(shape))


def restored(values: Tensor, mask: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A weight from the numbers that a mask keeps; the others are zero."""
    return like(spread(values, mask, shape, dtype), dtype)
