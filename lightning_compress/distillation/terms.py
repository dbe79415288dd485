"""The loss of outputs by name or as a function, and how far a student is from its teacher."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_compress.distillation import losses
from lightning_compress.distillation.outputs import answers, check_answers, labels_of, main_tensor
from lightning_compress.distillation.watching import Call

Loss = Callable[[Any, Any, Any], Tensor]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "kd": losses.kd_loss,
    "dkd": losses.decoupled_kd_loss,
    "feature": losses.feature_loss,
    "attention": losses.attention_loss,
    "relational": losses.relational_loss,
    "contrastive": losses.contrastive_loss,
    "mse": functools.partial(losses.regression_loss, kind="mse"),
    "relative_l2": functools.partial(losses.regression_loss, kind="relative_l2"),
    "h1": functools.partial(losses.regression_loss, kind="h1"),
    "sobolev": losses.sobolev_loss,
}
OF_LOGITS = ("kd", "dkd")
NEED_FEATURES = ("feature", "attention")
_OF_VALUES = ("mse", "relative_l2", "h1", "sobolev")
_FOUND_OUT = (
    "kind",
    "channel_axis",
)  # by name and layer; and the temperature of OF_LOGITS is its own argument


def checked_options(loss: str | Loss, options: Mapping[str, Any]) -> dict[str, Any]:
    """Further options of a loss.

    Args:
        loss: key of ``LOSSES``, or a function.
        options: name -> value.

    Returns:
        The same.

    Raises:
        ValueError: an option that the loss does not have.

    Examples:
        >>> checked_options("dkd", {"w_nc": 4.0})
        {'w_nc': 4.0}
    """
    allowed: list[str] = []
    if isinstance(loss, str):
        taken = inspect.signature(LOSSES[loss]).parameters.values()
        fixed = (*_FOUND_OUT, "temperature" if loss in OF_LOGITS else "")
        allowed = [p.name for p in taken if p.default is not p.empty and p.name not in fixed]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"loss_options has {', '.join(unknown)}; loss={loss!r} takes {', '.join(allowed) or 'none'}."
        )
    return dict(options)


def output_loss(loss: str | Loss, call: Call, output: Any, batch: Any, options: Mapping[str, Any]) -> Tensor:
    """What the outputs of one call say.

    Args:
        loss: key of ``LOSSES``, or a function (student output, teacher output, batch) -> scalar.
        call: of the student.
        output: the teacher's.
        batch: what the step got; "dkd" takes its labels, or the teacher's choice where it has none.
        options: arguments of the loss by name.

    Returns:
        Scalar.

    Raises:
        ValueError: outputs that cannot be compared.

    Examples:
        >>> y = torch.tensor([[1.0, 0.0]])
        >>> output_loss("kd", Call(output=y), y, None, {"temperature": 2.0}).item()
        0.0
    """
    if not isinstance(loss, str):
        return loss(call.output, output, batch)
    s, t = answers(call.output, output)
    if loss != "relational":  # which compares samples with one another
        check_answers(s, t)
    if loss == "kd":
        return losses.kd_loss(s, t, **options)
    if loss == "dkd":
        chosen = (t.abs() if t.is_complex() else t).argmax(options.get("class_axis", 1))
        labels = labels_of(batch)
        fits = labels is not None and labels.shape == chosen.shape
        return losses.decoupled_kd_loss(s, t, labels if fits else chosen, **options)  # type: ignore[arg-type]
    if loss == "sobolev":
        x = next((v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor)), t)
        return losses.sobolev_loss(s, t, x, **options)
    return LOSSES[loss](s, t, **options)


def likeness(
    loss: str | Loss, student_output: Any, teacher_output: Any, batch: Any, class_axis: int = 1
) -> tuple[str, Tensor] | None:
    """How near the student's answers are to the teacher's, as a quantity to log.

    Args:
        loss: key of ``LOSSES``, or a function.
        student_output: the student's.
        teacher_output: the teacher's.
        batch: integer labels in it mean classes.
        class_axis: axis of the classes.

    Returns:
        "agreement" and the share of equal top-1, or "relative_l2" and that error; None where they cannot be compared.

    Examples:
        >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> likeness("kd", y, y, None), likeness("mse", 2 * y, y, None)
        (('agreement', tensor(1.)), ('relative_l2', tensor(1.)))
    """
    s, t = main_tensor(student_output), main_tensor(teacher_output)
    if s is None or t is None or s.shape != t.shape or s.ndim == 0:
        return None
    classes = s.ndim > 1 and s.shape[class_axis] > 1
    if classes and loss not in _OF_VALUES and (loss in OF_LOGITS or labels_of(batch) is not None):
        s, t = (y.abs() if y.is_complex() else y for y in (s, t))
        return "agreement", (s.argmax(class_axis) == t.argmax(class_axis)).float().mean()
    return "relative_l2", losses.regression_loss(s, t, "relative_l2")
