"""Weights of linear layers and convolutions as matrices, beside the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.measure import Stats, collect
from lightning_compress.targets import Target

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_GRAM_BYTES = 1 << 30  # Gram matrices measured in one pass


def has_gram(target: Target) -> bool:
    """Whether a target is the real weight matrix of a linear layer or a convolution."""
    return isinstance(target.module, _LAYERS) and target.param == "weight" and not target.weight.is_complex()


def bias_of(target: Target) -> nn.Parameter | None:
    """The bias beside a weight, or None."""
    return target.module._parameters.get("bias")


def collected(
    model: nn.Module, targets: Sequence[Target], inputs: Calibration, wanted: Mapping[str, Sequence[str]]
) -> dict[str, Stats]:
    """Statistics of every target, in as many passes as the Gram matrices need to fit into memory.

    Args:
        model: any module.
        targets: its weights.
        inputs: calibration inputs.
        wanted: target key -> fields of ``Stats``.

    Returns:
        Target key -> statistics.
    """
    found: dict[str, Stats] = {}
    by_fields: dict[tuple[str, ...], list[Target]] = {}
    for t in targets:
        if wanted[t.key]:
            by_fields.setdefault(tuple(wanted[t.key]), []).append(t)
    for fields, members in by_fields.items():
        passes: list[list[Target]] = [[]]
        room = _GRAM_BYTES
        for t in members:
            need = _gram_bytes(t) if "gram" in fields else 0
            if need > room and passes[-1]:
                passes.append([])
                room = _GRAM_BYTES
            passes[-1].append(t)
            room -= need
        for part in passes:
            found |= collect(model, part, inputs, list(fields))
    return found


def _gram_bytes(target: Target) -> int:
    """Of its double-precision Gram matrix; spectral weights have one for every mode."""
    weight, axes = target.weight, target.axes
    inputs = weight.numel() // weight.shape[axes.out]
    if weight.is_complex():
        return 16 * inputs * (1 if axes.in_ is None else weight.shape[axes.in_])
    return 8 * inputs**2


def matrices(target: Target, values: Tensor) -> Tensor:
    """A weight-like tensor as ``[groups, out / groups, in x kernel]``, and back by ``weight_like``."""
    groups = int(getattr(target.module, "groups", 1))
    if isinstance(target.module, _TRANSPOSED):
        split = values.view(groups, values.shape[0] // groups, *values.shape[1:])
        return split.transpose(1, 2).flatten(2)
    return values.reshape(groups, values.shape[0] // groups, -1)


def weight_like(target: Target, matrices: Tensor) -> Tensor:
    """Inverse of ``matrices``."""
    shape = target.weight.shape
    if isinstance(target.module, _TRANSPOSED):
        groups = len(matrices)
        split = matrices.view(groups, shape[1], shape[0] // groups, *shape[2:])
        return split.transpose(1, 2).reshape(shape)
    return matrices.reshape(shape)


def real_matrices(target: Target, values: Tensor) -> Tensor:
    """Any weight that has a Gram matrix as real matrices, ``[problems, outputs, inputs]``; back by ``from_real``.

    A complex spectral weight is one problem for each mode, with real and imaginary parts as inputs of their own.

    Args:
        target: linear layer, convolution or spectral weight.
        values: of the weight's shape.

    Returns:
        float64.
    """
    if not values.is_complex():
        return matrices(target, values).double()
    rows = values.movedim(_ends(target), (-2, -1))
    rows = rows.reshape(-1, *rows.shape[-2:])
    return torch.cat([rows.real, rows.imag], 2).double()


def from_real(target: Target, rows: Tensor) -> Tensor:
    """Inverse of ``real_matrices``; what belongs to a complex weight gets a last axis of real and imaginary part."""
    weight, ends = target.weight, _ends(target)
    if not weight.is_complex():
        return weight_like(target, rows)
    rest = [n for axis, n in enumerate(weight.shape) if axis not in ends]
    planes = torch.stack(rows.chunk(2, 2), -1).view(*rest, *rows.shape[1:2], -1, 2)
    return planes.movedim((-3, -2), ends)


def _ends(target: Target) -> tuple[int, int]:
    """Axes of outputs and inputs; of a weight without inputs of its own, another one takes their place."""
    out, in_ = target.axes
    return out, in_ if in_ is not None else 0 if out else 1


def real_grams(target: Target, gram: Tensor) -> Tensor:
    """Gram matrices that belong to ``real_matrices``: ``e G e^H = [a b] [[P, Q], [Q^T, P]] [a b]^T`` for e = a + ib.

    Args:
        target: linear layer, convolution or spectral weight.
        gram: its ``Stats.gram``; P + iQ where it is complex.

    Returns:
        float64 ``[problems, inputs, inputs]``.
    """
    flat = gram.cpu().reshape(-1, *gram.shape[-2:])
    if not target.weight.is_complex():
        return flat.double()
    return torch.cat([torch.cat([flat.real, flat.imag], 2), torch.cat([flat.imag.mT, flat.real], 2)], 1)


def corrected(target: Target, bias: Tensor, error: Tensor, mean: Tensor) -> Tensor:
    """``b_o + sum_j (W - W^)_oj E[x_j]``: the mean output is as it was.

    Args:
        target: linear layer or convolution.
        bias: b.
        error: W - W^.
        mean: E[x] of the input that every weight multiplies, broadcast against W.

    Returns:
        The new bias, on the CPU.

    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction.
    """
    shift = matrices(target, error * mean.cpu().double().expand(error.shape)).sum(2).flatten()
    return (bias.detach().cpu().double() + shift).to(bias.dtype)
