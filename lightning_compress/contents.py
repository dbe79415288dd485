"""What of a model goes into an archive, and how it comes out: tensors and codes <-> header and streams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress import codes, transform
from lightning_compress.codes import Code, same_bits
from lightning_compress.container import Coded, Header, Payload, Reader
from lightning_compress.functional.arrays import CARRIERS, Array, Words, typed
from lightning_compress.names import clean
from lightning_compress.targets import locate
from lightning_compress.transform import Step

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in CARRIERS}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


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


def encode(model: nn.Module, coder: str, metadata: Any) -> tuple[Header, list[bytes]]:
    """Encode everything: a tensor through the code attached to it, unless that is stale, or as it is.

    Args:
        model: any module.
        coder: "auto" or a key of ``CODERS``.
        metadata: JSON value.

    Returns:
        The header and all streams in order.
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

    payload, coded = Payload(coder), []
    stale: dict[str, str] = {}
    for name, (param, code) in attached.items():
        if name in aliases:
            continue
        arrays = _fields(code, state.get(name))
        if arrays is None:
            stale[name] = f"its {code.kind} code does not give its bits any more and was not used"
            continue
        kept = tuple(payload.store(key, *_parts(value), pool=key) for key, value in arrays.items())
        whole = Array(name, *_parts(state[name])[:2])
        config = {key: value for key, value in code.config().items() if key != "shape"}  # the tensor's: once
        coded.append(Coded(whole, code.kind, param, config, kept))
    left = state.keys() - aliases.keys() - {c.tensor.name for c in coded}
    plain = tuple(payload.store(n, *_parts(t), pool="") for n, t in state.items() if n in left)
    applied = tuple((part, step.to_json()) for part, step in transform.applied(model))
    shared = payload.pools()
    header = Header(
        "lightning_compress", tuple(coded), plain, shared, aliases, skipped, stale, applied, metadata
    )
    return header, payload.chunks


def _fields(code: Code, weight: Tensor | None) -> dict[str, Tensor] | None:
    """The fields of a code, unless it is stale."""
    if not isinstance(weight, nn.Parameter):  # replaced since
        return None
    try:
        arrays = code.arrays(weight)
        return arrays if same_bits(code.rebuild(arrays, weight.dtype), weight) else None
    except (IndexError, RuntimeError, ValueError):  # such as a mask of another shape
        return None


def decode(reader: Reader) -> Iterator[tuple[str, Tensor, Code | None]]:
    """Decode everything, one tensor at a time.

    Args:
        reader: of the file.

    Yields:
        Name, value and code of a tensor.

    Raises:
        ValueError: streams are damaged, or a code is unknown or does not give what is declared; names the tensor.
    """
    for coded in reader.header.coded:
        whole = coded.tensor
        with _about(whole.name):
            arrays = {
                array.name: _tensor(reader.words(array, pool=array.name), array) for array in coded.arrays
            }
            code = Code.registry[coded.kind].restore(arrays, coded.config | {"shape": whole.shape})
            tensor = code.rebuild(arrays, _DTYPES[whole.dtype])
            if tensor.dtype != _DTYPES[whole.dtype] or tuple(tensor.shape) != whole.shape:
                raise ValueError(f"its code gives {tensor.dtype} {tuple(tensor.shape)}, not {whole.shape}")
        yield whole.name, tensor, code
    for array in reader.header.tensors:
        with _about(array.name):
            tensor = _tensor(reader.words(array, pool=""), array)
        yield array.name, tensor, None


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
            return 8 * math.prod(
                abs(typed(n, int, "extent")) for n in typed(value.get("shape"), list, "shape")
            )
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return sum(map(size, inner))

    most = 4 * sum(tensor.nbytes for tensor in state_of(model)[0].values()) + 2**20
    for _, step in header.applied:
        if size(step) > most:
            raise ValueError(
                f"step {step.get('name')!r} declares {size(step):,} bytes of decisions; allowed are {most:,}"
            )


def check_fit(header: Header, model: nn.Module, steps: Sequence[tuple[str, Step]]) -> list[tuple[str, str]]:
    """Compare everything declared with a model.

    Args:
        header: of the file.
        model: the model to load into, with the structure that the steps give it.
        steps: all applied steps.

    Returns:
        Pairs of stored tensors that are one tensor in the model, and so must be equal.

    Raises:
        ValueError: names, dtypes or shapes differ, or a code or the place of a step is unknown.
    """
    state, _ = state_of(model)
    kind = type(model).__name__
    stored = {array.name: array for array in header.described}
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
    for coded in header.coded:
        if coded.kind not in Code.registry:
            known = ", ".join(Code.registry)
            raise ValueError(f"{coded.tensor.name!r} has the unknown code {coded.kind!r}; known: {known}")
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
