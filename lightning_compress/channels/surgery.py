"""Removing channels: tensors are cut in place, and the numbers of their modules follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.channels.attention import decouple
from lightning_compress.channels.watcher import tensors_of
from lightning_compress.names import clean

_INDEXED = re.compile(r"(.+)\[(\d+)\]$")


def cut(model: nn.Module, decided: Mapping[str, Mapping[str, Any]]) -> None:
    """Remove channels in place. Parameters stay the same objects, so optimizers keep them; their gradients go.

    Args:
        model: the model of the plan, or a fresh one.
        decided: full tensor name -> {"shape", "keep": {axis: indices}, "value": new entries}, the last if they change;
            module name and "()" -> {"set": {attribute: [index or -1, old, new]}}.

    Raises:
        ValueError: the model has no such tensor, module or number, or an index is out of range; nothing is changed
            then.
    """
    tensors, modules = tensors_of(model), {clean(name): module for name, module in model.named_modules()}
    new: dict[str, dict[int, Tensor]] = {}
    for key, entry in decided.items():
        if "keep" in entry:
            new[key] = _checked(key, tensors.get(key), entry)
        if "set" in entry:
            _check_numbers(key, modules.get(key.removesuffix("()")), entry["set"])
        if "value" in entry:
            _check_value(key, tensors.get(key), new.get(key, {}), entry["value"])
    held = {key: (module, param, code) for key, module, param, code in codes.of(model)}
    for key, axes in new.items():
        tensor = tensors[key]
        module, param, code = held.get(key, (model, "", None))
        masked = isinstance(code, codes.Mask) and code.matches(tensor)
        tensor.data = taken(tensor.data, axes)
        tensor.grad = None
        if isinstance(code, codes.Mask) and masked:
            codes.set_mask(module, param, taken(code.mask, axes))
        elif code is not None:
            codes.remove(module, param)
    for key, entry in decided.items():
        if "value" in entry:
            tensors[key].data.copy_(entry["value"])
        if "set" in entry:
            _set_numbers(modules[key.removesuffix("()")], entry["set"])
    decouple(model)


def taken(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """The entries of a tensor that stay, along some axes.

    Args:
        tensor: any.
        axes: axis -> indices that stay.

    Returns:
        A copy.

    Examples:
        >>> taken(torch.arange(6).view(2, 3), {1: torch.tensor([0, 2])})
        tensor([[0, 2],
                [3, 5]])
    """
    for axis, indices in axes.items():
        tensor = tensor.index_select(axis, indices.to(tensor.device))
    return tensor.clone() if not axes else tensor


def _checked(key: str, tensor: Tensor | None, entry: Mapping[str, Any]) -> dict[int, Tensor]:
    if tensor is None or list(tensor.shape) != list(entry["shape"]):
        found = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise ValueError(
            f"the plan cuts {key} of shape {tuple(entry['shape'])}, and this model has {found}: apply it to the "
            "architecture it was made for."
        )
    axes = {}
    for axis, indices in entry["keep"].items():
        axis, n = int(axis), len(indices)
        if not 0 <= axis < tensor.dim() or not n or indices.dtype.is_floating_point or indices.dim() != 1:
            raise ValueError(
                f"the plan keeps {indices} of axis {axis} of {key}: at least one index is needed."
            )
        rising = bool((indices[1:] > indices[:-1]).all())
        if not rising or int(indices[0]) < 0 or int(indices[-1]) >= tensor.shape[axis]:
            raise ValueError(
                f"the plan keeps indices {int(indices.min())} to {int(indices.max())} of axis {axis} of {key}: "
                f"allowed are rising ones from 0 to {tensor.shape[axis] - 1}."
            )
        axes[axis] = indices.long()
    return axes


def _check_value(key: str, tensor: Tensor | None, axes: Mapping[int, Tensor], value: Tensor) -> None:
    shape = [] if tensor is None else [len(axes[i]) if i in axes else n for i, n in enumerate(tensor.shape)]
    if tensor is None or list(value.shape) != shape:
        raise ValueError(
            f"the plan gives {key} values of shape {tuple(value.shape)}, and here it has shape {tuple(shape)}: apply "
            "it to the architecture it was made for."
        )


def _check_numbers(key: str, module: nn.Module | None, numbers: Mapping[str, Any]) -> None:
    for name, (_, old, new) in numbers.items():
        held = None if module is None else _number(module, name)
        if type(held) is not int or held != old or not 0 <= new <= old:
            raise ValueError(
                f"the plan changes {name} of {key or 'the model'} from {old} to {new}, and here it is {held}: apply it "
                "to the architecture it was made for."
            )


def _number(module: nn.Module, name: str) -> Any:
    found = _INDEXED.match(name)
    if not found:
        return vars(module).get(name)
    held = vars(module).get(found[1])
    position = int(found[2])
    return held[position] if isinstance(held, tuple) and position < len(held) else None


def _set_numbers(module: nn.Module, numbers: Mapping[str, Any]) -> None:
    for name, (_, _, new) in numbers.items():
        found = _INDEXED.match(name)
        if not found:
            setattr(module, name, int(new))
            continue
        kind, held = type(getattr(module, found[1])), list(getattr(module, found[1]))
        held[int(found[2])] = int(new)
        setattr(module, found[1], kind(held))
