"""Output errors against one original, which is run once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis.rows import NAN
from lightning_compress.metrics import OutputErrorRate, Task
from lightning_compress.stats.running import call, evaluating, first_tensor, observing


@dataclass(frozen=True)
class Judgement:
    """The output error rate of a model, as columns of a row.

    Args:
        ber: output error rate.
        ber_se: its standard error.
        ber_low: lower end of its 95 % interval.
        ber_high: upper end.
        agreement: 1 - ber for classification, NaN otherwise.
        n_samples: trials that were counted.
        reason: why an error is NaN, or inputs were left out.
    """

    ber: float = NAN
    ber_se: float = NAN
    ber_low: float = NAN
    ber_high: float = NAN
    agreement: float = NAN
    n_samples: int = 0
    reason: str = ""


class Judge:
    """Compares models with an original on the same inputs.

    Args:
        model: the original.
        batches: inputs.
        task: what its outputs are.

    Examples:
        >>> from lightning_compress.analysis.judge import Judge
        >>> net = nn.Linear(4, 3)
        >>> Judge(net, [torch.randn(10, 4)], "classification")(net).ber
        0.0
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], task: Task) -> None:
        self.batches, self.task = tuple(batches), task
        self.outputs = tuple(outputs(model, self.batches))
        self.class_axis = _class_axis(model, self.batches[0]) if task == "classification" else 1

    def __call__(self, model: nn.Module, *, broken: bool = False) -> Judgement:
        """The error of a model.

        Args:
            model: anything that takes the same inputs and returns outputs of the same shape.
            broken: count outputs that are not finite, as damaged weights give them: as wrong classes, or as an
                infinite error of a regression.

        Returns:
            The error; without ``broken``, NaN with the reason if an output is not finite.
        """
        metric = OutputErrorRate(self.task, self.class_axis)
        bad = total = 0
        for ours, theirs in zip(self.outputs, outputs(model, self.batches), strict=True):
            wrong = ~torch.isfinite(theirs)
            bad, total = bad + int(wrong.sum()), total + theirs.numel()
            if not bool(wrong.any()):
                metric.update(ours, theirs)
            elif broken and self.task == "classification":
                metric.update(ours, _other_class(ours, theirs, wrong, self.class_axis))
        if bad and broken and self.task == "regression":
            return Judgement(ber=math.inf, reason=f"{bad} of {total} output values are not finite")
        if bad and not broken:
            return Judgement(reason=f"{bad} of {total} output values are not finite")
        ber = float(metric.compute())
        low, high = (float(bound) for bound in metric.confidence_interval)
        left_out = int(metric.n_left_out)
        return Judgement(
            ber,
            float(metric.standard_error),
            low,
            high,
            1 - ber if self.task == "classification" else NAN,
            int(metric.n_samples),
            f"{left_out} inputs left out, for which the original returns zeros" if left_out else "",
        )


def outputs(model: nn.Module, batches: Sequence[Any]) -> Iterator[Tensor]:
    """What a model returns: its first tensor, batch by batch.

    Args:
        model: any module; it runs in eval mode.
        batches: inputs.

    Yields:
        Outputs on the CPU.

    Raises:
        ValueError: it returns no tensor.
    """
    for x in batches:
        with evaluating(model):
            y = first_tensor(call(model, x))
        if y is None:
            raise ValueError(f"{type(model).__name__} returns no tensor, so its outputs cannot be compared.")
        yield y.detach().cpu()


def _other_class(ours: Tensor, theirs: Tensor, wrong: Tensor, axis: int) -> Tensor:
    """Scores that differ from the original's wherever one is not finite."""
    differing = torch.zeros_like(ours).scatter(axis, ours.argmin(axis, keepdim=True), 1.0)
    return torch.where(wrong.any(axis, keepdim=True), differing, theirs.nan_to_num())


def _class_axis(model: nn.Module, x: Any) -> int:
    """-1 where the outputs are those of a Linear layer, whose features come last, otherwise 1."""
    made: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(lambda m, args, out: made.append(out)).remove)
        y = first_tensor(call(model, x))
    return -1 if any(out is y for out in made) else 1
