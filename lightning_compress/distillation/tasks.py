"""What a network is for, as far as its layers and answers tell: naming classes, or giving values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.distillation.outputs import main_tensor
from lightning_compress.metrics import Task
from lightning_compress.stats.running import call, observing
from lightning_compress.stats.samplers import takes_coordinates


class Decision(NamedTuple):
    """What a network is for.

    Attributes:
        task: "classification" or "regression".
        reason: in words.
        sure: False where it could as well be the other.
    """

    task: Task
    reason: str
    sure: bool


def find_task(model: nn.Module, x: Any) -> Decision:
    """Whether a network names classes or gives values.

    Values, if it has complex weights (a neural operator) or takes few coordinates through linear layers only; classes,
    if its answers are [N, C > 1] and come out of a linear layer. What else gives several values for every input
    could be either: taken as values, and said to be unsure.

    Args:
        model: any module; left as it is.
        x: inputs (tensor, tuple of arguments or dict of keywords).

    Returns:
        The decision.

    Raises:
        ValueError: the answer holds no tensor.

    Examples:
        >>> find_task(nn.Linear(20, 5), torch.zeros(1, 20))
        Decision(task='classification', reason='5 values of each input, out of a linear layer', sure=True)
        >>> find_task(nn.Linear(2, 1), torch.zeros(1, 2)).task
        'regression'
    """
    last: list[nn.Module] = []
    hooks = [
        m.register_forward_hook(lambda layer, *_: last.append(layer))
        for m in model.modules()
        if next(m.parameters(recurse=False), None) is not None
    ]
    try:
        with observing(model):
            y = main_tensor(call(model, x))
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(y, Tensor):
        raise ValueError(
            f"{type(model).__name__} gives no tensor for the example input: give task= and loss=."
        )
    if any(p.is_complex() for p in model.parameters()):
        return Decision("regression", "complex weights: a neural operator", True)
    values = y.shape[1] if y.dim() > 1 else 1
    if takes_coordinates(model, x):
        sharp = values > 1 and any(isinstance(m, nn.ReLU) for m in model.modules())
        return Decision("regression", f"linear layers on {x.shape[1]} coordinates", not sharp)
    if values == 1 or y.is_complex() or not torch.is_floating_point(y):
        return Decision("regression", "one value of each input", True)
    if y.dim() == 2 and last and isinstance(last[-1], nn.Linear):
        return Decision("classification", f"{values} values of each input, out of a linear layer", True)
    shape = " x ".join(map(str, y.shape[1:]))
    return Decision("regression", f"{shape} values of each input, which could be classes or values", False)
