"""`evolve campaign` and `evolve merge`: experiments as folders, whose runs go on anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_compress.cgp.campaign import (
    Folder,
    dask_script,
    find,
    merge,
    plan,
    read_rows,
    run,
    script,
    status,
)
from lightning_compress.cgp.campaign.merging import MODES
from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.presets import PRESETS
from lightning_compress.cgp.search.settings import PICO, Row
from lightning_compress.cli import networks
from lightning_compress.cli.evolve import experiments
from lightning_compress.cli.networks import InputError
from lightning_compress.cli.recipes import UNMET
from lightning_compress.plots.circuits import circuit_front, evolution_history
from lightning_compress.tables import text

_COLUMNS = ("experiment", "runs", "weights", "RMS error", "met", "energy pJ", "gates", "depth", "delay")
_JOB: dict[str, dict[str, Any]] = {
    "name": {"default": "evolve", "help": "of the jobs"},
    "time": {"default": "24:00:00", "help": "limit, hours:minutes:seconds"},
    "cpus": {"type": int, "default": 1, "help": "processes of a job, each for one run"},
    "memory": {"default": "4gb", "help": "of a job"},
    "scratch": {"help": "on the disk of the node, e.g. 10gb"},
}


def plan_options(parser: ArgumentParser) -> None:
    """Options of `campaign plan`."""
    parser.add_argument("preset", help=", ".join(PRESETS))
    experiments.network_options(parser)
    parser.add_argument(
        "--thresholds", type=float, nargs="+", help="RMS errors, one experiment for each; those of the preset"
    )
    experiments.search_options(parser)
    experiments.preset_options(parser)
    parser.add_argument("--experiment_dir", required=True, help="folder for the folders of experiments")
    parser.add_argument("--batches", type=int, default=1, help="parts that runs are split into evenly")
    parser.add_argument(
        "--log_error",
        default="threshold",
        help="rows with at most this error carry their circuit: a number, threshold or all",
    )
    parser.add_argument("--statistics", default="csv", help="csv or csv.zip")


def plan_(options: Namespace) -> None:
    """Write folders."""
    preset = experiments.check_preset(options.preset)
    found = experiments.experiments(preset, options, options.thresholds)
    log: float | str = options.log_error
    if log not in ("threshold", "all"):
        try:
            log = float(log)
        except ValueError:
            raise InputError(f"--log_error {log}: allowed are a number, threshold and all.") from None
    paths = plan(
        found, options.experiment_dir, batches=options.batches, log_error=log, statistics=options.statistics
    )
    rows = []
    for path in paths:
        folder = Folder.open(path)
        problem, grid = folder.experiment.problem, folder.experiment.settings
        sizes = problem.inputs.size, problem.targets.size, problem.weights
        rows.append([path.name, folder.config.runs, *sizes, f"{grid.rows}x{grid.cols}"])
    print(text(("folder", "runs", "inputs", "outputs", "weights", "grid"), rows))
    print(f"\nNext: lightning-compress evolve campaign run {options.experiment_dir}")


def _folders(parser: ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="of campaigns, experiments or batches")


def run_options(parser: ArgumentParser) -> None:
    """Options of `campaign run`."""
    _folders(parser)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each for one run")
    parser.add_argument("--executor", default="processes", help="processes or dask")
    parser.add_argument("--address", help="of the scheduler of dask, e.g. tcp://10.0.0.1:8786")
    parser.add_argument("--retries", type=int, default=1, help="new starts of a run that failed")
    parser.add_argument("--save_every", type=float, default=60.0, help="seconds between states to go on from")


def run_(options: Namespace) -> int:
    """Work on the runs."""
    with _executor(options) as executor:
        outcomes = run(
            options.folders,
            jobs=options.jobs,
            executor=executor,
            retries=options.retries,
            save_every=options.save_every,
        )
    for folder in options.folders:
        print(status(folder))
    return UNMET if any(outcome.status == "failed" for outcome in outcomes) else 0


@contextmanager
def _executor(options: Namespace) -> Iterator[Any]:
    if options.executor not in ("processes", "dask") or (options.executor == "dask") != bool(options.address):
        raise InputError(
            f"--executor {options.executor} --address {options.address}: allowed are processes, and dask with the "
            "address of its scheduler."
        )
    if options.executor == "processes":
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise ImportError("--executor dask needs dask: pip install 'lightning-compress[cluster]'.") from None
    with Client(options.address) as client:  # type: ignore[no-untyped-call]
        yield client


def folder_options(parser: ArgumentParser) -> None:
    """Options of `campaign status`."""
    parser.add_argument("folder", help="of a campaign, an experiment or a batch")


def status_(options: Namespace) -> None:
    """Show how far runs are."""
    print(status(options.folder))


def script_options(parser: ArgumentParser) -> None:
    """Options of `campaign script`."""
    _folders(parser)
    parser.add_argument("--system", required=True, help="pbs or slurm")
    for name, how in _JOB.items():
        parser.add_argument(f"--{name}", **how)
    parser.add_argument("--template", help="file with {name}, {time}, {cpus}, {mem}, {scratch} and {command}")
    parser.add_argument("--dask", action="store_true", help="the script of dask-jobqueue's workers instead")
    parser.add_argument("--output_dir", help="folder to write NAME.sh or NAME_0.sh, ... into; else printed")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def script_(options: Namespace) -> None:
    """Print or write job scripts; nothing is submitted."""
    how = {name: options[name] for name in _JOB}
    if options.dask:
        if options.template:
            raise InputError("--dask has a script of its own: leave --template out.")
        found = [dask_script(options.system, **how)]
    else:
        template = Path(options.template).read_text(encoding="utf-8") if options.template else None
        found = script(options.folders, options.system, **how, template=template)
    if options.output_dir is None:
        print(*found, sep="\n")
        return
    names = [f"{options.name}_{i}.sh" if len(found) > 1 else f"{options.name}.sh" for i in range(len(found))]
    files = [networks.writable(str(Path(options.output_dir) / name), options.force) for name in names]
    for file, content in zip(files, found, strict=True):
        file.write_text(content, encoding="utf-8")
        print(file)


def merge_options(parser: ArgumentParser) -> None:
    """Options of `merge`."""
    parser.add_argument("folder", help="of the campaign")
    parser.add_argument("name", help="of the experiment")
    parser.add_argument("--top", type=int, help="of mode lean: rows of each run that are kept")
    parser.add_argument("--mode", default="all", help=", ".join(MODES))
    parser.add_argument("--allow_missing", action="store_true", help="join what there is")
    parser.add_argument("--into", help="folder to write; NAME beside the batches")


def merge_(options: Namespace) -> None:
    """Join batches."""
    how = {name: options[name] for name in ("top", "mode", "allow_missing", "into")}
    print(merge(options.folder, options.name, **how))


def report_options(parser: ArgumentParser) -> None:
    """Options of `campaign report`."""
    folder_options(parser)
    parser.add_argument("--plot_dir", help="folder for figures of the fronts and the histories")


def report(options: Namespace) -> None:
    """The best circuit of every experiment, over its runs."""
    groups: dict[str, list[Folder]] = {}
    for folder in find(options.folder):
        groups.setdefault(folder.config.experiment, []).append(folder)
    rows, plots = [], []
    for name, folders in groups.items():
        histories: dict[int, list[dict[str, str]]] = {}
        for number, history in (entry for folder in folders for entry in _histories(folder)):
            if len(history) > len(histories.get(number, ())):  # a merged folder may have its end alone
                histories[number] = history
        if not histories:
            continue
        experiment = folders[0].experiment
        best = best_of(experiment, {run: rows[-1] for run, rows in histories.items()})
        last = histories[best][-1]
        error = float(last["error"])
        rows.append(
            [
                *(name, len(histories), experiment.problem.weights, _rms(experiment, error)),
                "yes" if error <= experiment.settings.limit(experiment.problem.weights) else "no",
                *(float(last["energy"]), int(last["gate_count"]), int(last["depth"]), float(last["delay"])),
            ]
        )
        plots.append((name, experiment, folders, histories))
    if not rows:
        raise InputError(f"{options.folder} has no runs that began: run them first.")
    print(text(_COLUMNS, rows))
    if options.plot_dir:
        target = Path(options.plot_dir)
        target.mkdir(parents=True, exist_ok=True)
        for plotted in plots:
            for file in _draw(target, *plotted):
                print(file)


def best_of(experiment: Experiment, last: dict[int, dict[str, str]]) -> int:
    """The run whose last row is best: those that meet the threshold by energy, all others by error."""
    limit = experiment.settings.limit(experiment.problem.weights)

    def rank(run: int) -> tuple[float, ...]:
        error, energy = float(last[run]["error"]), float(last[run]["quantized_energy"])
        rest = float(last[run]["quantized_delay"]), float(last[run]["gate_count"]), float(run)
        return (0, energy, error, *rest) if error <= limit else (1, error, energy, *rest)

    return min(last, key=rank)


def _histories(folder: Folder) -> Iterator[tuple[int, list[dict[str, str]]]]:
    for number in folder.config.numbers:
        try:
            rows = read_rows(folder.statistics(number))
        except FileNotFoundError:
            continue
        if rows:
            yield number, rows


def _rms(experiment: Experiment, error: float) -> float:
    mean = error / experiment.problem.weights
    return mean if experiment.settings.fitness == "AE" else math.sqrt(mean)


def _draw(
    target: Path,
    name: str,
    experiment: Experiment,
    folders: list[Folder],
    histories: dict[int, list[dict[str, str]]],
) -> Iterator[Path]:
    points = {
        (_rms(experiment, float(row["error"])), float(row["energy"]), int(row["gate_count"]))
        for folder in folders
        for number in folder.config.numbers
        if folder.front(number).exists()
        for row in read_rows(folder.front(number))
    }
    figures = {"history": evolution_history({f"run {r}": _rows(rows) for r, rows in histories.items()})[0]}
    if points:
        figures["front"] = circuit_front(sorted(points), experiment.settings.error_threshold)
    for kind, ax in figures.items():
        if kind == "front" and experiment.settings.fitness == "AE":
            ax.set_xlabel("mean absolute error (int8 steps)")
        file = target / f"{name}.{kind}.png"
        ax.figure.savefig(file)  # type: ignore[union-attr]
        yield file


def _rows(rows: list[dict[str, str]]) -> list[Row]:
    """As a history; the statistics do not say which phase a row is of."""
    return [
        Row(
            int(row["generation"]),
            1,
            float(row["timestamp"]),
            int(row["error"]),
            round(float(row["energy"]) * PICO),
            int(row["quantized_delay"]),
            int(row["depth"]),
            int(row["gate_count"]),
        )
        for row in rows
    ]
