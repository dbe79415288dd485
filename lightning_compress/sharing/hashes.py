"""How weights are stored whose entries know their value by their place: hashed, or in a Bloomier filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_compress.functional.groups import real
from lightning_compress.functional.hashing import Filter, bloomier_read, hashed
from lightning_compress.sharing import entries
from lightning_compress.sharing.codes import SharedCode, rounded, scaled_values, side_bits, tensors_of


@dataclass(frozen=True, eq=False)
class Hashed(SharedCode):
    """A weight of K values and their negatives: ``w_i = sign_i s v[bucket_i]``, both from a hash of i.

    No index is stored. Complex weights have two numbers an entry.

    Args:
        codebook: v, [K] on the CPU: floating-point, or integers of a grid.
        scale: s > 0, [1] on the CPU, or None for 1.
        mask: bool, shape of the weight, True = kept; None keeps all.
        key: of the hash.
        shape: of the weight.

    Examples:
        >>> code = Hashed(torch.tensor([0.5, 2.0]), None, None, 7, (4,))
        >>> code.rebuild({}, torch.float32).abs().unique().tolist()
        [0.5, 2.0]

    Source: Chen et al. 2015, Compressing Neural Networks with the Hashing Trick.
    """

    codebook: Tensor
    scale: Tensor | None
    mask: Tensor | None
    key: int
    shape: tuple[int, ...]
    kind: ClassVar[str] = "hashed"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # a list, in a stored configuration

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Values and mask."""
        return tensors_of(self)

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``sign s v[bucket]``."""
        table = scaled_values(self.codebook, self.scale, dtype)
        values = table.new_empty(entries.count(None, self.shape, dtype))
        for start, piece in entries.pieces(values):
            buckets, signs = self._hashes(start, len(piece))
            torch.mul(table[buckets], signs, out=piece)
        chosen = entries.flat_mask(self.mask, self.shape, dtype)
        if chosen is not None:
            values[~chosen] = 0
        return entries.restored(values, None, self.shape, dtype)

    def bits(self, weight: Tensor) -> int:
        """Of the values, and one an entry if there is a mask."""
        return side_bits(self) - (0 if self.mask is None else 7 * self.mask.numel())

    def tied(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Buckets and signs."""
        buckets, signs = self._hashes(0, real(weight).numel())
        chosen = entries.flat_mask(self.mask, self.shape, weight.dtype)
        if chosen is not None:
            buckets[~chosen], signs[~chosen] = -1, 1
        buckets, signs = (part.view(real(weight).shape).to(weight.device) for part in (buckets, signs))
        return buckets, signs.to(weight.dtype.to_real())

    def refreshed(self, weight: Tensor) -> tuple[Tensor, Hashed]:
        """The values that the weight has now; those of empty buckets stay."""
        return self.fitted(weight)

    def fitted(self, weight: Tensor) -> tuple[Tensor, Hashed]:
        """The values nearest to a weight: ``v_k = mean of sign_i w_i`` over the bucket.

        Args:
            weight: any of this shape.

        Returns:
            The weight that shares them, on the weight's device, and its code.
        """
        count = len(self.codebook)
        sums, sizes = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        chosen = entries.flat_mask(self.mask, self.shape, weight.dtype)
        for start, piece in entries.pieces(real(weight.detach()).cpu().reshape(-1)):
            buckets, signs = self._hashes(start, len(piece))
            kept = slice(None) if chosen is None else chosen[start : start + len(piece)]
            sums.index_add_(0, buckets[kept], (piece.double() * signs)[kept])
            sizes += torch.bincount(buckets[kept], minlength=count)
        codebook, scale = rounded(sums / sizes.clamp_min(1), self.codebook, sort=False)
        code = replace(self, codebook=codebook, scale=scale)
        return code.project(weight), code

    def _hashes(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Bucket and sign of some numbers."""
        buckets, signs = hashed(self.key, count, len(self.codebook), start)
        return torch.from_numpy(buckets), torch.from_numpy(signs)


@dataclass(frozen=True, eq=False)
class Bloomier(SharedCode):
    """A sparse weight of K values in a filter that knows which entry has which: ``w_i = s c[f(i) - 1]``.

    Of an entry that is not in the filter f(i) is random: mostly beyond K, which means zero.

    Args:
        slots: of the filter, on the CPU.
        codebook: c, [K] on the CPU: floating-point, or integers of a grid.
        scale: s > 0, [1] on the CPU, or None for 1.
        width: bits of a slot.
        seed: of the filter's hashes.
        shape: of the weight.

    Examples:
        >>> from lightning_compress.functional.hashing import bloomier_build
        >>> slots, seed = bloomier_build([1], [2], bits=20)
        >>> code = Bloomier(torch.from_numpy(slots.astype("int32")), torch.tensor([-1.0, 3.0]), None, 20, seed, (4,))
        >>> code.rebuild({}, torch.float32).tolist()
        [0.0, 3.0, 0.0, 0.0]

    Source: Reagen et al. 2018, Weightless: Lossy Weight Encoding for Deep Neural Network Compression.
    """

    slots: Tensor
    codebook: Tensor
    scale: Tensor | None
    width: int
    seed: int
    shape: tuple[int, ...]
    kind: ClassVar[str] = "bloomier"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # a list, in a stored configuration

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Slots and codebook."""
        return tensors_of(self)

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``s c[f(i) - 1]``."""
        table = scaled_values(self.codebook, self.scale, dtype)
        table = torch.cat([table.new_zeros(1), table])
        values = table.new_empty(entries.count(None, self.shape, dtype))
        for start, piece in entries.pieces(values):
            piece.copy_(table[self._found(start, len(piece)) + 1])
        return entries.restored(values, None, self.shape, dtype)

    def bits(self, weight: Tensor) -> int:
        """So many a slot as it has, and the codebook."""
        slots = self.slots.numel()
        return side_bits(self) + (self.width - 8 * self.slots.element_size()) * slots

    def tied(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the filter says."""
        labels = self._found(0, real(weight).numel()).view(real(weight).shape)
        return labels.to(weight.device), None

    def refreshed(self, weight: Tensor) -> tuple[Tensor, Bloomier]:
        """The values that the weight has now; those that no entry has stay."""
        values = real(weight.detach()).cpu().reshape(-1)
        labels = self._found(0, len(values))
        used = labels >= 0
        table = scaled_values(self.codebook, self.scale, weight.dtype)
        table[labels[used]] = values[used]
        codebook, scale = rounded(table, self.codebook, sort=False)
        code = replace(self, codebook=codebook, scale=scale)
        return code.project(weight), code

    def _found(self, start: int, count: int) -> Tensor:
        """Index of the value of some numbers, -1 for zero."""
        table = Filter(self.slots.numpy(), self.seed)
        found = bloomier_read(table, np.arange(start, start + count), self.width)
        labels = torch.from_numpy(found.astype(np.int64)) - 1
        return labels.masked_fill_(labels >= len(self.codebook), -1)
