"""Integers by rate and distortion: what a code costs in bits counts beside how far it is from the weight."""

from __future__ import annotations

import torch
from torch import Tensor


def code_bits(codes: Tensor, reach: int) -> Tensor:
    """Bits that an entropy coder spends on each integer, ``-log2 p(q)``, from how often they occur.

    ``p(q) = (n_q + g(q)) / (n + 1)`` with g a two-sided geometric distribution of the same mean |q|, so that
    integers which do not occur have a price too.

    Args:
        codes: integers of any shape, |q| <= reach.
        reach: R >= 1.

    Returns:
        float64 [2 R + 1], of -R to R.

    Examples:
        >>> code_bits(torch.tensor([0, 0, 0, 1]), 1).round()
        tensor([5., 0., 2.], dtype=torch.float64)

    Source: Sullivan & Wiegand 1998, Rate-Distortion Optimization for Video Compression.
    """
    q = codes.reshape(-1).long()
    counts = torch.bincount(q + reach, minlength=2 * reach + 1).double()
    mean = float(q.abs().double().mean()) if q.numel() else 0.0
    ratio = max(mean / (1 + mean), 1e-3)
    tail = torch.arange(-reach, reach + 1).abs().double() * torch.tensor(ratio, dtype=torch.float64).log()
    return -((counts + tail.softmax(0)) / (q.numel() + 1)).log2()


def cheapest_codes(values: Tensor, bits: Tensor, penalty: float) -> Tensor:
    r"""``argmin_q (x - q)^2 + penalty * bits(q)`` over the integers beside x.

    Args:
        values: x, in steps of the grid.
        bits: [2 R + 1], what each integer from -R to R costs.
        penalty: lambda >= 0, squared steps per bit; 0 rounds to nearest.

    Returns:
        Integers within -R to R, of the dtype of ``values``.

    Examples:
        >>> bits = torch.tensor([4.0, 1.0, 4.0])
        >>> cheapest_codes(torch.tensor([0.4, 0.6, 0.9]), bits, 0.1)
        tensor([0., 0., 1.])

    Source: Sullivan & Wiegand 1998; Wiedemann et al. 2020, DeepCABAC.
    """
    reach = (len(bits) - 1) // 2
    nearest = values.round().clamp(-reach, reach)
    lower = (nearest - nearest.sign()).clamp(-reach, reach)  # the one towards zero is the cheaper neighbour
    bits = bits.to(values.dtype)

    def cost(q: Tensor) -> Tensor:
        return (values - q).square() + penalty * bits[(q + reach).long()]

    return torch.where(cost(lower) < cost(nearest), lower, nearest)
