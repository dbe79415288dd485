"""A box of low modes of a spectral weight: which indices it has, and how it is cut out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.targets import plain_class


def centred(stored: Sequence[int], kept: Sequence[int]) -> list[slice]:
    """The indices of the lowest modes, as neuraloperator lays them out.

    Args:
        stored: sizes K of the mode axes.
        kept: sizes k <= K to keep.

    Returns:
        One slice per axis: around floor(K/2), but from 0 on the last axis. (Complex data have both signs there, but
        neuraloperator multiplies the first K coefficients all the same.)

    Examples:
        >>> centred((8, 5), (5, 3))
        [slice(2, 7, None), slice(0, 3, None)]
    """
    starts = [size // 2 - k // 2 for size, k in zip(stored[:-1], kept[:-1], strict=True)] + [0]
    return [slice(start, start + k) for start, k in zip(starts, kept, strict=True)]


def smallest_box(energy: Tensor, ratio: float) -> tuple[int, ...]:
    """Fewest modes with this share of the energy, taking one mode at a time off the axis that loses least.

    Args:
        energy: of every mode, real, >= 0, [K_1, ..., K_d].
        ratio: share to keep, in (0, 1].

    Returns:
        Sizes k of the centred box.

    Examples:
        >>> smallest_box(torch.tensor([[0.0, 0.0], [9.0, 1.0], [0.0, 0.0]]), ratio=0.9)
        (1, 1)
    """
    # Rounding of the sums must not keep a mode where the share is met exactly.
    least = (ratio - 1e-12) * float(energy.sum())
    kept = tuple(energy.shape)
    while True:
        options = []
        for axis in (a for a in range(len(kept)) if kept[a] > 1):
            smaller = (*kept[:axis], kept[axis] - 1, *kept[axis + 1 :])
            options.append((float(energy[tuple(centred(energy.shape, smaller))].sum()), smaller))
        best = max(options, key=lambda option: option[0], default=(-math.inf, kept))
        if best[0] < least:
            return kept
        kept = best[1]


def refusal(model: nn.Module, layer: Any) -> str | None:
    """Why the weight of a spectral convolution cannot be cut.

    Args:
        model: the model it is a layer of.
        layer: a spectral convolution.

    Returns:
        A sentence, or None if it can.
    """
    weight = layer.weight
    if isinstance(weight, Tensor):
        if "weight" not in layer._parameters:
            return "its weight is computed on the way: by a torch parametrization or by fake quantization"
        parts: set[nn.Module] = {layer}
        tensors = [weight]
    else:
        parts, tensors = set(weight.modules()), list(weight.parameters())
        if any(plain_class(part) is not type(part) for part in parts):
            return "its weight is quantized on the way: finalize the model first"
        known = ("dense", "tucker", "cp", "tt")
        if not hasattr(weight, "truncated") and getattr(weight, "name", "").lower() not in known:
            return (
                f"its weight is a {type(weight).__name__}, which has no modes to cut (no method 'truncated')"
            )
    if any(not isinstance(code, codes.Mask) for _, _, _, code in codes.of(layer)):
        return "its weight lies on a grid: truncate first, then quantize"
    ids = {id(t) for t in tensors}
    for module in model.modules():
        shares = module is not layer and any(child is weight for child in module._modules.values())
        if shares or (module not in parts and any(id(p) in ids for p in module._parameters.values())):
            return "its weight is shared with another layer"
    return None


def cut(weight: Any, box: Sequence[slice]) -> Any:
    """A part of the mode axes of a weight, as a weight of the same kind.

    Dense weights lose entries, Tucker and CP weights rows of their mode factors, TT weights slices of their mode cores;
    another kind is asked for ``truncated(box)``. Parameters of which nothing is lost stay the same objects.

    Args:
        weight: of a spectral convolution.
        box: one slice per mode axis.

    Returns:
        The new weight; keys as before.
    """
    index = [slice(None)] * (len(weight.shape) - len(box)) + list(box)
    if isinstance(weight, Tensor):
        return _part(weight, *index)
    if hasattr(weight, "truncated"):
        return weight.truncated(list(box))
    kind = weight.name.lower()
    if kind == "dense":
        return type(weight)(_part(weight.tensor, *index))
    if kind == "tt":
        cores = zip(weight.factors, index, strict=True)
        return type(weight)([_part(core, slice(None), rows) for core, rows in cores])
    factors = [_part(factor, rows) for factor, rows in zip(weight.factors, index, strict=True)]
    return type(weight)(weight.core if kind == "tucker" else weight.weights, factors)


def cut_masks(layer: Any, box: Sequence[slice]) -> dict[str, Tensor]:
    """The masks that a layer's weight respects, cut like it; they and stale ones are taken off the layer.

    Args:
        layer: a spectral convolution whose weight is still whole.
        box: one slice per mode axis.

    Returns:
        Parameter name inside the layer -> mask, True = kept.
    """
    held = [entry for entry in codes.of(layer) if entry[0].split(".")[0] == "weight"]
    kept = {key: code for key, _, _, code in held if code.matches(layer.get_parameter(key))}
    for _, holder, param, _ in held:
        codes.remove(holder, param)
    if not kept:
        return {}
    # What happens to the weight, done to a weight of ones and zeros.
    twin = nn.Module()
    twin.weight = copy.deepcopy(layer.weight)
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            parameter.fill_(1)
            if key in kept:
                parameter.mul_(kept[key].mask.to(parameter.device))  # type: ignore[attr-defined]
        twin.weight = cut(twin.weight, box)
        return {key: twin.get_parameter(key) != 0 for key in kept}


def _part(tensor: Any, *index: slice) -> Any:
    """A part of a Parameter as a new one; the Parameter itself where that is all of it."""
    part = tensor.detach()[index]
    if part.shape == tensor.shape:
        return tensor
    return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=tensor.requires_grad)
