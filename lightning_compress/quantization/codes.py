"""How quantized weights are stored: integers and their scales, powers of two, small floating-point numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_compress.codes import Code
from lightning_compress.functional import affine, formats
from lightning_compress.functional.bit_errors import Word
from lightning_compress.functional.groups import SMALL, Groups, real

Rounding = Callable[..., Tensor]
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)


@dataclass(frozen=True, eq=False)
class GridCode(Code):
    """A weight whose entries lie on a grid that a few numbers per group describe.

    Args:
        axes: axes along which the groups differ.
        size: 0, or the inputs of one run (see ``lightning_compress.functional.groups.Groups``).
        width: bits of one entry.
    """

    axes: tuple[int, ...]
    size: int
    width: int
    stage: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))  # a list, in a stored configuration

    @property
    def groups(self) -> Groups:
        """Which entries share a scale."""
        return Groups(self.axes, self.size)

    def config(self) -> dict[str, Any]:
        """The attributes that are not tensors, as JSON values."""
        return super().config() | {"axes": list(self.axes)}

    def project(self, weight: Tensor) -> Tensor:
        """The nearest values on the grid.

        Args:
            weight: any values of the weight's shape.

        Returns:
            Shape, dtype and device of ``weight``.
        """
        return self.rebuild(self.arrays(weight), weight.dtype).to(weight.device)

    def bits(self, weight: Tensor) -> int:
        """``min(b N, b kept + N)`` with b bits an entry (twice for a complex one), and the numbers of the groups."""
        entries = real(weight).numel()
        kept = int(torch.count_nonzero(weight)) * (2 if weight.is_complex() else 1)
        side = sum(t.numel() * t.element_size() * 8 for t in vars(self).values() if isinstance(t, Tensor))
        return min(self.width * entries, self.width * kept + weight.numel()) + side

    def _codes(self, weight: Tensor, kind: torch.dtype, rounded: Rounding, *numbers: Tensor | None) -> Tensor:
        """The integers of a weight, piece by piece: ``rounded(values, *numbers of their groups)``."""
        values = real(weight.detach())
        codes = torch.empty(values.shape, dtype=kind)
        for index, parts in self.groups.pieces(weight.shape, *numbers, is_complex=weight.is_complex()):
            codes[index] = rounded(values[index].cpu(), *parts).to(kind)
        return codes

    def _values(self, codes: Tensor, dtype: torch.dtype, value: Rounding, *numbers: Tensor | None) -> Tensor:
        """Inverse of ``_codes``: a weight of this dtype."""
        if codes.numel() <= SMALL and not dtype.is_complex:
            spread = [None if n is None else self.groups.expand(n, codes.shape) for n in numbers]
            return value(codes, *spread).to(dtype)
        weight = torch.empty(codes.shape[:-1] if dtype.is_complex else codes.shape, dtype=dtype)
        values = real(weight)
        if values.shape != codes.shape:
            raise ValueError(f"codes of shape {tuple(codes.shape)} are none of a weight of dtype {dtype}.")
        for index, parts in self.groups.pieces(weight.shape, *numbers, is_complex=dtype.is_complex):
            values[index] = value(codes[index], *parts).to(values.dtype)
        return weight


@dataclass(frozen=True, eq=False)
class Affine(GridCode):
    """Integers on an even grid: ``w = s (q - z)``.

    Args:
        scale: float32 [G] > 0 on the CPU.
        zero_point: int32 [G], or None for zeros.
        qmin: smallest integer.
        qmax: largest integer.
        axes: axes along which the groups differ.
        size: 0, or the inputs of one run.
        width: bits of one integer; 1 means the two values -s and s.

    Examples:
        >>> code = Affine((0,), 0, 4, torch.tensor([0.5, 1.0]), None, -7, 7)
        >>> code.project(torch.tensor([[0.3, 9.0], [0.3, 9.0]])).tolist()
        [[0.5, 3.5], [0.0, 7.0]]

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """

    scale: Tensor
    zero_point: Tensor | None
    qmin: int
    qmax: int
    kind: ClassVar[str] = "affine"

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """The integers, and what belongs to the groups."""

        def rounded(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
            if self.width == 1:
                return torch.where(values >= 0, 1.0, -1.0)
            return affine.quantize(values, scale, zero, self.qmin, self.qmax)

        codes = self._codes(weight, self.dtype, rounded, self.scale, self.zero_point)
        fields = {"codes": codes, "scale": self.scale}
        return fields if self.zero_point is None else {**fields, "zero_point": self.zero_point}

    @property
    def word(self) -> Word:
        """Integers: in two's complement where there are negative ones, or a sign alone."""
        return Word(self.width, "only" if self.width == 1 else "complement" if self.qmin < 0 else "none")

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds the grid."""
        fits = (t for t in _INTEGERS if torch.iinfo(t).min <= self.qmin and self.qmax <= torch.iinfo(t).max)
        return next(fits)

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """``s (q - z)``."""
        wide = affine.wide(dtype.to_real())

        def value(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
            return affine.dequantize(codes.to(wide), scale, zero)

        return self._values(arrays["codes"], dtype, value, self.scale, self.zero_point)

    def scaled(self, weight: Tensor, factor: Tensor, axis: int) -> tuple[Tensor, Code] | None:
        """Scales take the factors in; negative ones change the signs of the integers."""
        symmetric = self.zero_point is None and self.qmin == -self.qmax and not weight.is_complex()
        if self.size or not symmetric or not bool(torch.isfinite(factor).all()) or bool((factor == 0).any()):
            return None
        shape = list(weight.shape)
        axes = tuple(sorted({*self.axes, axis}))
        full = self.groups.expand(self.scale, shape)
        line = [1] * len(shape)
        line[axis] = shape[axis]
        wanted = full.double() * factor.detach().cpu().double().abs().view(line)
        scale = wanted.expand([n if a in axes else 1 for a, n in enumerate(shape)]).float().flatten()
        code = Affine(axes, 0, self.width, scale, None, self.qmin, self.qmax)
        codes = self.arrays(weight)["codes"] * factor.detach().cpu().sign().to(self.dtype).view(line)
        return code.rebuild({"codes": codes}, weight.dtype), code


@dataclass(frozen=True, eq=False)
class PowerOfTwo(GridCode):
    """Zero and signed powers of two: ``w = sign(c) 2^(e_max - (|c| - 1))``.

    Args:
        e_max: largest exponent of every group, int32 [G] on the CPU.
        axes: axes along which the groups differ.
        size: 0, or the inputs of one run.
        width: bits: one for the sign, the others for the exponent code.
        rounding: "log" (nearest exponent) or "linear" (nearest value).

    Examples:
        >>> code = PowerOfTwo((), 0, 4, torch.tensor([0], dtype=torch.int32), "log")
        >>> code.project(torch.tensor([0.9, -0.3, 1e-4])).tolist()
        [1.0, -0.25, 0.0]

    Source: Miyashita et al. 2016, Convolutional Neural Networks using Logarithmic Data Representation.
    """

    e_max: Tensor
    rounding: str
    kind: ClassVar[str] = "power_of_two"

    @property
    def word(self) -> Word:
        """A sign, and the exponent code."""
        return Word(self.width, "modulus", exponent=self.width - 1)

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Signed exponent codes, and the largest exponents."""

        def rounded(values: Tensor, e_max: Tensor) -> Tensor:
            limits = e_max.expand(values.shape).reshape(-1)
            codes, _ = formats.log2_quantize(values.float().reshape(-1, 1), self.width, limits, self.rounding)
            return codes.view(values.shape)

        kind = torch.int16 if self.width > 8 else torch.int8
        return {"codes": self._codes(weight, kind, rounded, self.e_max), "e_max": self.e_max}

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Signs times powers of two."""

        def value(codes: Tensor, e_max: Tensor) -> Tensor:
            flat, limits = codes.to(torch.int32).reshape(-1, 1), e_max.expand(codes.shape).reshape(-1)
            return formats.log2_dequantize(flat, limits, self.width).view(codes.shape)

        return self._values(arrays["codes"], dtype, value, self.e_max)


@dataclass(frozen=True, eq=False)
class MiniFloatCode(GridCode):
    """Floating-point numbers with few bits: ``w = s v``, v of E exponent and M mantissa bits.

    Args:
        scale: float32 [G] > 0 on the CPU.
        exponent: E.
        mantissa: M.
        axes: axes along which the groups differ.
        size: 0, or the inputs of one run.
        width: 1 + E + M.

    Examples:
        >>> code = MiniFloatCode((), 0, 8, torch.tensor([1.0]), 4, 3)
        >>> code.project(torch.tensor([0.3, 1000.0])).tolist()
        [0.3125, 448.0]

    Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning.
    """

    scale: Tensor
    exponent: int
    mantissa: int
    kind: ClassVar[str] = "minifloat"

    @property
    def word(self) -> Word:
        """Sign, exponent and mantissa."""
        return Word(self.width, exponent=self.exponent)

    def arrays(self, weight: Tensor) -> dict[str, Tensor]:
        """Bit patterns and scales."""

        def rounded(values: Tensor, scale: Tensor) -> Tensor:
            return formats.minifloat_quantize(values.float() / scale, self.exponent, self.mantissa)

        kind = torch.uint8 if self.width <= 8 else torch.int32
        return {"codes": self._codes(weight, kind, rounded, self.scale), "scale": self.scale}

    def rebuild(self, arrays: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Values of the bit patterns, times the scales."""

        def value(codes: Tensor, scale: Tensor) -> Tensor:
            plain = codes.to(torch.int32)
            return formats.minifloat_dequantize(plain, self.exponent, self.mantissa, special=True) * scale

        return self._values(arrays["codes"], dtype, value, self.scale)
