"""What ScheduledPruning adds to a training step: ResNet-20, batches of 64 images, a plain and a pruned fit in turns.

    python recipes/benchmarks/pruning_overhead.py

Steps are timed as ``turns.py`` says, mask updates included.

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

import copy

import numpy as np
import turns

import lightning_compress as lc
from lightning_compress.models import resnet20
from lightning_compress.tables import text


def main(argv: list[str] | None = None) -> None:
    parser = turns.options(__doc__, steps=200, batch_size=64)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--every", type=int, default=50, help="optimizer steps between mask updates")
    options = turns.parse(parser, argv)
    data, net = turns.images(options.batch_size), resnet20()
    pruning = lc.ScheduledPruning(sparsity=options.sparsity, every=options.every)
    times = turns.step_times(
        {"plain": (copy.deepcopy(net), []), "ScheduledPruning": (net, [pruning])},
        data,
        steps=options.steps,
        warmup=options.warmup,
        batch_size=options.batch_size,
        threads=options.threads,
    )
    rows = [[name, float(np.median(ms)), float(np.mean(ms))] for name, ms in times.items()]
    print(text(["training step", "median ms", "mean ms"], rows))
    plain, pruned = times.values()
    ratios = turns.paired(plain, pruned)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    print(f"\npaired ratios of {len(ratios)} steps: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}")
    print(f"ratio of total times, mask updates included: {pruned.sum() / plain.sum():.3f}")


if __name__ == "__main__":
    main()
