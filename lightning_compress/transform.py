"""What a method is: a frozen dataclass that plans (reads the model) and applies the plan (writes it).

``compress(model, [transforms])`` runs them in order on a copy, refuses illegal orders before any work,
measures what really changed, and leaves on the model the ordered list of applied steps. Steps that change
structure are replayed on a fresh model by :func:`replay`, before weights are loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_compress import codes, tables
from lightning_compress.cost import Cost, cost
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.stats import Calibration
from lightning_compress.targets import clean

_APPLIED = "_compression_applied"  # root.__dict__[_APPLIED]: list of Step


class NothingChangedError(ValueError):
    """A method found nothing to change; the message lists every skipped layer with its reason.

    Example:
        >>> try:
        ...     compress(nn.Sequential(nn.ReLU()), [Prune(0.5)])
        ... except NothingChangedError as error:
        ...     print(error)
        Prune changed nothing: the model has no parameters.
    """


class OrderError(ValueError):
    """Transforms in an order that would spoil an earlier one."""


@dataclass(frozen=True)
class Coverage:
    """What a step really changed, measured by comparing every tensor before and after.

    Args:
        changed: full name of a changed parameter or buffer -> its bytes before (0 if it is new).
        skipped: full parameter name -> why it was left alone.
        total_bytes: bytes of all parameters before the step.
        share: share of the parameter bytes that belong to changed parameters, in [0, 1].
    """

    changed: dict[str, int]
    skipped: dict[str, str]
    total_bytes: int
    share: float

    def __str__(self) -> str:
        done = f"changed {self.share:.1%} of {self.total_bytes:,} parameter bytes, in {len(self.changed)} tensors"
        return done + (f"; left alone:{tables.reasons(self.skipped)}" if self.skipped else "")


class Transform(ABC):
    """A method: ``plan`` reads the model and decides per layer, ``apply`` writes the decisions and needs no data.

    Concrete transforms are frozen dataclasses and final. Attributes of the class:

    Attributes:
        structural: whether state-dict keys or shapes change, so that loading must replay the step.
        stage: what the method leaves behind: "structure", "fusion", "mask" or "grid".
        refuses_after: stage of an earlier method -> why this one may not follow it.
    """

    structural: ClassVar[bool] = False
    stage: ClassVar[str] = "structure"
    refuses_after: ClassVar[Mapping[str, str]] = {}
    registry: ClassVar[dict[str, type[Transform]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Transform.registry[cls.__name__] = cls

    @abstractmethod
    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide what to do with every layer; writes nothing.

        Args:
            model: any module.
            data: calibration inputs, for methods that look at activations.

        Returns:
            The plan; it can be written as JSON.
        """

    @abstractmethod
    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Carry out a plan, in place; also on a fresh model of the same architecture.

        Args:
            model: the module the plan was made for, or one like it.
            plan: what :meth:`plan` returned.
        """

    def config(self) -> dict[str, Any]:
        """The options as JSON values; functions are given by their name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            "type": type(value).__name__,
            **{f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__name__)}"


