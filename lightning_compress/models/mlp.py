"""A multilayer perceptron: linear layers with one activation between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


def chain(widths: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers of these widths, ``y = W_L a(... a(W_1 x + b_1) ...) + b_L``.

    Args:
        widths: features of the input, of every hidden layer and of the output: two numbers or more.
        activation: "relu", "gelu", "silu", "tanh", "sigmoid" or "softplus".

    Returns:
        The layers in order; activations stand between linear layers only.

    Raises:
        ValueError: an unknown activation, or a width below 1.

    Examples:
        >>> [type(layer).__name__ for layer in chain([2, 8, 1], "tanh")]
        ['Linear', 'Tanh', 'Linear']
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; allowed: {', '.join(_ACTIVATIONS)}.")
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths={list(widths)}: allowed are two numbers or more, each >= 1.")
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class MLP(nn.Module):
    """A multilayer perceptron: ``y = W_L a(... a(W_1 x + b_1) ...) + b_L``.

    Input: float (N, ..., in_features). Output: (N, ..., out_features).

    Args:
        in_features: features of the input, >= 1.
        out_features: features of the output, >= 1.
        hidden: widths of the hidden layers, each >= 1; none makes a linear layer.
        activation: "relu", "gelu", "silu", "tanh", "sigmoid" or "softplus".

    Raises:
        ValueError: an unknown activation, or a width below 1.

    Examples:
        >>> MLP(4, 3, (16, 16))(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int = 784,
        out_features: int = 10,
        hidden: Sequence[int] = (256, 128),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.layers = chain([in_features, *hidden, out_features], activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, ..., in_features) to (N, ..., out_features)."""
        y: torch.Tensor = self.layers(x)
        return y
