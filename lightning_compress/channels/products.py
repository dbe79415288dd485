"""Sums of products: matrices, convolutions, attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from lightning_compress.channels.labels import Ids
from lightning_compress.channels.registry import agree, joined, rule_for
from lightning_compress.channels.watcher import Watcher


@rule_for("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv", "matmul", "linear")
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
            joined(watcher, [t for t in (x, y) if t.dim() > 2], i - lead - 2, result.shape[i])
            for i in range(lead)
        ]
    else:
        batch = []
    rows = one[-2] if x.dim() > 1 else None
    columns = two[-1] if y.dim() > 1 else None
    inner = agree(watcher, one[-1], two[-2] if y.dim() > 1 else two[0], x.shape[-1])
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


@rule_for("_trilinear")
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
            ids = agree(watcher, ids, other, 2)
        constant *= own[0][1] if own and ids is None else 1
        axes.append(ids)
    watcher.multiplies(constant, *axes)
    for name, axis in zip(("out_features", "in1_features", "in2_features"), range(1, 4), strict=False):
        watcher.counts(name, axes[axis] if len(axes) == 4 else None)
    watcher.set(result, [ids for axis, ids in enumerate(axes) if axis not in a["sumdim"]])


@rule_for("_cdist_forward")
def _distances(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, y = a["x1"], a["x2"]
    agree(watcher, watcher.of(x)[-1], watcher.of(y)[-1], x.shape[-1])
    lead = [joined(watcher, [x, y], i - result.dim(), n) for i, n in enumerate(result.shape[:-2])]
    watcher.set(result, [*lead, watcher.of(x)[-2], watcher.of(y)[-2]])


@rule_for("_weight_norm_interface")
def _weight_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    axes = list(watcher.of(a["v"]))
    axes[a["dim"]] = agree(watcher, axes[a["dim"]], watcher.of(a["g"])[a["dim"]], a["v"].shape[a["dim"]])
    watcher.set(result[0], axes)


@rule_for("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "mkldnn_convolution")
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
        into = agree(watcher, into, inner, x.shape[channels])
        summed = into
    else:
        out, into, summed = _grouped(watcher, weight, into, x.shape[channels], groups, transposed)
    if isinstance(a["bias"], Tensor):
        out = agree(watcher, out, watcher.of(a["bias"])[0], result.shape[channels])
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


@rule_for(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math_for_mps",
)  # fmt: skip
def _attended(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    q, k, v = a["query"], a["key"], a["value"]
    out = result if isinstance(result, Tensor) else result[0]
    axes = [joined(watcher, [q, k, v], axis - q.dim(), n) for axis, n in enumerate(out.shape[:-2])]
    for part in (k, v):  # several heads of queries may share one of keys
        few, many = watcher.of(part)[-3] if part.dim() > 2 else None, axes[-1] if axes else None
        if few is not None and many is not None and len(few) < len(many):
            watcher.labels.equal(np.repeat(few, len(many) // len(few)), many)
    depth = agree(watcher, watcher.of(q)[-1], watcher.of(k)[-1], q.shape[-1])
    watcher.freeze(k, [k.dim() - 2], f"{watcher.here} attends over it")
    watcher.set(out, [*axes, watcher.of(q)[-2], watcher.of(v)[-1]])
    fixed = math.prod(n for n, ids in zip(out.shape[:-2], axes, strict=True) if ids is None)
    pairs = fixed * q.shape[-2] * k.shape[-2]
    watcher.multiplies(pairs * (1 if depth is not None else q.shape[-1]), *axes, depth)
    value = watcher.of(v)[-1]
    watcher.multiplies(pairs * (1 if value is not None else v.shape[-1]), *axes, value)
