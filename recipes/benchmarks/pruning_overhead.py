"""What ScheduledPruning adds to a training step: ResNet-20, batches of 64 images, a plain and a pruned fit in turns.

    python recipes/benchmarks/pruning_overhead.py

Two Trainers run in one process, each in a thread of its own, and hand over to each other after every step: only one
works at a time, and each pruned step stands between two plain ones that it is compared with. A step is timed from
one batch to the next: loop, forward, backward, optimizer and callbacks, mask updates included.

Measured with the defaults (sparsity 0.9, an update every 50 steps, seed 0), one thread on a shared two-core x86-64
machine, torch 2.15.0, lightning 2.6.6:

    training step     median ms  mean ms
    ----------------  ---------  -------
    plain                 277.1    278.1
    ScheduledPruning      278.9    282.3

    paired ratios of 193 steps: median 1.005, quartiles 0.951 and 1.059
    ratio of total times, mask updates included: 1.015
"""

from __future__ import annotations

import argparse
import copy
import threading
import time
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.models import resnet20
from lightning_compress.tables import text


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet20()

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


def fit(
    module: Classifier, data: TensorDataset, timer: StepTimer, pruned: bool, options: argparse.Namespace
) -> None:
    torch.set_num_threads(options.threads)
    pruning = lc.ScheduledPruning(sparsity=options.sparsity, every=options.every)
    trainer = Trainer(
        max_steps=options.steps,
        callbacks=[pruning, timer] if pruned else [timer],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, DataLoader(data, batch_size=options.batch_size))
    finally:
        timer.turns.hand_over(timer.me, leave=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each fit")
    parser.add_argument("--warmup", type=int, default=5, help="first steps, which do not count")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--every", type=int, default=50, help="optimizer steps between mask updates")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.steps < options.warmup + 3:
        parser.error("--steps must be at least --warmup + 3")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    seed_everything(options.seed, verbose=False)
    images = torch.randn(8 * options.batch_size, 3, 32, 32)
    data = TensorDataset(images, torch.randint(10, (len(images),)))
    module, turns = Classifier(), Turns(2)
    timers = [StepTimer(turns, me) for me in range(2)]
    threads = [
        threading.Thread(target=fit, args=(copy.deepcopy(module), data, timer, pruned, options))
        for pruned, timer in zip((False, True), timers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain, pruned = (np.array(timer.times)[options.warmup :] for timer in timers)
    # Turn by turn: plain 0, pruned 0, plain 1, ... so pruned i has plain i before it and plain i + 1 after it.
    ratios = pruned[:-1] / ((plain[:-1] + plain[1:]) / 2)
    print(
        text(
            ["training step", "median ms", "mean ms"],
            [
                ["plain", float(np.median(plain)), float(np.mean(plain))],
                ["ScheduledPruning", float(np.median(pruned)), float(np.mean(pruned))],
            ],
        )
    )
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    print(f"\npaired ratios of {len(ratios)} steps: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}")
    print(f"ratio of total times, mask updates included: {pruned.sum() / plain.sum():.3f}")


if __name__ == "__main__":
    main()
