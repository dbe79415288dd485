"""``analyze(model)``: every technique on its own copy, saved, read back and measured."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lightning_compress import archive
from lightning_compress.analysis.combined import pipelines
from lightning_compress.analysis.inputs import NO_ARCHITECTURE, Inputs, Source, Subject, gather, read
from lightning_compress.analysis.judge import Judge
from lightning_compress.analysis.outcome import About, marked
from lightning_compress.analysis.result import Analysis
from lightning_compress.analysis.rows import NAN, Row, plain
from lightning_compress.analysis.techniques import Grid, Technique, choose
from lightning_compress.analysis.workshop import Training, Workshop
from lightning_compress.analysis.write import MODELS, prepare
from lightning_compress.archive.writing import own_version
from lightning_compress.compress import compress
from lightning_compress.cost import cost
from lightning_compress.names import name_of
from lightning_compress.search.journal import Lines
from lightning_compress.search.processes import Work
from lightning_compress.spectral import spectral_layers
from lightning_compress.stats.running import device_of
from lightning_compress.steps import fingerprint

JOURNAL = "analysis.jsonl"


def analyze(
    source: Source | None = None,
    *,
    model: nn.Module | None = None,
    example_input: Any = None,
    input_sampler: str | Callable[[int, torch.Generator], Any] = "auto",
    data: Any = None,
    task: str = "auto",
    techniques: str | Sequence[str] = "all",
    pruning_amounts: Sequence[float] = Grid.pruning_amounts,
    quantization_bits: Sequence[int] = Grid.quantization_bits,
    log2_bits: Sequence[int] = Grid.log2_bits,
    minifloat_formats: Sequence[str] = Grid.minifloat_formats,
    rate_distortion_bits: Sequence[float] = Grid.rate_distortion_bits,
    cluster_counts: Sequence[int] = Grid.cluster_counts,
    rank_ratios: Sequence[float] = Grid.rank_ratios,
    mode_ratios: Sequence[float] = Grid.mode_ratios,
    student_ratios: Sequence[float] = Grid.student_ratios,
    train_students: bool = True,
    student_steps: int = 2000,
    ber_thresholds: Sequence[float] = (0.01, 0.05, 0.10, 0.20, 0.30),
    combine: bool = True,
    samples: int = 1000,
    metrics: Sequence[Callable[[nn.Module], float]] | Mapping[str, Callable[[nn.Module], float]] = (),
    rebuild: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    seed: int = 0,
    progress: bool = True,
    device: str = "auto",
) -> Analysis:
    r"""Try every technique on a trained model, and measure bytes and output error of each; no data needed.

    Every technique works on its own copy, which is saved and read back, so that what is measured is what the file
    holds: ``compression_ratio = dense_bytes of the original / length of the file``. All rows see the same inputs. The
    output error rate is the share of inputs whose class differs from the original's, or the mean of
    ``||f(x) - g(x)|| / ||f(x)||``. What cannot be measured is NaN, with a reason; a technique that fails is a row that
    says so.

    Args:
        source: a module; a path of an ``.lcz``, ``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt`` file; or a state dict.
            Weights alone are analyzed as such: without output errors.
        model: the architecture, where ``source`` holds weights.
        example_input: one input with its batch axis; a model's ``example_input_array`` is found by itself.
        input_sampler: how inputs are drawn: "auto", "normal", "uniform", "grf", "bn_stats", or a function
            (n, generator) -> inputs; see ``stats.samplers.synthesize``.
        data: batches or a loader of inputs instead of drawn ones; ``samples`` of them are used at most.
        task: "classification", "regression" or "auto".
        techniques: "all"; or names of groups (pruning, quantization, sharing, lowrank, students), families or rows.
        pruning_amounts: shares of zeros, in (0, 1).
        quantization_bits: of integers.
        log2_bits: of powers of two.
        minifloat_formats: small floating-point formats.
        rate_distortion_bits: coded bits per weight.
        cluster_counts: different values of a layer.
        rank_ratios: shares of a layer's parameters that its factors take.
        mode_ratios: shares of the modes of every axis that spectral layers keep.
        student_ratios: shares of the parameters, in (0, 1).
        train_students: False leaves students as they are made; their rows say "untrained".
        student_steps: optimizer steps of their training.
        ber_thresholds: output error rates for which the best row is named.
        combine: also run the pipelines of ``analysis.combined``.
        samples: inputs to judge by.
        metrics: further functions of a model to a number, by name or with names of their own.
        rebuild: "mlp:tanh" makes a plain chain of Linear layers of a state dict.
        output_dir: folder for archives and for the rows as they are finished: an analysis that was stopped goes on from
            it. None keeps archives in a temporary folder.
        executor: of ``concurrent.futures`` or alike; None makes one row after the other. Everything given must be
            picklable then.
        seed: of everything; a row's own seed depends on it and on the row's name.
        progress: show a progress bar on a terminal.
        device: "auto" (where the model is), "cpu" or "cuda".

    Returns:
        Rows, front, knee, best rows, and the models on demand.

    Raises:
        ValueError: an option out of its range, a model that cannot be read or does not run on the inputs, or every
            technique failed.
        OSError: ``output_dir`` cannot be written into.

    Examples:
        >>> from lightning_compress.analysis import analyze
        >>> net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> found = analyze(net, example_input=torch.zeros(1, 20), techniques=["quantized_weights", "clustered"])
        >>> found.best(0.2).compression_ratio > 3
        True
        >>> [row.name for row in found.rows][:2]
        ['quantized_weights_int4', 'quantized_weights_int6']

    Source: Han et al. 2016; Das 1999 (knee); Wilson 1927 (intervals).
    """
    grid = Grid(
        tuple(pruning_amounts),
        tuple(quantization_bits),
        tuple(log2_bits),
        tuple(minifloat_formats),
        tuple(rate_distortion_bits),
        tuple(cluster_counts),
        tuple(rank_ratios),
        tuple(mode_ratios),
        tuple(student_ratios),
    )
    todo = choose(techniques, grid, seed)
    if min(samples, student_steps) < 1:
        raise ValueError(f"samples={samples}, student_steps={student_steps}: at least 1 is needed.")
    folder = None if output_dir is None else prepare(output_dir)
    extra = dict(metrics) if isinstance(metrics, Mapping) else {name_of(m): m for m in metrics}
    subject = moved(read(source, model, rebuild), device)
    training = Training(train_students, student_steps, input_sampler)
    prepared = prepare_workshop(
        subject, example_input, data, input_sampler, task, samples, training, extra, seed
    )
    workshop, about = prepared.workshop, dataclasses.replace(prepared.about, thresholds=tuple(ber_thresholds))
    _check_thresholds(about)
    if techniques == "all" and not spectral_layers(workshop.model):
        todo = {name: t for name, t in todo.items() if not name.startswith("truncated_modes")}

    keeper = None
    if folder is None:
        keeper = tempfile.TemporaryDirectory(prefix="lightning-compress-")
        workshop.folder = Path(keeper.name)
    else:
        workshop.folder = folder / MODELS
        workshop.folder.mkdir(exist_ok=True)
    journal = Lines(
        None if folder is None else folder / JOURNAL,
        prepared.identity | {"metrics": sorted(extra)},
        "analysis",
    )
    run = Run(workshop, journal, executor, progress)
    rows = run(list(todo.values()))
    if combine:
        groups = {t.group for t in todo.values()}
        more = pipelines(rows, todo, groups, [r for r in grid.student_ratios if _kept(r, todo)], seed)
        rows += run(more, ratios={row.name: row.compression_ratio for row in rows})
    if not any(row.status == "ok" for row in rows):
        raise ValueError(
            "no technique worked: " + "; ".join(f"{row.name}: {row.reason}" for row in rows) + "."
        )
    return Analysis(about, marked(rows), workshop=workshop, keeper=keeper)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that is needed before the first row.

    Args:
        workshop: with a folder that is still to be given.
        about: the facts.
        identity: what rows depend on, for the file of finished rows.
    """

    workshop: Workshop
    about: About
    identity: dict[str, Any]


