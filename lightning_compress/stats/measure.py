"""What a pass over calibration inputs measures: norms, means, Gram matrices, ranges, histograms, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.inputs import Histogram, spectrum, taps
from lightning_compress.stats.calibration import Calibration, sample_count, take_samples
from lightning_compress.stats.running import Operations, call, first_tensor, observing
from lightning_compress.targets import Target


@dataclass(frozen=True, eq=False)
class Stats:
    """What one weight's layer saw during calibration; None where it was not asked for.

    Args:
        input_norm: ``sqrt(sum |x_j|^2)`` over samples and positions of the input that each weight entry
            multiplies, broadcastable to the weight: Linear [1, in]; convolution [1, in, *kernel] ([out, in /
            groups, *kernel] if grouped, [in, 1, *kernel] if transposed), zeros of the padding included;
            spectral [in, 1, *modes], of the Fourier coefficients. float32.
        input_mean: mean of the same inputs over the same samples and positions, of the same shape, so that
            ``sum(weight * input_mean)`` per output channel is the mean output without bias. float32;
            complex64 where the inputs are complex.
        gram: ``X^T X`` of the same unfolded inputs, [D, D] with D = in x kernel size in the order of the
            weight, [groups, D, D] if grouped. float64. Spectral: ``sum x_m x_m^H`` over samples of the Fourier
            coefficients x_m of every stored mode m, [*modes, in, in], zeros where no input reached a mode;
            complex128.
        input_range: smallest and largest entry of the layer's input.
        output_range: the same of its output.
        histogram: counts of the input's entries (real and imaginary parts of complex ones) in 2 x 2048 equal
            bins on [-upper, upper), and upper, a power of two.
        output_histogram: the same of its output.
        gradient: ``E |g|^2`` per entry, E over single samples, g the gradient of the loss. float32, shape of
            the weight.
        count: number of samples.
        rows: rows of X (samples x positions); 0 unless ``input_norm``, ``input_mean`` or ``gram`` was asked
            for.
    """

    input_norm: Tensor | None = None
    input_mean: Tensor | None = None
    gram: Tensor | None = None
    input_range: tuple[float, float] | None = None
    output_range: tuple[float, float] | None = None
    histogram: tuple[Tensor, float] | None = None
    output_histogram: tuple[Tensor, float] | None = None
    gradient: Tensor | None = None
    count: int = 0
    rows: int = 0


_FACTORS = frozenset(("input_norm", "input_mean", "gram"))  # of the inputs as the weight multiplies them
_ENDS = ("input_range", "output_range", "histogram", "output_histogram")  # of a module's input and output
_FIELDS = ("input_norm", "input_mean", "gram", *_ENDS, "gradient")


def collect(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration,
    what: Sequence[str],
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    task: str | None = None,
) -> dict[str, Stats]:
    """Run the calibration inputs through the model once and measure what the targets' layers see.

    Only running sums are kept, never activations. Norms, means and Gram matrices come from the products in
    which a weight really takes part, whichever module computes them; ranges and histograms from the first
    input and output of the target's module. Gradients take a pass of their own, one sample at a time: of
    ``loss(output, labels)`` if a loss is given, otherwise of the model's own distribution, cross-entropy
    against ``y ~ softmax(f(x))`` or ``|f(x) - y|^2 / 2`` with ``y = f(x) + e``, ``e ~ N(0, I)``, which makes
    ``E |g|^2`` the diagonal Fisher.

    Args:
        model: any module; it is left exactly as it was, also after an error.
        targets: the weights.
        calibration: where inputs come from.
        what: names of fields of ``Stats``.
        loss: function of the model's output and a batch's labels to a scalar, for "gradient".
        task: "classification" or "regression"; None takes an output [n, 2 or more] as class scores. Not used
            with ``loss``.

    Returns:
        ``target.key`` -> statistics.

    Raises:
        ValueError: unknown field or task; a target that was never used; values that are not finite; ``loss``
            without labels.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, 1.0]])]
        >>> collect(layer, find(layer), Calibration(data=data), ["input_norm"])["weight"].input_norm
        tensor([[5., 1.]])

    Source: Sun et al. 2023 (input norms), Frantar et al. 2022 (Gram matrix), Theis et al. 2018 (Fisher).
    """
    unknown = [w for w in what if w not in _FIELDS]
    if unknown or task not in (None, "classification", "regression"):
        raise ValueError(
            f"collect(what={list(what)}, task={task!r}): allowed fields: {', '.join(_FIELDS)}; "
            "allowed tasks: 'classification', 'regression', None."
        )
    trackers = [_Tracker(target, frozenset(what)) for target in targets]
    if set(what) - {"gradient"}:
        _observe(model, trackers, calibration)
    if "gradient" in what:
        _differentiate(model, trackers, calibration, loss, task)
    return {t.target.key: t.stats() for t in trackers}


# Operation -> position of its first factor.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
_CONVOLUTIONS = ("convolution", "_convolution")


class _Products(Operations):  # type: ignore[no-untyped-call]
    """Hands every product in which a target's weight takes part to its tracker."""

    def __init__(self, trackers: Iterable[_Tracker]) -> None:
        super().__init__()
        self.trackers = {t.target.weight.untyped_storage().data_ptr(): t for t in trackers}

    def wants(self, name: str) -> bool:
        return name in _PRODUCTS or name in _CONVOLUTIONS

    def seen(self, name: str, args: Any, result: Any) -> None:
        if name in _CONVOLUTIONS:
            if tracker := self._tracker(args[1]):
                tracker.convolution(args, result)
            return
        left, right = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        if tracker := self._tracker(right):
            tracker.product(left, right)
        elif tracker := self._tracker(left):
            x = right.transpose(-1, -2) if right.dim() > 1 else right[None]
            tracker.product(x, left.transpose(-1, -2))

    def _tracker(self, operand: Tensor) -> _Tracker | None:
        return self.trackers.get(operand.untyped_storage().data_ptr())


