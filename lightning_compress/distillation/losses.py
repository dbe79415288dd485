"""Distillation losses: plain functions of what a student and a teacher give for one batch.

Teacher terms carry no gradient. Half precision is computed in float32. Complex values count by modulus, or as a real
and an imaginary part where a difference is taken. All but ``contrastive_loss`` are zero when both sides are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.distillation.tensors import equal_size, pooled, real, squared, vectors, wide
from lightning_compress.metrics import relative_h1_error

Regression = Literal["mse", "relative_l2", "h1"]

_TINY = 1e-12


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, class_axis: int = 1
) -> Tensor:
    """Softened answers of the teacher: T² Σ_c p_t (ln p_t − ln p_s), p = softmax(z / T), mean over the batch.

    The factor T² keeps the size of the gradients comparable at every temperature.

    Args:
        student_logits: (N, C) or (N, C, …), complex by modulus; positions count like samples.
        teacher_logits: of the same shape.
        temperature: T > 0; above 1 the teacher's small probabilities count more.
        class_axis: axis of the classes.

    Returns:
        Scalar ≥ 0, at least float32.

    Raises:
        ValueError: shapes differ, or the temperature is not positive.

    Examples:
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> kd_loss(z + 5, z).item(), kd_loss(z.flip(1), z).item() > 0
        (0.0, True)

    References:
        Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
    """
    student, teacher = _logits(student_logits, teacher_logits, temperature, class_axis)
    return temperature**2 * _divergence(teacher, student).mean()


def decoupled_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    w_tc: float = 1.0,
    w_nc: float = 8.0,
    class_axis: int = 1,
) -> Tensor:
    """KD split in two: T² (w_tc KL(b_t ‖ b_s) + w_nc KL(q_t ‖ q_s)), mean over the batch.

    b = (p_y, 1 − p_y) is the pair of target class y and all others, q the softmax among the others only. In ``kd_loss``
    the second part has the weight 1 − p_y of the teacher, so a sure teacher teaches little; here its weight is free.

    Args:
        student_logits: (N, C) or (N, C, …) with C ≥ 2, complex by modulus.
        teacher_logits: of the same shape.
        labels: target classes, int64, the shape of the logits without the class axis.
        temperature: T > 0.
        w_tc: weight of the target part.
        w_nc: weight of the non-target part.
        class_axis: axis of the classes.

    Returns:
        Scalar ≥ 0, at least float32.

    Raises:
        ValueError: shapes differ or do not fit the labels, or the temperature is not positive.

    Examples:
        >>> z, y = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
        >>> decoupled_kd_loss(z, z, y).item()
        0.0

    References:
        Zhao et al., "Decoupled knowledge distillation", 2022.
    """
    student, teacher = _logits(student_logits, teacher_logits, temperature, class_axis)
    if labels.shape != student.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; for logits of shape "
            f"{tuple(student_logits.shape)} they must be integers of shape {tuple(student.shape[:-1])}."
        )
    target = F.one_hot(labels.long(), student.shape[-1]).bool()
    pairs = [_binary(log_p, target) for log_p in (teacher, student)]
    others = [
        torch.log_softmax(log_p[~target].reshape(*log_p.shape[:-1], -1), -1) for log_p in (teacher, student)
    ]
    parts = w_tc * _divergence(*pairs) + w_nc * _divergence(*others)
    return temperature**2 * parts.mean()


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Hints: Σ over pairs of layers of mean (f_s − f_t)².

    Where the spatial sizes differ, the larger feature is averaged to the smaller one's size. Channels must be equal;
    ``Distillation`` puts a learned projection in between where they are not.

    Args:
        student: features (N, C, …) of the student's layers, complex as |f_s − f_t|².
        teacher: of the teacher's layers, in the same order.

    Returns:
        Scalar ≥ 0, at least float32.

    Raises:
        ValueError: a pair does not fit.

    Examples:
        >>> f = torch.rand(2, 3, 4, 4)
        >>> feature_loss([f], [f]).item(), round(feature_loss([f, f + 2], [f + 1, f]).item(), 5)
        (0.0, 5.0)

    References:
        Romero et al., "FitNets: hints for thin deep nets", 2015.
    """
    total = _zero(student)
    for s, t in _pairs(student, teacher):
        a, b = equal_size(s, t)
        if a.shape != b.shape:
            raise ValueError(
                f"features of shape {tuple(s.shape)} and {tuple(t.shape)} cannot be compared: only the sizes behind "
                "sample and channel may differ."
            )
        total = total + squared(a - b).mean()
    return total


