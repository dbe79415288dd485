"""Errors between the outputs of two models, or of a model and the truth, as torchmetrics and as functions.

`OutputErrorRate` (BER in this project) compares a compressed model with its original, `RelativeL2Error` and
`RelativeH1Error` a predicted field with a reference. All are means over trials, with a standard error and a 95 %
interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

Task = Literal["classification", "regression"]

_Z95 = 1.959963984540054  # quantile of the normal distribution for a two-sided 95 % interval
_SMALLEST_NORM = 1e-12  # references with a smaller norm have no relative error


def output_error_rate(
    original_output: Tensor, compressed_output: Tensor, task: Task = "classification", class_axis: int = 1
) -> Tensor:
    """Output error rate (BER) between the outputs of an original model f and a compressed one g.

    Classification: share of positions where argmax_c f ≠ argmax_c g. Regression: mean over inputs of
    ‖f(x) − g(x)‖₂ / ‖f(x)‖₂. Details in `OutputErrorRate`.

    Args:
        original_output: f(x), batch axis first.
        compressed_output: g(x), of the same shape.
        task: "classification" or "regression".
        class_axis: Axis of the classes (classification only).

    Returns:
        Scalar float64 (float32 on devices without float64); NaN without a trial.

    Raises:
        ValueError: If shapes differ or do not fit the task, an argument is not finite, or the task is
            unknown.

    Examples:
        >>> f = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> output_error_rate(f, f.flip(1)).item()
        1.0
        >>> round(output_error_rate(f, 0.9 * f, task="regression").item(), 6)
        0.1
    """
    return _output_errors(original_output, compressed_output, task, class_axis)[0].mean()


def relative_l2_error(preds: Tensor, target: Tensor, dims: int | None = None) -> Tensor:
    """Mean over samples and channels of ‖preds − target‖₂ / ‖target‖₂.

    Args:
        preds: (N, C, …) real or complex.
        target: Of the same shape.
        dims: Number of trailing axes the norms run over; None: all behind sample and channel.

    Returns:
        Scalar float64 (float32 on devices without float64); NaN without a reference above 1e-12.

    Raises:
        ValueError: If shapes differ, have no axis for the norms, or an argument is not finite.

    Examples:
        >>> y = torch.ones(2, 1, 4, 4)
        >>> relative_l2_error(1.25 * y, y).item()
        0.25

    References:
        Li et al., "Fourier neural operator for parametric partial differential equations", 2021.
    """
    return _field_errors(preds, target, dims)[0].mean()


def relative_h1_error(
    preds: Tensor, target: Tensor, dims: int | None = None, periodic: bool = False
) -> Tensor:
    """Mean over samples and channels of √(‖e‖² + ‖∇e‖²) / √(‖y‖² + ‖∇y‖²), with e = preds − target and y = target.

    Details in `RelativeH1Error`.

    Args:
        preds: (N, C, …) real or complex, values on a grid of the unit cube.
        target: Of the same shape.
        dims: Number of trailing axes that are space; None: all behind sample and channel.
        periodic: Whether the fields go on at the other side; otherwise differences are one-sided at the border.

    Returns:
        Scalar float64 (float32 on devices without float64); NaN without a reference above 1e-12.

    Raises:
        ValueError: If shapes differ, have no axis for the norms or an axis of fewer than 3 points, or an argument
            is not finite.

    Examples:
        >>> y = torch.rand(2, 1, 4, 4)
        >>> round(relative_h1_error(1.25 * y, y).item(), 6)
        0.25

    References:
        Czarnecki et al., "Sobolev training for neural networks", 2017.
    """
    return _field_errors(preds, target, dims, _differences(periodic))[0].mean()


def wilson_interval(p: Tensor, n: Tensor, z: float = _Z95) -> tuple[Tensor, Tensor]:
    """Wilson score interval for a share: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).

    Args:
        p: Observed share, in 0..1.
        n: Number of independent trials, > 0.
        z: Quantile of the normal distribution; the default gives 95 %.

    Returns:
        Lower and upper bound, within 0..1.

    Examples:
        >>> low, high = wilson_interval(torch.tensor(0.0), torch.tensor(100.0))
        >>> round(low.item(), 4), round(high.item(), 4)
        (0.0, 0.037)

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    centre = p + z**2 / (2 * n)
    half = z * torch.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    low, high = ((centre - half) / scale).clamp(0, 1), ((centre + half) / scale).clamp(0, 1)
    return torch.minimum(low, p), torch.maximum(high, p)  # which rounding can miss at 0 and 1


