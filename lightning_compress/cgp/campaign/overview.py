"""``status``: how far a campaign is, and how the rest of it is run."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from lightning_compress import tables
from lightning_compress.cgp.campaign.folders import CONFIG, Config, Folder, find
from lightning_compress.cgp.campaign.states import stands

COMMAND = "lightning-compress evolve campaign run"


@dataclass(frozen=True)
class Progress:
    """How far the runs of a folder are.

    Args:
        folder: of an experiment or a batch.
        experiment: its name.
        batch: number of the batch, or None.
        finished: numbers of runs.
        running: their states were written in the last ten minutes.
        unfinished: they began and do not run.
        missing: they never began.
        planned: whether the folder is there; if not, plan the experiment again.
    """

    folder: Path
    experiment: str
    batch: int | None
    finished: tuple[int, ...]
    running: tuple[int, ...]
    unfinished: tuple[int, ...]
    missing: tuple[int, ...]
    planned: bool = True

    @property
    def rest(self) -> bool:
        """Whether runs are left that nobody works on."""
        return bool(self.unfinished or self.missing)


@dataclass(frozen=True)
class Status:
    """How far a campaign is; ``print`` shows a table.

    Args:
        folders: one after the other.
    """

    folders: tuple[Progress, ...]

    @property
    def finished(self) -> bool:
        """Whether all runs are."""
        return not any(f.rest or f.running for f in self.folders)

    @property
    def command(self) -> str:
        """Runs the rest, from where it stands; empty if there is none, or no folder of it."""
        rest = [shlex.quote(str(f.folder)) for f in self.folders if f.rest and f.planned]
        return f"{COMMAND} {' '.join(rest)}" if rest else ""

    def __str__(self) -> str:
        header = ("folder", "finished", "running", "unfinished", "missing")
        rows = [
            (f.folder.name, len(f.finished), *map(spelled, (f.running, f.unfinished, f.missing)))
            for f in self.folders
        ]
        lost = ", ".join(f.folder.name for f in self.folders if not f.planned)
        ends = [f"No folder, plan again: {lost}"] * bool(lost) + [f"The rest: {self.command}"] * bool(
            self.command
        )
        return "\n".join([tables.text(header, rows), *ends])


def status(folder: str | os.PathLike[str]) -> Status:
    """How far the runs of a campaign are; reads only.

    A run is running if its state was written in the last ten minutes; one that was killed shows so until they are over.

    Args:
        folder: of a campaign, an experiment or a batch.

    Returns:
        Of every experiment and batch, the numbers of the runs; batches whose folders are lost are among them.

    Raises:
        FileNotFoundError: nothing was planned there.
        ValueError: a run was begun with another configuration than that of its folder.
    """
    found = find(folder)
    lost = absent(found) if (found[0].path != Path(folder)) else []
    folders = sorted([*found, *lost], key=lambda f: (f.config.experiment, f.config.first))
    return Status(tuple(_progress(f) for f in folders))


def absent(found: list[Folder]) -> list[Folder]:
    """Batches whose folders are not there.

    Args:
        found: folders of one campaign.

    Returns:
        What is missing of the experiments that have batches among them.
    """
    there = {folder.path.name for folder in found}
    expected: dict[str, Folder] = {}
    for folder in found:
        config = folder.config
        for batch in range(config.batches if config.batch is not None else 0):
            part: Config = config.part(batch)
            expected[part.folder] = Folder(folder.path.parent / part.folder, part)
    return [folder for name, folder in expected.items() if name not in there]


def spelled(runs: tuple[int, ...]) -> str:
    """Numbers of runs in few words.

    Args:
        runs: rising.

    Returns:
        Text; empty if there are none.

    Examples:
        >>> from lightning_compress.cgp.campaign.overview import spelled
        >>> spelled((0, 1, 2, 5, 7, 8))
        '0-2, 5, 7-8'
    """
    stretches: list[list[int]] = []
    for number in runs:
        if stretches and stretches[-1][-1] == number - 1:
            stretches[-1][1:] = [number]
        else:
            stretches.append([number])
    return ", ".join("-".join(map(str, stretch)) for stretch in stretches)


def _progress(folder: Folder) -> Progress:
    runs: dict[str, list[int]] = {"finished": [], "running": [], "unfinished": [], "missing": []}
    for number in folder.config.numbers:
        runs[stands(folder, number)].append(number)
    config, planned = folder.config, (folder.path / CONFIG).exists()
    numbers = {name: tuple(found) for name, found in runs.items()}
    return Progress(folder.path, config.experiment, config.batch, **numbers, planned=planned)
