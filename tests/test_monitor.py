"""What the monitor draws is what the weights are: event files and CSV files are read back and counted again."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from lit import Lit, loader, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

import lightning_compress as lc
from lightning_compress import plots
from lightning_compress.cost import Cost

LAYERS = ("net.0", "net.2")
WEIGHTS = 8 * 16 + 16 * 3
PARAMS = WEIGHTS + 16 + 3
PER_EPOCH = 8  # steps


class OwnPruning(pl.Callback):
    """A user's own pruning: after each epoch one more eighth of every weight is zero."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        share = (trainer.current_epoch + 1) / 8
        for weight in (pl_module.net[0].weight, pl_module.net[2].weight):
            with torch.no_grad():
                weight.view(-1)[: round(share * weight.numel())] = 0


def events(folder: str | Path) -> EventAccumulator:
    """Everything that a TensorBoard log holds."""
    return EventAccumulator(
        str(folder), dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    ).Reload()


def scalars(log: EventAccumulator, tag: str) -> dict[int, float]:
    """Step -> value; no step may have two points."""
    points = [(event.step, event.value) for event in log.Scalars(tag)]
    assert len(points) == len(dict(points)), tag
    return dict(points)


def duplicates(log: EventAccumulator) -> list[str]:
    """Tags of the library with two points at one step."""
    tags = log.Tags()
    read = {"scalars": log.Scalars, "histograms": log.Histograms, "images": log.Images}
    steps = {
        (kind, t): [e.step for e in read[kind](t)] for kind in read for t in tags[kind] if "compress" in t
    }
    assert steps
    return [tag for (_, tag), found in steps.items() if len(found) > len(set(found))]


def rows(folder: str) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def board(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, "")


def pruning(**options: Any) -> lc.ScheduledPruning:
    return lc.ScheduledPruning(**{"sparsity": 0.75, "begin": 0.1, "end": 0.7, "every": 1, **options})


def monitor(**options: Any) -> lc.CompressionMonitor:
    """Without figures, which take most of the time."""
    return lc.CompressionMonitor(**{"figures": False, **options})


# -- scalars -------------------------------------------------------------------------------------------------------


def test_scalars_equal_an_independent_count_of_the_users_own_pruning(board):
    module = Lit()
    module.example_input_array = torch.zeros(5, 8)
    fit = trainer(OwnPruning(), monitor(), max_epochs=4, logger=board)
    fit.fit(module, loader())
    log = events(board.log_dir)
    steps = [0, *(PER_EPOCH * (epoch + 1) - 1 for epoch in range(4)), 4 * PER_EPOCH]
    shares = [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 4 / 8]
    assert scalars(log, "compress/sparsity") == dict(zip(steps, shares, strict=True))
    assert scalars(log, "compress/sparsity/net.2") == dict(zip(steps, shares, strict=True))
    nonzero = [PARAMS - share * WEIGHTS for share in shares]
    assert scalars(log, "compress/nonzero") == dict(zip(steps, nonzero, strict=True))
    # A bitmap and the values that are left, or the dense weight where that is smaller.
    bits = [min(32, 1 + 32 * (1 - share)) for share in shares]
    assert scalars(log, "compress/weight_bits") == dict(zip(steps, bits, strict=True))
    assert set(scalars(log, "compress/params").values()) == {PARAMS}
    assert set(scalars(log, "compress/macs").values()) == {5 * WEIGHTS}


def test_epoch_points_lie_where_lightnings_own_do(board):
    trainer(OwnPruning(), monitor(), logger=board).fit(Lit(), loader(), loader())
    log = events(board.log_dir)
    assert [0, *scalars(log, "val_loss"), 2 * PER_EPOCH] == list(scalars(log, "compress/sparsity"))


def test_totals_always_layers_on_request(board):
    trainer(monitor(layers=False), logger=board).fit(Lit(), loader())
    tags = [t for t in events(board.log_dir).Tags()["scalars"] if t.startswith("compress/")]
    assert {t.removeprefix("compress/") for t in tags} == {
        *("sparsity", "params", "nonzero", "weight_bits", "file_bytes", "compression_ratio")
    }


