"""Flipped bits in stored words: independent ones, bursts, one a word, clusters.

A word is what one stored entry takes: ``width`` bits, of which the top one may be a sign and the next ones an exponent.
All kinds flip an expected share of exactly ``rate`` of all bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 16  # words that are worked on at a time
_RUNS = range(2, 9)  # lengths of bursts
_WINDOW, _SHARE = 64, 0.3  # bits of a window of "clustered", and how many of them flip
_SIGNS = ("none", "complement", "modulus", "only")
_TOP, _EXPONENT = 0.7, 0.5  # of "single_event": the top bit; of the others the exponent


@dataclass(frozen=True)
class Word:
    """The bits of one stored entry.

    Args:
        width: how many, 1 to 64.
        sign: how an entry becomes bits: "none" (as it is), "complement" (two's complement), "modulus" (a sign bit
            before the modulus) or "only" (-1 and 1 as one bit).
        exponent: bits of an exponent after the top bit; 0 if there is none.
        count: entries that flips lead to ``count`` or beyond are the last one below it, as in a table; None: no limit.

    Raises:
        ValueError: a number out of range.
    """

    width: int
    sign: str = "none"
    exponent: int = 0
    count: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 64 or not 0 <= self.exponent < self.width:
            raise ValueError(
                f"width={self.width}, exponent={self.exponent}: allowed are widths of 1 to 64, exponents below that."
            )
        if self.sign not in _SIGNS:
            raise ValueError(f"sign={self.sign!r} is unknown; allowed: {', '.join(_SIGNS)}.")


_FLOATS = {  # real dtype -> its word and the integers of the same size
    torch.float64: (Word(64, exponent=11), torch.int64),
    torch.float32: (Word(32, exponent=8), torch.int32),
    torch.float16: (Word(16, exponent=5), torch.int16),
    torch.bfloat16: (Word(16, exponent=8), torch.int16),
}


def word_of(dtype: torch.dtype) -> Word:
    """The word of a plain tensor: floating-point patterns, or integers of all bits of their type.

    Args:
        dtype: real or complex floating point (two words an entry), or integer.

    Returns:
        Its layout.

    Raises:
        ValueError: another dtype.

    Examples:
        >>> from lightning_compress.functional.bit_errors import word_of
        >>> word_of(torch.float32)
        Word(width=32, sign='none', exponent=8, count=None)
    """
    if dtype.is_complex:
        dtype = dtype.to_real()
    if dtype in _FLOATS:
        return _FLOATS[dtype][0]
    if dtype.is_floating_point or dtype == torch.bool:
        raise ValueError(
            f"dtype {dtype}: allowed are integers, float16, bfloat16, float32, float64 and complex."
        )
    return Word(8 * dtype.itemsize, "complement" if dtype.is_signed else "none")


def flip_bits(
    stored: Tensor, rate: float, kind: str = "random", *, word: Word | None = None, generator: torch.Generator
) -> Tensor:
    r"""Flip bits of stored entries.

    - "random": every bit with probability ``rate``.
    - "burst": runs of 2 to 8 neighbouring bits, of equally likely lengths, with starts so frequent that a share
      ``rate`` of all bits is in a run: ``prod_(d=0..7) (1 - p P(length > d)) = 1 - rate`` for starts of probability p.
    - "single_event": at most one bit of a word, so that ``rate <= 1 / width``: the top bit with 0.7; otherwise a bit of
      the exponent or of the rest, with equal chance; without an exponent any other bit.
    - "clustered": windows of 64 bits in a row; in a window that is hit, every bit with 0.3, so that ``rate <= 0.3``.

    Args:
        stored: integers in the range of the word, or floating-point and complex numbers (their bits are flipped).
        rate: expected share of flipped bits, in [0, 1].
        kind: see above.
        word: layout of an entry; None: that of the dtype.
        generator: source of randomness, on the CPU.

    Returns:
        A new tensor of the same shape and dtype on the CPU.

    Raises:
        ValueError: an unknown kind, or a rate that it cannot have.

    Examples:
        >>> from lightning_compress.functional.bit_errors import Word, flip_bits
        >>> codes = torch.tensor([-8, 0, 7], dtype=torch.int8)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> flip_bits(codes, 1.0, word=Word(4, "complement"), generator=seeded)
        tensor([ 7, -1, -8], dtype=torch.int8)

    Source: Reagen et al. 2018, Ares: a framework for quantifying the resilience of deep neural networks.
    """
    word = word_of(stored.dtype) if word is None else word
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; allowed: {', '.join(KINDS)}.")
    most = {"single_event": 1 / word.width, "clustered": _SHARE}.get(kind, 1.0)
    if not 0 <= rate <= most:
        raise ValueError(
            f"rate={rate}: kind={kind!r} on words of {word.width} bits can have 0 to {most:.4g}."
        )
    stored = stored.detach().cpu()
    flat = (torch.view_as_real(stored) if stored.is_complex() else stored).contiguous().reshape(-1)
    found = flat.clone()
    if rate:
        places = range(0, len(flat), _PIECE)
        flips = KINDS[kind](len(flat), word, rate, generator)
        for start, hit in zip(places, flips, strict=True):
            part = slice(start, start + len(hit))
            found[part] = _entries(_bits(flat[part], word) ^ _packed(hit), word, flat.dtype)
    return (
        torch.view_as_complex(found.view(*stored.shape, 2))
        if stored.is_complex()
        else found.view(stored.shape)
    )


def count_differing_bits(a: Tensor, b: Tensor, word: Word | None = None) -> tuple[int, int]:
    """Bits that differ between two stored tensors, and all bits: ``popcount(a xor b)``.

    Args:
        a: as for ``flip_bits``.
        b: of the same shape and dtype.
        word: layout of an entry; None: that of the dtype.

    Returns:
        Both counts.

    Raises:
        ValueError: shapes or dtypes differ.

    Examples:
        >>> from lightning_compress.functional.bit_errors import count_differing_bits
        >>> count_differing_bits(torch.tensor([0], dtype=torch.uint8), torch.tensor([5], dtype=torch.uint8))
        (2, 8)
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"{a.dtype} of shape {tuple(a.shape)} and {b.dtype} of {tuple(b.shape)}: both must be equal."
        )
    word = word_of(a.dtype) if word is None else word
    first, second = (
        (torch.view_as_real(t) if t.is_complex() else t).detach().cpu().contiguous().reshape(-1)
        for t in (a, b)
    )
    differing = 0
    for start in range(0, len(first), _PIECE):
        part = slice(start, start + _PIECE)
        xor = _bits(first[part], word) ^ _bits(second[part], word)
        differing += int(_COUNTS[xor.view(torch.uint8).long()].sum())
    return differing, len(first) * word.width


