"""What a pass over calibration inputs measures: norms, means, Gram matrices, ranges, histograms, gradients."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import Tensor, nn

from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.drawing import sample_count
from lightning_compress.stats.fields import BATCHED, FACTORS, FIELDS, OUTPUTS, SINGLE, Stats
from lightning_compress.stats.gradients import Derivatives, Loss, differentiate
from lightning_compress.stats.keeping import state
from lightning_compress.stats.running import Operations, call, observing
from lightning_compress.stats.tracker import Tracker
from lightning_compress.targets import Target

__all__ = ["Stats", "collect"]


def collect(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration,
    what: Sequence[str],
    *,
    loss: Loss | None = None,
    task: str | None = None,
    norms: Mapping[str, nn.Module] | None = None,
) -> dict[str, Stats]:
    """Run the calibration inputs through the model once and measure what the targets' layers see.

    Only running sums are kept, never activations. Norms, means and Gram matrices come from the products in
    which a weight really takes part, whichever module computes them; ranges and histograms from the first
    input and output of the target's module.

    Gradients take passes of their own. Those of single samples ("gradient", "bias_gradient") are of
    ``loss(output, labels)`` if a loss is given, here or in the calibration, otherwise of the model's own
    distribution, cross-entropy against ``y ~ softmax(f(x))`` or ``|f(x) - y|^2 / 2`` with ``y = f(x) + e``,
    ``e ~ N(0, I)``, which makes ``E |g|^2`` the diagonal Fisher. Those of batches ("taylor") are of the loss too;
    without one, of the cross-entropy or half the squared error of the labels, if these are class numbers or
    shaped like the output, mean over samples; and of the model's own distribution only where neither is there.

    Args:
        model: any module; it is left exactly as it was, also after an error.
        targets: the weights.
        calibration: where inputs come from.
        what: names of fields of ``Stats``.
        loss: function of the model's output and a batch's labels to a scalar, for gradients; None takes the
            calibration's.
        task: "classification" or "regression"; None takes an output [n, 2 or more] as class scores. Not used
            with ``loss``.
        norms: target key -> the BatchNorm that directly follows its layer, for "bias" and "norm_scale".

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
    unknown = [w for w in what if w not in FIELDS]
    if unknown or task not in (None, "classification", "regression"):
        raise ValueError(
            f"collect(what={list(what)}, task={task!r}): allowed fields: {', '.join(FIELDS)}; "
            "allowed tasks: 'classification', 'regression', None."
        )
    wanted, norms = frozenset(what), norms or {}
    kept = None if norms or loss is not None else calibration.kept
    key = None if kept is None else _key(model, targets, calibration, wanted, task)
    known = None if kept is None else kept.get(key)
    if known is not None:
        return known
    trackers = [Tracker(target, wanted) for target in targets]
    derivatives = [Derivatives(target, wanted, norms.get(target.key)) for target in targets]
    if wanted - SINGLE - BATCHED - {"norm_scale"}:
        _observe(model, trackers, calibration)
    if wanted & (SINGLE | BATCHED):
        differentiate(model, derivatives, calibration, calibration.loss if loss is None else loss, task)
    found = {}
    for tracker, derivative in zip(trackers, derivatives, strict=True):
        target = tracker.target
        missing = tracker.missing() | derivative.missing()
        if missing:
            raise ValueError(
                f"{target.key} was never used as a whole in the calibration pass, so "
                f"{', '.join(f for f in FIELDS if f in missing)} cannot be measured: exclude it, or give data that "
                "reaches it."
            )
        gamma = getattr(norms.get(target.key), "weight", None) if "norm_scale" in wanted else None
        scale = None if gamma is None else gamma.detach().abs()
        found[target.key] = Stats(**tracker.fields() | derivative.fields(), norm_scale=scale)
    if kept is not None:
        kept.put(key, found)
    return found


def _key(
    model: nn.Module, targets: Sequence[Target], inputs: Calibration, what: frozenset[str], task: str | None
) -> Hashable:
    """Of statistics: equal only where they are. Data are told apart by their identity."""
    given = id(inputs.example_input), id(inputs.data), id(inputs.loss), id(inputs.origin)
    return state(model), tuple(t.key for t in targets), what, task, given, inputs.samples, inputs.seed


# Operation -> position of its first factor.
_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
_CONVOLUTIONS = ("convolution", "_convolution")


class _Products(Operations):  # type: ignore[no-untyped-call]
    """Hands every product in which a target's weight takes part to its tracker."""

    def __init__(self, trackers: Iterable[Tracker]) -> None:
        super().__init__()
        self.trackers = {t.target.weight.untyped_storage().data_ptr(): t for t in trackers}

    def wants(self, name: str) -> bool:
        return name in _PRODUCTS or name in _CONVOLUTIONS or name == "embedding"

    def seen(self, name: str, args: Any, result: Any) -> None:
        if name in _CONVOLUTIONS:
            if tracker := self._tracker(args[1]):
                tracker.convolution(args, result)
            return
        if name == "embedding":
            if tracker := self._tracker(args[0]):
                tracker.lookup(args[1])
            return
        left, right = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        biased = name.startswith("add") or name.startswith("badd")
        if tracker := self._tracker(right):
            tracker.product(left, right, result, biased=biased)
        elif tracker := self._tracker(left):
            x, out = (t.transpose(-1, -2) if t.dim() > 1 else t[None] for t in (right, result))
            tracker.product(x, left.transpose(-1, -2), out, biased=biased)

    def _tracker(self, operand: Tensor) -> Tracker | None:
        return self.trackers.get(operand.untyped_storage().data_ptr())


def _observe(model: nn.Module, trackers: Sequence[Tracker], calibration: Calibration) -> None:
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
            with products if trackers and trackers[0].wanted & (FACTORS | OUTPUTS) else nullcontext():
                call(model, inputs)
