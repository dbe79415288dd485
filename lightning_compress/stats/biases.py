"""What is added to the output channels of a weight: the bias beside it, or BatchNorm's after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.targets import Target

_PROJECTIONS = (
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
)  # they share one in_proj_bias, in this order


class BiasPart(NamedTuple):
    """The part of a bias that belongs to one weight.

    Args:
        name: of the parameter inside the layer.
        parameter: the user's own.
        start: first entry of the part, of the flattened parameter.
        stop: behind its last entry.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int

    def of(self, values: Tensor) -> Tensor:
        """The part of a tensor like the parameter, [channels]."""
        return values.reshape(-1)[self.start : self.stop]


def bias_part(target: Target) -> BiasPart | None:
    """The bias beside a weight.

    Args:
        target: the weight.

    Returns:
        None if there is none. Of a grouped transposed convolution it has ``groups`` entries for every index of the
        weight's output axis, group by group.

    Examples:
        >>> part = bias_part(find(nn.MultiheadAttention(4, 2, kdim=3))[1])
        >>> part.name, part.start, part.stop
        ('in_proj_bias', 4, 8)
    """
    stem = target.param.split(".")[0]
    name = "in_proj_bias" if stem in _PROJECTIONS else stem.replace("weight", "bias")
    bias = target.module._parameters.get(name)
    size = target.weight.shape[target.axes.out] if target.weight.dim() else 0
    if bias is None or name == stem or not size or bias.numel() % size:
        return None
    if stem in _PROJECTIONS:
        start = size * _PROJECTIONS.index(stem)
        return BiasPart(name, bias, start, start + size)
    return BiasPart(name, bias, 0, bias.numel())


class Shift(NamedTuple):
    """What is added to every output channel, and where its gradient appears.

    Args:
        value: [channels], as the model computes in eval mode.
        parameter: whose gradient, times ``factor``, is that of ``value``.
        part: its entries.
        factor: one number, or one for every channel.
    """

    value: Tensor
    parameter: nn.Parameter
    part: slice
    factor: Tensor | float


def shift_of(target: Target, norm: Any = None) -> Shift | None:
    """The bias of a layer together with the BatchNorm behind it, ``b' = beta + (b - mu) gamma / sigma``.

    Args:
        target: the weight.
        norm: the BatchNorm that directly follows, if there is one.

    Returns:
        None where nothing is added, or nothing that has a gradient.

    Examples:
        >>> shift_of(find(nn.Linear(3, 2))[0]).value.shape
        torch.Size([2])
    """
    part = bias_part(target)
    own = None if part is None else part.of(part.parameter.detach())
    if norm is None:
        return (
            None
            if part is None or own is None
            else Shift(own, part.parameter, slice(part.start, part.stop), 1.0)
        )
    if norm.running_var is None:
        return None  # it takes the statistics of every batch: there is no one number
    sigma = (norm.running_var + norm.eps).sqrt()
    gamma = torch.ones_like(sigma) if norm.weight is None else norm.weight.detach()
    value = ((0.0 if own is None else own) - norm.running_mean) * gamma / sigma
    if norm.bias is not None:
        return Shift(value + norm.bias.detach(), norm.bias, slice(None), 1.0)
    if part is None:
        return None
    # The gradient of b is that of b' times gamma / sigma; where gamma is 0, so is b'.
    factor = torch.where(gamma == 0, 0.0, sigma / gamma)
    return Shift(value, part.parameter, slice(part.start, part.stop), factor)
