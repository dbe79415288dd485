"""Operations that take parts of tensors, put them together, or use the order of entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.channels.labels import Ids
from lightning_compress.channels.registry import joined, positive, rule_for
from lightning_compress.channels.watcher import Watcher
from lightning_compress.cost import fft_macs


@rule_for("select")
def _selected(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dim"] % x.dim()
    watcher.freeze(x, [axis], f"{watcher.here} takes one of its entries by number")
    watcher.set(result, [ids for i, ids in enumerate(watcher.of(x)) if i != axis])


@rule_for("slice")
def _sliced(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dim"] % x.dim()
    axes = list(watcher.of(x))
    ids = axes[axis]
    if ids is not None and result.shape[axis] != x.shape[axis]:
        watcher.freeze(x, [axis], f"{watcher.here} takes a range of its entries by number")
        axes[axis] = ids[slice(a["start"], a["end"], a["step"])]
    watcher.set(result, axes)


@rule_for(
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


@rule_for("glu")
def _gated(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, axis = a["self"], a["dim"] % a["self"].dim()
    axes = list(watcher.of(x))
    ids = axes[axis]
    if ids is not None:
        rows = ids.reshape(2, -1)
        watcher.labels.equal(rows[0], rows[1])
        axes[axis] = rows[0]
    watcher.set(result, axes)


@rule_for("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im")
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
        axes[outside] = rows[:, 0]
    watcher.set(result, axes)


@rule_for("channel_shuffle", "native_channel_shuffle")
def _interleaved(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["self"]))
    if axes[1] is not None:
        rows = axes[1].reshape(a["groups"], -1)
        watcher.labels.equal(rows[:1], rows)
        axes[1] = rows.T.reshape(-1)
    watcher.set(result, axes)


@rule_for("repeat_interleave")
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


@rule_for("unbind")
def _unbound(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dim"] % x.dim()
    watcher.freeze(x, [axis], f"{watcher.here} takes its entries one by one")
    for part in result:
        watcher.set(part, [ids for i, ids in enumerate(watcher.of(x)) if i != axis])


@rule_for("cat", "concat")
def _concatenated(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    parts = [t for t in a["tensors"] if t.dim() == result.dim()]
    along = a["dim"] % result.dim()
    axes: list[Ids | None] = []
    for axis in range(result.dim()):
        if axis != along:
            axes.append(joined(watcher, parts, axis - result.dim(), result.shape[axis]))
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


@rule_for("stack")
def _stacked(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    first = a["tensors"][0]
    axes = [joined(watcher, a["tensors"], axis - first.dim(), n) for axis, n in enumerate(first.shape)]
    axes.insert(a["dim"] % result.dim(), None)
    watcher.set(result, axes)


@rule_for("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
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


@rule_for("unfold")
def _windowed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axis = a["dimension"] % x.dim()
    watcher.freeze(x, [axis], f"{watcher.here} moves over it")
    watcher.set(result, [*(None if i == axis else ids for i, ids in enumerate(watcher.of(x))), None])


@rule_for("index", "_unsafe_index")
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


@rule_for("index_put", "_index_put_impl", "_unsafe_index_put")
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


@rule_for("index_select", "embedding", "_embedding_bag", "_embedding_bag_forward_only")
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


@rule_for("roll", "flip", "cumsum", "cumprod", "sort", "tril", "triu", "cummax", "cummin", "fft_fftshift")
def _ordered(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    """The order of entries along some axes matters: those stay."""
    x = a["self"]
    axes = (
        a.get("dims", a.get("dim")) if a.get("dims", a.get("dim")) is not None else [x.dim() - 2, x.dim() - 1]
    )
    watcher.freeze(x, positive(axes, x.dim()), f"{watcher.here} uses the order of its entries")
    for out in [result] if isinstance(result, Tensor) else result:
        watcher.set(out, watcher.of(x))


@rule_for("_fft_r2c", "_fft_c2c", "_fft_c2r")
def _transformed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["self"]
    axes = positive(a["dim"], x.dim())
    watcher.freeze(x, axes, f"{watcher.here} takes the Fourier transform along it")
    left = [None if i in axes else ids for i, ids in enumerate(watcher.of(x))]
    watcher.set(result, left)
    signal = result if x.is_complex() and not result.is_complex() else x
    macs = fft_macs(5.0 if x.is_complex() and result.is_complex() else 2.5, signal, axes)
    watcher.multiplies(macs / math.prod(len(ids) for ids in left if ids is not None), *left)
