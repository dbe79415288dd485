"""MobileNetV2: circuits that compute the int8 weights of a convolution from its first 96; one layer, or all 52.

    python recipes/mobilenetv2_cgp.py --layer features.1.conv.1 features.18.0 --thresholds 1
    python recipes/mobilenetv2_cgp.py --all --jobs 2 --folder outputs/mobilenetv2

Not measured yet.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import cgp, codes
from lightning_compress.archive import size_of
from lightning_compress.cgp import campaign, presets
from lightning_compress.cgp.codes import CircuitCode
from lightning_compress.cgp.integers import all_int8, find_int8
from lightning_compress.checkpoints import load_weights
from lightning_compress.tables import text

HEADER = ["layer", "weights", "threshold", "RMS error", "gates", "pJ", "inputs read, pJ", "all read, pJ", "seconds"]


def network(options: argparse.Namespace) -> nn.Module:
    """MobileNetV2 with int8 weights."""
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    given = options.random or options.checkpoint
    torch.manual_seed(options.seed)
    net = mobilenet_v2(weights=None if given else MobileNet_V2_Weights.DEFAULT)
    if options.checkpoint:
        load_weights(net, options.checkpoint)
    granularity = lc.PerTensor() if options.granularity == "per_tensor" else lc.PerChannel()
    return lc.compress(net.eval(), [lc.Quantize(8, granularity=granularity, calibrator="minmax")]).model


def convolutions(net: nn.Module) -> list[str]:
    """Names, in the order of the model."""
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]


def row(experiment: cgp.Experiment, best: cgp.Solution, rms: float, seconds: float) -> list[Any]:
    """Of the table."""
    problem, price = experiment.problem, experiment.settings.table.sram_pj_per_byte
    cost = best.cost
    return [
        experiment.places[0].key.removesuffix(".weight"),
        problem.weights,
        experiment.settings.error_threshold,
        rms,
        cost.gate_count,
        cost.energy_pj,
        problem.loaded * price,
        problem.weights * price,
        seconds,
    ]


def one_by_one(experiments: Sequence[cgp.Experiment], options: argparse.Namespace) -> list[list[Any]]:
    """Evolve here and now."""
    rows = []
    for experiment in experiments:
        start = time.monotonic()
        result = cgp.evolve(experiment.problem, experiment.settings, callback=until(start + options.seconds))
        rows.append(row(experiment, result.best, result.rms, time.monotonic() - start))
        print(text(HEADER, rows[-1:]), flush=True)
    return rows


def until(end: float) -> Callable[[cgp.Evolution], bool]:
    """Stops an evolution at a time of the clock."""
    return lambda evolution: time.monotonic() >= end
