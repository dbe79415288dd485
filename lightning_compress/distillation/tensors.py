"""Tensors before they are compared: precision, complex values, sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLS: tuple[Callable[..., Any], ...] = (
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)


def wide(x: Tensor) -> Tensor:
    """At least float32, for in half precision small differences are lost.

    Args:
        x: any tensor.

    Returns:
        The same, as float32 if it was float16 or bfloat16.

    Examples:
        >>> wide(torch.zeros(1, dtype=torch.bfloat16)).dtype, wide(torch.zeros(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def real(x: Tensor) -> torch.dtype:
    """Type of the real and imaginary part, or of the tensor.

    Args:
        x: real or complex.

    Returns:
        A real type.

    Examples:
        >>> real(torch.zeros(1, dtype=torch.complex64))
        torch.float32
    """
    return x.real.dtype if x.is_complex() else x.dtype


def squared(x: Tensor) -> Tensor:
    """|x|², real also for complex x.

    Args:
        x: real or complex.

    Returns:
        The same shape.

    Examples:
        >>> squared(torch.tensor([3 + 4j])).tolist()
        [25.0]
    """
    return torch.view_as_real(x).square().sum(-1) if x.is_complex() else x.square()


def equal_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both features with the smaller of their sizes on every axis behind sample and channel, by averaging.

    Args:
        a: (N, C, …) with up to three further axes.
        b: (N, D, …) with the same number of axes.

    Returns:
        Both, unchanged where sizes agree or the numbers of axes do not.

    Examples:
        >>> a, b = equal_size(torch.zeros(1, 2, 8, 8), torch.zeros(1, 5, 4, 4))
        >>> a.shape, b.shape
        (torch.Size([1, 2, 4, 4]), torch.Size([1, 5, 4, 4]))
    """
    sizes = [min(pair) for pair in zip(a.shape[2:], b.shape[2:], strict=False)]
    if a.ndim != b.ndim or not 1 <= len(sizes) <= len(_POOLS):
        return a, b
    return _averaged(a, sizes), _averaged(b, sizes)


def pooled(f: Tensor) -> Tensor:
    """One vector per sample: the mean over positions.

    Args:
        f: (N, C) or (N, C, …), complex by modulus.

    Returns:
        (N, C), at least float32.

    Examples:
        >>> pooled(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3])
    """
    f = wide(f)
    f = f.abs() if f.is_complex() else f
    return f.flatten(2).mean(2) if f.ndim > 2 else f.reshape(len(f), -1)


def vectors(f: Tensor) -> Tensor:
    """One vector per sample with all of its values, around the mean of the batch.

    Args:
        f: (N, …), complex as real and imaginary parts.

    Returns:
        (N, values), at least float32.

    Examples:
        >>> vectors(torch.tensor([[1.0], [3.0]])).tolist()
        [[-1.0], [1.0]]
    """
    f = wide(f)
    f = (torch.view_as_real(f) if f.is_complex() else f).reshape(len(f), -1)
    return f - f.mean(0)  # distances and angles are the same, and lose fewer digits near the origin


def _averaged(f: Tensor, sizes: Sequence[int]) -> Tensor:
    if list(f.shape[2:]) == list(sizes):
        return f
    pool = _POOLS[len(sizes) - 1]
    averaged: Tensor = (
        torch.complex(pool(f.real, sizes), pool(f.imag, sizes)) if f.is_complex() else pool(f, sizes)
    )
    return averaged