class _Tracker:
    """Running sums for one target."""

    def __init__(self, target: Target, wanted: frozenset[str]) -> None:
        self.target = target
        self.wanted = wanted
        self.called = False
        self.count = 0
        self.rows = 0
        self.moments: Tensor | None = None  # sums of |x|^2, x and 1: [3, *broadcastable to the weight]
        self.gram: Tensor | None = None
        self.range = {"input_range": (math.inf, -math.inf), "output_range": (math.inf, -math.inf)}
        self.histograms = {"histogram": Histogram(), "output_histogram": Histogram()}
        self.gradient: Tensor | None = None

    def product(self, x: Tensor, used: Tensor) -> None:
        """``x @ used``, where ``used`` [.., k, m] is the weight, its transpose or some of its output rows."""
        weight = self.target.weight
        if used.dim() == 3 and used.stride(0) == 0:  # one matrix for the whole batch
            used = used[0]
        axis = _contracted(weight, used, self.target.axes.in_)
        if axis is None:
            return
        x = self._finite(x.reshape(-1, x.shape[-1]))
        moments = _moments(x, [0]).unsqueeze(2 - axis)
        first = (used.storage_offset() - weight.storage_offset()) // weight.stride(1 - axis)
        if used.shape[1] < weight.shape[1 - axis]:
            # Attention with separate queries, keys and values: each block of rows has its own input.
            if "gram" in self.wanted:
                raise ValueError(
                    f"{self.target.key}: its rows see different inputs: there is no Gram matrix; exclude it."
                )
            block, moments = moments, moments.new_zeros(3, *weight.shape)
            moments.narrow(2 - axis, first, used.shape[1]).copy_(block)
        self._add(moments, len(x) if first == 0 else 0)
        if "gram" in self.wanted:
            self._add_gram(x.double().mH @ x.double() if not x.is_complex() else x.mH @ x)

    def convolution(self, args: Any, result: Tensor) -> None:
        """One call of ``aten.convolution`` with the whole weight."""
        x, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
        if weight.shape != self.target.weight.shape:
            return
        kernel, channels = weight.shape[2:], x.shape[1]
        x = self._finite(x)
        views = list(
            taps(
                x,
                kernel,
                result.shape[2:],
                stride=stride,
                padding=padding,
                dilation=dilation,
                transposed=transposed,
            )
        )
        axes = [0, *range(2, x.dim())]
        moments = torch.stack([_moments(v, axes) for v in views], dim=2)
        if transposed:
            moments = moments.view(3, channels, 1, *kernel)
        else:
            moments = moments.view(3, groups, channels // groups, *kernel)
            moments = moments.repeat_interleave(len(weight) // groups, dim=1) if groups > 1 else moments
        self._add(moments, result.numel() // result.shape[1])
        if "gram" in self.wanted:
            for sample in range(len(x)):  # the unfolded input is large
                rows = torch.stack([v[sample].flatten(1) for v in views], dim=1).double()  # [C, K, L]
                rows = rows.view(groups, -1, rows.shape[-1])
                self._add_gram((rows @ rows.mT).squeeze(0))

    def watch(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the target's module."""
        self.called = True
        x, out = first_tensor((args, kwargs)), first_tensor(output)
        for tensor, extremes, counts in ((x, *_ENDS[::2]), (out, *_ENDS[1::2])):
            if tensor is not None and self.wanted & {extremes, counts}:
                self._widen(extremes, tensor)
                if counts in self.wanted:
                    self.histograms[counts].add(tensor)
        if x is not None and self.wanted & _FACTORS and _is_spectral(self.target):
            self._spectral(module, self._finite(x))

    def differentiated(self, gradient: Tensor | None) -> None:
        """The gradient of one sample; None if it does not reach the weight."""
        if gradient is not None:
            square = self._finite(gradient).abs().double().square()
            self.gradient = square if self.gradient is None else self.gradient.add_(square)

    def stats(self) -> Stats:
        """The results; an error if the layer was never used."""
        wanted, hooked = self.wanted, self.wanted & frozenset(_ENDS)
        missing = [
            *(_FACTORS if self.moments is None else []),
            *(hooked if not self.called else []),
            *(["gradient"] if "gradient" in wanted and self.gradient is None else []),
        ]
        missing = [field for field in _FIELDS if field in missing and field in wanted]
        if missing:
            raise ValueError(
                f"{self.target.key} was never used as a whole in the calibration pass, so {', '.join(missing)} cannot "
                "be measured: exclude it, or give data that reaches it."
            )
        return Stats(
            input_norm=self._norm() if "input_norm" in wanted else None,
            input_mean=self._mean() if "input_mean" in wanted else None,
            gram=self.gram if "gram" in wanted else None,
            input_range=self.range["input_range"] if "input_range" in wanted else None,
            output_range=self.range["output_range"] if "output_range" in wanted else None,
            **{name: (h.counts, h.upper) for name, h in self.histograms.items() if name in wanted},
            gradient=(self.gradient / self.count).float() if self.gradient is not None else None,
            count=self.count,
            rows=self.rows,
        )

    def _spectral(self, layer: Any, x: Tensor) -> None:
        weight, axes = self.target.weight, self.target.axes
        stored = weight.shape[1:] if axes.in_ is None else weight.shape[2:]
        real = not layer.complex_data
        used, kept = spectrum(x, stored, layer.n_modes, layer.max_n_modes, real=real, norm=layer.fft_norm)
        inside = _moments(used, [0])
        moments = inside.new_zeros(3, x.shape[1], *stored)
        moments[(slice(None), slice(None), *kept)] = inside
        self._add(moments if axes.in_ is None else moments.unsqueeze(2), len(x))
        if "gram" in self.wanted:
            rows = used.movedim(1, -1).movedim(0, -1).to(torch.complex128)  # [*kept, C, N]
            gram = rows.new_zeros(*stored, x.shape[1], x.shape[1])
            gram[kept] = rows @ rows.mH
            self._add_gram(gram)

    def _add(self, moments: Tensor, rows: int) -> None:
        self.moments = moments if self.moments is None else self.moments + moments
        self.rows += rows

    def _norm(self) -> Tensor | None:
        return None if self.moments is None else self.moments[0].real.sqrt().float()

    def _mean(self) -> Tensor | None:
        if self.moments is None:
            return None
        _, sums, terms = self.moments
        mean: Tensor = sums / terms.real.clamp_min(
            1
        )  # rows of an attention weight that were never used have 0 / 0
        return mean.to(torch.complex64 if mean.is_complex() else torch.float32)

    def _add_gram(self, gram: Tensor) -> None:
        self.gram = gram if self.gram is None else self.gram.add_(gram)

    def _widen(self, field: str, x: Tensor) -> None:
        x = self._finite(x)
        low, high = (torch.view_as_real(x) if x.is_complex() else x).aminmax()
        self.range[field] = (min(self.range[field][0], float(low)), max(self.range[field][1], float(high)))

    def _finite(self, x: Tensor) -> Tensor:
        x = x.detach()
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(
                f"{self.target.key}: {bad} of {x.numel()} calibration values at its layer are not finite: "
                "check the data and the weights before it."
            )
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _contracted(weight: Tensor, used: Tensor, prefer: int | None) -> int | None:
    """Axis of ``weight`` that ``x @ used`` sums over, by the strides of the view; None if there is none."""
    if weight.dim() != 2 or used.dim() != 2:
        return None
    first = 1 if prefer is None else prefer
    for axis in (first, 1 - first):
        sizes = used.shape[0] == weight.shape[axis] and used.shape[1] <= weight.shape[1 - axis]
        strides = (used.stride(0), used.stride(1)) == (weight.stride(axis), weight.stride(1 - axis))
        if sizes and strides:
            return axis
    return None


def _moments(x: Tensor, axes: list[int]) -> Tensor:
    """Sums of ``|x|^2``, x and 1 over axes, in double precision, stacked."""
    sums = x.sum(axes, dtype=torch.complex128 if x.is_complex() else torch.float64)
    squares = x.abs().square().sum(axes, dtype=torch.float64).to(sums.dtype)
    return torch.stack([squares, sums, torch.full_like(sums, math.prod(x.shape[a] for a in axes))])


def _is_spectral(target: Target) -> bool:
    """Whether it is the dense weight of a spectral convolution, not a factor of one."""
    whole = getattr(getattr(target.module, "weight", None), "shape", None)
    return hasattr(target.module, "max_n_modes") and tuple(target.weight.shape) == tuple(whole or ())


def _observe(model: nn.Module, trackers: Sequence[_Tracker], calibration: Calibration) -> None:
    """The pass without gradients."""
    products = _Products(trackers)
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        for tracker in trackers:
            hook = tracker.target.module.register_forward_hook(tracker.watch, with_kwargs=True)
            stack.callback(hook.remove)
        for inputs in calibration.batches(model):
            for tracker in trackers:
                tracker.count += sample_count(inputs)
            with products if trackers and trackers[0].wanted & _FACTORS else nullcontext():
                call(model, inputs)


def _differentiate(
    model: nn.Module,
    trackers: Sequence[_Tracker],
    calibration: Calibration,
    loss: Callable[[Any, Any], Tensor] | None,
    task: str | None,
) -> None:
    """The pass for ``E |g|^2``: batches of one, because a batch mean would mix the samples' gradients."""
    weights = [t.target.weight for t in trackers]
    frozen = [w for w in weights if not w.requires_grad]
    generator = torch.Generator().manual_seed(calibration.seed)
    count = 0
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        stack.enter_context(torch.enable_grad())
        for weight in frozen:
            weight.requires_grad_(True)
            stack.callback(weight.requires_grad_, False)
        for batch in calibration.pairs(model):
            for i in range(sample_count(batch[0])):
                inputs, labels = take_samples(batch, sample_count(batch[0]), i, i + 1)
                output = call(model, inputs)
                if loss is None:
                    value = _own_loss(output, task, generator)
                elif labels is None:
                    raise ValueError("loss= needs labels: give data of (inputs, labels) batches.")
                else:
                    value = loss(output, labels)
                count += 1
                gradients = torch.autograd.grad(value, weights, allow_unused=True)
                for tracker, gradient in zip(trackers, gradients, strict=True):
                    tracker.differentiated(gradient)
    for tracker in trackers:
        tracker.count = count


def _own_loss(output: Any, task: str | None, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of a label drawn from the model's own prediction."""
    f = first_tensor(output)
    if f is None or not f.is_floating_point():
        raise ValueError(f"gradients of {type(output).__name__} outputs need loss= and labels.")
    if not bool(torch.isfinite(f).all()):
        raise ValueError("the model's output is not finite: check the calibration data and the weights.")
    if task == "classification" or (task is None and f.dim() == 2 and f.shape[1] > 1):
        scores = f.float().log_softmax(1)
        y = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(f.device)
        return -scores.gather(1, y).sum()
    noise = torch.randn(f.shape, generator=generator).to(f)
    return (f - (f.detach() + noise)).square().sum() / 2
