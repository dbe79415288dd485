"""Models of neuraloperator: what methods leave alone in them, and what they must say about themselves afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.spectral import is_spectral, stored_modes
from lightning_compress.targets import Patterns, plain_class, survey

_Modes = tuple[list[int], tuple[int, ...]]  # in constructor units, and as stored


def left_alone(
    model: nn.Module, layers: Mapping[str, nn.Module], include: Patterns, exclude: Patterns
) -> dict[str, str]:
    """Why a method for spectral convolutions leaves the other parameters as they are.

    Args:
        model: any module.
        layers: the spectral convolutions that it takes.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Returns:
        Full parameter name -> reason.
    """
    seen = survey(model, include, exclude)
    members = {id(m) for layer in layers.values() for m in layer.modules()}
    others = {t.key: plain_class(t.module).__name__ for t in seen.targets if id(t.module) not in members}
    named = {k: f"{kind} is not a spectral convolution of neuraloperator" for k, kind in others.items()}
    return seen.skipped | named


def remember(model: nn.Module, **options: Any) -> None:
    """Change what a model of neuraloperator recorded of its own construction, for its checkpoints.

    Args:
        model: any module; nothing happens to one without such a record.
        options: constructor arguments with their new values; those it was built without are left out.
    """
    record = getattr(model, "_init_kwargs", None)
    if not isinstance(record, dict):
        return
    record = dict(record)  # checkpoints in memory hold the old one
    given = list(record.get("args", ()))
    inits = [vars(kind)["__init__"] for kind in type(model).__mro__ if "__init__" in vars(kind)]
    order = [list(inspect.signature(init).parameters)[1:] for init in inits]
    for name, value in options.items():
        places = {names.index(name) for names in order if name in names}
        if name in record:
            record[name] = value
        elif places and min(places) < len(given):
            given[min(places)] = value
    if given:
        record["args"] = tuple(given)
    model.__dict__["_init_kwargs"] = record


def agree_on_modes(model: nn.Module, units: Mapping[nn.Module, Sequence[int]]) -> None:
    """Write new modes into the blocks and models around spectral convolutions, where all layers of one agree.

    Args:
        model: any module.
        units: changed spectral convolution -> its modes in constructor units (last axis n for n // 2 + 1 stored).
    """
    done: dict[nn.Module, _Modes] = {}
    for block, convs in _blocks(model):
        changed = [conv for conv in convs if conv in units]
        if changed and len({stored_modes(conv) for conv in convs}) == 1:
            done[block] = list(units[changed[0]]), stored_modes(changed[0])
    for part in model.modules():
        state: dict[str, Any] = vars(part)
        modes = next((done[m] for m in (part, *part.children()) if m in done), None)
        layers: Any = part._modules.get("fno_blocks", part._modules.get("attention_layers"))
        if "_n_modes" in state and modes is not None:
            _write(part, *modes)
        elif isinstance(layers, nn.ModuleList):  # one row for each layer: UNO and CODANO
            name = next(name for name in ("uno_n_modes", "n_modes") if name in state)
            rows = [_common(layer, done, row) for layer, row in zip(layers, state[name], strict=True)]
            setattr(part, name, rows)
            remember(part, **{name: rows})


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[Any]]]:
    """Every module with spectral convolutions in a list ``convs``, and these."""
    for module in model.modules():
        convs: Any = module._modules.get("convs")
        found = list(filter(is_spectral, convs)) if isinstance(convs, nn.ModuleList) else []
        if found:
            yield module, found


def _common(part: nn.Module, done: Mapping[nn.Module, _Modes], before: Any) -> Any:
    """The modes that all blocks of a layer have got, else those from before."""
    found = [done[block][0] if block in done else None for block, _ in _blocks(part)]
    return found[0] if found and found[0] and all(f == found[0] for f in found) else before


def _write(part: Any, units: list[int], stored: tuple[int, ...]) -> None:
    """Directly, since the setter of ``n_modes`` would hand constructor units on to the layers."""
    part._n_modes = type(part._n_modes)(units)
    remember(part, n_modes=part._n_modes)
    if getattr(part, "max_n_modes", None) is not None:
        part.max_n_modes = list(stored)
    record = getattr(part, "_init_kwargs", {})
    if record.get("max_n_modes") is not None:
        remember(part, max_n_modes=list(stored))
