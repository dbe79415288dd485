"""In which order channels are removed, and how many of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.channels.families import Channels, Family
from lightning_compress.channels.trials import Trials
from lightning_compress.functional.masks import count_pruned
from lightning_compress.stats.running import call, evaluating

_CLOSE = 0.005  # what a budget may leave unused without a search
_TRIES = 200


@dataclass(frozen=True)
class Limits:
    """What orders channels and bounds how many go; the options of ``lightning_compress.RemoveChannels``.

    Args:
        scope: "layer" or "global".
        per: "channel" or "mac".
        round_to: families keep a multiple of so many channels.
        max_layer_ratio: cap per family.
    """

    scope: str
    per: str
    round_to: int
    max_layer_ratio: float


class RemovalOrder:
    """Channels in the order in which they go.

    Under scope="layer" a channel stands at its rank within its family, ``(rank + 0.5) / C``, so that every beginning of
    the order takes the same share of all families; under scope="global" at its score.

    Args:
        found: channels that may go.
        scores: family name -> scores [channels].
        limits: scope, caps and rounding.
    """

    def __init__(self, found: Channels, scores: Mapping[str, Tensor], limits: Limits) -> None:
        self.found, self.limits = found, limits
        self.orders = {f.name: scores[f.name].argsort(stable=True).numpy() for f in found.families}
        keys, classes, families = [], [], []
        for number, family in enumerate(found.families):
            order = self.orders[family.name]
            size, cap = len(family), self._cap(family)
            if limits.scope == "layer":
                key = (np.arange(size) + 0.5) / size
            else:
                key = scores[family.name].numpy()[order]
                if limits.per == "mac":
                    key = key / max(found.macs([]) - found.macs(family.classes[:1]), 1.0)
            keys.append(key[:cap])
            classes.append(np.array(family.classes, int)[order[:cap]])
            families.append(np.full(cap, number))
        joined = np.concatenate(keys) if keys else np.zeros(0)
        by_key = np.argsort(joined, kind="stable")
        self.classes = np.concatenate(classes)[by_key] if keys else np.zeros(0, int)
        self.families = np.concatenate(families)[by_key] if keys else np.zeros(0, int)

    def by_ratio(self, share: Callable[[Family], float]) -> list[int]:
        """The channels that a ratio takes.

        Args:
            share: family -> share of its channels; the same for all under scope="global".

        Returns:
            Classes.
        """
        families = self.found.families
        if self.limits.scope == "global":
            wanted = count_pruned(share(families[0]), sum(map(len, families))) if families else 0
            return self.first(min(wanted, len(self.classes)))
        gone: list[int] = []
        for family in families:
            gone += self._rounded(family, min(count_pruned(share(family), len(family)), self._cap(family)))
        return gone

    def first(self, count: int) -> list[int]:
        """The first channels of the order; families that must keep a multiple give back the rest.

        Args:
            count: how many of the order.

        Returns:
            Classes.
        """
        numbers, amounts = np.unique(self.families[:count], return_counts=True)
        gone: list[int] = []
        for number, amount in zip(numbers.tolist(), amounts.tolist(), strict=True):
            gone += self._rounded(self.found.families[number], amount)
        return gone

    def by_budget(self, kind: str, share: float, trials: Trials) -> list[int]:
        """As few channels as reach the budget.

        Args:
            kind: "macs", "params" or "latency".
            share: what may be left of it.
            trials: the model, its input, and what makes smaller copies of it.

        Returns:
            Classes.

        Raises:
            ValueError: all that may go do not suffice.
        """

        def left(gone: Sequence[int]) -> float:
            if kind == "macs":
                return self.found.macs(gone) / max(self.found.macs([]), 1.0)
            if kind == "params":
                sizes = trials.parameter_shapes
                return self.found.params(gone, sizes) / max(self.found.params([], sizes), 1)
            return relative_latency(trials.model, trials.small(gone), trials.x)

        low, high = 0, len(self.classes)
        least = left(self.first(high))
        if least > share:
            raise ValueError(
                f"budget=({kind!r}, {share}) cannot be met: without all channels that may go, {least:.3f} are left. "
                f"Raise the share or max_layer_ratio={self.limits.max_layer_ratio}, or widen include."
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if left(self.first(middle)) <= share else (middle + 1, high)
        return self._closer(high, share, left) if kind != "latency" and high else self.first(high)

    def _closer(self, high: int, share: float, left: Callable[[Sequence[int]], float]) -> list[int]:
        """Instead of a last channel that takes far more than is asked for, later ones that take less."""
        enough = self.first(high)
        if self.limits.round_to > 1 or left(enough) > share - _CLOSE:
            return enough
        gone = self.first(high - 1)
        for one in self.classes[high : high + _TRIES].tolist():
            now = left([*gone, one])
            if now > share:
                gone.append(one)
            elif now > left(enough):
                enough = [*gone, one]
        return enough

    def _cap(self, family: Family) -> int:
        return min(int(self.limits.max_layer_ratio * len(family)), len(family) - 1)

    def _rounded(self, family: Family, wanted: int) -> list[int]:
        step, size = self.limits.round_to, len(family)
        kept = min(-(-(size - wanted) // step) * step, size)
        chosen: list[int] = np.array(family.classes)[self.orders[family.name][: size - kept]].tolist()
        return chosen


def relative_latency(first: nn.Module, second: nn.Module, x: Any, rounds: int = 15) -> float:
    """The time of one model as a share of another's, measured in turns.

    Args:
        first: a model.
        second: another one.
        x: one input for both.
        rounds: measurements of each.

    Returns:
        Median of the ratios of neighbouring measurements, second over first.

    Examples:
        >>> relative_latency(nn.Linear(2, 2), nn.Linear(2, 1), torch.ones(1, 2)) > 0
        True
    """
    ratios = []
    with evaluating(first), evaluating(second):
        for turn in range(rounds + 2):
            times = []
            for model in (first, second):
                start = time.perf_counter()
                call(model, x)
                times.append(time.perf_counter() - start)
            if turn >= 2:  # the first ones prepare caches
                ratios.append(times[1] / times[0])
    return statistics.median(ratios)
