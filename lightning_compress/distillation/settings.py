"""The settings of a distillation: which are allowed, what they default to, how a checkpoint names them."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_compress.distillation.outputs import main_tensor


def task_loss(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy for integer targets, mean squared error for others.

    Args:
        output: of the student.
        target: classes, or values of the output's shape.

    Returns:
        Scalar.

    Raises:
        ValueError: they do not fit.

    Examples:
        >>> round(task_loss(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
        1.3863
        >>> task_loss(torch.zeros(2, 4), torch.ones(2, 4)).item()
        1.0
    """
    answer = main_tensor(output)
    if answer is None:
        raise ValueError(
            f"the student returned {type(output).__name__}, which holds no tensor; give task_loss=function."
        )
    if not (target.is_floating_point() or target.is_complex()):
        return F.cross_entropy(answer, target.long())
    if answer.shape != target.shape:
        raise ValueError(
            f"the student's output has shape {tuple(answer.shape)}, the target {tuple(target.shape)}; give "
            "task_loss=function, or alike shapes."
        )
    return (answer - target).abs().square().mean()


def named(setting: Any) -> Any:
    """A setting as a checkpoint may hold it.

    Args:
        setting: a string, a mapping of strings, or a function.

    Returns:
        Strings by which it is found again; None for what has no importable name.

    Examples:
        >>> named("kd"), named(task_loss), named(lambda x: x)
        ('kd', 'lightning_compress.distillation.settings.task_loss', None)
    """
    if isinstance(setting, str) or (
        isinstance(setting, dict) and all(isinstance(v, str) for v in setting.values())
    ):
        return setting
    path = f"{getattr(setting, '__module__', '')}.{getattr(setting, '__qualname__', '<>')}"
    return None if "<" in path or path.startswith("__main__") or not callable(setting) else path


def check_numbers(temperature: float, alpha: float, feature_weight: float) -> None:
    """Refuse numbers outside their ranges.

    Args:
        temperature: > 0.
        alpha: 0 to 1.
        feature_weight: >= 0.

    Raises:
        ValueError: one is outside.

    Examples:
        >>> check_numbers(4.0, 0.9, 1.0)
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: allowed is > 0.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}: allowed is 0 (task alone) to 1 (teacher alone).")
    if not (feature_weight >= 0 and math.isfinite(feature_weight)):
        raise ValueError(f"feature_weight={feature_weight}: allowed is >= 0.")


def check_student(student: nn.Module, loss: Any, optimizer: Any, scheduler: Any) -> None:
    """Refuse LightningModules that cannot be trained from outside, and options that theirs replace.

    Args:
        student: any.
        loss: the option ``task_loss``.
        optimizer: the option.
        scheduler: the option.

    Raises:
        ValueError: it optimizes by hand, is compiled, has no training step, or brings what an option gives.

    Examples:
        >>> check_student(nn.Linear(1, 1), None, None, None)
    """
    if isinstance(getattr(student, "_orig_mod", None), LightningModule):
        raise ValueError(
            "the student is a compiled LightningModule, whose steps are hidden: compile its network instead."
        )
    if not isinstance(student, LightningModule):
        return
    name = type(student).__name__
    if not student.automatic_optimization:
        raise ValueError(
            f"{name} optimizes by hand, so nothing can be added to its loss: set automatic_optimization=True, or give "
            "its network as the student."
        )
    if not is_overridden("training_step", student):
        raise ValueError(f"{name} has no training_step: give its network as the student.")
    if loss is not None:
        raise ValueError(f"the task loss is what training_step of {name} returns: leave task_loss out.")
    if scheduler is not None and optimizer is None and is_overridden("configure_optimizers", student):
        raise ValueError(f"{name} configures its optimizers: give optimizer= too, or leave scheduler= out.")
