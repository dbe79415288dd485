"""``run``: the runs of folders on processes, on any executor, or on a cluster."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_compress.cgp.campaign.folders import find
from lightning_compress.cgp.campaign.gates import write_gates
from lightning_compress.cgp.campaign.processes import Processes
from lightning_compress.cgp.campaign.single import SAVED, Outcome, execute
from lightning_compress.cgp.campaign.states import stands


def run(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    jobs: int = 1,
    executor: Any = None,
    retries: int = 1,
    save_every: float = SAVED,
    on_progress: Callable[[Outcome], object] | None = None,
) -> list[Outcome]:
    """Work on all runs of folders that have not finished; each goes on from where it stands.

    Every run is a task of its own. Its seed is fixed by the seed of the experiment and its number, so that files do not
    depend on jobs, executor or batches; only the column ``timestamp`` does.

    Args:
        folders: of experiments, batches or whole campaigns, on a disk that all workers see by the same path.
        jobs: processes at a time, each for one run; 1: this process.
        executor: what the tasks are given to in place of own processes: a ``concurrent.futures.Executor``, or the
            ``Client`` of a dask cluster. It is not shut down.
        retries: how often a run that failed or was killed is started again, >= 0.
        save_every: seconds between the states that a killed run goes on from.
        on_progress: is called with every outcome, in the order of time.

    Returns:
        What became of each run, by folder and number. A run that failed is among them, with a warning; the others are
        kept, and running again tries the rest.

    Raises:
        FileNotFoundError: a folder that was not planned.
        ValueError: a file of a folder was changed after the plan, or a run was begun with another configuration.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from lightning_compress.cgp import Problem, Settings
        >>> from lightning_compress.cgp.campaign import plan, run, status
        >>> from lightning_compress.cgp.experiments import Experiment, Place
        >>> problem, grid = Problem.of([[3, 4]], [[7, 3, 9]]), Settings(rows=4, cols=4, patience=50)
        >>> tiny = Experiment("tiny", problem, grid, (Place("fc.weight", np.arange(3)),), runs=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     folders = plan([tiny], folder)
        ...     before, outcomes, after = status(folder), run(folder), status(folder)
        >>> before.folders[0].missing, [outcome.status for outcome in outcomes], after.finished
        ((0, 1, 2, 3), ['finished', 'finished', 'finished', 'finished'], True)
    """
    if jobs < 1 or retries < 0:
        raise ValueError(f"jobs={jobs}, retries={retries}: allowed are jobs >= 1 and retries >= 0.")
    given = [folders] if isinstance(folders, str | os.PathLike) else folders
    found = list({folder.path.resolve(): folder for path in given for folder in find(path)}.values())
    outcomes: dict[tuple[Path, int], Outcome | None] = {}
    for folder in found:
        _ = folder.experiment  # whatever is wrong with a folder is said before anything is run
        for number in folder.config.numbers:
            finished = stands(folder, number) == "finished"
            path = folder.path.resolve()
            outcomes[path, number] = Outcome(path, number, "skipped", attempts=0) if finished else None
    tasks = [place for place, outcome in outcomes.items() if outcome is None]
    with _executor(executor, min(jobs, len(tasks))) as pool:
        ahead = 1 if isinstance(pool, _Here) else len(tasks)
        before = len(outcomes) - len(tasks)
        with tqdm(total=len(outcomes), initial=before, desc="runs", unit="run", disable=None) as bar:
            for outcome in _outcomes(pool, tasks, ahead, retries, save_every):
                outcomes[outcome.folder, outcome.run] = outcome
                bar.update()
                if on_progress is not None:
                    on_progress(outcome)
    for folder in found:
        write_gates(folder)
    result = [outcome for outcome in outcomes.values() if outcome is not None]
    noted = [f"\n{o.folder}, run {o.run}: {o.status}: {o.reason}" for o in result if o.reason]
    if noted:
        warnings.warn(f"{len(noted)} of {len(result)} runs:{''.join(noted)}", stacklevel=2)
    return result


def _outcomes(
    pool: Executor, tasks: Iterable[tuple[Path, int]], ahead: int, retries: int, every: float
) -> Iterator[Outcome]:
    """Of every task, when it is done for good; ``ahead`` tasks are given to the pool at a time."""
    waiting = deque((place, 1) for place in tasks)
    pending: dict[Future[Outcome], tuple[tuple[Path, int], int]] = {}
    try:
        while waiting or pending:
            while waiting and len(pending) < ahead:
                place, attempt = waiting.popleft()
                try:
                    pending[pool.submit(execute, *place, every)] = place, attempt
                except Exception as error:  # a pool that is broken stays so
                    yield Outcome(
                        *place, "failed", f"the executor takes no task: {_words(error)}", attempt - 1
                    )
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                place, attempt = pending.pop(future)
                try:
                    yield replace(future.result(), attempts=attempt)
                except Exception as error:
                    if attempt <= retries:
                        waiting.append((place, attempt + 1))
                    else:
                        yield Outcome(*place, "failed", _words(error), attempt)
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def _executor(given: Any, jobs: int) -> Iterator[Executor]:
    """What tasks are given to; own processes do not outlive an error."""
    if given is not None:
        # A dask client has a face of this kind; equal tasks must not be taken for done, they are to be retried.
        yield given.get_executor(pure=False) if hasattr(given, "get_executor") else given
    elif jobs <= 1:
        with _Here() as here:
            yield here
    else:
        processes = Processes(jobs)
        try:
            yield processes
        except BaseException:
            processes.stop()
            raise
        processes.shutdown()


class _Here(Executor):
    """Does tasks when they are given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
