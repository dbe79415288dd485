"""Number formats that are no integer grid: powers of two with a zero, and small floating-point formats.

Codes are small integers and everything is exact: powers of two are built from their bits, so nothing
overflows on the way and float32's own subnormals come out right. NaN and infinite weights are refused
before they get here; what the functions do with them is stated where it matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

MINIFLOATS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"e4m3": (4, 3), "e5m2": (5, 2), "e3m4": (3, 4), "e2m1": (2, 1), "fp16": (5, 10), "bf16": (8, 7)}
)
"""Format names and their (exponent, mantissa) bits."""

_MANTISSA = 23  # float32: fraction bits, exponent bias, and the exponents of the smallest values
_BIAS = 127
_NORMAL, _SUBNORMAL = -126, -149
# Mantissas in [1/2, 1) from here on round up to 1. "log": the first float32 above sqrt(1/2), so no ties.
_UP_FROM = {"log": 0.7071068286895752, "linear": 0.75}
# Codes above the largest finite one: the whole top exponent, unless a format says otherwise.
_SPECIAL_CODES = {(4, 3): 1, (2, 1): 0}


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^e`` in float32 without rounding, subnormals included.

    Args:
        exponent: integer tensor, each in -149..127.

    Returns:
        float32 tensor of the same shape.

    Examples:
        >>> power_of_two(torch.tensor([-149, 0, 3])).tolist()
        [1.401298464324817e-45, 1.0, 8.0]
    """
    e = exponent.to(torch.int32)
    normal = (e.clamp(min=_NORMAL) + _BIAS) << _MANTISSA
    subnormal = torch.ones_like(e) << (e.clamp(max=_NORMAL - 1) - _SUBNORMAL)
    return torch.where(e >= _NORMAL, normal, subnormal).view(torch.float32)


def log2_quantize(
    rows: Tensor, bits: int, e_max: Tensor | None = None, rounding: str = "log"
) -> tuple[Tensor, Tensor]:
    r"""Codes of the nearest powers of two: ``w̃ = sign(w) 2^clip(e, e_min, e_max)``, or 0.

    ``e = rne(log2 |w|)`` for rounding="log", the exponent of the power nearest in value for "linear" (1.5
    2^k goes up). A code c is a signed integer: 0 is zero, otherwise sign(c) is the sign and |c| - 1 counts
    down from the top, e = e_max - (|c| - 1), |c| <= 2^(bits-1) - 1. So e_min = e_max - (2^(bits-1) - 2),
    and |w| < 2^(e_min-1) becomes 0.

    Args:
        rows: float32 [G, n], finite.
        bits: 2..8, sign included.
        e_max: int32 [G], each in -149..127; default: rne(log2 max |w|) of each row (0 for a row of
            zeros), at most 127, as 2^128 is no float32.
        rounding: "log" or "linear".

    Returns:
        codes int8 [G, n] and e_max int32 [G].

    Raises:
        ValueError: bits outside 2..8, or an unknown rounding.

    Examples:
        >>> log2_quantize(torch.tensor([[1.0, -0.3, 0.02, 0.0]]), bits=4)
        (tensor([[ 1, -3,  7,  0]], dtype=torch.int8), tensor([0], dtype=torch.int32))

    Source: Miyashita et al. 2016, Convolutional Neural Networks using Logarithmic Data Representation.
    """
    _check_bits(bits)
    if rounding not in _UP_FROM:
        raise ValueError(f"log2: rounding={rounding!r} is unknown; allowed: {', '.join(_UP_FROM)}.")
    rows = rows.detach().to(torch.float32)
    if e_max is None:
        m, x = torch.frexp(rows.abs().amax(dim=1))
        e_max = (x - (m < _UP_FROM["log"]).int()).where(m > 0, 0).clamp(max=_BIAS)
    e_max = e_max.to(torch.int32)
    top = e_max[:, None]
    bottom = top - (2 ** (bits - 1) - 2)
    m, x = torch.frexp(rows.abs())  # |w| = m 2^x with m in [1/2, 1), exact for subnormals too
    e = x - (m < _UP_FROM[rounding]).int()
    code = top + 1 - e.clamp(min=bottom, max=top)
    code = code.masked_fill((m == 0) | (x < bottom), 0)
    return torch.where(rows < 0, -code, code).to(torch.int8), e_max


