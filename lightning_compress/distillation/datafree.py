"""Training students on their teacher's answers, to the task's inputs or to ones that are made up."""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.distillation.fitting import TEMPERATURE, fit_student
from lightning_compress.distillation.outputs import answers
from lightning_compress.distillation.result import DistillResult, Errors, compare
from lightning_compress.distillation.student import make_student, real_parameters
from lightning_compress.distillation.tasks import Decision, find_task
from lightning_compress.distillation.terms import Loss
from lightning_compress.metrics import Task
from lightning_compress.stats import Calibration
from lightning_compress.stats.drawing import take_samples
from lightning_compress.stats.running import call, evaluating
from lightning_compress.stats.samplers import Bounds, synthesize

Draws = Callable[[int, torch.Generator], Any]


@dataclass(frozen=True)
class DataFreeDistillation:
    """Thinner students of a teacher, trained without data: the options, and a run over several sizes.

    Args:
        example_input: one input of the teacher, or several; the sampler draws ones like it.
        sampler: as ``synthesize`` takes it: "auto", a kind, or a function (n, generator) -> inputs.
        bounds: of the sampler "uniform".
        init: as ``make_student`` takes it.
        tolerance: likewise.
        options: further options of ``distill``, such as ``{"steps": 500}``.

    Examples:
        >>> teacher = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        >>> free = DataFreeDistillation(torch.zeros(1, 2), options={"steps": 3, "val_samples": 16})
        >>> {ratio: round(result.ratio, 2) for ratio, result in free.run(teacher, ratios=(0.5, 0.25)).items()}
        {0.5: 0.5, 0.25: 0.26}

    Source: Hinton et al. 2015; Cai et al. 2020, ZeroQ; Yin et al. 2020, DeepInversion.
    """

    example_input: Any
    sampler: str | Draws = "auto"
    bounds: Bounds | None = None
    init: str = "teacher"
    tolerance: float = 0.1
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self, teacher: nn.Module, ratios: Sequence[float] = (0.25, 0.1, 0.05)
    ) -> dict[float, DistillResult]:
        """Make and train a student of every size; inputs are the same for all of them.

        Args:
            teacher: any module that runs; left as it is.
            ratios: shares of its real parameters, each in (0, 1).

        Returns:
            Ratio that was asked for -> result; what was reached is in it.

        Raises:
            ValueError: a ratio that no widths reach.
        """
        draws = synthesize(teacher, self.sampler, self.example_input, bounds=self.bounds, seed=self.seed)
        found = {}
        for ratio in ratios:
            student = make_student(
                teacher,
                ratio,
                example_input=self.example_input,
                tolerance=self.tolerance,
                init=self.init,
                seed=self.seed,
            )
            given = {"example_input": self.example_input, "seed": self.seed, **self.options}
            found[ratio] = distill(teacher, student, sampler=draws, **given)
        return found


