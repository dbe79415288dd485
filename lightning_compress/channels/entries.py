"""Operations on every entry by itself, new tensors, reductions, normalization and pooling."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.channels.registry import agree, joined, positive, rule_for
from lightning_compress.channels.watcher import Watcher


@rule_for(
    "where", "copy", "masked_fill", "clone", "_to_copy", "contiguous", "lift_fresh", "dropout", "native_dropout",
    "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "leaky_relu", "softplus", "_prelu_kernel",
    "relu6", "mish", "log_sigmoid_forward", "threshold", "complex", "polar", "fill", "lerp", "addcmul", "_conj",
    "real", "imag", "resolve_conj", "resolve_neg", "_conj_physical", "conj_physical", "bernoulli", "normal", "uniform",
    "exponential", "cauchy", "geometric", "log_normal", "random", "zero", "rsub", "floor_divide", "rrelu_with_noise",
)  # fmt: skip
def entrywise(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    """Tensors that meet entry by entry have the same channels, and so has what comes out."""
    out = result if isinstance(result, Tensor) else result[0]
    parts = [t for t in tree_leaves(a) if isinstance(t, Tensor) and t.dim()]
    axes = [joined(watcher, parts, axis - out.dim(), n) for axis, n in enumerate(out.shape)]
    for tensor in [out] if isinstance(result, Tensor) else [t for t in result if t.shape == out.shape]:
        watcher.set(tensor, axes)


@rule_for("mul")
def _multiplied(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    entrywise(watcher, a, result)
    pair = [a["self"], a["other"]]
    if all(isinstance(t, Tensor) and t.is_complex() for t in pair) and any(map(watcher.holds, pair)):
        axes = watcher.of(result)  # a spectral layer without sums over channels
        watcher.multiplies(
            4 * math.prod(n for n, ids in zip(result.shape, axes, strict=True) if ids is None), *axes
        )


@rule_for("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "_like")
def _alike(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"]))


@rule_for(
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


@rule_for(
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


@rule_for(
    "mean", "sum", "amax", "amin", "nansum", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "any",
    "all", "max", "min", "var_mean", "std_mean", "aminmax", "median", "nanmedian", "count_nonzero",
)  # fmt: skip
def _reduced(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    if isinstance(a.get("other"), Tensor):
        return entrywise(watcher, a, result)
    x = a["self"]
    gone = set(positive(a.get("dim"), x.dim()))
    own = watcher.of(x)
    for out in [result] if isinstance(result, Tensor) else result:
        if out.dim() == x.dim():
            watcher.set(out, [None if i in gone else ids for i, ids in enumerate(own)])
        else:
            watcher.set(out, [ids for i, ids in enumerate(own) if i not in gone])


@rule_for("argmax", "argmin", "topk", "unique_dim")
def _chosen(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.freeze(a["self"], None, f"{watcher.here} numbers its entries")


@rule_for("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax", "logcumsumexp")
def _normalized(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    watcher.set(result, watcher.of(a["self"]))


@rule_for(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
    "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
    "_batch_norm_impl_index",
)  # fmt: skip
def _batch_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x = a["input"]
    axes = list(watcher.of(x))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(name), Tensor):
            axes[1] = agree(watcher, axes[1], watcher.of(a[name])[0], x.shape[1])
    watcher.set(result if isinstance(result, Tensor) else result[0], axes)
    watcher.counts("num_features", axes[1])


@rule_for("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, shape = a["input"], a["normalized_shape"]
    axes = list(watcher.of(x))
    for back in range(1, len(shape) + 1):
        for name in ("weight", "bias"):
            if isinstance(a.get(name), Tensor):
                axes[-back] = agree(watcher, axes[-back], watcher.of(a[name])[-back], x.shape[-back])
        watcher.counts("normalized_shape", axes[-back], len(shape) - back)
    watcher.set(result if isinstance(result, Tensor) else result[0], axes)


@rule_for("native_group_norm", "group_norm")
def _group_normed(watcher: Watcher, a: dict[str, Any], result: Any) -> None:
    x, groups = a["input"], int(a["group"] if "group" in a else a["num_groups"])
    axes, turn = list(watcher.of(x)), watcher.turn()
    for name in ("weight", "bias"):
        if isinstance(a.get(name), Tensor):
            axes[1] = agree(watcher, axes[1], watcher.of(a[name])[0], x.shape[1])
    if axes[1] is not None and groups > 1:
        rows = axes[1].reshape(groups, -1)
        if watcher.decide(turn, "groups" if groups >= rows.shape[1] else "positions") == "groups":
            watcher.labels.equal(rows[:, :1], rows)
            watcher.counts("num_groups", rows[:, 0])
        else:
            watcher.labels.equal(rows[:1], rows)
    watcher.set(result if isinstance(result, Tensor) else result[0], axes)
    watcher.counts("num_channels", axes[1])


@rule_for(
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
