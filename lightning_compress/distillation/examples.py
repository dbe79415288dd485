"""One forward pass of both networks before training, so that projections exist when optimizers are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.distillation.outputs import split_batch
from lightning_compress.distillation.watching import watched


def features_of(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> dict[str, Tensor]:
    """What layers give for an example, in eval mode; mode, buffers and random states are as before.

    Args:
        model: any.
        layers: name -> layer.
        example: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        Name -> output, of the layers that ran.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> features_of(model, {"0": model[0]}, torch.zeros(1, 2))["0"].shape, model.training
        (torch.Size([1, 3]), True)
    """
    modes = {module: module.training for module in model.modules()}
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    args, kwargs = arguments(to_like(example, like))
    try:
        model.eval()
        with isolate_rng(), torch.no_grad(), watched(model, layers) as calls:
            model(*args, **kwargs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return calls[0].features


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of an example input, as ``LightningModule.example_input_array`` means them.

    Args:
        example: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        Both.

    Examples:
        >>> arguments((1, 2)), arguments({"x": 1}), arguments(3)
        (((1, 2), {}), ((), {'x': 1}), ((3,), {}))
    """
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def to_like(value: Any, like: Tensor) -> Any:
    """Tensors on the device of another one and, if they are floats, of its type.

    Args:
        value: tensors in tuples, lists and mappings.
        like: a real tensor.

    Returns:
        The same structure.

    Examples:
        >>> to_like((torch.zeros(1), torch.tensor([1])), torch.zeros(1).double())
        (tensor([0.], dtype=torch.float64), tensor([1]))
    """
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, Mapping):
        return {k: to_like(v, like) for k, v in value.items()}
    return type(value)(to_like(v, like) for v in value) if isinstance(value, tuple | list) else value


def first_input(trainer: Trainer) -> Any:
    """The input of the first two training samples, read from the data set and not through the loader's order.

    Args:
        trainer: about to fit.

    Returns:
        x, or None where the loader is not a ``DataLoader`` of a data set with an index.
    """
    trainer.fit_loop.setup_data()
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    samples: Any = loader.dataset
    collate: Callable[[list[Any]], Any] = loader.collate_fn
    with isolate_rng():
        return split_batch(collate([samples[i] for i in range(min(2, len(samples)))]))[0]
