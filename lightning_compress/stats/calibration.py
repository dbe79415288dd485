"""Which inputs a method that looks at activations gets: given data, or inputs drawn like an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.stats.drawing import SAMPLERS, drawn_like, sample_count, take_samples
from lightning_compress.stats.keeping import Kept
from lightning_compress.stats.running import device_of, move
from lightning_compress.stats.samplers import Sampler
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
        kept: where statistics are kept, for methods that are tried several times; None keeps nothing.

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
    kept: Kept | None = field(default=None, compare=False, repr=False, kw_only=True)
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
            return (_Inputs(drawn_like(self.example_input, n, draw, generator)) for n in sizes)
        drawn = (sampler(n, generator) for n in sizes)
        return map(_Inputs, drawn) if isinstance(sampler, Sampler) else drawn

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
_BATCH = 32
_LABELS = ("y", "label", "labels", "target", "targets")


@dataclass(frozen=True)
class _Inputs:
    """Drawn inputs: a tuple of them is a tuple of arguments, never (inputs, labels)."""

    value: Any


def _limited(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    """Batches until ``samples`` samples are reached; the last one is cut."""
    for batch in batches:
        count = sample_count(batch.value if isinstance(batch, _Inputs) else batch)
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
