"""What has been evaluated, one JSON line each, so that a killed search or analysis goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_compress.search.space import Genome

Values = tuple[float, ...]


class Lines:
    """A file of JSON lines: the first says what they are about, the others are appended one by one.

    A line that was cut off when the process died is dropped. Without a path nothing is kept.

    Args:
        path: the file; made if it does not exist.
        about: what the lines are about, JSON values.
        what: word for it, for errors.

    Raises:
        ValueError: the file is about something else (names what differs), or no such file.

    Examples:
        >>> import tempfile
        >>> from lightning_compress.search.journal import Lines
        >>> path = tempfile.mkdtemp() + "/rows.jsonl"
        >>> Lines(path, {"seed": 0}).append({"name": "a"})
        >>> Lines(path, {"seed": 0}).rows
        [{'name': 'a'}]
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, about: Mapping[str, Any], what: str = "search"
    ) -> None:
        self.path, self.what = None if path is None else Path(path), what
        self.rows: list[dict[str, Any]] = []
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ValueError(f"the folder {self.path.parent} of {self.path} does not exist: make it first.")
        first = json.dumps(about, sort_keys=True)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole, _, _ = text.rpartition(b"\n")
        lines = whole.decode("utf-8", "replace").split("\n") if whole else []
        if not lines:
            self.path.write_text(first + "\n", encoding="utf-8")
            return
        self._compare(lines[0], json.loads(first))
        for number, line in enumerate(lines[1:], 2):
            try:
                self.rows.append(dict(json.loads(line)))
                self.read(self.rows[-1])
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{self.path}: line {number} is no evaluation: {line:.60}") from None
        if len(whole) + 1 < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole) + 1)

    def read(self, row: Mapping[str, Any]) -> None:
        """Take in a line that was found; raises ValueError, TypeError or KeyError for one that is not right.

        Args:
            row: its values.
        """

    def append(self, row: Mapping[str, Any]) -> None:
        """Keep a line; on return it is on disk.

        Args:
            row: JSON values.
        """
        self.rows.append(dict(row))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _compare(self, line: str, about: Mapping[str, Any]) -> None:
        try:
            old = json.loads(line)
        except ValueError:
            old = None
        article = "an" if self.what.startswith("a") else "a"
        if not isinstance(old, dict):
            raise ValueError(f"{self.path} is no file of {article} {self.what}: give another name.")
        other = [key for key in sorted({*old, *about}) if old.get(key) != about.get(key)]
        if other:
            raise ValueError(
                f"{self.path} is of {article} {self.what} with another {', '.join(other)}: give another name, or "
                "the same options."
            )


class Journal(Lines):
    """The evaluations of a search: where it begins, then genomes and values.

    Args:
        path: the file; made if it does not exist.
        about: what the search is about, JSON values.

    Raises:
        ValueError: the file is of another search (names what differs), or no such file.

    Examples:
        >>> import tempfile
        >>> from lightning_compress.search.journal import Journal
        >>> path = tempfile.mkdtemp() + "/search.jsonl"
        >>> Journal(path, {"seed": 0}).add((1.0, 2.0), (0.5,))
        >>> Journal(path, {"seed": 0}).known
        {(1.0, 2.0): (0.5,)}
    """

    def __init__(self, path: str | os.PathLike[str] | None, about: Mapping[str, Any]) -> None:
        self.known: dict[Genome, Values] = {}
        self.start: list[Genome] | None = None
        super().__init__(path, about)

    def read(self, row: Mapping[str, Any]) -> None:
        """Take in an evaluation, or the start.

        Args:
            row: values of a line.
        """
        if "start" in row:
            self.start = [tuple(map(float, genome)) for genome in row["start"]]
        else:
            self.known[tuple(map(float, row["genome"]))] = tuple(map(float, row["values"]))

    def add(self, genome: Genome, values: Values) -> None:
        """Keep an evaluation; on return it is on disk.

        Args:
            genome: numbers of all genes.
            values: of all objectives.
        """
        self.known[genome] = values
        self.append({"genome": genome, "values": values})

    def begin(self, start: list[Genome]) -> None:
        """Keep the genomes that the search begins with.

        Args:
            start: the genomes.
        """
        self.start = start
        self.append({"start": start})
