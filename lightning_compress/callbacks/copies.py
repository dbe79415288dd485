"""What a compressed copy at the end of a fit is made from: a part of the module, and an input that fits it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_compress.callbacks.fusion import _FirstInput


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


class ExampleInput:
    """An input of a part of the module: ``example_input_array``, else two samples of what its forward gets first.

    Args:
        attribute: name of the part; None for the whole LightningModule, the only one with an example of its own.
    """

    def __init__(self, attribute: str | None) -> None:
        self.attribute = attribute
        self._first: _FirstInput | None = None

    def start(self, pl_module: LightningModule, undo: list[Callable[[], Any]]) -> None:
        """Wait for the first input, if there is no example.

        Args:
            pl_module: with its modules built.
            undo: gets what takes the hook off again.
        """
        if self._own(pl_module) is None:
            self._first = _FirstInput(part_of(pl_module, self.attribute, type(self).__name__))
            undo.append(self._first.handle.remove)

    def value(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """The input, the same on every process; None if there was none.

        Args:
            trainer: the running trainer.
            pl_module: as before.
        """
        found = self._own(pl_module)
        if found is None and self._first is not None:
            found = self._first.value
        return trainer.strategy.broadcast(found) if trainer.world_size > 1 else found

    def _own(self, pl_module: LightningModule) -> Any:
        return pl_module.example_input_array if self.attribute is None else None
