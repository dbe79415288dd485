"""How far a compressed model is from its original: on the same inputs, the original run once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.metrics import OutputErrorRate, Task
from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.running import call, evaluating, first_tensor, move

Evaluate = Callable[[nn.Module], float]


class OutputError:
    """`OutputErrorRate` against one original, whose outputs are kept.

    Args:
        model: the original.
        inputs: where inputs come from. Given ones are all used; drawn ones as many as ``inputs.samples``.
        task: "classification" (share of inputs, or of positions, whose class differs) or "regression" (mean relative
            L2 error). None: classification if outputs have two axes, [N, C] with at least two classes.

    Raises:
        ValueError: there is nothing to take or to draw inputs from, or the model returns no tensor.

    Examples:
        >>> from lightning_compress.pipelines.errors import OutputError
        >>> from lightning_compress.stats import Calibration
        >>> net = nn.Linear(4, 3)
        >>> error = OutputError(net, Calibration(example_input=torch.zeros(1, 4)))
        >>> error(net), error.task
        (0.0, 'classification')
    """

    def __init__(self, model: nn.Module, inputs: Calibration, task: Task | None = None) -> None:
        batches = everything(inputs).batches(model)
        self.batches: list[Any] = [move(x, torch.device("cpu")) for x in batches]
        self.outputs = list(_outputs(model, self.batches))
        y = self.outputs[0]
        self.task: Task = task or ("classification" if y.dim() == 2 and y.shape[1] > 1 else "regression")

    def __call__(self, model: nn.Module) -> float:
        """The error of a model.

        Args:
            model: anything that takes the same inputs and returns outputs of the same shape.

        Returns:
            The error, >= 0; infinity if an output is not finite.
        """
        metric = OutputErrorRate(self.task)
        for theirs, ours in zip(self.outputs, _outputs(model, self.batches), strict=True):
            if not bool(torch.isfinite(ours).all()):
                return float("inf")
            metric.update(theirs, ours)
        return float(metric.compute())


def everything(inputs: Calibration) -> Calibration:
    """The same inputs, of given ones all.

    Args:
        inputs: where inputs come from.

    Returns:
        A copy without a bound on given inputs.

    Raises:
        ValueError: there is nothing to take or to draw inputs from.
    """
    if not inputs.available:
        raise ValueError("errors are measured on inputs: give data=, or example_input= to draw some.")
    given = isinstance(inputs.data, Iterable) and not isinstance(inputs.data, str)
    return inputs if not given else Calibration(inputs.example_input, inputs.data, sys.maxsize, inputs.seed)


def top1(inputs: Calibration) -> Evaluate:
    """A function that measures top-1 accuracy on labelled data.

    Args:
        inputs: batches with labels.

    Returns:
        Model -> share of inputs whose class is the label, in [0, 1].

    Raises:
        ValueError: by the function, if there are no labels.
    """

    def accuracy(model: nn.Module) -> float:
        right, total = 0, 0
        with evaluating(model):
            for x, labels in everything(inputs).pairs(model):
                if not isinstance(labels, Tensor):
                    raise ValueError(
                        "max_accuracy_drop needs evaluate= (a function from model to accuracy), or data with labels."
                    )
                y = first_tensor(call(model, x))
                assert y is not None
                right += int((y.argmax(1) == labels.to(y.device)).sum())
                total += labels.numel()
        return right / total

    return accuracy


def _outputs(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    found = []
    with evaluating(model):
        for x in batches:
            y = first_tensor(call(model, x))
            if y is None:
                raise ValueError(
                    f"{type(model).__name__} returns no tensor, so its outputs cannot be compared."
                )
            found.append(y.detach().cpu())
    return found
