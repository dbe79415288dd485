"""How a weight can be stored: small records kept beside plain weights.

A code says how best to store a weight (which entries are zero, which grid it lies on); the weight itself
says what it *is*. So a code is compared with the weight before every use, and a stale one is reported,
never trusted. Codes live in the layer's ``__dict__``: they travel with ``copy.deepcopy`` and ``pickle`` and
never appear in a ``state_dict``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.functional.bit_errors import Word
from lightning_compress.functional.masks import apply_mask_, pack_bits, unpack_bits
from lightning_compress.names import clean
from lightning_compress.targets import Target, parameter

_PIECE = 1 << 18  # entries of a mask that are unpacked at a time, a multiple of 8
_SLOT = "_compression_codes"  # layer.__dict__[_SLOT]: parameter name -> Code


@dataclass(frozen=True, eq=False)
class Code(ABC):
    """How one weight can be stored; concrete codes are frozen dataclasses of tensors and numbers.

    Attributes:
        kind: name in archives.
        stage: what later methods may assume, ``"mask"`` (zeros only) or ``"grid"`` (values on a grid or in
            a codebook).
    """

    kind: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    registry: ClassVar[dict[str, type[Code]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kind:
            Code.registry[cls.kind] = cls

    @abstractmethod
    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight as arrays that an entropy coder can store: ``weight -> fields``.

        Args:
            weight: the layer's weight.

        Returns:
            Field name -> tensor on the CPU, enough for ``rebuild``.
        """

    @abstractmethod
    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Inverse of ``arrays``, bit-exact; needs no model.

        Args:
            arrays: what ``arrays`` returned.
            dtype: dtype of the weight.

        Returns:
            The weight on the CPU.
        """

    def config(self) -> dict[str, Any]:
        """The attributes that are not tensors, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if not isinstance(value, Tensor)}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Code:
        """The code that ``arrays`` and ``config`` came from; attributes are found by name in either.

        Args:
            arrays: what ``arrays`` returned.
            config: what ``config`` returned.

        Returns:
            An equal code.
        """
        return cls(**{f.name: arrays[f.name] if f.name in arrays else config[f.name] for f in fields(cls)})

    @abstractmethod
    def bits(self, weight: Tensor) -> int:
        """Counted storage bits of the weight under this code, before entropy coding."""

    @property
    def word(self) -> Word | None:
        """Layout of one entry of the array "codes"; None for a code without one."""
        return None

    @property
    def arithmetic(self) -> Code:
        """The code that products are computed by: the code itself, or of integers that are stored in some other way."""
        return self

    def holds(self, arrays: Mapping[str, Tensor], weight: Tensor) -> bool:
        """Whether ``rebuild`` gives every bit of the weight.

        Args:
            arrays: what ``arrays`` returned for it.
            weight: the layer's weight.

        Returns:
            True if it does.
        """
        return same_bits(self.rebuild(arrays, weight.dtype), weight)

    def scaled(self, weight: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Code] | None:
        """The weight with every index of an axis multiplied by a factor, if a code of this kind can hold it.

        Args:
            weight: the layer's weight.
            factor: one number for each index.
            axis: of the weight.

        Returns:
            The new weight on the CPU (it may differ from the product by rounding) and its code; None if there is no
            such code.
        """
        return None

    def matches(self, weight: Tensor) -> bool:
        """Whether the weight still is what the code says, bit for bit."""
        return self.holds(self.arrays(weight), weight)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False, init=False)
