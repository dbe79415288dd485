"""Transforms in order on a copy, at one strength; what does not depend on the strength is done once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress import archive
from lightning_compress.compress import Result
from lightning_compress.cost import cost
from lightning_compress.pipelines.errors import OutputError
from lightning_compress.pipelines.knobs import Knob, turned
from lightning_compress.pipelines.result import Stage
from lightning_compress.stats import Calibration
from lightning_compress.steps import digests, measured, run_step
from lightning_compress.transform import NothingChangedError, Step, Transform

Strength = tuple[float, float]  # of knobs that make steps, and of smooth ones, in [0, 1]
Watch = Callable[[nn.Module, Step], None]


@dataclass(frozen=True)
class Run:
    """One pass.

    Args:
        model: the compressed copy.
        steps: what was done to it.
        transforms: with the options they had.
        left_out: why transforms that found nothing to change at this strength were left out.
    """

    model: nn.Module
    steps: tuple[Step, ...]
    transforms: tuple[Transform, ...]
    left_out: tuple[str, ...]


@dataclass
class Pipeline:
    """Transforms, some of them with a knob to turn.

    Args:
        model: the original; it is left as it is.
        transforms: in order.
        knobs: the knob of each transform that follows the strength, None for the others.
        inputs: calibration inputs, shared by all runs.
        coder: entropy coder of the archive.
    """

    model: nn.Module
    transforms: Sequence[Transform]
    knobs: Sequence[Knob | None]
    inputs: Calibration
    coder: str = "auto"
    _start: tuple[nn.Module, tuple[Step, ...]] | None = field(default=None, init=False, repr=False)

    def run(self, strength: Strength | None, watch: Watch | None = None) -> Run:
        """Apply everything to a copy.

        A transform that is turned down so far that it finds nothing to change is left out.

        Args:
            strength: of knobs that make steps, and of smooth ones; None if no knob is to be turned.
            watch: is called after every step with model and step; nothing is taken from earlier runs then.

        Returns:
            The compressed model and how it was made.

        Raises:
            NothingChangedError: a transform whose options are fixed found nothing to change.
        """
        fixed = next((i for i, knob in enumerate(self.knobs) if knob is not None), len(self.knobs))
        if watch is None:
            if self._start is None:
                self._start = self._apply(copy.deepcopy(self.model), self.transforms[:fixed], None)
            model, steps = copy.deepcopy(self._start[0]), self._start[1]
        else:
            model, steps = self._apply(copy.deepcopy(self.model), self.transforms[:fixed], watch)
        done, left_out = list(self.transforms[:fixed]), []
        for transform, knob in zip(self.transforms[fixed:], self.knobs[fixed:], strict=True):
            now = transform
            if knob is not None and strength is not None:
                now = turned(transform, knob, strength[knob.smooth], model)
            try:
                steps += self._apply(model, [now], watch)[1]
                done.append(now)
            except NothingChangedError as error:
                if knob is None:
                    raise
                left_out.append(str(error))
        return Run(model, steps, tuple(done), tuple(left_out))

    def _apply(
        self, model: nn.Module, transforms: Sequence[Transform], watch: Watch | None
    ) -> tuple[nn.Module, tuple[Step, ...]]:
        steps = []
        for transform in transforms:
            steps.append(run_step(model, transform, self.inputs))
            if watch is not None:
                watch(model, steps[-1])
        return model, tuple(steps)

    def size(self, model: nn.Module) -> int:
        """Length of the archive of a model."""
        return archive.size_of(model, self.coder)

    def staged(
        self, strength: Strength | None, error: OutputError | None
    ) -> tuple[Result, Run, tuple[Stage, ...]]:
        """As `run`, with what ``compress`` reports and a row for every step.

        Args:
            strength: as for `run`.
            error: measures every stage; None leaves errors out.

        Returns:
            The result, how it was made, and the stages.
        """
        stages: list[Stage] = []
        numbers = archive.dense_bytes(self.model) / 4
        before = cost(self.model, self.inputs.example_input)

        def row(model: nn.Module, name: str) -> None:
            size = self.size(model)
            far = float("nan") if error is None else error(model)
            stages.append(Stage(name, size, cost(model).sparsity, 8 * size / max(1, numbers), far))

        row(self.model, "original")
        start = digests(self.model)
        run = self.run(strength, lambda model, step: row(model, step.name))
        skipped: dict[str, Any] = {k: v for step in run.steps for k, v in step.plan.skipped.items()}
        after = cost(run.model, self.inputs.example_input)
        coverage = measured(start, run.model, skipped)
        return Result(run.model, run.steps, coverage, before, after), run, tuple(stages)
