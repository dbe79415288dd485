"""How weights that share values are stored: which value each entry has, and the values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_compress.codes import Code
from lightning_compress.functional.bit_errors import Word
from lightning_compress.functional.clustering import nearest
from lightning_compress.functional.groups import like, real
from lightning_compress.sharing.entries import pieces

MAX_VALUES = 1 << 16  # entries of a codebook: symbols of the coders


class SharedCode(Code):
    """A weight whose entries share values; which of them share one does not change while they are trained."""

    stage: ClassVar[str] = "grid"

    @abstractmethod
    def tied(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which entries share a value.

        Args:
            weight: the layer's weight.

        Returns:
            int64 labels, shape of the real view of the weight, on its device: entries with the same label >= 0 are one
            value, those labelled -1 are held at zero. And None, or signs (-1 and 1, dtype of the real view): an
            entry is its sign times the value.
        """

    def project(self, weight: Tensor) -> Tensor:
        """The nearest weight that the code can store.

        Args:
            weight: any values of the weight's shape.

        Returns:
            Shape, dtype and device of ``weight``.
        """
        return self.rebuild(self.arrays(weight), weight.dtype).to(weight.device)

    @abstractmethod
    def refreshed(self, weight: Tensor) -> tuple[Tensor, SharedCode]:
        """The code of a weight after training in which tied entries stayed equal.

        Args:
            weight: the new weight.

        Returns:
            The weight as the code can store it (values are rounded to the precision of the codebook), on the weight's
            device, and the code.

        Raises:
            ValueError: it has more different values than the code.
        """

    def config(self) -> dict[str, Any]:
        """The attributes that are not tensors, as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in super().config().items()}


@dataclass(frozen=True, eq=False)
class Codebook(SharedCode):
    """A weight of K different values: ``w_i = s c[k_i]``; the indices follow from the weight.

    The two planes of a complex weight share the codebook.

    Args:
        codebook: c, [K] ascending, on the CPU: floating-point, or integers of a grid.
        scale: s > 0, [1] on the CPU, or None for 1.
        zero: entries that are 0 are held at zero, as in a pruned weight.

    Examples:
        >>> code = Codebook(torch.tensor([-0.5, 0.0, 2.0]))
        >>> code.project(torch.tensor([-9.0, 0.2, 1.1])).tolist()
        [-0.5, 0.0, 2.0]
        >>> code.tied(torch.tensor([2.0, -0.5, 2.0]))[0].tolist()
        [2, 0, 2]

    Source: Han et al. 2016, Deep Compression.
    """

    codebook: Tensor
    scale: Tensor | None = None
    zero: bool = False
    kind: ClassVar[str] = "codebook"

    @property
    def word(self) -> Word:
        """An index."""
        return index_word(len(self.codebook))

    def table(self, dtype: torch.dtype) -> Tensor:
        """The values of a weight of this dtype, [K] in its real dtype."""
        return scaled_values(self.codebook, self.scale, dtype)

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Indices of the nearest values, and the codebook."""
        codes = nearest(real(weight.detach()).cpu(), self.table(weight.dtype))
        return {"codes": codes.to(index_dtype(len(self.codebook))), **tensors_of(self)}

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``s c[k]``."""
        return like(taken(self.table(dtype), arrays["codes"]), dtype)

    def bits(self, weight: Tensor) -> int:
        """``min(b N, b' kept + N)``, ``b = ceil(log2 K)``, b' the same without the zero; and the codebook."""
        values = real(weight.detach())
        entries, width = values.numel(), index_width(len(self.codebook))
        if self.zero:
            sparse = index_width(len(self.codebook) - 1) * int((values != 0).sum()) + weight.numel()
            return min(width * entries, sparse) + side_bits(self)
        return width * entries + side_bits(self)

    def tied(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Indices of the nearest values."""
        table = self.table(weight.dtype)
        labels = nearest(real(weight.detach()), table)
        return (
            labels.masked_fill_((table == 0).to(labels.device)[labels], -1) if self.zero else labels
        ), None

    def refreshed(self, weight: Tensor) -> tuple[Tensor, Codebook]:
        """The values that the weight has now."""
        values = torch.unique(real(weight.detach()).cpu())
        if self.zero:
            values = torch.unique(torch.cat([values, values.new_zeros(1)]))
        check_count(len(values), len(self.codebook))
        code = Codebook(*rounded(values, self.codebook), zero=self.zero)
        return code.project(weight.detach()), code


# -- what codes with tables of values have in common ---------------------------------------------------------


def index_dtype(count: int) -> torch.dtype:
    """The smallest unsigned integers that count so many values."""
    return torch.uint8 if count <= 1 << 8 else torch.uint16


def index_width(count: int) -> int:
    """Bits that tell so many values apart: ``ceil(log2 K)``."""
    return max(count - 1, 0).bit_length()


def index_word(count: int) -> Word:
    """Layout of an index into a table of so many values."""
    return Word(max(index_width(count), 1), count=count)


def tensors_of(code: Code) -> dict[str, Tensor]:
    """The attributes of a code that are tensors."""
    return {name: value for name, value in vars(code).items() if isinstance(value, Tensor)}


def side_bits(code: Code) -> int:
    """Bits of the tensors that a code holds."""
    return sum(8 * t.numel() * t.element_size() for t in tensors_of(code).values())


def check_count(found: int, allowed: int) -> None:
    """Refuse a weight with more different values than its code has."""
    if found > allowed:
        raise ValueError(
            f"the weight has {found} different values and its code {allowed}: tied entries moved apart."
        )


def scaled_values(codebook: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``s c`` as values of a weight.

    Args:
        codebook: c.
        scale: s, [1], or None for 1.
        dtype: of the weight.

    Returns:
        Shape of the codebook, real dtype of the weight.
    """
    values = codebook.double() if scale is None else codebook.double() * scale.double()
    return values.to(dtype.to_real())


def rounded(values: Tensor, kind: Tensor, sort: bool = True) -> tuple[Tensor, Tensor | None]:
    """Values in the precision of a codebook: ``s c ~ v``.

    Args:
        values: finite, [K] or [K, b].
        kind: a codebook: floating-point, or integers; these keep their largest modulus.
        sort: give different values in ascending (lexicographic) order; otherwise all, in theirs.

    Returns:
        The values, and their scale.

    Raises:
        ValueError: a value is too large for the floating-point type.

    Examples:
        >>> rounded(torch.tensor([1.0, 0.26, 0.24]), torch.tensor([4], dtype=torch.int8))
        (tensor([1, 4], dtype=torch.int8), tensor([0.2500]))
    """
    scale = None
    if kind.is_floating_point():
        found = values.to(kind.dtype) + 0.0  # no -0.0
    else:
        largest = float(values.double().abs().max())
        scale = torch.tensor([largest / max(float(kind.abs().max()), 1.0) or 1.0])
        found = (values.double() / scale.double()).round()
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"a value of {float(values.abs().max()):.4g} does not fit in {kind.dtype}: take another codebook_dtype."
        )
    found = found.to(kind.dtype)
    return (torch.unique(found, dim=0) if sort else found), scale


def taken(table: Tensor, codes: Tensor) -> Tensor:
    """``c[k]``, for indices that may come from a forged file.

    Args:
        table: [K] or [K, b].
        codes: indices, uint8 or uint16.

    Returns:
        Shape of the indices (and b).

    Raises:
        ValueError: indices of another dtype or out of range.
    """
    if codes.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"indices have dtype {codes.dtype}; allowed are torch.uint8 and torch.uint16.")
    found = table.new_empty((codes.numel(), *table.shape[1:]))
    for start, piece in pieces(codes.reshape(-1)):
        places = piece.to(torch.int64)
        if places.numel() and int(places.max()) >= len(table):
            raise ValueError(f"an index is {int(places.max())}; allowed are 0 to {len(table) - 1}.")
        found[start : start + len(piece)] = table[places]
    return found.view(*codes.shape, *table.shape[1:])
