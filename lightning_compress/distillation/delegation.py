"""The hooks of a LightningModule inside another one: those it overrides become those of the outer one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.optim import Optimizer

HOOKS = (
    *(name for hooks in (ModelHooks, DataHooks, CheckpointHooks) for name in vars(hooks) if name[0] != "_"),
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
)


def lend_hooks(inner: LightningModule, outer: LightningModule) -> None:
    """Let the outer module answer with the inner one's hooks, except for those that the outer's class has itself.

    They are bound methods in the outer's ``__dict__``: Lightning sees only those as overridden that the inner one
    overrides, and copies of the outer are bound to their own inner module.

    Args:
        inner: the module inside.
        outer: the one a Trainer gets.
    """
    own = {
        name
        for cls in type(outer).__mro__[: type(outer).__mro__.index(LightningModule)]
        for name in vars(cls)
    }
    for name in HOOKS:
        if name not in own and is_overridden(name, inner):
            outer.__dict__[name] = getattr(inner, name)


def call_step(inner: LightningModule, step: str, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
    """Call a step with the arguments that it takes, as Lightning does.

    Args:
        inner: whose step.
        step: its name.
        batch: a batch.
        batch_idx: its number.
        dataloader_idx: number of its loader.

    Returns:
        What the step returns.
    """
    function = getattr(inner, step)
    taken: list[Any] = [batch]
    if is_param_in_hook_signature(function, "batch_idx", min_args=2):
        taken.append(batch_idx)
        if is_param_in_hook_signature(function, "dataloader_idx", explicit=True):
            taken.append(dataloader_idx)
    return function(*taken)


def optimizers_in(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returns, in their order.

    Args:
        configured: an optimizer, or dicts, lists and tuples of them and of schedulers.

    Returns:
        All of them.

    Examples:
        >>> sgd = torch.optim.SGD(nn.Linear(1, 1).parameters())
        >>> optimizers_in(([{"optimizer": sgd}], [])) == [sgd]
        True
    """
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return optimizers_in(configured.get("optimizer"))
    parts = configured if isinstance(configured, tuple | list) else ()
    return [optimizer for part in parts for optimizer in optimizers_in(part)]
