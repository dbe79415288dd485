"""How weights whose runs are alike are stored: which vector each run is, and the vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_compress.functional.bit_errors import Word
from lightning_compress.functional.vectors import nearest_rows
from lightning_compress.sharing import entries
from lightning_compress.sharing.codes import (
    SharedCode,
    check_count,
    index_dtype,
    index_width,
    index_word,
    rounded,
    scaled_values,
    side_bits,
    taken,
    tensors_of,
)


@dataclass(frozen=True, eq=False)
class VectorCodebook(SharedCode):
    """A weight whose runs of b entries are K different vectors: product quantization.

    Runs go along the flat weight (real and imaginary parts in turn), over the entries that a mask keeps; the last one
    may be shorter.

    Args:
        codebook: [K, b] on the CPU, different rows in lexicographic order: floating-point, or integers of a grid.
        scale: factor of the codebook, [1] on the CPU, or None for 1.
        mask: bool, shape of the weight, True = kept; None keeps all.
        shape: of the weight.

    Examples:
        >>> code = VectorCodebook(torch.tensor([[0.0, 1.0], [2.0, 2.0]]), None, None, (3,))
        >>> code.project(torch.tensor([1.0, 3.0, 0.1])).tolist()
        [2.0, 2.0, 0.0]

    Source: Jégou et al. 2011, Product Quantization for Nearest Neighbor Search.
    """

    codebook: Tensor
    scale: Tensor | None
    mask: Tensor | None
    shape: tuple[int, ...]
    kind: ClassVar[str] = "vectors"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))  # a list, in a stored configuration

    @property
    def word(self) -> Word:
        """An index."""
        return index_word(len(self.codebook))

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Number of the nearest row of every run; codebook and mask."""
        codes = self._codes(weight).to(index_dtype(len(self.codebook)))
        return {"codes": codes, **tensors_of(self)}

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The rows in order."""
        count, width = entries.count(self.mask, self.shape, dtype), self.codebook.shape[1]
        if arrays["codes"].shape != (-(-count // width),):
            raise ValueError(
                f"{count} entries in runs of {width} have not {tuple(arrays['codes'].shape)} indices."
            )
        rows = taken(scaled_values(self.codebook, self.scale, dtype), arrays["codes"])
        return entries.restored(rows.reshape(-1)[:count], self.mask, self.shape, dtype)

    def bits(self, weight: Tensor) -> int:
        """``ceil(log2 K)`` a run, the codebook, and one bit an entry if there is a mask."""
        count = entries.count(self.mask, self.shape, weight.dtype)
        side = side_bits(self) - (0 if self.mask is None else 7 * self.mask.numel())
        return -(-count // self.codebook.shape[1]) * index_width(len(self.codebook)) + side

    def tied(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Number of the row and place in it."""
        width = self.codebook.shape[1]
        labels = (self._codes(weight)[:, None] * width + torch.arange(width)).reshape(-1)
        count = entries.count(self.mask, self.shape, weight.dtype)
        return entries.spread(labels[:count], self.mask, self.shape, weight.dtype, -1).to(weight.device), None

    def refreshed(self, weight: Tensor) -> tuple[Tensor, VectorCodebook]:
        """The rows that the weight has now."""
        values, width = entries.kept(weight, self.mask), self.codebook.shape[1]
        whole = len(values) // width * width
        rows, last = torch.unique(values[:whole].view(-1, width), dim=0), values[whole:]
        if not bool((rows[:, : len(last)] == last).all(dim=1).any()):  # a row that no whole run has
            row = taken(
                scaled_values(self.codebook, self.scale, weight.dtype), self.arrays(weight)["codes"][-1:]
            )[0]
            rows = torch.unique(torch.cat([rows, torch.cat([last, row[len(last) :]])[None]]), dim=0)
        check_count(len(rows), len(self.codebook))
        code = VectorCodebook(*rounded(rows, self.codebook), self.mask, self.shape)
        return code.project(weight), code

    def _codes(self, weight: Tensor) -> Tensor:
        values, width = entries.kept(weight, self.mask).double(), self.codebook.shape[1]
        table = scaled_values(self.codebook, self.scale, weight.dtype).double().numpy()
        whole = len(values) // width * width
        parts = [nearest_rows(values[:whole].view(whole // width, width).numpy(), table)]
        if whole < len(values):
            parts.append(nearest_rows(values[None, whole:].numpy(), table[:, : len(values) - whole]))
        return torch.cat([torch.from_numpy(part) for part in parts])
