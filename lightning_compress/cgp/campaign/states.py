"""Where runs stand: the state that a run goes on from, and the lock that keeps others away from it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.cgp.campaign.folders import Folder
from lightning_compress.cgp.campaign.statistics import write
from lightning_compress.cgp.campaign.texts import differences

HEARTBEAT = 600.0  # seconds; a run whose state is older is not running


class DamagedState(Exception):
    """A file of a state that cannot be understood."""


@dataclass(frozen=True)
class State:
    """Where a run stands.

    Args:
        rows: of the statistics belong to it.
        finished: there is nothing left to do.
        stopped: why it ended.
        generations: that took place.
        evolution: what the search goes on from; empty when finished.
    """

    rows: int
    finished: bool
    stopped: str
    generations: int
    evolution: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Folder, run: int) -> None:
        """Write it at once or not at all."""
        values = {"identity": folder.config.identity, **vars(self)}
        write(folder.state(run), json.dumps(values, separators=(",", ":")) + "\n")


def load(folder: Folder, run: int) -> State | None:
    """The state of a run.

    Args:
        folder: where it is.
        run: its number.

    Returns:
        The state; None if the run has not begun.

    Raises:
        DamagedState: the file cannot be understood.
        ValueError: the run was begun with another configuration; lists the differences.
    """
    path = folder.state(run)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        identity, state = values.pop("identity"), State(**values)
        whole = (
            isinstance(identity, dict) and isinstance(state.rows, int) and isinstance(state.evolution, dict)
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedState(f"{path}: {type(error).__name__}: {error}") from error
    if not (whole and state.rows >= 0):
        raise DamagedState(f"{path}: values of other types than were written")
    other = differences(identity, json.loads(json.dumps(folder.config.identity)))
    if other:
        raise ValueError(
            f"{path}: the run was begun with another configuration: {'; '.join(other)}. Undo the change, or plan the "
            "experiment anew in another folder."
        )
    return state


def stands(folder: Folder, run: int) -> str:
    """How far a run is.

    Args:
        folder: where it is.
        run: its number.

    Returns:
        "finished", "running" (its state was written in the last ten minutes), "unfinished" or "missing".

    Raises:
        ValueError: it was begun with another configuration.
    """
    try:
        state = load(folder, run)
    except DamagedState:
        state = State(0, False, "", 0)
    if state is None:
        return "missing"
    if state.finished:
        return "finished"
    return "running" if time.time() - folder.state(run).stat().st_mtime < HEARTBEAT else "unfinished"


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether nobody else works under this lock; the system frees it when its process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        yield False
        return
    except OSError:  # a file system without locks
        pass
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
