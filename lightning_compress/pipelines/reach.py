"""``compress_to(model, transforms, target_ratio=0.1)``: as strong as needed and no stronger, and told truthfully."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_compress import archive
from lightning_compress.compress import compress
from lightning_compress.metrics import Task
from lightning_compress.pipelines.bisection import weakest
from lightning_compress.pipelines.config import CompressionConfig
from lightning_compress.pipelines.errors import Evaluate, OutputError, top1
from lightning_compress.pipelines.knobs import KNOBS, Knob, free_knob, knob_of
from lightning_compress.pipelines.limits import BOUNDS, SIZES, Limits
from lightning_compress.pipelines.result import TargetResult, Trial
from lightning_compress.pipelines.running import Pipeline, Strength
from lightning_compress.pipelines.steps import Written, check, read_all
from lightning_compress.stats import Calibration
from lightning_compress.stats.keeping import Kept
from lightning_compress.transform import NothingChangedError, Transform

_CLOSE = 0.99  # of a size that is asked for: near enough


def compress_to(
    model: nn.Module,
    transforms: CompressionConfig | Transform | Sequence[Any],
    *,
    target_ratio: float | None = None,
    target_bytes: int | None = None,
    max_error: float | None = None,
    max_ber: float | None = None,
    max_accuracy_drop: float | None = None,
    evaluate: Evaluate | None = None,
    example_input: Any = None,
    data: Any = None,
    task: Task | None = None,
    fixed: Sequence[str] = (),
    coder: str | None = None,
    seed: int | None = None,
    evaluations: int = 20,
) -> TargetResult:
    r"""Compress just as much as a target asks for.

    One strength s in [0, 1] turns the knobs of all transforms together: sparsity 0.98 s^3; bits from 16 to 2 and
    clusters from 1024 to 2, geometrically; rank ratio 1 - 0.98 s; and so on (``pipelines.knobs``). Bits between two
    integers are a mix of layers. Sizes are lengths of really encoded archives. With a target of size the smallest
    strength that meets it is found by bisection; where ranks or bits leave bytes unused, sparsity is turned back.
    Without one, the largest strength that keeps error and accuracy is taken. With both, size decides, and
    ``target_met`` says whether the rest holds too.

    A knob whose option has another value than its default stays as it is; so do those named in ``fixed``.

    Args:
        model: any module; it is left as it is.
        transforms: transforms, names, or ``{name: options}``, in order; or a configuration, whose targets, seed and
            coder hold where none are given here.
        target_ratio: ``file_bytes / dense_bytes`` to reach, in (0, 1). Dense is the original as float32.
        target_bytes: length of the archive to reach, >= 1.
        max_error: largest output error (``OutputErrorRate`` between model and result), > 0.
        max_ber: the same.
        max_accuracy_drop: largest ``evaluate(model) - evaluate(result)``, > 0.
        evaluate: model -> accuracy, larger is better; None: top-1 on the labels in ``data``, in [0, 1].
        example_input: one input, for tracing and to draw inputs like it.
        data: inputs, as for ``compress``; with labels for accuracy.
        task: "classification" or "regression"; None: by the axes of the output (see ``pipelines.errors``).
        fixed: options that are held at their default: "sparsity", or "Prune.sparsity".
        coder: entropy coder of the archive; None is "auto".
        seed: of drawn inputs; None is 0.
        evaluations: strengths that are tried at most, >= 2.

    Returns:
        The result; ``target_met`` is False, with one warning, if no strength meets the targets, and the model is the
        one that came nearest.

    Raises:
        ValueError: no target, a target out of range, transforms without a knob, or an option that does not fit.
        NothingChangedError: no transform finds anything to change.
        OrderError: a transform would spoil what an earlier one left.

    Examples:
        >>> from lightning_compress.pipelines import compress_to
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> result = compress_to(net, [Prune(), Quantize(4)], target_bytes=2500)
        >>> result.target_met, result.reached["file_bytes"] <= 2500, result.transforms[1] == Quantize(4)
        (True, True, True)
    """
    start = time.perf_counter()
    if max_error is not None and max_ber is not None:
        raise ValueError("max_error and max_ber are one target: give one of them.")
    if evaluations < 2:
        raise ValueError(f"evaluations={evaluations}: allowed is >= 2.")
    given = {
        "target_ratio": target_ratio,
        "target_bytes": target_bytes,
        "max_error": max_ber if max_error is None else max_error,
        "max_accuracy_drop": max_accuracy_drop,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if isinstance(transforms, CompressionConfig):
        config = transforms
        if config.search:
            raise ValueError(
                "'evolutionary' asks for a search: give the configuration to lightning_compress.search."
            )
        written = config.written(model)
        unused = tuple(f"{key}: this setting means nothing here" for key in config.extra)
        asked = asked or config.targets
        seed, coder = config.seed if seed is None else seed, coder or config.coder
    else:
        written, unused = read_all(transforms), ()
        if not asked:
            raise ValueError(
                f"give a target, one of {', '.join(given)}; compress() takes options as they are."
            )
    limits = Limits(asked)
    knobs = [free_knob(w.transform, {*w.given, *fixed}) if limits else None for w in written]
    _check(written, limits, fixed)
    todo = [w.transform for w in written]
    check(todo, model)
    compress(model, [])  # weights that are not finite are refused before any work

    inputs = Calibration(example_input=example_input, data=data, seed=seed or 0, origin=model, kept=Kept())
    pipeline = Pipeline(model, todo, knobs, inputs, coder or "auto")
    error = OutputError(model, inputs, task) if limits.needs("error") or data is not None else None
    accuracy = evaluate or top1(inputs)
    judge = _Judge(pipeline, limits, error, accuracy if limits.needs("accuracy_drop") else None)
    strength: Strength | None = None
    if any(knob is not None for knob in knobs):
        if limits.of_size:
            strength = _smallest(judge, knobs, evaluations)
        else:  # the largest strength that is good enough is the smallest distance from the strongest
            distance, _ = weakest(lambda d: judge.at((1 - d, 1 - d)), evaluations=evaluations, tolerance=0.02)
            strength = 1 - distance, 1 - distance
    result, run, stages = pipeline.staged(strength, error)
    reached = judge.reached(result.model, stages[-1].file_bytes, everything=True)
    missed = limits.missed(reached)
    if missed and not run.steps:
        raise NothingChangedError(" ".join(run.left_out))
    if missed:
        names = _options([w for w, knob in zip(written, knobs, strict=True) if knob is None])
        hint = f"; held fixed: {', '.join(names)}" if names else ""
        warnings.warn(f"compress_to: not met: {', '.join(missed)}{hint}.", stacklevel=2)
    return TargetResult(
        **{name: getattr(result, name) for name in ("model", "steps", "coverage", "before", "after")},
        transforms=run.transforms,
        target=dict(limits.asked),
        reached=reached,
        target_met=not missed,
        strength=None if strength is None else strength[0],
        smooth=None if strength is None else strength[1],
        evaluations=tuple(judge.trials),
        stages=stages,
        dense_bytes=judge.dense,
        coder=pipeline.coder,
        elapsed_time=time.perf_counter() - start,
        notes=(*unused, *run.left_out),
    )


def _smallest(judge: _Judge, knobs: Sequence[Knob | None], evaluations: int) -> Strength:
    """The weakest strengths that keep the size; where steps leave bytes unused, smooth knobs are turned back."""
    found, met = weakest(lambda s: judge.at((s, s), SIZES), evaluations=evaluations)
    kinds = {knob.smooth for knob in knobs if knob is not None}
    left = evaluations - len(judge.trials)
    close = judge.at((found, found), SIZES) >= _CLOSE
    if not met or close or len(kinds) < 2 or left < 2:
        return found, found
    return found, weakest(lambda s: judge.at((found, s), SIZES), most=found, evaluations=left + 1)[0]


class _Judge:
    """Measures models against the targets, and keeps what was tried."""

    def __init__(
        self, pipeline: Pipeline, limits: Limits, error: OutputError | None, accuracy: Evaluate | None
    ) -> None:
        self.pipeline, self.limits, self.error, self.accuracy = pipeline, limits, error, accuracy
        self.dense = archive.dense_bytes(pipeline.model)
        self.before = 0.0 if accuracy is None else accuracy(pipeline.model)
        self.trials: list[Trial] = []
        self._known: dict[Strength, float] = {}

    def at(self, strength: Strength, only: Sequence[str] = tuple(BOUNDS)) -> float:
        """How far a strength is from the targets that decide: reached / asked."""
        if strength in self._known:
            return self._known[strength]
        try:
            with warnings.catch_warnings():  # of strengths that are not chosen nobody needs to hear
                warnings.simplefilter("ignore")
                model = self.pipeline.run(strength).model
        except ValueError:
            if strength[0] == 1 or not self.limits.of_size:
                raise
            return math.inf  # a grid too fine to be coded; a stronger setting may do
        deciding = [name for name in only if name in self.limits.asked]
        size = self.pipeline.size(model)
        reached = self.reached(model, size, everything=not self.limits.of_size)
        excess = self.limits.excess(reached, deciding)
        self.trials.append(Trial(*strength, reached, excess <= 1))
        self._known[strength] = excess
        return excess

    def reached(self, model: nn.Module, size: int, *, everything: bool) -> dict[str, float]:
        """Size, and if asked for error and lost accuracy."""
        found: dict[str, float] = {"file_bytes": size, "size_fraction": size / self.dense}
        if everything and self.error is not None:
            found["error"] = self.error(model)
        if everything and self.accuracy is not None:
            found["accuracy_drop"] = self.before - self.accuracy(model)
        return found


def _options(written: Sequence[Written]) -> list[str]:
    """The options that set a strength, such as "Prune.sparsity"."""
    pairs = ((type(w.transform).__name__, knob_of(w.transform)) for w in written)
    return [f"{name}.{knob.option}" for name, knob in pairs if knob is not None]


def _check(written: Sequence[Written], limits: Limits, fixed: Sequence[str]) -> None:
    options = _options(written)
    for name in fixed:
        if not any(name in (option, option.partition(".")[2]) for option in options):
            raise ValueError(
                f"fixed has {name!r}, which sets no strength here; allowed: {', '.join(options)}."
            )
    if limits and not options:
        given = ", ".join(type(w.transform).__name__ for w in written) or "none"
        raise ValueError(f"transforms: {given}: none has a strength to tune; add one of: {', '.join(KNOBS)}.")
