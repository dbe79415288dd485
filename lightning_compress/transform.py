"""What a method is: a frozen dataclass that plans (reads the model) and applies the plan (writes it).

What was applied is kept on the model as an ordered list of steps. Steps that change structure are replayed on a
fresh model by ``replay``, before weights are loaded.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_compress import tables
from lightning_compress.names import clean
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.stats import Calibration

_APPLIED = "_compression_applied"  # root.__dict__[_APPLIED]: list of Step


class NothingChangedError(ValueError):
    """A method found nothing to change; the message lists every skipped layer with its reason.

    Examples:
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
        structural: whether state-dict keys, shapes or layers change, so that loading must replay the step.
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
            plan: what ``plan`` returned.
        """

    def restructure(self, model: nn.Module, plan: Plan) -> None:
        """Give a fresh model the structure of a plan; its values are loaded afterwards.

        Args:
            model: changed in place.
            plan: the structure of a plan.

        Raises:
            ValueError: as ``apply``.
        """
        self.apply(model, plan)

    @classmethod
    def structure(cls, plan: Plan) -> Plan:
        """The part of a plan that a fresh model needs before weights are loaded into it.

        Args:
            plan: what ``plan`` returned.

        Returns:
            The whole plan if the method is structural, else one without layers.
        """
        return plan if cls.structural else Plan({})

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
    """One applied transform: its name, its options, its plan and what it changed.

    Of a step that comes from an archive, the options are those that differed from their defaults when it was written,
    and the coverage names the stored tensors that changed, not what is gone since or was left alone.
    """

    name: str
    config: dict[str, Any]
    plan: Plan
    coverage: Coverage

    @property
    def structural(self) -> bool:
        """Whether loading weights into a fresh model needs this step first."""
        known = Transform.registry.get(self.name)
        return known is not None and known.structural and bool(known.structure(self.plan).layers)

    def to_json(self) -> dict[str, Any]:
        """All that a replay needs, as JSON values: plans of structural steps only; others are in the weights."""
        return {
            "name": self.name,
            "config": self.config,
            "plan": to_json(Transform.registry[self.name].structure(self.plan)) if self.structural else None,
            "coverage": dataclasses.asdict(self.coverage),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Step:
        """Inverse of ``to_json``.

        Args:
            value: what ``to_json`` returned.

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


def applied(model: nn.Module) -> Iterator[tuple[str, Step]]:
    """The steps that were applied to a model or to a part of it, in order.

    Args:
        model: any module.

    Yields:
        Name of the submodule the step was applied to ("" for the model itself), and the step.

    Examples:
        >>> result = compress(nn.Linear(4, 2), [Prune(0.5)])
        >>> [(prefix, step.name) for prefix, step in applied(result.model)]
        [('', 'Prune')]
    """
    for name, module in model.named_modules():
        for step in module.__dict__.get(_APPLIED, ()):
            yield clean(name), step


def record(model: nn.Module, step: Step) -> None:
    """Append a step to the list that the model carries (in its ``__dict__``, never in its state dict).

    Of its plan only what a replay needs is kept: the rest is in the weights.

    Args:
        model: the module the step was applied to.
        step: what was done.
    """
    known = Transform.registry.get(step.name)
    kept = Plan({}) if known is None else known.structure(step.plan)
    model.__dict__.setdefault(_APPLIED, []).append(dataclasses.replace(step, plan=kept))


def replay(model: nn.Module, steps: Iterable[tuple[str, Step]]) -> list[Step]:
    """Give a fresh model the structure of a compressed one; its weights are then loaded as usual.

    Structural steps that the model already carries are not repeated. Nothing is imported by name: only
    transforms that are defined in this process are known.

    Args:
        model: a model of the original architecture, changed in place.
        steps: what ``applied`` yielded for the compressed model.

    Returns:
        The steps that were carried out.

    Raises:
        ValueError: the model does not have the submodule a step names.

    Examples:
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
        known = Transform.registry[step.name]
        known().restructure(part, known.structure(step.plan))  # default options: apply follows the plan alone
        record(part, step)
        done.append(step)
    return done


def restore(model: nn.Module, steps: Iterable[tuple[str, Step]]) -> None:
    """Make a model carry these steps and no others; nothing is applied.

    Args:
        model: any module.
        steps: what ``applied`` yields for it afterwards.
    """
    parts = {clean(name): module for name, module in model.named_modules()}
    for module in parts.values():
        module.__dict__.pop(_APPLIED, None)
    for prefix, step in steps:
        record(parts[prefix], step)
