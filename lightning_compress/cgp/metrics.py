"""What a network with computed weights is worth: Top-1, Top-5 and loss for the circuits of an experiment."""

from __future__ import annotations

import copy
import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lightning_compress.cgp.campaign.folders import METRICS, Folder, find
from lightning_compress.cgp.campaign.statistics import COLUMNS, read_rows, write
from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.layers.integers import all_int8
from lightning_compress.cgp.layers.writing import write as put
from lightning_compress.stats.running import call, evaluating

SCORED = (*COLUMNS, "Top-1", "Top-5", "Loss", "Run ID")
Batches = Iterable[tuple[Any, Tensor]]


@dataclass(frozen=True)
class Scores:
    """How well a network classifies.

    Args:
        top1: share of samples whose class has the largest logit, 0 to 1.
        top5: share of those whose class is among the five largest; 1 with five classes or fewer.
        loss: mean cross-entropy, in nats.
    """

    top1: float
    top5: float
    loss: float


def scores(model: nn.Module, batches: Batches) -> Scores:
    """Top-1, Top-5 and mean cross-entropy of a classifier.

    Args:
        model: gives logits [N, classes]; it is run in eval mode and is as before afterwards.
        batches: pairs of inputs and classes [N], such as a ``DataLoader``.

    Returns:
        Them, over all samples.

    Raises:
        ValueError: there are no samples, or the outputs are no logits.

    Examples:
        >>> from lightning_compress.cgp.metrics import scores
        >>> scores(nn.Identity(), [(torch.eye(6)[:3], torch.tensor([0, 1, 3]))]).top1
        0.6666666666666666
    """
    count, first, five, loss = 0, 0, 0, 0.0
    with evaluating(model):
        for x, labels in batches:
            logits = call(model, x)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(
                    f"the model gives {shape} for {len(labels)} labels: needed are logits [N, classes]."
                )
            labels = labels.to(logits.device).long()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            first, five = first + int(hits[:, 0].sum()), five + int(hits.sum())
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            count += len(labels)
    if not count:
        raise ValueError("there are no samples to score: give at least one batch of inputs and labels.")
    return Scores(first / count, five / count, loss / count)


def model_metrics(
    model: nn.Module,
    experiment: Experiment,
    rows: Sequence[Mapping[str, str]],
    batches: Batches,
    *,
    top: int = 1,
) -> list[dict[str, str]]:
    """Rows of the statistics of a run, with the scores of the network whose weights their circuits compute.

    Args:
        model: that the experiment was made from, with its int8 weights; it is not changed.
        experiment: whose problem the circuits solve.
        rows: of one run, in order, with the column "chromosome"; empty ones are left out.
        batches: pairs of inputs and classes; they are gone through once for each circuit.
        top: how many of the last different circuits are taken, >= 1.

    Returns:
        Those rows, in order, with "Top-1", "Top-5" (0 to 1) and "Loss".

    Raises:
        ValueError: the model has no such int8 weights or others than those that are computed, a chromosome is malformed
            or not for this problem, or ``top`` is below 1.

    Examples:
        >>> from lightning_compress.cgp import evolve, Settings, presets
        >>> from lightning_compress.cgp.metrics import model_metrics
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> first = presets.le_selector(net, settings=Settings(generations=0))[0]
        >>> found = evolve(first.problem, first.settings).best.circuit.to_text()
        >>> images = [(torch.zeros(4, 1, 28, 28), torch.zeros(4))]
        >>> [list(row) for row in model_metrics(net, first, [{"chromosome": found}], images)]
        [['chromosome', 'Top-1', 'Top-5', 'Loss']]
    """
    if top < 1:
        raise ValueError(f"top={top}: allowed is >= 1.")
    check_origin(model, experiment)
    last: dict[str, Mapping[str, str]] = {}
    for row in reversed([row for row in rows if row["chromosome"]]):
        last.setdefault(row["chromosome"], row)
    changed, result = copy.deepcopy(model), []
    for text, row in reversed(list(last.items())[:top]):
        put(changed, experiment, circuit_for(experiment, text))
        found = scores(changed, batches)
        values = {"Top-1": found.top1, "Top-5": found.top5, "Loss": found.loss}
        result.append({**row, **{name: repr(value) for name, value in values.items()}})
    return result


