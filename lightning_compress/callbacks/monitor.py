"""Watch what compression does to a model in training: scalars for every logger, pages for TensorBoard."""

from __future__ import annotations

import inspect
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_compress import archive, plots, tables
from lightning_compress.callbacks.base import CompressionCallback, callbacks_of, logged_step
from lightning_compress.callbacks.measured import QUANTITIES, Measured
from lightning_compress.cost import cost
from lightning_compress.finalize import StandIn, finalize
from lightning_compress.stats.running import evaluating
from lightning_compress.targets import find
from lightning_compress.transform import Transform

When = Literal["end", "epoch", "never"]
_PER_LAYER = ("sparsity", "nonzero", "weight_bits", "file_bytes")  # params and macs: see the table
# What TensorBoard's custom-scalar page draws together: title -> regular expressions of tags.
_CHARTS = {
    "sparsity": [r"compress/sparsity$", r"compress/target_sparsity$"],
    "sparsity of each layer": [r"compress/sparsity/.*"],
    "non-zero of all parameters": [r"compress/params$", r"compress/nonzero$"],
    "counted bits of a weight": [r"compress/weight_bits$"],
}


class CompressionMonitor(CompressionCallback):
    r"""Log how sparse, large and costly the model is, whoever compresses it, a callback or your own code.

    At the start of ``fit``, after every ``every_n_epochs`` epochs and at the end, every logger gets
    ``compress/<quantity>`` and, with ``layers``, ``compress/<quantity>/<layer>`` of the layers with weights:

    - ``sparsity``: zeros / entries of the weights that methods work on (``lightning_compress.find``)
    - ``params``, ``nonzero``: real numbers, and entries other than 0, of all parameters
    - ``macs``: multiply-adds for ``example_input_array`` (the whole batch); left out if the module has none
    - ``weight_bits``: counted bits per entry of those weights: of its code, otherwise the smaller of the
      dense weight and a bitmap with the non-zero values
    - ``file_bytes``: length of an archive that was really written (and thrown away); ``compression_ratio``:
      dense float32 bytes / ``file_bytes``

    A quantity that another callback logs itself (``ScheduledPruning``: sparsity) is left to it. Totals are
    also in ``trainer.callback_metrics``. TensorBoard gets besides: histograms of the non-zero weights, a
    figure and a table of the layers, a custom-scalar page, and on its HPARAMS page the options of the
    compression callbacks beside the last totals. Nothing runs per step.

    Args:
        every_n_epochs: epochs between two measurements, >= 1.
        layers: log the layers too, not only the totals (``params`` and ``macs`` of a layer are in the table).
        histograms: TensorBoard histograms ``compress/weights/<layer>``.
        figures: TensorBoard figure ``compress/layers``, at the start and at the end; needs matplotlib.
        file_bytes: when an archive is written: at the "end", also at every measured "epoch", or "never".
        quantities: further ones: name -> function of the module (run in eval mode, without gradients) that
            returns a number, such as the output error rate against the original model; NaN is not logged.

    Raises:
        ValueError: an option outside its range, or a quantity whose name is taken.

    Examples:
        >>> CompressionMonitor(every_n_epochs=5, file_bytes="never").every_n_epochs
        5
    """

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        layers: bool = True,
        histograms: bool = True,
        figures: bool = True,
        file_bytes: When = "end",
        quantities: Mapping[str, Callable[[nn.Module], float]] | None = None,
    ) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs}: allowed is >= 1.")
        if file_bytes not in get_args(When):
            raise ValueError(f"file_bytes={file_bytes!r} is unknown; allowed: {', '.join(get_args(When))}.")
        taken = {*QUANTITIES, "compression_ratio", "target_sparsity"} & set(quantities or ())
        if taken:
            names = ", ".join(sorted(taken))
            raise ValueError(f"quantities holds {names}, which the library logs itself: choose another name.")
        self.every_n_epochs, self.layers, self.histograms = every_n_epochs, layers, histograms
        self.figures, self.file_bytes, self.quantities = figures, file_bytes, dict(quantities or {})
        self._start: dict[str, float] = {}  # totals at the start of this fit
        self._steps: dict[str, int] = {}  # tag -> step of its last point

    # -- when ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hyperparameters and page layout; before Lightning's own, for TensorBoard keeps the first record."""
        self._start = {}
        if logged_step(trainer) == 0:  # not the second fit of this trainer
            self._steps = {}
        if trainer.barebones or not trainer.is_global_zero:
            return
        others = [c for c in _callbacks(trainer) if c is not self]
        options = _flat({"compress": {type(c).__name__: _options(c) for c in others}})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                charts = {title: ["Multiline", tags] for title, tags in _CHARTS.items()}
                logger.experiment.add_custom_scalars({"compression": charts})
                logger.log_hyperparams(options, {})  # into hparams.yaml; without metrics it writes no record
                _write_hparams(logger, _hparams(trainer) | options, self._final_tags(pl_module))
            else:
                logger.log_hyperparams(options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first point: the model as it comes, or as it was resumed."""
        if not trainer.barebones:
            measured = self._measure(trainer, pl_module)
            self._start = measured.totals
            self._log(trainer, measured, logged_step(trainer))
            self._draw(trainer, measured, logged_step(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A point every ``every_n_epochs`` epochs; totals also as metrics that callbacks can monitor."""
        if trainer.barebones or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        measured = self._measure(trainer, pl_module)
        if self.file_bytes == "epoch":
            info = _archived(pl_module) if trainer.is_global_zero else None
            measured.add_file(trainer.strategy.broadcast(info, src=0))  # type: ignore[arg-type]
        pl_module.log_dict(_totals(trainer, measured), logger=False, sync_dist=True)
        # One less: there Lightning draws what belongs to an epoch.
        self._log(trainer, measured, logged_step(trainer) - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last point, the length of the archive, and the table."""
        if trainer.barebones:
            return
        measured = self._measure(trainer, pl_module)
        if self.file_bytes != "never" and trainer.is_global_zero:
            try:
                measured.add_file(_archived(pl_module))
            except (
                archive.ArchiveError,
                OSError,
            ) as error:  # raising would end a program whose training succeeded
                rank_zero_warn(f"CompressionMonitor goes on without file_bytes: {error}")
        metrics = trainer.callback_metrics
        metrics.update({tag: torch.tensor(v) for tag, v in _totals(trainer, measured).items()})
        step = logged_step(trainer)
        self._log(trainer, measured, step)
        self._draw(trainer, measured, step)
        logged = {
            tag.removeprefix("compress/"): v for tag, v in metrics.items() if tag.startswith("compress/")
        }
        ends = measured.totals | {k: float(v) for k, v in logged.items() if k not in measured.totals}
        totals = [[name, self._start.get(name), value] for name, value in ends.items()]
        rank_zero_info("\n\n" + measured.summary(totals, tables.text))
        for writer in _tensorboards(trainer):
            writer.add_text("compress/summary", measured.summary(totals, tables.markdown), step)

    # -- what ----------------------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> Measured:
        """Count; every rank does, and gets the same."""
        example, plugin = pl_module.example_input_array, trainer.precision_plugin
        module = _deployed(pl_module)
        with plugin.forward_context():
            counted = cost(module, None if example is None else plugin.convert_input(example))
            with evaluating(pl_module):
                more = {name: float(function(pl_module)) for name, function in self.quantities.items()}
        return Measured(counted, find(module), more)

    def _log(self, trainer: Trainer, measured: Measured, step: int) -> None:
        """Send one measurement to the loggers; no tag gets two points at one step."""
        if not trainer.is_global_zero:
            return
        values, theirs = _totals(trainer, measured), _logged_by_others(trainer)
        if self.layers:
            for layer, counts in measured.layers.items():
                values |= {
                    f"compress/{k}/{layer}": counts[k] for k in _PER_LAYER if k in counts.keys() - theirs
                }
        due = {tag: v for tag, v in values.items() if not math.isnan(v) and self._steps.get(tag) != step}
        self._steps |= dict.fromkeys(due, step)
        for logger in trainer.loggers:
            logger.log_metrics(due, step=step)
        if self.histograms and self._steps.get("weights") != step:
            self._steps["weights"] = step
            for layer, weights in measured.nonzero_weights().items():
                for writer in _tensorboards(trainer):
                    writer.add_histogram(f"compress/weights/{layer}", weights, step)

    def _draw(self, trainer: Trainer, measured: Measured, step: int) -> None:
        """The figure, only when training starts and ends: it takes as long as everything else together."""
        if not self.figures or self._steps.get("figure") == step:
            return
        self._steps["figure"] = step
        try:
            for writer in _tensorboards(trainer):
                writer.add_figure("compress/layers", plots.layers(measured.cost)[0].figure, step)
        except ImportError as error:
            rank_zero_warn(f"CompressionMonitor goes on without its figure: {error}")

    def _final_tags(self, pl_module: LightningModule) -> list[str]:
        """Tags of the totals that the HPARAMS page shows."""
        names = ["sparsity", "nonzero", "params", "weight_bits", *self.quantities]
        names += ["macs"] if pl_module.example_input_array is not None else []
        names += ["file_bytes", "compression_ratio"] if self.file_bytes != "never" else []
        return [f"compress/{name}" for name in names]


def _deployed(pl_module: LightningModule) -> nn.Module:
    """What would be used after training: while layers stand in for others, a copy with the plain ones."""
    waits = any(isinstance(module, StandIn) for module in pl_module.modules())
    return finalize(pl_module) if waits else pl_module


def _archived(pl_module: LightningModule) -> archive.ArchiveInfo:
    """Write an archive of the module as it would be used, and throw it away."""
    with tempfile.TemporaryDirectory() as folder:
        return archive.save(_deployed(pl_module), Path(folder) / "model.lcz", verify=False)


def _callbacks(trainer: Trainer) -> list[CompressionCallback]:
    """The library's callbacks in a trainer."""
    return [c for c in callbacks_of(trainer) if isinstance(c, CompressionCallback)]


def _logged_by_others(trainer: Trainer) -> set[str]:
    """Quantities that other callbacks send to the loggers themselves."""
    return {quantity for callback in _callbacks(trainer) for quantity in callback.logged}


def _totals(trainer: Trainer, measured: Measured) -> dict[str, float]:
    """Tag -> value of the totals that are known and not left to other callbacks."""
    theirs = _logged_by_others(trainer)
    return {f"compress/{k}": v for k, v in measured.totals.items() if k not in theirs and not math.isnan(v)}


def _tensorboards(trainer: Trainer) -> Iterator[Any]:
    """The writer of every TensorBoard logger, on rank zero."""
    if trainer.is_global_zero:
        yield from (log.experiment for log in trainer.loggers if isinstance(log, TensorBoardLogger))


def _options(callback: CompressionCallback) -> dict[str, Any]:
    """The options a callback was made with, those of its transform included."""
    names = inspect.signature(type(callback)).parameters
    options = {name: vars(callback)[name] for name in names if name in vars(callback)}
    if isinstance(options.get("transform"), Transform):
        options |= options.pop("transform").config()
    return options


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested mappings with joined names; no empty values; what is no number by its name or as text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float):
            flat[f"{prefix}{key}"] = value
        elif value is not None and not (isinstance(value, list | tuple) and not value):
            flat[f"{prefix}{key}"] = str(getattr(value, "__qualname__", value))
    return flat


def _hparams(trainer: Trainer) -> dict[str, bool | int | float | str]:
    """The hyperparameters that Lightning is about to log."""
    found: dict[str, Any] = {}
    holders: list[Any] = [trainer.lightning_module, getattr(trainer, "datamodule", None)]
    for holder in holders:
        if getattr(holder, "_log_hyperparams", False):
            found |= holder.hparams_initial
    return _flat({name: value for name, value in found.items() if name != "_class_path"})


def _write_hparams(logger: TensorBoardLogger, params: Mapping[str, Any], tags: list[str]) -> None:
    """The HPARAMS record; ``logger.log_hyperparams`` would add a point at step 0, true or not, to a tag."""
    writer = logger.experiment
    library: Any = sys.modules[type(writer).__module__]  # of torch.utils.tensorboard or tensorboardX
    for record in library.hparams(dict(params), dict.fromkeys(tags, 0.0)):
        writer._get_file_writer().add_summary(record)
