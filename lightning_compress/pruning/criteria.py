"""Which weights matter: criteria give every element, or every channel, a score, higher = keep.

A criterion is a plain function ``f(target, stats) -> scores``. One that looks at activations or gradients
says so in its attribute ``needs`` (names of the fields of ``lightning_compress.stats.Stats``), and
gets them measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_compress.functional.finite import nonfinite
from lightning_compress.names import name_of, resolve
from lightning_compress.pruning.followers import alone_behind, followers
from lightning_compress.pruning.rules import (
    Criterion,
    activation,
    batchnorm_scale,
    fisher,
    grouped,
    magnitude,
    random,
    redundancy,
    taylor,
    wanda,
)
from lightning_compress.stats import Calibration, Stats, collect
from lightning_compress.targets import Target

__all__ = ["Criterion", "channel_scores", "criterion", "element_scores", "magnitude", "measure", "random"]

_BY_NAME = {
    f.__name__: f for f in (magnitude, taylor, fisher, wanda, activation, batchnorm_scale, redundancy)
}
_OF_NORMS = frozenset(
    ("norm_scale", "bias", "bias_gradient")
)  # for these, what follows a layer must be known
_OF_MODEL = frozenset(("norm_scale",))  # these need no inputs
_OF_LOSS = frozenset(("gradient", "taylor", "taylor_sums"))


def criterion(name: str | Criterion, seed: int) -> Criterion:
    """The criterion meant by a name, an import path or a function.

    Args:
        name: "magnitude", "taylor", "fisher", "wanda", "activation", "batchnorm_scale", "redundancy", "random",
            ``"package.module.function"``, or a function of (target, stats).
        seed: for "random".

    Returns:
        The criterion.

    Raises:
        ValueError: unknown name.

    Examples:
        >>> criterion("magnitude", seed=0) is magnitude
        True
    """
    return resolve(name, _BY_NAME | {"random": random(seed)}, "criterion")


def element_scores(rule: Criterion, target: Target, stats: Stats | None) -> Tensor:
    """Score of every element of a weight.

    Args:
        rule: what ``criterion`` returned.
        target: the weight.
        stats: what ``measure`` gave for it.

    Returns:
        Real, finite scores, shape of the weight.

    Raises:
        ValueError: scores of a wrong shape or not finite, with the layer and the count.

    Examples:
        >>> element_scores(magnitude, find(nn.Linear(2, 3))[0], None).shape
        torch.Size([3, 2])
    """
    scores = rule(target, stats)
    if scores.shape != target.weight.shape or scores.is_complex():
        raise ValueError(
            f"criterion {name_of(rule)} gave {target.key} scores of shape {tuple(scores.shape)}, dtype {scores.dtype}; "
            f"needed are real scores of shape {tuple(target.weight.shape)}."
        )
    return _finite(scores, rule, target)


def channel_scores(
    rule: Criterion,
    target: Target,
    stats: Stats | None,
    axis: int,
    norm: str = "l2",
    normalize: bool = True,
) -> Tensor:
    """Score of every index of one axis of a weight.

    "magnitude" and functions without a rule of their own: ``||s_G||_2 / sqrt(m)`` or ``||s_G||_1 / m`` of the m
    element scores s that share the index; the others as they say themselves.

    Args:
        rule: what ``criterion`` returned.
        target: the weight.
        stats: what ``measure`` gave for it.
        axis: of the weight tensor; of a grouped convolution the axis as the tensor has it.
        norm: "l2" or "l1".
        normalize: divide by the square root of m (l2), or by m (l1).

    Returns:
        Real, finite scores, [size of the axis].

    Raises:
        ValueError: a criterion that scores output channels and another axis, statistics that were not measured, or
            scores that are not finite.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> channel_scores(magnitude, find(layer)[0], None, axis=0, normalize=False)
        tensor([5.])
    """
    axis %= target.weight.dim()
    own = getattr(rule, "channels", None)
    if own is None:
        return grouped(element_scores(rule, target, stats), axis, norm, normalize)
    return _finite(own(target, stats, axis, norm, normalize), rule, target)


def measure(
    rule: Criterion, model: nn.Module, targets: Sequence[Target], data: Calibration | None, samples: int
) -> tuple[Mapping[str, Stats], str]:
    """Measure what a criterion needs.

    Args:
        rule: what ``criterion`` returned.
        model: the model the targets belong to.
        targets: weights.
        data: calibration inputs and loss, for criteria that need them.
        samples: calibration inputs that are used.

    Returns:
        Target key -> statistics (empty if nothing is needed), and which inputs were used ("" if none).

    Raises:
        ValueError: it needs inputs and there are none, or a layer was never used.

    Examples:
        >>> net = nn.Linear(2, 1)
        >>> measure(magnitude, net, find(net), None, 256)
        ({}, '')
        >>> measure(criterion("wanda", 0), net, find(net), lc.stats.Calibration(torch.zeros(1, 2)), 64)[1]
        'synthetic:normal n=64 seed=0'
    """
    needs = frozenset(getattr(rule, "needs", ()))
    if not needs:
        return {}, ""
    inputs = dataclasses.replace(data or Calibration(), samples=samples)
    norms: dict[str, nn.Module] = {}
    if needs & _OF_NORMS:
        behind = alone_behind(followers(model, inputs.example(model)))
        norms = {t.key: behind[t.module] for t in targets if t.module in behind}
    found = collect(model, targets, inputs, sorted(needs), norms=norms)
    if needs <= _OF_MODEL:
        return found, ""
    source = inputs.describe(model)
    if needs & _OF_LOSS:
        source += f", {_labels(needs, model, inputs)}"
    return found, source


def _labels(needs: frozenset[str], model: nn.Module, inputs: Calibration) -> str:
    """What the gradients are of, for reports."""
    if inputs.loss is not None:
        return f"loss {name_of(inputs.loss)}"
    labels = next(iter(inputs.pairs(model)))[1]
    return "labels of the model's own distribution" if labels is None or "gradient" in needs else "its labels"


def _finite(scores: Tensor, rule: Criterion, target: Target) -> Tensor:
    bad = nonfinite(scores)
    if bad:
        raise ValueError(
            f"{bad} of {scores.numel()} scores of {target.key} are not finite (criterion {name_of(rule)}): "
            "are its weights finite? Leave it out with exclude."
        )
    return scores