@dataclass(frozen=True)
class Step:
    """One applied transform: its name, its options, its plan and what it changed."""

    name: str
    config: dict[str, Any]
    plan: Plan
    coverage: Coverage

    @property
    def structural(self) -> bool:
        """Whether loading weights into a fresh model needs this step first."""
        known = Transform.registry.get(self.name)
        return known is not None and known.structural

    def to_json(self) -> dict[str, Any]:
        """All that a replay needs, as JSON values: plans of structural steps only; others are in the weights."""
        return {
            "name": self.name,
            "config": self.config,
            "plan": to_json(self.plan) if self.structural else None,
            "coverage": dataclasses.asdict(self.coverage),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Step:
        """Inverse of :meth:`to_json`.

        Args:
            value: what :meth:`to_json` returned.

        Returns:
            The step.

        Raises:
            ValueError: the transform is not known, or a field is missing or of the wrong type.
        """
        try:
            name, given, covered = str(value["name"]), value["plan"], value["coverage"]
            coverage = Coverage(
                {str(k): int(v) for k, v in covered["changed"].items()},
                {str(k): str(v) for k, v in covered["skipped"].items()},
                int(covered["total_bytes"]),
                float(covered["share"]),
            )
            plan = from_json(given) if given is not None else Plan({})
            config = dict(value["config"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a stored step is malformed: {error!r}.") from None
        if name not in Transform.registry:
            raise ValueError(
                f"transform {name!r} is unknown here; known: {', '.join(sorted(Transform.registry))}."
            )
        return Step(name, config, plan, coverage)


@dataclass(frozen=True)
class Result:
    """What :func:`compress` returns.

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


def applied(model: nn.Module) -> Iterator[tuple[str, Step]]:
    """The steps that were applied to a model or to a part of it, in order.

    Args:
        model: any module.

    Yields:
        Name of the submodule the step was applied to ("" for the model itself), and the step.

    Example:
        >>> result = compress(nn.Linear(4, 2), [Prune(0.5)])
        >>> [(prefix, step.name) for prefix, step in applied(result.model)]
        [('', 'Prune')]
    """
    for name, module in model.named_modules():
        for step in module.__dict__.get(_APPLIED, ()):
            yield clean(name), step


def record(model: nn.Module, step: Step) -> None:
    """Append a step to the list that the model carries (in its ``__dict__``, never in its state dict).

    Args:
        model: the module the step was applied to.
        step: what was done.
    """
    model.__dict__.setdefault(_APPLIED, []).append(step)


def replay(model: nn.Module, steps: Iterable[tuple[str, Step]]) -> list[Step]:
    """Give a fresh model the structure of a compressed one; its weights are then loaded as usual.

    Structural steps that the model already carries are not repeated. Nothing is imported by name: only
    transforms that are defined in this process are known.

    Args:
        model: a model of the original architecture, changed in place.
        steps: what :func:`applied` yielded for the compressed model.

    Returns:
        The steps that were carried out.

    Raises:
        ValueError: the model does not have the submodule a step names.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
        >>> fused = compress(net, [FuseBatchNorm()]).model
        >>> fresh = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
        >>> [step.name for step in replay(fresh, applied(fused))]
        ['FuseBatchNorm']
        >>> fresh.load_state_dict(fused.state_dict())
        <All keys matched successfully>
    """
    done: list[Step] = []
    met: dict[str, int] = {}
    for prefix, step in steps:
        if not step.structural:
            continue
        try:
            part = model.get_submodule(prefix)
        except AttributeError:
            raise ValueError(
                f"{step.name} was applied to {prefix!r}, which this {type(model).__name__} does not have."
            ) from None
        position = met.setdefault(prefix, 0)
        met[prefix] += 1
        if position < sum(s.structural for s in part.__dict__.get(_APPLIED, ())):
            continue
        Transform.registry[step.name]().apply(
            part, step.plan
        )  # default options: apply follows the plan alone
        record(part, step)
        done.append(step)
    return done


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


def _digests(model: nn.Module) -> dict[str, tuple[bytes, int, bool]]:
    """Name -> (hash of the bytes, number of bytes, is a parameter) of every parameter and buffer, shared ones once."""
    found = {}
    for group, is_parameter in ((model.named_parameters(), True), (model.named_buffers(), False)):
        for name, tensor in group:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[clean(name)] = (hashlib.blake2b(raw, digest_size=16).digest(), tensor.nbytes, is_parameter)
    return found


def _coverage(
    before: dict[str, tuple[bytes, int, bool]], model: nn.Module, skipped: Mapping[str, str]
) -> Coverage:
    after = _digests(model)
    changed = {
        n: before[n][1] if n in before else 0
        for n in before.keys() | after.keys()
        if before.get(n) != after.get(n)
    }
    total = sum(size for _, size, is_parameter in before.values() if is_parameter)
    hit = sum(before[n][1] for n in changed if n in before and before[n][2])
    order = [*before, *(n for n in after if n not in before)]
    named = {n: changed[n] for n in order if n in changed}
    return Coverage(
        named, {k: v for k, v in skipped.items() if k not in changed}, total, hit / total if total else 0.0
    )


def _check_finite(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        bad = 0 if weight.is_meta else int((~torch.isfinite(weight.detach())).sum())
        if weight.is_meta or bad:
            what = (
                "is on the meta device, so it has no values"
                if weight.is_meta
                else f"has {bad} of {weight.numel()} entries that are not finite"
            )
            raise ValueError(f"{clean(name)} {what}: load or repair the weights before compressing.")


def run_step(model: nn.Module, transform: Transform, data: Calibration | None = None) -> Step:
    """Plan and apply one transform in place, measure what changed, and record the step on the model.

    Args:
        model: any module.
        transform: the method.
        data: calibration inputs.

    Returns:
        The recorded step.

    Raises:
        NothingChangedError: no tensor changed, and the plan is not an identity.
    """
    plan = transform.plan(model, data)
    before = _digests(model)
    transform.apply(model, plan)
    coverage = _coverage(before, model, plan.skipped)
    name = type(transform).__name__
    if not coverage.changed and not plan.identity:
        why = (
            f"no layer fits:{tables.reasons(plan.skipped)}" if plan.skipped else "every tensor is as it was."
        )
        why = why if before else "the model has no parameters."
        raise NothingChangedError(f"{name} changed nothing: {why}")
    step = Step(name, transform.config(), plan, coverage)
    record(model, step)
    return step


def compress(
    model: nn.Module,
    transforms: Transform | Sequence[Transform],
    *,
    example_input: Any = None,
    data: Any = None,
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
            :class:`lightning_compress.stats.Calibration`).
        inplace: change ``model`` itself. The work is still done on a copy first, so an error leaves the
            model as it was.
        seed: seed of drawn inputs; the global random state is untouched.

    Returns:
        Model, steps, coverage and the before/after table.

    Raises:
        TypeError: something in ``transforms`` is not a transform.
        OrderError: the order would spoil an earlier step.
        NothingChangedError: a transform found nothing to change.
        ValueError: weights that are not finite, or options that do not fit the model; the message names the
        layer.

    Example:
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
    calibration = Calibration(example_input=example_input, data=data, seed=seed)
    before = cost(model, example_input)
    start = _digests(model)
    work = copy.deepcopy(model)
    steps = tuple(run_step(work, transform, calibration) for transform in todo)
    if inplace:
        for transform, step in zip(todo, steps, strict=True):
            transform.apply(model, step.plan)
            record(model, step)
        work = model
    skipped = {k: v for step in steps for k, v in step.plan.skipped.items()}
    return Result(work, steps, _coverage(start, work, skipped), before, cost(work, example_input))