def test_every_n_epochs(board):
    trainer(monitor(every_n_epochs=2), max_epochs=5, logger=board).fit(Lit(), loader())
    assert list(scalars(events(board.log_dir), "compress/params")) == [0, 15, 31, 40]


def test_the_last_point_sees_what_other_callbacks_do_when_training_ends(board):
    class Ending(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            nn.init.zeros_(pl_module.net[0].weight)

    trainer(monitor(), Ending(), logger=board).fit(Lit(), loader())
    points = scalars(events(board.log_dir), "compress/sparsity/net.0")
    assert points == {0: 0, 7: 0, 15: 0, 16: 1}


@pytest.mark.parametrize("limit", [1, 2, 8])
@pytest.mark.parametrize("order", [1, -1])
def test_no_tag_has_two_points_at_one_step(board, limit, order):
    callbacks = [pruning(), monitor(file_bytes="epoch")][::order]
    options = {"max_epochs": 3, "limit_train_batches": limit, "log_every_n_steps": 1, "logger": board}
    fit = trainer(*callbacks, **options)
    fit.fit(Lit(), loader())
    assert duplicates(events(board.log_dir)) == []


def test_a_second_fit_of_the_same_trainer_goes_on_in_the_same_curves(board):
    module = Lit()
    fit = trainer(OwnPruning(), monitor(), logger=board)
    fit.fit(module, loader())
    fit.fit_loop.max_epochs = 4
    fit.fit(module, loader())
    log = events(board.log_dir)
    assert duplicates(log) == []
    assert list(scalars(log, "compress/sparsity")) == [0, 7, 15, 16, 23, 31, 32]


def test_a_resumed_fit_starts_where_the_checkpoint_stands(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer(OwnPruning(), monitor(), save).fit(Lit(), loader())
    board = TensorBoardLogger(tmp_path, "")
    fit = trainer(OwnPruning(), monitor(), max_epochs=3, logger=board)
    fit.fit(Lit(), loader(), ckpt_path=save.last_model_path)
    assert scalars(events(board.log_dir), "compress/sparsity") == {16: 2 / 8, 23: 3 / 8, 24: 3 / 8}


def test_what_pruning_logs_itself_is_left_to_it(board):
    fit = trainer(pruning(exclude="net.2"), lc.CompressionMonitor(), log_every_n_steps=1, logger=board)
    fit.fit(Lit(), loader())
    log = events(board.log_dir)
    assert scalars(log, "compress/sparsity")[2 * PER_EPOCH] == 0.75  # of its targets, not of all weights
    tags = {t for t in log.Tags()["scalars"] if t.startswith("compress/sparsity/")}
    assert tags == {"compress/sparsity/net.0"}
    assert float(fit.callback_metrics["compress/sparsity"]) == 0.75


def test_totals_can_be_monitored():
    best = ModelCheckpoint(monitor="compress/nonzero", mode="min", filename="best")
    fit = trainer(OwnPruning(), monitor(), best, max_epochs=4)
    fit.fit(Lit(), loader())
    assert float(best.best_model_score) == PARAMS - WEIGHTS / 2
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert sum(int((w == 0).sum()) for w in weights.values()) == WEIGHTS / 2


def test_counts_are_exact_beyond_float32():
    """Loggers may round to float32; metrics and table do not."""
    module = Lit()
    fit = trainer(monitor(quantities={"big": lambda _: 2**24 + 1}))
    fit.fit(module, loader())
    assert fit.callback_metrics["compress/params"].dtype == torch.int64
    assert fit.callback_metrics["compress/params"] == PARAMS


# -- file_bytes ----------------------------------------------------------------------------------------------------


def test_file_bytes_is_the_length_of_an_archive(board, tmp_path):
    module = Lit()
    fit = trainer(pruning(), monitor(), logger=board)
    fit.fit(module, loader())
    length = lc.save(module, tmp_path / "model.lcz").file_bytes
    assert length == (tmp_path / "model.lcz").stat().st_size
    log = events(board.log_dir)
    assert scalars(log, "compress/file_bytes") == {2 * PER_EPOCH: length}
    assert scalars(log, "compress/compression_ratio")[2 * PER_EPOCH] == pytest.approx(4 * PARAMS / length)
    assert fit.callback_metrics["compress/file_bytes"] == length
    stored = {t.name: t.stored_bytes for t in lc.inspect(tmp_path / "model.lcz").tensors}
    for layer in LAYERS:
        expected = stored[f"{layer}.weight"] + stored[f"{layer}.bias"]
        assert scalars(log, f"compress/file_bytes/{layer}") == {2 * PER_EPOCH: expected}


def test_file_bytes_of_every_epoch_falls_as_zeros_are_added(board):
    module = Lit(nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 3)))
    trainer(OwnPruning(), monitor(file_bytes="epoch"), max_epochs=4, logger=board).fit(module, loader())
    points = scalars(events(board.log_dir), "compress/file_bytes")
    assert list(points) == [7, 15, 23, 31, 32]
    assert sorted(points.values(), reverse=True) == list(points.values())
    assert len(set(points.values())) >= 4


