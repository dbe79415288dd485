"""Which weights are computed from which others: options of presets and of the search."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.layers.integers import all_int8
from lightning_compress.cgp.presets import PRESETS
from lightning_compress.cgp.search.settings import Settings
from lightning_compress.cli import networks
from lightning_compress.cli.networks import InputError
from lightning_compress.compress import compress
from lightning_compress.energy import EnergyTable
from lightning_compress.quantization.quantize import Quantize

_GRANULARITIES = ("per_tensor", "per_channel")
_OWN: dict[str, dict[str, Any]] = {  # options of presets, each for those that have it
    "layers": {"nargs": "+", "help": "that are computed, by name"},
    "inputs": {"help": "of layer_bypass: layer whose weights are read"},
    "outputs": {"help": "of layer_bypass: layer that is computed"},
    "core": {"type": int, "help": "side of the middle of a kernel"},
    "channel": {"type": int, "help": "of single_channel: which input channel"},
    "count": {"type": int, "help": "kernels that are drawn; of mobilenet: weights that are given"},
    "grids": {"nargs": "+", "help": "of grid_size: ROWSxCOLS, e.g. 5x5 8x4"},
}
_GRIDS = {"mobilenet": (256, 31)}  # rows and columns where they are not the usual ones


def network_options(parser: ArgumentParser) -> None:
    """Add the options that `network` reads."""
    networks.network_options(parser, shape_required=False)
    parser.add_argument(
        "--quantize",
        help=f"for float weights: make them int8 first, with scales {' or '.join(_GRANULARITIES)}",
    )


def search_options(parser: ArgumentParser) -> None:
    """Add the options that `settings` reads."""
    parser.add_class_arguments(
        Settings,
        as_group=False,
        skip={"energy", "functions", "error_threshold", "rows", "cols"},
    )
    parser.add_argument("--rows", type=int, help="gates of a column (default: 64, mobilenet 256)")
    parser.add_argument("--cols", type=int, help="columns (default: 16, mobilenet 31)")
    parser.add_argument("--functions", nargs="+", default=["standard"], help="ids, or standard")
    parser.add_argument("--energy", help="CSV file of costs: id, name, energy_pj, area_um2, delay")
    parser.add_argument("--runs", type=int, help="that differ in their random numbers")
    parser.add_argument(
        "--multiplex", type=bool, default=True, help="one output for each value; false: for each weight"
    )


def preset_options(parser: ArgumentParser) -> None:
    """Add the options of presets themselves."""
    for name, how in _OWN.items():
        parser.add_argument(f"--{name}", **how)


def network(options: Namespace) -> nn.Module:
    """The network with int8 weights."""
    if options.quantize not in (None, *_GRANULARITIES):
        raise InputError(f"--quantize {options.quantize}: allowed are {', '.join(_GRANULARITIES)}.")
    model = networks.trained(options, options.checkpoint)
    quantized = any(all_int8(model))
    if options.quantize and quantized:
        raise InputError(f"{options.checkpoint} has int8 weights already: leave --quantize out.")
    if not options.quantize and not quantized:
        raise InputError(
            f"{options.checkpoint or options.model} has no int8 weights: quantize first (lightning-compress quantize "
            f"--bits 8), or give --quantize {' or '.join(_GRANULARITIES)}."
        )
    if quantized:
        return model
    return compress(model, [Quantize(8, granularity=options.quantize)]).model


def settings(options: Namespace, preset: str = "") -> Settings:
    """Of the search; thresholds are set by experiments."""
    left_out = ("energy", "functions", "error_threshold", "rows", "cols")
    values = {f.name: options[f.name] for f in dataclasses.fields(Settings) if f.name not in left_out}
    rows, cols = _GRIDS.get(preset, (Settings.rows, Settings.cols))
    return Settings(
        **values,
        rows=rows if options.rows is None else options.rows,
        cols=cols if options.cols is None else options.cols,
        functions=_functions(options.functions),
        energy=table(options),
    )


def table(options: Namespace) -> EnergyTable | None:
    """Costs from --energy."""
    return EnergyTable.from_csv(options.energy) if options.energy else None


def experiments(preset: str, options: Namespace, thresholds: list[float] | None) -> list[Experiment]:
    """Those of a preset; the network is not needed for worst_case."""
    make = PRESETS[preset]
    allowed = inspect.signature(make).parameters
    given = {name: options[name] for name in _OWN if options[name] is not None}
    foreign = [f"--{name}" for name in given if name not in allowed]
    if foreign:
        own = ", ".join(f"--{name}" for name in _OWN if name in allowed) or "none"
        raise InputError(f"preset {preset} does not take {', '.join(foreign)}; options of its own: {own}.")
    if "grids" in given:
        given["grids"] = [_grid(text) for text in given["grids"]]
    if options.runs is not None:
        given["runs"] = options.runs
    if thresholds is not None:
        given["thresholds"] = thresholds
    model = None if preset == "worst_case" else network(options)
    return make(model, settings=settings(options, preset), multiplex=options.multiplex, **given)


def check_preset(name: str) -> str:
    """The name, if there is such a preset."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown; there are: {', '.join(PRESETS)}.")
    return name


def _functions(given: list[str]) -> str | tuple[int, ...]:
    if given == ["standard"]:
        return "standard"
    try:
        return tuple(map(int, given))
    except ValueError:
        raise InputError(f"--functions {' '.join(given)}: allowed are standard, or ids.") from None


def _grid(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdigit() and cols.isdigit()):
        raise InputError(f"--grids {text}: needed is ROWSxCOLS, e.g. 5x5.")
    return int(rows), int(cols)
