"""The layer that takes the place of a factorized one: its factors one after the other, as ordinary layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# What the code around a layer may read of it: which factor has it, and its name there.
_READ = {
    "in_channels": (0, "in_channels"),
    "in_features": (0, "in_features"),
    "num_embeddings": (0, "num_embeddings"),
    "out_channels": (-1, "out_channels"),
    "out_features": (-1, "out_features"),
    "embedding_dim": (-1, "out_features"),
    "bias": (-1, "bias"),
}


class Factors(nn.Sequential):
    """Layers in a row that compute what one layer did; each is an ordinary layer for every later method.

    Args:
        scheme: class name of the scheme that made them.
        kind: class name of the layer that was replaced.
        main: name of the child that further arguments of ``forward`` go to (``output_size`` of a transposed
            convolution, ``output_shape`` of a spectral one).
        layers: the factors by name.

    Examples:
        >>> thin, wide = nn.Linear(8, 2, bias=False), nn.Linear(2, 8)
        >>> pair = Factors("Linear", "Linear", "second", first=thin, second=wide)
        >>> pair(torch.zeros(1, 8)).shape, list(pair.state_dict())
        (torch.Size([1, 8]), ['first.weight', 'second.weight', 'second.bias'])
    """

    def __init__(self, scheme: str, kind: str, main: str, **layers: nn.Module) -> None:
        super().__init__()
        self.scheme, self.kind, self.main = scheme, kind, main
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """The layers in order; further arguments go to ``main``."""
        x = input
        for name, layer in self.named_children():
            x = layer(x, *args, **kwargs) if name == self.main else layer(x)
        return x

    def __getattr__(self, name: str) -> Any:
        """Sizes and bias of the replaced layer too, which the code around it may read."""
        if name in _READ:
            position, own = _READ[name]
            return getattr(list(self)[position], own)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """The layer that was replaced."""
        return f"in place of {self.kind}"


def replaced(layer: nn.Module, factors: Factors) -> Factors:
    """Factors that take over the mode, gradient flag and bias Parameter of a layer, with weights still to be filled.

    Args:
        layer: what they replace.
        factors: new layers; the last one gets the bias.

    Returns:
        The factors.
    """
    bias = layer._parameters.get("bias")
    weight: Any = layer.weight
    for parameter in factors.parameters():
        with torch.no_grad():
            parameter.zero_()
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None:
        list(factors)[-1].register_parameter("bias", bias)
    return factors.train(layer.training)


def like(layer: Any, *names: str) -> dict[str, Any]:
    """Constructor arguments that a new layer shares with another one, with device and dtype.

    Args:
        layer: the other layer.
        names: arguments, which the layer holds as attributes of the same names.

    Returns:
        Name -> value.
    """
    return {name: getattr(layer, name) for name in names} | {
        "device": layer.weight.device,
        "dtype": layer.weight.dtype,
    }
