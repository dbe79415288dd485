"""What batches hold and what networks return, and whether the answers of two networks can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.tables import listing


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Input and target of a batch.

    Args:
        batch: (x, y), (x,), x, or a mapping with "x" and perhaps "y".

    Returns:
        x and y; y is None where the batch has no target.

    Raises:
        ValueError: anything else.

    Examples:
        >>> split_batch((1, 2)), split_batch([1]), split_batch({"x": 1, "y": 2})
        ((1, 2), (1, None), (1, 2))
    """
    if isinstance(batch, Mapping):
        if "x" in batch:
            return batch["x"], batch.get("y")
        raise ValueError(
            f"the batch is a mapping with {listing([str(k) for k in batch])}; give the input as 'x', a target as 'y'."
        )
    if isinstance(batch, tuple | list):
        if len(batch) in (1, 2):
            return batch[0], batch[1] if len(batch) == 2 else None
        raise ValueError(
            f"the batch has {len(batch)} parts; allowed are (x, y), (x,), x, or a mapping with 'x' and 'y'. A "
            "LightningModule as student takes any batch that its training_step takes."
        )
    return batch, None


def labels_of(batch: Any) -> Tensor | None:
    """Integer targets of a batch, if it has any that can be found.

    Args:
        batch: any.

    Returns:
        The targets, or None.

    Examples:
        >>> labels_of((torch.zeros(2, 3), torch.tensor([1, 0]))).tolist(), labels_of({"image": 1})
        ([1, 0], None)
    """
    try:
        target = split_batch(batch)[1]
    except ValueError:
        return None
    whole = isinstance(target, Tensor) and not (target.is_floating_point() or target.is_complex())
    return target if whole else None


def main_tensor(output: Any) -> Tensor | None:
    """The tensor that an output is about.

    Args:
        output: a tensor, something with ``logits``, or a tuple, list or mapping whose first tensor counts.

    Returns:
        That tensor, or None if there is none.

    Examples:
        >>> main_tensor({"hidden": None, "y": torch.ones(1)}).item(), main_tensor("nothing")
        (1.0, None)
    """
    parts = output.values() if isinstance(output, Mapping) else output
    parts = list(parts) if isinstance(output, Mapping | tuple | list) else [parts]
    found = (
        getattr(output, "logits", None),
        output.get("logits") if isinstance(output, Mapping) else None,
        *parts,
    )
    return next((p for p in found if isinstance(p, Tensor)), None)


def answers(student_output: Any, teacher_output: Any) -> tuple[Tensor, Tensor]:
    """The tensors to compare.

    Args:
        student_output: what the student returned.
        teacher_output: what the teacher returned.

    Returns:
        Student's and teacher's.

    Raises:
        ValueError: one of them has no tensor.

    Examples:
        >>> [len(y) for y in answers(torch.ones(2), (torch.ones(3), None))]
        [2, 3]
    """
    found = []
    for whose, output in (("student", student_output), ("teacher", teacher_output)):
        tensor = main_tensor(output)
        if tensor is None:
            raise ValueError(
                f"the {whose} returned {type(output).__name__}, which holds no tensor; give loss=function, which gets "
                "(student output, teacher output, batch)."
            )
        found.append(tensor)
    return found[0], found[1]


def check_answers(student: Tensor, teacher: Tensor) -> None:
    """Refuse outputs that cannot be compared value by value.

    Args:
        student: the student's.
        teacher: the teacher's.

    Raises:
        ValueError: shapes differ.

    Examples:
        >>> check_answers(torch.ones(2, 3), torch.ones(2, 3))
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's output has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. Give the "
            f"student's last layer the teacher's output width, use a loss of features, or loss=function."
        )


def check_finite(teacher: Tensor, where: str) -> None:
    """Refuse a teacher whose answers are not numbers.

    Args:
        teacher: its output.
        where: which batch, in words.

    Raises:
        ValueError: values that are not finite.

    Examples:
        >>> check_finite(torch.ones(1), "batch 0")
    """
    bad = teacher.numel() - int(torch.isfinite(teacher).sum())
    if bad:
        raise ValueError(
            f"{where}: {bad} of {teacher.numel()} values of the teacher's output are not finite. Check this batch and "
            "the teacher's precision (float16 overflows at 65,504)."
        )


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student that is its own teacher, in whole or in part.

    Args:
        student: will be trained.
        teacher: must stay as it is.

    Raises:
        ValueError: they share parameters or buffers.

    Examples:
        >>> check_apart(nn.Linear(2, 2), nn.Linear(2, 2))
    """
    if student is teacher:
        raise ValueError("student and teacher are the same module; give teacher=copy.deepcopy(student).")
    own = {id(t) for t in [*teacher.parameters(), *teacher.buffers()]}
    shared = [n for n, t in [*student.named_parameters(), *student.named_buffers()] if id(t) in own]
    if shared:
        raise ValueError(
            f"student and teacher share {listing(shared)}: training the student would change the teacher. Give "
            "teacher=copy.deepcopy(teacher)."
        )