def attention_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], p: float = 2.0, channel_axis: int = 1
) -> Tensor:
    """Where a layer looks: Σ over pairs of layers of mean (Q(f_s)/‖Q(f_s)‖₂ − Q(f_t)/‖Q(f_t)‖₂)².

    Q = Σ_channels |f|^p, one map per sample, flattened. The numbers of channels need not agree; where the spatial sizes
    differ, the larger map is averaged to the smaller one's size.

    Args:
        student: features (N, C, …) with at least one axis of positions, complex by modulus.
        teacher: in the same order.
        p: power ≥ 1.
        channel_axis: axis of the channels; −1 for tokens (N, L, C).

    Returns:
        Scalar ≥ 0, at least float32.

    Raises:
        ValueError: a pair does not fit, or has no positions.

    Examples:
        >>> f = torch.rand(2, 3, 4, 4)
        >>> attention_loss([2 * f], [f]).item() < 1e-12
        True

    References:
        Zagoruyko, Komodakis, "Paying more attention to attention", 2017.
    """
    total = _zero(student)
    for s, t in _pairs(student, teacher):
        maps = [wide(f).abs().pow(p).sum(channel_axis, keepdim=True).movedim(channel_axis, 1) for f in (s, t)]
        if min(m.ndim for m in maps) < 3:
            raise ValueError(
                f"attention needs positions behind sample and channel, but the features have the shapes "
                f"{tuple(s.shape)} and {tuple(t.shape)}; use loss='feature' or 'relational' for vectors."
            )
        a, b = (F.normalize(m.flatten(1), dim=1, eps=_TINY) for m in equal_size(*maps))
        if a.shape != b.shape:
            raise ValueError(
                f"attention maps of features {tuple(s.shape)} and {tuple(t.shape)} cannot be compared."
            )
        total = total + (a - b).square().mean()
    return total


def relational_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 1.0, angle_weight: float = 2.0
) -> Tensor:
    """Relations between samples: w_D Huber(ψ_D(s), ψ_D(t)) + w_A Huber(ψ_A(s), ψ_A(t)).

    ψ_D is the distance of a pair over the mean distance of pairs (i ≠ j), ψ_A the cosine of the angle ∠ijk of a
    triple of three different samples, Huber(a, b) = (a − b)²/2 below 1 and |a − b| − 1/2 above, each averaged over all
    pairs or triples. Widths need not agree. Memory grows as N³; a batch of one sample has no pairs, and no loss.

    Args:
        student: (N, …), flattened to vectors, complex as real and imaginary parts.
        teacher: (N, …) of any width.
        distance_weight: w_D.
        angle_weight: w_A.

    Returns:
        Scalar ≥ 0, at least float32.

    Raises:
        ValueError: the numbers of samples differ.

    Examples:
        >>> x = torch.rand(5, 3)
        >>> relational_loss(3 * x + 1, x).item() < 1e-9       # neither scale nor origin counts
        True

    References:
        Park et al., "Relational knowledge distillation", 2019.
    """
    s, t = (vectors(f) for f in (student, teacher.detach()))
    if len(s) != len(t):
        raise ValueError(f"{len(s)} samples of the student and {len(t)} of the teacher: they must agree.")
    with torch.autocast(s.device.type, enabled=False):
        total = _zero([s])
        if len(s) > 1:
            total = total + distance_weight * F.smooth_l1_loss(_distances(s), _distances(t))
        if len(s) > 2:
            total = total + angle_weight * F.smooth_l1_loss(_angles(s), _angles(t))
        return total


