"""Which elements stay: exact, stable selection of the lowest scores, and what is done with the result.

Pure tensor functions; a mask is a bool tensor, True = kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_compress.functional.ranking import lowest


def count_pruned(sparsity: float, total: int) -> int:
    """How many of ``total`` elements are zero at ``sparsity``: ``k = floor(s * N + 0.5)``.

    Args:
        sparsity: share of zeros, in [0, 1].
        total: number of elements N, >= 0.

    Returns:
        k, between 0 and N.

    Examples:
        >>> count_pruned(0.5, 5), count_pruned(0.1, 4)
        (3, 0)
    """
    return min(total, math.floor(sparsity * total + 0.5))


def topk_mask(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks that drop exactly the ``k`` lowest scores of several tensors ranked together.

    The order is (score, tensor order, flat index), so ties are decided the same way on every machine.

    Args:
        scores: real tensors of any shapes on one device; higher = keep; -inf goes first.
        k: number of elements to drop, 0 <= k <= total.

    Returns:
        One bool tensor per score tensor, same shape, True = kept; exactly ``k`` are False.

    Raises:
        ValueError: k out of range, or a score is NaN.

    Examples:
        >>> topk_mask([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 2)
        [tensor([ True, False]), tensor([False,  True])]
    """
    cut = lowest(scores, k)
    return [cut.mask(i, s) for i, s in enumerate(scores)]


def row_mask(scores: Tensor, k: int, axis: int) -> Tensor:
    """Mask that drops exactly the ``k`` lowest scores of every row along ``axis``.

    Args:
        scores: real tensor; a row is all elements that share one index on ``axis``.
        k: elements to drop per row.
        axis: the output axis.

    Returns:
        Bool tensor of the same shape, True = kept.

    Examples:
        >>> row_mask(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), 1, axis=0)
        tensor([[ True, False,  True],
                [False,  True,  True]])
    """
    rows = scores.movedim(axis, 0).flatten(1)
    order = rows.argsort(dim=1, stable=True)
    keep = torch.ones_like(rows, dtype=torch.bool).scatter_(1, order[:, :k], False)
    return keep.view(scores.movedim(axis, 0).shape).movedim(0, axis)


def apply_mask_(weight: Tensor, mask: Tensor) -> None:
    """Write +0 where ``mask`` is False, in place: ``w <- w if mask else 0``.

    Multiplying by the mask would leave -0.0 for negative weights and NaN for infinite ones.

    Args:
        weight: any dtype, also complex.
        mask: bool, same shape and device.

    Examples:
        >>> w = torch.tensor([-1.0, 2.0])
        >>> apply_mask_(w, torch.tensor([False, True]))
        >>> w
        tensor([0., 2.])
    """
    with torch.no_grad():
        weight.masked_fill_(~mask, 0)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight mask elements per byte, first element in the highest bit.

    Args:
        mask: bool tensor of any shape and device.

    Returns:
        1-D uint8 tensor on the CPU, ceil(N / 8) bytes.

    Examples:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([160], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of ``pack_bits``.

    Args:
        packed: 1-D uint8 tensor.
        shape: shape of the mask.

    Returns:
        Bool tensor of ``shape`` on the CPU.

    Raises:
        ValueError: the number of bytes does not fit the shape.

    Examples:
        >>> unpack_bits(torch.tensor([160], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    n = math.prod(shape)
    if packed.numel() != (n + 7) // 8:
        raise ValueError(
            f"{packed.numel()} bytes of mask for shape {tuple(shape)}: {(n + 7) // 8} are needed."
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=n) if n else np.zeros(0, np.uint8)
    return torch.from_numpy(bits.view(np.bool_)).view(tuple(shape))


def nm_mask(scores: Tensor, keep: int, block: int, axis: int) -> Tensor:
    """Mask that keeps the ``keep`` highest scores of every ``block`` consecutive ones along an axis.

    Ties go as in ``topk_mask``: the first of the equal ones is dropped first.

    Args:
        scores: real tensor; the size of the axis is a multiple of ``block``.
        keep: elements kept of each block, 0 to ``block``.
        block: consecutive elements.
        axis: of the blocks.

    Returns:
        Bool tensor of the same shape, True = kept.

    Raises:
        ValueError: the axis does not divide, or ``keep`` is out of range.

    Examples:
        >>> nm_mask(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2, 4, axis=1)
        tensor([[ True, False,  True, False]])

    Source: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks.
    """
    if not 0 <= keep <= block or block < 1 or scores.shape[axis] % block:
        raise ValueError(
            f"{keep} of every {block} along axis {axis} of shape {tuple(scores.shape)}: allowed is 0 to {block}, of an "
            f"axis whose size is a multiple of {block}."
        )
    last = scores.movedim(axis, -1)
    rows = row_mask(last.reshape(-1, block), block - keep, axis=0)
    return rows.view(last.shape).movedim(-1, axis)


def blocks(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor cut into equal blocks.

    Args:
        values: any tensor.
        sizes: of a block along every axis; each divides that axis.

    Returns:
        [number of blocks along each axis..., elements of a block].

    Raises:
        ValueError: a size does not divide its axis.

    Examples:
        >>> blocks(torch.arange(8).view(2, 4), (2, 2)).tolist()
        [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    if len(sizes) != values.dim() or any(n % s for n, s in zip(values.shape, sizes, strict=True)):
        raise ValueError(f"blocks of {tuple(sizes)} do not divide shape {tuple(values.shape)}.")
    counts = [n // s for n, s in zip(values.shape, sizes, strict=True)]
    split = values.reshape([part for pair in zip(counts, sizes, strict=True) for part in pair])
    return split.permute(*range(0, split.dim(), 2), *range(1, split.dim(), 2)).reshape(*counts, -1)


def spread(mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """A mask of blocks as one of elements: every block in full size.

    Args:
        mask: bool, one entry per block.
        sizes: of a block along every axis.

    Returns:
        Bool tensor, ``sizes`` times as large along every axis.

    Examples:
        >>> spread(torch.tensor([[True, False]]), (2, 1)).tolist()
        [[True, False], [True, False]]
    """
    for axis, size in enumerate(sizes):
        mask = mask.repeat_interleave(size, axis)
    return mask
