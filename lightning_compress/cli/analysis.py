"""The verb `analyze`: what a trained network can bear, as a report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from lightning_compress import models
from lightning_compress.analysis import Analysis, analyze, quick, write_report
from lightning_compress.analysis.techniques import GROUPS, Grid
from lightning_compress.benchmark import benchmark
from lightning_compress.cli import networks
from lightning_compress.cli.networks import InputError
from lightning_compress.cli.recipes import UNMET, workers
from lightning_compress.stats.samplers import KINDS

_EXPORTS = ("all", "best", "none")
_LISTS = {
    "pruning_amounts": (float, "shares of zeros"),
    "quantization_bits": (int, "bits of integers"),
    "student_ratios": (float, "shares of the parameters that students have"),
}


def analyze_options(parser: ArgumentParser) -> None:
    """Options of `analyze`."""
    names = ", ".join(models.names())
    parser.add_argument(
        "network",
        help=f"file of weights (.lcz .safetensors .pth .pt .ckpt); {names}; or package.module:callable",
    )
    parser.add_argument(
        "--factory", help="architecture for a file of weights, named likewise; without: weights alone"
    )
    parser.add_argument(
        "--model_args", type=dict[str, Any], default={}, help="e.g. --model_args.num_classes 100"
    )
    parser.add_argument(
        "--prefix", help="what stands before the network's names in the file; mostly found out"
    )
    parser.add_argument("--rebuild", help='"mlp:tanh" makes a chain of Linear layers of weights alone')
    parser.add_argument("-o", "--output_dir", default="compression_results", help="folder for all files")
    parser.add_argument(
        "--example_shape", type=int, nargs="+", help="one input with its batch axis, e.g. 1 3 32 32"
    )
    parser.add_argument("--sampler", default="auto", help=f"of inputs: auto, {', '.join(KINDS)}")
    parser.add_argument("--data", help="inputs instead: an .npy file, or package.module:callable")
    parser.add_argument(
        "--test_data", help="batches (inputs, targets) to evaluate on: package.module:callable"
    )
    parser.add_argument("--task", default="auto", help="classification, regression or auto")
    parser.add_argument("--samples", type=int, default=1000, help="inputs to judge by")
    parser.add_argument("--quick", action="store_true", help="the gentlest technique that reaches the target")
    parser.add_argument("--target_compression", type=float, default=5.0, help="ratio for --quick")
    parser.add_argument("--max_ber", type=float, default=0.3, help="output error rate for --quick")
    parser.add_argument(
        "--benchmark", nargs="+", help=f"only these groups or techniques: {', '.join(GROUPS)}"
    )
    for name, (kind, what) in _LISTS.items():
        parser.add_argument(f"--{name}", type=kind, nargs="*", default=list(getattr(Grid, name)), help=what)
    parser.add_argument("--no_train_students", action="store_true", help="leave students as they are made")
    parser.add_argument("--student_steps", type=int, default=2000, help="optimizer steps of each student")
    parser.add_argument("--no_combine", action="store_true", help="run no combined pipelines")
    parser.add_argument(
        "--ber_thresholds",
        type=float,
        nargs="*",
        default=[0.01, 0.05, 0.1, 0.2, 0.3],
        help="to name the best for",
    )
    parser.add_argument(
        "--no_ber_analysis", action="store_true", help="no text and figure of errors against ratios"
    )
    parser.add_argument("--bit_errors", action="store_true", help="also flip bits in the stored codes")
    parser.add_argument("--measure", action="store_true", help="also time every model and take its memory")
    parser.add_argument("--export", default="all", help="archives to keep: all, best (the front) or none")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the whole report")


def run(options: Namespace) -> int:
    """Analyze, and write the report."""
    if options.export not in _EXPORTS:
        raise InputError(f"--export {options.export}: allowed are {', '.join(_EXPORTS)}.")
    source, model = _network(options)
    example = None
    if options.example_shape is not None and (model or isinstance(source, nn.Module) or options.rebuild):
        example = _drawn(options.example_shape)
    shared: dict[str, Any] = {
        "model": model,
        "rebuild": options.rebuild,
        "example_input": example,
        "input_sampler": options.sampler,
        "data": _data(options, model or source),
        "train_students": not options.no_train_students,
    }
    for name in (
        "task",
        "samples",
        "student_ratios",
        "student_steps",
        "ber_thresholds",
        "output_dir",
        "seed",
        "device",
    ):
        shared[name] = options[name]
    met = True
    with networks.from_here():
        if options.quick:
            found = quick(
                source, target_compression=options.target_compression, max_ber=options.max_ber, **shared
            )
            result, met, last = found.analysis, found.target_met, str(found)
        else:
            with workers(options.workers) as executor:
                result = analyze(
                    source,
                    techniques=options.benchmark or "all",
                    pruning_amounts=options.pruning_amounts,
                    quantization_bits=options.quantization_bits,
                    combine=not options.no_combine,
                    metrics=_metrics(options, example),
                    executor=executor,
                    **shared,
                )
            last = str(result)
        result = _further(result, options)
    files = write_report(result, options.output_dir, ber=not options.no_ber_analysis)
    for row in result.rows:  # the report is written, and nothing is to go on from here
        if options.export == "none" or (options.export == "best" and not row.pareto):
            result.workshop.path(row.name).unlink(missing_ok=True)
    print(result.report_text() if options.verbose else last)
    print(f"\n{len(files)} files in {options.output_dir}, among them compression_report.txt and report.html")
    return 0 if met else UNMET


def _network(options: Namespace) -> tuple[Any, nn.Module | None]:
    """What to analyze, and its architecture if that is given beside it."""
    name = options.network
    if Path(name).is_file():
        model = None
        if options.factory:
            model = networks.trained(_named(options, options.factory), None)
            if options.prefix is not None:
                return networks.trained(_named(options, options.factory), name), None
        return name, model
    if options.factory:
        raise InputError(f"there is no file {name} of weights for --factory {options.factory}.")
    if ":" not in name and (
        os.sep in name or Path(name).suffix in (".lcz", ".safetensors", ".pth", ".pt", ".ckpt")
    ):
        raise InputError(f"there is no file {name}.")
    return networks.trained(_named(options, name), None), None


def _named(options: Namespace, name: str) -> Namespace:
    return Namespace(  # type: ignore[no-untyped-call]
        model=name, model_args=options.model_args, prefix=options.prefix
    )


def _drawn(shape: list[int]) -> Tensor:
    if min(shape) < 1:
        raise InputError(f"--example_shape {' '.join(map(str, shape))}: every extent must be at least 1.")
    return torch.zeros(*shape)


def _data(options: Namespace, model: Any) -> Any:
    if options.data is None:
        return None
    if not isinstance(model, nn.Module):
        raise InputError("--data needs a network that runs: give --factory.")
    if options.data in networks.SAMPLERS:
        raise InputError(f"--data {options.data} is a sampler: write --sampler {options.data}.")
    return networks.inputs(model, options.data)


def _metrics(options: Namespace, example: Any) -> dict[str, Any]:
    if not options.measure:
        return {}
    if example is None:
        raise InputError("--measure runs the network: give --example_shape.")
    return {name: _Measured(name, example) for name in ("latency_ms", "peak_memory_bytes")}


class _Measured:
    """One number of ``benchmark``; it can be sent to other processes."""

    def __init__(self, name: str, example: Any) -> None:
        self.name, self.example = name, example

    def __call__(self, model: nn.Module) -> float:
        return float(getattr(benchmark(model, self.example, layerwise=False), self.name))


def _further(result: Analysis, options: Namespace) -> Analysis:
    """What is asked for beyond the rows."""
    if options.bit_errors:
        result = result.with_bit_errors()
    if options.test_data:
        result = result.evaluate_with_data(networks.import_(options.test_data)())
    return result