def log2_dequantize(codes: Tensor, e_max: Tensor, bits: int) -> Tensor:
    """Values of the codes: ``sign(c) 2^(e_max - |c| + 1)``, and +0 for code 0.

    The inverse of ``log2_quantize``: quantizing the result with the same e_max gives the same codes.

    Args:
        codes: integers [G, n] with |c| <= 2^(bits-1) - 1.
        e_max: int32 [G].
        bits: 2..8.

    Returns:
        float32 [G, n].

    Raises:
        ValueError: bits outside 2..8, or a code that ``bits`` cannot hold.

    Examples:
        >>> log2_dequantize(torch.tensor([[1, -3, 0]]), torch.tensor([0]), bits=4)
        tensor([[ 1.0000, -0.2500,  0.0000]])
    """
    _check_bits(bits)
    magnitude = codes.to(torch.int32).abs()
    levels = 2 ** (bits - 1) - 1
    if bool((magnitude > levels).any()):
        raise ValueError(f"log2: code {int(magnitude.max())} at bits={bits}: allowed is 0 to ±{levels}.")
    values = power_of_two((e_max.to(torch.int32)[:, None] - magnitude + 1).clamp(min=_SUBNORMAL))
    return torch.where(codes < 0, -values, values).masked_fill_(codes == 0, 0.0)


class MinifloatRange(NamedTuple):
    """Largest value, smallest normal and smallest subnormal of a format, and its exponent bias."""

    max: float
    normal: float
    subnormal: float
    bias: int


def minifloat_range(exponent: int, mantissa: int) -> MinifloatRange:
    """What EeMm can hold: bias ``2^(E-1) - 1``, smallest normal ``2^(1-bias)``, subnormal ``2^(1-bias-M)``.

    The all-ones exponent is reserved as in IEEE 754, except in e4m3, where only the all-ones code is NaN
    (max 448), and in e2m1, which has no specials (max 6).

    Args:
        exponent: bits of the exponent E, 2..8.
        mantissa: bits of the mantissa M, 0..10.

    Returns:
        (max, normal, subnormal, bias).

    Raises:
        ValueError: exponent or mantissa out of range.

    Examples:
        >>> minifloat_range(4, 3)
        MinifloatRange(max=448.0, normal=0.015625, subnormal=0.001953125, bias=7)

    Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning.
    """
    if not (2 <= exponent <= 8 and 0 <= mantissa <= 10):
        raise ValueError(
            f"minifloat e{exponent}m{mantissa}: allowed are 2 to 8 exponent and 0 to 10 mantissa bits."
        )
    bias = 2 ** (exponent - 1) - 1
    largest = 2 ** (exponent + mantissa) - 1 - _SPECIAL_CODES.get((exponent, mantissa), 2**mantissa)
    field, fraction = largest >> mantissa, largest % 2**mantissa
    top = (2**mantissa + fraction) * 2.0 ** (field - bias - mantissa)
    return MinifloatRange(top, 2.0 ** (1 - bias), 2.0 ** (1 - bias - mantissa), bias)