class _MeanError(Metric):
    """Mean of per-trial errors, its uncertainty, and how many trials were counted and left out.

    The states are sums, so they add up over batches and over processes. The properties compute when needed;
    in distributed runs call them on every process, as `compute` itself.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    total: Tensor
    squares: Tensor
    count: Tensor
    left_out: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, dtype in (
            ("total", torch.float64),
            ("squares", torch.float64),
            ("count", torch.int64),
            ("left_out", torch.int64),
        ):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self._summary: dict[str, Tensor] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        def move(x: Tensor) -> Tensor:
            try:
                return fn(x)
            except TypeError:  # a device without float64
                return fn(x.float())

        return super()._apply(move, *args, **kwargs)

    def _add(self, errors: Tensor, left_out: int) -> None:
        errors = errors.to(self.total)
        self.total += errors.sum()
        self.squares += (errors**2).sum()
        self.count += errors.numel()
        self.left_out += left_out

    def _variance_of_mean(self, mean: Tensor, n: Tensor) -> Tensor:
        """Sample variance / n; NaN for a single trial."""
        return ((self.squares - n * mean**2) / (n - 1)).clamp(min=0) / n

    def _interval(self, mean: Tensor, n: Tensor, standard_error: Tensor) -> tuple[Tensor, Tensor]:
        """The normal approximation, cut at 0."""
        return (mean - _Z95 * standard_error).clamp(min=0), mean + _Z95 * standard_error

    def compute(self) -> Tensor:
        """Mean error over all trials so far; NaN, with a warning, if there was none."""
        n = self.count.to(self.total)
        mean = self.total / n
        standard_error = self._variance_of_mean(mean, n).sqrt()
        low, high = self._interval(mean, n, standard_error)
        # Kept because here, and only here, the states hold the sums of all processes.
        self._summary = {
            "standard_error": standard_error,
            "low": low,
            "high": high,
            "n_samples": self.count.clone(),
            "n_left_out": self.left_out.clone(),
        }
        if self.count == 0 and self.update_called:
            rank_zero_warn(
                f"{type(self).__name__}: no trial was counted ({int(self.left_out)} left out for a reference "
                f"norm below {_SMALLEST_NORM}), the result is NaN."
            )
        return mean

    def _computed_value(self, name: str) -> Tensor:
        self.compute()
        return self._summary[name]

    @property
    def standard_error(self) -> Tensor:
        """Standard error of the mean; NaN without trials."""
        return self._computed_value("standard_error")

    @property
    def confidence_interval(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the 95 % interval."""
        return self._computed_value("low"), self._computed_value("high")

    @property
    def n_samples(self) -> Tensor:
        """Number of trials that were counted."""
        return self._computed_value("n_samples")

    @property
    def n_left_out(self) -> Tensor:
        """Number of trials left out because the norm of their reference is below 1e-12."""
        return self._computed_value("n_left_out")


