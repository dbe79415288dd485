"""What a transform decided, per layer, and how that is written as JSON."""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.functional.masks import pack_bits, unpack_bits

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
}


@dataclass(frozen=True)
class Plan:
    """Decisions of a transform.

    Args:
        layers: full parameter (or layer) name -> decisions: tensors, numbers, strings, lists, dicts.
        skipped: full parameter name -> why it is left alone.
        identity: True if the plan is known to change nothing and that is no fault (strength zero, or
            already reached).
        data: which calibration inputs were used, in words.

    Examples:
        >>> plan = Plan({"fc.weight": {"mask": torch.tensor([True, False])}})
        >>> from_json(to_json(plan)).layers["fc.weight"]["mask"].tolist()
        [True, False]
    """

    layers: dict[str, dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)
    identity: bool = False
    data: str = ""


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; tensors become ``{"dtype", "shape", "zlib"}`` with base64 text.

    Args:
        plan: a plan of tensors, numbers, strings, lists and dicts.

    Returns:
        What ``from_json`` reads.

    Raises:
        TypeError: a value of another type.
    """
    return {
        "layers": {name: _encode(decisions) for name, decisions in plan.layers.items()},
        "skipped": plan.skipped,
        "identity": plan.identity,
        "data": plan.data,
    }


def from_json(value: Mapping[str, Any]) -> Plan:
    """Inverse of ``to_json``.

    Args:
        value: JSON values.

    Returns:
        The plan.

    Raises:
        ValueError: a field is missing, of the wrong type, or a tensor does not have its declared size.
    """
    try:
        layers = {str(name): dict(_decode(decisions)) for name, decisions in value["layers"].items()}
        skipped = {str(k): str(v) for k, v in value["skipped"].items()}
        return Plan(layers, skipped, bool(value["identity"]), str(value["data"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a stored plan is malformed: {error!r}.") from None


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = pack_bits(value) if value.dtype == torch.bool else value.detach().cpu().contiguous()
        raw = zlib.compress(data.numpy().tobytes(), 9)
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "zlib": base64.b64encode(raw).decode("ascii"),
        }
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a plan holds tensors, numbers, strings, lists and dicts, not {type(value).__name__}.")


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return (
            _tensor(value)
            if set(value) == {"dtype", "shape", "zlib"}
            else {k: _decode(v) for k, v in value.items()}
        )
    return [_decode(v) for v in value] if isinstance(value, list) else value


def _tensor(value: Mapping[str, Any]) -> Tensor:
    shape = [int(s) for s in value["shape"]]
    if value["dtype"] not in _DTYPES or any(s < 0 for s in shape):
        raise ValueError(f"a stored plan holds a tensor of dtype {value['dtype']!r} and shape {shape}.")
    dtype = _DTYPES[value["dtype"]]
    size = (math.prod(shape) + 7) // 8 if dtype == torch.bool else math.prod(shape) * dtype.itemsize
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(base64.b64decode(value["zlib"], validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"a stored plan holds a damaged tensor: {error}.") from None
    if len(raw) != size or not stream.eof:
        raise ValueError(
            f"a stored plan holds a tensor of {len(raw)} bytes where shape {shape} needs {size}."
        )
    data = np.frombuffer(raw, dtype=np.uint8).copy()
    if dtype == torch.bool:
        return unpack_bits(torch.from_numpy(data), shape)
    return torch.from_numpy(data).view(dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)
