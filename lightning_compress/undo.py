"""A model as it was, should something fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_CONTAINERS = (dict, list, set, tuple)
_PLAIN = (bool, int, float, str, type(None), Tensor, nn.Parameter)  # most attributes
_DEPTH = 8  # of containers in containers, which may hold themselves


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever the block does to a model is undone if it raises, also if it is interrupted.

    Modules keep their identity, class, attributes and submodules, tensors theirs, and their values and gradients.
    Meanwhile a copy of all values is held. Attributes that are neither tensors, modules nor plain containers of
    these are taken to be constant.

    Args:
        model: any module.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> try:
        ...     with unchanged_on_error(net):
        ...         net[0] = nn.ReLU()
        ...         raise ValueError
        ... except ValueError:
        ...     print(net[0])
        Linear(in_features=2, out_features=2, bias=True)
    """
    modules = [(module, type(module)) for module in model.modules()]
    containers: list[tuple[Any, Sequence[Any]]] = []
    for module, _ in modules:
        _remember(module.__dict__, containers)
    held = {id(t): t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)}
    tensors = [(t, t.data, t.detach().clone(), t.grad, t.requires_grad) for t in held.values()]
    try:
        yield
    except BaseException:
        for module, kind in modules:
            module.__class__ = kind
        for container, content in containers:
            _put_back(container, content)
        for tensor, data, values, grad, trained in tensors:
            tensor.data = data
            with torch.no_grad():
                tensor.copy_(values)
            tensor.grad = grad
            tensor.requires_grad_(trained)
        raise


def _remember(value: Any, found: list[tuple[Any, Sequence[Any]]], depth: int = 0) -> None:
    """What a plain container holds, and those inside it."""
    inner = list(value.values() if isinstance(value, dict) else value)
    if not isinstance(value, tuple):
        found.append((value, list(value.items()) if isinstance(value, dict) else inner))
    for part in inner:
        if type(part) in _PLAIN or not isinstance(part, _CONTAINERS):
            continue
        if part and depth < _DEPTH:
            _remember(part, found, depth + 1)
        elif not part and not isinstance(part, tuple):
            found.append((part, ()))  # most of them: the hooks of a module


def _put_back(container: Any, content: Sequence[Any]) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
