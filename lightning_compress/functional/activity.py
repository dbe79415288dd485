"""Penalties on the outputs of layers that make many of their entries or channels small.

Each has a value ``P(a)`` and a gradient in two parts, ``dP/da = c x``: a scale c that broadcasts against a, and x, a
itself or its signs. So a gradient takes one pass over a where it is added, and no memory where x is a.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.functional import penalties
from lightning_compress.functional.layouts import wide


def activation_l1(a: Tensor) -> Tensor:
    """Mean magnitude of a layer's output: ``P = mean |a|``.

    Args:
        a: any shape, real or complex.

    Returns:
        P, at least in single precision.

    Examples:
        >>> activation_l1(torch.tensor([2.0, -2.0, 0.0, 0.0]))
        tensor(1.)

    Source: Georgiadis 2019, Accelerating Convolutional Neural Networks via Activation Map Compression.
    """
    return wide(a).abs().mean()


def activation_l1_gradient(a: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``mean |a|``: ``c = 1 / N``, ``x = a / |a|``, 0 where a = 0.

    Args:
        a: any shape, real or complex.

    Returns:
        c and x.

    Examples:
        >>> activation_l1_gradient(torch.tensor([2.0, -2.0, 0.0, 0.0]))
        (tensor(0.2500), tensor([ 1., -1.,  0.,  0.]))
    """
    return _scale(a, 1 / a.numel()), a.sgn()


def activation_l2(a: Tensor) -> Tensor:
    """Mean square of a layer's output: ``P = mean |a|^2``.

    Args:
        a: any shape, real or complex.

    Returns:
        P, at least in single precision.

    Examples:
        >>> activation_l2(torch.tensor([2.0, -2.0, 0.0, 0.0]))
        tensor(2.)
    """
    return wide(a).abs().square().mean()


def activation_l2_gradient(a: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``mean |a|^2``: ``c = 2 / N``, ``x = a``.

    Args:
        a: any shape, real or complex.

    Returns:
        c and x.

    Examples:
        >>> activation_l2_gradient(torch.tensor([2.0, -2.0, 0.0, 0.0]))
        (tensor(0.5000), tensor([ 2., -2.,  0.,  0.]))
    """
    return _scale(a, 2 / a.numel()), a


def activation_l1_l2(a: Tensor, channel_axis: int = 1, norm: str = "l2") -> Tensor:
    """Few active channels: ``P = |v|_1 / |v|_2`` with v_c the norm of channel c over samples and positions.

    Args:
        a: real or complex.
        channel_axis: axis of the channels.
        norm: "l2" or "l1"; the mean of |a| gives what "l1" does, since P is a ratio.

    Returns:
        P, at least in single precision.

    Raises:
        ValueError: an unknown norm, or an axis that a does not have.

    Examples:
        >>> activation_l1_l2(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        tensor(1.)

    Source: Hoyer 2004; Yang et al. 2020, DeepHoyer.
    """
    return penalties.l1_l2(channel_norms(a, channel_axis, norm).flatten())[0]


def activation_l1_l2_gradient(a: Tensor, channel_axis: int = 1, norm: str = "l2") -> tuple[Tensor, Tensor]:
    """The gradient of ``|v|_1 / |v|_2``: c has one value per channel, and x is a, or its signs for norm="l1".

    Args:
        a: real or complex.
        channel_axis: axis of the channels.
        norm: "l2" or "l1".

    Returns:
        c and x.

    Raises:
        ValueError: an unknown norm, or an axis that a does not have.

    Examples:
        >>> activation_l1_l2_gradient(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))[0].shape
        torch.Size([1, 2])
    """
    v = channel_norms(a, channel_axis, norm)
    slope = penalties.l1_l2(v.flatten())[1].view_as(v)
    return (slope, a.sgn()) if norm == "l1" else ((slope / v).where(v > 0, 0), a)


def channel_norms(a: Tensor, channel_axis: int = 1, norm: str = "l2") -> Tensor:
    """Norm of every channel over samples and positions.

    Args:
        a: real or complex.
        channel_axis: axis of the channels.
        norm: "l2" or "l1".

    Returns:
        v, of one entry along all other axes, at least in single precision.

    Raises:
        ValueError: an unknown norm, or an axis that a does not have.

    Examples:
        >>> channel_norms(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        tensor([[5., 1.]])
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm={norm!r} is unknown; allowed: l2, l1.")
    if not -a.dim() <= channel_axis < a.dim():
        raise ValueError(
            f"channel_axis={channel_axis}: an output of shape {tuple(a.shape)} has axes 0 to {a.dim() - 1}."
        )
    axis, order, v = channel_axis % a.dim(), 1 if norm == "l1" else 2, wide(a)
    for dims in (list(range(axis + 1, a.dim())), list(range(axis))):  # neighbours in memory first
        v = torch.linalg.vector_norm(v, order, dim=dims, keepdim=True) if dims else v
    return v.abs()


def _scale(a: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device).real


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "activation_l1": activation_l1,
    "activation_l2": activation_l2,
    "activation_l1_l2": activation_l1_l2,
}
GRADIENTS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "activation_l1": activation_l1_gradient,
    "activation_l2": activation_l2_gradient,
    "activation_l1_l2": activation_l1_l2_gradient,
}