def test_file_bytes_never(board, monkeypatch):
    monkeypatch.setattr("lightning_compress.archive.save", None)
    fit = trainer(monitor(file_bytes="never"), logger=board)
    fit.fit(Lit(), loader())
    assert not [t for t in events(board.log_dir).Tags()["scalars"] if "file_bytes" in t or "ratio" in t]
    assert "compress/file_bytes" not in fit.callback_metrics


def test_an_archive_that_cannot_be_written_does_not_end_the_program():
    class Odd(Lit):
        def __init__(self):
            super().__init__()
            self.register_buffer("bits", torch.zeros(2).to_sparse())

    with pytest.warns(UserWarning, match="goes on without file_bytes"):
        trainer(lc.CompressionMonitor(), max_epochs=1).fit(Odd(), loader())


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    trainer(monitor(file_bytes="epoch")).fit(Lit(), loader())
    assert list(temporary.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["temporary"]


# -- TensorBoard's other pages -------------------------------------------------------------------------------------


def test_histograms_hold_the_weights_that_are_not_zero(board):
    module = Lit()
    trainer(OwnPruning(), monitor(), max_epochs=4, logger=board).fit(module, loader())
    log = events(board.log_dir)
    assert set(log.Tags()["histograms"]) == {f"compress/weights/{layer}" for layer in LAYERS}
    drawn = [event.histogram_value for event in log.Histograms("compress/weights/net.0")]
    assert [h.num for h in drawn] == [128 * (1 - share / 8) for share in (0, 1, 2, 3, 4, 4)]
    assert drawn[-1].min == pytest.approx(module.net[0].weight.min().item())
    assert drawn[-1].max == pytest.approx(module.net[0].weight.max().item())


def test_weights_that_are_all_zero_or_not_finite_do_not_stop_a_fit(board):
    class Breaking(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            nn.init.zeros_(pl_module.net[0].weight)
            nn.init.constant_(pl_module.net[2].weight, math.nan)

    trainer(Breaking(), monitor(), logger=board).fit(Lit(), loader())
    log = events(board.log_dir)
    assert [e.step for e in log.Histograms("compress/weights/net.0")] == [0, 7, 15]
    assert scalars(log, "compress/sparsity/net.2")[16] == 0


def test_figures_of_the_start_and_the_end(board):
    trainer(lc.CompressionMonitor(), logger=board).fit(Lit(), loader())
    images = events(board.log_dir).Images("compress/layers")
    assert [i.step for i in images] == [0, 16]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")
    assert images[0].width == 1000


def test_without_matplotlib_a_warning_and_everything_else(board, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"without its figure.*lightning-compress\[tensorboard\]"):
        trainer(lc.CompressionMonitor(), logger=board).fit(Lit(), loader())
    tags = events(board.log_dir).Tags()
    assert tags["images"] == []
    assert "compress/params" in tags["scalars"]


def test_pages_can_be_left_out(board):
    trainer(lc.CompressionMonitor(histograms=False, figures=False), logger=board).fit(Lit(), loader())
    tags = events(board.log_dir).Tags()
    assert tags["images"] == [] and tags["histograms"] == []


def test_summary_table_on_the_text_page_and_in_the_console(board, capsys, caplog):
    module = Lit()
    with caplog.at_level("INFO"):
        trainer(OwnPruning(), monitor(), logger=board).fit(module, loader())
    page = events(board.log_dir).Tensors("compress/summary/text_summary")
    assert [p.step for p in page] == [16]
    text = page[0].tensor_proto.string_val[0].decode()
    assert f"| params | {PARAMS} | {PARAMS} |" in text
    assert f"| nonzero | {PARAMS} | {PARAMS - WEIGHTS // 4} |" in text
    assert "| sparsity | 0 | 0.25 |" in text
    assert f"| net.0 | Linear | {8 * 16 + 16} | {8 * 16 * 3 // 4 + 16} | 0.25 | 25 |" in text
    printed = "".join(caplog.messages) + "".join(capsys.readouterr())
    assert "net.2  Linear" in printed and "compression_ratio" in printed


def test_table_shows_what_is_no_weight_in_one_row(board):
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    trainer(monitor(), logger=board).fit(Lit(net), loader())
    text = (
        events(board.log_dir).Tensors("compress/summary/text_summary")[0].tensor_proto.string_val[0].decode()
    )
    assert "| other layers |  | 32 |" in text
    assert "BatchNorm1d" not in text


def test_custom_scalars_select_what_they_name(board):
    trainer(pruning(), monitor(), logger=board, log_every_n_steps=1).fit(Lit(), loader())
    log = events(board.log_dir)
    (event,) = log.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["compression"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    tags = log.Tags()["scalars"]

    def selected(title: str) -> set[str]:
        return {tag for tag in tags for pattern in charts[title] if re.match(pattern, tag)}

    assert selected("sparsity") == {"compress/sparsity", "compress/target_sparsity"}
    assert selected("sparsity of each layer") == {f"compress/sparsity/{layer}" for layer in LAYERS}
    assert selected("non-zero of all parameters") == {"compress/params", "compress/nonzero"}
    assert all(selected(title) for title in charts)


class HparamsLit(Lit):
    def __init__(self, width: int = 16, note: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def hparams(log: EventAccumulator) -> tuple[dict[str, Any], set[str]]:
    """Values and metric tags of the first records, those that TensorBoard keeps."""
    content = log.PluginTagToContent("hparams")
    first = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    values = {}
    for name, value in first.session_start_info.hparams.items():
        values[name] = getattr(value, value.WhichOneof("kind"))
    experiment = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    return values, {info.name.tag for info in experiment.metric_infos}


@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_52_hparams_show_the_settings_beside_a_live_metric(tmp_path, default_hp_metric):
    board = TensorBoardLogger(tmp_path, "", default_hp_metric=default_hp_metric)
    module = HparamsLit(note={"deep": [1, 2]})
    trainer(pruning(), monitor(), logger=board, log_every_n_steps=1).fit(module, loader())
    log = events(board.log_dir)
    values, tags = hparams(log)
    assert values["width"] == 16
    assert values["note/deep"] == "[1, 2]"
    assert values["compress/ScheduledPruning/sparsity"] == 0.75
    assert values["compress/ScheduledPruning/criterion"] == "magnitude"
    assert not [name for name in values if "CompressionMonitor" in name]
    assert {"compress/sparsity", "compress/file_bytes", "compress/compression_ratio"} <= tags
    assert tags <= set(log.Tags()["scalars"])  # TensorBoard shows the last value of each
    assert list(scalars(log, "compress/sparsity").values())[-1] == 0.75
    assert "compress/ScheduledPruning/sparsity: 0.75" in (Path(board.log_dir) / "hparams.yaml").read_text()
    assert duplicates(log) == []


def test_hparams_the_user_does_not_want_logged_stay_private(board):
    class Private(Lit):
        def __init__(self, secret: str = "x") -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    trainer(pruning(), monitor(), logger=board).fit(Private(), loader())
    assert "secret" not in hparams(events(board.log_dir))[0]


# -- other loggers, no logger --------------------------------------------------------------------------------------


def test_csv_columns(tmp_path):
    log = CSVLogger(tmp_path)
    trainer(OwnPruning(), monitor(), logger=log, log_every_n_steps=1).fit(Lit(), loader(), loader())
    found = rows(log.log_dir)
    expected = {"sparsity", "params", "nonzero", "weight_bits", "file_bytes", "compression_ratio"}
    expected |= {f"{k}/{n}" for k in ("sparsity", "nonzero", "weight_bits", "file_bytes") for n in LAYERS}
    assert {k.removeprefix("compress/") for k in found[0] if k.startswith("compress/")} == expected
    curve = {int(r["step"]): float(r["compress/sparsity"]) for r in found if r["compress/sparsity"]}
    assert curve == {0: 0, 7: 1 / 8, 15: 2 / 8, 16: 2 / 8}


def test_csv_hparams_hold_the_settings(tmp_path):
    log = CSVLogger(tmp_path)
    trainer(pruning(), monitor(), logger=log).fit(HparamsLit(), loader())
    text = (Path(log.log_dir) / "hparams.yaml").read_text()
    assert "compress/ScheduledPruning/sparsity: 0.75" in text and "width: 16" in text


def test_several_loggers_get_the_same(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "a"), CSVLogger(tmp_path, "b"), TensorBoardLogger(tmp_path, "c")]
    trainer(OwnPruning(), lc.CompressionMonitor(), logger=loggers).fit(Lit(), loader())
    first, third = events(loggers[0].log_dir), events(loggers[2].log_dir)
    assert first.Tags() == third.Tags()
    assert scalars(first, "compress/nonzero") == scalars(third, "compress/nonzero")
    found = {int(r["step"]): float(r["compress/nonzero"]) for r in rows(loggers[1].log_dir)}
    assert found == scalars(first, "compress/nonzero")


def test_without_a_logger_the_metrics_are_still_there():
    fit = trainer(OwnPruning(), monitor(), logger=False)
    fit.fit(Lit(), loader())
    assert float(fit.callback_metrics["compress/sparsity"]) == 0.25


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"max_epochs": 0}, {"limit_train_batches": 0}])
def test_fits_that_hardly_train(board, options):
    trainer(pruning(), monitor(), **{"logger": board, **options}).fit(Lit(), loader())


