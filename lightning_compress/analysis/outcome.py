"""What an analysis found: its rows, the trade-off among them, and the facts about the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_compress.analysis.rows import Row


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

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; NaN becomes null."""
        raise NotImplementedError  # K5