class OutputErrorRate(_MeanError):
    """Output error rate (BER) of a compressed model g against its original f.

    Classification: the share p of trials whose top-1 differs, argmax_c f ≠ argmax_c g (ties: the lowest
    class). Outputs (N, C) give N trials, outputs (N, C, …) one per input and position. Standard error √(p(1
    − p)/n), interval after Wilson; both take trials as independent, which positions of one input are not
    quite.

    Regression: mean over inputs of ‖f(x) − g(x)‖₂ / ‖f(x)‖₂, norms over all axes but the first, not capped.
    Inputs with ‖f(x)‖ < 1e-12 are left out and counted in `n_left_out`. Standard error s/√n with the sample
    standard deviation s; interval ± 1.96 standard errors, cut at 0.

    Complex outputs count by modulus.

    Args:
        task: "classification" or "regression".
        class_axis: Axis of the classes; −1 for outputs (N, tokens, C).
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If the task is unknown.

    Examples:
        >>> metric = OutputErrorRate()
        >>> f = torch.eye(4)
        >>> metric.update(f, f.roll(1, 0))
        >>> metric.update(f, f)
        >>> metric.compute().item(), int(metric.n_samples)
        (0.5, 8)
        >>> [round(bound.item(), 3) for bound in metric.confidence_interval]
        [0.215, 0.785]

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """

    def __init__(self, task: Task = "classification", class_axis: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_task(task)
        self.task: Task = task
        self.class_axis = class_axis

    def update(self, original_output: Tensor, compressed_output: Tensor) -> None:
        """Add a batch.

        Args:
            original_output: f(x), batch axis first.
            compressed_output: g(x), of the same shape.

        Raises:
            ValueError: If shapes differ or do not fit the task, or an argument is not finite.
        """
        self._add(*_output_errors(original_output, compressed_output, self.task, self.class_axis))

    def _variance_of_mean(self, mean: Tensor, n: Tensor) -> Tensor:
        if self.task == "regression":
            return super()._variance_of_mean(mean, n)
        return mean * (1 - mean) / n

    def _interval(self, mean: Tensor, n: Tensor, standard_error: Tensor) -> tuple[Tensor, Tensor]:
        if self.task == "regression":
            return super()._interval(mean, n, standard_error)
        return wilson_interval(mean, n)


class RelativeL2Error(_MeanError):
    """Relative L2 error: mean over samples and channels of ‖f − y‖₂ / ‖y‖₂.

    The norm runs over the last `dims` axes, every other index is a trial. Trials with ‖y‖ < 1e-12 are left
    out and counted in `n_left_out`. For reals this is neuraloperator's ``LpLoss(d=dims, p=2,
    reduction="mean")``.

    Args:
        dims: Number of spatial axes at the end; None: all axes behind sample and channel.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If `dims` is below 1.

    Examples:
        >>> metric = RelativeL2Error(dims=2)
        >>> y = torch.ones(5, 1, 8, 8)
        >>> metric.update(0.75 * y, y)
        >>> metric.compute().item(), metric.standard_error.item()
        (0.25, 0.0)

    References:
        Li et al., "Fourier neural operator for parametric partial differential equations", 2021.
    """

    def __init__(self, dims: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dims = _checked_dims("RelativeL2Error", dims)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: (N, C, …) real or complex.
            target: Of the same shape.

        Raises:
            ValueError: If shapes differ, have no axis for the norms, or an argument is not finite.
        """
        self._add(*_field_errors(preds, target, self.dims))


class RelativeH1Error(_MeanError):
    """Relative H1 error: mean over samples and channels of √(‖e‖² + ‖∇e‖²) / √(‖y‖² + ‖∇y‖²), e = preds − y.

    ∇ are central differences on the unit cube, with spacing 1/n along an axis of n points; at the border second-order
    one-sided ones, unless periodic. Roughness of the error counts, which the L2 error does not see. Norms run over the
    last `dims` axes, every other index is a trial. Trials with a norm of y below 1e-12 are left out and counted in
    `n_left_out`. For periodic reals this is neuraloperator's ``H1Loss(d=dims, reduction="mean")``.

    Args:
        dims: Number of spatial axes at the end; None: all axes behind sample and channel.
        periodic: Whether the fields go on at the other side.
        **kwargs: Options of `torchmetrics.Metric`.

    Raises:
        ValueError: If `dims` is below 1.

    Examples:
        >>> metric = RelativeH1Error(dims=2)
        >>> y = torch.rand(5, 1, 8, 8)
        >>> metric.update(y + 1, y)  # a constant error has no gradient
        >>> metric.compute().item() < relative_l2_error(y + 1, y).item()
        True

    References:
        Czarnecki et al., "Sobolev training for neural networks", 2017.
    """

    def __init__(self, dims: int | None = 2, periodic: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dims = _checked_dims("RelativeH1Error", dims)
        self.periodic = periodic

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            preds: (N, C, …) real or complex.
            target: Of the same shape.

        Raises:
            ValueError: If shapes differ, have no axis for the norms or an axis of fewer than 3 points, or an argument
                is not finite.
        """
        self._add(*_field_errors(preds, target, self.dims, _differences(self.periodic)))


def _checked_dims(name: str, dims: int | None) -> int | None:
    if dims is not None and dims < 1:
        raise ValueError(f"{name}: dims must be >= 1 or None, got {dims}.")
    return dims


def _check_task(task: str) -> None:
    if task not in get_args(Task):
        raise ValueError(f"OutputErrorRate: task must be one of {', '.join(get_args(Task))}, got {task!r}.")


def _check_pair(**pair: Tensor) -> None:
    (first, a), (second, b) = pair.items()
    if a.shape != b.shape:
        raise ValueError(f"{first} {tuple(a.shape)} and {second} {tuple(b.shape)} must have the same shape.")
    for name, x in pair.items():
        bad = x.numel() - int(torch.isfinite(x).sum())
        if bad:
            raise ValueError(
                f"{name}: {bad} of {x.numel()} values are not finite; check where it comes from."
            )


def _output_errors(f: Tensor, g: Tensor, task: Task, class_axis: int) -> tuple[Tensor, int]:
    """Errors of the trials that count, and the number of those left out."""
    _check_task(task)
    _check_pair(original_output=f, compressed_output=g)
    if f.ndim == 0:
        raise ValueError("original_output is a scalar; its first axis must be the batch.")
    if task == "regression":
        return _relative_norms(g, f, f.ndim - 1)
    axis = class_axis + f.ndim if class_axis < 0 else class_axis
    if not 1 <= axis < f.ndim or f.shape[axis] < 2:
        raise ValueError(
            f"original_output has shape {tuple(f.shape)}; classification takes (N, C, …) with C >= 2 classes "
            f"on axis {class_axis}. For one logit z give torch.stack([0 * z, z], 1), for values use "
            "task='regression'."
        )
    f, g = (x.abs() if x.is_complex() else x for x in (f, g))
    return (f.argmax(axis) != g.argmax(axis)).flatten().to(_wide(f)), 0


_Parts = Callable[
    [Tensor, int], list[Tensor]
]  # field and number of its last axes -> what its norm is made of


def _field_errors(
    preds: Tensor, target: Tensor, dims: int | None, parts: _Parts = lambda x, axes: [x]
) -> tuple[Tensor, int]:
    """Errors of the trials that count, and the number of those left out."""
    _check_pair(preds=preds, target=target)
    axes = target.ndim - 2 if dims is None else dims
    if not 1 <= axes <= target.ndim:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, which does not go with dims={dims}; give (N, C, …), or "
            "dims from 1 to the number of axes."
        )
    return _relative_norms(preds, target, axes, parts)


def _relative_norms(
    x: Tensor, reference: Tensor, axes: int, parts: _Parts = lambda x, axes: [x]
) -> tuple[Tensor, int]:
    """‖x − reference‖ / ‖reference‖ over the last axes, where the reference's norm is not too small."""
    x, reference = (y.to(torch.promote_types(y.dtype, _wide(y))) for y in (x, reference))
    error, norm = (_norm(parts(y, axes), axes) for y in (x - reference, reference))
    counted = norm >= _SMALLEST_NORM
    return error[counted] / norm[counted], int((~counted).sum())


def _norm(parts: list[Tensor], axes: int) -> Tensor:
    """√Σ‖part‖² of every trial."""
    shape = parts[0].shape
    trials = math.prod(shape[: len(shape) - axes]) if parts[0].numel() else 0
    rows = torch.cat([part.reshape((trials, -1) if trials else (0, 1)) for part in parts], dim=1)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norm


def _differences(periodic: bool) -> _Parts:
    """The field and its derivative along each axis."""

    def parts(x: Tensor, axes: int) -> list[Tensor]:
        grid = x.shape[x.ndim - axes :]
        if min(grid) < 3:
            raise ValueError(
                f"fields of {tuple(grid)} points: differences need 3 points or more along each axis."
            )
        found = [x]
        for axis in range(-axes, 0):
            n = x.shape[axis]
            if periodic:
                found.append((x.roll(-1, axis) - x.roll(1, axis)) * (n / 2))
            else:
                found += torch.gradient(x, spacing=1 / n, dim=axis, edge_order=2)
        return found

    return parts


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
