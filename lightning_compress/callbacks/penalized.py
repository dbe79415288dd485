"""What every penalty on weights does: its gradient joins that of the loss once per optimizer step."""

from __future__ import annotations

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.base import callbacks_of, log_due, logged_step, loss_scale, updated_by
from lightning_compress.callbacks.pruning import ScheduledPruning
from lightning_compress.callbacks.scheduled import ScheduledCallback
from lightning_compress.names import name_of, resolve
from lightning_compress.schedules import constant
from lightning_compress.tables import reasons
from lightning_compress.targets import Patterns


class PenalizingCallback(ScheduledCallback):
    """Base of callbacks that add ``strength(t) P(weights)`` to the loss.

    The gradient is added in ``on_before_optimizer_step``: once per optimizer step however many batches are accumulated,
    after unscaling, before clipping, on every process the same. Subclasses find the weights, and give P with its
    gradient.

    Args:
        strength: lambda >= 0 at the end of the schedule; it grows from 0.
        schedule: what ``lightning_compress.schedules.shape`` takes.
        every: the gradient is added on every so many steps, and multiplied by as much.
        begin: first point of the schedule; nothing is added before.
        end: last point; from then on the strength stays.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        include: patterns of layers to take.
        exclude: patterns of layers to leave.
        name: distinguishes several instances.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        strength: float,
        *,
        schedule: str | dict[float, float],
        every: int,
        begin: float,
        end: float,
        unit: str,
        include: Patterns,
        exclude: Patterns,
        name: str | None,
    ) -> None:
        super().__init__(
            schedule=schedule,
            begin=begin,
            end=end,
            unit=unit,
            every=every,
            protect_schedule=False,
            gate=None,
            name=name,
        )
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength={strength}: allowed is a finite strength >= 0.")
        self.strength, self.include, self.exclude = strength, include, exclude

    # -- what subclasses say -----------------------------------------------------------------------------------

    @abstractmethod
    def find(self, pl_module: LightningModule, updated: Collection[int]) -> dict[str, str]:
        """Find what to penalize among the parameters with these ids; return why the others are not."""

    @property
    @abstractmethod
    def penalized(self) -> Mapping[str, nn.Parameter]:
        """The penalized parameters by name."""

    @abstractmethod
    def gradients(self, owned: Collection[int]) -> dict[str, Tensor]:
        """dP/dw by parameter name, of what has parameters with these ids."""

    @abstractmethod
    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """What is logged of the weights as they are: totals by quantity, and values of single layers."""

    @property
    def concerned(self) -> str:
        """What is penalized, in words."""
        return f"{len(self.penalized)} weights"

    @property
    def in_loss(self) -> bool:
        """Whether the penalty joins the loss; False for methods that change the weights after the step."""
        return True

    # -- time --------------------------------------------------------------------------------------------------

    def _resolve(self, trainer: Trainer) -> tuple[int, int]:
        """What is constant from the first step on needs no length."""
        if (
            self.shape is constant
            and (self.begin, self.end) == (0, 1)
            and math.isinf(self._length(trainer)[0])
        ):
            return 0, 0
        return super()._resolve(trainer)

    def due(self, t: int) -> bool:
        """Every ``every`` steps from ``begin`` on, after ``end`` too."""
        begin, _ = self.span
        return t >= begin and (t - begin) % self.every == 0

    def update(self, trainer: Trainer) -> None:
        """There is nothing to recompute: the strength is looked up at every step."""

    def steps_of(self, optimizer: Optimizer) -> int:
        """Real steps of one optimizer: with several, each has its own t."""
        return self._counts[next(i for i, o in enumerate(self._hooked) if o is optimizer)]

    def strength_at(self, t: int) -> float:
        """The strength of the step that follows t others."""
        return self.between(0.0, self.strength)(t)

    # -- fit ---------------------------------------------------------------------------------------------------

    def _check(self, trainer: Trainer) -> None:
        super()._check(trainer)
        callbacks = callbacks_of(trainer)
        earlier = callbacks[: callbacks.index(self)] if self in callbacks else []
        me = type(self).__name__
        for other in earlier:
            if isinstance(other, PenalizingCallback) and other.name == self.name:
                raise MisconfigurationException(
                    f"{type(other).__name__} and {me} would log under the same tags: give one of them a name=."
                )
        if any(isinstance(other, ScheduledPruning) for other in earlier):
            raise MisconfigurationException(
                f"{me} must come before ScheduledPruning in Trainer(callbacks=[...]), which zeroes what it adds to "
                f"pruned weights. Put {me} first."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights (everything is built by now), follow the optimizers."""
        skipped = self.find(pl_module, updated_by(*trainer.optimizers))
        if not self.penalized:
            raise MisconfigurationException(
                f"{type(self).__name__} found nothing to penalize with include={self.include!r}:"
                f"{reasons(skipped) or ' the module has no weights.'}"
            )
        super().on_fit_start(trainer, pl_module)
        rank_zero_info(f"{type(self).__name__}: {self.concerned}.{reasons(skipped)}")

    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """An optimizer that updates a penalized parameter."""
        return bool(self._owned(optimizer))

    def _owned(self, optimizer: Optimizer) -> set[int]:
        """Ids of the penalized parameters that an optimizer updates."""
        return updated_by(optimizer) & {id(p) for p in self.penalized.values()}

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of the penalty to what the optimizer is about to use."""
        if not self.in_loss or not self._stepping(optimizer):
            return
        strength = self.strength_at(self.steps_of(optimizer)) * self.every
        factor = strength * loss_scale(trainer, optimizer)
        owned = self._owned(optimizer)
        if not factor or not owned:
            return
        penalized = self.penalized
        into: list[Tensor] = []
        added: list[Tensor] = []
        for key, gradient in self.gradients(owned).items():
            parameter = penalized[key]
            if id(parameter) not in owned or parameter.grad is None:  # frozen, or not used in this step
                continue
            if parameter.grad.is_sparse:
                raise MisconfigurationException(
                    f"{key} has a sparse gradient, and a penalty concerns all of its entries: build the layer with "
                    "sparse=False, or exclude it."
                )
            into.append(parameter.grad)
            added.append(gradient.to(parameter.grad.dtype))
        if into:
            torch._foreach_add_(into, added, alpha=factor)

    def _stepping(self, optimizer: Optimizer) -> bool:
        """Whether the step that an optimizer is about to take, or has just taken, is one of the due ones."""
        return self._span is not None and self.due(self.steps_of(optimizer))

    # -- logging -----------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the totals when Lightning logs, straight to the loggers."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if log_due(trainer) and trainer.loggers:
            self.log_values(trainer, self._tagged(self.measure()[0]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Totals as metrics that other callbacks can monitor; values of every layer to the loggers."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.barebones:
            return
        totals, layers = self.measure()
        pl_module.log_dict(self._tagged(totals), logger=False, sync_dist=True)
        step = logged_step(trainer) - 1  # where Lightning draws what belongs to an epoch
        self.log_values(trainer, self._tagged(totals | layers), step=step)

    def _tagged(self, values: Mapping[str, float]) -> dict[str, float]:
        return {self._tag(quantity): value for quantity, value in values.items()}


def with_options(
    kind: str | Callable[..., Any],
    known: Mapping[str, Callable[..., Any]],
    options: Mapping[str, Any],
    given: int = 1,
) -> Callable[..., Any]:
    """The rule that ``kind=`` means, with its options filled in.

    Args:
        kind: a name of ``known``, an import path, or the rule itself.
        known: name -> rule, a function of one tensor and its options.
        options: what the rule takes besides.
        given: arguments that come before the options.

    Returns:
        A function of these arguments alone.

    Raises:
        ValueError: unknown kind, or options that it does not take or lacks.

    Examples:
        >>> with_options("round", {"round": round}, {"ndigits": 1})(2.34)
        2.3
    """
    rule = resolve(kind, known, "kind")
    signature = inspect.signature(rule)
    try:
        signature.bind(*[None] * given, **options)
    except TypeError as error:
        allowed = ", ".join(map(str, list(signature.parameters.values())[given:])) or "none"
        raise ValueError(f"kind={name_of(kind)!r}: {error}; options of this kind: {allowed}.") from None
    return functools.partial(rule, **options)