_COUNTS = torch.tensor([i.bit_count() for i in range(256)])


def _bits(values: Tensor, word: Word) -> Tensor:
    """Stored entries as int64 with the word in the low bits."""
    if values.is_floating_point():
        values = values.view(_FLOATS[values.dtype][1])
    wide = values.to(torch.int64)
    if word.sign == "only":
        return (wide < 0).long()
    if word.sign == "modulus":
        wide = wide.abs() | ((wide < 0).long() << (word.width - 1))
    return wide if word.width == 64 else wide & ((1 << word.width) - 1)


def _entries(bits: Tensor, word: Word, dtype: torch.dtype) -> Tensor:
    """Inverse of ``_bits``; of a negative zero the sign is lost."""
    if word.sign == "only":
        bits = 1 - 2 * bits
    elif word.sign == "modulus":
        modulus = bits & ((1 << (word.width - 1)) - 1)
        bits = torch.where((bits >> (word.width - 1) & 1).bool(), -modulus, modulus)
    elif word.sign == "complement" and word.width < 64:
        bits = bits - ((bits >> (word.width - 1) & 1) << word.width)
    if word.count is not None:
        bits = bits.clamp_max(word.count - 1)
    if dtype.is_floating_point:
        return bits.to(_FLOATS[dtype][1]).view(dtype)
    return bits.to(dtype)


