"""A LightningModule that trains any student on the answers of any teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_compress.distillation import settings
from lightning_compress.distillation.delegation import call_step, lend_hooks, optimizers_in
from lightning_compress.distillation.examples import features_of, first_input
from lightning_compress.distillation.features import FEATURE_LOSSES, Projections
from lightning_compress.distillation.outputs import check_apart, check_finite, main_tensor, split_batch
from lightning_compress.distillation.settings import check_numbers, check_student, named
from lightning_compress.distillation.terms import (
    LOSSES,
    NEED_FEATURES,
    OF_LOGITS,
    Loss,
    checked_options,
    likeness,
    output_loss,
)
from lightning_compress.distillation.watching import Call, watched
from lightning_compress.names import clean, resolve
from lightning_compress.schedules import Schedule, Shape, constant, shape
from lightning_compress.tables import listing

_PREFIX = "student."


class Distillation(LightningModule):
    """Train a student on the answers of a teacher.

    total = α s(t) (L + w F) + (1 − α) task, with L the loss of outputs, F that of features, s(t) the schedule; α = 1
    where there are no labels. A loss that is about features ("feature", "attention", and "relational" or "contrastive"
    when features are given) is F, and L = 0; with any other loss, F is "feature".

    **Teacher.** It is put in eval mode and frozen, and is no submodule: not in ``parameters()``, ``state_dict()``, the
    checkpoint, the optimizer, the count of parameters or DDP's buckets, and ``train()`` does not reach it. It moves and
    is cast with the module, and each rank has one. Copies and pickles of the module have a teacher of their own. It is
    called with exactly what the student was called with, so augmentation inside a ``training_step`` is seen by both.

    **Student.** An ``nn.Module``; or a LightningModule, whose steps, hooks, metrics, logging and
    ``configure_optimizers`` are used and whose loss is the task loss. Its ``training_step`` runs once per batch and
    must call the module, or its only network, at least once; what several calls teach is averaged. It must use
    automatic optimization.

    **Logged** by ``training_step``: ``compress/distill/kd_loss`` (L + w F), ``compress/distill/task_loss``; in
    validation and test, or in training where there is no validation: ``compress/distill/agreement`` (share of equal
    top-1) or ``compress/distill/relative_l2``; for a plain student also ``val_loss`` and ``test_loss``, the task loss.

    Args:
        student: what is trained, under the prefix ``student.``; ``student_state_dict`` takes it off.
        teacher: what it learns from.
        loss: "kd", "dkd", "feature", "attention", "relational", "contrastive", "mse", "relative_l2", "h1", "sobolev"
            (see ``lightning_compress.distillation.losses``); an import path; or a function (student output, teacher
            output, batch) -> scalar.
        temperature: T > 0 of "kd" and "dkd".
        alpha: α, share of the distillation part, in [0, 1].
        task_loss: function (output, target) -> scalar; cross-entropy for integer targets and mean squared error for
            others if None. Not for a LightningModule.
        features: names of layers, student's -> teacher's.
        feature_weight: w ≥ 0.
        optimizer: function parameters -> optimizer; AdamW(lr=1e-3) if None. Given, it also replaces the student's
            ``configure_optimizers``.
        scheduler: function optimizer -> learning-rate scheduler, stepped after every optimizer step.
        schedule: s(t), as ``lightning_compress.schedules.shape`` takes it, over all steps of the training; or a
            ``Schedule``, over its own.
        loss_options: further options of the loss, such as ``{"w_nc": 4.0}``.
        example_input: input of the student (tensor, tuple of arguments or mapping of keyword arguments) from which the
            sizes of projections are found; if None, ``student.example_input_array``, or else the first two training
            samples.

    Raises:
        ValueError: an option outside its range, an unknown loss, option or layer, a loss that needs features without
            any, a student that shares tensors with its teacher or optimizes by hand.

    Examples:
        >>> student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> module = Distillation(student, teacher, temperature=2.0)
        >>> len(list(module.parameters())), dict(module.hparams)["loss"], teacher.training
        (2, 'kd', False)
        >>> module.training_step((torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)), 0).shape
        torch.Size([])

    References:
        Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: str | Loss = "kd",
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        task_loss: Callable[[Any, Any], Tensor] | str | None = None,
        features: Mapping[str, str] | None = None,
        feature_weight: float = 1.0,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        schedule: str | Mapping[float, float] | Shape | Schedule = "constant",
        loss_options: Mapping[str, Any] | None = None,
        example_input: Any = None,
    ) -> None:
        super().__init__()
        features, loss_options = dict(features or {}), dict(loss_options or {})
        known: str | Loss = (
            loss if isinstance(loss, str) and loss in LOSSES else resolve(loss, LOSSES, "loss")
        )
        if known in NEED_FEATURES and not features:
            raise ValueError(
                f'loss={loss!r} compares layers inside: give features={{"student layer": "teacher layer"}}.'
            )
        check_numbers(temperature, alpha, feature_weight)
        check_apart(student, teacher)
        check_student(student, task_loss, optimizer, scheduler)
        checked_options(known, loss_options)
        self.loss = known
        # None where the loss has none: quantization-aware training warns of a high one at few bits.
        self.temperature = temperature if known in OF_LOGITS else None
        self.alpha, self.feature_weight = alpha, feature_weight
        self.task_loss = settings.task_loss if task_loss is None else resolve(task_loss, {}, "task_loss")
        self.optimizer, self.scheduler = optimizer, scheduler
        self.schedule = schedule if isinstance(schedule, Schedule) else shape(schedule)
        choices = {"loss": loss, "task_loss": task_loss, "schedule": schedule, "features": features}
        numbers = {"temperature": self.temperature, "alpha": alpha, "feature_weight": feature_weight}
        names = {k: name for k, v in choices.items() if (name := named(v))}
        self.save_hyperparameters({k: v for k, v in numbers.items() if v is not None} | names)

        self._held = [teacher.eval().requires_grad_(False)]  # in a list nn.Module does not see it
        self.student = student
        # A loss that is about features leaves none for the outputs; beside one of outputs features are hints.
        self._of_features = bool(features) and known in FEATURE_LOSSES
        self.loss_options = {} if self._of_features else loss_options
        kind = cast(str, known) if self._of_features else "feature"
        self.projections = Projections(features, kind, loss_options if self._of_features else {})
        self._total_steps = math.inf
        self._example = example_input
        if isinstance(student, LightningModule):
            self.example_input_array = student.example_input_array
            lend_hooks(student, self)
            self._example = student.example_input_array if example_input is None else example_input
        self._late = isinstance(student, LightningModule) and is_overridden("configure_model", student)
        if not self._late:  # a student that makes its layers later is looked at in `setup`
            self.projections.layers(student, teacher)
            self._prepare(self._example)

    @property
    def teacher(self) -> nn.Module:
        """The teacher, in eval mode and frozen."""
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's answer."""
        return self.student(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts the teacher too."""
        self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @property
    def _current_fx_name(self) -> str | None:
        """The hook that Lightning runs now; the student's ``log`` asks its own module for it."""
        return cast("str | None", self.__dict__.get("_hook"))

    @_current_fx_name.setter
    def _current_fx_name(self, hook: str | None) -> None:
        self.__dict__["_hook"] = hook
        student = self.__dict__.get("_modules", {}).get("student")
        if isinstance(student, LightningModule):
            student._current_fx_name = hook

    # -- before training ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Make the projections of features, for they must exist before the optimizer."""
        if isinstance(self.student, LightningModule):
            self.student.setup(stage)
            if self._late and self.projections.names:
                self.student.configure_model()
        if stage != "fit" or not self.projections.needed or (self._example is not None and not self._late):
            return
        example = first_input(self.trainer) if self._example is None else self._example
        if example is None:
            raise MisconfigurationException(
                "the sizes of the projections of features are unknown, and the training loader is no DataLoader of a "
                "data set with an index to read a sample from: give Distillation(..., example_input=x)."
            )
        before = len(self.projections)
        self._prepare(example)
        averaging = [type(c).__name__ for c in self.trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        if averaging and len(self.projections) > before:
            raise MisconfigurationException(
                f"{averaging[0]} copied the module before the sizes of its projections were known: give "
                "Distillation(..., example_input=x)."
            )

    def _prepare(self, example: Any) -> None:
        """Make the projections that features of an example need."""
        if example is None or not self.projections.needed:
            return
        own, others = self.projections.layers(self.student, self.teacher)
        try:
            found = features_of(self.student, own, example), features_of(self.teacher, others, example)
        except Exception as error:
            raise ValueError(
                f"the forward pass that finds the sizes of features failed ({type(error).__name__}: {error}). Give an "
                "input of the student, as its forward takes it: Distillation(..., example_input=x)."
            ) from error
        self.projections.prepare(self.student, *found)

    def configure_optimizers(self) -> Any:
        """The student's, with the projections in the first group of its first optimizer; or those that were given."""
        student = self.student
        if (
            self.optimizer is None
            and isinstance(student, LightningModule)
            and is_overridden("configure_optimizers", student)
        ):
            configured = student.configure_optimizers()
            for optimizer in optimizers_in(configured)[:1]:
                # In an existing group, since a scheduler that was made already knows only those.
                optimizer.param_groups[0]["params"].extend(self.projections.parameters())
            return configured
        parameters = [p for p in self.parameters() if p.requires_grad]
        made = self.optimizer(parameters) if self.optimizer else torch.optim.AdamW(parameters, lr=1e-3)
        if self.scheduler is None:
            return made
        return {"optimizer": made, "lr_scheduler": {"scheduler": self.scheduler(made), "interval": "step"}}

    def on_train_start(self) -> None:
        """Find out how many steps the schedule has."""
        if isinstance(self.student, LightningModule):
            self.student.on_train_start()
        if isinstance(self.schedule, Schedule) or self.schedule is constant:
            return
        self._total_steps = float(self.trainer.estimated_stepping_batches)
        if math.isinf(self._total_steps):
            raise MisconfigurationException(
                "the schedule is over all steps, but the training has no known length: set max_steps or max_epochs of "
                "the Trainer, or give schedule=Schedule(f, t0, t1)."
            )

    # -- steps -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """α s(t) (L + w F) + (1 − α) task, with one call of the student's own step."""
        calls, result = self._run("training_step", batch, batch_idx)
        if result is None and isinstance(self.student, LightningModule):
            return None  # it skips the batch
        task = result["loss"] if isinstance(result, Mapping) else result
        if not calls:
            raise MisconfigurationException(
                f"training_step of {type(self.student).__name__} calls neither the module nor its only network, so "
                "what it answers cannot be compared with the teacher. Call self(x) in it."
            )
        where = f"batch {batch_idx} of epoch {self.trainer.current_epoch if self._trainer else 0}"
        taught = torch.stack([self._taught(call, batch, where) for call in calls]).mean()
        total = self._share() * taught
        values = {"kd_loss": taught.detach()}
        if task is not None:
            total = self.alpha * total + (1 - self.alpha) * task
            values["task_loss"] = task.detach()
        self._log(values, calls)
        return {**result, "loss": total} if isinstance(result, Mapping) else total

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The student's own step, or its task loss as ``val_loss``; and how near it is to the teacher."""
        return self._evaluate("validation_step", "val_loss", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The student's own step, or its task loss as ``test_loss``; and how near it is to the teacher."""
        return self._evaluate("test_step", "test_loss", batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The student's own step, or its answers."""
        return self._run("predict_step", batch, batch_idx, dataloader_idx)[1]

    def _run(self, step: str, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> tuple[list[Call], Any]:
        """Calls of the student in a step, and what the step returns: for a plain student its task loss, if any."""
        student, layers = self.student, self.projections.layers(self.student, self.teacher)[0]
        differentiable = self.loss == "sobolev" and step == "training_step"
        with watched(student, layers, differentiable=differentiable) as calls:
            if isinstance(student, LightningModule) and is_overridden(step, student):
                return calls, call_step(student, step, batch, batch_idx, dataloader_idx)
            x, y = split_batch(batch)
            output = student(x)
        if step == "predict_step":
            return calls, output
        return calls, None if y is None else self.task_loss(output, y)

    def _teach(self, call: Call) -> Call:
        """The teacher's call with what the student was called with."""
        layers = self.projections.layers(self.student, self.teacher)[1]
        self.teacher.eval()
        slopes = self.loss == "sobolev" and torch.is_grad_enabled()
        with torch.set_grad_enabled(slopes), watched(self.teacher, layers) as calls:
            self.teacher(*call.args, **call.kwargs)
        return calls[0]

    def _taught(self, call: Call, batch: Any, where: str) -> Tensor:
        """L + w F of one call."""
        teacher = self._teach(call)
        answer = main_tensor(teacher.output)
        if answer is not None:
            check_finite(answer, where)
        parts: list[Tensor] = []
        if not self._of_features:
            options = self.loss_options
            if self.temperature is not None:
                options = options | {"temperature": self.temperature}
            parts.append(output_loss(self.loss, call, teacher.output, batch, options))
        if self.projections.names:
            parts.append(
                self.feature_weight * self.projections(self.student, call.features, teacher.features)
            )
        if self._trainer is not None and not self.trainer.enable_validation:
            self._log_likeness(call, teacher, batch)
        return torch.stack([part.to(parts[0]) for part in parts]).sum()

    def _evaluate(self, step: str, name: str, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        calls, result = self._run(step, batch, batch_idx, dataloader_idx)
        for call in calls:
            self._log_likeness(call, self._teach(call), batch)
        if isinstance(self.student, LightningModule) and is_overridden(step, self.student):
            return result
        if result is not None and self._trainer is not None:
            self.log(name, result, sync_dist=True, batch_size=_samples(calls))
        return result

    def _share(self) -> float:
        """s(t), of the present optimizer step."""
        if self.schedule is constant:
            return 1.0
        step = self.trainer.global_step // max(len(self.trainer.optimizers), 1) if self._trainer else 0
        if isinstance(self.schedule, Schedule):
            return self.schedule(step)
        return float(self.schedule(min(step / self._total_steps, 1.0)))

    def _log_likeness(self, call: Call, teacher: Call, batch: Any) -> None:
        with torch.no_grad():
            axis = self.loss_options.get("class_axis", 1)
            found = likeness(self.loss, call.output, teacher.output, batch, axis)
        if found is not None:
            self._log({found[0]: found[1]}, [call], sync_dist=not self.training)

    def _log(self, values: Mapping[str, Tensor], calls: list[Call], **options: Any) -> None:
        if self._trainer is not None:
            named = {f"compress/distill/{name}": value.float() for name, value in values.items()}
            self.log_dict(named, batch_size=_samples(calls), **options)

    # -- afterwards --------------------------------------------------------------------------------------------

    @staticmethod
    def student_state_dict(checkpoint: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
        """The student's weights in a checkpoint of this module, as the student alone loads them.

        Args:
            checkpoint: a loaded checkpoint, its ``state_dict``, or its path.

        Returns:
            State dict without the prefix.

        Raises:
            ValueError: it holds no student.

        Examples:
            >>> Distillation.student_state_dict({"state_dict": {"student.fc.bias": 0, "projections.0.bias": 1}})
            {'fc.bias': 0}
        """
        if isinstance(checkpoint, str | Path):
            checkpoint = cast("dict[str, Any]", torch.load(checkpoint, map_location="cpu", weights_only=True))
        state = {clean(name): value for name, value in checkpoint.get("state_dict", checkpoint).items()}
        found = {name.removeprefix(_PREFIX): v for name, v in state.items() if name.startswith(_PREFIX)}
        if not found:
            raise ValueError(
                f"no key begins with {_PREFIX!r}, so it is no checkpoint of Distillation; its keys are "
                f"{listing(list(state))}."
            )
        return found


def _samples(calls: list[Call]) -> int:
    answer = main_tensor(calls[0].output) if calls else None
    return 1 if answer is None or not answer.ndim else len(answer)
