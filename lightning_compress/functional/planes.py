"""Floating-point words as planes of bytes that compress well one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def byte_planes(x: npt.NDArray[Any]) -> list[npt.NDArray[np.uint8]]:
    """Split words into planes of bytes, after rotating each word left by one bit.

    The rotation moves the sign to the end and puts the exponent in front. Plane 0 then is the 8-bit
    exponent of float32 or bfloat16, which takes 2 to 3 bits per weight; the last planes are noise.

    Args:
        x: float16, float32 or float64; complex64 or complex128 (pairs of words); uint16 for bits of
            bfloat16.

    Returns:
        As many uint8 arrays as a word has bytes, most significant first, each with one byte per word,
        row-major.

    Raises:
        ValueError: If the dtype is none of these.

    Examples:
        >>> [plane.tolist() for plane in byte_planes(np.array([1.0, -2.0], dtype=np.float32))]
        [[127, 128], [0, 0], [0, 0], [0, 1]]
    """
    word = _word(x.dtype)
    words = x.astype(x.dtype.newbyteorder("="), order="C").reshape(-1).view(word)
    rotated = (words << 1) | (words >> (8 * word.itemsize - 1))
    return [(rotated >> shift).astype(np.uint8) for shift in range(8 * word.itemsize - 8, -1, -8)]


def from_byte_planes(
    planes: Sequence[npt.NDArray[np.uint8]], dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    """Inverse of `byte_planes`, bit for bit: also for −0.0, infinities and the payloads of NaN.

    Args:
        planes: As `byte_planes` returned them.
        dtype: The dtype that went in.
        shape: The shape that went in.

    Returns:
        The array, in native byte order.

    Raises:
        ValueError: If the number, type or lengths of the planes do not belong to this dtype and shape.

    Examples:
        >>> x = np.array([[0.5, -0.0]], dtype=np.float32)
        >>> np.signbit(from_byte_planes(byte_planes(x), x.dtype, x.shape)).tolist()
        [[False, True]]
    """
    kind = np.dtype(dtype).newbyteorder("=")
    word = _word(kind)
    count = int(np.prod(shape, dtype=np.int64)) * (kind.itemsize // word.itemsize)
    if len(planes) != word.itemsize or any(p.shape != (count,) or p.dtype != np.uint8 for p in planes):
        given = ", ".join(f"{p.dtype} {p.shape}" for p in planes)
        raise ValueError(
            f"byte planes: {kind} of shape {shape} takes {word.itemsize} times uint8 ({count},), got {given}."
        )
    rotated = np.zeros(count, dtype=word)
    for plane in planes:
        rotated = (rotated << 8) | plane
    words = (rotated >> 1) | (rotated << (8 * word.itemsize - 1))
    return words.view(kind).reshape(shape)


def _word(dtype: np.dtype[Any]) -> np.dtype[Any]:
    size = {"f2": 2, "f4": 4, "f8": 8, "c8": 4, "c16": 8, "u2": 2}.get(f"{dtype.kind}{dtype.itemsize}")
    if size is None:
        allowed = "float16, float32, float64, complex64, complex128 or uint16 (bits of bfloat16)"
        raise ValueError(f"byte planes: dtype must be {allowed}, got {dtype}.")
    return np.dtype(f"u{size}")
