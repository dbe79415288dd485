"""The network of a physics-informed model: coordinates to fields, with Fourier features if they are wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_compress.models.mlp import chain


class FourierFeatures(nn.Module):
    """Waves of fixed random frequencies: ``x -> (sin 2 pi x B, cos 2 pi x B)``, ``B ~ N(0, scale^2)``.

    A network of smooth activations learns low frequencies first and high ones hardly; these features give it both.

    Input: float (N, in_features). Output: (N, 2 count), all sines in front.

    Args:
        in_features: coordinates, >= 1.
        count: frequencies, >= 1.
        scale: standard deviation of their entries, in periods per unit of the coordinates, > 0.

    Examples:
        >>> FourierFeatures(2, 8)(torch.zeros(3, 2)).sum(1).tolist()
        [8.0, 8.0, 8.0]

    Source: Tancik et al. 2020, Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional Domains.
    """

    B: Tensor

    def __init__(self, in_features: int, count: int, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("B", scale * torch.randn(in_features, count))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_features) to (N, 2 count)."""
        phase = 2 * math.pi * (x @ self.B)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PINN(nn.Module):
    """Coordinates to fields: an MLP of smooth activations, behind Fourier features if there are any.

    Input: float (N, in_features), coordinates such as (x, t). Output: (N, out_features).

    Args:
        in_features: coordinates, >= 1.
        out_features: fields, >= 1.
        hidden: widths of the hidden layers.
        fourier_features: number of frequencies of sines and cosines in front; 0 gives the coordinates as they are.
        fourier_scale: standard deviation of the frequencies, in periods per unit of the coordinates.
        activation: "tanh", "silu", "gelu", "sigmoid", "softplus" or "relu".

    Raises:
        ValueError: an unknown activation, a width below 1, or a scale that is not positive.

    Examples:
        >>> net = PINN(2, 1, (32, 32), fourier_features=16)
        >>> net(torch.zeros(5, 2)).shape, net.features.B.shape
        (torch.Size([5, 1]), torch.Size([2, 16]))

    Source: Raissi et al. 2019, Physics-informed neural networks.
    """

    def __init__(
        self,
        in_features: int = 2,
        out_features: int = 1,
        hidden: Sequence[int] = (64, 64, 64, 64),
        fourier_features: int = 0,
        fourier_scale: float = 1.0,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        if fourier_features < 0 or not fourier_scale > 0:
            raise ValueError(
                f"fourier_features={fourier_features}, fourier_scale={fourier_scale}: allowed are >= 0 and > 0."
            )
        self.features: nn.Module = nn.Identity()
        if fourier_features:
            self.features = FourierFeatures(in_features, fourier_features, fourier_scale)
        first = 2 * fourier_features or in_features
        self.layers = chain([first, *hidden, out_features], activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map coordinates (N, in_features) to fields (N, out_features)."""
        y: Tensor = self.layers(self.features(x))
        return y
