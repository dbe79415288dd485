"""Carrying out a quantization plan: all of it is checked first, then weights, codes and quantizers are put in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.codes import Code
from lightning_compress.functional.freeing import Freeing
from lightning_compress.names import clean
from lightning_compress.plans import Plan
from lightning_compress.quantization.layers import quantize_input
from lightning_compress.quantization.quantizers import InputQuantizer
from lightning_compress.targets import locate, parameter


def carry_out(model: nn.Module, plan: Plan) -> None:
    """Write weights and biases in place, attach the codes, and put the quantizers into the layers.

    Args:
        model: the model of the plan, or a fresh one.
        plan: of ``Quantize``.

    Raises:
        ValueError: the model has no such layer, or of another shape, or a decision is malformed; nothing is written
            then.
    """
    todo: list[tuple[nn.Module, str, Mapping[str, Any]]] = []
    quantizers: list[tuple[nn.Module, InputQuantizer, bool]] = []
    modules = {clean(name): module for name, module in model.named_modules()}
    for key, entry in plan.layers.items():
        decided: Mapping[str, Any] = entry
        try:
            if "param" not in decided:
                module = modules[decided["layer"]]
                for slot in ("input_quantizer", "output_quantizer"):
                    if slot in decided:
                        quantizer = InputQuantizer(**decided[slot])
                        quantizers.append((module, quantizer, slot == "output_quantizer"))
                continue
            module, weight = locate(model, decided["layer"], decided["param"])
            _check_shape(weight, tuple(decided.get("shape", weight.shape)))
            _check_shape(
                weight, decided_value(decided, weight)[0].shape
            )  # made once more below: not all at once
            if "bias" in decided:
                _check_shape(parameter(module, "bias"), decided["bias"].shape)
            todo.append((module, decided["param"], decided))
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"the decision about {key!r} does not fit this model: {error!r}.") from error
    freeing = Freeing()
    for module, param, decided in todo:
        weight = parameter(module, param)
        freeing.worked_on(weight.nbytes)
        value, code = decided_value(decided, weight)
        with torch.no_grad():
            weight.copy_(value)
            if "bias" in decided:
                parameter(module, "bias").copy_(decided["bias"])
        if code is not None:
            codes.attach(module, param, code)
    for module, quantizer, output in quantizers:
        device = next((p.device for p in module.parameters()), None)
        quantize_input(module, quantizer.to(device), output)


def decided_value(decided: Mapping[str, Any], weight: Tensor) -> tuple[Tensor, Code | None]:
    """What a weight becomes, and its code.

    Args:
        decided: about it. Without codes among its arrays, they are those of the nearest values of the grid.
        weight: as it is now.

    Returns:
        The value, on the CPU where it has a code, and the code; None for a weight that is left in float.
    """
    if "value" in decided:
        return decided["value"], None
    arrays = decided["arrays"]
    code = Code.registry[decided["kind"]].restore(arrays, decided["config"])
    arrays = arrays if "codes" in arrays else code.arrays(weight)
    return code.rebuild(arrays, weight.dtype), code


def _check_shape(tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"the plan has a value of shape {tuple(shape)} for a parameter of shape {tuple(tensor.shape)}: apply it to "
            "the architecture it was made for."
        )


def other_changes(
    model: nn.Module, work: nn.Module, layers: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What equalization changed besides the targets' weights: biases, and weights that are left in float.

    Args:
        model: before.
        work: a copy, after.
        layers: decisions about the targets.

    Returns:
        Parameter name -> decision.
    """
    after = {clean(name): p.detach() for name, p in work.named_parameters()}
    changed: dict[str, dict[str, Any]] = {}
    corrected = {f"{d['layer']}.bias" if d["layer"] else "bias" for d in layers.values() if "bias" in d}
    for raw, before in model.named_parameters():
        name = clean(raw)
        if name not in layers and name not in corrected and not torch.equal(before, after[name]):
            layer, _, param = name.rpartition(".")
            changed[name] = {"layer": layer, "param": param, "value": after[name].cpu().clone()}
    return changed
