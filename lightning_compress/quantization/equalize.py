"""Cross-layer equalization: the ranges of neighbouring layers made alike, channel by channel, at equal outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.connections import LAYERS, NORMS, TRANSPOSED, Connections, follow
from lightning_compress.names import clean

_ROUNDS = 100  # at most; a chain of layers evens out step by step
_SETTLED = 1e-3  # change of a factor


def equalizing_factors(first: Tensor, second: Tensor, channels: Tensor | None = None) -> Tensor:
    r"""Factors that make the ranges of two weights equal: ``s_i = sqrt(r1_i / r2_i)``.

    ``r1_i = max |W1[i]|`` over the row of output channel i, ``r2_i = max |W2[j]|`` over the input channels j that it
    feeds. Row i of the first (and its bias) divided by s_i and the input channels multiplied by it, both ranges are
    ``sqrt(r1_i r2_i)``. 1 where either is 0.

    Args:
        first: [out, n], one row per output channel.
        second: [in, m], one row per input channel.
        channels: output channel that feeds each input channel, [in]; None: each the one of its own number.

    Returns:
        One factor > 0 per output channel, in the dtype of ``first``.

    Examples:
        >>> first, second = torch.tensor([[8.0], [1.0]]), torch.tensor([[2.0], [4.0]])
        >>> equalizing_factors(first, second)
        tensor([2.0000, 0.5000])

    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.1.
    """
    rows, fed = first.abs().amax(1), torch.zeros_like(first[:, 0])
    channels = torch.arange(len(second), device=second.device) if channels is None else channels
    fed = fed.scatter_reduce(0, channels, second.abs().amax(1), "amax")
    return torch.where((rows > 0) & (fed > 0), (rows / fed).sqrt(), 1.0)


def equalize(model: nn.Module, example_input: Any) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Equalize every pair of layers between which a factor per channel can wander, in place; outputs stay equal.

    Between the two may be what commutes with a positive factor: ReLU, leaky ReLU, pooling, reshaping that keeps
    channels apart; and nobody else may read the values. All pairs are equalized in turn until no factor changes, in
    float64, and rounded once. Fold BatchNorm first.

    Args:
        model: any module.
        example_input: one input, to follow the tensors.

    Returns:
        Names of the pairs, and layer name -> why nothing before it could be equalized with it.

    Raises:
        ValueError: there is no example input, or a weight is not finite.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> net[0].weight.data = torch.tensor([[8.0, 0.0], [0.0, 1.0]])
        >>> net[2].weight.data = torch.tensor([[2.0, 4.0]])
        >>> equalize(net, torch.zeros(1, 2))
        ([('0', '2')], {'0': 'it gets no output of another layer, or one that a factor does not commute with'})
        >>> net[0].weight.data.amax(1), net[2].weight.data
        (tensor([4., 2.]), tensor([[4., 2.]]))

    Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction.
    """
    if example_input is None:
        raise ValueError(
            "equalization follows the tensors of a forward pass: give compress() example_input= or data=."
        )
    seen = follow(model, example_input)
    names = {module: clean(name) for name, module in model.named_modules()}
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    shared = _shared(model)
    pairs: list[tuple[Any, Any, Tensor]] = []
    skipped: dict[str, str] = {}
    for layer in layers:
        why = _refusal(layer, seen, shared)
        if why is None:
            before = seen.predecessor(layer)
            assert before is not None
            pairs.append((before.layer, layer, before.channels))
        else:
            skipped[names[layer]] = why
    weights: dict[Any, Tensor] = {}
    for layer in (part for first, second, _ in pairs for part in (first, second)):
        weights[layer] = layer.weight.detach().double().clone(memory_format=torch.contiguous_format)
    for layer, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"the weight of {names[layer]} is not finite: load or repair it before quantizing."
            )
    totals = [weights[first].new_ones(len(_channels(weights[first], first, "out"))) for first, _, _ in pairs]
    for _ in range(_ROUNDS):
        change = 0.0
        for total, (first, second, channels) in zip(totals, pairs, strict=True):
            rows = _channels(weights[first], first, "out")
            columns = _channels(weights[second], second, "in")
            factors = equalizing_factors(rows, columns, channels)
            _scale(weights[first], first, "out", 1 / factors)
            _scale(weights[second], second, "in", factors[channels])
            total *= factors
            change = max(change, float((factors - 1).abs().max()))
        if change < _SETTLED:
            break
    with torch.no_grad():
        for layer, weight in weights.items():
            layer.weight.copy_(weight)
        for total, (first, _, _) in zip(totals, pairs, strict=True):
            if first.bias is not None:
                first.bias.copy_(first.bias.double() / total)
    return [(names[first], names[second]) for first, second, _ in pairs], skipped


def _refusal(layer: nn.Module, seen: Connections, shared: set[nn.Module]) -> str | None:
    """Why a layer cannot be equalized with the one before it."""
    before = seen.predecessor(layer)
    if before is None:
        return "it gets no output of another layer, or one that a factor does not commute with"
    if isinstance(before.layer, NORMS):
        return "BatchNorm lies before it: fold it first"
    if before.consumers > 1:
        return "what it gets is also used elsewhere"
    for part in (before.layer, layer):
        if type(part) not in LAYERS or "forward" in vars(part):
            return f"{type(part).__name__} is a layer of its own kind"
        if part in shared or part in seen.touched:
            return "a weight or bias is also used elsewhere"
        weight: Any = part.weight
        if weight.is_complex():
            return "a weight is complex"
    return None


def _shared(model: nn.Module) -> set[nn.Module]:
    """Layers with a parameter that another module holds too."""
    holders: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(parameter, set()).add(module)
    return {module for modules in holders.values() if len(modules) > 1 for module in modules}


def _blocks(weight: Tensor, layer: Any, side: str) -> Tensor:
    """View [groups, channels of the side in a group, ...] of a contiguous weight."""
    groups, transposed = getattr(layer, "groups", 1), isinstance(layer, TRANSPOSED)
    blocks = weight.view(groups, -1, *weight.shape[1:])
    return blocks if (side == "out") != transposed else blocks.transpose(1, 2)


def _channels(weight: Tensor, layer: Any, side: str) -> Tensor:
    """[channels of the side, everything else]."""
    return _blocks(weight, layer, side).flatten(2).flatten(0, 1)


def _scale(weight: Tensor, layer: Any, side: str, factors: Tensor) -> None:
    """Multiply every channel of the side, in place."""
    blocks = _blocks(weight, layer, side)
    blocks *= factors.view(*blocks.shape[:2], *[1] * (blocks.dim() - 2))
