"""LeNet-5 whose int8 weights are computed by evolved circuits: conv2 from conv1, and both from constants.

    python recipes/lenet5_cgp.py
    python recipes/lenet5_cgp.py --data mnist.npz --checkpoint lenet5_mnist.safetensors

Measured on MNIST with 5,000 test images (the ``.npz`` pack: half of the test set, one image is 0.02 points): LeNet-5,
int8 with one scale for each layer after one epoch of training as rounded, 99.30 / 99.26 / 99.28 % with seeds 0 / 1 / 2.
One run each. Energies are counted from a table that is mostly estimated; seconds are those of one evolution:

    threshold   RMS error        gates        pJ             seconds  top-1 after             bytes as circuit
    layer_bypass, conv1 (150 weights) -> conv2 (2,400 weights, 2,154 / 2,153 / 2,152 bytes as int8)
    0           0                84  90  92   0.010          1-2      99.30  99.26  99.28     2,293  2,303  2,298
    1           0.19             64  67  67   0.0005         1-3      99.30  99.28  99.28     2,251  2,257  2,249
    5           0.21-0.23        59  61  62   0              2-3      99.30  99.26  99.26     2,233  2,241  2,235
    11          0.24-0.26        59  53  58   0              2-4      99.30  99.26  99.26     2,234  2,230  2,222
    le_selector, a constant -> conv1 and conv2 (2,550 weights, 2,292 / 2,291 / 2,290 bytes as int8)
    0           0                202 206 209  0.024          2-3      99.30  99.26  99.28     2,657  2,668  2,667
    0.0656      MSE 0.0039       202 203 205  0.021-0.023    2-4      99.30  99.26  99.26     2,660  2,658  2,671
    published   MSE 0.0043; all 256 values: 298 gates, 1.71 in units of their own

Files with circuits are longer, for which value a weight takes needs as many bits as the weight. Not reading 2,400 bytes
from SRAM is 3,000 pJ, and reading 150 inputs 188; but with one weight in a cycle each reads an index of 8 bits, and the
circuit loses 439 pJ. With ``--seed-circuit random --seconds 25`` (seed 0, 1.2 million generations) le_selector ends
with MSE 0.22, 169 gates and 1.9 pJ: the built circuit that evolution starts from does the work.

Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python 3.11, torch 2.15.0, lightning 2.6.6, numba 0.68.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from lenet5 import Batches, accuracy, fit, read
from lightning.pytorch import seed_everything
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import cgp
from lightning_compress.cgp import presets
from lightning_compress.cgp.layers.writing import write
from lightning_compress.checkpoints import load_weights
from lightning_compress.tables import text

# Root mean square errors; 0.0043 is the mean square error that was published of le_selector.
THRESHOLDS = {"layer_bypass": [0.0, 1.0, 5.0, 11.0], "le_selector": [0.0, math.sqrt(0.0043)]}
THESIS = [250.0, 150.0, 100.0, 50.0, 25.0, 15.0, 10.0, 0.0]
PUBLISHED = (
    "Published of evolved circuits: le_selector with mean square error 0.0043; all 256 values from constants with 298 "
    "gates, 1.71 in units of their own."
)
CIRCUITS = ["experiment", "RMS error", "MSE", "gates", "pJ", "delay", "depth", "generations", "seconds"]
CIRCUITS += ["top-1 % int8", "top-1 % after"]
ENERGIES = [
    "pJ, SRAM",
    "saved",
    "circuit",
    "inputs",
    "net",
    "inputs read anyhow",
    "read coded",
    "indexed, best",
]
ENERGIES += ["paid pJ/byte"]
CAVEAT = (
    "Per inference; a byte costs 1.25 pJ from SRAM and 160 from DRAM. Simulated, and about memory traffic alone: a "
    "synthesizer ties constants off for nothing."
)
SIZES = ["experiment", "weights", "computed", "inputs read", "bytes as int8", "bytes as circuit"]
PLAIN = argparse.Namespace(augment=0.0)  # images as they are

# -- the int8 network --------------------------------------------------------------------------------------------------


def int8(dense: nn.Module, batches: Batches, options: argparse.Namespace) -> nn.Module:
    """A copy with int8 weights: fine-tuned as rounded, or without training as they are."""
    granularity = lc.PerTensor() if options.granularity == "per_tensor" else lc.PerChannel()
    if options.no_train:
        return lc.compress(dense, [lc.Quantize(8, granularity=granularity, calibrator="minmax")]).model
    net = copy.deepcopy(dense)
    qat = lc.QuantizationAwareTraining(8, 8, granularity=granularity, calibrator="minmax")
    fit(net, None, options.epochs, options.lr, batches, PLAIN, qat)
    return lc.finalize(net).eval()


# -- circuits ----------------------------------------------------------------------------------------------------------


def experiments(net: nn.Module, options: argparse.Namespace) -> list[cgp.Experiment]:
    """What is asked for: of each preset one circuit for every threshold."""
    names = ("rows", "cols", "offspring", "mutation", "patience", "generations", "seed_circuit", "seed")
    settings = cgp.Settings(**{name: getattr(options, name) for name in names})
    made = []
    for name in options.presets:
        thresholds = THRESHOLDS[name]
        if name == "layer_bypass":
            thresholds = options.thresholds or (THESIS if options.thesis else thresholds)
        made += presets.PRESETS[name](
            net, thresholds=thresholds, settings=settings, multiplex=not options.no_multiplex
        )
    return made


def until(seconds: float) -> Callable[[cgp.Evolution], bool]:
    """Stops an evolution that has taken so long."""
    start = time.monotonic()
    return lambda evolution: time.monotonic() - start >= seconds


def computed(net: nn.Module, experiment: cgp.Experiment, circuit: cgp.Circuit) -> nn.Module:
    """A copy whose weights are what a circuit gives; an archive of it holds the circuit instead of the integers."""
    small = copy.deepcopy(net)
    write(small, experiment, circuit)
    return small


def stored(net: nn.Module, keys: set[str], path: Path) -> int:
    """Bytes of some tensors in the file of a network."""
    return sum(tensor.stored_bytes for tensor in lc.save(net, path).tensors if tensor.name in keys)


def export(circuit: cgp.Circuit, inputs: npt.ArrayLike, path: Path) -> None:
    """The circuit as text, as Python and as Verilog with its test bench."""
    small = circuit.compact()
    for ending, content in (
        (".txt", circuit.to_text() + "\n"),
        (".py", cgp.to_python(small, "weights")),
        (".v", cgp.to_verilog(small, "weights")),
        ("_test.v", cgp.to_testbench(small, inputs, "weights")),
    ):
        path.with_name(path.name + ending).write_text(content, encoding="utf-8")


def energy(problem: cgp.Problem, cost: cgp.CircuitCost, int8_bytes: int) -> list[float]:
    """A row of the table of energies; the inputs of layer_bypass are read for their own layer anyhow."""
    unrolled = cgp.break_even(problem, cost, coded_bytes=int8_bytes, already_loaded=problem.loaded)
    indexed = cgp.break_even(problem, cost, wiring="indexed")
    coded = unrolled.coded_net_pj or (math.nan, math.nan)
    net = unrolled.net_pj[1], unrolled.shared_net_pj[1], coded[1], indexed.net_pj[1]
    return [unrolled.saved_pj, unrolled.circuit_pj, unrolled.inputs_pj, *net, unrolled.pj_per_byte[0]]


def run(net: nn.Module, judge: tuple[Tensor, Tensor], options: argparse.Namespace) -> None:
    """Evolve, write, read back, judge."""
    out, before = options.output_dir, 100 * accuracy(net, *judge)
    circuits: list[list[Any]] = []
    energies: list[list[Any]] = []
    sizes: list[list[Any]] = []
    for experiment in experiments(net, options):
        name, problem = experiment.name, experiment.problem
        start = time.perf_counter()
        result = cgp.evolve(problem, experiment.settings, callback=until(options.seconds))
        seconds, cost = time.perf_counter() - start, result.best.cost
        small = computed(net, experiment, result.best.circuit)
        keys = {place.key for place in experiment.places}
        int8_bytes, circuit_bytes = (
            stored(model, keys, out / f"{file}.lcz") for file, model in (("int8", net), (name, small))
        )
        again = lc.load(out / f"{name}.lcz", into=lc.models.LeNet5()).eval()
        export(result.best.circuit, problem.inputs, out / name)
        after = 100 * accuracy(again, *judge)
        errors = result.rms, result.rms**2
        costs = cost.gate_count, cost.energy_pj, cost.delay, cost.depth
        circuits.append([name, *errors, *costs, result.generations, seconds, before, after])
        energies.append([name, *energy(problem, cost, int8_bytes)])
        sizes.append([name, problem.weights, problem.computed, problem.loaded, int8_bytes, circuit_bytes])
        print(f"{name}: RMS error {result.rms:.3g}, {cost.gate_count} gates, {seconds:.1f} s", flush=True)
    print(text(CIRCUITS, circuits))
    print(PUBLISHED)
    print(text(ENERGIES, energies))
    print(CAVEAT)
    print(text(SIZES, sizes))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help=".npz of MNIST; left out, the digits of scikit-learn")
    parser.add_argument("--checkpoint", help="trained float weights; left out, the network is trained first")
    parser.add_argument("--dense-epochs", type=int, default=15, help="of that training")
    parser.add_argument("--no-train", action="store_true", help="round the weights and train no more")
    parser.add_argument("--epochs", type=int, default=1, help="of training with rounding")
    parser.add_argument("--lr", type=float, default=1e-4, help="of training with rounding")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--granularity", default="per_tensor", choices=["per_tensor", "per_channel"])
    parser.add_argument("--presets", nargs="+", default=list(THRESHOLDS), choices=list(THRESHOLDS))
    parser.add_argument("--thresholds", type=float, nargs="+", help="of layer_bypass")
    parser.add_argument("--thesis", action="store_true", help="its thresholds, grid of 256 x 31, 4 offspring")
    parser.add_argument("--no-multiplex", action="store_true", help="one output for each weight")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cols", type=int, default=16)
    parser.add_argument("--offspring", type=int, default=8)
    parser.add_argument("--mutation", type=float, default=0.01)
    parser.add_argument("--patience", type=int, default=100_000)
    parser.add_argument("--generations", type=int)
    parser.add_argument("--seconds", type=float, default=60.0, help="that each evolution may take")
    parser.add_argument("--seed-circuit", default="adder", choices=["adder", "random"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/lenet5_cgp"))
    options = parser.parse_args(argv)
    if options.thesis:
        options.rows, options.cols, options.offspring = 256, 31, 4
    options.output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed, verbose=False)
    torch.set_num_threads(1)  # the network is small: more threads only wait for one another

    data = read(options.data)
    batches = Batches(data["x_train"], data["y_train"], options.batch_size)
    dense = lc.models.LeNet5()
    if options.checkpoint:
        load_weights(dense, options.checkpoint)
    else:
        fit(dense, None, options.dense_epochs, 3e-3, batches, PLAIN)
    run(int8(dense.eval(), batches, options), (data["x_test"], data["y_test"]), options)


if __name__ == "__main__":
    main()
