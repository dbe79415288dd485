"""What follows in a Trainer when parameters lose channels: optimizer state, averaged copies, distributed wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_compress.callbacks.averages import averages_of
from lightning_compress.channels.surgery import cut, taken
from lightning_compress.channels.watcher import tensors_of


def cut_everywhere(trainer: Trainer, part: nn.Module, attribute: str, decided: Mapping[str, Any]) -> None:
    """Remove channels from a module in training, and from all that was made for its present shapes.

    Parameters stay the same objects, so optimizers, their schedules and parameter groups go on; their state is cut like
    the parameters. Averaged copies lose the same channels. The wrapper of distributed training is made anew.

    Args:
        trainer: the running trainer.
        part: the module, or a part of it.
        attribute: name of that part in the LightningModule; "" for the whole.
        decided: the layers of a plan of ``lightning_compress.RemoveChannels``.
    """
    strategy: Any = trainer.strategy
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        strategy.model = strategy.lightning_module  # its hooks hold on to the old shapes
    tensors = tensors_of(part)
    before = {key: tensors[key].shape for key in decided if key in tensors}
    cut(part, decided)
    for copy in averages_of(trainer).values():
        cut(copy.get_submodule(attribute), decided)
    for optimizer in trainer.optimizers:
        for key, shape in before.items():
            state = optimizer.state.get(tensors[key])
            if state:
                axes = {int(a): i.long() for a, i in decided[key].get("keep", {}).items()}
                _cut_state(state, shape, axes, f"{type(optimizer).__name__} of {key}")
    if wrapped:
        strategy.configure_ddp()


def _cut_state(state: dict[str, Any], shape: torch.Size, axes: Mapping[int, Tensor], name: str) -> None:
    """The optimizer's memory of one parameter; what has another shape than the parameter had cannot follow."""
    for entry, value in list(state.items()):
        if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
            continue
        if value.shape == shape:
            state[entry] = taken(value, axes)
        else:
            del state[entry]
            rank_zero_warn(
                f"{entry} in the state of {name} has shape {tuple(value.shape)}, not that of the parameter, "
                f"{tuple(shape)}: it starts anew."
            )