def contrastive_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Recognize one's own: −mean_i ln( e^(⟨s_i, t_i⟩/τ) / Σ_j e^(⟨s_i, t_j⟩/τ) ), with s and t of unit length.

    The student's answer to a sample must be nearer to the teacher's answer to it than to those to the other samples of
    the batch: InfoNCE within the batch. Contrastive representation distillation (Tian 2020) draws thousands of
    negatives from a memory bank and trains projections of both sides; this has the batch alone and, in
    ``Distillation``, a projection of the student. Its smallest value is not zero.

    Args:
        student: (N, C) or (N, C, …), whose positions are averaged; complex by modulus.
        teacher: of the same N and C.
        temperature: τ > 0.

    Returns:
        Scalar, at least float32; ln N when the student tells nothing.

    Raises:
        ValueError: shapes differ, or the temperature is not positive.

    Examples:
        >>> t = torch.eye(4)
        >>> contrastive_loss(t, t).item() < 0.01 < contrastive_loss(t.roll(1, 0), t).item()
        True

    References:
        Tian, Krishnan, Isola, "Contrastive representation distillation", 2020; van den Oord, Li, Vinyals,
        "Representation learning with contrastive predictive coding", 2018.
    """
    _positive("temperature", temperature)
    s, t = (F.normalize(pooled(f), dim=1, eps=_TINY) for f in (student, teacher.detach()))
    if s.shape != t.shape:
        raise ValueError(f"vectors of shape {tuple(s.shape)} and {tuple(t.shape)} cannot be compared.")
    with torch.autocast(s.device.type, enabled=False):
        return F.cross_entropy(s @ t.T / temperature, torch.arange(len(s), device=s.device))


def regression_loss(
    student: Tensor, teacher: Tensor, kind: Regression = "mse", periodic: bool = False
) -> Tensor:
    """Distance of outputs: "mse" mean |y_s − y_t|², "relative_l2" ‖y_s − y_t‖₂ / ‖y_t‖₂, or "h1".

    "relative_l2" is a mean over samples, each with its norm over all its values. Where a sample is a single value (a
    network of coordinates) the norms run over the batch, since the batch is the field. "h1" is ``relative_h1_error``:
    fields (N, C, …) with derivatives, per sample and channel.

    Args:
        student: y_s (N, …), real or complex.
        teacher: y_t of the same shape.
        kind: which distance.
        periodic: of "h1": whether fields go on at the other side.

    Returns:
        Scalar ≥ 0, at least float32; zero for references of norm zero.

    Raises:
        ValueError: unknown kind, shapes differ, or fields too small for "h1".

    Examples:
        >>> y = torch.ones(3, 1, 8)
        >>> regression_loss(1.5 * y, y).item(), regression_loss(1.5 * y, y, "relative_l2").item()
        (0.25, 0.5)

    References:
        Li et al., "Fourier neural operator for parametric partial differential equations", 2021 ("relative_l2");
        Czarnecki et al., "Sobolev training for neural networks", 2017 ("h1").
    """
    if kind not in get_args(Regression):
        raise ValueError(f"kind={kind!r} is unknown; allowed: {', '.join(get_args(Regression))}.")
    s, t = wide(student), wide(teacher).detach()
    if s.shape != t.shape:
        raise ValueError(f"outputs of shape {tuple(s.shape)} and {tuple(t.shape)} cannot be compared.")
    if kind == "mse":
        return squared(s - t).mean()
    if kind == "h1":
        return relative_h1_error(s, t, periodic=periodic).to(real(s))
    if s.ndim < 2 or s[0].numel() == 1:
        s, t = s[None], t[None]
    error, norm = ((y.abs() if y.is_complex() else y).flatten(1).norm(dim=1) for y in (s - t, t))
    counted = norm >= _TINY
    return (error[counted] / norm[counted]).mean() if bool(counted.any()) else _zero([s])


def sobolev_loss(student_output: Tensor, teacher_output: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
    """Values and slopes: mean (y_s − y_t)² + λ mean (∂y_s/∂x − ∂y_t/∂x)², by automatic differentiation.

    Rows of x must be independent of one another in both networks (no BatchNorm in train mode), for ∂/∂x is taken of the
    sum over the batch, one output after the other: meant for few outputs, such as those of a network of coordinates.

    Args:
        student_output: y_s (N, outputs), real, computed from x.
        teacher_output: y_t of the same shape, computed from x too.
        x: (N, coordinates), with ``requires_grad``.
        weight: λ ≥ 0.

    Returns:
        Scalar ≥ 0, at least float32, differentiable in the student's parameters.

    Raises:
        ValueError: shapes differ, outputs are complex, or x does not require gradients.

    Examples:
        >>> x = torch.rand(4, 1, requires_grad=True)
        >>> round(sobolev_loss(3 * x + 1, 3 * x, x).item(), 5), round(sobolev_loss(3 * x, x - x, x, 2.0).item()) >= 18
        (1.0, True)

    References:
        Czarnecki et al., "Sobolev training for neural networks", 2017.
    """
    if student_output.shape != teacher_output.shape:
        raise ValueError(
            f"outputs of shape {tuple(student_output.shape)} and {tuple(teacher_output.shape)} cannot be compared."
        )
    if not x.requires_grad or student_output.is_complex() or teacher_output.is_complex():
        raise ValueError("sobolev_loss needs real outputs and an x with requires_grad=True.")
    loss = regression_loss(student_output, teacher_output)
    if not weight:
        return loss
    slopes = [
        (_slope(s, x, True), _slope(t, x, False).detach())
        for s, t in zip(_columns(student_output), _columns(teacher_output), strict=True)
    ]
    return loss + weight * torch.stack([(a - b).square().mean() for a, b in slopes]).mean()


# -- parts ---------------------------------------------------------------------------------------------------


def _zero(tensors: Sequence[Tensor]) -> Tensor:
    return torch.zeros((), device=tensors[0].device, dtype=real(wide(tensors[0])))


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value}: allowed is > 0.")


def _logits(student: Tensor, teacher: Tensor, temperature: float, class_axis: int) -> tuple[Tensor, Tensor]:
    """Logarithms of the softened probabilities, classes last."""
    _positive("temperature", temperature)
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits of shape {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared."
        )
    if student.ndim < 2 or student.shape[class_axis] < 2:
        raise ValueError(
            f"logits of shape {tuple(student.shape)} have no 2 classes on axis {class_axis}. For one logit z give "
            "torch.stack([0 * z, z], 1), for values use a regression loss."
        )
    z = [wide(x).movedim(class_axis, -1) for x in (student, teacher.detach())]
    s, t = (torch.log_softmax((x.abs() if x.is_complex() else x) / temperature, -1) for x in z)
    return s, t


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) along the last axis; a probability of zero adds nothing."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _binary(log_p: Tensor, target: Tensor) -> Tensor:
    """(ln p_y, ln(1 − p_y)), the second as a sum over the others and not as a difference."""
    shape = (*log_p.shape[:-1], -1)
    rest = torch.logsumexp(log_p[~target].reshape(shape), -1, keepdim=True)
    return torch.cat([log_p[target].reshape(shape), rest], -1)


def _pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"{len(student)} features of the student and {len(teacher)} of the teacher: give pairs, one or more."
        )
    return [(wide(s), wide(t).detach()) for s, t in zip(student, teacher, strict=True)]


def _distances(x: Tensor) -> Tensor:
    """Distances of pairs over their mean."""
    distances = torch.pdist(x)
    mean = distances.mean()
    return distances / torch.where(mean > 0, mean, 1)


def _angles(x: Tensor) -> Tensor:
    """Cosine of the angle at sample j between i and k, for all triples of different samples; 0 where two coincide."""
    products = x @ x.T
    at = products.diagonal()[:, None, None]  # j first
    rows = products[:, :, None], products[:, None, :]
    numerator = products[None] - rows[0] - rows[1] + at
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    lengths = distances[:, :, None] * distances[:, None, :]
    other = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    triples = other[None] & other[:, :, None] & other[:, None, :]
    cosines = numerator / torch.where(lengths > 0, lengths, 1)
    return (cosines * (lengths > 0))[triples]


def _columns(y: Tensor) -> list[Tensor]:
    return list(y.reshape(len(y), -1).unbind(1))


def _slope(y: Tensor, x: Tensor, training: bool) -> Tensor:
    """∂y/∂x of one output; zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (slope,) = torch.autograd.grad(
        y.sum(), x, create_graph=training, retain_graph=True, materialize_grads=True
    )
    return slope
