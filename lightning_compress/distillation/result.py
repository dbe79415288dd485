"""How far a student is from its teacher, before and after training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress import tables
from lightning_compress.distillation.outputs import answers
from lightning_compress.metrics import OutputErrorRate, Task
from lightning_compress.stats.running import call, evaluating


@dataclass(frozen=True)
class Errors:
    """How far a student is from its teacher.

    Args:
        ber: output error rate, as ``OutputErrorRate`` defines it for the task.
        relative_l2: ``||y_s - y_t|| / ||y_t||`` over all inputs together; NaN for classes.
        n: number of inputs.
    """

    ber: float
    relative_l2: float
    n: int


@dataclass(frozen=True)
class DistillResult:
    """A trained student, and what became better.

    Args:
        model: the student, in eval mode.
        ratio: its real parameters, as a share of the teacher's.
        drawn_before: errors of the student as it was given, on drawn inputs that did not train.
        drawn_after: the same after training.
        data_before: the same on given inputs; None without any.
        data_after: the same after training.
        task: "classification" or "regression".
        task_reason: why.
        inputs: what trained: the sampler with its seed, or "data".
        inputs_reason: why that sampler.
        loss: name of the loss.
        steps: optimizer steps.
        batch_size: inputs of each.
        seconds: that training took.
    """

    model: nn.Module
    ratio: float
    drawn_before: Errors
    drawn_after: Errors
    data_before: Errors | None
    data_after: Errors | None
    task: Task
    task_reason: str
    inputs: str
    inputs_reason: str
    loss: str
    steps: int
    batch_size: int
    seconds: float

    @property
    def report(self) -> str:
        """Errors before and after, and what was decided, as text."""
        rows = []
        for name, before, after in (
            ("drawn inputs", self.drawn_before, self.drawn_after),
            ("given data", self.data_before, self.data_after),
        ):
            if before is not None and after is not None:
                rows.append([f"OutputErrorRate, {name}", before.ber, after.ber, after.n])
                if self.task == "regression":
                    rows.append([f"relative L2, {name}", before.relative_l2, after.relative_l2, after.n])
        facts = [
            f"student: {self.ratio:.2%} of the teacher's parameters",
            f"task: {self.task} ({self.task_reason})",
            f"inputs: {self.inputs}" + (f" ({self.inputs_reason})" if self.inputs_reason else ""),
            f"loss: {self.loss}, {self.steps} steps of {self.batch_size}, {self.seconds:.1f} s",
        ]
        return "\n".join(
            [*facts, "", tables.text(["error to the teacher", "before", "after", "inputs"], rows)]
        )

    def __str__(self) -> str:
        return self.report


def compare(teacher: nn.Module, student: nn.Module, inputs: Iterable[Any], task: Task) -> Errors:
    """How far a student's answers are from the teacher's.

    Args:
        teacher: any module.
        student: another one; both run in eval mode and are left as they are.
        inputs: batches of inputs (tensors, tuples of arguments or dicts of keywords).
        task: "classification" or "regression".

    Returns:
        The errors.

    Examples:
        >>> net = nn.Linear(2, 3)
        >>> compare(net, net, [torch.ones(4, 2)], "regression")
        Errors(ber=0.0, relative_l2=0.0, n=4)
    """
    rate = OutputErrorRate(task)
    off, norm, n = 0.0, 0.0, 0
    with evaluating(teacher), evaluating(student):
        for x in inputs:
            s, t = (y.cpu() for y in answers(call(student, x), call(teacher, x)))
            rate.update(t, s)
            off += float((s - t).abs().double().square().sum())
            norm += float(t.abs().double().square().sum())
            n += len(t)
    total = math.sqrt(off / norm) if norm > 0 and task == "regression" else math.nan
    return Errors(float(rate.compute()), total, n)