def prepare_workshop(
    subject: Subject,
    example_input: Any,
    data: Any,
    sampler: Any,
    task: str,
    samples: int,
    training: Training,
    metrics: Mapping[str, Callable[[nn.Module], float]],
    seed: int,
) -> Prepared:
    """Inputs, task and the original's outputs, checked before any work.

    Args:
        subject: the model.
        example_input: as for ``analyze``.
        data: as for ``analyze``.
        sampler: as for ``analyze``.
        task: as for ``analyze``.
        samples: as for ``analyze``.
        training: of students.
        metrics: by name.
        seed: of everything.

    Returns:
        Workshop, facts and identity.

    Raises:
        ValueError: see ``analyze``.
    """
    from lightning_compress.distillation.tasks import find_task

    compress(subject.model, [])  # weights that are not finite are refused before any work
    inputs: Inputs | None = None
    judge: Judge | None = None
    notes, reason = list(subject.notes), NO_ARCHITECTURE
    if task not in ("auto", "classification", "regression"):
        raise ValueError(f"task={task!r} is unknown; allowed: auto, classification, regression.")
    if subject.runs:
        inputs = gather(subject.model, example_input, data, sampler, samples, seed)
        decided = find_task(subject.model, inputs.batches[0])
        reason = decided.reason if task == "auto" else "given"
        if task == "auto" and not decided.sure:
            notes.append(f"task taken as {decided.task}: {decided.reason}.")
            warnings.warn(
                f"task taken as {decided.task}: {decided.reason}. Give task='classification' or 'regression'.",
                stacklevel=3,
            )
        judge = Judge(subject.model, inputs.batches, decided.task if task == "auto" else task)  # type: ignore[arg-type]
        if data is None:
            notes.append("measured on synthetic inputs: not an accuracy.")
        if inputs.sampler is not None and "stock" in inputs.words:
            notes.append("inputs from a stock are shifted and flipped; intervals take them as independent.")
    workshop = Workshop(subject.model, inputs, judge, Path(), seed, training, metrics)
    example = None if inputs is None else inputs.example
    counted = cost(subject.model, example)
    about = About(
        model=subject.name,
        params=counted.params,
        dense_bytes=archive.dense_bytes(subject.model),
        file_bytes=archive.size_of(subject.model),
        macs=counted.macs,
        task="" if judge is None else judge.task,
        task_reason=reason,
        inputs="" if inputs is None else inputs.words,
        n_samples=0 if inputs is None else inputs.count,
        thresholds=(),
        seed=seed,
        versions=_versions(),
        machine=_machine(subject.model),
        notes=tuple(notes),
    )
    identity = {
        "model": fingerprint(subject.model) + f" {subject.name}",
        "inputs": None if inputs is None else inputs.digest(),
        "task": about.task,
        "seed": seed,
        "students": {"train": training.train, "steps": training.steps, "sampler": name_of(training.sampler)},
    }
    return Prepared(workshop, about, identity)


