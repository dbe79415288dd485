"""What every tensor operation does to the labels of channels.

A rule gets the watcher, the arguments by their names, and the result. Operations on each entry by itself need none of
their own: PyTorch tags them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.channels.labels import Ids
from lightning_compress.cost import fft_macs

if TYPE_CHECKING:
    from lightning_compress.channels.trace import Attribute, Watcher

Rule = Callable[["Watcher", dict[str, Any], Any], None]
_RULES: dict[str, Rule] = {}


def rule_of(operation: Any) -> Rule | None:
    """The rule of an operation of PyTorch, or None.

    Args:
        operation: what ``__torch_dispatch__`` gets.

    Returns:
        The rule.
    """
    name = operation._schema.name.removeprefix("aten::")
    plain = name.removesuffix("_") if not name.endswith("__") else name
    if plain in _RULES:
        return _RULES[plain]
    return _entrywise if torch.Tag.pointwise in operation.tags else None


def _for(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _positive(axes: int | Iterable[int] | None, dims: int) -> list[int]:
    if axes is None:
        return list(range(dims))
    given = [axes] if isinstance(axes, int) else list(axes)
    return [a % dims for a in given] if given and dims else list(range(dims))


# -- entry by entry --------------------------------------------------------------------------------------------


@_for(
    "where", "copy", "masked_fill", "clone", "_to_copy", "contiguous", "lift_fresh", "dropout", "native_dropout",
    "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "leaky_relu", "softplus", "_prelu_kernel",
    "relu6", "mish", "log_sigmoid_forward", "threshold", "complex", "polar", "fill", "lerp", "addcmul", "_conj",
    "real", "imag", "resolve_conj", "resolve_neg", "_conj_physical", "conj_physical", "bernoulli", "normal", "uniform",
    "exponential", "cauchy", "geometric", "log_normal", "random", "zero", "rsub", "floor_divide", "rrelu_with_noise",
)  # fmt: skip
def _entrywise(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    out = result if isinstance(result, Tensor) else result[0]
    parts = [t for t in tree_leaves(a) if isinstance(t, Tensor) and t.dim()]
    axes = [_joined(watcher, parts, axis - out.dim(), n) for axis, n in enumerate(out.shape)]
    for tensor in [out] if isinstance(result, Tensor) else [t for t in result if t.shape == out.shape]:
        watcher.set(tensor, axes)


@_for("mul")
def _multiplied(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    _entrywise(watcher, a, result)
    pair = [a["self"], a["other"]]
    if all(isinstance(t, Tensor) and t.is_complex() for t in pair) and any(map(watcher.holds, pair)):
        axes = watcher.of(result)  # a spectral layer without sums over channels
        watcher.multiplies(
            4 * math.prod(n for n, ids in zip(result.shape, axes, strict=True) if ids is None), *axes
        )


def _joined(watcher: Watcher, parts: Sequence[Tensor], axis: int, size: int) -> Ids | None:
    """The labels of one axis, counted from the right, of tensors that are broadcast against each other."""
    found = [watcher.of(t)[axis] for t in parts if t.dim() >= -axis and t.shape[axis] == size and size > 1]
    labels = found[0] if found else None
    for other in found[1:]:
        if labels is not None or other is not None:
            labels = watcher.same(labels, other)
    return labels


@_for("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "_like")
def _alike(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"]))


@_for(
    "zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
    "scalar_tensor", "empty_strided", "new_empty_strided", "randint", "lift",
)  # fmt: skip
def _made(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    """New tensors whose entries are alike have the sizes that code gives them, which may follow; a trial tells."""
    axes = [watcher.labels.new(n) if n > 1 else None for n in result.shape]
    for ids in axes:
        if ids is not None:
            watcher.sized(ids, hint="out")
    watcher.set(result, axes)


@_for(
    "arange",
    "linspace",
    "logspace",
    "eye",
    "randperm",
    "fft_fftfreq",
    "fft_rfftfreq",
    "tril_indices",
    "triu_indices",
)
def _numbered(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    """Entries that tell their index: what meets them stays."""
    watcher.set(result, [None] * result.dim())


# -- shapes ----------------------------------------------------------------------------------------------------


@_for("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "flatten", "unflatten")
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
        watcher.splits.append(np.unique(spread))
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


@_for("permute", "movedim")
def _permuted(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    given = watcher.of(a["self"])
    watcher.set(result, [given[d % len(given)] for d in a["dims"]])


@_for("transpose", "t", "swapaxes")
def _transposed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["self"]))
    if len(axes) > 1:
        first, second = a.get("dim0", 0), a.get("dim1", 1)
        axes[first], axes[second] = axes[second], axes[first]
    watcher.set(result, axes)


@_for("squeeze")
def _squeezed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    gone = set(_positive(a.get("dim"), x.dim()))
    kept = [ids for i, ids in enumerate(watcher.of(x)) if x.shape[i] != 1 or i not in gone]
    watcher.set(result, kept)


@_for("unsqueeze")
def _unsqueezed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["self"]))
    axes.insert(a["dim"] % result.dim(), None)
    watcher.set(result, axes)


@_for("alias", "detach", "view_as", "resize", "_nested_view_from_buffer", "set")
def _itself(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"]))


@_for("as_strided")
def _strided(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    if result.shape != x.shape:
        watcher.freeze(x, None, f"{watcher.here} reads its memory in another order")
    else:
        watcher.set(result, watcher.of(x))


@_for("expand", "expand_as", "_expand_copy")
def _expanded(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    own = [None] * (result.dim() - x.dim()) + list(watcher.of(x))
    sizes = [1] * (result.dim() - x.dim()) + list(x.shape)
    watcher.set(result, [ids if n == m else None for ids, n, m in zip(own, sizes, result.shape, strict=True)])


@_for("repeat")
def _repeated(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, repeats = a["self"], a["repeats"]
    own = [None] * (result.dim() - x.dim()) + list(watcher.of(x))
    watcher.set(
        result, [None if ids is None else np.tile(ids, r) for ids, r in zip(own, repeats, strict=True)]
    )


@_for("view_as_real")
def _planes(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, [*watcher.of(a["self"]), None])


@_for("view_as_complex")
def _complex(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"])[:-1])


# -- parts and wholes ------------------------------------------------------------------------------------------


@_for("select")
def _selected(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dim"] % x.dim()
    watcher.freeze(x, [axis], f"{watcher.here} takes one of its entries by number")
    watcher.set(result, [ids for i, ids in enumerate(watcher.of(x)) if i != axis])


@_for("slice")
def _sliced(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dim"] % x.dim()
    axes = list(watcher.of(x))
    ids = axes[axis]
    if ids is not None and result.shape[axis] != x.shape[axis]:
        watcher.freeze(x, [axis], f"{watcher.here} takes a range of its entries by number")
        axes[axis] = ids[slice(a["start"], a["end"], a["step"])]
    watcher.set(result, axes)


@_for(
    "split",
    "split_with_sizes",
    "chunk",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
    "tensor_split",
)
def _split(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dim"] % x.dim()
    ids = watcher.of(x)[axis]
    sizes = [part.shape[axis] for part in result]
    unit = math.gcd(*sizes)
    if ids is not None and len(sizes) > 1:
        if unit > 1:  # every part loses the same channels
            rows = ids.reshape(-1, unit)
            watcher.labels.equal(rows[:1], rows)
            watcher.splits.append(rows[0])
            if len(rows) == len(sizes):
                watcher.sized(rows[0], hint="split")
        else:
            watcher.labels.freeze(ids, f"{watcher.here} splits it into parts of {sizes}")
    start = 0
    for part, size in zip(result, sizes, strict=True):
        axes = list(watcher.of(x))
        axes[axis] = None if ids is None else ids[start : start + size]
        watcher.set(part, axes)
        start += size


@_for("glu")
def _gated(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, axis = a["self"], a["dim"] % a["self"].dim()
    axes = list(watcher.of(x))
    ids = axes[axis]
    if ids is not None:
        rows = ids.reshape(2, -1)
        watcher.labels.equal(rows[0], rows[1])
        watcher.splits.append(rows[0])
        axes[axis] = rows[0]
    watcher.set(result, axes)


@_for("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im")
def _moved_into_space(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    """So many neighbouring channels become positions of one, or the positions of one become channels."""
    x = a["self"]
    inside, outside = (
        -2 if "output_size" in a else -3,
        -2 if "kernel_size" in a and "output_size" not in a else -3,
    )
    watcher.freeze(x, range(x.dim() + inside + 1, x.dim()), f"{watcher.here} moves over it")
    axes: list[Ids | None] = [None] * result.dim()
    if result.dim() + outside > 0:
        axes[: result.dim() + outside] = watcher.of(x)[: x.dim() + inside]
    ids, before, after = watcher.of(x)[inside], x.shape[inside], result.shape[outside]
    if ids is not None and after > before:
        axes[outside] = np.repeat(ids, after // before)
    elif ids is not None:
        rows = ids.reshape(after, -1)
        watcher.labels.equal(rows[:, :1], rows)
        watcher.splits.append(rows[:, 0])
        axes[outside] = rows[:, 0]
    watcher.set(result, axes)


@_for("channel_shuffle", "native_channel_shuffle")
def _interleaved(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["self"]))
    if axes[1] is not None:
        rows = axes[1].reshape(a["groups"], -1)
        watcher.labels.equal(rows[:1], rows)
        watcher.splits.append(rows[0])
        axes[1] = rows.T.reshape(-1)
    watcher.set(result, axes)


@_for("repeat_interleave")
def _repeated_each(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, times, axis = a.get("self"), a["repeats"], a.get("dim")
    if isinstance(times, Tensor) or x is None or axis is None:
        for tensor in (t for t in (x, times) if isinstance(t, Tensor)):
            watcher.freeze(tensor, None, f"{watcher.here} repeats its entries")
        return
    axes = list(watcher.of(x))
    ids = axes[axis]
    axes[axis] = None if ids is None else np.repeat(ids, times)
    watcher.set(result, axes)


@_for("unbind")
def _unbound(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dim"] % x.dim()
    watcher.freeze(x, [axis], f"{watcher.here} takes its entries one by one")
    for part in result:
        watcher.set(part, [ids for i, ids in enumerate(watcher.of(x)) if i != axis])


@_for("cat", "concat")
def _concatenated(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    parts = [t for t in a["tensors"] if t.dim() == result.dim()]
    along = a["dim"] % result.dim()
    axes: list[Ids | None] = []
    for axis in range(result.dim()):
        if axis != along:
            axes.append(_joined(watcher, parts, axis - result.dim(), result.shape[axis]))
            continue
        own = [watcher.of(t)[axis] for t in parts]
        if all(ids is None for ids in own):
            axes.append(None)
            continue
        for i, part in enumerate(parts):
            if own[i] is None:
                own[i] = watcher.labels.new(part.shape[axis])
                watcher.labels.freeze(own[i], f"{watcher.here} joins it with values of fixed size")  # type: ignore[arg-type]
        axes.append(np.concatenate(own))  # type: ignore[arg-type]
    watcher.set(result, axes)


@_for("stack")
def _stacked(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    first = a["tensors"][0]
    axes = [_joined(watcher, a["tensors"], axis - first.dim(), n) for axis, n in enumerate(first.shape)]
    axes.insert(a["dim"] % result.dim(), None)
    watcher.set(result, axes)


@_for("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")  # fmt: skip
def _padded(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, pad = a["self"], list(a["pad"] if "pad" in a else a["padding"])
    axes = list(watcher.of(x))
    for k in range(len(pad) // 2):
        axis, (before, after) = x.dim() - 1 - k, pad[2 * k : 2 * k + 2]
        ids = axes[axis]
        if ids is None or (before == 0 and after == 0):
            continue
        new = [watcher.labels.new(max(n, 0)) for n in (before, after)]
        for added in new:
            if len(added) and not watcher.sized(added):
                watcher.labels.freeze(added, f"{watcher.here} adds {len(added)} zero channels by number")
        kept = ids[max(-before, 0) : len(ids) - max(-after, 0)]
        if len(kept) < len(ids):
            watcher.freeze(x, [axis], f"{watcher.here} cuts off channels by number")
        axes[axis] = np.concatenate([new[0], kept, new[1]])
    watcher.set(result, axes)


@_for("unfold")
def _windowed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dimension"] % x.dim()
    watcher.freeze(x, [axis], f"{watcher.here} moves over it")
    watcher.set(result, [*(None if i == axis else ids for i, ids in enumerate(watcher.of(x))), None])


@_for("index", "_unsafe_index")
def _indexed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, indices = a["self"], list(a["indices"])
    used = [i for i, index in enumerate(indices) if index is not None]
    taken = sum(t.dim() if t.dtype == torch.bool else 1 for t in (indices[i] for i in used))
    if any(indices[i].dtype == torch.bool for i in used) and taken != len(used):
        watcher.freeze(x, None, f"{watcher.here} indexes it with a mask")
        return
    watcher.freeze(x, used, f"{watcher.here} takes entries by number")
    own = list(watcher.of(x))
    made: list[Ids | None] = [None] * (result.dim() - (x.dim() - len(used)))
    consecutive = used == list(range(used[0], used[-1] + 1))
    if consecutive:
        watcher.set(result, [*own[: used[0]], *made, *own[used[-1] + 1 :]])
    else:
        watcher.set(result, [*made, *(ids for i, ids in enumerate(own) if i not in used)])


@_for("index_put", "_index_put_impl", "_unsafe_index_put")
def _put(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, values = a["self"], a["values"]
    used = [i for i, index in enumerate(a["indices"]) if index is not None]
    watcher.freeze(x, used, f"{watcher.here} writes entries by number")
    kept = [ids for i, ids in enumerate(watcher.of(x)) if i not in used]
    for back, ids in enumerate(reversed(kept), start=1):  # untouched axes stand last, except between indices
        if used and used == list(range(len(used))) and values.dim() >= back and values.shape[-back] > 1:
            watcher.same(ids, watcher.of(values)[-back]) if ids is not None else None
        else:
            watcher.freeze(values, None, f"{watcher.here} writes it by number")
    watcher.set(result, watcher.of(x))


@_for("index_select", "embedding", "_embedding_bag", "_embedding_bag_forward_only")
def _looked_up(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    if not isinstance(result, Tensor):  # sums of entries
        x, axis, made, result = a["weight"], 0, [None], result[0]
    elif "weight" in a:
        x, axis, made = a["weight"], 0, [None] * a["indices"].dim()
    else:
        x, axis, made = a["self"], a["dim"] % a["self"].dim(), [None]
    watcher.freeze(x, [axis], f"{watcher.here} takes entries by number")
    own = watcher.of(x)
    watcher.set(result, [*own[:axis], *made, *own[axis + 1 :]])
    if "weight" in a:
        watcher.counts("embedding_dim", own[1])


@_for("roll", "flip", "cumsum", "cumprod", "sort", "tril", "triu", "cummax", "cummin", "fft_fftshift")
def _ordered(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    """The order of entries along some axes matters: those stay."""
    x = a["self"]
    axes = (
        a.get("dims", a.get("dim")) if a.get("dims", a.get("dim")) is not None else [x.dim() - 2, x.dim() - 1]
    )
    watcher.freeze(x, _positive(axes, x.dim()), f"{watcher.here} uses the order of its entries")
    for out in [result] if isinstance(result, Tensor) else result:
        watcher.set(out, watcher.of(x))


@_for("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _transformed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axes = _positive(a["dim"], x.dim())
    watcher.freeze(x, axes, f"{watcher.here} takes the Fourier transform along it")
    left = [None if i in axes else ids for i, ids in enumerate(watcher.of(x))]
    watcher.set(result, left)
    signal = result if x.is_complex() and not result.is_complex() else x
    macs = fft_macs(5.0 if x.is_complex() and result.is_complex() else 2.5, signal, axes)
    watcher.multiplies(macs / math.prod(len(ids) for ids in left if ids is not None), *left)


# -- reductions ------------------------------------------------------------------------------------------------


@_for(
    "mean", "sum", "amax", "amin", "nansum", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "any",
    "all", "max", "min", "var_mean", "std_mean", "aminmax", "median", "nanmedian", "count_nonzero",
)  # fmt: skip
def _reduced(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    if isinstance(a.get("other"), Tensor):
        return _entrywise(watcher, a, result)
    x = a["self"]
    gone = set(_positive(a.get("dim"), x.dim()))
    own = watcher.of(x)
    for out in [result] if isinstance(result, Tensor) else result:
        if out.dim() == x.dim():
            watcher.set(out, [None if i in gone else ids for i, ids in enumerate(own)])
        else:
            watcher.set(out, [ids for i, ids in enumerate(own) if i not in gone])


@_for("argmax", "argmin", "topk", "unique_dim")
def _chosen(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.freeze(a["self"], None, f"{watcher.here} numbers its entries")


@_for("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "logcumsumexp")
def _normalized(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"]))


# -- products --------------------------------------------------------------------------------------------------


@_for("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "matmul", "linear")
def _product(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    linear = "weight" in a
    if linear:
        x, y = a["input"], a["weight"]
    else:
        x = next(a[k] for k in ("mat1", "batch1", "mat", "self") if isinstance(a.get(k), Tensor))
        y = next(
            a[k] for k in ("mat2", "batch2", "vec2", "vec", "tensor", "other") if isinstance(a.get(k), Tensor)
        )
    one, two = list(watcher.of(x)), list(watcher.of(y))
    if linear and y.dim() == 2:
        two = two[::-1]
    if x.dim() > 2 or y.dim() > 2:
        lead = max(x.dim(), y.dim()) - 2
        batch = [
            _joined(watcher, [t for t in (x, y) if t.dim() > 2], i - lead - 2, result.shape[i])
            for i in range(lead)
        ]
    else:
        batch = []
    rows = one[-2] if x.dim() > 1 else None
    columns = two[-1] if y.dim() > 1 else None
    inner = _agree(watcher, one[-1], two[-2] if y.dim() > 1 else two[0], x.shape[-1])
    axes = [*batch, *([rows] if x.dim() > 1 else []), *([columns] if y.dim() > 1 else [])]
    watcher.set(result, axes)
    bias = (
        a.get("bias")
        if linear
        else a.get("self")
        if ("mat1" in a or "batch1" in a or ("vec" in a and "mat" in a))
        else None
    )
    if isinstance(bias, Tensor) and bias is not x:
        for back in range(1, min(bias.dim(), result.dim()) + 1):
            if bias.shape[-back] > 1 and (watcher.of(bias)[-back] is not None or axes[-back] is not None):
                watcher.same(axes[-back], watcher.of(bias)[-back])
    fixed = [n for n, ids in zip((*result.shape, x.shape[-1]), (*axes, inner), strict=True) if ids is None]
    watcher.multiplies(math.prod(fixed) * (4 if x.is_complex() else 1), *axes, inner)
    watcher.counts("in_features", inner)
    watcher.counts("out_features", columns)


@_for("_trilinear")
def _bilinear(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    """A product of three tensors, each with new axes, summed over some."""
    factors = []
    for number in "123":
        axes, new = list(watcher.of(a[f"i{number}"])), sorted(a[f"expand{number}"])
        for axis in new:
            axes.insert(axis, None)
        sizes = list(a[f"i{number}"].shape)
        for axis in new:
            sizes.insert(axis, 1)
        factors.append((axes, sizes))
    axes, constant = [], 1
    for axis in range(len(factors[0][1])):
        own = [(labels[axis], sizes[axis]) for labels, sizes in factors if sizes[axis] > 1]
        ids = own[0][0] if own else None
        for other, _ in own[1:]:
            ids = _agree(watcher, ids, other, 2)
        constant *= own[0][1] if own and ids is None else 1
        axes.append(ids)
    watcher.multiplies(constant, *axes)
    for name, axis in zip(("out_features", "in1_features", "in2_features"), range(1, 4), strict=False):
        watcher.counts(name, axes[axis] if len(axes) == 4 else None)
    watcher.set(result, [ids for axis, ids in enumerate(axes) if axis not in a["sumdim"]])


@_for("_cdist_forward")
def _distances(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, y = a["x1"], a["x2"]
    _agree(watcher, watcher.of(x)[-1], watcher.of(y)[-1], x.shape[-1])
    lead = [_joined(watcher, [x, y], i - result.dim(), n) for i, n in enumerate(result.shape[:-2])]
    watcher.set(result, [*lead, watcher.of(x)[-2], watcher.of(y)[-2]])


@_for("_weight_norm_interface")
def _weight_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["v"]))
    axes[a["dim"]] = _agree(watcher, axes[a["dim"]], watcher.of(a["g"])[a["dim"]], a["v"].shape[a["dim"]])
    watcher.set(result[0], axes)


def _agree(watcher: Watcher, a: Ids | None, b: Ids | None, size: int) -> Ids | None:
    return watcher.same(a, b) if size > 1 and (a is not None or b is not None) else None


@_for("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution")
def _convolved(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, weight, groups = a["input"], a["weight"], a["groups"]
    transposed = bool(a.get("transposed"))
    batched = x.dim() == weight.dim()
    channels = 1 if batched else 0
    into = watcher.of(x)[channels]
    kernel = range(2, weight.dim())
    watcher.freeze(weight, list(kernel), "it is an axis of the kernel")
    first, second = watcher.of(weight)[:2]
    if groups == 1 and (watcher.name_of(weight) or "") not in watcher.grouped:
        out, inner = (second, first) if transposed else (first, second)
        into = _agree(watcher, into, inner, x.shape[channels])
        summed = into
    else:
        out, into, summed = _grouped(watcher, weight, into, x.shape[channels], groups, transposed)
    if isinstance(a["bias"], Tensor):
        out = _agree(watcher, out, watcher.of(a["bias"])[0], result.shape[channels])
    axes: list[Ids | None] = [None] * result.dim()
    axes[channels] = out
    if batched and watcher.of(x)[0] is not None:
        axes[0] = watcher.of(x)[0]
    watcher.freeze(x, range(channels + 1, x.dim()), f"{watcher.here} moves over it")
    watcher.set(result, axes)
    if transposed:
        positions = math.prod(x.shape[channels + 1 :]) * (x.shape[0] if batched else 1)
    else:
        positions = math.prod(result.shape) // result.shape[channels]
    per = weight.shape[1] if not transposed else weight.shape[0] // groups
    constant = positions * math.prod(weight.shape[2:])
    constant *= (1 if out is not None else result.shape[channels]) * (1 if summed is not None else per)
    watcher.multiplies(constant, out, summed)
    watcher.counts("in_channels", into)
    watcher.counts("out_channels", out)


def _grouped(
    watcher: Watcher, weight: Tensor, into: Ids | None, channels: int, groups: int, transposed: bool
) -> tuple[Ids | None, Ids | None, Ids | None]:
    """Labels of outputs, inputs and the inputs that each output sums over, of a convolution in groups."""
    first, second = watcher.of(weight)[:2]
    key = watcher.name_of(weight) or watcher.turn()
    width = channels // groups
    made = weight.shape[1] if transposed else weight.shape[0] // groups
    mode = watcher.decide(key, "groups" if groups >= max(width, made) else "positions")
    entries = into if into is not None else watcher.labels.new(channels)
    if into is None:
        watcher.labels.freeze(entries, f"{watcher.here} joins it with a tensor of fixed size")
    inside = entries.reshape(groups, width)
    if transposed:  # the weight is [inputs, outputs of a group, ..]
        if first is not None:
            watcher.labels.equal(first, entries)
        if mode == "groups":
            if second is not None:
                watcher.labels.freeze(second, "whole groups go")
            watcher.labels.equal(inside[:, :1], inside)
            watcher.counts("groups", inside[:, 0])
            return np.repeat(inside[:, 0], made), entries, None
        watcher.labels.equal(inside[:1], inside)
        return (None if second is None else np.tile(second, groups)), entries, inside[0]
    outside = first.reshape(groups, made) if first is not None else None
    if mode == "groups":
        if second is not None:
            watcher.labels.freeze(second, "whole groups go")
        watcher.labels.equal(inside[:, :1], inside)
        if outside is not None:
            watcher.labels.equal(inside[:, :1], outside)
        watcher.counts("groups", inside[:, 0])
        return first, entries, None
    watcher.labels.equal(inside[:1], inside)
    if second is not None:
        watcher.labels.equal(inside[0], second)
    elif width == 1:
        watcher.labels.freeze(entries, "whole groups go")
    if outside is not None:
        watcher.labels.equal(outside[:1], outside)
    return first, entries, second


@_for(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def _attended(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    q, k, v = a["query"], a["key"], a["value"]
    out = result if isinstance(result, Tensor) else result[0]
    axes = [_joined(watcher, [q, k, v], axis - q.dim(), n) for axis, n in enumerate(out.shape[:-2])]
    for part in (k, v):  # several heads of queries may share one of keys
        few, many = watcher.of(part)[-3] if part.dim() > 2 else None, axes[-1] if axes else None
        if few is not None and many is not None and len(few) < len(many):
            watcher.labels.equal(np.repeat(few, len(many) // len(few)), many)
    depth = _agree(watcher, watcher.of(q)[-1], watcher.of(k)[-1], q.shape[-1])
    watcher.freeze(k, [k.dim() - 2], f"{watcher.here} attends over it")
    watcher.set(out, [*axes, watcher.of(q)[-2], watcher.of(v)[-1]])
    fixed = math.prod(n for n, ids in zip(out.shape[:-2], axes, strict=True) if ids is None)
    pairs = fixed * q.shape[-2] * k.shape[-2]
    watcher.multiplies(pairs * (1 if depth is not None else q.shape[-1]), *axes, depth)
    value = watcher.of(v)[-1]
    watcher.multiplies(pairs * (1 if value is not None else v.shape[-1]), *axes, value)


# -- normalization, pooling ------------------------------------------------------------------------------------


@_for(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
    "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
    "_batch_norm_impl_index",
)  # fmt: skip
def _batch_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["input"]
    axes = list(watcher.of(x))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(name), Tensor):
            axes[1] = _agree(watcher, axes[1], watcher.of(a[name])[0], x.shape[1])
    watcher.set(result if isinstance(result, Tensor) else result[0], axes)
    watcher.counts("num_features", axes[1])


@_for("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, shape = a["input"], a["normalized_shape"]
    axes = list(watcher.of(x))
    for back in range(1, len(shape) + 1):
        for name in ("weight", "bias"):
            if isinstance(a.get(name), Tensor):
                axes[-back] = _agree(watcher, axes[-back], watcher.of(a[name])[-back], x.shape[-back])
        watcher.counts("normalized_shape", axes[-back], len(shape) - back)
    watcher.set(result if isinstance(result, Tensor) else result[0], axes)


@_for("native_group_norm", "group_norm")
def _group_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, groups = a["input"], int(a["group"] if "group" in a else a["num_groups"])
    axes, turn = list(watcher.of(x)), watcher.turn()
    for name in ("weight", "bias"):
        if isinstance(a.get(name), Tensor):
            axes[1] = _agree(watcher, axes[1], watcher.of(a[name])[0], x.shape[1])
    if axes[1] is not None and groups > 1:
        rows = axes[1].reshape(groups, -1)
        if watcher.decide(turn, "groups" if groups >= rows.shape[1] else "positions") == "groups":
            watcher.labels.equal(rows[:, :1], rows)
            watcher.counts("num_groups", rows[:, 0])
        else:
            watcher.labels.equal(rows[:1], rows)
        watcher.splits.append(axes[1])
    watcher.set(result if isinstance(result, Tensor) else result[0], axes)
    watcher.counts("num_channels", axes[1])


@_for(
    "max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "max_pool2d", "max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "upsample_linear1d",
    "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "mkldnn_max_pool2d", "grid_sampler_3d",
    "max_unpool2d", "max_unpool3d", "fractional_max_pool2d", "fractional_max_pool3d",
)  # fmt: skip
def _pooled(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"] if "self" in a else a["input"]
    out = result if isinstance(result, Tensor) else result[0]
    changed = [i for i in range(x.dim()) if i >= x.dim() - 1 or out.shape[i] != x.shape[i]]
    watcher.freeze(x, changed, f"{watcher.here} moves over it")
    axes = [None if i in changed else ids for i, ids in enumerate(watcher.of(x))]
    for tensor in [result] if isinstance(result, Tensor) else result:
        watcher.set(tensor, axes)
