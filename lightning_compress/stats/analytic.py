"""What a layer sees behind BatchNorm, without any input: from the parameters alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def expected_input(norm: nn.Module, relu: bool = True) -> Tensor:
    r"""Mean of what follows a BatchNorm, if its outputs are normal: ``z ~ N(beta, gamma^2)``, E[relu(z)] or E[z].

    ``E[relu(z)] = beta * Phi(beta / sigma) + sigma * phi(beta / sigma)``, ``sigma = |gamma|``, with the distribution
    function Phi and the density phi of N(0, 1); ``relu(beta)`` where gamma = 0. ``E[z] = beta``. Without affine
    parameters gamma = 1 and beta = 0.

    Args:
        norm: a BatchNorm layer, in eval mode with statistics that fit its inputs.
        relu: whether a ReLU follows.

    Returns:
        [channels], float32.

    Examples:
        >>> expected_input(nn.BatchNorm1d(2))  # 1 / sqrt(2 pi)
        tensor([0.3989, 0.3989])
        >>> expected_input(nn.BatchNorm1d(2), relu=False)
        tensor([0., 0.])

    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, appendix C.
    """
    layer: Any = norm
    size = layer.num_features
    gamma, beta = (
        torch.full((size,), default, dtype=torch.float64)
        if t is None
        else t.detach().to("cpu", torch.float64)
        for t, default in ((layer.weight, 1.0), (layer.bias, 0.0))
    )
    sigma = gamma.abs()
    ratio = (beta / sigma).nan_to_num(0.0)  # 0 / 0: no spread around zero
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    mean = beta * torch.special.ndtr(ratio) + sigma * density if relu else beta
    return mean.float()