def circuit_for(experiment: Experiment, text: str) -> Circuit:
    """The circuit of a chromosome, if it fits an experiment.

    Args:
        experiment: whose problem it is to solve.
        text: of the chromosome.

    Returns:
        The circuit.

    Raises:
        ValueError: the text is malformed, or has other numbers of inputs, outputs or data sets.
    """
    circuit, problem = Circuit.from_text(text.strip()), experiment.problem
    given = circuit.grid.inputs, circuit.grid.outputs, circuit.grid.datasets
    needed = problem.inputs.shape[1], problem.targets.shape[1], problem.datasets
    if given != needed:
        raise ValueError(
            f"a chromosome with {given[0]} inputs, {given[1]} outputs and {given[2]} data sets is none of "
            f"{experiment.name!r}, which has {needed[0]}, {needed[1]} and {needed[2]}."
        )
    return circuit


def check_origin(model: nn.Module, experiment: Experiment) -> None:
    """ValueError if the weights that an experiment computes are not those of this network.

    Args:
        model: with int8 weights.
        experiment: made from it or from another one; wanted zeros are not compared, for an experiment may have set
            weights to zero.
    """
    integers = {key: values.reshape(-1) for key, _, _, values, _ in all_int8(model)}
    wanted = experiment.problem.decode(experiment.problem.targets)
    for place, _, values in experiment.located(wanted):
        there = integers.get(place.key)
        if there is None:
            continue  # said when weights are written
        fits = len(place.positions) == 0 or int(place.positions.max()) < len(there)
        other = np.flatnonzero(values != 0)
        differ = int((there[place.positions[other]] != values[other]).sum()) if fits else len(values)
        if differ:
            raise ValueError(
                f"{experiment.name!r} was made from another network, or one that was quantized otherwise: {differ} of "
                f"its {len(values)} weights of {place.key} differ from those here."
            )


def write_metrics(
    folder: str | os.PathLike[str],
    model: nn.Module,
    batches: Batches,
    *,
    dataset: str,
    split: str = "test",
    top: int = 1,
) -> list[Path]:
    """Measure the circuits of all runs of a campaign: ``model_metrics/{dataset}.{split}.{experiment}.{run}.csv``.

    The columns are those of the statistics, then ``Top-1``, ``Top-5``, ``Loss`` and ``Run ID``, which is
    ``{experiment}.{run}``. Runs that have no circuit yet are left out.

    Args:
        folder: of a campaign, an experiment or a batch.
        model: that the experiments were made from, with its int8 weights; it is not changed.
        batches: pairs of inputs and classes, such as a ``DataLoader``.
        dataset: its name, for the names of the files.
        split: "train" or "test", likewise.
        top: how many of the last different circuits of each run are taken, >= 1.

    Returns:
        The files, by folder and run.

    Raises:
        FileNotFoundError: nothing was planned there.
        ValueError: see ``model_metrics``; or no run has a circuit.
    """
    work: dict[tuple[str, int], tuple[Folder, list[dict[str, str]]]] = {}
    for place in find(folder):
        check_origin(model, place.experiment)
        for run in place.config.numbers:
            path = place.statistics(run)
            if path.exists() or path.with_name(path.name + ".zip").exists():
                rows, task = read_rows(path), (place.config.experiment, run)
                if any(row["chromosome"] for row in rows) and len(rows) > len(work.get(task, (0, []))[1]):
                    work[task] = place, rows  # a merged folder may have the run once more, or its end
    if not work:
        raise ValueError(f"{folder} has no circuits to measure: run the experiments first.")
    files = []
    bar = tqdm(work.items(), desc="metrics", unit="run", leave=False, disable=None)
    for (name, run), (place, rows) in bar:
        found = model_metrics(model, place.experiment, rows, batches, top=top)
        text = io.StringIO()
        table = csv.DictWriter(text, SCORED, lineterminator="\n")
        table.writeheader()
        table.writerows({**row, "Run ID": f"{name}.{run}"} for row in found)
        files.append(place.path / METRICS / f"{dataset}.{split}.{name}.{run}.csv")
        write(files[-1], text.getvalue())
    return files
