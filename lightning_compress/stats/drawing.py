"""Inputs drawn like an example: its structure, its shapes, and what its channels look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.functional import sampling
from lightning_compress.stats.running import first_tensor

Draw = Callable[[Tensor, int, torch.Generator], Tensor]  # example, how many, source -> samples of its shape


def sample_count(batch: Any) -> int:
    """Length of the first axis of a batch's first tensor."""
    tensor = first_tensor(batch)
    if tensor is None or tensor.dim() == 0:
        raise ValueError(
            "a calibration batch is a tensor, a tuple or a dict of tensors, samples first, not "
            f"{type(batch).__name__}."
        )
    return tensor.shape[0]


def take_samples(value: Any, count: int, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch of ``count``; tensors without a sample axis stay whole."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {k: take_samples(v, count, start, stop) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(take_samples(v, count, start, stop) for v in value)
    return value


def one_sample(x: Any) -> Any:
    """The first sample of an input, for what only looks at shapes; an input without a sample axis as it is."""
    try:
        count = sample_count(x)
    except ValueError:
        return x
    return take_samples(x, count, 0, 1) if count > 1 else x


def drawn_like(example: Any, n: int, draw: Draw, generator: torch.Generator) -> Any:
    """``n`` drawn samples in the structure of the example; tensors without a sample axis stay as they are.

    Args:
        example: an input: a tensor, a tuple of arguments or a dict of keywords, samples first.
        n: how many.
        draw: what draws the real tensors; entries of integer ones are drawn from those of the example.
        generator: source of randomness.

    Returns:
        The same structure.

    Examples:
        >>> drawn_like({"x": torch.zeros(1, 3)}, 5, white, torch.Generator())["x"].shape
        torch.Size([5, 3])
    """
    count = sample_count(example)

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: one(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return tuple(one(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != count:
            return value
        value = value.detach().cpu()
        if value.is_complex():
            parts = [draw(part, n, generator) for part in (value.real, value.imag)]
            return torch.complex(*parts).to(value.dtype)
        if value.is_floating_point():
            return draw(value, n, generator).to(value.dtype)
        chosen = torch.randint(value.numel(), (n, *value.shape[1:]), generator=generator)
        return value.reshape(-1)[chosen]

    return one(example)


def white(example: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """White noise N(0, 1) of the shape of the example's samples."""
    return sampling.normal((n, *example.shape[1:]), generator)


def fields(example: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Fields with the example's mean and variance per channel, or its share of two values."""
    if example.dim() < 3:
        return white(example, n, generator)
    channels = example.shape[1]
    drawn = sampling.gaussian_random_field((n * channels, *example.shape[2:]), generator=generator)
    drawn = drawn.view(n, channels, *example.shape[2:])
    constant = bool((example == example.reshape(-1)[0]).all())  # it tells no more than a shape
    for channel in range(channels):
        given, field = example[:, channel].float(), drawn[:, channel]
        field /= field.std(correction=0).clamp_min(1e-30)
        values = torch.unique(given)
        if len(values) == 2:
            share = float((given == values[0]).float().mean())
            drawn[:, channel] = torch.where(field <= field.flatten().quantile(share), values[0], values[1])
        else:
            drawn[:, channel] = given.mean() + field * (1.0 if constant else given.std(correction=0))
    return drawn


SAMPLERS = {"normal": white, "grf": fields}
