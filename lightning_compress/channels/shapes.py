"""Operations that give a tensor another shape, or the same entries under another name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lightning_compress.channels.labels import Ids
from lightning_compress.channels.registry import positive, rule_for
from lightning_compress.channels.watcher import Attribute, Watcher


@rule_for("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "flatten", "unflatten")
def _reshaped(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, turn = a["self"], watcher.turn()
    axes: list[Ids | None] = [None] * result.dim()
    for inside, outside in _blocks(x.shape, result.shape):
        if len(inside) == len(outside) == 1:
            axes[outside[0]] = watcher.of(x)[inside[0]]
            continue
        sizes, made = [x.shape[i] for i in inside], [result.shape[o] for o in outside]
        for position, i in enumerate(inside):
            ids = watcher.of(x)[i]
            if ids is None:
                continue
            form = [-1 if p == position else 1 for p in range(len(inside))]
            spread = np.broadcast_to(ids.reshape(form), sizes).reshape(made)
            _place(watcher, f"{turn}.{i}", spread, outside, axes)
    watcher.set(result, axes)
    for ids in axes:  # sizes in the call may be numbers that the module holds
        if ids is not None:
            watcher.sized(ids)


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Runs of axes with equal numbers of entries, as short as possible."""
    i = o = 0
    while i < len(before) or o < len(after):
        inside, outside = [i] if i < len(before) else [], [o] if o < len(after) else []
        i, o = i + len(inside), o + len(outside)
        left = math.prod(before[k] for k in inside)
        right = math.prod(after[k] for k in outside)
        while left != right:
            if (left < right and i < len(before)) or o >= len(after):
                inside.append(i)
                left *= before[i]
                i += 1
            else:
                outside.append(o)
                right *= after[o]
                o += 1
        yield inside, outside


def _place(watcher: Watcher, key: str, spread: Ids, outside: list[int], axes: list[Ids | None]) -> None:
    """Labels of a reshaped axis; where it is split, one part stays whole."""
    firsts = [np.take(spread, [0], axis=k) for k in range(spread.ndim)]
    varying = [k for k in range(spread.ndim) if (spread != firsts[k]).any()]
    if not varying:
        return
    along = {k: spread[tuple(slice(None) if j == k else 0 for j in range(spread.ndim))] for k in varying}
    moving = varying[0]
    if len(varying) > 1:
        moving, head = _heads(watcher, along)
        if head is not None:
            watcher.attributes.append(head)
        moving = int(watcher.decide(key, str(moving)))
    elif key in watcher.grouped:
        moving = int(watcher.grouped[key])
    if moving not in along:  # of the axis that lost entries one is left: all of them are of that one
        watcher.labels.equal(spread, spread.reshape(-1)[:1])
        return
    if len(varying) > 1:
        form = [-1 if j == moving else 1 for j in range(spread.ndim)]
        watcher.labels.equal(spread, along[moving].reshape(form))
    present = axes[outside[moving]]
    if present is not None:  # two axes in one: neither can lose a channel by itself
        watcher.labels.freeze(present, f"{watcher.here} joins two of its axes")
        watcher.labels.freeze(along[moving], f"{watcher.here} joins two of its axes")
    axes[outside[moving]] = along[moving]


def _heads(watcher: Watcher, along: dict[int, Ids]) -> tuple[int, Attribute | None]:
    """The axis that can lose entries where one is split, and the attribute that counts them if they are heads.

    Code says how many heads there are, or how many features each has, which come last; otherwise it rather says how
    many parts it makes than how long they are.
    """
    *others, last = along
    found = {k: head for k, ids in along.items() if (head := watcher.heads(np.unique(ids)))}
    if watcher.features(len(along[last])) or any(k in found for k in others):
        found.pop(last, None)
        best = max(k for k in found) if found else others[-1]
    elif found:
        best = last
    else:
        best = max(along, key=lambda k: (len(along[k]), len(np.unique(along[k]))))
    return best, found.get(best)


@rule_for("permute", "movedim")
def _permuted(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    given = watcher.of(a["self"])
    watcher.set(result, [given[d % len(given)] for d in a["dims"]])


@rule_for("transpose", "t", "swapaxes")
def _transposed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["self"]))
    if len(axes) > 1:
        first, second = a.get("dim0", 0), a.get("dim1", 1)
        axes[first], axes[second] = axes[second], axes[first]
    watcher.set(result, axes)


@rule_for("squeeze")
def _squeezed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    gone = set(positive(a.get("dim"), x.dim()))
    kept = [ids for i, ids in enumerate(watcher.of(x)) if x.shape[i] != 1 or i not in gone]
    watcher.set(result, kept)


@rule_for("unsqueeze")
def _unsqueezed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["self"]))
    axes.insert(a["dim"] % result.dim(), None)
    watcher.set(result, axes)


@rule_for("alias", "detach", "view_as", "resize", "_nested_view_from_buffer", "set")
def _itself(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"]))


@rule_for("as_strided")
def _strided(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    if result.shape != x.shape:
        watcher.freeze(x, None, f"{watcher.here} reads its memory in another order")
    else:
        watcher.set(result, watcher.of(x))


@rule_for("expand", "expand_as", "_expand_copy")
def _expanded(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    own = [None] * (result.dim() - x.dim()) + list(watcher.of(x))
    sizes = [1] * (result.dim() - x.dim()) + list(x.shape)
    watcher.set(result, [ids if n == m else None for ids, n, m in zip(own, sizes, result.shape, strict=True)])


@rule_for("repeat")
def _repeated(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, repeats = a["self"], a["repeats"]
    own = [None] * (result.dim() - x.dim()) + list(watcher.of(x))
    watcher.set(
        result, [None if ids is None else np.tile(ids, r) for ids, r in zip(own, repeats, strict=True)]
    )


@rule_for("view_as_real")
def _planes(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, [*watcher.of(a["self"]), None])


@rule_for("view_as_complex")
def _complex(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"])[:-1])
