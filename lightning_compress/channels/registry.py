"""Rules by the names of operations, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from lightning_compress.channels.labels import Ids
from lightning_compress.channels.watcher import Watcher

Rule = Callable[["Watcher", dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def rule_for(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of some operations.

    Args:
        names: of operations of PyTorch, without namespace and without the underscore of those that work in place.

    Returns:
        What registers the function.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def positive(axes: int | Iterable[int] | None, dims: int) -> list[int]:
    """Axes counted from the front; all of them for None."""
    if axes is None:
        return list(range(dims))
    given = [axes] if isinstance(axes, int) else list(axes)
    return [a % dims for a in given] if given and dims else list(range(dims))


def joined(watcher: Watcher, parts: Sequence[Tensor], axis: int, size: int) -> Ids | None:
    """The labels of one axis, counted from the right, of tensors that are broadcast against each other."""
    found = [watcher.of(t)[axis] for t in parts if t.dim() >= -axis and t.shape[axis] == size and size > 1]
    labels = found[0] if found else None
    for other in found[1:]:
        if labels is not None or other is not None:
            labels = watcher.same(labels, other)
    return labels


def agree(watcher: Watcher, a: Ids | None, b: Ids | None, size: int) -> Ids | None:
    """The labels of an axis of this length that two tensors share."""
    return watcher.same(a, b) if size > 1 and (a is not None or b is not None) else None
