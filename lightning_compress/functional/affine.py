"""The integer grid: which integers there are, the scale that reaches them, and rounding to it with useful gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_BITS = 16


def integer_range(bits: int, signed: bool = True, narrow: bool = True) -> tuple[int, int]:
    """Smallest and largest integer of a grid.

    Signed and narrow ``-(2^(b-1) - 1) ... 2^(b-1) - 1``; signed and full ``-2^(b-1) ... 2^(b-1) - 1``; unsigned
    ``0 ... 2^b - 1``. One signed bit is ``-1 ... 1`` without the zero (see ``binary``).

    Args:
        bits: 1 to 16.
        signed: whether there are negative integers.
        narrow: leave the most negative integer out, so that the grid is symmetric; signed grids only.

    Returns:
        qmin and qmax.

    Raises:
        ValueError: bits outside 1..16.

    Examples:
        >>> integer_range(8), integer_range(8, narrow=False), integer_range(8, signed=False)
        ((-127, 127), (-128, 127), (0, 255))

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits}: allowed is 1 <= bits <= {MAX_BITS}.")
    if not signed:
        return 0, 2**bits - 1
    if bits == 1:
        return -1, 1
    return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1


def choose_qparams(
    lo: Tensor, hi: Tensor, qmin: int, qmax: int, symmetric: bool = True, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Scale and zero point of a clip range.

    - symmetric: ``s = max(|lo|, |hi|) / qmax``, ``z = 0``; an unsigned grid (qmin = 0) so uses all its integers
    - asymmetric: ``lo = min(lo, 0)``, ``hi = max(hi, 0)``, ``s = (hi - lo) / (qmax - qmin)``,
      ``z = clip(round(qmin - lo / s), qmin, qmax)``

    Zero is always on the grid. A range that is zero, or too small for a normal float32 scale, gets s = 1.

    Args:
        lo: lower ends [G].
        hi: upper ends [G].
        qmin: smallest integer.
        qmax: largest integer.
        symmetric: whether the zero point is 0.
        power_of_two: round scales up to powers of two.

    Returns:
        Scale, float32 [G] > 0, and zero point, int32 [G].

    Examples:
        >>> scale, zero_point = choose_qparams(torch.tensor([-1.0]), torch.tensor([3.0]), 0, 255, symmetric=False)
        >>> round(float(scale), 6), int(zero_point)
        (0.015686, 64)

    Source: Krishnamoorthi 2018, Quantizing deep convolutional networks for efficient inference.
    """
    low, high = lo.detach().double(), hi.detach().double()
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / qmax
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / (qmax - qmin)
    if power_of_two:
        fraction, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
    single = scale.float()
    single = torch.where(single < torch.finfo(torch.float32).tiny, torch.ones_like(single), single)
    if symmetric:
        return single, torch.zeros_like(single, dtype=torch.int32)
    zero_point = (qmin - low / single.double()).round().clamp(qmin, qmax)
    return single, zero_point.to(torch.int32)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a grid is computed: float32, or float64 for float64."""
    return dtype if dtype == torch.float64 else torch.float32


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """The integers of a tensor: ``q = clip(round(x / s) + z, qmin, qmax)``, halves to even.

    Args:
        x: real values.
        scale: float32 > 0, broadcast against x.
        zero_point: integers, broadcast against x; None for 0.
        qmin: smallest integer.
        qmax: largest integer.

    Returns:
        Integers as float32 (float64 for float64), shape of x.

    Examples:
        >>> quantize(torch.tensor([0.25, 0.75, 9.0]), torch.tensor(0.5), None, -7, 7).tolist()
        [0.0, 2.0, 7.0]
    """
    codes = (x.to(wide(x.dtype)) / scale).round_()
    if zero_point is not None:
        codes = codes.add_(zero_point)
    return codes.clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The values of integers: ``x = s (q - z)``.

    Args:
        codes: integers, of any dtype.
        scale: float32, broadcast against codes.
        zero_point: integers, broadcast against codes; None for 0.

    Returns:
        float32 values; float64 for float64 codes.

    Examples:
        >>> dequantize(torch.tensor([0, 2, 7]), torch.tensor(0.5), None).tolist()
        [0.0, 1.0, 3.5]
    """
    codes = codes.to(wide(codes.dtype))
    return ((codes if zero_point is None else codes - zero_point) * scale).add_(0.0)  # no -0.0


def binary(x: Tensor, scale: Tensor) -> Tensor:
    """Two values: ``s`` where x >= 0, else ``-s``.

    Args:
        x: real values.
        scale: ``mean |x|`` is the best one, broadcast against x.

    Returns:
        float32 values, shape of x.

    Examples:
        >>> binary(torch.tensor([-0.1, 0.0, 3.0]), torch.tensor(0.5)).tolist()
        [-0.5, 0.5, 0.5]

    Source: Rastegari et al. 2016, XNOR-Net.
    """
    return torch.where(x >= 0, scale, -scale)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Values rounded to the grid, with the straight-through gradient.

    ``y = s (clip(round(x / s) + z, qmin, qmax) - z)``; ``dy/dx = 1`` for ``qmin <= x / s + z <= qmax``, else 0.
    The grid is computed in float32, also under autocast; y has the dtype of x.

    Args:
        x: real values.
        scale: float32 > 0, broadcast against x; it gets no gradient.
        zero_point: integers, broadcast against x; None for 0.
        qmin: smallest integer.
        qmax: largest integer.

    Returns:
        Shape and dtype of x.

    Examples:
        >>> x = torch.tensor([0.3, 9.0], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor(0.5), None, -7, 7)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.5, 3.5], [1.0, 0.0])

    Source: Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons; Jacob et al. 2018.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _Rounded.apply(x, scale.detach(), zero_point, qmin, qmax, 0.0, True)
        return result
    return _rounded(x, scale, zero_point, qmin, qmax)


def learned_step(
    x: Tensor, step: Tensor, qmin: int, qmax: int, gradient_scale: float, residual: bool = True
) -> Tensor:
    r"""Values rounded to a grid whose step is learned.

    ``y = s clip(round(x / s), qmin, qmax)``; ``dy/dx`` as for ``fake_quantize``; and, times ``gradient_scale``,

        dy/ds = qmin if x / s <= qmin, qmax if x / s >= qmax, otherwise round(x / s) - x / s.

    Without ``residual`` the third case is 0: with ``s = alpha / qmax`` that is PACT's gradient of the clip alpha.

    Args:
        x: real values.
        step: s > 0, float32, broadcast against x.
        qmin: smallest integer.
        qmax: largest integer.
        gradient_scale: LSQ takes ``1 / sqrt(N qmax)``, N entries per step (of one sample, for activations).
        residual: whether the rounding error is part of the step's gradient.

    Returns:
        Shape and dtype of x.

    Examples:
        >>> x, step = torch.tensor([0.3, 9.0]), torch.tensor(0.5, requires_grad=True)
        >>> learned_step(x, step, -7, 7, gradient_scale=1.0).sum().backward()
        >>> round(float(step.grad), 4)  # (1 - 0.6) + 7
        7.4

    Source: Esser et al. 2020, Learned Step Size Quantization; Choi et al. 2018, PACT.
    """
    if torch.is_grad_enabled() and (x.requires_grad or step.requires_grad):
        result: Tensor = _Rounded.apply(x, step, None, qmin, qmax, gradient_scale, residual)
        return result
    return _rounded(x, step, None, qmin, qmax)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of x, on one tensor."""
    codes = quantize(x, scale, zero_point, qmin, qmax)
    if zero_point is not None:
        codes.sub_(zero_point)
    return codes.mul_(scale).add_(0.0).to(x.dtype)  # 0.0: no -0.0


class _Rounded(torch.autograd.Function):
    """``s (clip(round(x / s) + z) - z)`` with gradients for x and s; only x and s are kept for the backward pass.

    Memory traffic is what it costs on a processor, so intermediate values are overwritten, and nothing selects entries
    by a mask: ``torch.where`` takes as long as ten products there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        qmin: int,
        qmax: int,
        gradient_scale: float,
        residual: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.options = qmin, qmax, gradient_scale, residual
        return _rounded(x, scale, zero_point, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax, gradient_scale, residual = ctx.options
        place = x.to(wide(x.dtype)) / scale
        if zero_point is not None:
            place.add_(zero_point)
        gradient = gradient.to(place.dtype)
        # The bounds count as inside, but this operator leaves them out: they are moved by one rounding error.
        eps = torch.finfo(place.dtype).eps
        low, high = (bound + sign * eps * max(abs(bound), 1) for bound, sign in ((qmin, -1), (qmax, 1)))
        inner = torch.ops.aten.hardtanh_backward(gradient, place, low, high)
        for_x = inner.to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return for_x, None, None, None, None, None, None
        clipped = place.clamp_(qmin, qmax)
        if (
            residual
        ):  # round(x / s) - x / s inside, where inner is the gradient; a bound elsewhere, where it is 0
            slope = clipped.round().mul_(gradient).sub_(clipped.mul_(inner))
        else:
            slope = (gradient - inner).mul_(clipped)
        for_scale = slope.sum_to_size(scale.shape) * gradient_scale
        return for_x, for_scale.to(scale.dtype), None, None, None, None, None
