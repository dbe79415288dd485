"""`evolve break-even` and `evolve export`: circuits of archives, experiments and text files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_compress import contents
from lightning_compress.cgp.balance import MEMORIES, WIRINGS, break_even
from lightning_compress.cgp.campaign import find, read_rows
from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.gates.export import to_python, to_testbench, to_verilog
from lightning_compress.cgp.gates.functions import Int8
from lightning_compress.cgp.layers.codes import CircuitCode
from lightning_compress.cgp.metrics import circuit_for
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cli import networks
from lightning_compress.cli.evolve import experiments
from lightning_compress.cli.evolve.campaign import best_of
from lightning_compress.cli.networks import InputError
from lightning_compress.container import Reader, naming
from lightning_compress.energy import EnergyTable
from lightning_compress.functional.lengths import encoded_bytes

_LANGUAGES = ("python", "verilog", "testbench")
_CASES = 16  # random ones of a test bench without a problem


@dataclass(frozen=True)
class Found:
    """A circuit and where it is from.

    Args:
        name: of the layer or run.
        circuit: itself.
        problem: that it solves; None of a text file.
        costs: of the experiment; None are the default ones.
    """

    name: str
    circuit: Circuit
    problem: Problem | None = None
    costs: EnergyTable | None = None


def _source_options(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("source", help=what)
    parser.add_argument("--layer", help="of an archive")
    parser.add_argument("--run", type=int, help="of an experiment; else the best one")
    parser.add_argument("--energy", help="CSV file of costs: id, name, energy_pj, area_um2, delay")


def break_even_options(parser: ArgumentParser) -> None:
    """Options of `evolve break-even`."""
    _source_options(parser, "archive (.lcz), or folder of a campaign or an experiment")
    parser.add_argument("--reads", type=int, default=1, help="of each weight in an inference")
    parser.add_argument("--wiring", default="unrolled", help=", ".join(WIRINGS))
    parser.add_argument("--memory", default="sram", help=", ".join(MEMORIES))


def break_even_(options: Namespace) -> None:
    """Print the balance of each circuit."""
    costs = experiments.table(options)
    texts = []
    for found in _find(options):
        if found.problem is None:
            raise InputError(
                f"{options.source} is a circuit alone, and says nothing of weights: give an archive or a folder."
            )
        table = costs or found.costs
        weights = np.concatenate(found.problem.decode(found.problem.targets))
        balance = break_even(
            found.problem,
            found.circuit.cost(table),
            reads=options.reads,
            wiring=options.wiring,
            memory=options.memory,
            table=table,
            coded_bytes=encoded_bytes({"codes": torch.from_numpy(weights)}),
        )
        texts.append(f"{found.name}: {balance}")
    print(*texts, sep="\n\n")


def export_options(parser: ArgumentParser) -> None:
    """Options of `evolve export`."""
    parser.add_argument("language", help=", ".join(_LANGUAGES))
    _source_options(parser, "text of a circuit (.config), archive (.lcz), or folder of an experiment")
    parser.add_argument("--name", default="circuit", help="of the function or module")
    parser.add_argument("--output", help="file to write; else it is printed")
    parser.add_argument("--force", action="store_true", help="replace it if it exists")


def export(options: Namespace) -> None:
    """Write one circuit as source code."""
    if options.language not in _LANGUAGES:
        raise InputError(f"{options.language!r} is unknown; allowed: {', '.join(_LANGUAGES)}.")
    file = networks.writable(options.output, options.force) if options.output else None
    found = _find(options)
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise InputError(
            f"{options.source} has {len(found)} circuits ({names}): choose one, by --layer or its folder."
        )
    circuit, name = found[0].circuit, options.name
    costs = experiments.table(options) or found[0].costs
    if options.language == "testbench":
        source = to_testbench(circuit, _cases(found[0]), name)
    else:
        source = (to_python if options.language == "python" else to_verilog)(circuit, name, costs)
    if file is None:
        print(source, end="")
    else:
        file.write_text(source, encoding="utf-8")
        print(f"{file}: {found[0].name}")


def _cases(found: Found) -> Int8:
    """The inputs of the problem, or random ones, with the extremes first."""
    if found.problem is not None:
        return found.problem.inputs if found.circuit.grid.datasets == 1 else found.problem.inputs[None]
    grid = found.circuit.grid
    shape = (_CASES, grid.inputs) if grid.datasets == 1 else (_CASES, grid.datasets, grid.inputs)
    cases = np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)
    cases[0], cases[1] = -128, 127
    return cases


def _find(options: Namespace) -> list[Found]:
    """The circuits of a source."""
    path = Path(options.source)
    if path.is_dir():
        return _of_folder(path, options.run)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: give an archive, the folder of an experiment, or a circuit."
        )
    if path.suffix != ".lcz":
        try:
            return [Found(path.name, Circuit.from_text(path.read_text(encoding="utf-8").strip()))]
        except ValueError as error:
            raise InputError(f"{path} is no text of a circuit: {error}") from error
    found = _of_archive(path)
    chosen = [f for f in found if options.layer in (None, f.name, f.name.rpartition(".")[0])]
    if not chosen:
        names = ", ".join(f.name for f in found) or "none"
        raise InputError(
            f"{path} has no circuit{f' of {options.layer}' if options.layer else ''}; it has: {names}."
        )
    return chosen


def _of_archive(path: Path) -> list[Found]:
    result = []
    with naming(path), path.open("rb") as file:
        reader = Reader(file)
        for stored in reader.header.tensors:
            if stored.kind == CircuitCode.kind:
                weight, code = contents.decode(stored, reader)
                assert isinstance(code, CircuitCode)  # by its kind
                result.append(Found(stored.tensor.name, code.circuit, code.problem(weight)))
    return result


def _of_folder(path: Path, run: int | None) -> list[Found]:
    """Of every experiment, the circuit of one run."""
    result = []
    for name in dict.fromkeys(folder.config.experiment for folder in find(path)):
        folders = [folder for folder in find(path) if folder.config.experiment == name]
        there = {
            number: folder
            for folder in folders
            for number in folder.config.numbers
            if folder.chromosome(number).exists() and run in (None, number)
        }
        if not there:
            continue
        experiment = folders[0].experiment
        last = {number: read_rows(folder.statistics(number))[-1] for number, folder in there.items()}
        best = best_of(experiment, last)
        circuit = circuit_for(experiment, there[best].chromosome(best).read_text(encoding="utf-8"))
        result.append(Found(f"{name}, run {best}", circuit, experiment.problem, experiment.settings.table))
    if not result:
        raise InputError(f"{path} has no finished run{f' {run}' if run is not None else ''}: run it first.")
    return result
