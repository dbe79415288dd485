"""Trying out on copies which channels can go."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_compress.channels.check import fault, plan_entries
from lightning_compress.channels.families import Channels, Family
from lightning_compress.channels.surgery import cut
from lightning_compress.channels.watcher import tensors_of


class Trials:
    """Removes channels from copies of a model and looks whether they still work.

    Args:
        model: any module; left as it is.
        x: one input.
        found: its channels.
    """

    def __init__(self, model: nn.Module, x: Any, found: Channels) -> None:
        self.model, self.x, self.found = model, x, found
        self.shapes = {key: tuple(t.shape) for key, t in tensors_of(model).items()}
        self.parameter_shapes = {
            key: tuple(t.shape) for key, t in tensors_of(model).items() if isinstance(t, nn.Parameter)
        }

    def small(self, gone: Sequence[int]) -> nn.Module:
        """A copy without some channels.

        Args:
            gone: their classes.

        Returns:
            The smaller model.
        """
        work = copy.deepcopy(self.model)
        cut(work, plan_entries(self.shapes, self.found.keep(gone), self.found.attributes(gone)))
        return work

    def fault(self, gone: Sequence[int]) -> str:
        """What is wrong with the copy without some channels, or "".

        Args:
            gone: their classes.

        Returns:
            The first fault in words.
        """
        try:
            work = self.small(gone)
        except ValueError as error:
            return str(error)
        return fault(work, self.x, self.found.trace, self.found.keep(gone))

    def conflicts(self, gone: Sequence[int]) -> dict[Family, str]:
        """The families that cannot lose the channels that are to go, found by halving.

        Families whose layers have the same name up to numbers stand and fall together: they run the same code.

        Args:
            gone: classes, of several families.

        Returns:
            Family -> what goes wrong without its channels; the others can lose theirs together.
        """
        lost = set(gone)
        kinds: dict[str, list[Family]] = {}
        for family in self.found.families:
            if lost & set(family.classes):
                kinds.setdefault(re.sub(r"\d+", "#", family.name), []).append(family)
        good: list[int] = []
        bad: dict[Family, str] = {}

        def settle(some: list[list[Family]]) -> None:
            members = [f for kind in some for f in kind]
            going = [c for f in members for c in f.classes if c in lost]
            wrong = self.fault([*good, *going]) if going else ""
            if not wrong:
                good.extend(going)
            elif len(some) > 1:
                settle(some[: len(some) // 2])
                settle(some[len(some) // 2 :])
            else:
                bad.update(dict.fromkeys(members, wrong))

        settle(list(kinds.values()))
        return bad