def test_barebones_stays_bare(recwarn):
    options = {"barebones": True, "enable_checkpointing": None, "enable_progress_bar": None}
    fit = trainer(monitor(), **options, enable_model_summary=None, logger=None)
    fit.fit(Lit(), loader())
    assert not [m for m in fit.callback_metrics if m.startswith("compress/")]
    assert not [w for w in recwarn if "compress" in str(w.message)]


class Witness(DummyLogger):
    """Leaves a file for each process that logs to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        (self.folder / f"logged by {torch.distributed.get_rank()}").touch()


@pytest.mark.alone
def test_two_processes_log_once_and_agree(tmp_path, monkeypatch):
    def save(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / f"written by {torch.distributed.get_rank()}").touch()
        return original(*args, **kwargs)

    original = lc.save
    monkeypatch.setattr("lightning_compress.archive.save", save)
    board = TensorBoardLogger(tmp_path / "board", "", version=0)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    loggers = [board, Witness(tmp_path)]
    fit = trainer(OwnPruning(), monitor(file_bytes="epoch"), logger=loggers, strategy=strategy, devices=2)
    fit.fit(Lit(), loader())
    log = events(board.log_dir)
    assert duplicates(log) == []
    assert scalars(log, "compress/sparsity") == {0: 0, 3: 1 / 8, 7: 2 / 8, 8: 2 / 8}
    assert list(scalars(log, "compress/file_bytes")) == [3, 7, 8]
    assert {p.name for p in tmp_path.glob("* by *")} == {"logged by 0", "written by 0"}


# -- it only watches -----------------------------------------------------------------------------------------------


def fitted(*callbacks: pl.Callback) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))
    module = Lit(net)
    module.example_input_array = torch.randn(3, 8)
    torch.manual_seed(7)
    trainer(*callbacks).fit(module, loader())
    return module.state_dict(), torch.rand(1)


def test_training_is_the_same_with_and_without():
    plain, draw = fitted()
    watched, other = fitted(lc.CompressionMonitor(file_bytes="epoch", quantities={"norm": output_norm}))
    assert torch.equal(draw, other)
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[k], watched[k]) for k in plain)


def output_norm(module: nn.Module) -> float:
    assert not module.training and not torch.is_grad_enabled()
    return float(module(module.example_input_array).norm())


def test_quantities_of_ones_own(board):
    module, original = Lit(), Lit()
    x = torch.randn(64, 8)

    def output_error_rate(net: nn.Module) -> float:
        assert not net.training and not torch.is_grad_enabled()
        return float(lc.metrics.output_error_rate(original(x), net(x)))

    quantities = {"output_error_rate": output_error_rate, "unknown": lambda _: math.nan}
    fit = trainer(monitor(quantities=quantities), logger=board)
    fit.fit(module, loader())
    log = events(board.log_dir)
    points = scalars(log, "compress/output_error_rate")
    assert list(points) == [0, 7, 15, 16] and points[0] == 0
    changed = (original(x).argmax(1) != module(x).argmax(1)).float().mean()
    assert points[16] == pytest.approx(float(changed)) and changed > 0
    assert "compress/unknown" not in log.Tags()["scalars"]
    assert "compress/output_error_rate" in hparams(log)[1]


def test_codes_of_a_compressed_model_are_counted(board):
    module = Lit()
    lc.compress(module, [lc.Prune(0.75)], inplace=True)
    trainer(monitor(), max_epochs=0, logger=board).fit(module, loader())
    assert scalars(events(board.log_dir), "compress/weight_bits") == {0: 1 + 32 / 4}


def test_codes_that_no_longer_fit_are_not_counted(board):
    module = Lit()
    lc.compress(module, [lc.Prune(0.75)], inplace=True)
    for weight in (module.net[0].weight, module.net[2].weight):
        nn.init.ones_(weight)
    trainer(monitor(), max_epochs=0, logger=board).fit(module, loader())
    assert scalars(events(board.log_dir), "compress/weight_bits") == {0: 32}


def test_bytes_of_a_layer_inside_a_layer_are_its_own(board, tmp_path):
    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 16)
            self.inner = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(super().forward(x))

    module = Lit(Outer())
    trainer(monitor(), max_epochs=0, logger=board).fit(module, loader())
    log = events(board.log_dir)
    stored = {t.name: t.stored_bytes for t in lc.save(module, tmp_path / "model.lcz").tensors}
    for layer in ("net", "net.inner"):
        expected = stored[f"{layer}.weight"] + stored[f"{layer}.bias"]
        assert scalars(log, f"compress/file_bytes/{layer}") == {0: expected}


def test_modules_without_weights_of_a_known_kind(board):
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.gain

    trainer(lc.CompressionMonitor(), logger=board).fit(Lit(Scale()), loader())
    log = events(board.log_dir)
    assert set(scalars(log, "compress/params").values()) == {8}
    assert "compress/sparsity" not in log.Tags()["scalars"]


def test_complex_weights_count_once_for_sparsity_and_twice_for_params(board):
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, dtype=torch.cfloat))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(torch.cfloat) @ self.weight).real

    lc.register(Spectral, (1, 0))
    module = Lit(Spectral())
    with torch.no_grad():
        module.net.weight[:2] = 0
    trainer(monitor(), max_epochs=0, logger=board).fit(module, loader())
    log = events(board.log_dir)
    assert scalars(log, "compress/sparsity") == {0: 0.25}
    assert scalars(log, "compress/params") == {0: 48}
    assert scalars(log, "compress/weight_bits") == {0: 1 + 64 * 0.75}
    assert log.Histograms("compress/weights/net")[0].histogram_value.num == 36


def test_copies_hold_options_only():
    monitor = lc.CompressionMonitor(every_n_epochs=3)
    trainer(monitor).fit(Lit(), loader())
    for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert twin.every_n_epochs == 3 and twin.file_bytes == "end"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, r"every_n_epochs=0: allowed is >= 1"),
        ({"file_bytes": "step"}, r"file_bytes='step' is unknown; allowed: end, epoch, never"),
        ({"quantities": {"macs": len}}, r"quantities holds macs, which the library logs itself"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        lc.CompressionMonitor(**options)


def test_two_monitors_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer(lc.CompressionMonitor(), lc.CompressionMonitor(every_n_epochs=2))


def test_53_configuration_from_yaml(tmp_path, capsys):
    given = {"file_bytes": "never", "quantities": {"size": "builtins.len"}}
    callback = {"class_path": "lightning_compress.CompressionMonitor", "init_args": given}
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps({"trainer": {"callbacks": [callback], "accelerator": "cpu", "logger": False}})
    )
    with pytest.raises(SystemExit):
        LightningCLI(
            Lit, run=False, seed_everything_default=False, args=["--config", str(config), "--print_config"]
        )
    config.write_text(capsys.readouterr().out)  # what is printed can be read again
    args = ["--config", str(config)]
    cli = LightningCLI(Lit, run=False, seed_everything_default=False, args=args, save_config_callback=None)
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, lc.CompressionMonitor))
    assert found.file_bytes == "never" and found.quantities == {"size": len}


# -- figures -------------------------------------------------------------------------------------------------------


def resnet_cost() -> Cost:
    return lc.cost(lc.compress(lc.models.resnet20(), [lc.Prune(0.9)]).model)


def test_bars_are_the_counts():
    counted = resnet_cost()
    left, right = plots.layers(counted)
    assert [bar.get_width() for bar in left.patches] == [layer.sparsity for layer in counted.layers]
    assert left.yaxis_inverted() and right.yaxis_inverted()  # the first layer on top
    dense, stored = right.containers
    assert [bar.get_width() for bar in dense] == [4 * layer.params for layer in counted.layers]
    assert [bar.get_width() for bar in stored] == [layer.bits / 8 for layer in counted.layers]
    assert [t.get_text() for t in left.get_yticklabels()] == [layer.name for layer in counted.layers]


@pytest.mark.parametrize("model", [lc.models.resnet20, lc.models.LeNet5, lambda: nn.Linear(2, 2)])
def test_every_label_is_inside_the_figure_and_apart_from_its_neighbours(model):
    left, right = plots.layers(lc.cost(lc.compress(model(), [lc.Prune(0.5)]).model))
    figure = left.figure
    figure.draw_without_rendering()
    frame = figure.bbox.padded(1)
    names = [t for t in left.get_yticklabels() if t.get_text()]
    written = [
        *names,
        *left.texts,
        *right.texts,
        left.xaxis.label,
        right.xaxis.label,
        *right.get_legend().texts,
    ]
    for label in written:
        box = label.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, label
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1, label
    ticks = [[t for t in ax.get_xticklabels() if t.get_text()] for ax in (left, right)]
    for group in (names, left.texts, right.texts, *ticks):
        boxes = [t.get_window_extent() for t in group]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_figures_draw_on_given_axes_and_leave_pyplot_alone():
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert plots.layer_sparsity(resnet_cost(), ax) is ax
    assert plots.layer_bytes(resnet_cost()).figure is not ax.figure
    assert plt.get_fignums() == []


def test_figures_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-compress\[tensorboard\]'"):
        plots.layer_sparsity(resnet_cost())


def test_nothing_to_draw_is_an_empty_figure():
    left, right = plots.layers(lc.cost(nn.ReLU()))
    left.figure.draw_without_rendering()
    assert len(left.patches) == len(right.patches) == 0
