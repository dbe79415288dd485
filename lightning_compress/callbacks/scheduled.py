"""What every callback with a schedule does: count real optimizer steps, know when an update is due, guard the end."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from torch.optim import Optimizer

from lightning_compress.callbacks.base import CompressionCallback, callbacks_of
from lightning_compress.schedules import Schedule, shape, to_steps


class ScheduledCallback(CompressionCallback):
    """A callback whose strength follows a schedule of optimizer steps.

    The step t counts the optimizer steps that really happened: accumulated micro-batches are one step, steps
    skipped by AMP do not count, and several optimizers count once. Subclasses say what to do after a step and
    when an update is due.

    Args:
        schedule: what ``lightning_compress.schedules.shape`` takes.
        begin: first point of the schedule.
        end: last point.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        every: optimizer steps between updates.
        protect_schedule: hold early stopping back until ``end``.
        gate: name of a validation metric to log as ``compress/at_target/<gate>``, infinite before ``end``.
        name: distinguishes several instances.

    Raises:
        ValueError: an option outside its range, or a schedule that ends before it begins.
    """

    def __init__(
        self,
        *,
        schedule: str | dict[float, float],
        begin: float,
        end: float,
        unit: str,
        every: int,
        protect_schedule: bool,
        gate: str | None,
        name: str | None,
    ) -> None:
        super().__init__(name)
        if every < 1:
            raise ValueError(f"every={every}: allowed is >= 1 optimizer steps.")
        if end < begin:
            raise ValueError(
                f"the schedule ends (end={end}) before it begins (begin={begin}): set begin <= end."
            )
        for value, option in ((begin, "begin"), (end, "end")):
            to_steps(value, unit, total=1, per_epoch=1, name=option)
        self.schedule, self.shape = schedule, shape(schedule)
        self.begin, self.end, self.unit, self.every = begin, end, unit, every
        self.protect_schedule, self.gate = protect_schedule, gate
        self._counts: list[int] = []  # real steps of every optimizer
        self._span: tuple[int, int] | None = (
            None  # (begin, end) in optimizer steps, fixed when training starts
        )
        self._hooked: list[Optimizer] = []

    def __getstate__(self) -> dict[str, Any]:
        """Options and own state; never an optimizer."""
        return super().__getstate__() | {"_hooked": []}

    def _tag(self, quantity: str) -> str:
        """The tag of a logged quantity; a named instance has tags of its own."""
        return f"compress/{self.name}/{quantity}" if self.name else f"compress/{quantity}"

    @abstractmethod
    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """Whether the steps of this optimizer concern the callback."""

    @abstractmethod
    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Called after every real step of every optimizer."""

    @abstractmethod
    def update(self, trainer: Trainer) -> None:
        """Called when an update is due at the present step."""

    # -- time --------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps that really happened, t."""
        return max(self._counts, default=0)

    @property
    def span(self) -> tuple[int, int]:
        """First and last step of the schedule; (0, 0) before training starts."""
        return self._span or (0, 0)

    @property
    def finished(self) -> bool:
        """Whether the schedule has reached its end."""
        return self._span is not None and self.steps >= self._span[1]

    def between(self, start: float, end: float) -> Schedule:
        """The schedule between two values."""
        return Schedule(self.shape, *self.span, start, end)

    def due(self, t: int) -> bool:
        """Whether an update belongs to step t."""
        begin, end = self.span
        return begin <= t <= end and ((t - begin) % self.every == 0 or t == end)

    def last_due(self, t: int) -> int:
        """The last step up to t to which an update belongs; t itself outside the schedule."""
        begin, end = self.span
        return t - (t - begin) % self.every if begin <= t < end else t

    # -- fit ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizers."""
        self._hooked = []
        self._follow(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow optimizers that were replaced."""
        self._follow(trainer)

    def _follow(self, trainer: Trainer) -> None:
        if [id(o) for o in trainer.optimizers] == [id(o) for o in self._hooked]:
            return
        self._hooked = list(trainer.optimizers)
        self._counts = (self._counts + [0] * len(self._hooked))[: len(self._hooked)]
        for index, optimizer in enumerate(self._hooked):
            hook = functools.partial(self._stepped, trainer, index)
            self._undo.append(optimizer.register_step_post_hook(hook).remove)

    def _stepped(self, trainer: Trainer, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Optimizers that unscale by themselves (fused ones) are called for every step, and skip what overflowed inside.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(torch.as_tensor(overflow).any()):
            return
        self.after_step(trainer, optimizer)
        if not self.counts_steps_of(optimizer):
            return
        before = self.steps
        self._counts[index] += 1
        if self._span is not None and self.steps > before and self.due(self.steps):
            self.update(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule in optimizer steps, once; update at once when it begins at step zero."""
        if self._span is None:
            self._span = self._resolve(trainer)
            if self.steps == 0 and self.due(0):
                self.update(trainer)
        if self.protect_schedule:
            loop = trainer.fit_loop.epoch_loop
            self._undo.append(functools.partial(setattr, loop, "min_steps", loop.min_steps))
            loop.min_steps = max(loop.min_steps or 0, (self._span[1] + 1) * len(self._hooked))

    def _resolve(self, trainer: Trainer) -> tuple[int, int]:
        """(begin, end) in optimizer steps; the end value is trained with for at least one step."""
        begin, end = (
            self._in_steps(trainer, value, name) for value, name in ((self.begin, "begin"), (self.end, "end"))
        )
        return self._within(trainer, begin, end)

    def _length(self, trainer: Trainer) -> tuple[float, int]:
        """Optimizer steps of the whole training (may be infinite), and of one epoch."""
        total = float(trainer.estimated_stepping_batches)
        automatic = trainer.lightning_module.automatic_optimization
        if not automatic and trainer.max_steps != -1:
            total = min(
                total, math.ceil(trainer.max_steps / len(self._hooked))
            )  # Lightning counts every optimizer
        per_epoch = math.ceil(
            trainer.num_training_batches / (trainer.accumulate_grad_batches if automatic else 1)
        )
        return total, per_epoch

    def _in_steps(self, trainer: Trainer, value: float, name: str) -> int:
        """A point of an option, in optimizer steps."""
        total, per_epoch = self._length(trainer)
        return to_steps(value, self.unit, total=total, per_epoch=per_epoch, name=name)

    def _within(self, trainer: Trainer, begin: int, end: int) -> tuple[int, int]:
        """The two points, no later than one step before training ends."""
        total, _ = self._length(trainer)
        end = end if math.isinf(total) else min(end, max(int(total) - 1, 0))
        return min(begin, end), end

    def _release(self) -> None:
        super()._release()
        self._hooked = []

    # -- early stopping, "best", averages ----------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold early stopping back if asked to."""
        self._keep_going(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold early stopping back if asked to."""
        self._keep_going(trainer)

    def _keep_going(self, trainer: Trainer) -> None:
        if self.protect_schedule and not self.finished:
            trainer.should_stop = False
            for callback in callbacks_of(trainer):
                if isinstance(callback, EarlyStopping):
                    callback.wait_count = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when what is validated are averages that nothing was averaged into yet."""
        for other in callbacks_of(trainer):
            steps, epochs = (
                getattr(other, "_latest_update_step", 1),
                getattr(other, "_latest_update_epoch", 0),
            )
            never = isinstance(other, WeightAveraging) and steps == 0 and epochs < 0
            if never and self.steps and not trainer.sanity_checking:
                rank_zero_warn(
                    f"{type(other).__name__} has not averaged anything yet, so what is validated now are the "
                    "initial weights, not the trained ones."
                )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the gated metric: infinite until the schedule has ended."""
        if self.gate is None or trainer.sanity_checking or trainer.barebones:
            return
        if self.gate not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise MisconfigurationException(
                f"gate={self.gate!r} is not a logged metric; logged are: {logged}."
            )
        value = trainer.callback_metrics[self.gate] if self.finished else torch.tensor(math.inf)
        pl_module.log(f"compress/at_target/{self.gate}", value, sync_dist=True)

    # -- resume ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters and the schedule in steps."""
        return super().state_dict() | {"counts": list(self._counts), "span": list(self._span or ())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint stands."""
        super().load_state_dict(state_dict)
        self._counts = [int(c) for c in state_dict["counts"]]
        span = [int(s) for s in state_dict["span"]]
        self._span = (span[0], span[1]) if span else None
