"""What learned and observed quantizers share: straight-through gradients, one bit, and agreement between processes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lightning_compress.functional.affine import binary, choose_qparams
from lightning_compress.functional.groups import Groups, like, real


def agree(value: Tensor, how: str) -> Tensor:
    """The same value in all processes: the largest, or the mean.

    Args:
        value: any real tensor, of one shape everywhere.
        how: "max" or "mean".

    Returns:
        The value itself where there is one process.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    value = value.clone()
    distributed.all_reduce(value, distributed.ReduceOp.MAX if how == "max" else distributed.ReduceOp.SUM)
    return value if how == "max" else value / distributed.get_world_size()


def group_means(groups: Groups, weight: Tensor) -> Tensor:
    """``E|w|`` of every group, 1 where that is zero: the scale of one bit.

    Args:
        groups: which weights share a scale.
        weight: real or complex.

    Returns:
        float32 [G].
    """
    means = [block.detach().abs().float().mean(1) for block in groups.blocks(weight)]
    clip = groups.join(means, weight.shape)
    return choose_qparams(-clip, clip, -1, 1)[0]


def binary_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """``-s`` and ``s``, with gradient 1 for every weight: a bound would leave half of them, those above s, without."""
    return straight_through(weight, like(binary(real(weight.detach()), scale), weight.dtype))


def straight_through(weight: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient passed on to the weight as it is."""
    return cast(Tensor, _Replaced.apply(weight, rounded))


def attached(x: Tensor, parameter: Tensor) -> Tensor:
    """The same values, with zero as the parameter's gradient: distributed training waits for every gradient."""
    if not torch.is_grad_enabled():
        return x
    return cast(Tensor, _Attached.apply(x, parameter))


class _Replaced(torch.autograd.Function):
    """Other values in the forward pass, the same gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (parameter,) = ctx.saved_tensors
        return gradient, torch.zeros_like(parameter)
