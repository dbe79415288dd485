"""How far the weights of one model are from those of another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.targets import find


class WeightError(NamedTuple):
    """Differences between weights.

    Args:
        sqnr_db: ``10 log10(sum |w|^2 / sum |w - v|^2)``; infinite for equal weights.
        relative: ``sqrt(sum |w - v|^2 / sum |w|^2)``.
    """

    sqnr_db: float
    relative: float


def weight_error(original: nn.Module | Tensor, other: nn.Module | Tensor) -> WeightError:
    r"""Signal-to-noise ratio and relative error of weights, over all targets that both models have.

    ``10 log10(sum |w|^2 / sum |w - v|^2)`` and ``sqrt(sum |w - v|^2 / sum |w|^2)``, summed in float64.

    Args:
        original: w: a model, or one tensor.
        other: v: a model, or a tensor of the same shape.

    Returns:
        Both; NaN where no target of the same name and shape is in both models, or all of w is zero.

    Raises:
        ValueError: two tensors of different shape; a model and a tensor.

    Examples:
        >>> from lightning_compress.metrics import weight_error
        >>> w = torch.tensor([3.0, 4.0])
        >>> error = weight_error(w, 0.9 * w)
        >>> round(error.sqnr_db, 3), round(error.relative, 3)
        (20.0, 0.1)
    """
    pairs = _pairs(original, other)
    signal = sum(_energy(w) for w, _ in pairs)
    noise = sum(_energy(w.double() - v.double() if not w.is_complex() else w - v) for w, v in pairs)
    if not signal:
        return WeightError(math.nan, math.nan)
    ratio = noise / signal
    return WeightError(-10 * math.log10(ratio) if ratio else math.inf, math.sqrt(ratio))


def _pairs(original: nn.Module | Tensor, other: nn.Module | Tensor) -> list[tuple[Tensor, Tensor]]:
    if isinstance(original, Tensor) and isinstance(other, Tensor):
        if original.shape != other.shape:
            raise ValueError(
                f"weights of shape {tuple(original.shape)} and {tuple(other.shape)}: they must have the same shape."
            )
        return [(original.detach().cpu(), other.detach().cpu())]
    if isinstance(original, Tensor) or isinstance(other, Tensor):
        raise ValueError("weight_error compares two models, or two tensors.")
    theirs = {t.key: t.weight.detach().cpu() for t in find(other)}
    ours = {t.key: t.weight.detach().cpu() for t in find(original)}
    return [(w, theirs[key]) for key, w in ours.items() if key in theirs and theirs[key].shape == w.shape]


def _energy(x: Tensor) -> float:
    return (
        float(torch.linalg.vector_norm(x, dtype=torch.complex128 if x.is_complex() else torch.float64)) ** 2
    )
