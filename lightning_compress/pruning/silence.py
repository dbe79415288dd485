"""Channels without effect: which ones are, and masks that make them so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.channels.families import Channels
from lightning_compress.channels.watcher import tensors_of
from lightning_compress.targets import survey


def silent(model: nn.Module, found: Channels) -> list[int]:
    """Channels that are zero wherever a layer makes them.

    Args:
        model: the model they belong to.
        found: its channels.

    Returns:
        Classes; of a family that is silent as a whole, the first channel stays.
    """
    tensors = dict(tensors_of(model))
    trained = {key for key, t in tensors.items() if isinstance(t, nn.Parameter)}
    inputs = {(t.key, t.axes.in_) for t in survey(model).targets}
    gone: list[int] = []
    for family in found.families:
        quiet = np.ones(len(family), bool)
        for (key, axis), indices in family.members.items():
            if key not in trained or (key, axis) in inputs:
                continue
            entries = (tensors[key].detach() != 0).movedim(axis, 0)
            live = entries.reshape(len(entries), -1).any(1).cpu().numpy()
            quiet &= np.array([not live[i].any() for i in indices])
        goes = [c for c, q in zip(family.classes, quiet, strict=True) if q]
        gone += goes[1:] if len(goes) == len(family) else goes
    return gone


def silencing(model: nn.Module, found: Channels, gone: Sequence[int]) -> dict[str, Tensor]:
    """Masks that make channels have no effect, wherever they occur in parameters.

    Args:
        model: the model they belong to.
        found: its channels.
        gone: classes.

    Returns:
        Full parameter name -> bool mask, True = kept, of those that lose entries.
    """
    masks: dict[str, Tensor] = {}
    kept = found.keep(gone)
    for key, tensor in tensors_of(model).items():
        if key not in kept or not isinstance(tensor, nn.Parameter):
            continue
        mask = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
        for axis, indices in kept[key].items():
            lost = np.setdiff1d(np.arange(tensor.shape[axis]), indices)
            mask.index_fill_(axis, torch.from_numpy(lost).to(tensor.device), False)
        masks[key] = mask
    return masks