def distill(
    teacher: nn.Module,
    student: nn.Module,
    *,
    example_input: Any = None,
    data: Any = None,
    val_data: Any = None,
    sampler: str | Draws = "auto",
    bounds: Bounds | None = None,
    loss: str | Loss = "auto",
    residual: Callable[[nn.Module, Any], Tensor] | None = None,
    steps: int = 2000,
    batch_size: int = 256,
    lr: float = 1e-3,
    task: str = "auto",
    val_samples: int = 1000,
    seed: int = 0,
    trainer_options: Mapping[str, Any] | None = None,
) -> DistillResult:
    """Train a student, in place, on its teacher's answers; without data on inputs that are drawn anew for every step.

    It runs through ``Distillation`` and a Trainer that keeps quiet: Adam whose learning rate falls to 1e-5 along half a
    cosine, weight decay 1e-5, gradients clipped to norm 1. If memory runs out the batches are halved, once.

    Args:
        teacher: any module; left as it is.
        student: what is trained, with the same inputs and outputs.
        example_input: one input or several, for samplers by name.
        data: batches or a DataLoader to train on instead of drawn inputs, read as often as it takes; labels in it are
            not used.
        val_data: inputs to judge by beside drawn ones, such as test data; labels in it are not used.
        sampler: as ``synthesize`` takes it: "auto", a kind, or a function (n, generator) -> inputs. It also draws the
            inputs to judge by, others than those that train.
        bounds: of the sampler "uniform".
        loss: as ``Distillation`` takes it. "auto" is "kd" with T = 4 for classes, "relative_l2" for neural operators,
            and otherwise ``mean (y_s - y_t)^2 / var(y_t)``.
        residual: for a physics-informed student: function (student, inputs) -> residuals of its equations, whose mean
            square is added to the loss "auto".
        steps: optimizer steps, >= 1.
        batch_size: drawn inputs of each.
        lr: first learning rate.
        task: "classification", "regression", or "auto", decided by ``find_task``; for errors and for loss="auto".
        val_samples: inputs to judge by, drawn and given ones each.
        seed: of the drawn inputs and the student's dropout; the global random state is untouched.
        trainer_options: further options of the Trainer, such as ``{"enable_progress_bar": True}``.

    Returns:
        The student and its errors to the teacher before and after.

    Raises:
        ValueError: outputs of different shapes, a student that shares tensors with the teacher, a teacher whose answers
            are not finite, or an option outside its range.

    Examples:
        >>> teacher = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        >>> student = make_student(teacher, 0.5, example_input=torch.zeros(1, 2))
        >>> result = distill(teacher, student, example_input=torch.zeros(1, 2), steps=100, lr=1e-2)
        >>> result.drawn_after.relative_l2 < result.drawn_before.relative_l2
        True
        >>> result.inputs, result.task
        ('uniform (Sobol) on [-1, 1] x [-1, 1] seed=0', 'regression')

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network; Polino et al. 2018.
    """
    if min(steps, batch_size, val_samples) < 1 or not lr > 0:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, val_samples={val_samples}, lr={lr}: allowed are >= 1 and > 0."
        )
    draws = synthesize(teacher, sampler, example_input, bounds=bounds, seed=seed)
    judged = draws.held_out()(val_samples)
    x = take_samples(judged, val_samples, 0, batch_size)
    decided = find_task(teacher, x) if task == "auto" else Decision(cast(Task, task), "given", True)
    if not decided.sure:
        warnings.warn(
            f"task taken as {decided.task}: {decided.reason}. Give task='classification' or 'regression'.",
            stacklevel=2,
        )

    def errors() -> tuple[Errors, Errors | None]:
        starts = range(0, val_samples, batch_size)
        drawn = (take_samples(judged, val_samples, i, i + batch_size) for i in starts)
        given = None
        if val_data is not None:
            taken = Calibration(data=val_data, samples=val_samples, seed=seed).batches(teacher)
            given = compare(teacher, student, taken, decided.task)
        return compare(teacher, student, drawn, decided.task), given

    before = errors()
    rule, name = _loss(loss, teacher, x, decided.task, student, residual)
    size, start = batch_size, copy.deepcopy(student.state_dict())
    began = time.perf_counter()
    for attempt in ("whole", "halved"):
        batches = draws.loader(size, steps) if data is None else _Unlabelled(data, teacher, seed)
        try:
            fit_student(teacher, student, rule, batches, steps, lr, seed, trainer_options or {})
            break
        except torch.OutOfMemoryError:
            if attempt == "halved" or size < 2 or data is not None:
                raise
            student.load_state_dict(start)
            size //= 2
            warnings.warn(f"memory ran out: trained again with batches of {size}.", stacklevel=2)
    seconds = time.perf_counter() - began
    after = errors()
    return DistillResult(
        model=student.eval(),
        ratio=real_parameters(student) / real_parameters(teacher),
        drawn_before=before[0],
        drawn_after=after[0],
        data_before=before[1],
        data_after=after[1],
        task=decided.task,
        task_reason=decided.reason,
        inputs=draws.describe() if data is None else "data",
        inputs_reason=draws.reason if data is None else "given",
        loss=name,
        steps=steps,
        batch_size=size,
        seconds=seconds,
    )


class _Unlabelled:
    """Inputs of batches, in another order at every reading if their loader shuffles."""

    def __init__(self, data: Any, model: nn.Module, seed: int) -> None:
        self.data, self.model, self.seed = data, model, seed

    def __iter__(self) -> Iterator[tuple[Any]]:
        self.seed += 1
        for x in Calibration(data=self.data, samples=sys.maxsize, seed=self.seed).batches(self.model):
            yield (x,)


class _ScaledError:
    """``mean (y_s - y_t)^2 / var(y_t)``, and the mean square of the residuals of equations if there are any."""

    def __init__(
        self, scale: float, student: nn.Module, residual: Callable[[nn.Module, Any], Tensor] | None
    ) -> None:
        self.scale, self.student, self.residual = scale, student, residual

    def __call__(self, student_output: Any, teacher_output: Any, batch: Any) -> Tensor:
        s, t = answers(student_output, teacher_output)
        if s.shape != t.shape:
            raise ValueError(
                f"the student gives {tuple(s.shape)}, the teacher {tuple(t.shape)}: their last layers must have the "
                "same output width."
            )
        loss = (s - t).abs().square().mean() / self.scale
        if self.residual is not None:
            x = batch[0] if isinstance(batch, tuple | list) else batch
            loss = loss + self.residual(self.student, x).square().mean()
        return loss


def _loss(
    loss: str | Loss,
    teacher: nn.Module,
    x: Any,
    task: Task,
    student: nn.Module,
    residual: Callable[[nn.Module, Any], Tensor] | None,
) -> tuple[str | Loss, str]:
    """The loss for ``Distillation``, and its name."""
    if loss != "auto":
        if residual is not None:
            raise ValueError(f"residual is added to loss='auto', not to {loss!r}.")
        return loss, loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    if task == "classification" and residual is None:
        return "kd", f"kd (T = {TEMPERATURE:g})"
    if any(p.is_complex() for p in teacher.parameters()) and residual is None:
        return "relative_l2", "relative_l2"
    with evaluating(teacher):
        y = answers(call(teacher, x), call(teacher, x))[1].abs().double()
    scale = float(y.var(correction=0)) or 1.0
    name = f"mse / {scale:.3g}, the variance of the teacher's answers"
    return _ScaledError(scale, student, residual), name + (" + residual" if residual else "")
