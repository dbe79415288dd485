"""``merge``: the batches of an experiment as one folder, as if it had never been split."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lightning_compress.cgp.campaign.folders import CONFIG, METRICS, Folder, find
from lightning_compress.cgp.campaign.gates import write_gates
from lightning_compress.cgp.campaign.overview import absent, spelled
from lightning_compress.cgp.campaign.states import stands
from lightning_compress.cgp.campaign.statistics import HEADER, lines_of, write
from lightning_compress.cgp.campaign.texts import differences

MODES = ("all", "lean")


def merge(
    folder: str | os.PathLike[str],
    name: str,
    *,
    top: int | None = None,
    mode: str = "all",
    allow_missing: bool = False,
    into: str | os.PathLike[str] | None = None,
) -> Path:
    """Join the batches ``<name>_batch_<i>`` of an experiment.

    The result is a folder like one of an experiment that was never split, whose runs have finished, and beside the
    statistics of each run there is one file with all of them in the order of runs, ``statistics.csv``. Batches stay.

    Args:
        folder: of the campaign.
        name: of the experiment.
        top: in mode "lean", how many rows of each run are kept, >= 1; None: 1.
        mode: "all", or "lean": only the last rows of each run, and no fronts.
        allow_missing: join what there is.
        into: folder to write; None: ``<name>`` in that folder, or ``<name>_lean``. What an earlier merge of the same
            experiment wrote there is replaced.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there are no batches of that name.
        ValueError: a batch or a run is missing (lists them), batches of different configurations, an option that does
            not fit, or another experiment in ``into``.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from lightning_compress.cgp import Problem, Settings
        >>> from lightning_compress.cgp.campaign import merge, plan, read_rows, run
        >>> from lightning_compress.cgp.experiments import Experiment, Place
        >>> problem, grid = Problem.of([[3, 4]], [[7, 3, 9]]), Settings(rows=4, cols=4, patience=50)
        >>> tiny = Experiment("tiny", problem, grid, (Place("fc.weight", np.arange(3)),), runs=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     folders = plan([tiny], folder, batches=2)
        ...     outcomes = run(folder)
        ...     rows = read_rows(merge(folder, "tiny") / "train_statistics" / "fitness" / "statistics.csv")
        >>> sorted({row["run"] for row in rows})
        ['0', '1', '2', '3']
    """
    if mode not in MODES or (top is not None and (mode != "lean" or top < 1)):
        raise ValueError(f'mode={mode!r}, top={top}: allowed are mode="all", and mode="lean" with top >= 1.')
    every = find(folder)
    parts = [f for f in every if f.config.experiment == name and f.config.batch is not None]
    if not parts:
        names = sorted({f.config.experiment for f in every if f.config.batch is not None})
        raise FileNotFoundError(
            f"{folder} has no batches of {name!r}; it has those of: {', '.join(names) or 'none'}."
        )
    whole = parts[0].config.whole()
    for part in parts[1:]:
        other = differences(parts[0].config.whole().identity, part.config.whole().identity)
        if other or part.config.whole() != whole:
            raise ValueError(
                f"{part.path} ({part.config.runs} runs of {part.config.batches} batches) does not belong to "
                f"{parts[0].path}: {'; '.join(other) or 'another split'}."
            )
    finished = {n: f for f in parts for n in f.config.numbers if stands(f, n) == "finished"}
    if not allow_missing:
        _refuse_missing(parts, finished)
    target = Path(into) if into is not None else Path(folder) / (name + ("_lean" if mode == "lean" else ""))
    joined = Folder(target, whole)
    if (target / CONFIG).exists() and Folder.open(target).config != whole:
        raise ValueError(f"{target} holds another experiment; give another folder as into.")
    for file in whole.sha256:
        _copy(parts[0].path / file, target / file)
    ending = ".zip" if whole.statistics == "csv.zip" else ""
    rows: list[str] = []
    for number, part in sorted(finished.items()):
        lines = lines_of(part.statistics(number))
        if mode == "lean":
            lines = lines[-(top or 1) :]
        own = joined.statistics(number)
        write(own.with_name(own.name + ending), HEADER + "".join(lines))
        rows += lines
        for place in (Folder.chromosome, Folder.weights, *([Folder.front] if mode == "all" else [])):
            _copy(place(part, number), place(joined, number))
        _copy(part.state(number), joined.state(number))
    for part in parts:
        for measured in sorted((part.path / METRICS).glob("*.csv")):
            _copy(measured, target / METRICS / measured.name)
    write(joined.statistics(0).with_name(f"statistics.csv{ending}"), HEADER + "".join(rows))
    write_gates(joined)
    write(target / CONFIG, whole.to_json())
    return target


def _refuse_missing(parts: list[Folder], finished: dict[int, Folder]) -> None:
    lost = [f"{f.path.name} (no folder)" for f in absent(parts)]
    for part in parts:
        left = spelled(tuple(n for n in part.config.numbers if n not in finished))
        lost += [f"{part.path.name} (runs {left} have not finished)"] if left else []
    if lost:
        raise ValueError(f"missing: {'; '.join(lost)}. Run them, or merge with allow_missing.")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
