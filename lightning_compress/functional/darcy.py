"""Darcy flow on the unit square: random coefficients and the pressures that belong to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.functional.sampling import gaussian_random_field


def darcy(
    n: int,
    size: int,
    *,
    coefficients: Sequence[float] = (12.0, 3.0),
    forcing: float = 1.0,
    refine: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Pairs of Darcy flow: ``-div(a grad u) = f`` on (0, 1)^2, u = 0 on the border.

    ``a`` is ``coefficients[0]`` where a Gaussian random field (alpha = 2, tau = 3, Neumann) is >= 0 and
    ``coefficients[1]`` elsewhere, constant on each of ``size x size`` square cells. ``u`` is found by `solve` on a grid
    ``refine`` times finer. Both are given at the centres of the cells, ``((i + 1/2) / size, (j + 1/2) / size)``, which
    are nodes of the finer grid. Pairs are made one after the other: the first of a large batch are those of a small
    one, and the same ``generator`` gives the same ``a`` for every ``refine``.

    Args:
        n: number of pairs.
        size: cells per side, >= 2.
        coefficients: the two values of a, > 0.
        forcing: f, constant.
        refine: fine cells per cell and side; even, >= 2.
        generator: source of randomness on the CPU; None means a new one with seed 0, never the global one.

    Returns:
        ``a`` and ``u``, float32 [n, size, size].

    Raises:
        ValueError: a number out of range.
        ImportError: SciPy is not installed.

    Examples:
        >>> from lightning_compress.functional.darcy import darcy
        >>> a, u = darcy(2, 8)
        >>> a.unique().tolist(), u.shape, bool((u > 0).all())
        ([3.0, 12.0], torch.Size([2, 8, 8]), True)

    Source: Li et al. 2021, Fourier Neural Operator for Parametric Partial Differential Equations (the problem).
    """
    high, low = coefficients
    if (
        size < 2
        or refine < 2
        or refine % 2
        or not min(high, low) > 0
        or not math.isfinite(high + low + forcing)
    ):
        raise ValueError(
            f"size={size}, refine={refine}, coefficients={tuple(coefficients)}, forcing={forcing}: allowed: size >= 2, "
            "refine even and >= 2 (cell centres are nodes then), coefficients > 0, all finite."
        )
    fields = gaussian_random_field(
        (n, size, size), alpha=2.0, tau=3.0, boundary="neumann", generator=generator
    )
    a = torch.where(fields >= 0, float(high), float(low))
    u = torch.empty(n, size, size)
    centres = slice(refine // 2 - 1, None, refine)  # node k lies at index k - 1
    for pair in range(n):
        fine = a[pair].repeat_interleave(refine, 0).repeat_interleave(refine, 1)
        u[pair] = solve(fine, forcing)[centres, centres]
    return a, u


def solve(a: Tensor, forcing: Tensor | float = 1.0) -> Tensor:
    r"""Solve ``-div(a grad u) = f`` on (0, 1)^2 with u = 0 on the border, by five-point finite volumes.

    At every inner node of a grid of m x m square cells, with h = 1/m and its four edges e to the nodes u_e:

    ``sum_e a_e (u - u_e) = h^2 f``, a_e = mean of the two cells that share the edge,

    which is second order in h for smooth a, and conserves flux where a jumps between cells. Factorized and solved
    directly in float64.

    Args:
        a: coefficient of every cell [m, m], > 0, m >= 3.
        forcing: f, a number, or its values at the inner nodes [m - 1, m - 1].

    Returns:
        u at the inner nodes ``(i / m, j / m)``, i and j from 1 to m - 1: float64 [m - 1, m - 1] on the CPU.

    Raises:
        ValueError: ``a`` is not square, or not positive and finite; ``forcing`` does not fit it.
        ImportError: SciPy is not installed.

    Examples:
        >>> from lightning_compress.functional.darcy import solve
        >>> u = solve(torch.ones(64, 64))
        >>> round(u[31, 31].item(), 4)  # 0.073671 in the limit
        0.0737

    Source: Eymard, Gallouët, Herbin 2000, Finite Volume Methods.
    """
    m = a.shape[-1] if a.dim() else 0
    if a.shape != (m, m) or m < 3 or not bool(((a > 0) & a.isfinite()).all()):
        raise ValueError(
            f"a has shape {tuple(a.shape)}: allowed is a square [m, m], m >= 3, of positive finite numbers."
        )
    f = torch.as_tensor(forcing, dtype=torch.float64).cpu()
    if f.dim() and f.shape != (m - 1, m - 1):
        raise ValueError(f"forcing has shape {tuple(f.shape)}: allowed is a number or [{m - 1}, {m - 1}].")
    sparse, superlu = _scipy()
    cells = a.detach().to("cpu", torch.float64)
    down = (cells[:, :-1] + cells[:, 1:]) / 2  # edges from node (i, j) to (i + 1, j): [m, m - 1]
    right = (cells[:-1] + cells[1:]) / 2  # to (i, j + 1): [m - 1, m]
    centre = down[:-1] + down[1:] + right[:, :-1] + right[:, 1:]
    across = torch.nn.functional.pad(right[:, 1:-1], (0, 1)).flatten()[
        :-1
    ]  # no edge from a row's end to the next
    below = down[1:-1].flatten()
    bands = [centre.flatten(), -across, -across, -below, -below]
    matrix = sparse.diags([band.numpy() for band in bands], [0, 1, -1, m - 1, 1 - m], format="csc")
    # The matrix is symmetric and positive definite: no pivoting, and an ordering that is made for that.
    factors = superlu(
        matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )
    right_hand_side = (f / m**2).expand(m - 1, m - 1).flatten()
    return torch.from_numpy(factors.solve(right_hand_side.numpy())).view(m - 1, m - 1)


def _scipy() -> tuple[Any, Any]:
    """The module of sparse matrices, and the factorization."""
    try:
        from scipy import sparse  # type: ignore[import-untyped]
        from scipy.sparse.linalg import splu  # type: ignore[import-untyped]
    except ImportError:
        raise ImportError("the solver needs SciPy: pip install 'lightning-compress[recipes]'.") from None
    return sparse, splu
