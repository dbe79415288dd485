"""Which inputs a method that looks at activations gets: given data, or inputs drawn like an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional import sampling
from lightning_compress.stats.running import device_of, first_tensor, move
from lightning_compress.stats.synthesis import can_match, match_batchnorm


@dataclass(frozen=True)
class Calibration:
    """Where the inputs of methods that look at activations come from.

    Args:
        example_input: one input (tensor, tuple of arguments or dict of keyword arguments) that gives shape
            and dtype.
        data: an iterable of batches or a DataLoader (a batch is a tensor, ``(inputs, labels, ...)`` or a
            dict), one tensor or dict as the only batch, a sampler name ("normal", "grf", "batchnorm"), or a
            function ``f(n, generator) -> batch``. None makes inputs shaped like ``example_input``: fields
            ("grf") for models with spectral weights, "batchnorm" for models with BatchNorm statistics and one
            real tensor [N, C, ...] as input, otherwise "normal".
        samples: at most so many samples are used.
        seed: seed of drawn and shuffled inputs; the global random state is untouched.
        origin: the model as it was before any method, for the sampler "batchnorm": the present one may have
            lost its BatchNorm. None takes the present one.
        loss: function of the model's output and a batch's labels to a scalar, for methods that look at gradients.

    "normal" draws N(0, 1). "grf" draws Gaussian random fields with the mean and variance of every channel of
    ``example_input``; a channel of two values becomes a thresholded field with the same share of either.
    "batchnorm" optimizes inputs until the BatchNorm layers see the statistics they have stored
    (``stats.match_batchnorm``): it takes from seconds to minutes, once for each seed.
    Integer inputs are drawn from the entries of the example.

    Raises:
        ValueError: unknown sampler name, or ``samples`` below 1.

    Examples:
        >>> calibration = Calibration(example_input=torch.zeros(1, 3, 8, 8), samples=40)
        >>> [batch.shape[0] for batch in calibration.batches(nn.Conv2d(3, 4, 3))]
        [32, 8]
        >>> calibration.describe(nn.Conv2d(3, 4, 3))
        'synthetic:normal n=40 seed=0'
    """

    example_input: Any = None
    data: Any = None
    samples: int = 256
    seed: int = 0
    origin: nn.Module | None = field(default=None, compare=False, repr=False)
    loss: Callable[[Any, Any], Tensor] | None = field(default=None, compare=False)
    # Shape and seed -> the model and what was made from it; copies by `dataclasses.replace` share it.
    _made: dict[Any, tuple[nn.Module, Tensor]] = field(
        default_factory=dict, compare=False, repr=False, kw_only=True
    )

    def __post_init__(self) -> None:
        if isinstance(self.data, str) and self.data not in (*SAMPLERS, _MATCHED):
            names = ", ".join(map(repr, (*SAMPLERS, _MATCHED)))
            raise ValueError(f"data={self.data!r} is no sampler; allowed names: {names}, or give batches.")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: at least 1 is needed.")
        if isinstance(self.data, Iterator):  # could be read only once
            object.__setattr__(self, "data", list(_limited(self.data, self.samples)))

    def batches(self, model: nn.Module) -> Iterator[Any]:
        """Inputs without labels, on the model's device; the same ones at every call.

        Args:
            model: the model they are meant for.

        Yields:
            What ``call`` takes.

        Raises:
            ValueError: neither ``data`` nor ``example_input`` is given, a sampler name comes without
                ``example_input``, or the data holds no batch.
        """
        for inputs, _ in self.pairs(model):
            yield inputs

    def pairs(self, model: nn.Module) -> Iterator[tuple[Any, Any]]:
        """As ``batches``, with the labels of each batch, or None.

        Args:
            model: the model they are meant for.

        Yields:
            Inputs and labels on the model's device.
        """
        device, empty = device_of(model), True
        for batch in _private(_limited(self._source(model), self.samples), self.seed):
            empty = False
            yield move(_split(batch, model), device)
        if empty:
            raise ValueError("data holds no batches: calibration needs at least one sample.")

    def describe(self, model: nn.Module) -> str:
        """Where the inputs come from, for reports.

        Args:
            model: the model they are meant for.

        Returns:
            ``"synthetic:batchnorm n=256 seed=0"`` or ``"data n=256"`` (``"data n<=256"`` if the number of
            samples is not known beforehand).
        """
        sampler = self._sampler(model)
        if sampler is not None:
            given = sampler if isinstance(sampler, str) else getattr(sampler, "__name__", None)
            name = given or type(sampler).__name__
            return f"synthetic:{name} n={self.samples} seed={self.seed}"
        known = getattr(self.data, "dataset", None)
        if isinstance(known, Sized):
            return f"data n={min(self.samples, len(known))}"
        if isinstance(self.data, Tensor | Mapping | Sequence):
            return f"data n={sum(sample_count(b) for b in _limited(self._source(model), self.samples))}"
        return f"data n<={self.samples}"

    @property
    def available(self) -> bool:
        """Whether there is anything to take or to draw inputs from."""
        return self.example_input is not None or (self.data is not None and not isinstance(self.data, str))

    def is_noise(self, model: nn.Module) -> bool:
        """Whether inputs are white noise, which tells how large a layer's inputs are, but not how they correlate.

        Args:
            model: the model they are meant for.

        Returns:
            True for the sampler "normal".
        """
        return bool(self._sampler(model) == "normal")

    def example(self, model: nn.Module) -> Any:
        """One input: the given one, else the first batch of the data; None if there is neither.

        Args:
            model: the model it is meant for.

        Returns:
            What ``call`` takes.
        """
        if self.example_input is not None or not self.available:
            return self.example_input
        return next(iter(self.batches(model)))

    def _sampler(self, model: nn.Module) -> Any:
        """Name or function of the sampler; None for given data."""
        if isinstance(self.data, str):
            return self.data
        if self.data is None:
            if any(p.is_complex() for p in model.parameters()):
                return "grf"
            return _MATCHED if can_match(self._origin(model), self.example_input) else "normal"
        return self.data if callable(self.data) and not isinstance(self.data, Iterable) else None

    def _source(self, model: nn.Module) -> Iterable[Any]:
        sampler = self._sampler(model)
        if sampler is None:
            return [self.data] if isinstance(self.data, Tensor | Mapping) else self.data
        if isinstance(sampler, str) and self.example_input is None:
            raise ValueError(
                "calibration needs inputs: give data= (batches, a loader) or example_input= (to draw inputs)."
            )
        if sampler == _MATCHED:
            return map(_Inputs, torch.split(self._match(self._origin(model)), _BATCH))
        generator = torch.Generator().manual_seed(self.seed)
        sizes = [min(_BATCH, self.samples - start) for start in range(0, self.samples, _BATCH)]
        if isinstance(sampler, str):
            draw = SAMPLERS[sampler]
            return (_Inputs(_like(self.example_input, n, draw, generator)) for n in sizes)
        return (sampler(n, generator) for n in sizes)

    def _origin(self, model: nn.Module) -> nn.Module:
        return model if self.origin is None else self.origin

    def _match(self, model: nn.Module) -> Tensor:
        """Inputs optimized for this model; made once, or again if more are needed."""
        key = self.seed, getattr(self.example_input, "shape", ())[1:]
        owner, made = self._made.get(key, (None, None))
        if made is None or owner is not model or len(made) < self.samples:
            made = match_batchnorm(model, self.example_input, self.samples, seed=self.seed)
            self._made[key] = model, made
        return made[: self.samples]


_MATCHED = "batchnorm"
_Draw = Callable[[Tensor, int, torch.Generator], Tensor]
_BATCH = 32
_LABELS = ("y", "label", "labels", "target", "targets")


@dataclass(frozen=True)
class _Inputs:
    """Drawn inputs: a tuple of them is a tuple of arguments, never (inputs, labels)."""

    value: Any


def sample_count(batch: Any) -> int:
    """Length of the first axis of a batch's first tensor."""
    tensor = first_tensor(batch.value if isinstance(batch, _Inputs) else batch)
    if tensor is None or tensor.dim() == 0:
        raise ValueError(
            "a calibration batch is a tensor, a tuple or a dict of tensors, samples first, not "
            f"{type(batch).__name__}."
        )
    return tensor.shape[0]


