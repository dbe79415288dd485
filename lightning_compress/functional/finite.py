"""How many numbers are not finite, found without a copy where all of them are."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nonfinite(values: Tensor) -> int:
    """Number of entries that are infinite or NaN.

    Args:
        values: floating-point or complex, not on the meta device.

    Returns:
        A number from 0 to that of all entries; a complex entry counts once.

    Examples:
        >>> nonfinite(torch.tensor([1.0, float("nan"), float("-inf")])), nonfinite(torch.zeros(0))
        (2, 0)
    """
    if not values.numel():
        return 0
    values = values.detach()
    low, high = torch.aminmax(torch.view_as_real(values) if values.is_complex() else values)
    if math.isfinite(low) and math.isfinite(high):
        return 0
    return int((~torch.isfinite(values)).sum())
