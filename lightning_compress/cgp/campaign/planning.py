"""``plan``: experiments become folders that any machine can work on."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.cgp.campaign.folders import CONFIG, GATES, PROBLEM, TRAIN, Config, Folder, digest
from lightning_compress.cgp.campaign.statistics import write
from lightning_compress.cgp.campaign.texts import details, differences, train_data
from lightning_compress.cgp.experiments import Experiment
from lightning_compress.energy import EnergyTable


def plan(
    experiments: Sequence[Experiment],
    folder: str | os.PathLike[str],
    *,
    batches: int = 1,
    log_error: float | str = "threshold",
    statistics: str = "csv",
) -> list[Path]:
    """Write the folders of experiments; nothing is run.

    A folder holds all that its runs need: ``config.json``, ``train.data``, ``problem.json``, ``gate_parameters.csv``.
    Planning the same again changes nothing, whatever has been run.

    Args:
        experiments: with different names.
        folder: where the folders go.
        batches: the runs of every experiment are split into so many folders ``<name>_batch_<i>``, for machines that
            work on their own; their numbers continue, and so no result depends on the split.
        log_error: rows of the statistics with at most this error (as in their column) carry their chromosome; 0:
            perfect ones only; "threshold": the error that is good enough, and the last row; "all": every row.
        statistics: "csv" or "csv.zip", of the finished runs.

    Returns:
        The folders, of every experiment batch by batch.

    Raises:
        ValueError: a name that is no folder name or stands twice, runs that cannot be split evenly, an option out of
            its range, or a folder that was planned with another configuration (lists the differences).

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from lightning_compress.cgp import Problem, Settings
        >>> from lightning_compress.cgp.campaign import plan
        >>> from lightning_compress.cgp.experiments import Experiment, Place
        >>> problem, grid = Problem.of([[3, 4]], [[7, 3, 9]]), Settings(rows=4, cols=4, patience=50)
        >>> tiny = Experiment("tiny", problem, grid, (Place("fc.weight", np.arange(3)),), runs=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in plan([tiny], folder, batches=2)]
        ['tiny_batch_0', 'tiny_batch_1']
    """
    twice = [name for name, n in Counter(e.name for e in experiments).items() if n > 1]
    uneven = [f"{e.name!r} has {e.runs}" for e in experiments if batches < 1 or e.runs % batches]
    if twice or uneven or not experiments:
        wrong = (
            f"names that stand twice: {', '.join(twice)}" if twice else "; ".join(uneven) or "no experiments"
        )
        raise ValueError(
            f"{wrong}: allowed are experiments with different names, and runs that split evenly into {batches=} >= 1."
        )
    planned: list[tuple[Folder, dict[str, bytes]]] = []
    for experiment in experiments:
        files = _files(experiment)
        whole = Config(
            experiment.name,
            None,
            batches,
            0,
            experiment.runs,
            log_error,
            statistics,
            experiment.settings.config(),
            {name: digest(data) for name, data in files.items()},
        )
        for batch in range(batches):
            config = whole.part(batch) if batches > 1 else whole
            there = Folder(Path(folder) / config.folder, config)
            _check(there)
            planned.append((there, files))
    for there, files in planned:
        if (there.path / CONFIG).exists():
            continue
        for name, data in files.items():
            write(there.path / name, data.decode("utf-8"))
        write(there.path / CONFIG, there.config.to_json())  # last: with it, the folder is complete
    return [there.path for there, _ in planned]


def _files(experiment: Experiment) -> dict[str, bytes]:
    problem = json.dumps(details(experiment.problem, experiment.places), separators=(",", ":"))
    with tempfile.TemporaryDirectory() as temporary:
        table = Path(temporary) / GATES
        experiment.settings.table.to_csv(table)
        EnergyTable.from_csv(table)  # a table without some function is refused now, and not when it is read
        gates = table.read_bytes()
    return {
        TRAIN: train_data(experiment.problem).encode("utf-8"),
        PROBLEM: (problem + "\n").encode("utf-8"),
        GATES: gates,
    }


def _check(there: Folder) -> None:
    """ValueError if the folder was planned otherwise."""
    if not (there.path / CONFIG).exists():
        return
    found = Folder.open(there.path).config.to_json()
    other = differences(json.loads(found), json.loads(there.config.to_json()))
    if other:
        raise ValueError(
            f"{there.path} was planned with another configuration: {'; '.join(other)}. Take another folder, or remove "
            "this one."
        )
