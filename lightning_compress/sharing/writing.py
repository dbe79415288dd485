"""Decisions about shared values as parts of a plan, and carrying them out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.codes import Code
from lightning_compress.plans import Plan
from lightning_compress.sharing.build import DTYPES
from lightning_compress.sharing.codes import SharedCode, tensors_of
from lightning_compress.targets import locate


def decision(code: SharedCode) -> dict[str, Any]:
    """A code as a part of a plan; short floating-point types are no tensors there, so these go as float32.

    Args:
        code: of a weight.

    Returns:
        What ``code_of`` reads.
    """
    arrays = tensors_of(code)
    short = {name: t for name, t in arrays.items() if t.dtype in (torch.float16, torch.bfloat16)}
    return {
        "kind": code.kind,
        "config": code.config(),
        "arrays": arrays | {name: t.float() for name, t in short.items()},
        "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in short.items()},
    }


def code_of(decided: dict[str, Any]) -> SharedCode:
    """Inverse of ``decision``.

    Args:
        decided: what it returned, perhaps forged.

    Returns:
        The code.

    Raises:
        KeyError: a part is missing or unknown.
        TypeError: a part is of a wrong type.
    """
    arrays = dict(decided["arrays"])
    for name, dtype in decided["dtypes"].items():
        arrays[name] = arrays[name].to(DTYPES[dtype])
    code = Code.registry[decided["kind"]].restore(arrays, decided["config"])
    if not isinstance(code, SharedCode):
        raise TypeError(f"{decided['kind']!r} is no code of shared values")
    return code


def carry_out(model: nn.Module, plan: Plan) -> None:
    """Write the shared values in place and attach the codes.

    Args:
        model: the model of the plan, or a fresh one.
        plan: of ``ShareWeights``.

    Raises:
        ValueError: the model has no such weight, or of another shape, or a decision is malformed; nothing is written
            then.
    """
    todo: list[tuple[nn.Module, str, nn.Parameter, Tensor, SharedCode]] = []
    for key, decided in plan.layers.items():
        try:
            module, weight = locate(model, decided["layer"], decided["param"])
            code = code_of(decided)
            value = code.project(weight.detach())
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            raise ValueError(f"the decision about {key!r} does not fit this model: {error!r}.") from error
        if value.shape != weight.shape:
            raise ValueError(
                f"the plan has a code of shape {tuple(value.shape)} for {key} of shape {tuple(weight.shape)}: apply it "
                "to the architecture it was made for."
            )
        todo.append((module, decided["param"], weight, value, code))
    with torch.no_grad():
        for module, param, weight, value, code in todo:
            weight.copy_(value)
            codes.attach(module, param, code)
