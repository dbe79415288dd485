"""``compress(model, [transforms])``: methods in order on a copy, with what really changed measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_compress import codes, tables
from lightning_compress.cost import Cost, cost
from lightning_compress.functional.finite import nonfinite
from lightning_compress.names import clean
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.steps import digests, measured, run_step
from lightning_compress.transform import Coverage, OrderError, Step, Transform, applied, record


@dataclass(frozen=True)
class Result:
    """What ``compress`` returns.

    Args:
        model: the compressed model.
        steps: what was done, in order, each with its own plan and coverage.
        coverage: what the steps changed together.
        before: counts of the model as given.
        after: counts of the compressed model.
    """

    model: nn.Module
    steps: tuple[Step, ...]
    coverage: Coverage
    before: Cost
    after: Cost

    @property
    def plan(self) -> tuple[Plan, ...]:
        """The plan of each step, in order."""
        return tuple(s.plan for s in self.steps)

    @property
    def report(self) -> str:
        """Before and after: totals, every layer, coverage, and the calibration inputs that were used."""
        b, a = self.before, self.after
        totals = [
            ["parameters", b.params, a.params],
            ["entries", b.elements, a.elements],
            ["zeros", b.zeros, a.zeros],
            ["sparsity", b.sparsity, a.sparsity],
            ["counted bytes", b.bits // 8, a.bits // 8],
            ["MACs", b.macs, a.macs],
        ]
        old = {layer.name: layer for layer in b.layers}
        layers = []
        for new in a.layers:
            was = old.get(new.name)
            layers.append(
                [
                    new.name,
                    new.kind,
                    new.elements,
                    new.zeros,
                    was and was.bits // 8,
                    new.bits // 8,
                    was and was.macs,
                    new.macs,
                ]
            )
        header = [
            "layer",
            "type",
            "elements",
            "zeros",
            "bytes before",
            "bytes after",
            "MACs before",
            "MACs after",
        ]
        data = [f"data: {s.name} {s.plan.data}" for s in self.steps if s.plan.data]
        parts = [
            tables.text(["total", "before", "after"], totals),
            tables.text(header, layers),
            str(self.coverage),
            *data,
        ]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.report


def check_order(transforms: Sequence[Transform], model: nn.Module) -> None:
    """Refuse an order in which a method would spoil what an earlier one left, before any work.

    Args:
        transforms: what is to be applied, in order.
        model: its own applied steps and codes come first.

    Raises:
        OrderError: with both methods and the reason.
    """
    earlier = [(step.name, Transform.registry[step.name].stage) for _, step in applied(model)]
    earlier += [(f"the {code.kind} code of {key}", code.stage) for key, _, _, code in codes.of(model)]
    for transform in transforms:
        name = type(transform).__name__
        for past, stage in earlier:
            if stage in transform.refuses_after:
                raise OrderError(f"{name} after {past} is refused: {transform.refuses_after[stage]}.")
        earlier.append((name, transform.stage))


def _check_finite(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        bad = 0 if weight.is_meta else nonfinite(weight)
        if weight.is_meta or bad:
            what = (
                "is on the meta device, so it has no values"
                if weight.is_meta
                else f"has {bad} of {weight.numel()} entries that are not finite"
            )
            raise ValueError(f"{clean(name)} {what}: load or repair the weights before compressing.")


def compress(
    model: nn.Module,
    transforms: Transform | Sequence[Transform],
    *,
    example_input: Any = None,
    data: Any = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    inplace: bool = False,
    seed: int = 0,
) -> Result:
    """Apply transforms in order to a trained model; no Trainer, and for most of them no data.

    Args:
        model: any module; it is left as it is unless ``inplace``.
        transforms: what to do, in order.
        example_input: one input (tensor, tuple of arguments or dict of keywords), for tracing, counting
            MACs and drawing inputs.
        data: calibration inputs: batches, a loader, a sampler name or a function (see
            ``lightning_compress.stats.Calibration``).
        loss: function of the model's output and a batch's labels to a scalar, for methods that look at gradients;
            None takes what is said at ``lightning_compress.stats.collect``.
        inplace: change ``model`` itself; an error leaves it as it was. One transform that keeps the structure needs
            no copy of the model then; several, or one that changes it, work on a copy first.
        seed: seed of drawn inputs; the global random state is untouched.

    Returns:
        Model, steps, coverage and the before/after table.

    Raises:
        TypeError: something in ``transforms`` is not a transform.
        OrderError: the order would spoil an earlier step.
        NothingChangedError: a transform found nothing to change.
        ValueError: weights that are not finite, or options that do not fit the model; names the layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> result = compress(net, [Prune(sparsity=0.75)])
        >>> result.after.zeros, result.before.zeros
        (60, 0)
    """
    todo = [transforms] if isinstance(transforms, Transform) else list(transforms)
    for transform in todo:
        if not isinstance(transform, Transform):
            raise TypeError(
                f"transforms holds {transform!r}; allowed are instances of: {', '.join(sorted(Transform.registry))}."
            )
    check_order(todo, model)
    _check_finite(model)
    calibration = Calibration(example_input=example_input, data=data, seed=seed, origin=model, loss=loss)
    before = cost(model, example_input)
    start = digests(model)
    if inplace and len(todo) == 1:
        plan = todo[0].plan(model, calibration)
        if not todo[0].structure(plan).layers:  # apply checks the plan before it writes
            with _codes_kept(model):
                step = run_step(model, todo[0], calibration, plan=plan, before=start)
            return Result(model, (step,), step.coverage, before, cost(model, example_input))
    work = copy.deepcopy(model)
    steps = tuple(run_step(work, transform, calibration) for transform in todo)
    if inplace:
        for transform, step in zip(todo, steps, strict=True):
            transform.apply(model, step.plan)
            record(model, step)
        work = model
    skipped = {k: v for step in steps for k, v in step.plan.skipped.items()}
    return Result(work, steps, measured(start, work, skipped), before, cost(work, example_input))


@contextmanager
def _codes_kept(model: nn.Module) -> Iterator[None]:
    """On an error, the codes are those from before."""
    held = list(codes.of(model))
    try:
        yield
    except Exception:
        for _, module, param, _ in list(codes.of(model)):
            codes.remove(module, param)
        for _, module, param, code in held:
            codes.attach(module, param, code)
        raise
