"""MobileNetV2: circuits that compute the int8 weights of a convolution from its first 96; one layer, or all 52.

    python recipes/mobilenetv2_cgp.py --layer features.1.conv.1 features.18.0
    python recipes/mobilenetv2_cgp.py --all --jobs 2

Measured with random weights, per channel, ``--thresholds 1``, seed 0, one run each, one process: all 52 convolutions in
106 s, each with an RMS error of 0.90 to 1.00, 97 to 189 gates and 0.006 to 0.024 pJ. Reading 96 inputs
from SRAM is 120 pJ: a circuit from constants would cost less. Some layers, per tensor, ``--thresholds 0 1 5 11``:

    layer                weights   RMS error              gates             pJ                  best after s
    features.18.0        409,600   0  0.61  1.18  1.21    178 168 160 181   0.029  0.003 0 0    0  5 11 15
    features.9.conv.1.0    3,456   0  0.97  1.13  1.55    147 145 141 145   0.021  0.011 0 0    0  1  7  9
    features.1.conv.1        512   0  0.85  0.96  1.23    104  95  92  80   0.016  0.006 0 0    0  1  4  5
    features.1.conv.0.0      288   0  0.79  1.46  2.54     78  75  74  72   0.009  0.001 0 0    0  1  1  3

features.18.0, the largest, takes 5 s per channel at threshold 1; these 16 runs 74 s. Files: all 52 are 2,087,355
bytes as int8 and 2,057,001 with circuits, shorter since an error of 1 makes values equal; at threshold 0 they are
longer (354,109 to 353,400 bytes, the four layers above). Accuracies were not measured: random weights, and no ImageNet.

Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python 3.11, torch 2.15.0, torchvision 0.29.2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lenet5_cgp import computed, stored
from torch import nn

import lightning_compress as lc
from lightning_compress import cgp
from lightning_compress.cgp import campaign, presets
from lightning_compress.checkpoints import load_weights
from lightning_compress.energy import EnergyTable
from lightning_compress.tables import text

HEADER = [
    "layer",
    "weights",
    "threshold",
    "RMS error",
    "gates",
    "circuit pJ",
    "inputs pJ",
    "weights pJ",
    "best after s",
]
SIZES = ["threshold", "layers", "bytes as int8", "bytes as circuits"]


def network(options: argparse.Namespace) -> nn.Module:
    """MobileNetV2 with int8 weights."""
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    torch.manual_seed(options.seed)
    download = not (options.random or options.checkpoint)
    net = mobilenet_v2(weights=MobileNet_V2_Weights.DEFAULT if download else None)
    if options.checkpoint:
        load_weights(net, options.checkpoint)
    granularity = lc.PerTensor() if options.granularity == "per_tensor" else lc.PerChannel()
    return lc.compress(net.eval(), [lc.Quantize(8, granularity=granularity, calibrator="minmax")]).model


def best(folder: campaign.Folder) -> tuple[cgp.Circuit, dict[str, str]]:
    """The circuit of the best run that has finished, and its last row of statistics."""
    runs = [run for run in folder.config.numbers if folder.chromosome(run).exists()]
    if not runs:
        raise SystemExit(f"{folder.path}: no run has finished; start this again to go on.")
    rows = {run: campaign.read_rows(folder.statistics(run))[-1] for run in runs}
    limit = folder.experiment.settings.limit(folder.experiment.problem.weights)

    def rank(run: int) -> tuple[float, ...]:
        error, energy = int(rows[run]["error"]), int(rows[run]["quantized_energy"])
        return (0, energy, error) if error <= limit else (1, error, energy)

    run = min(runs, key=rank)
    return cgp.Circuit.from_text(folder.chromosome(run).read_text(encoding="utf-8")), rows[run]


def report(net: nn.Module, experiments: Sequence[cgp.Experiment], folder: Path) -> None:
    """What the best runs found, and the bytes of files with integers and with circuits."""
    rows: list[list[Any]] = []
    models: dict[float, tuple[nn.Module, set[str]]] = {}
    price = EnergyTable.default().sram_pj_per_byte
    for experiment in experiments:
        circuit, last = best(campaign.Folder.open(folder / experiment.name))
        key, threshold = experiment.places[0].key, experiment.settings.error_threshold
        loaded, weights = experiment.problem.loaded, experiment.problem.weights
        found = [
            experiment.problem.rms(circuit),
            int(last["gate_count"]),
            float(last["energy"]),
            loaded * price,
            weights * price,
        ]
        rows.append([key.removesuffix(".weight"), weights, threshold, *found, float(last["timestamp"])])
        model, keys = models.get(threshold, (net, set()))
        models[threshold] = computed(model, experiment, circuit), keys | {key}
    print(text(HEADER, rows))
    sizes = []
    for threshold, (model, keys) in models.items():
        files = (net, folder / "int8.lcz"), (model, folder / f"mobilenetv2_t{threshold:g}.lcz")
        sizes.append([threshold, len(keys), *(stored(which, keys, file) for which, file in files)])
    print(text(SIZES, sizes))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="weights of torchvision's mobilenet_v2; left out, downloaded")
    parser.add_argument("--random", action="store_true", help="random weights instead")
    parser.add_argument("--granularity", default="per_channel", choices=["per_tensor", "per_channel"])
    parser.add_argument("--layer", nargs="+", default=["features.1.conv.1"], help="convolutions, by name")
    parser.add_argument("--all", action="store_true", help="every convolution")
    parser.add_argument("--inputs", type=int, default=96, help="weights of a layer that are read")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[1.0], help="RMS errors in int8 steps")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--cols", type=int, default=31)
    parser.add_argument("--offspring", type=int, default=8)
    parser.add_argument("--mutation", type=float, default=0.01)
    parser.add_argument("--patience", type=int, default=2000)
    parser.add_argument("--generations", type=int)
    parser.add_argument("--seed-circuit", default="adder", choices=["adder", "random"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=int, default=1, help="of each layer and threshold; the best one counts"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, one for each run")
    parser.add_argument("--folder", type=Path, default=Path("outputs/mobilenetv2_cgp"))
    options = parser.parse_args(argv)
    names = ("rows", "cols", "offspring", "mutation", "patience", "generations", "seed_circuit", "seed")
    net = network(options)
    experiments = presets.mobilenet(
        net,
        layers=None if options.all else options.layer,
        count=options.inputs,
        thresholds=options.thresholds,
        settings=cgp.Settings(**{name: getattr(options, name) for name in names}),
        runs=options.runs,
    )
    folders, start = campaign.plan(experiments, options.folder), time.perf_counter()
    outcomes = campaign.run(folders, jobs=options.jobs)  # those that have finished are kept
    worked = sum(outcome.status == "finished" for outcome in outcomes)
    print(f"{worked} runs in {time.perf_counter() - start:.1f} s, {len(outcomes) - worked} not run again")
    report(net, experiments, options.folder)


if __name__ == "__main__":
    main()
