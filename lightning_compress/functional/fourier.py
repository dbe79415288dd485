"""Fourier transforms of which few frequencies are wanted, as products with thin matrices; layout of neuraloperator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

FASTER_UP_TO = (2.5, 5.0)
"""On one axis, and on several: so many multiply-adds may the products have for each of the FFTs and still be faster.

Measured on one core of an x86 processor in float32, forward and inverse, 16 ... 256 points an axis and 1/16 to all of
the frequencies: on two axes the products take 0.2 to 0.9 times as long below the limit, as long between 5 and 8, and
up to 3 times as long with all frequencies of 256 points. (FFTs on several axes also shift and fill the spectrum.)
"""


def faster(given: Sequence[int], modes: Sequence[int], sizes: Sequence[int], *, real: bool) -> bool:
    """Whether the two partial transforms take less time than two FFTs.

    Args:
        given: points of every axis before.
        modes: frequencies kept.
        sizes: points of every axis afterwards.
        real: whether the data are real.

    Returns:
        Whether the products have at most ``FASTER_UP_TO`` times the multiply-adds of the FFTs, ``1.25 N log2 N`` of N
        real points or twice that.

    Examples:
        >>> faster((64, 64), (8, 5), (64, 64), real=True), faster((64, 64), (64, 33), (64, 64), real=True)
        (True, False)
    """
    products = transforms = 0.0
    for points in (given, sizes):
        total = math.prod(points)
        left = total
        transforms += (1.25 if real else 2.5) * total * math.log2(max(total, 2))
        for axis in reversed(range(len(points))):
            products += left * modes[axis] * (2 if real and axis == len(points) - 1 else 4)
            left = left // points[axis] * modes[axis]
    return products <= FASTER_UP_TO[len(modes) > 1] * transforms


def partial_rfftn(x: Tensor, modes: Sequence[int], norm: str | None = None) -> Tensor:
    """The lowest frequencies of ``torch.fft.rfftn(x, dim=last axes)``, and no others.

    ``X[f] = sum_t x[t] exp(-2 pi i f t / n)`` with f = -floor(k/2) ... on every axis, but f = 0 ... k - 1 on the last.
    Halves are computed in float32, also under autocast.

    Args:
        x: real, [.., n_1, ..., n_d].
        modes: k of each of the d axes; at most n, on the last axis n // 2 + 1.
        norm: as in ``torch.fft``.

    Returns:
        Complex, [.., k_1, ..., k_d].

    Raises:
        ValueError: modes that the transform does not have.

    Examples:
        >>> partial_rfftn(torch.ones(4, 4), modes=(3, 1), norm="forward").abs().round().tolist()
        [[0.0], [1.0], [0.0]]

    Source: Markel 1971, FFT Pruning; Sorensen and Burrus 1993, Efficient Computation of the DFT with Only a Subset of
        Input or Output Points.
    """
    return _analysis(x, modes, norm, real=True)


def partial_fftn(x: Tensor, modes: Sequence[int], norm: str | None = None) -> Tensor:
    """As ``partial_rfftn`` of complex data, ``torch.fft.fftn``.

    Args:
        x: real or complex, [.., n_1, ..., n_d].
        modes: k <= n of each axis.
        norm: as in ``torch.fft``.

    Returns:
        Complex, [.., k_1, ..., k_d]. On the last of several axes neuraloperator takes the first k after a shift,
        frequencies -floor(n/2) ..., and so does this; of one axis, frequencies 0 ... k - 1.

    Raises:
        ValueError: modes that the transform does not have.
    """
    return _analysis(x, modes, norm, real=False)


def partial_irfftn(
    coefficients: Tensor, sizes: Sequence[int], norm: str | None = None, given: Sequence[int] | None = None
) -> Tensor:
    """What ``torch.fft.irfftn`` makes of a few coefficients, the others being zero.

    Args:
        coefficients: complex, [.., k_1, ..., k_d], as ``partial_rfftn`` gives them.
        sizes: points m of each axis of the result.
        norm: as in ``torch.fft``.
        given: points n of each axis that the coefficients come from; None takes ``sizes``. Like neuraloperator, which
            writes them into a spectrum of that size, shifts it once more and hands it to ``irfftn(s=sizes)``: an axis
            other than the last is off by one frequency if n is odd, and its negative frequencies n - f stay at
            n - f when m is not n.

    Returns:
        Real, [.., m_1, ..., m_d].

    Raises:
        ValueError: more coefficients than such a transform has.

    Examples:
        >>> x = torch.randn(2, 8, 6)
        >>> torch.allclose(partial_irfftn(partial_rfftn(x, (8, 4)), (8, 6)), x, atol=1e-6)
        True
    """
    return _synthesis(coefficients, sizes, norm, given, real=True)


def partial_ifftn(
    coefficients: Tensor, sizes: Sequence[int], norm: str | None = None, given: Sequence[int] | None = None
) -> Tensor:
    """As ``partial_irfftn`` of complex data, ``torch.fft.ifftn``.

    Args:
        coefficients: complex, [.., k_1, ..., k_d].
        sizes: points m of each axis of the result.
        norm: as in ``torch.fft``.
        given: as there. On the last axis, coefficients are those of frequencies 0 ... k - 1.

    Returns:
        Complex, [.., m_1, ..., m_d].

    Raises:
        ValueError: more coefficients than such a transform has.
    """
    return _synthesis(coefficients, sizes, norm, given, real=False)


def _analysis(x: Tensor, modes: Sequence[int], norm: str | None, *, real: bool) -> Tensor:
    sizes = tuple(x.shape[-len(modes) :])
    _check(modes, sizes, real)
    x = _wide(x)
    x = x if real or x.is_complex() else torch.complex(x, torch.zeros_like(x))
    with _without_autocast(x):
        for axis in reversed(range(len(modes))):
            n, k = sizes[axis], modes[axis]
            last = axis == len(modes) - 1
            first = -(k // 2) if not last else 0 if real or len(modes) == 1 else -(n // 2)
            scale = n ** -_power(norm)
            if last and real:
                pairs = x @ _Waves("real analysis", n, n, first, k, scale).like(x)
                x = torch.view_as_complex(pairs.reshape(*x.shape[:-1], k, 2))
            elif last:
                x = x @ _Waves("analysis", n, n, first, k, scale).like(x)
            else:
                x = _along(x, axis - len(modes), _Waves("analysis", n, n, first, k, scale).like(x).mT)
    return x


def _synthesis(
    x: Tensor, sizes: Sequence[int], norm: str | None, given: Sequence[int] | None, *, real: bool
) -> Tensor:
    modes, given = tuple(x.shape[-len(sizes) :]), tuple(given or sizes)
    _check(modes, given, real)
    x = _wide(x)
    with _without_autocast(x):
        for axis, (k, n, m) in enumerate(zip(modes, given, sizes, strict=True)):
            last = axis == len(sizes) - 1
            first = 0 if last else 2 * (n // 2) - k // 2  # where two shifts by n // 2 leave them
            scale = m ** (_power(norm) - 1)
            if last and real:
                pairs = torch.view_as_real(x.resolve_conj()).flatten(-2)
                x = pairs @ _Waves("real synthesis", m, n, first, k, scale).like(x)
            elif last:
                x = x @ _Waves("synthesis", m, n, first, k, scale).like(x)
            else:
                x = _along(x, axis - len(sizes), _Waves("synthesis", m, n, first, k, scale).like(x).mT)
    return x


def _check(modes: Sequence[int], sizes: Sequence[int], real: bool) -> None:
    most = [*sizes[:-1], sizes[-1] // 2 + 1 if real else sizes[-1]]
    if len(modes) != len(sizes) or any(not 1 <= k <= n for k, n in zip(modes, most, strict=True)):
        raise ValueError(
            f"modes={tuple(modes)} of a transform of {' x '.join(map(str, sizes))} points: "
            f"allowed are 1 to {' x '.join(map(str, most))}."
        )


def _power(norm: str | None) -> float:
    """Forward transforms are divided by so many powers of the size, inverse ones by the rest of one."""
    powers = {None: 0.0, "backward": 0.0, "ortho": 0.5, "forward": 1.0}
    if norm not in powers:
        raise ValueError(f"norm={norm!r} is unknown; allowed: forward, backward, ortho, None.")
    return powers[norm]


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """The product with every line of one axis: [.., n, *rest] with [m, n]."""
    # Contractions leave the modes outermost in memory, where the product is three times slower.
    lines = x.contiguous().reshape(-1, x.shape[axis], math.prod(x.shape[axis + 1 :]))
    made = torch.bmm(
        matrix.expand(lines.shape[0], -1, -1), lines
    )  # torch.matmul would copy the lines into one matrix
    return made.reshape(*x.shape[:axis], matrix.shape[0], *x.shape[axis + 1 :])


_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def _wide(x: Tensor) -> Tensor:
    return x.to(_WIDE.get(x.dtype, x.dtype))


@contextmanager
def _without_autocast(x: Tensor) -> Iterator[None]:
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        yield


class _Waves(NamedTuple):
    """``scale exp(+-2 pi i q t / points)`` at k places q = first, first + 1, ... of a spectrum, wrapped.

    Zero where q >= points. Analysis has the minus and is [points, k] or, of real data, [points, 2 k] with cosines and
    sines in turn. Synthesis is [k, points], or of real results [2 k, points] with the spectrum's other half added in.
    """

    kind: str
    points: int
    spectrum: int
    first: int
    k: int
    scale: float

    def like(self, x: Tensor) -> Tensor:
        """The matrix in the precision and on the device of a tensor."""
        dtype = _REAL.get(x.dtype, x.dtype)
        # Fake tensors, and what a tracer sees, must not be found again by others.
        plain = type(x) is Tensor and not torch.compiler.is_compiling()
        return _kept(self, dtype, x.device) if plain else self.made(dtype, x.device)

    def made(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The matrix."""
        place = (self.first + torch.arange(self.k)) % self.spectrum
        turns = place[:, None] * torch.arange(self.points) % self.points  # reduced while exact
        angle = turns.double() * (2 * math.pi / self.points)
        size = (place < self.points).double() * self.scale
        if self.kind == "real synthesis":
            edge = (place == 0) | (2 * place == self.points)
            size = size * (2 * place <= self.points) * torch.where(edge, 1, 2)
        cosine, sine = (wave(angle).mul(size[:, None]).to(device, dtype) for wave in (torch.cos, torch.sin))
        if "real" in self.kind:
            matrix = torch.stack([cosine, -sine], 1).flatten(0, 1)
        else:
            matrix = torch.complex(cosine, sine if self.kind == "synthesis" else -sine)
        return (matrix.mT if "analysis" in self.kind else matrix).contiguous()


@lru_cache(maxsize=128)
def _kept(waves: _Waves, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # made in inference, it could not be used in training
        return waves.made(dtype, device)
