"""``quick(model)``: the gentlest technique that makes a model small enough, and no stronger than it has to be."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lightning_compress import archive
from lightning_compress.analysis.combined import joined
from lightning_compress.analysis.inputs import NO_ARCHITECTURE, Source, read
from lightning_compress.analysis.outcome import marked
from lightning_compress.analysis.result import Analysis
from lightning_compress.analysis.rows import Row
from lightning_compress.analysis.sweep import moved, prepare_workshop
from lightning_compress.analysis.techniques import Grid, Technique, catalogue, seed_of
from lightning_compress.analysis.workshop import Built, Training, Workshop
from lightning_compress.analysis.write import MODELS, prepare
from lightning_compress.lowrank import Factorize
from lightning_compress.pipelines import compress_to
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.quantization.rate_distortion import RateDistortionQuantize
from lightning_compress.sharing import ShareWeights
from lightning_compress.transform import Transform

REFINED = "refined"
_FREE: dict[str, Callable[[], Transform]] = {  # family -> the transform with a strength that may be turned
    "quantized_weights": Quantize,
    "quantized_log2": lambda: Quantize(format="log2"),
    "pruned_magnitude": lambda: Prune(scope="layer"),
    "clustered": ShareWeights,
    "quantized_rate_distortion": RateDistortionQuantize,
    "lowrank": Factorize,
}


@dataclass(frozen=True)
class Quick:
    """What ``quick`` returns.

    Args:
        model: the chosen model, read back from its archive.
        row: its row.
        target_met: whether the row has the ratio and the error that were asked for.
        analysis: of all rows that were tried.
        target_compression: ratio that was asked for.
        max_ber: output error rate that was asked for.
    """

    model: nn.Module = field(repr=False)
    row: Row
    target_met: bool
    analysis: Analysis = field(repr=False)
    target_compression: float
    max_ber: float

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row that was tried, in order."""
        return self.analysis.rows

    def find_best(self, min_agreement: float = 0.8) -> Row | None:
        """The row of largest ratio whose output error rate is at most ``1 - min_agreement``.

        Args:
            min_agreement: in [0, 1].

        Returns:
            The row, or None.
        """
        return self.analysis.best(1 - min_agreement)

    def __str__(self) -> str:
        met = "met" if self.target_met else "NOT met"
        asked = f"ratio >= {self.target_compression:g} with an output error rate <= {self.max_ber:g}: {met}"
        return f"{self.analysis.table()}\n\n{asked}; chosen: {self.row.name}"


def quick(
    source: Source | None = None,
    *,
    target_compression: float = 5.0,
    max_ber: float = 0.30,
    model: nn.Module | None = None,
    example_input: Any = None,
    input_sampler: str | Callable[[int, torch.Generator], Any] = "auto",
    data: Any = None,
    task: str = "auto",
    student_ratios: Sequence[float] = (0.25, 0.10, 0.05),
    train_students: bool = True,
    student_steps: int = 2000,
    ber_thresholds: Sequence[float] = (0.01, 0.05, 0.10, 0.20, 0.30),
    samples: int = 1000,
    rebuild: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    device: str = "auto",
) -> Quick:
    """Find the first technique, in order of expected damage, that reaches a ratio within an error, and refine it.

    Tried: int8; 3 coded bits per weight; 16 shared values; 6-bit powers of two; half of the weights to zero, then int8;
    half of the parameters in factors, then int8; students of falling size, as they are and in int8. The first with
    ``ratio >= target_compression`` and ``ber <= max_ber`` is refined: ``compress_to`` finds by bisection the weakest
    strength that still has the ratio. It takes its place if that lowers the error. Everything is measured as by
    ``analyze``.

    Args:
        source: as for ``analyze``.
        target_compression: dense bytes of the original / bytes of the file, > 1.
        max_ber: largest output error rate.
        model: as for ``analyze``.
        example_input: as for ``analyze``.
        input_sampler: as for ``analyze``.
        data: as for ``analyze``.
        task: as for ``analyze``.
        student_ratios: sizes of students, tried from the largest to the smallest.
        train_students: as for ``analyze``.
        student_steps: as for ``analyze``.
        ber_thresholds: for reports.
        samples: as for ``analyze``.
        rebuild: as for ``analyze``.
        output_dir: folder for the archives; None is a temporary one.
        seed: of everything.
        progress: show a progress bar on a terminal.
        device: as for ``analyze``.

    Returns:
        The model and its row; where nothing reaches both, ``target_met`` is False and the row has the largest ratio
        within the error, or else the lowest error.

    Raises:
        ValueError: a target out of its range, a model that cannot run, or every technique failed.

    Examples:
        >>> from lightning_compress.analysis import quick
        >>> net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> found = quick(net, target_compression=3, example_input=torch.zeros(1, 20))
        >>> found.target_met, found.row.compression_ratio >= 3
        (True, True)
    """
    if not target_compression > 1 or not max_ber >= 0:
        raise ValueError(
            f"target_compression={target_compression}, max_ber={max_ber}: allowed are > 1 and >= 0."
        )
    todo = _candidates(student_ratios, seed)
    folder = None if output_dir is None else prepare(output_dir)
    subject = moved(read(source, model, rebuild), device)
    if not subject.runs:
        raise ValueError(f"quick needs output errors, and there is {NO_ARCHITECTURE}.")
    training = Training(train_students, student_steps, input_sampler)
    prepared = prepare_workshop(
        subject, example_input, data, input_sampler, task, samples, training, {}, seed
    )
    workshop, keeper = prepared.workshop, None
    if folder is None:
        keeper = tempfile.TemporaryDirectory(prefix="lightning-compress-")
        workshop.folder = Path(keeper.name)
    else:
        workshop.folder = folder / MODELS
        workshop.folder.mkdir(exist_ok=True)

    def fits(row: Row) -> bool:
        return row.compression_ratio >= target_compression and row.ber <= max_ber

    rows: list[Row] = []
    bar = tqdm(todo, disable=None if progress else True, leave=False)
    for technique in bar:
        bar.set_description(technique.name)
        workshop.path(technique.name).unlink(missing_ok=True)
        rows.append(workshop(technique))
        if fits(rows[-1]):
            refined = _refined(workshop, technique, target_compression, rows[-1])
            rows += [] if refined is None else [refined]
            break
    about = dataclasses.replace(prepared.about, thresholds=tuple(ber_thresholds))
    analysis = Analysis(about, marked(rows), workshop=workshop, keeper=keeper)
    chosen = _chosen(analysis, fits, max_ber)
    return Quick(workshop.load(chosen.name), chosen, fits(chosen), analysis, target_compression, max_ber)


