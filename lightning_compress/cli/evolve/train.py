"""`evolve train`: weights are computed by circuits here and now, and the network is written as an archive."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import nn
from tqdm import tqdm

from lightning_compress import codes
from lightning_compress.cgp.balance import BreakEven, break_even
from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.layers.choices import Choice
from lightning_compress.cgp.layers.codes import CircuitCode
from lightning_compress.cgp.layers.integers import all_int8, tensors_of
from lightning_compress.cgp.layers.weights import EvolveWeights, best_run
from lightning_compress.cgp.layers.writing import write
from lightning_compress.cgp.presets import PRESETS
from lightning_compress.cgp.search.evolution import Evolution
from lightning_compress.cgp.search.logs import log_to
from lightning_compress.cgp.search.settings import EvolutionResult
from lightning_compress.cli import networks
from lightning_compress.cli.evolve import experiments
from lightning_compress.cli.networks import InputError
from lightning_compress.cli.recipes import UNMET
from lightning_compress.compress import compress
from lightning_compress.energy import EnergyTable
from lightning_compress.functional.lengths import encoded_bytes
from lightning_compress.tables import text
from lightning_compress.targets import parameter

_INPUTS = "layer:NAME, core:SIZE, ring:SIZE, constants, frequent:COUNT or first:COUNT"
_COLUMNS = (
    "experiment",
    "weights",
    "RMS error",
    "met",
    "energy pJ",
    "gates",
    "depth",
    "delay",
    "net pJ",
    "s",
)
_SIZES = ("layer with a circuit", "bytes", "bytes as int8")


def train_options(parser: ArgumentParser) -> None:
    """Options of `evolve train`."""
    parser.add_argument(
        "what", help=f"a preset ({', '.join(PRESETS)}); or what layers are computed from: {_INPUTS}"
    )
    experiments.network_options(parser)
    parser.add_argument(
        "--error_threshold", type=float, default=0.0, help="RMS error of a weight, in int8 steps"
    )
    experiments.search_options(parser)
    experiments.preset_options(parser)
    parser.add_argument("--include", nargs="+", default=["*"], help="patterns of layers; not of presets")
    parser.add_argument("--exclude", nargs="+", default=[], help="patterns of layers to leave, likewise")
    parser.add_argument("--log_dir", help="folder for TensorBoard; of presets")
    networks.output_options(parser)


def train(options: Namespace) -> int:
    """Evolve, report, and write the archive."""
    files = networks.output_files(options)
    return (_preset if options.what in PRESETS else _inputs)(options, files)


def _inputs(options: Namespace, files: list[Any]) -> int:
    """Layers one by one, by the transform."""
    try:
        Choice.parse(options.what)
    except ValueError:
        raise InputError(
            f"{options.what!r} is no preset and no choice of inputs; presets: {', '.join(PRESETS)}; inputs: {_INPUTS}."
        ) from None
    if options.log_dir:
        raise InputError("--log_dir is for presets.")
    own = experiments.settings(options)
    model = experiments.network(options)
    values = {f.name: getattr(own, f.name) for f in dataclasses.fields(own) if f.name != "front"}
    transform = EvolveWeights(
        **values
        | {
            "inputs": options.what,
            "error_threshold": options.error_threshold,
            "runs": options.runs or 1,
            "multiplex": options.multiplex,
            "include": tuple(options.include),
            "exclude": tuple(options.exclude),
        }
    )
    result = compress(model, [transform])
    print(result, networks.write(options, files, model, result.model), sep="\n\n")
    for name, balance in _balances(result.model, own.energy):
        print(f"\n{name}: {balance}")
    return 0 if _met(transform, model, result.model) else UNMET


def _met(transform: EvolveWeights, before: nn.Module, after: nn.Module) -> bool:
    """Whether every layer with a circuit is as near as was asked for; weights that are inputs have no error."""
    choice, found = Choice.parse(transform.inputs), {key: values for key, *_, values, _ in all_int8(before)}
    for key, module, param, values, _ in all_int8(after):
        if isinstance(codes.read(module, param), CircuitCode):
            gap = values.astype(np.int64) - found[key]
            inside = choice.kind in ("core", "ring")
            count = len(choice.select(key, found[key]).positions) if inside else values.size
            error = np.abs(gap).sum() if transform.fitness == "AE" else (gap**2).sum()
            if error > transform.settings.limit(count):
                return False
    return True


def _preset(options: Namespace, files: list[Any]) -> int:
    """Experiments, whose circuits may share layers."""
    given = options.include != ["*"] or options.exclude
    found = experiments.experiments(options.what, options, [options.error_threshold])
    keys = [place.key for e in found for place in e.places]
    if given or "" in keys or len(options.grids or ()) > 1:
        raise InputError(
            f"{options.what}: presets take --layers in place of --include and --exclude; worst_case belongs to no "
            "layer, and one layer cannot have circuits of several grids: use evolve campaign for these."
        )
    before = experiments.network(options)
    model, rows, met = copy.deepcopy(before), [], True
    balances = []
    for experiment in tqdm(found, desc="evolve", unit="circuit", leave=False, disable=None):
        start = time.perf_counter()
        callback, close = _logged(options.log_dir, experiment.name)
        result = best_run(experiment.problem, experiment.settings, options.runs or 1, callback)
        close()
        write(model, experiment, result.best.circuit)
        balance = balance_of(experiment, result)
        balances.append((experiment.name, balance))
        met &= result.met
        cost = result.best.cost
        rows.append(
            [
                *(experiment.name, result.problem.weights, result.rms, "yes" if result.met else "no"),
                *(cost.energy_pj, cost.gate_count, cost.depth, cost.delay, balance.net_pj[0]),
                time.perf_counter() - start,
            ]
        )
    sizes = networks.write(options, files, before, model)
    print(text(_COLUMNS, rows), text(_SIZES, _sizes(before, model)), sizes, sep="\n\n")
    for name, balance in balances:
        print(f"\n{name}: {balance}")
    return 0 if met else UNMET


def balance_of(experiment: Experiment, result: EvolutionResult, **how: Any) -> BreakEven:
    """Break-even of a result, with the bytes of the weights entropy-coded."""
    weights = np.concatenate(experiment.problem.decode(experiment.problem.targets))
    return break_even(
        experiment.problem,
        result.best.cost,
        table=experiment.settings.table,
        coded_bytes=encoded_bytes({"codes": torch.from_numpy(weights)}),
        **how,
    )


def _sizes(before: nn.Module, after: nn.Module) -> list[list[Any]]:
    """Bytes of the layers that keep a circuit, with it and as integers."""
    integers = {key: (values, base) for key, _, _, values, base in all_int8(before)}
    rows = []
    for name, module, param, code in codes.of(after):
        if isinstance(code, CircuitCode):
            values, base = integers[name]
            plain = encoded_bytes({"codes": torch.from_numpy(values), **tensors_of(base)})
            rows.append([name, encoded_bytes(code.arrays(parameter(module, param))), plain])
    return rows


def _balances(model: nn.Module, costs: EnergyTable | None) -> list[tuple[str, BreakEven]]:
    found = []
    for name, module, param, code in codes.of(model):
        if isinstance(code, CircuitCode):
            problem = code.problem(parameter(module, param))
            found.append((name, break_even(problem, code.cost(costs), table=costs)))
    return found


def _logged(
    folder: str | None, name: str
) -> tuple[Callable[[Evolution], bool | None] | None, Callable[[], None]]:
    """A callback that writes the history of every run for TensorBoard, and what closes its file."""
    if folder is None:
        return None, lambda: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "--log_dir needs tensorboard: pip install 'lightning-compress[tensorboard]'."
        ) from None
    writer = SummaryWriter(folder)
    logs: dict[int, Any] = {}  # of each run, by its seed

    def callback(evolution: Evolution) -> None:
        seed = evolution.settings.seed
        if seed not in logs:
            logs[seed] = log_to(writer, f"{name}/run_{len(logs)}")
        logs[seed](evolution)

    return callback, writer.close
