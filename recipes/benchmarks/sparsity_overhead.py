"""What SparsityRegularization adds to a training step: ResNet-20, batches of 128 images, all fits in turns.

    python recipes/benchmarks/sparsity_overhead.py --data DIR

The penalty concerns all 20 weights, the scales of the BatchNorm layers, or the outputs of the 20 layers, at every step.
Steps are timed as ``turns.py`` says. Without ``--data`` images are random.

Measured with images of CIFAR-10 (seed 0), one thread on a shared two-core x86-64 machine that was busy with other work
(a plain step takes 0.55 s when it is not); the ratios are of neighbouring steps. 65 steps, ``--only`` one fit beside
the plain one, a run for each. torch 2.15.0, lightning 2.6.6:

    training step         median ms  ratio to plain  lower quartile  upper quartile
    --------------------  ---------  --------------  --------------  --------------
    group_lasso               1,164           1.003          0.9745           1.044
    activation_l1               907           1.067           1.027           1.163
    activation_l2             907.2           1.051          0.9787           1.113
    activation_l1_l2          979.8           1.044          0.9973           1.126

All fits in one run of 45 steps: 0.92 to 0.98 for penalties on weights, 1.01 to 1.06 for those on outputs; among so many
fits the plain one, first in every turn, is a little slower. The gradients of all weights take 1.4 ms (l2) to 2.5 ms
(hoyer, l1_l2_intra), 6 to 9 ms for scad, and those of the BatchNorm scales 0.2 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import turns
from lightning.pytorch import Callback

from lightning_compress.callbacks.sparsity import SparsityRegularization

STRENGTH = 1e-5


def ours(kind: str, **options: Any) -> Callable[[], list[Callback]]:
    return lambda: [SparsityRegularization(kind, STRENGTH, **options)]


FITS: dict[str, Callable[[], list[Callback]]] = {
    "plain": lambda: [],
    "l1": ours("l1"),
    "l2": ours("l2"),
    "group_lasso": ours("group_lasso"),
    "group_lasso, proximal": ours("group_lasso", proximal=True),
    "l1_l2_intra": ours("l1_l2_intra"),
    "l1_l2_inter": ours("l1_l2_inter"),
    "hoyer": ours("hoyer"),
    "scad": ours("scad", lam=0.01),
    "growing": ours("growing"),
    "l1 of BatchNorm scales": ours("l1", on="batchnorm_scale"),
    "activation_l1": ours("activation_l1"),
    "activation_l2": ours("activation_l2"),
    "activation_l1_l2": ours("activation_l1_l2"),
}


def main(argv: list[str] | None = None) -> None:
    turns.compare_resnet20(__doc__, FITS, argv)


if __name__ == "__main__":
    main()
