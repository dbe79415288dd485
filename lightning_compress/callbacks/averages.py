"""Averaged copies of a module that Lightning's own callbacks keep, and the quantizers in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_compress.callbacks.base import callbacks_of
from lightning_compress.quantization.training import quantizers

IN_STATE_DICT = WeightAveraging.__name__
"""Key of the averages that a checkpoint's ``state_dict`` holds in place of the trained weights."""

Averages = dict[str, nn.Module]
Tensors = Mapping[str, Mapping[str, Tensor]]


def averages_of(trainer: Trainer) -> Averages:
    """The averaged copies in a Trainer.

    Args:
        trainer: any trainer, after ``setup``.

    Returns:
        Name of the averaging class of Lightning -> copy of the LightningModule.
    """
    found: Averages = {}
    for callback in callbacks_of(trainer):
        for kind in (WeightAveraging, StochasticWeightAveraging):
            copy = getattr(callback, "_average_model", None) if isinstance(callback, kind) else None
            if isinstance(copy, nn.Module):
                found[kind.__name__] = (
                    copy.module if isinstance(copy, torch.optim.swa_utils.AveragedModel) else copy
                )
    return found


def averaging_before(callback: Callback, trainer: Trainer) -> str | None:
    """Class name of an averaging callback that stands before another one in the list, or None."""
    callbacks = callbacks_of(trainer)
    earlier = callbacks[: callbacks.index(callback)] if callback in callbacks else []
    averaging = WeightAveraging | StochasticWeightAveraging
    return next((type(other).__name__ for other in earlier if isinstance(other, averaging)), None)


def tensors_of(averages: Averages) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The averaged tensors of quantizers, copied to the CPU: averaging class -> quantizer -> name -> tensor."""
    return {
        kind: {
            name: {key: value.detach().cpu().clone() for key, value in quantizer.tensors().items()}
            for name, quantizer in quantizers(module).items()
        }
        for kind, module in averages.items()
    }


def load_tensors(module: nn.Module, tensors: Tensors) -> None:
    """Give the quantizers of an averaged copy their tensors.

    Args:
        module: the copy.
        tensors: quantizer -> name -> tensor.
    """
    own: dict[str, Any] = quantizers(module)
    for name in own.keys() & tensors.keys():
        own[name].load(tensors[name])
