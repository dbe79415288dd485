"""What SparsityRegularization adds to a training step: ResNet-20, batches of 128 images, all fits in turns.

    python recipes/benchmarks/sparsity_overhead.py --data DIR

The penalty concerns all 20 weights, the scales of the BatchNorm layers, or the outputs of the 20 layers, at every step.
Steps are timed as ``turns.py`` says. Without ``--data`` images are random.
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
