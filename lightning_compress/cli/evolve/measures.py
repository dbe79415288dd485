"""`evolve metrics` and `evolve sensitivity`: Top-1, Top-5 and loss of networks with other weights."""

from __future__ import annotations

import csv
import sys
from dataclasses import astuple

from jsonargparse import ArgumentParser, Namespace

from lightning_compress.cgp.metrics import Scores, scores, write_metrics
from lightning_compress.cgp.sensitivity import COLUMNS, KINDS, sensitivity, write_sensitivity
from lightning_compress.cli import datasets, networks
from lightning_compress.cli.evolve import experiments
from lightning_compress.cli.networks import InputError
from lightning_compress.tables import text


def metrics_options(parser: ArgumentParser) -> None:
    """Options of `evolve metrics`."""
    parser.add_argument("folder", help="of a campaign, an experiment or a batch")
    experiments.network_options(parser)
    datasets.dataset_options(parser)
    parser.add_argument("--top", type=int, default=1, help="last different circuits of each run")


def metrics(options: Namespace) -> None:
    """Measure the circuits of all runs."""
    batches, network = datasets.loader(options), experiments.network(options)
    found = write_metrics(
        options.folder, network, batches, dataset=options.dataset, split=options.split, top=options.top
    )
    before = _percent(scores(network, batches))
    csv.field_size_limit(sys.maxsize)  # chromosomes are long
    rows: list[list[object]] = [["int8 weights as they are", None, None, None, *before]]
    for path in found:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                measured = Scores(float(row["Top-1"]), float(row["Top-5"]), float(row["Loss"]))
                numbers = int(row["error"]), float(row["energy"]), int(row["gate_count"])
                rows.append([row["Run ID"], *numbers, *_percent(measured)])
    columns = ("run", "error", "energy pJ", "gates", "Top-1 %", "Top-5 %", "loss")
    print(text(columns, rows), f"{len(found)} files: {found[0]}, ...", sep="\n\n")


def _percent(found: Scores) -> tuple[float, float, float]:
    return 100 * found.top1, 100 * found.top5, found.loss


def sensitivity_options(parser: ArgumentParser) -> None:
    """Options of `evolve sensitivity`."""
    experiments.network_options(parser)
    datasets.dataset_options(parser)
    parser.add_argument("--core", type=int, default=3, help="side of the middle of a kernel")
    parser.add_argument(
        "--errors", type=int, nargs="+", help="values that are added; from -128 to 126 by --step"
    )
    parser.add_argument("--step", type=int, default=1, help="between them")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--include", nargs="+", default=["*"], help="patterns of layers")
    parser.add_argument("--output", help="CSV file to write; else a table is printed")
    parser.add_argument("--force", action="store_true", help="replace it if it exists")


def sensitivity_(options: Namespace) -> None:
    """Add constants to weights and measure."""
    file = networks.writable(options.output, options.force) if options.output else None
    if options.step < 1:
        raise InputError(f"--step {options.step}: allowed is >= 1.")
    batches, network = datasets.loader(options), experiments.network(options)
    rows = sensitivity(
        network,
        batches,
        core=options.core,
        errors=options.errors or range(-128, 127, options.step),
        kinds=options.kinds,
        include=options.include,
    )
    if file:
        write_sensitivity(rows, file)
        print(f"{len(rows)} rows in {file}")
    else:
        print(text(COLUMNS, [list(astuple(row)) for row in rows]))
