"""What LowRankRegularization adds to a training step: ResNet-20, batches of 128 images, all fits in turns.

    python recipes/benchmarks/lowrank_overhead.py --data DIR

The penalty concerns all 20 weight matrices at every step. Compared with it is the same penalty as a term of the loss,
which autograd differentiates through ``torch.linalg.svdvals``. Steps are timed as ``turns.py`` says. Without ``--data``
images are random.

Measured with the defaults and images of CIFAR-10 (seed 0), one thread on a shared two-core x86-64 machine that was busy
with other work, so that milliseconds are twice those of a quiet one; the ratios are of neighbouring steps.
torch 2.15.0, lightning 2.6.6:

    training step         median ms  ratio to plain  lower quartile  upper quartile
    --------------------  ---------  --------------  --------------  --------------
    plain                     925.2               1               1               1
    nuclear                   944.6           1.027          0.9345           1.086
    nuclear, every=4          957.2           1.003          0.9502           1.077
    nuclear, proximal           990           1.025          0.9463            1.11
    entropy                   957.4           1.029          0.9559           1.108
    hoyer                     943.5           1.047          0.9455            1.11
    truncate                    911           1.022          0.9497           1.135
    nuclear, in the loss        993           1.037          0.9892           1.119

The penalty itself takes 11 ms. For larger layers the decomposition that autograd needs takes several times as long as
the Gram matrices: 2.0 ms against 0.9 for 64 x 576, 725 against 142 for 512 x 4608.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import turns
from lightning.pytorch import Callback
from torch import nn

from lightning_compress.callbacks.regularization import LowRankRegularization

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
    turns.compare_resnet20(__doc__, FITS, argv)


if __name__ == "__main__":
    main()
