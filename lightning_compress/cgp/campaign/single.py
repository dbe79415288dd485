"""One run of an experiment, from where it stands to its end."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_compress.cgp.campaign.folders import Folder
from lightning_compress.cgp.campaign.states import DamagedState, State, alone, load
from lightning_compress.cgp.campaign.statistics import Growing, line, quoted, write
from lightning_compress.cgp.search.evolution import Evolution
from lightning_compress.cgp.search.settings import PICO, EvolutionResult, run_seed

SAVED = 60.0
FRONT = "error,energy,delay,gate_count,chromosome\n"


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        folder: where it is.
        run: its number.
        status: "finished", "skipped" (it had finished before), "running" (another process works on it) or "failed".
        reason: of a failure; otherwise a warning, or nothing.
        attempts: how often it was started.
    """

    folder: Path
    run: int
    status: str
    reason: str = ""
    attempts: int = 1


class _Recorder:
    """Writes rows as they come, and now and then the state; rows first: no state names a row that can be lost."""

    def __init__(self, folder: Folder, run: int, rows: Growing, every: float) -> None:
        self._folder, self._run, self._rows, self._every = folder, run, rows, every
        self._saved = -math.inf
        operations = folder.experiment.settings.table.operations.values()
        self._areas = not all(math.isnan(operation.area_um2) for operation in operations)

    def __call__(self, evolution: Evolution) -> None:
        new = evolution.history[self._rows.rows :]
        limits = self._limits(evolution) if new else {}
        logged = [row.error <= limits[row.phase] for row in new]
        text, area = "", math.nan
        if any(logged) or (new and self._areas):
            best = evolution.best
            text, area = best.circuit.to_text(), best.cost.area_um2 if self._areas else math.nan
        # Where there are several, all are of this circuit: the last of phase 1 also begins phase 2.
        for row, shown in zip(new, logged, strict=True):
            self._rows.append(line(self._run, row, area, text if shown else ""))
        if time.monotonic() - self._saved >= self._every:
            self._rows.sync()
            state = State(self._rows.rows, False, "", evolution.generation, evolution.state_dict())
            state.save(self._folder, self._run)
            self._saved = time.monotonic()

    def _limits(self, evolution: Evolution) -> dict[int, float]:
        """Of each phase, the largest error whose circuits are written."""
        chosen = self._folder.config.log_error
        if chosen != "threshold":
            limit = math.inf if isinstance(chosen, str) else chosen
            return {1: limit, 2: limit}
        settings, problem = evolution.settings, evolution.problem
        # What phase 1 did not reach becomes the threshold of phase 2.
        reached = next((row.error for row in evolution.history if row.phase == 2), 0)
        first = settings.limit(int((problem.counts > 0).sum()))
        return {1: first, 2: max(reached, settings.limit(problem.weights))}


def execute(path: str | os.PathLike[str], run: int, every: float = SAVED) -> Outcome:
    """Work on one run until it ends; in any process, on any machine that sees the folder.

    Args:
        path: folder of its experiment or batch.
        run: its number.
        every: seconds between states.

    Returns:
        What became of it.

    Raises:
        ValueError: the folder has no such run or was changed, or the run was begun with another configuration.
    """
    folder = Folder.open(path)
    if run not in folder.config.numbers:
        raise ValueError(f"{path} has the runs {folder.config.numbers}, not {run}.")
    with alone(folder.lock(run)) as free:
        if not free:
            return Outcome(folder.path, run, "running", "another process works on it")
        state, warning = None, ""
        _tidy(folder, run)
        try:
            state = load(folder, run)
        except DamagedState as error:
            warning = f"the run began anew, which gives the same result, for its state is damaged: {error}"
        if state is not None and state.finished:
            return Outcome(folder.path, run, "skipped")
        return Outcome(folder.path, run, "finished", _work(folder, run, state, every) or warning)


def _tidy(folder: Folder, run: int) -> None:
    """Remove what a process that was killed had not written to the end."""
    places = Folder.state, Folder.statistics, Folder.chromosome, Folder.weights, Folder.front
    for path in (place(folder, run) for place in places):
        for part in path.parent.glob(f".{path.name}.*tmp"):
            part.unlink()


def _work(folder: Folder, run: int, state: State | None, every: float) -> str:
    """A warning, or nothing."""
    experiment, warning, rows = folder.experiment, "", None
    settings = replace(experiment.settings, seed=run_seed(experiment.settings.seed, run))
    if state is None:
        state = State(0, False, "", 0)
        state.save(folder, run)  # the first heartbeat, for building the first circuit may take a while
    evolution = Evolution(experiment.problem, settings)
    if state.evolution:
        try:
            evolution.load_state_dict(state.evolution)
            if len(evolution.history) != state.rows:
                raise ValueError(f"{len(evolution.history)} rows of history, {state.rows} of statistics")
            rows = Growing(folder.statistics(run), state.rows)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
            warning = f"the run began anew, which gives the same result, for it could not go on: {error}"
            evolution = Evolution(experiment.problem, settings)
    rows = rows or Growing(folder.statistics(run), 0)
    try:
        recorder = _Recorder(folder, run, rows, every)
        result = evolution.run(recorder)
        recorder(evolution)
        rows.sync()
    finally:
        rows.close()
    _finish(folder, run, result)
    State(rows.rows, True, result.stopped, result.generations).save(folder, run)
    if folder.config.statistics == "csv.zip":
        folder.statistics(run).unlink()
    return warning


def _finish(folder: Folder, run: int, result: EvolutionResult) -> None:
    statistics, text = folder.statistics(run), result.best.circuit.to_text()
    *lines, last = statistics.read_text(encoding="utf-8").splitlines(keepends=True)
    if folder.config.log_error == "threshold" and last.endswith(",\n"):
        write(statistics, "".join(lines) + last.removesuffix("\n") + quoted(text) + "\n")
    if folder.config.statistics == "csv.zip":
        write(statistics.with_name(statistics.name + ".zip"), statistics.read_text(encoding="utf-8"))
    write(folder.chromosome(run), text + "\n")
    weights = result.problem.decode(result.problem.outputs(result.best.circuit))
    write(folder.weights(run), "".join(" ".join(map(str, row.tolist())) + "\n" for row in weights))
    front = [
        f"{s.error},{round(s.cost.energy_pj * PICO) / PICO!r},{s.cost.delay!r},{s.cost.gate_count},"
        f"{quoted(s.circuit.to_text())}\n"
        for s in result.front
    ]
    write(folder.front(run), FRONT + "".join(front))
