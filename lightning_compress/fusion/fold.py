"""The arithmetic of folding: tensors first, then a layer and the BatchNorm beside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.connections import TRANSPOSED, tensors_of
from lightning_compress.targets import parameter


def fold_batchnorm(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    place: str = "after",
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Weight and bias of a layer that has taken a channel-wise ``scale * x + shift`` in.

    - after the layer: ``W'[o] = scale[o] * W[o]``, ``b' = scale * b + shift``
    - before the layer: ``W'[:, i] = W[:, i] * scale[i]``, ``b'[o] = b[o] + sum_ik W[o, i, k] * shift[i]``

    Computed in float64 on the CPU, so that every device gets the same bits, and rounded once to the dtype of
    the weight. Zeros become +0.

    Args:
        weight: ``[out, in / groups, *kernel]``, or transposed ``[in, out / groups, *kernel]``.
        bias: ``[out]``, or None for zeros.
        scale: ``[out]`` after the layer, ``[in]`` before it.
        shift: the same shape.
        place: "after" or "before" the layer: where the map stands.
        groups: groups of the convolution.
        transposed: whether the convolution is a transposed one.

    Returns:
        New weight and bias, with the dtype and device of ``weight``.

    Raises:
        ValueError: another place, or "before" a transposed convolution, which spreads the shift unevenly.

    Examples:
        >>> scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.0])
        >>> weight, bias = fold_batchnorm(torch.ones(2, 3), None, scale, shift)
        >>> weight.tolist(), bias.tolist()
        ([[2.0, 2.0, 2.0], [0.5, 0.5, 0.5]], [1.0, 0.0])
    """
    if place not in ("after", "before") or (place == "before" and transposed):
        of = " a transposed convolution" if transposed else ""
        raise ValueError(
            f"place={place!r}{of}: allowed are 'after', and 'before' unless the convolution is transposed."
        )
    blocks, scale, shift = (t.detach().to("cpu", torch.float64) for t in (weight, scale, shift))
    blocks = blocks.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    axis = 1 if place == "after" and not transposed else 2  # of the scaled channels inside a group
    shape = [1] * blocks.dim()
    shape[0], shape[axis] = groups, blocks.shape[axis]
    folded = (blocks * scale.reshape(shape)).reshape(weight.shape).to(weight.dtype)
    folded.masked_fill_(folded == 0, 0)  # a negative scale makes -0.0 of a pruned zero
    old = None if bias is None else bias.detach().to("cpu", torch.float64)
    if place == "after":
        new = shift if old is None else scale * old + shift
    else:
        added = (blocks * shift.reshape(shape)).flatten(2).sum(2).flatten()
        new = added if old is None else old + added
    return folded.to(weight.device), new.to(weight.device, weight.dtype)


def affine(tensors: Mapping[str, Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """What BatchNorm does in eval mode, as a scale and a shift.

    ``scale = gamma / sigma``, ``shift = beta - mu * gamma / sigma``, ``sigma = sqrt(var + eps)``; without affine
    parameters gamma = 1 and beta = 0.

    Args:
        tensors: "running_mean", "running_var" and, unless None, "weight" and "bias".
        eps: what keeps sigma from zero.

    Returns:
        Scale and shift in float64 on the CPU.

    Examples:
        >>> affine({"running_mean": torch.tensor([1.0]), "running_var": torch.tensor([3.0])}, eps=1.0)
        (tensor([0.5000], dtype=torch.float64), tensor([-0.5000], dtype=torch.float64))
    """
    wide = {name: t.detach().to("cpu", torch.float64) for name, t in tensors.items() if t is not None}
    scale = torch.rsqrt(wide["running_var"] + eps)
    if "weight" in wide:
        scale = wide["weight"] * scale
    shift = -wide["running_mean"] * scale
    return scale, wide["bias"] + shift if "bias" in wide else shift


def channels(layer: nn.Module, place: str) -> int:
    """How many channels the layer has on the side where BatchNorm stands."""
    side = "out" if place == "after" else "in"
    return int(getattr(layer, f"{side}_features" if isinstance(layer, nn.Linear) else f"{side}_channels"))


def fold_tensors(
    layer: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    norm: Mapping[str, Tensor | None],
    place: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Fold BatchNorm's tensors into a weight and a bias that belong, or are to belong, to the layer."""
    groups, transposed = int(getattr(layer, "groups", 1)), isinstance(layer, TRANSPOSED)
    return fold_batchnorm(weight, bias, *affine(norm, eps), place=place, groups=groups, transposed=transposed)


def fold_into(layer: nn.Module, norm: nn.Module, place: str, eps: float) -> None:
    """Write the folded values into the layer's own weight Parameter, and into its bias or a new one.

    Args:
        layer: a linear or convolution layer.
        norm: the BatchNorm beside it; it is read only.
        place: "after" or "before": where BatchNorm stands.
        eps: of the BatchNorm.
    """
    weight, bias = parameter(layer, "weight"), layer._parameters["bias"]
    values = fold_tensors(layer, weight, bias, tensors_of(norm), place, eps)
    grid = rescaled(layer, norm, place, eps)
    with torch.no_grad():
        weight.copy_(values[0] if grid is None else grid[0])
        if bias is None:
            layer.register_parameter("bias", nn.Parameter(values[1], requires_grad=weight.requires_grad))
        else:
            bias.copy_(values[1])
    if grid is not None:
        codes.attach(layer, "weight", grid[1])
    for param in ("weight", "bias"):
        code = codes.read(layer, param)
        if code is not None and not code.matches(parameter(layer, param)):
            codes.remove(layer, param)  # the mask of a pruned bias, say: its zeros are gone


def make_bias(layer: nn.Module) -> None:
    """Give a layer without a bias one of zeros."""
    if layer._parameters["bias"] is None:
        weight = parameter(layer, "weight")
        zeros = weight.new_zeros(channels(layer, "after"))
        layer.register_parameter("bias", nn.Parameter(zeros, requires_grad=weight.requires_grad))


def on_grid(layer: nn.Module) -> codes.Code | None:
    """The code of a weight that lies on a grid, unless it is stale."""
    code = codes.read(layer, "weight")
    fits = code is not None and code.stage == "grid" and code.matches(parameter(layer, "weight"))
    return code if fits else None


def rescaled(layer: nn.Module, norm: nn.Module, place: str, eps: float) -> tuple[Tensor, codes.Code] | None:
    """A weight on a grid and its code with BatchNorm's factors taken into the scales.

    Args:
        layer: a linear or convolution layer.
        norm: the BatchNorm beside it.
        place: "after" or "before": where BatchNorm stands.
        eps: of the BatchNorm.

    Returns:
        New weight and code; None if the weight lies on no grid, or on one that cannot take the factors in.
    """
    code, transposed = on_grid(layer), isinstance(layer, TRANSPOSED)
    if code is None or (int(getattr(layer, "groups", 1)) > 1 and (place == "before" or transposed)):
        return None
    axis = 0 if (place == "after") != transposed else 1
    scale, _ = affine(tensors_of(norm), eps)
    return code.scaled(parameter(layer, "weight"), scale, axis)