def take_samples(value: Any, count: int, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch of ``count``; tensors without a sample axis stay whole."""
    if isinstance(value, Tensor):
        return value[start:stop] if value.dim() and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {k: take_samples(v, count, start, stop) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(take_samples(v, count, start, stop) for v in value)
    return value


def _limited(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    """Batches until ``samples`` samples are reached; the last one is cut."""
    for batch in batches:
        count = sample_count(batch)
        yield batch if count <= samples else take_samples(batch, count, 0, samples)
        samples -= count
        if samples <= 0:
            return


def _private(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """The same items, made while a seeded state replaces the global one, which shuffling loaders use."""
    state = torch.Generator().manual_seed(seed).get_state()
    iterator, end = iter(batches), object()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            batch = next(iterator, end)
            state = torch.get_rng_state()
        if batch is end:
            return
        yield batch


def _split(batch: Any, model: nn.Module) -> tuple[Any, Any]:
    """Inputs and labels of a batch."""
    if isinstance(batch, _Inputs):
        return batch.value, None
    if isinstance(batch, Mapping):
        accepted = inspect.signature(model.forward).parameters.values()
        names = {p.name for p in accepted}
        anything = any(p.kind is p.VAR_KEYWORD for p in accepted)
        inputs = {k: v for k, v in batch.items() if k not in _LABELS and (anything or k in names)}
        return inputs, next((batch[k] for k in _LABELS if k in batch), None)
    if isinstance(batch, tuple | list):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _like(example: Any, n: int, draw: _Draw, generator: torch.Generator) -> Any:
    """``n`` drawn samples in the structure of the example; tensors without a sample axis stay as they are."""
    count = sample_count(example)

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: one(v) for k, v in value.items()}
        if isinstance(value, tuple | list):
            return tuple(one(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != count:
            return value
        value = value.detach().cpu()
        if value.is_complex():
            parts = [draw(part, n, generator) for part in (value.real, value.imag)]
            return torch.complex(*parts).to(value.dtype)
        if value.is_floating_point():
            return draw(value, n, generator).to(value.dtype)
        chosen = torch.randint(value.numel(), (n, *value.shape[1:]), generator=generator)
        return value.reshape(-1)[chosen]

    return one(example)


def _draw_normal(example: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return sampling.normal((n, *example.shape[1:]), generator)


def _draw_fields(example: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Fields with the example's mean and variance per channel, or its share of two values."""
    if example.dim() < 3:
        return _draw_normal(example, n, generator)
    channels = example.shape[1]
    fields = sampling.gaussian_random_field((n * channels, *example.shape[2:]), generator=generator)
    fields = fields.view(n, channels, *example.shape[2:])
    constant = bool((example == example.reshape(-1)[0]).all())  # it tells no more than a shape
    for channel in range(channels):
        given, field = example[:, channel].float(), fields[:, channel]
        field /= field.std(correction=0).clamp_min(1e-30)
        values = torch.unique(given)
        if len(values) == 2:
            share = float((given == values[0]).float().mean())
            fields[:, channel] = torch.where(field <= field.flatten().quantile(share), values[0], values[1])
        else:
            fields[:, channel] = given.mean() + field * (1.0 if constant else given.std(correction=0))
    return fields


SAMPLERS = {"normal": _draw_normal, "grf": _draw_fields}