class Mask(Code):
    """Zeros at known places; everything else free.

    Args:
        mask: bool tensor, shape of the weight, True = kept; it is held with one bit an entry.

    Examples:
        >>> weight = torch.tensor([0.0, 1.5, 0.0])
        >>> Mask(torch.tensor([False, True, False])).matches(weight)
        True
        >>> Mask(torch.tensor([True, False, False])).matches(weight)
        False
    """

    packed: Tensor
    shape: tuple[int, ...]
    kind: ClassVar[str] = "mask"
    stage: ClassVar[str] = "mask"

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:  # integers would be taken as positions
            raise ValueError(f"a mask has dtype {mask.dtype}; allowed is torch.bool.")
        self._set(pack_bits(mask), mask.shape)

    @classmethod
    def of_bits(cls, packed: Tensor, shape: Sequence[int]) -> Mask:
        """The mask of packed bits, which are not copied.

        Args:
            packed: what ``functional.masks.pack_bits`` returned.
            shape: of the weight.

        Returns:
            The code.

        Raises:
            ValueError: the number of bytes does not fit the shape.

        Examples:
            >>> Mask.of_bits(torch.tensor([160], dtype=torch.uint8), (3,)).mask
            tensor([ True, False,  True])
        """
        needed = -(-math.prod(shape) // 8)
        if packed.dtype != torch.uint8 or packed.shape != (needed,):
            raise ValueError(
                f"{packed.dtype} of shape {tuple(packed.shape)} is no mask of shape {tuple(shape)}: torch.uint8 of "
                f"shape ({needed},) is."
            )
        code = cls.__new__(cls)
        code._set(packed.detach().cpu(), shape)
        return code

    def _set(self, packed: Tensor, shape: Sequence[int]) -> None:
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "shape", tuple(shape))

    @property
    def mask(self) -> Tensor:
        """Bool tensor on the CPU, shape of the weight, True = kept."""
        return unpack_bits(self.packed, self.shape)

    @property
    def kept(self) -> int:
        """Number of entries that are kept."""
        return sum(int(mask.sum()) for mask, _ in self._pieces())

    def _pieces(self) -> Iterator[tuple[Tensor, slice]]:
        """The mask in parts, and which entries they are for."""
        count = math.prod(self.shape)
        for start in range(0, count, _PIECE):
            part = slice(start, min(start + _PIECE, count))
            packed = self.packed[start // 8 : -(-part.stop // 8)]
            yield unpack_bits(packed, (part.stop - part.start,)), part

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Mask and the kept values in order."""
        if self.shape != tuple(weight.shape):
            raise ValueError(f"a mask of shape {self.shape} for a weight of shape {tuple(weight.shape)}.")
        flat = weight.detach().cpu().reshape(-1)
        values, place = torch.empty(self.kept, dtype=weight.dtype), 0
        for mask, part in self._pieces():
            found = flat[part][mask]
            values[place : place + len(found)] = found
            place += len(found)
        return {"mask": self.mask, "values": values}

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Zeros with the values written at the kept places."""
        values, place = arrays["values"], 0
        if self.kept != len(values):
            raise ValueError(f"{len(values)} values for {self.kept} kept entries.")
        weight = torch.zeros(math.prod(self.shape), dtype=dtype)
        for mask, part in self._pieces():
            count = int(mask.sum())
            weight[part][mask] = values[place : place + count].to(dtype)
            place += count
        return weight.view(self.shape)

    @property
    def arithmetic(self) -> Code:
        """The code that products are computed by: the code itself, or of integers that are stored in some other way."""
        return self

    def holds(self, arrays: Mapping[str, Tensor], weight: Tensor) -> bool:
        """Whether every bit of the masked entries is zero."""
        flat = weight.detach().cpu().contiguous().reshape(-1)
        return not any(bool(flat[part][~mask].view(torch.uint8).any()) for mask, part in self._pieces())

    def bits(self, weight: Tensor) -> int:
        """``min(b N, b kept + N)``, b bits an entry: values plus one bit a position, or dense when that is less."""
        width, count = weight.element_size() * 8, math.prod(self.shape)
        return min(width * count, width * self.kept + count)

    def config(self) -> dict[str, Any]:
        """Nothing: all of it is in the arrays."""
        return {}

    @classmethod
    def restore(cls, arrays: Mapping[str, Tensor], config: Mapping[str, Any]) -> Mask:
        """The mask that ``arrays`` came from."""
        return cls(arrays["mask"])

    def matches(self, weight: Tensor) -> bool:
        """Whether shapes agree and every masked entry is zero."""
        if self.shape != tuple(weight.shape):
            return False
        flat = weight.detach().reshape(-1)
        return not any(bool((flat[part].cpu()[~mask] != 0).any()) for mask, part in self._pieces())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, also NaN and -0.0.

    Args:
        a: any tensor.
        b: any tensor.

    Returns:
        True if dtype, shape and every bit agree.

    Examples:
        >>> same_bits(torch.tensor(0.0), torch.tensor(-0.0))
        False
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    return torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def attach(module: nn.Module, param: str, code: Code) -> None:
    """Put a code beside a weight, replacing an earlier one.

    Args:
        module: the layer.
        param: parameter name inside the layer.
        code: how the weight can be stored.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> attach(layer, "weight", Mask(torch.tensor([[True, False]])))
        >>> read(layer, "weight").mask.tolist()
        [[True, False]]
        >>> list(layer.state_dict())
        ['weight']
    """
    module.__dict__.setdefault(_SLOT, {})[param] = code


def read(module: nn.Module, param: str) -> Code | None:
    """The code of a weight, or None.

    Args:
        module: the layer.
        param: parameter name inside the layer.

    Returns:
        The attached code; it may be stale (see ``Code.matches``).
    """
    code: Code | None = module.__dict__.get(_SLOT, {}).get(param)
    return code


def remove(module: nn.Module, param: str) -> None:
    """Forget the code of a weight; nothing happens when there is none.

    Args:
        module: the layer.
        param: parameter name inside the layer.
    """
    codes = module.__dict__.get(_SLOT, {})
    codes.pop(param, None)
    if not codes:
        module.__dict__.pop(_SLOT, None)


def of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Code]]:
    """All codes of a model.

    Args:
        model: any module.

    Yields:
        Full parameter name, layer, parameter name inside the layer, code.
    """
    for raw, module in model.named_modules():
        name = clean(raw)
        for param, code in module.__dict__.get(_SLOT, {}).items():
            yield (f"{name}.{param}" if name else param), module, param, code


def current_mask(target: Target) -> Tensor | None:
    """The mask of a target if it has one and the weight still respects it.

    Args:
        target: a weight.

    Returns:
        Bool tensor on the weight's device, or None.
    """
    code = read(target.module, target.param)
    if isinstance(code, Mask) and code.matches(target.weight):
        return code.mask.to(target.weight.device)
    return None


def set_mask(module: nn.Module, param: str, mask: Tensor) -> None:
    """Zero the masked entries of a weight in place and attach the mask as its code.

    Args:
        module: the layer.
        param: parameter name inside the layer.
        mask: bool, shape of the weight, True = kept.
    """
    weight = parameter(module, param)
    apply_mask_(weight, mask.to(weight.device))
    attach(module, param, Mask(mask))
