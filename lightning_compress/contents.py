"""What of a model goes into an archive, and how it comes out: tensors and codes <-> header and streams."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress import codes, transform
from lightning_compress.codes import Code
from lightning_compress.container import Reader, Writer
from lightning_compress.functional.arrays import CARRIERS, Array, Words
from lightning_compress.functional.freeing import Freeing
from lightning_compress.functional.headers import Header, Stored
from lightning_compress.names import clean
from lightning_compress.targets import locate
from lightning_compress.transform import Step

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in CARRIERS}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SMALL_PLAN = 1 << 20  # bytes
_STALE = "its {} code does not give its bits any more and was not used"


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What is stored of a model, and what is not.

    Args:
        model: any module, also compiled or wrapped.

    Returns:
        Clean name -> the model's own parameter or persistent buffer; other entry of the state dict, or parameter
        that it lacks -> reason.

    Raises:
        ValueError: a tensor has no values, or a dtype that the format does not know.
    """
    held = {id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
    state: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for raw, value in model.state_dict(keep_vars=True).items():
        name = clean(raw)
        if not isinstance(value, Tensor):
            skipped[name] = f"{type(value).__name__}, not a tensor"
        elif id(value) not in held:
            skipped[name] = "neither a parameter nor a buffer of the model"
        elif name in state:
            raise ValueError(f"two tensors of the model are called {name!r}")
        elif is_lazy(value):
            raise ValueError(f"{name!r} has no shape yet (lazy layer): run one forward pass first")
        elif value.is_meta:
            raise ValueError(
                f"{name!r} is on the meta device, so it has no values: initialize the model first"
            )
        elif value.layout != torch.strided or value.dtype not in _NAMES:
            known = f"dense tensors of {', '.join(CARRIERS)}"
            raise ValueError(
                f"{name!r} has dtype {value.dtype} and layout {value.layout}; allowed are {known}"
            )
        else:
            state[name] = value
    stored = {id(value) for value in state.values()}
    hidden = (name for name, value in model.named_parameters() if id(value) not in stored)
    return state, skipped | {clean(name): "a parameter that is not in the state dict" for name in hidden}


def _storage(tensor: Tensor) -> Any:
    """A key that tied tensors share."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _parts(tensor: Tensor) -> tuple[str, tuple[int, ...], Words]:
    """Dtype, shape and bits."""
    name = _NAMES[tensor.dtype]
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return name, tuple(tensor.shape), flat.view(torch.uint8).numpy().view(CARRIERS[name])


def _tensor(words: Words, array: Array) -> Tensor:
    return torch.from_numpy(words.view(np.uint8)).view(_DTYPES[array.dtype]).reshape(array.shape)


def digest(tensor: Tensor) -> bytes:
    """Of the bits of a tensor."""
    words = _parts(tensor)[2]
    return hashlib.blake2b(words.data if words.size else b"", digest_size=16).digest()


def encode(model: nn.Module, writer: Writer, metadata: Any) -> Header:
    """Write everything: a tensor through the code attached to it, unless that is stale, or as it is.

    One tensor is encoded at a time, and its streams are written at once.

    Args:
        model: any module.
        writer: of the file.
        metadata: JSON value.

    Returns:
        The header, which the writer completes.
    """
    state, skipped = state_of(model)
    attached = {name: (param, code) for name, _, param, code in codes.of(model)}
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(_storage(tensor), []).append(name)
    aliases: dict[str, str] = {}
    for names in groups.values():
        first = next((name for name in names if name in attached), names[0])
        aliases |= {name: first for name in names if name != first}

    stale = {name: _STALE.format(code.kind) for name, (_, code) in attached.items() if name not in state}
    stored, freeing = [], Freeing()
    for name, tensor in state.items():
        if name in aliases:
            continue
        freeing.worked_on(tensor.nbytes)
        param, code = attached.get(name, ("", None))
        arrays = None if code is None else _fields(code, tensor)
        dtype, shape, words = _parts(tensor)
        if code is not None and arrays is None:
            stale[name] = _STALE.format(code.kind)
        if code is None or arrays is None:
            stored.append(Stored(writer.store(name, dtype, shape, words, pool="")))
            continue
        kept = tuple(writer.store(key, *_parts(value), pool=key) for key, value in arrays.items())
        depth = param.count(".") + 1
        config = {key: value for key, value in code.config().items() if key != "shape"}  # the tensor's: once
        stored.append(Stored(Array(name, dtype, shape), code.kind, depth, config, kept))
    steps = tuple((part, _options(step).to_json()) for part, step in transform.applied(model))
    return Header(
        tuple(stored), aliases=aliases, steps=steps, skipped=skipped, stale=stale, metadata=metadata
    )


def _options(step: Step) -> Step:
    """The step with those options that differ from the defaults."""
    usual = transform.Transform.registry[step.name]().config()
    return replace(step, config={k: v for k, v in step.config.items() if k not in usual or usual[k] != v})


def _fields(code: Code, weight: Tensor) -> dict[str, Tensor] | None:
    """The fields of a code, unless it is stale."""
    if not isinstance(weight, nn.Parameter):  # replaced since
        return None
    try:
        arrays = code.arrays(weight)
        return arrays if code.holds(arrays, weight) else None
    except (IndexError, RuntimeError, ValueError):  # such as a mask of another shape
        return None


def decode(stored: Stored, reader: Reader) -> tuple[Tensor, Code | None]:
    """Decode one tensor.

    Args:
        stored: its description.
        reader: of the file.

    Returns:
        Value and code.

    Raises:
        ValueError: streams are damaged, or a code is unknown or does not give what is declared; names the tensor.
    """
    whole = stored.tensor
    with _about(whole.name):
        if not stored.kind:
            return _tensor(reader.words(whole, pool=""), whole), None
        if stored.kind not in Code.registry:
            raise ValueError(f"unknown code {stored.kind!r}; known: {', '.join(Code.registry)}")
        arrays = {a.name: _tensor(reader.words(a, pool=a.name), a) for a in stored.fields}
        code = Code.registry[stored.kind].restore(arrays, stored.config | {"shape": whole.shape})
        tensor = code.rebuild(arrays, _DTYPES[whole.dtype])
        if tensor.dtype != _DTYPES[whole.dtype] or tuple(tensor.shape) != whole.shape:
            raise ValueError(f"its code gives {tensor.dtype} {tuple(tensor.shape)}, not {whole.shape}")
        return tensor, code


@contextmanager
def _about(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name!r}: {type(error).__name__}: {error}") from error


def check_plans(header: Header, model: nn.Module) -> None:
    """Refuse steps whose decisions are out of proportion to the model, before they are unpacked.

    Args:
        header: of the file.
        model: the model to load into.

    Raises:
        ValueError: the step declares too many bytes.
    """

    def size(value: Any) -> int:
        if isinstance(value, dict) and "zlib" in value:  # a tensor, as plans.to_json writes it
            extents = value.get("shape")
            if not isinstance(extents, list) or not all(type(n) is int for n in extents):
                raise ValueError(f"a stored plan holds a tensor of shape {extents!r:.60}")
            return 8 * math.prod(abs(int(n)) for n in extents)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return sum(map(size, inner))

    for _, step in header.steps:
        declared = size(step["plan"])
        if declared <= _SMALL_PLAN:
            continue
        most = 4 * sum(tensor.nbytes for tensor in state_of(model)[0].values()) + _SMALL_PLAN
        if declared > most:
            raise ValueError(
                f"step {step['name']!r} declares {declared:,} bytes of decisions; allowed are {most:,}"
            )


def check_fit(
    header: Header, model: nn.Module, state: dict[str, Tensor], steps: Sequence[tuple[str, Step]]
) -> list[tuple[str, str]]:
    """Compare everything declared with a model.

    Args:
        header: of the file.
        model: the model to load into, with the structure that the steps give it.
        state: what is stored of it.
        steps: all applied steps.

    Returns:
        Pairs of stored tensors that are one tensor in the model, and so must be equal.

    Raises:
        ValueError: names, dtypes or shapes differ, or a code or the place of a step is unknown.
    """
    kind = type(model).__name__
    stored = {s.tensor.name: s.tensor for s in header.tensors}
    stored |= {alias: stored[name] for alias, name in header.aliases.items()}
    missing, extra = [n for n in stored if n not in state], [n for n in state if n not in stored]
    if missing or extra:
        raise ValueError(
            f"{kind} lacks {len(missing)} stored tensors {missing[:4]} and has {len(extra)} that are not stored, "
            f"{extra[:4]}: give a model of the architecture that was saved"
        )
    for name, array in stored.items():
        given = _NAMES[state[name].dtype], tuple(state[name].shape)
        if given != (array.dtype, array.shape):
            raise ValueError(
                f"{name!r} is {array.dtype} {array.shape} here, but {given[0]} {given[1]} in {kind}"
            )
    for coded in header.tensors:
        if coded.kind and coded.kind not in Code.registry:
            known = ", ".join(Code.registry)
            raise ValueError(f"{coded.tensor.name!r} has the unknown code {coded.kind!r}; known: {known}")
        if coded.kind:
            locate(model, coded.layer, coded.param)
    parts = {clean(name) for name, _ in model.named_modules()}
    for part, step in steps:
        if part not in parts:
            raise ValueError(f"{step.name} was applied to {part!r}, which {kind} does not have")
    first: dict[Any, str] = {}
    pairs = [
        (first.setdefault(_storage(state[name]), array.name), array.name) for name, array in stored.items()
    ]
    return [(one, other) for one, other in pairs if one != other]
