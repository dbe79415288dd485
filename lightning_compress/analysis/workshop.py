"""Making a row: a technique on its own copy, saved, read back from the file, and measured."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import archive, codes
from lightning_compress.analysis.inputs import NO_ARCHITECTURE, Inputs, sampler_for
from lightning_compress.analysis.judge import Judge, Judgement
from lightning_compress.analysis.rows import NAN, Row
from lightning_compress.analysis.techniques import STUDENT, Technique, seed_of
from lightning_compress.compress import compress
from lightning_compress.cost import cost
from lightning_compress.lowrank import MergeFactors
from lightning_compress.metrics import WeightError, weight_error
from lightning_compress.targets import find
from lightning_compress.transform import NothingChangedError, applied

Metric = Callable[[nn.Module], float]
Built = tuple[
    nn.Module, str, float
]  # a model, what there is to say about it, share of the bytes that changed


@dataclass(frozen=True)
class Training:
    """How students are trained.

    Args:
        train: False leaves them as they are made.
        steps: of the optimizer.
        sampler: as ``stats.samplers.synthesize`` takes it.
    """

    train: bool = True
    steps: int = 2000
    sampler: Any = "auto"


@dataclass
class Workshop:
    """Everything that rows are made with; it can be pickled, for other processes.

    Args:
        model: the original.
        inputs: None with weights alone.
        judge: None with weights alone.
        folder: for the archives.
        seed: of the analysis.
        training: of students.
        metrics: name -> function of a model.
    """

    model: nn.Module
    inputs: Inputs | None
    judge: Judge | None
    folder: Path
    seed: int = 0
    training: Training = field(default_factory=Training)
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without the sampler, which draws by functions of its own; it is made again where it is needed."""
        inputs = None if self.inputs is None else replace(self.inputs, sampler=None)
        return {**self.__dict__, "inputs": inputs}

    def __call__(self, technique: Technique) -> Row:
        """The row of a technique; what goes wrong is in it.

        Args:
            technique: what to do.

        Returns:
            The row; its archive is in the folder unless ``status`` says otherwise.
        """
        return self.made(technique, lambda: self.build(technique))

    def made(self, technique: Technique, build: Callable[[], Built]) -> Row:
        """The row of a model that is yet to be built.

        Args:
            technique: name, group and parameters.
            build: makes the model.

        Returns:
            The row.
        """
        start = time.perf_counter()
        blank = Row(
            technique.name,
            technique.group,
            technique.parameters,
            dense_bytes=archive.dense_bytes(self.model),
            seed=seed_of(self.seed, technique.name),
            inputs="" if self.inputs is None else self.inputs.words,
        )
        if technique.runs and self.inputs is None:
            return replace(blank, status="skipped", reason=NO_ARCHITECTURE)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what matters is in the row
                row = self._row(build, blank)
        except NothingChangedError as error:
            row = replace(blank, status="skipped", reason=_line(error))
        except Exception as error:  # of a technique, or of the user's own model
            row = replace(blank, status="failed", reason=f"{type(error).__name__}: {_line(error)}")
        if row.status != "ok":
            self.path(technique.name).unlink(missing_ok=True)
        return replace(row, seconds=time.perf_counter() - start)

    def path(self, name: str) -> Path:
        """Where the archive of a row is.

        Args:
            name: of the row.

        Returns:
            The file.
        """
        return self.folder / f"{name}.lcz"

    def load(self, name: str) -> nn.Module:
        """The model of a row, from its archive.

        Args:
            name: of the row.

        Returns:
            A new model in eval mode.
        """
        fresh = copy.deepcopy(self.model)
        return archive.load(self.path(name), into=fresh).eval()

    def build(self, technique: Technique) -> Built:
        """Carry out a technique.

        Args:
            technique: what to do.

        Returns:
            The model, what there is to say about it, and the share of the original's bytes that changed.
        """
        base, notes = self.model, []
        if technique.student is not None:
            base, note = self.student(technique.student)
            notes.append(note)
            if not technique.transforms:
                return base, note, 1.0
        looked_at = () if self.inputs is None else self.inputs.calibration
        given: dict[str, Any] = {"data": list(looked_at)} if looked_at else {}
        if self.inputs is not None:
            given["example_input"] = self.inputs.example
        try:
            result = compress(base, technique.transforms, seed=seed_of(self.seed, technique.name), **given)
        except (NothingChangedError, ValueError) as error:
            if not technique.instead:
                raise
            result = compress(base, technique.instead, seed=seed_of(self.seed, technique.name), **given)
            notes.append(f"masked, not removed: {_line(error)}")
        share = 1.0 if technique.student is not None else result.coverage.share
        return result.model, "; ".join(n for n in notes if n), share

    def student(self, ratio: float) -> tuple[nn.Module, str]:
        """A student, trained without data unless that is switched off; made once, then read from its archive.

        Args:
            ratio: share of the parameters.

        Returns:
            The student, and what there is to say about it.
        """
        from lightning_compress.distillation.datafree import distill
        from lightning_compress.distillation.student import make_student

        name = STUDENT.format(100 * ratio)
        seed = seed_of(self.seed, name)
        assert self.inputs is not None and self.judge is not None
        note = "" if self.training.train else "untrained"
        if self.path(name).exists():
            return self.load(name), note
        teacher, example = self.model, self.inputs.example
        student = make_student(teacher, ratio, example_input=example, seed=seed)
        if self.training.train:
            draws = self.inputs.sampler or sampler_for(teacher, self.training.sampler, example, self.seed)
            distill(
                teacher,
                student,
                example_input=example,
                sampler=draws,
                steps=self.training.steps,
                task=self.judge.task,
                val_samples=1,
                seed=seed,
            )
        return student.eval(), note

    def _row(self, build: Callable[[], Built], blank: Row) -> Row:
        made, note, share = build()
        info = archive.save(made, self.path(blank.name))
        if blank.group == "students" and not self.training.train:
            blank = replace(blank, parameters={**blank.parameters, "trained": False})
        del made
        return replace(
            self.measure(self.load(blank.name), blank, note), file_bytes=info.file_bytes, coverage=share
        )

    def measure(self, model: nn.Module, blank: Row, note: str = "") -> Row:
        """Fill in what can be read from a model and its outputs.

        Args:
            model: of the row.
            blank: the row so far.
            note: what there is to say about it.

        Returns:
            The row.
        """
        judged = Judgement(reason=NO_ARCHITECTURE) if self.judge is None else self.judge(model)
        counted = cost(model, None if self.inputs is None else self.inputs.example)
        weights = [t.weight for t in find(model)]
        elements = sum(w.numel() for w in weights)
        nonzero = sum(int(torch.count_nonzero(w)) for w in weights)
        numbers = sum(map(_numbers, weights))
        error = _weight_error(self.model, model)
        reasons = [note, judged.reason]
        if error.relative != error.relative:
            reasons.append("weights have other shapes than the original's, so they are not compared")
        return replace(
            blank,
            **{name: value for name, value in vars(judged).items() if name != "reason"},
            reason="; ".join(r for r in reasons if r),
            sparsity=1 - nonzero / elements if elements else NAN,
            nonzero=nonzero,
            bits_mean=_bits(model) / numbers if numbers else NAN,
            params=counted.params,
            macs=counted.macs,
            weight_sqnr_db=error.sqnr_db,
            weight_relative_error=error.relative,
            extra={name: float(metric(model)) for name, metric in self.metrics.items()},
        )


def _weight_error(original: nn.Module, model: nn.Module) -> WeightError:
    """Of all targets together; NaN where one is gone or has another shape. Factors count as their product."""
    if any(step.name == "Factorize" for _, step in applied(model)):
        original, model = _merged(original), _merged(model)
    shapes = [{t.key: t.weight.shape for t in find(m)} for m in (original, model)]
    return weight_error(original, model) if shapes[0] == shapes[1] else WeightError(NAN, NAN)


def _merged(model: nn.Module) -> nn.Module:
    try:
        return compress(model, [MergeFactors()]).model
    except ValueError:  # it has none, or such that cannot be multiplied
        return model


def _bits(model: nn.Module) -> int:
    """Bits of all target weights under their codes, before entropy coding."""
    total = 0
    for target in find(model):
        weight, code = target.weight.detach(), codes.read(target.module, target.param)
        dense = 8 * weight.element_size() * weight.numel()
        total += code.bits(weight) if code is not None and code.matches(weight) else dense
    return total


def _numbers(weight: Tensor) -> int:
    return weight.numel() * (2 if weight.is_complex() else 1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
