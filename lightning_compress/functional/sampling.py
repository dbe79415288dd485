"""Random inputs: white noise and Gaussian random fields, drawn sample by sample from private generators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def normal(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """White noise: every entry independent, ``x ~ N(0, 1)``.

    Samples (first axis) are drawn one after the other: the first samples of a large batch are those of a
    small one.

    Args:
        shape: shape of the result, at least one axis.
        generator: source of randomness on the CPU; None means a new one with seed 0, never the global one.

    Returns:
        float32 tensor on the CPU.

    Examples:
        >>> torch.equal(normal((5, 3))[:2], normal((2, 3)))
        True
    """
    return _noise(shape, torch.float32, generator)


def gaussian_random_field(
    shape: Sequence[int],
    alpha: float = 2.0,
    tau: float = 3.0,
    boundary: str = "periodic",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Smooth random fields on [0, 1]^d: ``f(x) = sum_{k != 0} xi_k sigma_k phi_k(x)``, ``xi_k ~ N(0, 1)``.

    ``sigma_k = tau^(alpha - d/2) (4 pi^2 |k|^2 + tau^2)^(-alpha/2)`` and phi the Fourier basis (periodic), or
    ``pi^2 |k|^2`` in place of ``4 pi^2 |k|^2`` and the cosine basis (Neumann: no slope at the border); both
    orthonormal on [0, 1]^d. Fields are drawn one after the other: the first fields of a large batch are those
    of a small one.

    Args:
        shape: ``(n, n_1, ..., n_d)``: number of fields and grid points per axis, which lie at j / n_i
            (periodic) or (j + 1/2) / n_i (Neumann).
        alpha: smoothness, > 0; larger is smoother.
        tau: inverse length scale, > 0.
        boundary: "periodic" or "neumann".
        generator: source of randomness on the CPU; None means a new one with seed 0, never the global one.

    Returns:
        float32 tensor of ``shape`` on the CPU; every field has mean 0.

    Raises:
        ValueError: unknown boundary, alpha or tau not positive, or a shape without grid.

    Examples:
        >>> fields = gaussian_random_field((4, 16, 16), boundary="neumann")
        >>> fields.shape, bool(fields.mean(dim=(1, 2)).abs().max() < 1e-6)
        (torch.Size([4, 16, 16]), True)

    Source: Li et al. 2021, Fourier Neural Operator for Parametric Partial Differential Equations.
    """
    count, *grid = shape
    if boundary not in ("periodic", "neumann"):
        raise ValueError(f"boundary={boundary!r} is unknown; allowed: 'periodic', 'neumann'.")
    if not (grid and min(grid) > 0 and alpha > 0 and tau > 0):
        raise ValueError(
            f"shape={tuple(shape)}, alpha={alpha}, tau={tau}: allowed: (n, n_1, ...), alpha > 0, tau > 0."
        )
    if not count:
        return torch.zeros(tuple(shape))  # FFT libraries refuse an empty batch
    periodic = boundary == "periodic"
    squared = torch.zeros(grid, dtype=torch.float64)  # |k|^2
    for axis, n in enumerate(grid):
        k = torch.arange(n, dtype=torch.float64)
        k = torch.minimum(k, n - k) if periodic else k
        squared = squared + k.square().view([-1 if i == axis else 1 for i in range(len(grid))])
    wave = (4 if periodic else 1) * math.pi**2 * squared
    sigma = tau ** (alpha - len(grid) / 2) * (wave + tau**2) ** (-alpha / 2)
    sigma.view(-1)[0] = 0
    noise = _noise(shape, torch.float64, generator)
    dims = tuple(range(1, len(shape)))
    if periodic:
        # White noise has independent N(0, 1) coefficients in every orthonormal basis of the grid.
        fields: Tensor = torch.fft.ifftn(sigma * torch.fft.fftn(noise, dim=dims), dim=dims).real
        fields *= math.sqrt(math.prod(grid))
    else:
        fields = sigma * noise
        for axis, n in enumerate(grid, start=1):
            k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
            basis = torch.cos(math.pi * k * (j + 0.5) / n) * torch.where(k == 0, 1.0, math.sqrt(2.0))
            fields = torch.tensordot(fields, basis, dims=([axis], [0])).movedim(-1, axis)
    return fields.to(torch.float32)


def _noise(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    noise = torch.empty(tuple(shape), dtype=dtype)
    for sample in noise:  # one at a time: torch fills large tensors in another order than small ones
        sample.normal_(generator=generator)
    return noise
