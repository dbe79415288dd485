"""Whether a model still works, and means the same, after channels were removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.channels.families import Keep
from lightning_compress.channels.trace import trace
from lightning_compress.channels.watcher import Trace
from lightning_compress.stats.running import call, evaluating, first_tensor


def fault(model: nn.Module, x: Any, before: Trace, kept: Keep) -> str:
    """What is wrong with a model whose channels were removed.

    It must run and give out the shapes it gave before, also run for twice as many samples, forward and backward, and
    channels that its operations bring together now must be ones that they brought together before.

    Args:
        model: the smaller model; left as it is.
        x: the input of the trace.
        before: the trace of the original.
        kept: what was kept of every tensor.

    Returns:
        The first fault in words, or "".
    """
    try:
        now = trace(model, x, before.grouped)
    except Exception as error:  # whatever the user's code raises
        return f"its forward pass fails: {_first_line(error)}"
    if now.shapes != before.shapes:
        return f"its output has shapes {now.shapes} instead of {before.shapes}"
    if before.trains and not now.trains:
        return "it does not run in training mode"
    crossed = _crossed(before, now, kept)
    if crossed:
        return f"channels of {crossed} would meet others than before"
    return _gradient_fault(model, x)


def _crossed(before: Trace, now: Trace, kept: Keep) -> str:
    """A tensor with a channel that now belongs together with another than before."""
    partner = np.full(len(now.classes), -1)
    owner: dict[int, tuple[str, bool]] = {}
    for key, axes in now.axes.items():
        for axis, ids in enumerate(axes):
            old = before.axes[key][axis]
            if ids is None or old is None:
                continue
            whole = axis not in kept.get(key, {})
            was = before.classes[old if whole else old[kept[key][axis]]]
            for new_class, old_class in zip(now.classes[ids].tolist(), was.tolist(), strict=True):
                # What stays is as before, in whatever order it is computed with.
                fixed = whole and old_class in before.frozen
                if partner[new_class] not in (-1, old_class) and not (fixed and owner[new_class][1]):
                    return f"{key} and {owner[new_class][0]}"
                partner[new_class] = old_class
                owner[new_class] = key, fixed
    return ""


def _gradient_fault(model: nn.Module, x: Any) -> str:
    """Twice the samples, forward and backward, in eval mode."""
    first = first_tensor(x)
    count = first.shape[0] if first is not None and first.dim() else 0
    twice = tree_map(
        lambda t: torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() and len(t) == count else t, x
    )
    reached = [p for p in model.parameters() if p.requires_grad]
    try:
        with evaluating(model), torch.enable_grad():
            outputs = [
                t for t in tree_leaves(call(model, twice)) if isinstance(t, Tensor) and t.requires_grad
            ]
            if not outputs or not reached:
                return ""
            total = torch.stack([(t.abs() if t.is_complex() else t).float().mean() for t in outputs]).sum()
            gradients = torch.autograd.grad(total, reached, allow_unused=True)
    except Exception as error:  # whatever the user's code raises
        return f"its forward or backward pass fails for {2 * count} samples: {_first_line(error)}"
    wrong = [g for p, g in zip(reached, gradients, strict=True) if g is not None and g.shape != p.shape]
    return "a gradient has another shape than its parameter" if wrong else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def plan_entries(
    shapes: Mapping[str, Sequence[int]], kept: Keep, numbers: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What ``surgery.cut`` carries out, as the layers of a plan.

    Args:
        shapes: full tensor name -> shape before.
        kept: what stays of every tensor.
        numbers: what ``Channels.attributes`` returned.

    Returns:
        Full tensor name, or module name with "()" -> decisions.
    """
    entries: dict[str, dict[str, Any]] = {
        key: {
            "shape": list(shapes[key]),
            "keep": {str(axis): torch.from_numpy(indices.astype(np.int32)) for axis, indices in axes.items()},
        }
        for key, axes in kept.items()
    }
    return entries | {f"{name}()": {"set": dict(values)} for name, values in numbers.items()}
