"""LeNet-5 whose int8 weights are computed by evolved circuits: conv2 from conv1, and both from constants.

    python recipes/lenet5_cgp.py
    python recipes/lenet5_cgp.py --data mnist.npz --checkpoint lenet5_mnist.safetensors

Not measured yet.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lenet5 import Batches, accuracy, fit, read
from lightning.pytorch import seed_everything
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import cgp, codes
from lightning_compress.cgp import presets
from lightning_compress.cgp.codes import CircuitCode
from lightning_compress.cgp.integers import all_int8, weight_of
from lightning_compress.checkpoints import load_weights
from lightning_compress.tables import text

PRESETS = ("layer_bypass", "le_selector")
THRESHOLDS = (0.0, 1.0, 5.0, 11.0)
THESIS = (250.0, 150.0, 100.0, 50.0, 25.0, 15.0, 10.0, 0.0)
PUBLISHED = (
    "published, of evolved circuits for the same tasks: le_selector mean square error 0.0043; all 256 values from "
    "constants 298 gates, 1.71 in units of their own."
)
HEADER = ["experiment", "RMS error", "MSE", "gates", "pJ", "delay", "depth", "generations", "seconds", "top-1 %"]
BYTES = ["experiment", "weights", "int8 bytes", "circuit bytes", "its gates", "break-even pJ/byte", "coded pJ/byte"]

# -- the int8 network --------------------------------------------------------------------------------------------------


def int8(dense: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    """A copy with int8 weights: fine-tuned as rounded, or without training as they are."""
    granularity = lc.PerTensor() if options.granularity == "per_tensor" else lc.PerChannel()
    if not options.epochs:
        return lc.compress(dense, [lc.Quantize(8, granularity=granularity, calibrator="minmax")]).model
    net = copy.deepcopy(dense)
    qat = lc.QuantizationAwareTraining(8, 8, granularity=granularity, calibrator="minmax")
    plain = argparse.Namespace(augment=0.0)  # labels as they are, images as they are
    fit(net, None, options.epochs, options.lr, batches, plain, qat)
    return lc.finalize(net).eval()


# -- circuits ----------------------------------------------------------------------------------------------------------


def experiments(net: nn.Module, options: argparse.Namespace) -> list[cgp.Experiment]:
    """What is asked for: for each preset and threshold a circuit."""
    settings = cgp.Settings(
        rows=options.rows,
        cols=options.cols,
        offspring=options.offspring,
        mutation=options.mutation,
        patience=options.patience,
        generations=options.generations,
        seed_circuit=options.seed_circuit,
        seed=options.seed,
    )
    made = []
    for name in options.presets:
        thresholds = options.thresholds if name == "layer_bypass" else [0.0]
        made += getattr(presets, name)(
            net, settings=settings, thresholds=thresholds, multiplex=options.multiplex
        )
    return made


def until(seconds: float) -> Callable[[cgp.Evolution], bool]:
    """Stops an evolution that has taken so long."""
    start = time.monotonic()
    return lambda evolution: time.monotonic() - start >= seconds


def computed(net: nn.Module, experiment: cgp.Experiment, circuit: cgp.Circuit) -> nn.Module:
    """A copy whose weights are what a circuit gives; an archive of it holds the circuit instead of the integers."""
    small, problem = copy.deepcopy(net), experiment.problem
    layers = {key: rest for key, *rest in all_int8(small)}
    integers = {key: values for key, (_, _, values, _) in layers.items()}
    for key, values in experiment.written(integers, problem.outputs(circuit)).items():
        module, param, _, base = layers[key]
        weight = getattr(module, param)
        with torch.no_grad():
            rebuilt, base = weight_of(base, values, weight.dtype)
            weight.copy_(rebuilt)
        codes.attach(module, param, CircuitCode.of(base, circuit, problem.inputs[0], values, problem.loaded))
    return small


def stored(net: nn.Module, keys: set[str], path: Path) -> tuple[int, int]:
    """Bytes of some tensors in the file of a network, and of the whole file."""
    info = lc.save(net, path)
    return sum(t.stored_bytes for t in info.tensors if t.name in keys), info.file_bytes


def report(net: nn.Module, judge: tuple[Tensor, Tensor], options: argparse.Namespace) -> None:
    """Evolve, write, read back, judge."""
    before, out = accuracy(net, *judge), options.output_dir
    rows: list[list[Any]] = [["int8", 0.0, 0.0, *[None] * 6, before * 100]]
    sizes: list[list[Any]] = []
    for experiment in experiments(net, options):
        start = time.perf_counter()
        result = cgp.evolve(experiment.problem, experiment.settings, callback=until(options.seconds))
        seconds, best = time.perf_counter() - start, result.best
        small, name = computed(net, experiment, best.circuit), experiment.name
        keys = {place.key for place in experiment.places}
        dense_bytes, _ = stored(net, keys, out / "int8.lcz")
        circuit_bytes, _ = stored(small, keys, out / f"{name}.lcz")
        again = lc.load(out / f"{name}.lcz", into=lc.models.LeNet5()).eval()
        (out / f"{name}.txt").write_text(best.circuit.to_text() + "\n", encoding="utf-8")
        (out / f"{name}.v").write_text(cgp.to_verilog(best.circuit.compact(), "weights"), encoding="utf-8")
        top1 = accuracy(again, *judge)
        cost = best.cost
        rows.append(
            [name, result.rms, result.rms**2, cost.gate_count, cost.energy_pj, cost.delay, cost.depth]
            + [result.generations, seconds, top1 * 100]
        )
    print(text(HEADER, rows))
    print(PUBLISHED)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help=".npz of MNIST; left out, the digits of scikit-learn")
    parser.add_argument("--checkpoint", help="trained float weights; left out, the network is trained first")


if __name__ == "__main__":
    main()