def _candidates(student_ratios: Sequence[float], seed: int) -> list[Technique]:
    """What is tried, in order."""
    ratios = sorted(student_ratios, reverse=True)
    every = catalogue(Grid((0.5,), (8,), (6,), (), (3.0,), (16,), (0.5,), (), ratios), seed)
    int8, half = every["quantized_weights_int8"], every["pruned_magnitude_0.5"]
    students = [t for t in every.values() if t.student is not None]

    def with_int8(part: Technique) -> Technique:
        return joined(f"{part.name}_int8", [part, int8])

    return [
        int8,
        every["quantized_rate_distortion_3bit"],
        every["clustered_16"],
        every["quantized_log2_6bit"],
        with_int8(half),
        with_int8(every["lowrank_0.5"]),
        *(t for student in students for t in (student, with_int8(student))),
    ]


def _refined(workshop: Workshop, technique: Technique, target: float, found: Row) -> Row | None:
    """The same technique, as weak as the ratio allows; None if that is no better."""
    parts = technique.parts or (technique,)
    free = [make() for part in parts for name, make in _FREE.items() if part.name.startswith(name)]
    dense = archive.dense_bytes(workshop.model)
    seed = seed_of(workshop.seed, REFINED)
    assert workshop.inputs is not None

    def build() -> Built:
        base = workshop.model if technique.student is None else workshop.student(technique.student)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = compress_to(
                base,
                free,
                target_bytes=int(dense / target),
                example_input=workshop.inputs.example,  # type: ignore[union-attr]
                data=list(workshop.inputs.calibration),  # type: ignore[union-attr]
                seed=seed,
                evaluations=10,
            )
        return result.model, "", result.coverage.share

    parameters = {"of": technique.name, "ratio": target}
    row = workshop.made(Technique(REFINED, found.group, parameters), build)
    better = row.status == "ok" and row.compression_ratio >= target and row.ber < found.ber
    if not better:
        workshop.path(REFINED).unlink(missing_ok=True)
    return row if better else None


def _chosen(analysis: Analysis, fits: Callable[[Row], bool], max_ber: float) -> Row:
    """The last row if it fits; else the largest ratio within the error; else the lowest error."""
    rows = [row for row in analysis.rows if row.status == "ok"]
    if not rows:
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in analysis.rows)
        raise ValueError(f"no technique worked: {reasons}.")
    if fits(rows[-1]):
        return rows[-1]
    within = analysis.best(max_ber)
    return within or min(
        rows, key=lambda row: (row.ber != row.ber, row.ber, -row.compression_ratio, row.name)
    )
