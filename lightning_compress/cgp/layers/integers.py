"""The int8 weights of a quantized layer, and the weight that some other integers would be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.cgp.gates.functions import Int8
from lightning_compress.codes import Code
from lightning_compress.targets import parameter

QUANTIZE = "quantize first: Quantize(8)"


def base_of(code: Code) -> Code:
    """The code of the integers: that below a circuit, or the code itself.

    Args:
        code: of a weight.

    Returns:
        A code whose ``arrays`` hold the integers as "codes".
    """
    return cast(Code, getattr(code, "base", code))


def read_int8(module: nn.Module, param: str) -> tuple[Int8, Code]:
    """The integers of a weight.

    Args:
        module: the layer.
        param: parameter name inside the layer.

    Returns:
        int8 in the shape of the weight (complex numbers have one more axis of 2), and the code that makes weights of
        them.

    Raises:
        ValueError: the weight has no such code, has left it, or it is none of 2 to 8 bits around zero.

    Examples:
        >>> from lightning_compress.cgp.layers.integers import read_int8
        >>> net = compress(nn.Sequential(nn.Linear(4, 2)), [Quantize(8)]).model
        >>> read_int8(net[0], "weight")[0].shape
        (2, 4)
    """
    code, weight = codes.read(module, param), parameter(module, param).detach()
    if code is None or isinstance(code, codes.Mask):
        raise ValueError(QUANTIZE)
    base = base_of(code)
    if not code.matches(weight):
        raise ValueError(f"it has left the values of its {code.kind} code since: {QUANTIZE}")
    arrays = base.arrays(weight)
    found = arrays.get("codes")
    if not hasattr(base, "qmin") or found is None or "zero_point" in arrays:
        raise ValueError(
            f"it is stored as {code.kind}, not as integers around zero: {QUANTIZE}, with symmetric=True"
        )
    if getattr(base, "width", 0) == 1:
        raise ValueError("its integers have one bit, which is their sign: there is nothing to compute")
    if found.dtype != torch.int8:
        raise ValueError(f"it is stored as {found.dtype}, more than 8 bits: {QUANTIZE}")
    return found.numpy(), base


def all_int8(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Int8, Code]]:
    """Every weight of a model that has int8 values.

    Args:
        model: any module.

    Yields:
        Full parameter name, layer, parameter name inside the layer, the integers, and the code that makes weights of
        them.

    Examples:
        >>> from lightning_compress.cgp.layers.integers import all_int8
        >>> net = compress(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)), [Quantize(8, exclude="0")]).model
        >>> [key for key, *_ in all_int8(net)]
        ['1.weight']
    """
    for key, module, param, _ in codes.of(model):
        try:
            yield key, module, param, *read_int8(module, param)
        except ValueError:
            continue


def find_int8(model: nn.Module, name: str, what: str = "layer") -> tuple[str, Int8, Code]:
    """The int8 weights of one layer, by name.

    Args:
        model: any module.
        name: of the layer, or the full name of the parameter.
        what: how an error calls it.

    Returns:
        Full parameter name, the integers, and the code that makes weights of them.

    Raises:
        ValueError: there is no such layer, it has several weights, or it is not quantized; names those there are.
    """
    found = [entry for entry in all_int8(model) if name in (entry[0], entry[0].rpartition(".")[0])]
    if len(found) == 1:
        return found[0][0], *found[0][3:]
    if found:
        raise ValueError(
            f"{what} {name!r} has several weights: name one of {', '.join(key for key, *_ in found)}."
        )
    named = [key.rpartition(".")[0] or key for key, *_ in all_int8(model)]
    there = f"layers with int8 weights: {', '.join(named) or 'none'}"
    known = {key for key, _ in model.named_parameters()} | {key for key, _ in model.named_modules()}
    if name in known:
        raise ValueError(f"{what} {name!r} has no int8 weights: {QUANTIZE}; {there}.")
    raise ValueError(f"{what} {name!r} is unknown; {there}.")


def tensors_of(base: Code) -> dict[str, Tensor]:
    """What a code needs besides the integers."""
    return {name: value for name, value in vars(base).items() if isinstance(value, Tensor)}


def widened(base: Code, values: Int8) -> Code:
    """The code with a grid that holds some integers.

    Args:
        base: with the attributes ``qmin``, ``qmax`` and ``width``.
        values: at least one.

    Returns:
        The code itself, if its grid holds them.
    """
    held: Any = base
    low, high = min(held.qmin, int(values.min())), max(held.qmax, int(values.max()))
    if (low, high) == (held.qmin, held.qmax):
        return base
    width = max(held.width, 1 + max(high.bit_length(), (-1 - low).bit_length()))
    return cast(Code, dataclasses.replace(held, qmin=low, qmax=high, width=width))


def weight_of(base: Code, values: Int8, dtype: torch.dtype) -> tuple[Tensor, Code]:
    """The weight that integers stand for; scales stay.

    Args:
        base: what ``read_int8`` returned, of the same weight.
        values: int8, shape of the integers.
        dtype: of the weight.

    Returns:
        The weight on the CPU, and its code: ``base``, or one with a larger grid if values are outside.

    Examples:
        >>> from lightning_compress.cgp.layers.integers import read_int8, weight_of
        >>> layer = compress(nn.Sequential(nn.Linear(4, 2)), [Quantize(8)]).model[0]
        >>> values, base = read_int8(layer, "weight")
        >>> torch.equal(weight_of(base, values, torch.float32)[0], layer.weight)
        True
    """
    code = widened(base, values)
    integers = torch.from_numpy(np.ascontiguousarray(values))
    return code.rebuild({**tensors_of(code), "codes": integers}, dtype), code
