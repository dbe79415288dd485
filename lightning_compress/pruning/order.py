"""In which order channels are removed, and how many of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from lightning_compress.channels.families import Channels, Family
from lightning_compress.functional.masks import count_pruned
from lightning_compress.stats.running import call, evaluating

if TYPE_CHECKING:
    from lightning_compress.pruning.channels import RemoveChannels
    from lightning_compress.pruning.trials import Trials

_CLOSE = 0.005  # what a budget may leave unused without a search
_TRIES = 200


class RemovalOrder:
    """Channels in the order in which they go.

    Under scope="layer" a channel stands at its rank within its family, ``(rank + 0.5) / C``, so that every beginning of
    the order takes the same share of all families; under scope="global" at its score.

    Args:
        found: channels that may go.
        scores: family name -> scores [channels].
        options: caps, rounding and scope.
    """

    def __init__(self, found: Channels, scores: Mapping[str, Tensor], options: RemoveChannels) -> None:
        self.found, self.options = found, options
        self.orders = {f.name: scores[f.name].argsort(stable=True).numpy() for f in found.families}
        keys, classes, families = [], [], []
        for number, family in enumerate(found.families):
            order = self.orders[family.name]
            size, cap = len(family), self._cap(family)
            if options.scope == "layer":
                key = (np.arange(size) + 0.5) / size
            else:
                key = scores[family.name].numpy()[order]
                if options.per == "mac":
                    key = key / max(found.macs([]) - found.macs(family.classes[:1]), 1.0)
            keys.append(key[:cap])
            classes.append(np.array(family.classes, int)[order[:cap]])
            families.append(np.full(cap, number))
        joined = np.concatenate(keys) if keys else np.zeros(0)
        by_key = np.argsort(joined, kind="stable")
        self.classes = np.concatenate(classes)[by_key] if keys else np.zeros(0, int)
        self.families = np.concatenate(families)[by_key] if keys else np.zeros(0, int)

    def by_ratio(self) -> list[int]:
        """The channels that the ratio takes.

        Returns:
            Classes.
        """
        if self.options.scope == "global":
            total = sum(len(f) for f in self.found.families)
            share = self.options.ratio
            assert isinstance(share, float | int)
            return self.first(min(count_pruned(share, total), len(self.classes)))
        gone: list[int] = []
        for family in self.found.families:
            wanted = min(count_pruned(self.options.share(family), len(family)), self._cap(family))
            gone += self._rounded(family, wanted)
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
                f"Raise the share or max_layer_ratio={self.options.max_layer_ratio}, or widen include."
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if left(self.first(middle)) <= share else (middle + 1, high)
        return self._closer(high, share, left) if kind != "latency" and high else self.first(high)

    def _closer(self, high: int, share: float, left: Callable[[Sequence[int]], float]) -> list[int]:
        """Instead of a last channel that takes far more than is asked for, later ones that take less."""
        enough = self.first(high)
        if self.options.round_to > 1 or left(enough) > share - _CLOSE:
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
        return min(int(self.options.max_layer_ratio * len(family)), len(family) - 1)

    def _rounded(self, family: Family, wanted: int) -> list[int]:
        step, size = self.options.round_to, len(family)
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
