"""What an analysis starts from: the forms in which a model is given, and the inputs that it is judged on."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import archive
from lightning_compress.analysis.bare import REBUILD, Chain, holder, stripped
from lightning_compress.checkpoints import load_weights, read_tensors
from lightning_compress.stats import Calibration
from lightning_compress.stats.drawing import one_sample, sample_count, take_samples
from lightning_compress.stats.running import call, evaluating, first_tensor, move
from lightning_compress.stats.samplers import Sampler, choose_kind, synthesize

NO_ARCHITECTURE = "no architecture given: pass model="
BATCH = 64
CALIBRATION = 256  # inputs that methods look at
STOCK = 192  # images that are matched to BatchNorm statistics: minutes for a ResNet
Source = nn.Module | Mapping[str, Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class Subject:
    """The model of an analysis.

    Args:
        model: to be compressed; with weights alone it cannot run.
        name: in reports.
        runs: whether it can.
        notes: what was assumed.
    """

    model: nn.Module
    name: str
    runs: bool
    notes: tuple[str, ...] = ()


def read(source: Source | None, model: nn.Module | None = None, rebuild: str | None = None) -> Subject:
    """The model from any form in which it is given.

    Args:
        source: a module; a path of an ``.lcz``, ``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt`` file, no code in which
            is run; or a state dict.
        model: the architecture, for weights; without one they are all that is analyzed.
        rebuild: "mlp:tanh" (or another activation) makes a plain chain of Linear layers of the weights.

    Returns:
        The model; the given ones are left as they are.

    Raises:
        ValueError: nothing is given, a file cannot be read or does not fit, or a chain cannot be built.

    Examples:
        >>> from lightning_compress.analysis.inputs import read
        >>> read(nn.Linear(2, 1).state_dict()).runs, read(nn.Linear(2, 1)).runs
        (False, True)
    """
    if source is None and model is None:
        raise ValueError("give a model, or the path of its weights.")
    if isinstance(source, nn.Module) and model is not None:
        raise ValueError("two models are given: model= is the architecture for weights.")
    if source is None or isinstance(source, nn.Module):
        given = model if source is None else source
        assert given is not None
        return Subject(given, type(given).__name__, True)
    if model is not None:
        filled = load_weights(copy.deepcopy(model), _readable(source))
        return Subject(filled, type(model).__name__, True)
    tensors = stripped(_tensors(source))
    if rebuild is None:
        return Subject(holder(tensors), "state dict", False, (f"{NO_ARCHITECTURE} for output errors.",))
    if not rebuild.startswith(REBUILD):
        raise ValueError(f"rebuild={rebuild!r}: allowed is 'mlp:' and an activation, such as 'mlp:tanh'.")
    activation = rebuild.removeprefix(REBUILD)
    chain = Chain(tensors, activation)
    words = f"rebuilt from a state dict as {len(chain.chain)} Linear layers with {activation} between them."
    return Subject(chain, "rebuilt MLP", True, (words,))


def _readable(source: Any) -> Any:
    return dict(source) if isinstance(source, Mapping) else Path(source)


def _tensors(source: Any) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        inner = next((source[k] for k in ("state_dict", "model_state_dict", "model") if k in source), source)
        found = {name: t for name, t in inner.items() if isinstance(t, Tensor)}
        if not found:
            raise ValueError("the mapping holds no tensors by name: give model.state_dict().")
        return found
    if Path(source).suffix == ".lcz":
        return archive.load_tensors(source)
    return read_tensors(source)


@dataclass(frozen=True)
class Inputs:
    """What a model is judged on, and what methods may look at.

    Args:
        example: one input.
        batches: to judge by, on the CPU.
        calibration: (input, label or None) pairs for methods, on the CPU.
        words: where they come from.
        sampler: of drawn inputs; None for given ones.
    """

    example: Any
    batches: tuple[Any, ...]
    calibration: tuple[tuple[Any, Any], ...]
    words: str
    sampler: Sampler | None

    @property
    def count(self) -> int:
        """Inputs to judge by."""
        return sum(sample_count(batch) for batch in self.batches)

    def digest(self) -> str:
        """Short name of their bytes."""
        joined = hashlib.sha256()
        for tensor in _leaves(self.batches):
            joined.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            joined.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return joined.hexdigest()[:16]


def gather(
    model: nn.Module,
    example_input: Any = None,
    data: Any = None,
    sampler: str | Callable[[int, torch.Generator], Any] = "auto",
    samples: int = 1000,
    seed: int = 0,
) -> Inputs:
    """Inputs for a model: given ones, or drawn ones.

    Args:
        model: it must run.
        example_input: one input or several; None takes the model's ``example_input_array``, or the first of ``data``.
        data: batches, a loader or a tensor; None draws.
        sampler: as ``stats.samplers.synthesize`` takes it.
        samples: at most so many.
        seed: of drawn inputs.

    Returns:
        The inputs; of drawn ones those to judge by are others than those that methods look at.

    Raises:
        ValueError: there is nothing to draw like; the model does not run on the inputs, or returns NaN.

    Examples:
        >>> from lightning_compress.analysis.inputs import gather
        >>> found = gather(nn.Linear(20, 5), torch.zeros(1, 20), samples=100)
        >>> found.count, found.words
        (100, 'synthetic: normal, 100 inputs, seed 0 (...)')
    """
    if samples < 1:
        raise ValueError(f"samples={samples}: at least 1 is needed.")
    given = getattr(model, "example_input_array", None) if example_input is None else example_input
    if given is None and isinstance(model, Chain):
        given = torch.zeros(1, model.in_features)
    if given is None and data is None and not callable(sampler):
        raise ValueError(
            "inputs are needed to run the model, and their shape is not guessed: give example_input= (one input with "
            "its batch axis, such as torch.zeros(1, 3, 32, 32)), data= (batches or a loader), or input_sampler= (a "
            "function (n, generator) -> inputs)."
        )
    if data is not None:
        pairs = _cpu(Calibration(given, data, samples, seed).pairs(model))
        batches = tuple(x for x, _ in pairs)
        count = sum(map(sample_count, batches))
        first = one_sample(batches[0] if given is None else given)
        found = Inputs(first, batches, _first(pairs, CALIBRATION), f"given data, {count} inputs", None)
    else:
        if given is not None:
            _check_runs(model, one_sample(given), "example_input")
        draws = sampler_for(model, sampler, given, seed)
        drawn, looked_at = draws.held_out()(samples), draws(CALIBRATION)
        batches = tuple(_split(drawn))
        first = one_sample(batches[0] if given is None else given)
        why = f" ({draws.reason})" if draws.reason else ""
        words = f"synthetic: {draws.name}, {samples} inputs, seed {seed}{why}"
        found = Inputs(first, batches, tuple((x, None) for x in _split(looked_at)), words, draws)
    _check_runs(model, found.batches[0], "inputs")
    return found


def sampler_for(
    model: nn.Module, kind: str | Callable[[int, torch.Generator], Any], example: Any, seed: int
) -> Sampler:
    """The sampler of an analysis: as ``synthesize`` makes it, with a smaller stock of images.

    Args:
        model: it must run.
        kind: as ``synthesize`` takes it.
        example: one input or several; None only with a function.
        seed: of what is drawn.

    Returns:
        The sampler.
    """
    reason = ""
    if kind == "auto":
        kind, reason = choose_kind(model, example)
    options: dict[str, Any] = {"pool": STOCK} if isinstance(kind, str) and "bn_stats" in kind else {}
    made = synthesize(model, kind, example, seed=seed, **options)
    return replace(made, reason=reason) if reason else made


def _split(drawn: Any) -> Iterator[Any]:
    count = sample_count(drawn)
    for start in range(0, count, BATCH):
        yield move(take_samples(drawn, count, start, min(start + BATCH, count)), torch.device("cpu"))


def _cpu(pairs: Iterator[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return [(move(x, torch.device("cpu")), move(y, torch.device("cpu"))) for x, y in pairs]


def _first(pairs: list[tuple[Any, Any]], most: int) -> tuple[tuple[Any, Any], ...]:
    """As many whole batches as it takes for so many inputs."""
    kept = []
    for x, y in pairs:
        kept.append((x, y))
        most -= sample_count(x)
        if most <= 0:
            break
    return tuple(kept)


def _check_runs(model: nn.Module, x: Any, what: str) -> None:
    """Refuse inputs that the model does not take, before any work."""
    shapes = ", ".join(str(tuple(t.shape)) for t in _leaves(x)) or type(x).__name__
    try:
        with evaluating(model):
            y = first_tensor(call(model, x))
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on {what} of shape {shapes}: {error} Give "
            "example_input= with the shape that it takes (with a batch axis), or data=."
        ) from error
    if y is not None and not bool(torch.isfinite(y).all()):
        bad = int((~torch.isfinite(y)).sum())
        raise ValueError(
            f"{type(model).__name__} returns {bad} of {y.numel()} values that are not finite on {what} of shape "
            f"{shapes}: repair the weights, or give inputs that it is meant for."
        )


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