def _packed(hit: Tensor) -> Tensor:
    """Which bits flip [N, width], the top bit first, as int64."""
    return (hit.long() << torch.arange(hit.shape[1] - 1, -1, -1)).sum(1)


def _pieces(count: int) -> Iterator[int]:
    """Numbers of words that are worked on together."""
    for start in range(0, count, _PIECE):
        yield min(_PIECE, count - start)


def _random(count: int, word: Word, rate: float, generator: torch.Generator) -> Iterator[Tensor]:
    for words in _pieces(count):
        yield torch.rand(words, word.width, generator=generator) < rate


def _burst(count: int, word: Word, rate: float, generator: torch.Generator) -> Iterator[Tensor]:
    chance = _start_chance(rate)

    def ends(bits: int) -> Tensor:
        """One behind the last bit that the runs which start at or before a bit reach; 0 where there is none."""
        starts = torch.rand(bits, generator=generator) < chance
        lengths = torch.randint(_RUNS[0], _RUNS[-1] + 1, (bits,), generator=generator)
        return torch.where(starts, torch.arange(bits) + lengths, 0).cummax(0).values

    before = _RUNS[-1] - 1  # runs that start before the first bit reach into the stream
    reach = max(int(ends(before)[-1]) - before, 0)
    for words in _pieces(count):
        bits = words * word.width
        covered = ends(bits).clamp_min(reach)
        yield (covered > torch.arange(bits)).view(words, word.width)
        reach = max(int(covered[-1]) - bits, 0)


def _start_chance(rate: float) -> float:
    """The p at which a share ``rate`` of bits is in a run, by bisection."""
    longer = [sum(length > d for length in _RUNS) / len(_RUNS) for d in range(_RUNS[-1])]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        free = 1.0
        for share in longer:
            free *= 1 - middle * share
        low, high = (middle, high) if 1 - free < rate else (low, middle)
    return high


def _single_event(count: int, word: Word, rate: float, generator: torch.Generator) -> Iterator[Tensor]:
    chances = torch.zeros(word.width)
    chances[0] = _TOP
    rest = word.width - 1 - word.exponent
    chances[1 : 1 + word.exponent] = (1 - _TOP) * (_EXPONENT if rest else 1.0) / max(word.exponent, 1)
    chances[1 + word.exponent :] = (1 - _TOP) * (1 - _EXPONENT if word.exponent else 1.0) / max(rest, 1)
    limits = (chances / chances.sum()).cumsum(0)[:-1]
    for words in _pieces(count):
        struck = torch.rand(words, 1, generator=generator) < rate * word.width
        chosen = torch.searchsorted(limits, torch.rand(words, 1, generator=generator), right=True)
        yield struck & (chosen == torch.arange(word.width))


def _clustered(count: int, word: Word, rate: float, generator: torch.Generator) -> Iterator[Tensor]:
    chance = rate / _SHARE
    place = int(torch.randint(_WINDOW, (), generator=generator))  # of the next bit in its window
    struck = torch.rand((), generator=generator) < chance  # that window
    for words in _pieces(count):
        bits = words * word.width
        window = (torch.arange(bits) + place) // _WINDOW
        hit = torch.rand(int(window[-1]) + 2, generator=generator) < chance
        hit[0] = struck
        yield (hit[window] & (torch.rand(bits, generator=generator) < _SHARE)).view(words, word.width)
        struck, place = hit[(place + bits) // _WINDOW], (place + bits) % _WINDOW


KINDS: dict[str, Callable[[int, Word, float, torch.Generator], Iterator[Tensor]]] = {
    "random": _random,
    "burst": _burst,
    "single_event": _single_event,
    "clustered": _clustered,
}
