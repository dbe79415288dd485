"""What ``analyze`` returns: the rows, the models behind them, and what more can be asked of them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from lightning_compress.analysis import write
from lightning_compress.analysis.limits import ber_text
from lightning_compress.analysis.outcome import Outcome
from lightning_compress.analysis.report import report_text
from lightning_compress.analysis.rows import Row
from lightning_compress.analysis.workshop import Workshop
from lightning_compress.container import replacing
from lightning_compress.metrics import OutputErrorRate, Task
from lightning_compress.pipelines.keys import unknown
from lightning_compress.stats import Calibration
from lightning_compress.stats.running import call, device_of, evaluating, first_tensor, move

Measure = Callable[[nn.Module, Any], float]


@dataclass(frozen=True)
class Analysis(Outcome):
    """An ``Outcome`` with the models of its rows, which are kept in files.

    Args:
        workshop: what made the rows.
        keeper: a temporary folder that lives as long as the analysis; None if the folder was given.
    """

    workshop: Workshop = field(kw_only=True, repr=False, compare=False)
    keeper: tempfile.TemporaryDirectory[str] | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )

    def models(self, names: str | Iterable[str]) -> dict[str, nn.Module]:
        """The models of some rows, each read from its archive.

        Args:
            names: of rows.

        Returns:
            Name -> model in eval mode.

        Raises:
            ValueError: there is no such row, or it has no model.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        known = {row.name: row for row in self.rows}
        for name in wanted:
            if name not in known:
                raise ValueError(unknown(name, known, "no row"))
            if known[name].status != "ok":
                raise ValueError(f"{name} has no model: it {known[name].status} ({known[name].reason}).")
        return {name: self.workshop.load(name) for name in wanted}

    def evaluate_with_data(self, loader: Any, metric: Measure | Metric | None = None) -> Analysis:
        """Measure the original and the model of every row on real data.

        Args:
            loader: batches (inputs, targets).
            metric: function (model, loader) -> number; or a torchmetrics metric with ``update(outputs, targets)``.
                None: top-1 accuracy for classification, relative L2 error otherwise.

        Returns:
            The same analysis with ``metric`` and ``metric_change`` in its rows.

        Raises:
            ValueError: there is no loader, it has no targets, or the model cannot run.
        """
        if loader is None:
            raise ValueError("evaluate_with_data needs a loader of (inputs, targets): nothing is made up.")
        if self.workshop.judge is None:
            raise ValueError("weights alone cannot be evaluated: pass model= to analyze.")
        measure, name = _measure(metric, self.workshop.judge.task)
        original = measure(self.workshop.model, loader)

        def filled(row: Row) -> Row:
            if row.status != "ok":
                return row
            value = measure(self.workshop.load(row.name), loader)
            return replace(row, metric=value, metric_change=value - original)

        about = replace(self.about, metric=original, metric_name=name)
        return replace(self, about=about, rows=tuple(map(filled, self.rows)))

    def with_bit_errors(
        self,
        rates: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2),
        kind: str = "random",
        names: Sequence[str] | None = None,
    ) -> Analysis:
        """Output error rates over rates of flipped bits, for one row of each way to store weights.

        Args:
            rates: shares of flipped bits.
            kind: as ``metrics.inject_bit_errors`` takes it.
            names: of rows; None: the original, and of each kind of code the row of largest ratio with an error up to
                10 %.

        Returns:
            The same analysis with ``bit_errors``.

        Raises:
            ValueError: an unknown row or kind, a rate that it cannot have, or a model that cannot run.
        """
        from lightning_compress.analysis.flips import bit_error_curve

        return replace(self, bit_errors=bit_error_curve(self, rates, kind, names))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows as CSV.

        Args:
            path: the file.
        """
        with replacing(Path(path)) as file:
            file.write(write.csv_text(self).encode())

    def report_text(self) -> str:
        """Everything that was measured, as text."""
        return report_text(self)

    def ber_text(self) -> str:
        """What each limit on the output error allows, as text."""
        return ber_text(self)

    def __str__(self) -> str:
        return self.table()


def write_report(
    analysis: Analysis,
    output_dir: str | os.PathLike[str] = "compression_results",
    *,
    models: str = "all",
    ber: bool = True,
) -> tuple[Path, ...]:
    """Write all files of a report: texts, JSON, CSV, figures, a page, and the archives of the rows.

    Args:
        analysis: what ``analyze`` returned.
        output_dir: where to; nothing is written outside.
        models: archives of "all" rows, of the "pareto" front, or "none". Where the analysis itself keeps its
            archives in this folder, they stay.
        ber: whether the text and the figure of errors against ratios are among the files.

    Returns:
        The files.

    Raises:
        OSError: the folder cannot be written into.
        ValueError: ``models`` is none of the three.

    Examples:
        >>> import os, tempfile
        >>> from lightning_compress.analysis import analyze, write_report
        >>> found = analyze(nn.Linear(20, 4), example_input=torch.zeros(1, 20), techniques="pruned_nm", samples=50)
        >>> folder = tempfile.mkdtemp()
        >>> _ = write_report(found, folder, models="none")
        >>> sorted(name for name in os.listdir(folder) if name.startswith("results"))
        ['results.csv', 'results.json']
    """
    return write.write(analysis, analysis.workshop.folder, output_dir, models, ber=ber)


def _measure(metric: Measure | Metric | None, task: Task) -> tuple[Measure, str]:
    """The function that measures, and its name."""
    if metric is None:
        usual = {"classification": (_accuracy, "accuracy"), "regression": (_relative_l2, "relative L2 error")}
        return usual[task]
    name = getattr(metric, "__name__", type(metric).__name__)
    return (partial(_over, metric) if isinstance(metric, Metric) else metric), name


def _accuracy(model: nn.Module, loader: Any) -> float:
    """Share of the inputs, or positions, whose class of highest score is the label."""
    right = total = 0
    for y, target in _answers(model, loader):
        hits = y.argmax(1) == target
        right, total = right + int(hits.sum()), total + hits.numel()
    return right / total


def _relative_l2(model: nn.Module, loader: Any) -> float:
    """Mean over inputs of ``||f(x) - y|| / ||y||``, over all axes but the first."""
    rate = OutputErrorRate("regression")
    for y, target in _answers(model, loader):
        rate.update(target.cpu(), y.cpu())
    return float(rate.compute())


def _over(metric: Metric, model: nn.Module, loader: Any) -> float:
    fresh = metric.clone().to(device_of(model))
    fresh.reset()
    for y, target in _answers(model, loader):
        fresh.update(y, target)
    return float(fresh.compute())


def _answers(model: nn.Module, loader: Any) -> Iterator[tuple[Tensor, Any]]:
    """Outputs and targets of all batches, on the model's device."""
    for inputs, target in Calibration(data=loader, samples=sys.maxsize).pairs(model):
        if target is None:
            raise ValueError("the loader has batches without targets: give (inputs, targets).")
        with evaluating(model):
            y = first_tensor(call(model, inputs))
        if y is None:
            raise ValueError(f"{type(model).__name__} returns no tensor.")
        yield y, move(target, y.device)
