"""Weights of linear layers and convolutions as matrices, beside the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
