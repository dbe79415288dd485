"""What LowRankRegularization adds to a training step: ResNet-20, batches of 128 images, all fits in turns.

    python recipes/benchmarks/lowrank_overhead.py --data DIR

The penalty concerns all 20 weight matrices at every step. Compared with it is the same penalty as a term of the loss,
which autograd differentiates through ``torch.linalg.svdvals``. Steps are timed as ``turns.py`` says. Without ``--data``
images are random.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import turns
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import TensorDataset

from lightning_compress.callbacks.regularization import LowRankRegularization
from lightning_compress.models import resnet20

sys.path.append(str(Path(__file__).resolve().parents[1]))
from cifar_resnet import normalize, read

STRENGTH = 1e-4


class LossTerm(Callback):
    """The nuclear norms of all weight matrices, differentiated by autograd."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        with torch.enable_grad():
            norms = [torch.linalg.svdvals(p.flatten(1)).sum() for p in pl_module.parameters() if p.dim() > 1]
            (STRENGTH * sum(norms)).backward()


def ours(kind: str = "nuclear", **options: Any) -> Callable[[], list[Callback]]:
    return lambda: [LowRankRegularization(kind, STRENGTH, **options)]


FITS: dict[str, Callable[[], list[Callback]]] = {
    "plain": lambda: [],
    "nuclear": ours(),
    "nuclear, every=4": ours(every=4),
    "nuclear, proximal": ours(proximal=True),
    "entropy": ours("entropy"),
    "hoyer": ours("hoyer"),
    "truncate": ours("truncate", energy_ratio=0.99),
    "nuclear, in the loss": lambda: [LossTerm()],
}


def main(argv: list[str] | None = None) -> None:
    parser = turns.options(__doc__, steps=60, batch_size=128)
    parser.add_argument("--only", nargs="*", default=list(FITS), choices=list(FITS), help="besides plain")
    parser.add_argument("--data", help="folder of .npz packs, as recipes/cifar_resnet.py takes it")
    options = turns.parse(parser, argv)
    data, net = turns.images(options.batch_size), resnet20()
    if options.data:
        images, labels = read(options.data, True, 8 * options.batch_size)
        data = TensorDataset(normalize(images), labels)
    times = turns.step_times(
        {name: (copy.deepcopy(net), FITS[name]()) for name in FITS if name in ("plain", *options.only)},
        data,
        steps=options.steps,
        warmup=options.warmup,
        batch_size=options.batch_size,
        threads=options.threads,
    )
    print(turns.table(times))


if __name__ == "__main__":
    main()
