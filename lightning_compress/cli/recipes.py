"""Verbs that carry out a file: `run` a recipe, `search` a space."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lightning_compress.cli import networks
from lightning_compress.cli.networks import InputError
from lightning_compress.pipelines import CompressionConfig, compress_to
from lightning_compress.pipelines.files import read_yaml
from lightning_compress.pipelines.keys import check_keys
from lightning_compress.search import SearchResult, search
from lightning_compress.search.objectives import NAMES
from lightning_compress.search.propose import BACKENDS

UNMET = 1  # exit code: done, but the target is not met
_TARGETS = {
    "target_ratio": "file bytes / dense bytes to reach, in (0, 1)",
    "target_bytes": "length of the archive to reach",
    "max_error": "largest output error",
    "max_accuracy_drop": "largest loss of accuracy",
}
_SETTINGS: dict[str, tuple[type, Any, str]] = {
    "population": (int, 24, "models in a generation"),
    "generations": (int, 20, "the first one included"),
    "backend": (str, "evolution", ", ".join(BACKENDS)),
    "target_ratio": (float, None, "size fraction that the archive must keep"),
    "seed": (int, 0, "of everything drawn"),
}


def run_options(parser: ArgumentParser) -> None:
    """Options of `run`."""
    parser.add_argument("recipe", help="YAML file: transforms with options, or flat settings, and targets")
    networks.network_options(parser, shape_required=False)
    networks.data_options(parser)
    for name, what in _TARGETS.items():
        kind = int if name == "target_bytes" else float
        parser.add_argument(f"--{name}", type=kind, help=f"{what}; in place of the targets in the file")
    parser.add_argument("--evaluate", help="package.module:function from a network to its accuracy")
    networks.output_options(parser)


def run(options: Namespace) -> int:
    """Compress as a recipe says."""
    config = CompressionConfig.from_yaml(options.recipe)
    if config.search:
        raise InputError(f"{options.recipe} asks for a search (evolutionary): use lightning-compress search.")
    files = networks.output_files(options)
    network = networks.trained(options, options.checkpoint)
    with networks.from_here():
        judge = networks.import_(options.evaluate) if options.evaluate else None
        result = compress_to(
            network,
            config,
            **{name: options[name] for name in _TARGETS},
            evaluate=judge,
            example_input=networks.example(network, options.example_shape),
            data=networks.inputs(network, options.data),
        )
    sizes = networks.write(options, files, network, result.model, result.coder)
    print(result, sizes, sep="\n\n")
    return 0 if result.target_met else UNMET


def search_options(parser: ArgumentParser) -> None:
    """Options of `search`; what is given there takes the place of what the file says."""
    parser.add_argument("space", help="YAML file: space, and settings of the search; or flat settings")
    networks.network_options(parser, shape_required=False)
    networks.data_options(parser)
    parser.add_argument("--objectives", nargs="+", help=f"what is to be small: {', '.join(NAMES)}")
    for name, (kind, default, what) in _SETTINGS.items():
        shown = f"{what} (default {default})" if default is not None else what
        parser.add_argument(f"--{name}", type=kind, help=shown)
    parser.add_argument("--resume", help="file of evaluations, .jsonl: a search that was killed goes on")
    parser.add_argument("--front", help="file for the best compromises, .csv or .json")
    parser.add_argument("--plot", help="figure of them, e.g. front.png")
    parser.add_argument("--workers", type=int, default=1, help="processes that evaluate")
    networks.output_options(parser)


def find(options: Namespace) -> int:
    """Search, write the front, and the best network under the target."""
    space, settings = _space(options.space)
    for name in (*_SETTINGS, "objectives"):
        if options[name] is not None:
            settings[name] = options[name]
    extra = [networks.writable(path, options.force) for path in (options.front, options.plot) if path]
    if options.front and extra[0].suffix not in (".csv", ".json"):
        raise InputError(f"--front {options.front}: allowed endings are .csv and .json.")
    files = networks.output_files(options)
    network = networks.trained(options, options.checkpoint)
    with networks.from_here(), workers(options.workers) as executor:
        result = search(
            network,
            space,
            **settings,
            resume=options.resume,
            example_input=networks.example(network, options.example_shape),
            data=networks.inputs(network, options.data),
            executor=executor,
        )
    if options.front:
        result.save(options.front)
    if options.plot:
        result.plot().figure.savefig(options.plot)  # type: ignore[union-attr]
    model = _chosen(result)
    sizes = networks.write(options, files, network, model, result.problem.coder)
    print(result, *(() if result.target_met else ("target NOT met",)), sizes, sep="\n\n")
    return 0 if result.target_met else UNMET


def _space(path: str) -> tuple[Any, dict[str, Any]]:
    """The space, and other arguments of `search`, from a file."""
    values = read_yaml(path)
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: needed is a mapping with space, or flat settings.")
    if "space" not in values:
        return CompressionConfig.from_yaml(path), {}
    check_keys(values, ["space", "objectives", "options", *_SETTINGS], path)
    return values["space"], {key: value for key, value in values.items() if key != "space"}


def _chosen(result: SearchResult) -> nn.Module:
    """The best model under the target; without one that fits, the smallest."""
    best = result.best() or min(result.rows, key=lambda row: row.values["size_fraction"])
    return result.model(best)


@contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """Processes to work in; none for a count below 2."""
    if count < 2:
        yield None
        return
    with ProcessPoolExecutor(min(count, os.cpu_count() or count), mp_context=get_context("spawn")) as pool:
        yield pool
