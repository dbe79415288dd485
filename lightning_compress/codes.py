"""How a weight can be stored: small records kept beside plain weights.

A code says how best to store a weight (which entries are zero, which grid it lies on); the weight itself
says what it *is*. So a code is compared with the weight before every use, and a stale one is reported,
never trusted. Codes live in the layer's ``__dict__``: they travel with ``copy.deepcopy`` and ``pickle`` and
never appear in a ``state_dict``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.functional.masks import apply_mask_
from lightning_compress.names import clean
from lightning_compress.targets import Target, parameter

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
        rebuilt = self.rebuild(self.arrays(weight), weight.dtype)
        return same_bits(rebuilt, weight)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Mask(Code):
    """Zeros at known places; everything else free.

    Args:
        mask: bool tensor on the CPU, shape of the weight, True = kept.

    Examples:
        >>> weight = torch.tensor([0.0, 1.5, 0.0])
        >>> Mask(torch.tensor([False, True, False])).matches(weight)
        True
        >>> Mask(torch.tensor([True, False, False])).matches(weight)
        False
    """

    mask: Tensor
    kind: ClassVar[str] = "mask"
    stage: ClassVar[str] = "mask"

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Mask and the kept values in order."""
        return {"mask": self.mask, "values": weight.detach().cpu()[self.mask]}

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Zeros with the values written at the kept places."""
        if arrays["mask"].dtype != torch.bool:  # integers would be taken as positions
            raise ValueError(f"a mask has dtype {arrays['mask'].dtype}; allowed is torch.bool.")
        weight = torch.zeros(arrays["mask"].shape, dtype=dtype)
        weight[arrays["mask"]] = arrays["values"]
        return weight

    def bits(self, weight: Tensor) -> int:
        """``min(b N, b kept + N)``, b bits an entry: values plus one bit a position, or dense when that is less."""
        width = weight.element_size() * 8
        return min(width * self.mask.numel(), width * int(self.mask.sum()) + self.mask.numel())

    def matches(self, weight: Tensor) -> bool:
        """Whether shapes agree and every masked entry is zero."""
        if self.mask.shape != weight.shape:
            return False
        return not bool((weight.detach() != 0)[~self.mask.to(weight.device)].any())


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
    attach(module, param, Mask(mask.detach().cpu().clone()))
