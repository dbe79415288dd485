"""The code of one weight by each strategy: which values, and which entry has which."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_compress.codes import Mask
from lightning_compress.functional.clustering import kmeans_1d
from lightning_compress.functional.hashing import bloomier_build, key_of
from lightning_compress.functional.vectors import kmeans_vectors
from lightning_compress.sharing import entries
from lightning_compress.sharing.codes import Codebook, SharedCode, rounded
from lightning_compress.sharing.hashes import Bloomier, Hashed
from lightning_compress.sharing.vectors import VectorCodebook

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
_SLOTS = (torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True)
class Entries:
    """One weight as the strategies see it.

    Args:
        key: full parameter name.
        weight: detached.
        mask: bool, shape of the weight, on the CPU, True = kept; None if there is none.
        importance: of every entry, shape of the weight; None: all alike.
        rms: what the weight is divided by before it is clustered; None leaves it as it is.
    """

    key: str
    weight: Tensor
    mask: Tensor | None
    importance: Tensor | None = None
    rms: float | None = None

    @property
    def bits(self) -> int:
        """Counted bits of the weight as it is: dense, or by its mask."""
        dense = 8 * self.weight.numel() * self.weight.element_size()
        return dense if self.mask is None else min(dense, Mask(self.mask).bits(self.weight))

    @property
    def numbers(self) -> Tensor:
        """The kept numbers divided by ``rms``, [n], at least in single precision; a complex entry has two."""
        numbers = entries.kept(self.weight, self.mask)
        numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
        return numbers if self.rms is None else numbers / self.rms

    @property
    def weights(self) -> Tensor | None:
        """What a squared error of these numbers weighs, [n]."""
        if self.importance is None:
            return None
        both = (2,) if self.weight.is_complex() else ()
        whole = self.importance.double().cpu()[(..., *(None for _ in both))].expand(*self.weight.shape, *both)
        mask = entries.flat_mask(self.mask, self.weight.shape, self.weight.dtype)
        flat = whole.reshape(-1) if mask is None else whole.reshape(-1)[mask]
        return flat if self.rms is None else flat * self.rms**2


@dataclass(frozen=True)
class Precision:
    """How the values of a codebook are stored.

    Args:
        dtype: key of ``DTYPES``.
        bits: None, or the bits of integers on a grid, 2 to 16.
    """

    dtype: str = "float32"
    bits: int | None = None

    @property
    def kind(self) -> Tensor:
        """A codebook of one value of this precision; integers have their largest modulus."""
        if self.bits is None:
            return torch.zeros(1, dtype=DTYPES[self.dtype])
        return torch.tensor([2 ** (self.bits - 1) - 1], dtype=torch.int8 if self.bits <= 8 else torch.int16)


@dataclass(frozen=True)
class Search:
    """How centroids are found; arguments of ``kmeans_1d`` and ``kmeans_vectors``."""

    init: str = "optimal"
    iterations: int = 50
    seed: int = 0
    points: int = 1 << 20

    def centroids(self, parts: list[Entries], clusters: int) -> Tensor:
        """The values that some weights, each divided by its ``rms``, are to share; float64 [K]."""
        numbers = torch.cat([p.numbers for p in parts])
        weights = None
        if parts[0].importance is not None:
            weights = torch.cat([p.weights for p in parts if p.weights is not None]).numpy()
        method = "optimal" if self.init == "optimal" else "lloyd"
        found = kmeans_1d(
            numbers.numpy(),
            clusters,
            method=method,
            init="linear" if self.init == "optimal" else self.init,
            iterations=self.iterations,
            weights=weights,
            seed=self.seed,
            points=self.points,
        )
        return torch.from_numpy(found.centroids)


def clustered(part: Entries, centroids: Tensor, precision: Precision) -> Codebook:
    """A codebook of these values, and of zero if there is a mask.

    Args:
        part: the weight.
        centroids: float64 [K], of the weight divided by its ``rms``.
        precision: of the values.

    Returns:
        The code; its ``project`` gives the weight.
    """
    zero = part.mask is not None
    codebook, scale = _stored(centroids, part, precision, zero)
    return Codebook(codebook, scale, zero)


def grouped(part: Entries, clusters: int, block: int, precision: Precision, search: Search) -> VectorCodebook:
    """A codebook of runs.

    Args:
        part: the weight.
        clusters: K.
        block: entries of a run.
        precision: of the values.
        search: how it is found.

    Returns:
        The code; its ``project`` gives the weight.
    """
    numbers, weights = part.numbers, part.weights
    whole = len(numbers) // block * block
    runs = numbers[:whole].view(-1, block)
    means = None if weights is None else weights[:whole].view(-1, block).mean(1).numpy()
    found = kmeans_vectors(
        runs.numpy(), clusters, iterations=search.iterations, weights=means, seed=search.seed
    )
    codebook, scale = rounded(torch.from_numpy(found).to(part.weight.dtype.to_real()), precision.kind)
    return VectorCodebook(codebook, scale, part.mask, tuple(part.weight.shape))


def hashed(part: Entries, buckets: int, precision: Precision, seed: int) -> Hashed:
    """The best values for buckets that a hash chooses.

    Args:
        part: the weight.
        buckets: K.
        precision: of the values.
        seed: with the name of the weight, it gives the hash.

    Returns:
        The code; its ``project`` gives the weight.
    """
    kind = precision.kind.expand(buckets).clone()
    start = Hashed(kind, None, part.mask, key_of(seed, part.key), tuple(part.weight.shape))
    return start.fitted(part.weight)[1]


def filtered(
    part: Entries, centroids: Tensor, precision: Precision, false_positive: float, seed: int
) -> Bloomier:
    """A filter that knows which kept entry has which value; others are zero, or rarely not.

    Args:
        part: the weight; it has a mask.
        centroids: float64 [K], of the weight divided by its ``rms``.
        precision: of the values.
        false_positive: largest share of masked entries that get a value.
        seed: of the filter.

    Returns:
        The code; its ``project`` gives the weight.
    """
    table = Codebook(*_stored(centroids, part, precision, zero=False))
    values = table.arrays(entries.kept(part.weight, part.mask))["codes"].to(torch.int64) + 1
    mask = entries.flat_mask(part.mask, part.weight.shape, part.weight.dtype)
    assert mask is not None
    width = slot_bits(len(table.codebook), false_positive)
    slots, used = bloomier_build(mask.nonzero().squeeze(1).numpy(), values.numpy(), width, seed)
    fits = next(dtype for dtype in _SLOTS if (1 << width) - 1 <= torch.iinfo(dtype).max)
    stored = torch.from_numpy(slots.astype(np.int64)).to(fits)
    return Bloomier(stored, table.codebook, table.scale, width, used, tuple(part.weight.shape))


def slot_bits(values: int, false_positive: float) -> int:
    """Bits of a slot: the smallest t with ``K / 2^t <= false_positive`` and ``t >= ceil(log2(K + 1))``.

    Args:
        values: K.
        false_positive: in (0, 1).

    Returns:
        t.

    Examples:
        >>> slot_bits(256, 0.01), slot_bits(3, 0.9)
        (15, 2)
    """
    return max(math.ceil(math.log2(values / false_positive)), values.bit_length())


def error(weight: Tensor, code: SharedCode) -> tuple[float, float]:
    """``|W - W^|^2`` and ``|W|^2``."""
    gap = weight - code.project(weight)
    return float(gap.abs().double().square().sum()), float(weight.abs().double().square().sum())


def _stored(
    centroids: Tensor, part: Entries, precision: Precision, zero: bool
) -> tuple[Tensor, Tensor | None]:
    """Codebook and scale of the values ``rms c`` in a precision, different ones in ascending order."""
    values = centroids if part.rms is not None else centroids.to(part.weight.dtype.to_real())
    codebook, scale = rounded(torch.cat([values, values.new_zeros(1)]) if zero else values, precision.kind)
    if part.rms is not None:
        scale = torch.tensor([part.rms]) if scale is None else scale * part.rms
    return codebook, scale
