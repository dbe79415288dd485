"""Rounding a weight matrix so that its errors compensate each other in the layer's output.

Rounding to nearest makes each weight's error small; the output of a layer sees them summed with its inputs.
With the inputs' Gram matrix G = E[x x^T] the output error of a row w is (w - ŵ) G (w - ŵ)^T, and errors of
weights on correlated inputs can cancel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.functional.affine import dequantize, quantize
from lightning_compress.functional.rates import cheapest_codes

Rounded = Callable[[Tensor, Tensor, Tensor], Tensor]  # values, scale, zero point -> integers

# Columns whose effect on the others is added up before it is spread: a matrix product instead of many updates.
_BLOCK = 128


def compensated_codes(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    *,
    damp: float = 0.01,
    mask: Tensor | None = None,
    sweeps: int = 0,
    bits: Tensor | None = None,
    penalty: float = 0.0,
) -> Tensor:
    r"""Integers of a weight matrix with a small output error ``tr((W - Ŵ) G (W - Ŵ)^T)``.

    Columns are rounded in the order of falling diag(G). With ``H = G + damp mean(diag G) I`` and
    ``H^-1 = U^T U`` (U upper, in that order), the error of column j moves on to the columns after it:
    ``w_k <- w_k - (w_j - ŵ_j) U_jk / U_jj``. A row that ends no better than rounding to nearest is rounded to
    nearest, so no row is worse. ``sweeps`` passes of coordinate descent may follow: in each column the code
    moves to the best integer while all others stay, which only lowers the error.

    Args:
        weight: real [R, D], an output per row.
        gram: Gram matrix of the inputs [D, D], symmetric positive semidefinite, in any unit. An input that
            is always 0 has no say, and its column is rounded to nearest.
        scale: float32 > 0, [R, D] or broadcast to it.
        zero_point: integers, the same; None for 0.
        qmin: smallest integer.
        qmax: largest integer.
        damp: share of the mean of diag(G), over inputs that are not always 0, that is added to it, >= 0; 0
            needs a positive definite G.
        mask: bool [R, D], True = kept. Others get the code of zero, and what that loses is compensated too.
        sweeps: passes of coordinate descent, >= 0; ends early when a pass changes nothing.
        bits: what each integer costs, [2 R + 1] (see ``lightning_compress.functional.rates.code_bits``); needs zero
            points of 0. Then integers come from ``cheapest_codes``, and no row is rounded to nearest in the end.
        penalty: squared steps per bit.

    Returns:
        Integers as float32 [R, D], like ``quantize``.

    Raises:
        ValueError: shapes that do not fit; damp or sweeps < 0; a Gram matrix that is not finite, or not
            positive definite after damping.

    Examples:
        >>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> compensated_codes(torch.tensor([[0.4, 0.4]]), gram, torch.ones(1, 1), None, -7, 7)
        tensor([[0., 1.]])

    Source: Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers, and Optimal Brain Compression.
    """
    _check(weight, gram, damp, mask, sweeps)

    def rounded(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        if bits is None:
            return quantize(x.float(), s, z, qmin, qmax)
        return cheapest_codes(x / s, bits, penalty).clamp(qmin, qmax).to(s.dtype)

    w, g = weight.detach().double(), gram.detach().double()
    s = scale.detach().to(torch.float32).expand_as(w)
    z = torch.zeros_like(s) if zero_point is None else zero_point.detach().to(torch.float32).expand_as(w)
    fixed = torch.zeros_like(w, dtype=torch.bool) if mask is None else ~mask
    zero = z.clamp(qmin, qmax)
    nearest = rounded(w, s, z).where(~fixed, zero)

    order = g.diagonal().argsort(descending=True, stable=True)
    order = order[g.diagonal()[order] > 0]
    codes = nearest.clone()
    if len(order):
        part = w[:, order]
        grid = s[:, order], z[:, order]
        spread = _spread(g[order][:, order], damp)
        codes[:, order] = _compensate(part, spread, *grid, rounded, fixed[:, order], zero[:, order])
        better = _output_error(w, codes, g, s, z) < _output_error(w, nearest, g, s, z)
        codes = torch.where(better[:, None] | (bits is not None), codes, nearest)
        for _ in range(sweeps):
            polished = _sweep(part, codes[:, order], g[order][:, order], *grid, qmin, qmax, fixed[:, order])
            if torch.equal(polished, codes[:, order]):
                break
            codes[:, order] = polished
    return codes


def conditional_variances(gram: Tensor, *, damp: float = 0.01) -> Tensor:
    """What of every input is left to say when those that are rounded after it are known: ``d_j = 1 / U_jj^2``.

    With compensation the error of column j costs ``d_j (w_j - w^_j)^2`` instead of ``G_jj (w_j - w^_j)^2``.

    Args:
        gram: as for ``compensated_codes``.
        damp: the same.

    Returns:
        Of the inputs that are not always 0, in the order of rounding.

    Examples:
        >>> conditional_variances(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), damp=0)
        tensor([0.1900, 1.0000], dtype=torch.float64)
    """
    g = gram.detach().double()
    order = g.diagonal().argsort(descending=True, stable=True)
    order = order[g.diagonal()[order] > 0]
    return _spread(g[order][:, order], damp).diagonal() ** -2


def _compensate(
    w: Tensor, u: Tensor, s: Tensor, z: Tensor, rounded: Rounded, fixed: Tensor, zero: Tensor
) -> Tensor:
    w = w.clone()
    codes = torch.empty_like(s)
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            grid = s[:, j], z[:, j]
            codes[:, j] = rounded(w[:, j], *grid).where(~fixed[:, j], zero[:, j])
            error = (w[:, j] - dequantize(codes[:, j].double(), *grid)) / u[j, j]
            w[:, j:stop].addr_(error, u[j, j:stop], alpha=-1)
            errors[:, j - start] = error
        w[:, stop:].addmm_(errors, u[start:stop, stop:], alpha=-1)
    return codes


def _sweep(
    w: Tensor, codes: Tensor, g: Tensor, s: Tensor, z: Tensor, qmin: int, qmax: int, fixed: Tensor
) -> Tensor:
    """One pass of exact minimization over single codes: ``q_j += round(((w - ŵ) G)_j / (s_j G_jj))``."""
    codes = codes.clone()
    slope = (w - dequantize(codes.double(), s, z)) @ g
    for start in range(0, w.shape[1], _BLOCK):
        stop = min(start + _BLOCK, w.shape[1])
        moves = torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            # Half a step changes nothing in the error, and rounds to even, to a move of 0: no endless walks.
            move = (slope[:, j] / (s[:, j] * g[j, j])).round_().clamp_(qmin - codes[:, j], qmax - codes[:, j])
            move.masked_fill_(fixed[:, j], 0)
            codes[:, j] += move
            moves[:, j - start] = move * s[:, j]
            slope[:, j:stop].addr_(moves[:, j - start], g[j, j:stop], alpha=-1)
        slope[:, stop:].addmm_(moves, g[start:stop, stop:], alpha=-1)
    return codes


def _spread(g: Tensor, damp: float) -> Tensor:
    """Upper U with ``H^-1 = U^T U``: the inverse of the upper V in ``H = V V^T``."""
    identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
    h = g + damp * g.diagonal().mean() * identity
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if bool(failed):
        raise ValueError(
            f"compensated rounding: the Gram matrix of {len(g)} inputs with damp={damp} is not positive definite: "
            f"use more inputs or a larger damp."
        )
    u: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return u


def _output_error(w: Tensor, codes: Tensor, g: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """(w - ŵ) G (w - ŵ)^T of every row."""
    error = w - dequantize(codes.double(), s, z)
    return (error @ g).mul_(error).sum(1)


def _check(weight: Tensor, gram: Tensor, damp: float, mask: Tensor | None, sweeps: int) -> None:
    if weight.ndim != 2 or gram.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"compensated rounding: weight {tuple(weight.shape)} with a Gram matrix {tuple(gram.shape)}: [R, D] and "
            f"[D, D] are needed."
        )
    if mask is not None and mask.shape != weight.shape:
        raise ValueError(
            f"compensated rounding: mask {tuple(mask.shape)} for weight {tuple(weight.shape)}: one shape is needed."
        )
    if damp < 0 or sweeps < 0:
        raise ValueError(f"compensated rounding: damp={damp}, sweeps={sweeps}: allowed is >= 0.")
    if not bool(gram.isfinite().all()):
        raise ValueError(
            "compensated rounding: the Gram matrix has infinite or NaN entries: check the inputs."
        )
