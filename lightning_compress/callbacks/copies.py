"""What a compressed copy at the end of a fit is made from: a part of the module, and an input that fits it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.stats.drawing import take_samples

_SAMPLES = 2  # of the first batch; enough to follow the tensors


def part_of(module: nn.Module, attribute: str | None, owner: str) -> nn.Module:
    """The submodule that a callback's ``attribute=`` names.

    Args:
        module: the LightningModule.
        attribute: dotted name; None for the module itself.
        owner: class name of the callback, for the error.

    Returns:
        The submodule.

    Raises:
        MisconfigurationException: there is none of that name.

    Examples:
        >>> part_of(nn.Sequential(nn.Linear(1, 2)), "0", "Callback")
        Linear(in_features=1, out_features=2, bias=True)
    """
    if attribute is None:
        return module
    try:
        return module.get_submodule(attribute)
    except AttributeError:
        known = ", ".join(name for name, _ in module.named_children())
        raise MisconfigurationException(
            f"{owner}(attribute={attribute!r}): {type(module).__name__} has no such submodule; it has: "
            f"{known or 'none'}."
        ) from None


class FirstInput:
    """Forward pre-hook that keeps two samples of a module's first input, on the CPU, and then takes itself off.

    Args:
        module: whose input it is.

    Attributes:
        value: positional inputs, or inputs by name; None before there are any, and for inputs that are no tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        self.value: Any = None
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What PyTorch calls ahead of ``forward``."""
        if not is_patched(module):
            self.handle.remove()
            few = own_inputs(module, args, kwargs, _SAMPLES)
            self.value = tree_map(lambda v: v.cpu() if isinstance(v, Tensor) else v, few)


def is_patched(module: nn.Module) -> bool:
    """Whether something else goes through ``forward`` now: distributed strategies send training_step's arguments."""
    return getattr(module.forward, "__func__", None) is not type(module).forward


def own_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> Any:
    """Copies of the first samples of what a module is called with.

    Args:
        module: any module.
        args: positional inputs.
        kwargs: inputs by name.
        samples: how many to take.

    Returns:
        Positional inputs, or all of them by name; None for inputs that are no tensors.

    Examples:
        >>> own_inputs(nn.Linear(1, 1), (torch.ones(3, 1),), {}, samples=2)
        (tensor([[1.],
                [1.]]),)
    """
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments if kwargs else args
    leaves = tree_leaves(given)
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes or not all(
        leaf is None or isinstance(leaf, Tensor | bool | int | float | str) for leaf in leaves
    ):
        return None
    few = take_samples(given, sizes[0], 0, samples)
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, few)


class ExampleInput:
    """An input of a part of the module: ``example_input_array``, else two samples of what its forward gets first.

    Args:
        attribute: name of the part; None for the whole LightningModule, the only one with an example of its own.
        owner: class name of the callback, for errors.
    """

    def __init__(self, attribute: str | None, owner: str) -> None:
        self.attribute, self.owner = attribute, owner
        self._first: FirstInput | None = None

    def start(self, pl_module: LightningModule, undo: list[Callable[[], Any]]) -> None:
        """Wait for the first input, if there is no example.

        Args:
            pl_module: with its modules built.
            undo: gets what takes the hook off again.

        Raises:
            MisconfigurationException: it has no such part.
        """
        part = part_of(pl_module, self.attribute, self.owner)
        if self._own(pl_module) is None:
            self._first = FirstInput(part)
            undo.append(self._first.handle.remove)

    def value(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """The input, the same on every process; None if there was none.

        Args:
            trainer: the running trainer.
            pl_module: as before.

        Returns:
            What the part can be called with.
        """
        found = self._own(pl_module)
        if found is None and self._first is not None:
            found = self._first.value
        return trainer.strategy.broadcast(found) if trainer.world_size > 1 else found

    def _own(self, pl_module: LightningModule) -> Any:
        return pl_module.example_input_array if self.attribute is None else None
