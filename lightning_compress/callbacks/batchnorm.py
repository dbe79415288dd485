"""Measure the running statistics of BatchNorm again at the end of a fit, on inputs that training has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.batchnorm import ReestimateBatchNorm
from lightning_compress.callbacks.base import CompressionCallback, callbacks_of
from lightning_compress.callbacks.copies import is_patched, own_inputs, part_of
from lightning_compress.callbacks.pruning import ScheduledPruning
from lightning_compress.names import clean
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.stats.drawing import sample_count
from lightning_compress.targets import survey

When = Literal["end", "validation"]


class BatchNormReestimation(CompressionCallback):
    r"""Replace the running mean and variance of BatchNorm by those of inputs that training has just seen.

    Running averages lag behind weights that still move, and do not know what pruning, quantization or averaging did to
    the weights at last. Every layer gets the mean and the unbiased variance of what it sees in eval mode, layer after
    layer, as by ``lightning_compress.ReestimateBatchNorm``.

    The inputs are the first ``samples`` of the running epoch, as the module's ``forward`` got them from
    ``training_step``; they are kept on its device. With ``at="end"`` the module is changed in place once, after the
    last optimizer step and before what follows it: the last validation and the last checkpoints have the new
    statistics. A fit that ends for a reason that only that validation gives (early stopping) is measured after it.
    Averaged weights (EMA, SWA) are measured where they surface. ``at="validation"`` measures before every validation,
    so that each is of what is saved with it. ``restore`` undoes the last measurement.

    Args:
        at: "end" or "validation".
        samples: inputs to measure on.
        momentum: share of the new statistics in [0, 1]; None is 1.
        attribute: name of the submodule to measure, such as "model"; None is the whole LightningModule, or the one part
            that ``training_step`` calls if it does not call ``forward``.
        include: patterns of names of BatchNorm layers to measure.
        exclude: patterns of names to leave.
        name: distinguishes several instances.

    Attributes:
        shifts: BatchNorm layer -> what the last measurement changed: mean over channels of ``|mu' - mu| / sigma``, and
            of ``|ln(var' / var)|``.

    Raises:
        ValueError: an option outside its range, or a pattern that fits no layer.
        MisconfigurationException: the module has no BatchNorm with running statistics, there is no such submodule, or
            the place in the callback list is before one that changes weights.

    Examples:
        >>> BatchNormReestimation(samples=512).at
        'end'

    Source: Wu and Johnson 2021, Rethinking "Batch" in BatchNorm (precise statistics).
    """

    changes_weights: ClassVar[bool] = True

    def __init__(
        self,
        *,
        at: When = "end",
        samples: int = 256,
        momentum: float | None = None,
        attribute: str | None = None,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if at not in get_args(When):
            raise ValueError(f"at={at!r} is unknown; allowed: {', '.join(get_args(When))}.")
        self.at, self.samples, self.momentum = at, samples, momentum
        self.attribute, self.include, self.exclude = attribute, include, exclude
        self._transform = ReestimateBatchNorm(samples, momentum, include, exclude)
        self.shifts: dict[str, tuple[float, float]] = {}
        self._before: dict[
            str, dict[str, Tensor]
        ] = {}  # layer -> buffer -> value before the last measurement
        self._inputs: dict[str, _Inputs] = {}  # name of what may be called -> what it got
        self._measured_at = -1  # optimizer step

    def __getstate__(self) -> dict[str, Any]:
        """Options, the statistics from before, what changed; no inputs."""
        return super().__getstate__() | {"_inputs": {}}

    def restore(self, module: nn.Module) -> None:
        """Give the BatchNorm layers the statistics that they had before the last measurement.

        Args:
            module: the module that was trained, or one like it.

        Raises:
            ValueError: nothing was measured, or the module has no such layers.
        """
        if not self._before:
            raise ValueError(
                "BatchNormReestimation has measured nothing yet, so there is nothing to restore."
            )
        self._transform.apply(module, Plan(self._before))

    # -- when --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for BatchNorm, wait for inputs; the modules are all built by now."""
        part = part_of(pl_module, self.attribute, type(self).__name__)
        survey(part, self.include, self.exclude)  # raises for a pattern that fits nothing
        if not _has_statistics(part):
            raise MisconfigurationException(
                f"BatchNormReestimation: {type(part).__name__} has no BatchNorm layer with running statistics: leave "
                "the callback out."
            )
        parts = {self.attribute or "": part}
        if self.attribute is None:
            parts |= {name: child for name, child in part.named_children() if _has_statistics(child)}
        self._measured_at = -1
        self._inputs = {name: _Inputs(self.samples) for name in parts}
        for name, called in parts.items():
            hook = called.register_forward_pre_hook(self._inputs[name].add, with_kwargs=True)
            self._undo.append(hook.remove)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep inputs of this epoch."""
        for inputs in self._inputs.values():
            inputs.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after the last step, before the last validation and checkpoint."""
        if not _averaging(trainer) and _is_last(trainer):
            self._measure(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is validated: with EMA, the averaged weights."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.at == "validation" or (_averaging(trainer) and _is_last(trainer)):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure when training was told to stop, before the checkpoint of this epoch."""
        if not _averaging(trainer) and _is_last(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure if it has not been done; averaged weights have come back by now."""
        if _averaging(trainer):
            self._measured_at = -1
        self._measure(trainer, pl_module)

    # -- what --------------------------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank zero measures for all, once after a step."""
        if self._measured_at == trainer.global_step:
            return
        self._measured_at = trainer.global_step
        found: Plan | str = ""
        if trainer.is_global_zero:
            try:
                with trainer.precision_plugin.forward_context():
                    found = self._plan(pl_module)
            except Exception as error:  # raising would end a program whose training has succeeded
                found = f"{type(error).__name__}: {error}"
        if trainer.world_size > 1:
            found = trainer.strategy.broadcast(found, src=0)
        if isinstance(found, str):
            rank_zero_warn(f"BatchNormReestimation leaves the statistics as they are. {found}")
            return
        modules = {clean(name): module for name, module in pl_module.named_modules()}
        self._before = {
            name: {key: modules[name].get_buffer(key).detach().cpu().clone() for key in decided}
            for name, decided in found.layers.items()
        }
        self.shifts = {name: _shift(old, found.layers[name]) for name, old in self._before.items()}
        self._transform.apply(pl_module, found)
        values = [sum(shift) / len(self.shifts) for shift in zip(*self.shifts.values(), strict=True)]
        tags = [f"compress/batchnorm/{kind}_shift" for kind in ("mean", "var")]
        self.log_values(trainer, dict(zip(tags, values, strict=True)))
        skipped = "".join(f"\n  {name} stays: {why}" for name, why in found.skipped.items())
        rank_zero_info(
            f"BatchNormReestimation: {len(self.shifts)} layers, means moved by {values[0]:.3g} standard deviations, "
            f"logarithms of variances by {values[1]:.3g}.{skipped}"
        )

    def _plan(self, pl_module: LightningModule) -> Plan:
        """The statistics, under the names that the whole module gives the layers."""
        called = [name for name, inputs in self._inputs.items() if inputs.batches]
        if len(called) > 1 and called[0] != "":
            raise ValueError(
                f"training_step calls {', '.join(called)} one by one: say which with attribute=."
            )
        if not called:
            raise ValueError("no inputs were seen: training_step calls no module here with tensors.")
        name = called[0]
        part = pl_module.get_submodule(name)
        # None in place of labels, so that a tuple is taken as the arguments.
        data = [(batch, None) for batch in self._inputs[name].batches]
        plan = self._transform.plan(part, Calibration(data=data, samples=self.samples))
        if not plan.layers:
            raise ValueError(f"no layer was measured: {plan.skipped}")
        prefix = f"{clean(name)}." if name else ""
        layers = {prefix + layer: decided for layer, decided in plan.layers.items()}
        return Plan(layers, {prefix + layer: why for layer, why in plan.skipped.items()})

    def _check(self, trainer: Trainer) -> None:
        super()._check(trainer)
        callbacks = callbacks_of(trainer)
        later = callbacks[callbacks.index(self) + 1 :] if self in callbacks else []
        if any(isinstance(other, ScheduledPruning) for other in later):
            raise MisconfigurationException(
                "BatchNormReestimation must come after ScheduledPruning in Trainer(callbacks=[...]), which changes the "
                "weights. Put BatchNormReestimation last."
            )

    def _release(self) -> None:
        super()._release()
        self._inputs = {}

    # -- resume ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The statistics from before, and what changed."""
        shifts = {layer: list(shift) for layer, shift in self.shifts.items()}
        return super().state_dict() | {"before": self._before, "shifts": shifts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """So that ``restore`` works after a resume too."""
        super().load_state_dict(state_dict)
        self._before = dict(state_dict["before"])
        self.shifts = {layer: (shift[0], shift[1]) for layer, shift in state_dict["shifts"].items()}


class _Inputs:
    """A forward pre-hook that keeps the first samples that a module gets in training mode."""

    def __init__(self, samples: int) -> None:
        self.samples, self.left = samples, samples
        self.batches: list[Any] = []

    def clear(self) -> None:
        self.batches, self.left = [], self.samples

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.left <= 0 or not module.training or is_patched(module):
            return
        batch = own_inputs(module, args, kwargs, self.left)
        if batch is not None:
            self.batches.append(batch)
            self.left -= sample_count(batch)


def _has_statistics(module: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in module.modules())


def _averaging(trainer: Trainer) -> bool:
    return any(isinstance(c, WeightAveraging | StochasticWeightAveraging) for c in callbacks_of(trainer))


def _is_last(trainer: Trainer) -> bool:
    """Whether training ends with the present batch, as far as is known."""
    progress, epochs = trainer.fit_loop.epoch_loop.batch_progress, trainer.max_epochs
    last_batch = progress.is_last_batch or progress.current.ready >= trainer.num_training_batches
    last_epoch = epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
    last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return (last_batch and last_epoch) or last_step or trainer.should_stop


def _shift(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> tuple[float, float]:
    """Mean over channels of ``|mu' - mu| / sigma`` and ``|ln(var' / var)|``."""
    tiny = torch.finfo(torch.float32).tiny
    before, after = (values["running_var"].double().clamp_min(tiny) for values in (old, new))
    means = (new["running_mean"].double() - old["running_mean"].double()).abs() / before.sqrt()
    return float(means.mean()), float((after / before).log().abs().mean())