def minifloat_round(x: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Nearest value of the format: ``rne(x / ulp) ulp``, ``ulp = 2^(max(floor(log2 |x|), 1 - bias) - M)``.

    One formula for normals, subnormals and the carry, after saturation at ±max. Ties go to the even
    significand; with M = 0 a tie between two powers of two goes to the larger. The sign of a zero stays, so
    a negative underflow is -0.0 (as in torch's casts) and +0 stays +0. Infinities saturate, NaN stays NaN.

    Args:
        x: float32 of any shape.
        exponent: 2..8.
        mantissa: 0..10.

    Returns:
        float32, same shape; equal to ``minifloat_dequantize(minifloat_quantize(x))`` bit for bit.

    Examples:
        >>> minifloat_round(torch.tensor([1.07, -1000.0, 0.0]), 4, 3)
        tensor([   1.1250, -448.0000,    0.0000])

    Source: Micikevicius et al. 2022, FP8 Formats for Deep Learning.
    """
    significand, octave = _significand(x, exponent, mantissa)
    return significand.mul_(2.0**-mantissa).mul_(octave)


def minifloat_quantize(x: Tensor, exponent: int, mantissa: int) -> Tensor:
    """Bit patterns of ``minifloat_round(x)``: sign, exponent and mantissa from the highest bit down.

    Args:
        x: float32 of any shape, no NaN; infinities saturate.
        exponent: 2..8.
        mantissa: 0..10.

    Returns:
        int32 codes in 0..2^(1+E+M)-1, same shape.

    Raises:
        ValueError: a value is NaN (not every format has a code for it).

    Examples:
        >>> [hex(c) for c in minifloat_quantize(torch.tensor([1.0, -448.0, -0.0]), 4, 3).tolist()]
        ['0x38', '0xfe', '0x80']
    """
    if bool(x.isnan().any()):
        raise ValueError(
            f"minifloat: {int(x.isnan().sum())} of {x.numel()} values are NaN, which has no code."
        )
    significand, octave = _significand(x, exponent, mantissa)
    # Counting codes from zero, an octave is 2^M codes; the implicit bit and a carry add up by themselves.
    place = (octave.view(torch.int32) >> _MANTISSA) - (_BIAS + 1) + minifloat_range(exponent, mantissa).bias
    magnitude = (place << mantissa) + significand.abs().to(torch.int32)
    return magnitude | (significand.signbit().to(torch.int32) << (exponent + mantissa))


def minifloat_dequantize(codes: Tensor, exponent: int, mantissa: int, *, special: bool = False) -> Tensor:
    """Values of bit patterns, the inverse of ``minifloat_quantize``.

    Args:
        codes: integers of any shape, in 0..2^(1+E+M)-1.
        exponent: 2..8.
        mantissa: 0..10.
        special: decode codes of NaN and infinity, which ``minifloat_quantize`` does not make but damaged bits do.

    Returns:
        float32, same shape.

    Raises:
        ValueError: a code outside the range, or, without ``special``, one that stands for NaN or infinity.

    Examples:
        >>> minifloat_dequantize(torch.tensor([0x38, 0xFE, 0x80]), 4, 3)
        tensor([   1., -448.,   -0.])
    """
    limits = minifloat_range(exponent, mantissa)
    codes = codes.to(torch.int32)
    sign = codes >> (exponent + mantissa)
    magnitude = codes & (2 ** (exponent + mantissa) - 1)
    first = 2 ** (exponent + mantissa) - _SPECIAL_CODES.get((exponent, mantissa), 2**mantissa)
    beyond = magnitude >= first
    if bool(((sign >> 1 != 0) | (beyond & (not special))).any()):
        raise ValueError(
            f"minifloat e{exponent}m{mantissa}: a code is outside 0..{2 ** (1 + exponent + mantissa) - 1} "
            f"or stands for NaN or infinity; codes come from minifloat_quantize."
        )
    infinite = beyond & (magnitude == first) & ((exponent, mantissa) not in _SPECIAL_CODES)
    magnitude = magnitude.clamp_max(first - 1)
    place = ((magnitude >> mantissa) - 1).clamp_(min=0)
    significand = (magnitude - (place << mantissa)).to(torch.float32)
    values = significand.mul_(2.0**-mantissa).mul_(power_of_two(place + (1 - limits.bias)))
    if special:
        values = values.masked_fill_(beyond, torch.nan).masked_fill_(infinite, torch.inf)
    return torch.where(sign != 0, -values, values)


def _significand(x: Tensor, exponent: int, mantissa: int) -> tuple[Tensor, Tensor]:
    """Rounded x / ulp, an integer of at most 2^(M+1), and the octave 2^M ulp, a normal float32 power of two."""
    limits = minifloat_range(exponent, mantissa)
    x = x.detach().to(torch.float32).clamp(-limits.max, limits.max)
    # An exponent field with no fraction is a power of two. Subnormals of float32 have field 0: the clamp, at
    # the format's smallest exponent, covers them.
    field = x.view(torch.int32) & (0xFF << _MANTISSA)
    octave = field.clamp_(min=(_BIAS + 1 - limits.bias) << _MANTISSA).view(torch.float32)
    return x.div_(octave).mul_(2.0**mantissa).round_(), octave


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"log2: bits={bits}: allowed is 2 to 8, sign included.")
