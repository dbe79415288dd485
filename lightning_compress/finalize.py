"""The plain compressed copy of a trained module, for whoever deploys it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from types import MethodType
from typing import Any

from torch import nn

from lightning_compress import codes
from lightning_compress.targets import replace_modules

_PACKAGE = __name__.partition(".")[0]


class StandIn(ABC):
    """Base of layer classes that stand in for a plain one while a method is at work, such as fake-quantized ones.

    A concrete one inherits from the layer it stands for first (Python then lets an object change between the two
    classes) and from this second, and says how to become plain.

    Examples:
        >>> class Doubled(nn.Linear, StandIn):
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return nn.functional.linear(x, 2 * self.weight, self.bias)
        ...     def plain(self) -> nn.Module:
        ...         self.weight.data.mul_(2)
        ...         self.__class__ = nn.Linear
        ...         return self
        >>> type(finalize(Doubled(2, 2))).__name__
        'Linear'
    """

    @abstractmethod
    def plain(self) -> nn.Module:
        """The plain layer with the same outputs in eval mode and the same plain keys; may be this object, changed.

        It is called on a copy. Codes of this layer that the returned one lacks are carried over.
        """


def finalize(module: nn.Module) -> nn.Module:
    """A copy for use: eval mode, the same outputs bit for bit, the same keys, and nothing left of the training.

    Stand-in layers are replaced by plain ones. Hooks of this library, methods that were patched on the instance and
    references to a trainer are gone, so the copy pickles, deep-copies and exports like the plain model. What was
    compressed stays: weights, their codes and the list of applied steps.

    Args:
        module: any module, during or after training; a LightningModule gives one of the same class. It stays as it
            is.

    Returns:
        The copy, in eval mode, on the same devices.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Dropout())
        >>> small = finalize(compress(net, [Prune(0.5)]).model)
        >>> small.training, int((small[0].weight == 0).sum())
        (False, 4)
    """
    result = copy.deepcopy(module)
    for part in result.modules():
        _detach(part)
    plain: dict[nn.Module, nn.Module] = {p: _plain(p) for p in result.modules() if isinstance(p, StandIn)}
    replace_modules(result, plain)
    return plain.get(result, result).eval()


def _plain(layer: Any) -> nn.Module:
    own = [(param, code) for _, holder, param, code in codes.of(layer) if holder is layer]
    result: nn.Module = layer.plain()
    for param, code in own:
        if codes.read(result, param) is None:
            codes.attach(result, param, code)
    return result


def _detach(module: nn.Module) -> None:
    """Drop what training put on one module."""
    state = vars(module)
    for name, value in list(state.items()):
        if name.endswith("_hooks") and isinstance(value, dict):
            for key in [k for k, hook in value.items() if _ours(hook)]:
                del value[key]
        elif isinstance(value, MethodType) and value.__func__ is getattr(type(module), name, None):
            del state[name]  # a patched method whose patch is gone: the class has it
    for name in {"_trainer", "_fabric"} & state.keys():
        state[name] = None
    if "_fabric_optimizers" in state:
        state["_fabric_optimizers"] = []


def _ours(hook: Any) -> bool:
    """Whether a hook (also wrapped, partial or bound) is defined in this library."""
    for attribute in ("hook", "func", "__func__"):
        hook = getattr(hook, attribute, hook)
    return str(getattr(hook, "__module__", "")).partition(".")[0] == _PACKAGE
