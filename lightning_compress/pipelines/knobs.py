"""How strong a method is, as one number: which of its options is turned, and what a strength in [0, 1] means for it.

A method with a strength is one line of `KNOBS`; a transform of your own is added there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.pruning.patterns import NM, pattern
from lightning_compress.targets import find
from lightning_compress.transform import Transform

_MOST_ZEROS = 0.98
_LAYER_CAP = 0.99  # of the share of zeros of one layer


@dataclass(frozen=True)
class Knob:
    """The option of a transform that sets its strength.

    Args:
        option: name of the field.
        values: (strength in [0, 1], the transform, the model it is applied to) -> option -> value; 0 is the weakest.
        smooth: whether small changes of strength make small changes of size.
        given: whether other options of the transform have decided the strength already.
        when: whether the transform has this knob, and not the next of its row.
    """

    option: str
    values: Callable[[float, Any, nn.Module], dict[str, Any]]
    smooth: bool = False
    given: Callable[[Any], bool] = lambda transform: False
    when: Callable[[Any], bool] = lambda transform: True


def geometric(strength: float, weakest: float, strongest: float) -> float:
    """``weakest (strongest / weakest)^strength``.

    Args:
        strength: in [0, 1].
        weakest: value at 0, > 0.
        strongest: value at 1, > 0.

    Returns:
        The value between them.

    Examples:
        >>> geometric(0.5, 16, 4)
        8.0
    """
    return weakest * math.pow(strongest / weakest, strength)


def mixed(mean: float, sizes: Sequence[int]) -> list[int]:
    """An integer for every weight, so that the mean over all entries is close to a number between two integers.

    Each weight gets ``floor(mean)`` or one more; the largest are the first to get less, as far as they fit into the
    share of entries that do.

    Args:
        mean: such as bits per entry.
        sizes: entries of each weight.

    Returns:
        The integer of each weight.

    Examples:
        >>> mixed(3.5, [10, 60, 30])
        [3, 4, 3]
        >>> mixed(4.0, [10, 60])
        [4, 4]
    """
    low = math.floor(mean)
    room = (1 - (mean - low)) * sum(sizes)
    widths = [low + 1] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[i] <= room + 1e-6:
            widths[i] = low
            room -= sizes[i]
    return widths


def _prune(strength: float, transform: Any, model: nn.Module) -> dict[str, Any]:
    """Cubic: without retraining, zeros hurt before rounding does. Of no layer all goes, unless somebody allowed it."""
    cap = transform.max_layer_sparsity
    values = {"sparsity": _MOST_ZEROS * strength**3 * cap}
    return values if cap < 1 or transform.scope != "global" else values | {"max_layer_sparsity": _LAYER_CAP}


def _table(
    option: str, weakest: float, strongest: float
) -> Callable[[float, Any, nn.Module], dict[str, Any]]:
    """An integer option as a mapping, so that its mean is a number between two integers."""

    def values(strength: float, transform: Any, model: nn.Module) -> dict[str, Any]:
        mean = geometric(strength, weakest, strongest)
        found = find(model, transform.include, transform.exclude)
        targets = [
            t for t in found if bool(t.weight.detach().any())
        ]  # zeros alone have nothing to be named for
        if not targets:
            return {option: round(mean)}
        numbers = mixed(mean, [t.weight.numel() * (2 if t.weight.is_complex() else 1) for t in targets])
        return {option: {t.key: number for t, number in zip(targets, numbers, strict=True)}}

    return values


def _any(*options: str) -> Callable[[Any], bool]:
    """Whether one of these options has another value than its default."""
    return lambda transform: any(getattr(transform, o) != getattr(type(transform)(), o) for o in options)


def _is(option: str, *values: Any) -> Callable[[Any], bool]:
    """Whether an option has one of these values."""
    return lambda transform: getattr(transform, option) in values


KNOBS: dict[str, tuple[Knob, ...]] = {
    "Prune": (
        Knob(
            "sparsity", _prune, True, lambda t: t.threshold is not None or isinstance(pattern(t.pattern), NM)
        ),
    ),
    "Quantize": (Knob("bits", _table("bits", 16, 2), given=lambda t: t.format not in ("int", "log2")),),
    "RateDistortionQuantize": (
        Knob("step", lambda s, *_: {"step": geometric(s, 1 / 1024, 8)}, True, _any("bits")),
    ),
    "ShareWeights": (
        Knob(
            "ratio",
            lambda s, *_: {"ratio": geometric(s, 0.5, 0.002)},
            when=_is("strategy", "hash", "adaptive"),
        ),
        Knob(
            "clusters",
            lambda s, *_: {"clusters": round(geometric(s, 1024, 2))},
            when=lambda t: t.scope == "global" or t.strategy == "bloom",
        ),
        Knob("clusters", _table("clusters", 1024, 2)),
    ),
    "Factorize": (
        Knob(
            "rank_ratio",
            lambda s, *_: {"rank_ratio": 1 - 0.98 * s},
            given=_any("energy_ratio", "params_ratio", "rank", "budget"),
        ),
    ),
    "RemoveChannels": (
        Knob("ratio", lambda s, t, _: {"ratio": 0.98 * s * t.max_layer_ratio}, given=_any("budget")),
    ),
    "DropLayers": (Knob("ratio", lambda s, *_: {"ratio": 0.5 * s}, given=_any("count", "layers")),),
    "TruncateModes": (
        Knob("keep_ratio", lambda s, *_: {"keep_ratio": 1 - 0.9 * s}, given=_any("modes", "energy_ratio")),
    ),
}


def knob_of(transform: Transform) -> Knob | None:
    """The knob of a transform, whether it is free or not.

    Args:
        transform: a method.

    Returns:
        The knob; None if the method has no strength.

    Examples:
        >>> from lightning_compress.pipelines.knobs import knob_of
        >>> knob_of(Prune()).option, knob_of(FuseBatchNorm())
        ('sparsity', None)
    """
    return next((knob for knob in KNOBS.get(type(transform).__name__, ()) if knob.when(transform)), None)


def free_knob(transform: Transform, fixed: Collection[str] = ()) -> Knob | None:
    """The knob of a transform, unless it is fixed.

    Args:
        transform: a method.
        fixed: what is held: names of options ("bits", or "Quantize.bits").

    Returns:
        The knob; None if there is none, if its option is among ``fixed``, or if other options decide the strength.

    Examples:
        >>> from lightning_compress.pipelines.knobs import free_knob
        >>> free_knob(Prune()).option, free_knob(Prune(), ["sparsity"]), free_knob(FuseBatchNorm())
        ('sparsity', None, None)
    """
    name, knob = type(transform).__name__, knob_of(transform)
    if knob is None or knob.option in fixed or f"{name}.{knob.option}" in fixed or knob.given(transform):
        return None
    return knob


def turned(transform: Transform, knob: Knob, strength: float, model: nn.Module) -> Transform:
    """The transform at a strength.

    Args:
        transform: a method.
        knob: its knob.
        strength: in [0, 1].
        model: the model it is about to be applied to.

    Returns:
        A copy with other values of the knob's option, and of what goes with it.

    Examples:
        >>> from lightning_compress.pipelines.knobs import knob_of, turned
        >>> turned(Prune(), knob_of(Prune()), 0.5, nn.Linear(2, 2)).sparsity
        0.1225
    """
    values = knob.values(strength, transform, model)
    return dataclasses.replace(transform, **values)  # type: ignore[type-var]
