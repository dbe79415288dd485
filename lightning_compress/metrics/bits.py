"""Flipped bits in what a model stores, and how many differ."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.functional.bit_errors import count_differing_bits, flip_bits
from lightning_compress.targets import Target, find


@dataclass(frozen=True)
class BitErrors:
    """A model whose stored weights were damaged.

    Args:
        model: a copy with the weights that the damaged bits decode to.
        flipped: bits that were flipped.
        bits: bits of all stored codes.
        nonfinite: decoded weights that are NaN or infinite; they are kept.
    """

    model: nn.Module
    flipped: int
    bits: int
    nonfinite: int

    @property
    def rate(self) -> float:
        """Share of the bits that were flipped; 0 for a model without weights."""
        return self.flipped / self.bits if self.bits else 0.0


def bit_error_rate(codes_a: Tensor, codes_b: Tensor) -> float:
    """Share of the bits that differ: ``popcount(a xor b) / bits``.

    Args:
        codes_a: stored codes, or plain numbers.
        codes_b: of the same shape and dtype.

    Returns:
        In [0, 1]; 0 for empty tensors.

    Raises:
        ValueError: shapes or dtypes differ.

    Examples:
        >>> from lightning_compress.metrics import bit_error_rate
        >>> bit_error_rate(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([1, 255], dtype=torch.uint8))
        0.0625
    """
    differing, bits = count_differing_bits(codes_a, codes_b)
    return differing / bits if bits else 0.0


@overload
def inject_bit_errors(model_or_codes: Tensor, rate: float, kind: str = ..., seed: int = ...) -> Tensor: ...
@overload
def inject_bit_errors(
    model_or_codes: nn.Module, rate: float, kind: str = ..., seed: int = ...
) -> BitErrors: ...
def inject_bit_errors(
    model_or_codes: nn.Module | Tensor, rate: float, kind: str = "random", seed: int = 0
) -> Tensor | BitErrors:
    """Flip bits of stored codes, as a faulty memory does.

    Of a model, bits of all targets are flipped where they are stored: integers, small floating-point numbers, exponents
    and indices of the codes that the weights have; the kept values of a pruned weight and weights without such a code
    as they are, float32 for example. Scales, codebooks, masks and everything that is no target stay.

    Args:
        model_or_codes: a model, which is left as it is; or a tensor.
        rate: expected share of flipped bits.
        kind: "random", "burst", "single_event" or "clustered"; see ``functional.bit_errors.flip_bits``.
        seed: of the flips; the global random state is untouched.

    Returns:
        A new tensor; or the damaged copy of the model, with counts.

    Raises:
        ValueError: an unknown kind, or a rate that it cannot have; names the weight.

    Examples:
        >>> from lightning_compress.metrics import inject_bit_errors
        >>> small = compress(nn.Linear(64, 64), [Quantize(4)]).model
        >>> damaged = inject_bit_errors(small, rate=0.01)
        >>> damaged.bits, 100 < damaged.flipped < 230, damaged.nonfinite
        (16384, True, 0)

    Source: Reagen et al. 2018, Ares: a framework for quantifying the resilience of deep neural networks.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model_or_codes, Tensor):
        return flip_bits(model_or_codes, rate, kind, generator=generator).to(model_or_codes.device)
    damaged = copy.deepcopy(model_or_codes)
    flipped = bits = nonfinite = 0
    for target in find(damaged):
        try:
            weight, *counts = _damaged(target, rate, kind, generator)
        except ValueError as error:
            raise ValueError(f"{target.key}: {error}") from None
        with torch.no_grad():
            target.weight.copy_(weight)
        codes.remove(target.module, target.param)
        flipped, bits = flipped + counts[0], bits + counts[1]
        nonfinite += int((~torch.isfinite(weight)).sum())
    return BitErrors(damaged, flipped, bits, nonfinite)


def _damaged(target: Target, rate: float, kind: str, generator: torch.Generator) -> tuple[Tensor, int, int]:
    """The weight that the damaged bits decode to; how many were flipped, and how many there are."""
    weight = target.weight.detach().cpu()
    code = codes.read(target.module, target.param)
    arrays = {} if code is None or not code.matches(weight) else code.arrays(weight)
    field = "values" if isinstance(code, codes.Mask) else "codes"
    word = None if code is None else code.word
    if code is None or field not in arrays or (field == "codes" and word is None):
        new = flip_bits(weight, rate, kind, generator=generator)
        return new, *count_differing_bits(weight, new)
    new = flip_bits(arrays[field], rate, kind, word=word, generator=generator)
    return code.rebuild({**arrays, field: new}, weight.dtype), *count_differing_bits(arrays[field], new, word)
