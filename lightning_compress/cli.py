"""The command line, ``lightning-compress VERB``: compress a trained network, export it, look into files, measure.

A verb is a pair: a function that adds its options to a parser, and one that does the work. The options of a method
are read from its transform, so they are written once. Input that cannot be used ends in one line on stderr and exit
code 2.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import Tensor, nn

from lightning_compress import archive, models
from lightning_compress.archive import baseline_sizes
from lightning_compress.benchmark import benchmark
from lightning_compress.checkpoints import load_weights
from lightning_compress.compress import compress
from lightning_compress.container import replacing
from lightning_compress.export import export_onnx
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.lowrank import Factorize
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.stats.calibration import SAMPLERS
from lightning_compress.stats.running import call, evaluating
from lightning_compress.tables import text
from lightning_compress.transform import Transform

T = TypeVar("T", bound=Transform)
_OPTION = re.compile(r"(?<=^--)\w[\w-]*")
_SAMPLERS = (*SAMPLERS, "batchnorm")


class InputError(ValueError):
    """Something on the command line that cannot be used; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: arguments; those of the process if None. Option names may be written with dashes or underscores.

    Returns:
        Exit code: 0, or 2 for input that cannot be used, with one line on stderr.

    Examples:
        >>> main(["inspect", "missing.lcz"])
        2
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        options = _parser().parse_args(
            [_OPTION.sub(lambda name: name[0].replace("-", "_"), a) for a in given]
        )
        _VERBS[options.verb][2](options[options.verb])
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ArgumentError, ValueError, OSError, ImportError) as error:
        print(f"lightning-compress: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# -- verbs ---------------------------------------------------------------------------------------------------


def _prune(options: Namespace) -> None:
    _compress(options, [_transform(Prune, options), *([FuseBatchNorm()] if options.fuse else [])])


def _remove_channels(options: Namespace) -> None:
    if options.example_shape is None and options.data in (None, *_SAMPLERS):
        raise InputError(
            "remove-channels runs the network to see which channels belong together: give --example_shape, e.g. "
            "1 3 32 32, or inputs with --data."
        )
    _compress(options, [_transform(RemoveChannels, options), *([FuseBatchNorm()] if options.fuse else [])])


def _factorize(options: Namespace) -> None:
    _compress(options, [*([FuseBatchNorm()] if options.fuse else []), _transform(Factorize, options)])


def _quantize(options: Namespace) -> None:
    _compress(options, [*([FuseBatchNorm()] if options.fuse else []), _transform(Quantize, options)])


def _compress(options: Namespace, steps: Sequence[Transform]) -> None:
    """Compress a trained network and write what came out."""
    files = [_writable(path, options.force) for path in (options.output, options.state_dict) if path]
    if len(files) > len(set(files)):
        raise InputError(f"--output and --state_dict are both {options.output}: give two names.")
    network = _trained(options, options.checkpoint)
    example = _example(network, options.example_shape)
    result = compress(network, steps, example_input=example, data=_inputs(network, options.data))
    info = archive.save(result.model, files[0])
    if options.state_dict:
        with replacing(files[1]) as file:
            torch.save(result.model.state_dict(), file)
    given = archive.dense_bytes(network)  # a method may have made the network itself smaller
    files_of = {**baseline_sizes(result.model), options.output: info.file_bytes}
    sizes = [[how, size, given / size] for how, size in files_of.items()]
    print(result, text(["file of the result", "bytes", "compression ratio"], sizes), sep="\n\n")


def _export(options: Namespace) -> None:
    file = _writable(options.output, options.force)
    network = _trained(options, options.checkpoint)
    given = _inputs(network, options.data)
    x = given if isinstance(given, Tensor) else _example(network, options.example_shape)
    how = {name: options[name] for name in ("precision", "check", "reduce_range")}
    print(export_onnx(network, x, file, **how))


def _inspect(options: Namespace) -> None:
    print(archive.inspect(options.path))


def _benchmark(options: Namespace) -> None:
    file = _writable(options.output, options.force) if options.output else None
    network = _trained(options, options.checkpoint)
    original = _trained(options, options.baseline) if options.baseline else None
    print(benchmark(network, _example(network, options.example_shape), baseline=original, output=file))


def _writable(path: str, force: bool) -> Path:
    file = Path(path)
    if not file.parent.is_dir():
        raise InputError(f"the folder {file.parent} of {path} does not exist: make it first.")
    if file.exists() and not force:
        raise InputError(f"{path} exists: choose another name, or replace it with --force.")
    return file


def _transform(kind: type[T], options: Namespace) -> T:
    """A transform from the options that `_transform_options` added."""
    names = (field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    values = {name: options[name] for name in names if name not in _LEFT_OUT}
    with _from_here():  # the criterion may be a function there
        return kind(**values)


def _inputs(model: nn.Module, name: str | None) -> Any:
    """Calibration inputs: a sampler name, the array in a file, or what a function of the user returns."""
    if name is None or name in _SAMPLERS:
        return name
    if ":" in name:
        with _from_here():
            return _import(name)()
    if not Path(name).is_file():
        raise InputError(
            f"--data {name} is no file; allowed are an .npy file of inputs, package.module:callable that returns "
            f"batches or a loader, and {', '.join(_SAMPLERS)}."
        )
    try:
        array = torch.from_numpy(np.load(name, allow_pickle=False))
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"--data {name} does not hold one numeric array (.npy): {error}") from error
    if array.dtype == torch.float64:  # NumPy's default, and rarely a network's
        array = array.float()
    return _accepted(model, array, f"the array in --data {name}, samples first", array[:2])


def _trained(options: Namespace, checkpoint: str | None) -> nn.Module:
    """The network in eval mode, with the weights of the checkpoint; without one, as built (with a fixed seed)."""
    name, arguments = options.model, options.model_args
    with _from_here(), torch.random.fork_rng():
        torch.manual_seed(0)
        build = _import(name) if ":" in name else lambda **kwargs: models.build(name, **kwargs)
        try:
            model = build(**arguments)
        except Exception as error:  # the user's own code
            raise InputError(
                f"--model {name} cannot be built with {arguments or 'no arguments'}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {name} returned {type(model).__name__}; needed is a torch.nn.Module.")
    return (load_weights(model, checkpoint, prefix=options.prefix) if checkpoint else model).eval()


def _example(model: nn.Module, shape: Sequence[int] | None) -> Tensor | None:
    """A seeded normal input that the network has accepted."""
    if shape is None:
        return None
    written = " ".join(map(str, shape))
    if min(shape) < 1:
        raise InputError(f"--example_shape {written}: every extent must be at least 1.")
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return _accepted(model, x, f"an input of --example_shape {written}", x)


def _accepted(model: nn.Module, x: Tensor, what: str, sample: Tensor) -> Tensor:
    """The input, after the network has run on a sample of it."""
    try:
        with evaluating(model):
            call(model, sample)
    except Exception as error:  # the user's own code
        raise InputError(f"{type(model).__name__} does not take {what}: {error}") from error
    return x


@contextmanager
def _from_here() -> Iterator[None]:
    """Modules in the working folder can be imported, as with ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _import(name: str) -> Callable[..., Any]:
    """What ``package.module:callable`` names."""
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # the user's own code
        raise InputError(f"{name}: {module} cannot be imported: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{name}: module {module} has no {attribute}.")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name} is a {type(found).__name__}; needed is a function or class.")
    return found  # type: ignore[no-any-return]


# -- options -------------------------------------------------------------------------------------------------


def _network_options(parser: ArgumentParser, *, shape_required: bool) -> None:
    """The options from which `_trained` and `_example` make a network and its input."""
    names = ", ".join(models.names())
    parser.add_argument(
        "--model", required=True, help=f"{names}; or package.module:callable that returns a network"
    )
    parser.add_argument(
        "--model_args", type=dict[str, Any], default={}, help="e.g. --model_args.num_classes 100"
    )
    parser.add_argument(
        "--checkpoint", help="its weights: .safetensors, .lcz, state dict or Lightning checkpoint"
    )
    parser.add_argument(
        "--prefix", help="what stands before the network's names in the checkpoint; mostly found out"
    )
    what = "one input with its batch axis, e.g. 1 3 32 32"
    parser.add_argument("--example_shape", type=int, nargs="+", required=shape_required, help=what)


_TEXTS = {  # options that may be a name, though the transform also takes an object
    "criterion": "magnitude, taylor, fisher, wanda, activation, batchnorm_scale, redundancy, random, or "
    "package.module:function",
    "pattern": "unstructured, channel, N:M such as 2:4, or block:SIZE such as block:4x1",
    "format": "int, log2, e4m3, e5m2, e3m4, e2m1, fp16 or bf16",
    "granularity": "per_channel, per_tensor or per_group:SIZE",
}
_LEFT_OUT = {"force"}  # of Factorize; on the command line it means to replace a file
_LISTS: dict[str, Any] = {  # one or more values after the option
    "include": {"help": "patterns of layer names to take"},
    "exclude": {"help": "patterns of layer names to leave"},
    "candidates": {"type": int, "help": 'for bits="auto": numbers of bits to choose from'},
}


def _transform_options(parser: ArgumentParser, kind: type[Transform]) -> None:
    """The fields of a transform as options, with their types, defaults and descriptions."""
    parser.add_class_arguments(kind, as_group=False, skip={*_TEXTS, *_LISTS, *_LEFT_OUT})
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in _TEXTS:
            named = field.default if isinstance(field.default, str) else "per_channel"
            parser.add_argument(f"--{field.name}", default=named, help=_TEXTS[field.name])
        if field.name in _LISTS:
            given: Any = field.default
            default = given if isinstance(given, str) else list(given)
            parser.add_argument(f"--{field.name}", nargs="+", default=default, **_LISTS[field.name])


def _compress_options(parser: ArgumentParser, kind: type[Transform], fuse: str) -> None:
    _network_options(parser, shape_required=False)
    _transform_options(parser, kind)
    data = f"calibration inputs: an .npy file, package.module:callable, or {', '.join(_SAMPLERS)}"
    parser.add_argument("--data", help=f"{data}; drawn to fit the network if left out")
    parser.add_argument(
        "--fuse", action="store_true", help=f"fold BatchNorm into the layer before it, {fuse}"
    )
    parser.add_argument("--output", required=True, help="archive to write, e.g. net.lcz")
    parser.add_argument("--state_dict", help="also write the plain state dict, to use without this library")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def _prune_options(parser: ArgumentParser) -> None:
    _compress_options(parser, Prune, "after pruning")


def _remove_channels_options(parser: ArgumentParser) -> None:
    _compress_options(parser, RemoveChannels, "after removing channels")


def _factorize_options(parser: ArgumentParser) -> None:
    _compress_options(parser, Factorize, "before factorizing")


def _quantize_options(parser: ArgumentParser) -> None:
    _compress_options(parser, Quantize, "before quantizing")


def _export_options(parser: ArgumentParser) -> None:
    _network_options(parser, shape_required=True)
    parser.add_argument("--data", help="inputs to compare the file with the network on: an .npy file")
    parser.add_argument("--precision", default="int8", help="int8 or float32")
    parser.add_argument("--check", type=bool, default=True, help="compare the outputs in ONNX Runtime")
    parser.add_argument(
        "--reduce_range", type=bool, default=False, help="7-bit weights, for x86 without VNNI"
    )
    parser.add_argument("--output", required=True, help="file to write, e.g. net.onnx")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


def _inspect_options(parser: ArgumentParser) -> None:
    parser.add_argument("path", help="the archive")


def _benchmark_options(parser: ArgumentParser) -> None:
    _network_options(parser, shape_required=True)
    parser.add_argument("--baseline", help="weights of the original, to compare with")
    parser.add_argument("--output", help="also write the report as JSON")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")


_VERBS: dict[str, tuple[str, Callable[[ArgumentParser], None], Callable[[Namespace], None]]] = {
    "prune": ("zero weights of a trained network and write an .lcz archive", _prune_options, _prune),
    "remove-channels": (
        "take channels out of a trained network and write an .lcz archive",
        _remove_channels_options,
        _remove_channels,
    ),
    "factorize": (
        "write weights as products of thinner ones and write an .lcz archive",
        _factorize_options,
        _factorize,
    ),
    "quantize": ("put a trained network on few bits and write an .lcz archive", _quantize_options, _quantize),
    "export": ("write a quantized network as an ONNX file of integers", _export_options, _export),
    "inspect": ("check an .lcz archive and show what it holds", _inspect_options, _inspect),
    "benchmark": ("time a network and measure its memory", _benchmark_options, _benchmark),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-compress", description="Compress trained PyTorch networks.", exit_on_error=False
    )
    verbs = parser.add_subcommands(dest="verb")
    for name, (description, add_options, _) in _VERBS.items():
        verb = ArgumentParser(description=f"{description[0].upper()}{description[1:]}.", exit_on_error=False)
        add_options(verb)
        verbs.add_subcommand(name, verb, help=description)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
