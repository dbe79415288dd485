"""Folders of experiments: which file is where, the configuration, and the experiment read back from it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_compress.cgp.campaign.texts import differences, rebuild, settings_of
from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.search.settings import Settings
from lightning_compress.energy import EnergyTable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
CONFIG, TRAIN, PROBLEM, GATES = "config.json", "train.data", "problem.json", "gate_parameters.csv"
METRICS = "model_metrics"
FORMATS = ("csv", "csv.zip")
LOGGED = ("threshold", "all")


@dataclass(frozen=True)
class Config:
    """What an experiment is and which of its runs are in a folder.

    Args:
        experiment: name.
        batch: which part of the runs, 0 to batches - 1; None: all are here.
        batches: how many parts there are.
        first: number of the first run here.
        runs: how many are here.
        log_error: rows with at most this error carry their chromosome; "threshold": the error that is good enough,
            and the last row; "all": every row.
        statistics: "csv" or "csv.zip".
        settings: of the search, as ``Settings.config`` gives them.
        sha256: of the other files.

    Raises:
        ValueError: an option out of its range.
    """

    experiment: str
    batch: int | None
    batches: int
    first: int
    runs: int
    log_error: float | str
    statistics: str
    settings: Mapping[str, Any]
    sha256: Mapping[str, str]

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.experiment):
            raise ValueError(
                f"experiment {self.experiment!r}: a name is letters, digits, '_', '-' and '.', a letter or digit first."
            )
        if self.statistics not in FORMATS:
            raise ValueError(f"statistics={self.statistics!r} is unknown; allowed: {', '.join(FORMATS)}.")
        if not (self.log_error in LOGGED if isinstance(self.log_error, str) else self.log_error >= 0):
            raise ValueError(
                f"log_error={self.log_error!r}: allowed is a number >= 0, {' or '.join(map(repr, LOGGED))}."
            )

    @property
    def folder(self) -> str:
        """Name of the folder."""
        return self.experiment if self.batch is None else f"{self.experiment}_batch_{self.batch}"

    @property
    def numbers(self) -> range:
        """The runs that are here."""
        return range(self.first, self.first + self.runs)

    @property
    def identity(self) -> dict[str, Any]:
        """What the result of a run depends on."""
        kept = ("experiment", "log_error", "settings", "sha256")
        return {name: value for name, value in asdict(self).items() if name in kept}

    def part(self, batch: int) -> Config:
        """The configuration of one of the parts."""
        runs = self.whole().runs // self.batches
        return replace(self, batch=batch, first=batch * runs, runs=runs)

    def whole(self) -> Config:
        """The configuration with all runs in one folder."""
        total = self.runs if self.batch is None else self.runs * self.batches
        return replace(self, batch=None, batches=1, first=0, runs=total)

    def to_json(self) -> str:
        """The file."""
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class Folder:
    """A folder of an experiment, or of a batch of its runs.

    Args:
        path: where it is.
        config: what is in it.
    """

    path: Path
    config: Config

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Folder:
        """A folder that was planned.

        Args:
            path: where it is.

        Returns:
            The folder.

        Raises:
            FileNotFoundError: nothing was planned there.
            ValueError: its configuration cannot be read.
        """
        file = Path(path) / CONFIG
        if not file.exists():
            raise FileNotFoundError(f"{path} is no folder of an experiment: it has no {CONFIG}. Plan first.")
        try:
            return cls(Path(path), Config(**json.loads(file.read_text(encoding="utf-8"))))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error

    @cached_property
    def experiment(self) -> Experiment:
        """The experiment, with all of its runs; ValueError if its files are not those that were planned."""
        changed = [
            name
            for name, planned in self.config.sha256.items()
            if not (self.path / name).exists() or digest((self.path / name).read_bytes()) != planned
        ]
        if changed:
            raise ValueError(
                f"{self.path}: {', '.join(changed)} lacks or was changed after the plan; plan the experiment anew, in "
                "another folder."
            )
        train = (self.path / TRAIN).read_text(encoding="utf-8")
        problem, places = rebuild(train, json.loads((self.path / PROBLEM).read_text(encoding="utf-8")))
        settings = settings_of(self.config.settings)
        other = differences(_costs(EnergyTable.from_csv(self.path / GATES)), _costs(settings.table))
        if other:
            raise ValueError(
                f"{self.path / GATES}: this version has other default costs: {'; '.join(other)}."
            )
        return Experiment(self.config.experiment, problem, settings, places, self.config.whole().runs)

    def statistics(self, run: int) -> Path:
        """Rows of a run, while it goes on; at its end they are zipped if the configuration says so."""
        return self.path / "train_statistics" / "fitness" / f"statistics.{run}.csv"

    def chromosome(self, run: int) -> Path:
        """Text of the best circuit of a run."""
        return self.path / "cgp_configs" / f"cgp.{run}.config"

    def weights(self, run: int) -> Path:
        """Weights that it gives, of every data set a line."""
        return self.path / "weights" / f"weights.{run}.txt"

    def front(self, run: int) -> Path:
        """Trade-offs that a run found."""
        return self.path / "front" / f"front.{run}.csv"

    def state(self, run: int) -> Path:
        """Where a run can go on from; the time of its last change is the heartbeat."""
        return self.path / f"state.{run}.json"

    def lock(self, run: int) -> Path:
        """Held by the process that works on a run."""
        return self.path / f".state.{run}.lock"

    @property
    def gate_statistics(self) -> Path:
        """How often the best circuits use each function."""
        return self.path / "gate_statistics.csv"


def read(folder: str | os.PathLike[str]) -> Experiment:
    """The experiment of a folder; no network is needed.

    Args:
        folder: of an experiment or of a batch of its runs.

    Returns:
        The experiment with all of its runs, also those that are in other batches.

    Raises:
        FileNotFoundError: nothing was planned there.
        ValueError: a file was changed after the plan.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from lightning_compress.cgp import Problem, Settings
        >>> from lightning_compress.cgp.campaign import plan, read
        >>> from lightning_compress.cgp.experiments import Experiment, Place
        >>> problem, grid = Problem.of([[3, 4]], [[7, 3, 9]]), Settings(rows=4, cols=4, patience=50)
        >>> tiny = Experiment("tiny", problem, grid, (Place("fc.weight", np.arange(3)),), runs=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = read(plan([tiny], folder)[0])
        >>> again.problem.wires[0].tolist(), again.runs, again.settings == grid
        ([2, 0, 3], 4, True)
    """
    return Folder.open(folder).experiment


def find(folder: str | os.PathLike[str]) -> list[Folder]:
    """The folders of experiments that are in a folder, or that folder itself.

    Args:
        folder: of a campaign, of an experiment or of a batch.

    Returns:
        Them, by name and batch.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(folder)
    files = [path / CONFIG] if (path / CONFIG).exists() else path.glob(f"*/{CONFIG}")
    found = [Folder.open(file.parent) for file in files]
    if not found:
        raise FileNotFoundError(f"{folder} has no folders of experiments. Plan first.")
    return sorted(found, key=lambda f: (f.config.experiment, f.config.first, f.path.name))


def _costs(table: EnergyTable) -> dict[str, list[Any]]:
    return {f"function {number}": rest for number, *rest in Settings(energy=table).config()["energy"]}


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
