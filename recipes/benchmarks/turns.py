"""Training fits timed in turns: one process, a thread for each, and a hand-over after every step.

Only one fit works at a time, and each of its steps stands between two steps of the first fit, that it is compared
with. A step is timed from one batch to the next: loop, forward, backward, optimizer and callbacks.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.models import resnet20
from lightning_compress.tables import text

sys.path.append(str(Path(__file__).resolve().parents[1]))
from cifar_resnet import normalize, read


class Classifier(LightningModule):
    """Cross-entropy and plain SGD around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class Turns:
    """Lets threads run one at a time, in a fixed order."""

    def __init__(self, members: int) -> None:
        self.order = list(range(members))
        self.changed = threading.Condition()

    def hand_over(self, me: int, leave: bool = False) -> None:
        """Let the next one run, and wait for the own turn unless leaving."""
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] == me)
            self.order = self.order[1:] + ([] if leave else [me])
            self.changed.notify_all()
            if not leave:
                self.changed.wait_for(lambda: self.order[0] == me)


class StepTimer(Callback):
    """Milliseconds of every step; waits for its turn between steps. Last in the list: it times the others too."""

    def __init__(self, turns: Turns, me: int) -> None:
        self.turns, self.me = turns, me
        self.start: float | None = None
        self.times: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.start is not None:
            self.times.append((time.perf_counter() - self.start) * 1e3)
        self.turns.hand_over(self.me)
        self.start = time.perf_counter()


def images(batch_size: int) -> TensorDataset:
    """Eight batches of noise with the shape of CIFAR."""
    x = torch.randn(8 * batch_size, 3, 32, 32)
    return TensorDataset(x, torch.randint(10, (len(x),)))


def step_times(
    fits: Mapping[str, tuple[nn.Module, list[Callback]]],
    data: TensorDataset,
    *,
    steps: int,
    warmup: int,
    batch_size: int,
    threads: int,
) -> dict[str, np.ndarray]:
    """Train every network in turns.

    Args:
        fits: name -> network and callbacks of its Trainer.
        data: images and labels.
        steps: optimizer steps of each fit.
        warmup: first steps, which do not count.
        batch_size: samples of a step.
        threads: of PyTorch's operators.

    Returns:
        Name -> milliseconds of every step.
    """
    loggers = [logging.getLogger(package) for package in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    turns = Turns(len(fits))
    timers = {name: StepTimer(turns, me) for me, name in enumerate(fits)}
    failed: list[BaseException] = []

    def fit(name: str) -> None:
        torch.set_num_threads(threads)
        net, callbacks = fits[name]
        try:
            trainer = Trainer(
                max_steps=steps,
                callbacks=[*callbacks, timers[name]],
                accelerator="auto",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(Classifier(net), DataLoader(data, batch_size=batch_size))
        except BaseException as error:
            failed.append(error)
        finally:
            turns.hand_over(timers[name].me, leave=True)

    workers = [threading.Thread(target=fit, args=(name,)) for name in fits]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    if failed:
        raise failed[0]
    return {name: np.array(timer.times)[warmup:] for name, timer in timers.items()}


def paired(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Every step of another fit / the mean of the two steps of the first fit before and after it."""
    return other[:-1] / ((first[:-1] + first[1:]) / 2)


def passes(
    calls: Mapping[str, Callable[[], object]],
    runs: int,
    *,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Milliseconds of calls that take turns: one of each, then again.

    Args:
        calls: name -> what is timed; the first is what the others are compared with, by ``paired``.
        runs: timed calls of each.
        warmup: first calls, which do not count.
        clock: seconds.

    Returns:
        Name -> milliseconds of every call.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + runs):
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return {name: np.array(ms[warmup:]) for name, ms in times.items()}


def options(description: str | None, steps: int, batch_size: int) -> argparse.ArgumentParser:
    """A parser with the options that every such benchmark has, and these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of each fit")
    parser.add_argument("--warmup", type=int, default=5, help="first steps, which do not count")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, checked; the seed is set and Lightning's advice for larger fits silenced."""
    given = parser.parse_args(argv)
    if given.steps < given.warmup + 3:
        parser.error("--steps must be at least --warmup + 3")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    seed_everything(given.seed, verbose=False)
    return given


def table(times: Mapping[str, np.ndarray]) -> str:
    """Median step of every fit, and quartiles of its ratio to neighbouring steps of the first."""
    plain, *_ = times.values()
    rows = []
    for name, ms in times.items():
        ratios = np.ones(1) if ms is plain else paired(plain, ms)
        rows.append([name, float(np.median(ms)), *(float(q) for q in np.percentile(ratios, [50, 25, 75]))])
    return text(["training step", "median ms", "ratio to plain", "lower quartile", "upper quartile"], rows)


def compare_resnet20(
    description: str | None, fits: Mapping[str, Callable[[], list[Callback]]], argv: list[str] | None
) -> None:
    """Print the table of ResNet-20 trained with other callbacks, for a benchmark that does nothing else.

    Args:
        description: the benchmark's docstring.
        fits: name -> function that makes the callbacks; the first, "plain", always runs.
        argv: command line; that of the process if None.
    """
    parser = options(description, steps=60, batch_size=128)
    parser.add_argument("--only", nargs="*", default=list(fits), choices=list(fits), help="besides plain")
    parser.add_argument("--data", help="folder of .npz packs, as recipes/cifar_resnet.py takes it")
    given = parse(parser, argv)
    data, net = images(given.batch_size), resnet20()
    if given.data:
        pictures, labels = read(given.data, True, 8 * given.batch_size)
        data = TensorDataset(normalize(pictures), labels)
    times = step_times(
        {name: (copy.deepcopy(net), fits[name]()) for name in fits if name in ("plain", *given.only)},
        data,
        steps=given.steps,
        warmup=given.warmup,
        batch_size=given.batch_size,
        threads=given.threads,
    )
    print(table(times))