class Run:
    """Makes rows, those that the journal holds excepted.

    Args:
        workshop: what makes them.
        journal: of finished rows.
        executor: None makes one row after the other.
        progress: show a progress bar on a terminal.
    """

    def __init__(self, workshop: Workshop, journal: Lines, executor: Executor | None, progress: bool) -> None:
        self.workshop, self.journal, self.progress = workshop, journal, progress
        self.executor = executor

    def __call__(
        self, techniques: Sequence[Technique], ratios: Mapping[str, float] | None = None
    ) -> list[Row]:
        """The rows of some techniques.

        Args:
            techniques: what to do.
            ratios: of rows by name, for what multiplying those of the parts would have promised.

        Returns:
            One row for each, in order.
        """
        known = self._known(techniques)
        fresh = [t for t in techniques if t.name not in known]
        for technique in fresh:  # what an analysis that was stopped has left is not trusted
            self.workshop.path(technique.name).unlink(missing_ok=True)
        work: Work[Technique, Row] = Work(self.workshop, self.executor)
        bar = tqdm(
            total=len(techniques), initial=len(known), disable=None if self.progress else True, leave=False
        )
        with bar:
            made = work(fresh)
            for technique in fresh:
                bar.set_description(technique.name)
                row = next(made)
                if ratios is not None:
                    row = dataclasses.replace(row, product_of_ratios=self._product(technique, ratios))
                self.journal.append({**row.to_json(), "transforms": _described(technique)})
                known[technique.name] = row
                bar.update()
        return [known[t.name] for t in techniques]

    def _known(self, techniques: Sequence[Technique]) -> dict[str, Row]:
        """Finished rows of the same techniques whose archives are there."""
        wanted = {t.name: _described(t) for t in techniques}
        found = {}
        for line in self.journal.rows:
            row = Row.from_json(line)
            path = self.workshop.path(row.name)
            there = row.status != "ok" or (path.is_file() and path.stat().st_size == row.file_bytes)
            if row.name in wanted and line["transforms"] == wanted[row.name] and there:
                found[row.name] = row
        return found

    def _product(self, technique: Technique, ratios: Mapping[str, float]) -> float:
        """What multiplying the ratios of the parts would have promised."""
        dense = archive.dense_bytes(self.workshop.model)
        product = 1.0
        for part in technique.parts:
            ratio = ratios.get(part.name, NAN)
            if math.isnan(ratio):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        ratio = dense / archive.size_of(self.workshop.build(part)[0])
                except Exception:  # a part that does not work alone: the pipeline's own row has its reason
                    return NAN
            product *= ratio
        return product


def _described(technique: Technique) -> list[Any]:
    """What a technique does, as JSON values."""
    found: list[Any] = plain([[type(t).__name__, t.config()] for t in technique.transforms])
    return [technique.student, *found]


def _kept(ratio: float, todo: Mapping[str, Technique]) -> bool:
    return any(t.student == ratio for t in todo.values())


def moved(subject: Subject, device: str) -> Subject:
    """The model on another device, as a copy.

    Args:
        subject: the model.
        device: "auto" leaves it where it is.

    Returns:
        The model.
    """
    if device == "auto":
        return subject
    return dataclasses.replace(subject, model=copy.deepcopy(subject.model).to(device))


def _check_thresholds(about: About) -> None:
    high = 1.0 if about.task == "classification" else math.inf
    for threshold in about.thresholds:
        if not 0 <= threshold <= high:
            raise ValueError(f"ber_thresholds has {threshold}: allowed is 0 <= threshold <= {high:g}.")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    own = own_version()
    return versions if own is None else versions | {"lightning_compress": own}


def _machine(model: nn.Module) -> str:
    where = device_of(model)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {where.type}"
