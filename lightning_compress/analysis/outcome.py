"""What an analysis found: its rows, the trade-off among them, and the facts about the run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress import tables
from lightning_compress.analysis.rows import Row, plain
from lightning_compress.container import replacing
from lightning_compress.functional.tradeoff import Knee, best_under, knee_point, pareto_front

_COLUMNS = ("compression_ratio", "file_bytes", "sparsity", "bits_mean", "weight_sqnr_db", "ber", "ber_se")


@dataclass(frozen=True)
class About:
    """The facts about an analysis that are no row.

    Args:
        model: name of its class.
        params: real numbers of all parameters of the original.
        dense_bytes: of the original as float32.
        file_bytes: of the original's own archive.
        macs: of the original for one input; NaN without an input.
        task: "classification" or "regression", or "" without a model.
        task_reason: why.
        inputs: where the inputs came from.
        n_samples: how many.
        thresholds: output error rates for which the best row is named.
        metric: of the original on test data; NaN without.
        metric_name: such as "accuracy"; "" without.
        seed: of everything.
        versions: of the packages.
        machine: in words: processor, threads, device.
        notes: sentences about the run, such as what was assumed.
    """

    model: str
    params: int
    dense_bytes: int
    file_bytes: int
    macs: float
    task: str
    task_reason: str
    inputs: str
    n_samples: int
    thresholds: tuple[float, ...]
    metric: float = float("nan")
    metric_name: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Rows and facts: all that texts, figures and pages are made from.

    Args:
        about: the run.
        rows: in the order of the sweep; ``pareto`` and ``knee`` are filled in.
        bit_errors: format of the stored codes -> (rate of flipped bits, output error rate) pairs.
    """

    about: About
    rows: tuple[Row, ...]
    bit_errors: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)

    @property
    def combined(self) -> tuple[Row, ...]:
        """Pipelines of several techniques."""
        return tuple(row for row in self.rows if row.group == "combined")

    @property
    def pareto(self) -> tuple[Row, ...]:
        """Rows that none beats in both ratio and output error, by rising ratio."""
        front = (row for row in self.rows if row.pareto)
        return tuple(sorted(front, key=lambda row: row.compression_ratio))

    @property
    def knee(self) -> Row | None:
        """The knee of the front; where it has none (``has_knee``) its row of lowest error; None without a front."""
        return knee_row(self.rows)

    @property
    def has_knee(self) -> bool:
        """Whether the front bends."""
        return _knee(self.rows).found

    def best(self, threshold: float) -> Row | None:
        """The row of largest ratio with at most some output error rate.

        Args:
            threshold: largest error allowed.

        Returns:
            The row, of equal ratios that of the smaller error; None if no row keeps the limit.
        """
        return best_row(self.rows, threshold)

    def resolves(self, threshold: float) -> bool:
        """Whether a threshold is not below what so few inputs can tell apart.

        Args:
            threshold: of the output error rate.

        Returns:
            False for a classification with ``threshold < 1 / n_samples``.
        """
        n = self.about.n_samples
        return self.about.task != "classification" or (n > 0 and threshold >= 1 / n)

    def table(self) -> str:
        """The rows as text, smallest files last."""
        body = [
            [row.name, *(getattr(row, name) for name in _COLUMNS), _mark(row)]
            for row in sorted(self.rows, key=lambda row: -row.file_bytes)
        ]
        return tables.text(["name", *_COLUMNS, ""], body)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Everything as JSON values; what is unknown is null.

        Args:
            path: file to write it to as well.

        Returns:
            The values.
        """
        knee = self.knee
        best = {f"{t:g}": self.best(t) for t in self.about.thresholds}
        found: dict[str, Any] = plain(
            {
                "about": {f.name: getattr(self.about, f.name) for f in dataclasses.fields(self.about)},
                "rows": [row.to_json() for row in self.rows],
                "pareto": [row.name for row in self.pareto],
                "knee": {"name": None if knee is None else knee.name, "found": self.has_knee},
                "best": {t: None if row is None else row.name for t, row in best.items()},
                "below_resolution": [t for t in self.about.thresholds if not self.resolves(t)],
                "bit_errors": self.bit_errors,
            }
        )
        if path is not None:
            text = json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
            with replacing(Path(path)) as file:
                file.write(text.encode())
        return found


def marked(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows with ``pareto`` and ``knee`` filled in.

    Args:
        rows: of one analysis.

    Returns:
        The same rows; failed ones and those without an error are never on the front.

    Examples:
        >>> from lightning_compress.analysis.outcome import marked
        >>> rows = [Row("a", "pruning", file_bytes=8, dense_bytes=16, ber=0.1), Row("b", "pruning", file_bytes=8)]
        >>> [row.pareto for row in marked(rows)]
        [True, False]
    """
    front, knee = set(pareto_front(*_points(rows))), _knee(rows)
    return tuple(
        dataclasses.replace(row, pareto=i in front, knee=knee.found and i == knee.position)
        for i, row in enumerate(rows)
    )


def best_row(rows: Sequence[Row], threshold: float) -> Row | None:
    """The row of largest ratio with at most some output error rate.

    Args:
        rows: to choose from.
        threshold: largest error allowed.

    Returns:
        The row; None if none keeps the limit.
    """
    ratios, errors, names = _points(rows)
    position = best_under(ratios, errors, threshold, names)
    return None if position is None else rows[position]


def knee_row(rows: Sequence[Row]) -> Row | None:
    """The knee of the front of some rows, or its row of lowest error.

    Args:
        rows: to choose from.

    Returns:
        The row; None without a front.
    """
    position = _knee(rows).position
    return None if position is None else rows[position]


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float], list[str]]:
    """Ratios, errors and names; a row that did not work has no ratio."""
    ratios = [row.compression_ratio if row.status == "ok" else float("nan") for row in rows]
    return ratios, [row.ber for row in rows], [row.name for row in rows]


def _knee(rows: Sequence[Row]) -> Knee:
    return knee_point(*_points(rows))


def _mark(row: Row) -> str:
    if row.status != "ok":
        return row.status
    return "knee" if row.knee else "front" if row.pareto else ""
