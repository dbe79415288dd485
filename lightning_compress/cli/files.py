"""Verbs that export a network, look into a file, or measure."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from lightning_compress import archive
from lightning_compress.benchmark import benchmark
from lightning_compress.cli import networks
from lightning_compress.export import export_onnx


def export_options(parser: ArgumentParser) -> None:
    """Options of `export`."""
    networks.network_options(parser, shape_required=True)
    parser.add_argument("--data", help="inputs to compare the file with the network on: an .npy file")
    parser.add_argument("--precision", default="int8", help="int8 or float32")
    parser.add_argument("--check", type=bool, default=True, help="compare the outputs in ONNX Runtime")
    parser.add_argument(
        "--reduce_range", type=bool, default=False, help="7-bit weights, for x86 without VNNI"
    )
    parser.add_argument("--output", required=True, help="file to write, e.g. net.onnx")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def export(options: Namespace) -> None:
    """Write a quantized network as an ONNX file."""
    file = networks.writable(options.output, options.force)
    network = networks.trained(options, options.checkpoint)
    given = networks.inputs(network, options.data)
    x = given if isinstance(given, Tensor) else networks.example(network, options.example_shape)
    how = {name: options[name] for name in ("precision", "check", "reduce_range")}
    print(export_onnx(network, x, file, **how))


def inspect_options(parser: ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("path", help="the archive")
    parser.add_argument("--sizes", action="store_true", help="show where every byte of the file went")
    parser.add_argument("--tensor", help="name of a tensor: show its values; only what it needs is read")


def inspect(options: Namespace) -> None:
    """Show what an archive holds."""
    if options.tensor:
        tensor = archive.load_tensor(options.path, options.tensor)
        print(f"{options.tensor}: {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n{tensor}")
        return
    info = archive.inspect(options.path)
    print(info.size_report if options.sizes else info)


def benchmark_options(parser: ArgumentParser) -> None:
    """Options of `measure`."""
    networks.network_options(parser, shape_required=True)
    parser.add_argument("--baseline", help="weights of the original, to compare with")
    parser.add_argument("--output", help="also write the report as JSON")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def measure(options: Namespace) -> None:
    """Time a network."""
    file = networks.writable(options.output, options.force) if options.output else None
    network = networks.trained(options, options.checkpoint)
    original = networks.trained(options, options.baseline) if options.baseline else None
    x = networks.example(network, options.example_shape)
    print(benchmark(network, x, baseline=original, output=file))
