"""What is lost when single weights are replaced: by the weights, by the Fisher information, by the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.measure import collect
from lightning_compress.stats.running import call, evaluating, first_tensor
from lightning_compress.targets import Target

MEASURES = ("auto", "weight", "output", "fisher")
_OUTPUT_SAMPLES = 128  # one forward pass per weight: more would take long and rank no better

Option = TypeVar("Option")


def losses(
    model: nn.Module,
    pairs: Sequence[tuple[Target, Option]],
    replaced: Callable[[Target, Option], Tensor],
    how: str,
    data: Calibration | None,
) -> list[float]:
    r"""The loss of every replacement of one weight, all others left alone.

    - "weight": ``|W - W^|^2 / |W|^2``
    - "fisher": ``sum E[g^2] (w - w^)^2``
    - "output": ``|f(x) - f_l(x)|^2 / |f(x)|^2`` over at most 128 samples

    Args:
        model: any module; it is left as it was.
        pairs: a target, and what says by what it is replaced.
        replaced: gives the weight that replaces the target's.
        how: one of ``MEASURES`` but "auto".
        data: calibration inputs, for "output" and "fisher".

    Returns:
        One number for each pair.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> pairs = [(target, factor) for target in find(layer) for factor in (1.0, 0.5)]
        >>> losses(layer, pairs, lambda target, factor: factor * target.weight.detach(), "weight", None)
        [0.0, 0.25]

    Source: Cai et al. 2020, ZeroQ; Dong et al. 2019, HAWQ.
    """
    if how == "weight":

        def lost(target: Target, option: Option) -> float:
            weight = target.weight.detach()
            return float(_square(weight - replaced(target, option)) / _square(weight).clamp_min(1e-30))

    elif how == "fisher":
        assert data is not None
        targets = {target.key: target for target, _ in pairs}
        seen = collect(model, list(targets.values()), data, ["gradient"])

        def lost(target: Target, option: Option) -> float:
            gradient = seen[target.key].gradient
            assert gradient is not None
            error = (target.weight.detach() - replaced(target, option)).abs().double().square()
            return float((gradient.double() * error).sum())

    else:
        assert data is not None
        few = replace(data, samples=min(data.samples, _OUTPUT_SAMPLES))
        batches = list(few.batches(model))
        reference = _outputs(model, batches)
        size = _square(reference).clamp_min(1e-30)

        def lost(target: Target, option: Option) -> float:
            weight = target.weight
            kept = weight.detach().clone()
            try:
                weight.data.copy_(replaced(target, option))
                return float(_square(_outputs(model, batches) - reference) / size)
            finally:
                weight.data.copy_(kept)

    shown = tqdm(pairs, desc="sensitivity", unit="layer", leave=False, disable=how == "weight", delay=2)
    return [lost(target, option) for target, option in shown]


def _square(x: Tensor) -> Tensor:
    return x.detach().abs().double().square().sum()


def _outputs(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    with evaluating(model):
        found = [first_tensor(call(model, batch)) for batch in batches]
    return torch.cat([t.double().flatten() for t in found if t is not None])
