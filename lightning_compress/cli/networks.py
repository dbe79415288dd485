"""What all verbs share: which network, which inputs, which files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn

from lightning_compress import archive, models
from lightning_compress.checkpoints import load_weights
from lightning_compress.container import replacing
from lightning_compress.stats.drawing import SAMPLERS as DRAWN
from lightning_compress.stats.running import call, evaluating
from lightning_compress.tables import text

SAMPLERS = (*DRAWN, "batchnorm")


class InputError(ValueError):
    """Something on the command line that cannot be used; the message says what to do."""


def network_options(parser: ArgumentParser, *, shape_required: bool) -> None:
    """Add the options from which `trained` and `example` make a network and its input."""
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


def data_options(parser: ArgumentParser) -> None:
    """Add the option that `inputs` reads."""
    data = f"calibration inputs: an .npy file, package.module:callable, or {', '.join(SAMPLERS)}"
    parser.add_argument("--data", help=f"{data}; drawn to fit the network if left out")


def output_options(parser: ArgumentParser) -> None:
    """Add the options that `written` reads."""
    parser.add_argument("--output", required=True, help="archive to write, e.g. net.lcz")
    parser.add_argument("--state_dict", help="also write the plain state dict, to use without this library")
    parser.add_argument("--sidecar", action="store_true", help="also write what is in it as JSON beside it")
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def output_files(options: Namespace) -> list[Path]:
    """Where the archive goes, and the state dict if it is asked for; refused before any work if they cannot."""
    files = [writable(path, options.force) for path in (options.output, options.state_dict) if path]
    if len(files) > len(set(files)):
        raise InputError(f"--output and --state_dict are both {options.output}: give two names.")
    return files


def write(
    options: Namespace, files: Sequence[Path], network: nn.Module, result: nn.Module, coder: str = "auto"
) -> str:
    """Write the result; returns the table of its sizes."""
    info = archive.save(result, files[0], coder=coder, sidecar=options.sidecar)
    if options.state_dict:
        with replacing(files[1]) as file:
            torch.save(result.state_dict(), file)
    given = archive.dense_bytes(network)  # a method may have made the network itself smaller
    files_of = {**archive.baseline_sizes(result), options.output: info.file_bytes}
    sizes = [[how, size, given / size] for how, size in files_of.items()]
    return text(["file of the result", "bytes", "compression ratio"], sizes)


def writable(path: str, force: bool) -> Path:
    """A file that may be written."""
    file = Path(path)
    if not file.parent.is_dir():
        raise InputError(f"the folder {file.parent} of {path} does not exist: make it first.")
    if file.exists() and not force:
        raise InputError(f"{path} exists: choose another name, or replace it with --force.")
    return file


def inputs(model: nn.Module, name: str | None) -> Any:
    """Calibration inputs: a sampler name, the array in a file, or what a function of the user returns."""
    if name is None or name in SAMPLERS:
        return name
    if ":" in name:
        with from_here():
            return import_(name)()
    if not Path(name).is_file():
        raise InputError(
            f"--data {name} is no file; allowed are an .npy file of inputs, package.module:callable that returns "
            f"batches or a loader, and {', '.join(SAMPLERS)}."
        )
    try:
        array = torch.from_numpy(np.load(name, allow_pickle=False))
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"--data {name} does not hold one numeric array (.npy): {error}") from error
    if array.dtype == torch.float64:  # NumPy's default, and rarely a network's
        array = array.float()
    return accepted(model, array, f"the array in --data {name}, samples first", array[:2])


def trained(options: Namespace, checkpoint: str | None) -> nn.Module:
    """The network in eval mode, with the weights of the checkpoint; without one, as built (with a fixed seed)."""
    name, arguments = options.model, options.model_args
    with from_here(), torch.random.fork_rng():
        torch.manual_seed(0)
        build = import_(name) if ":" in name else lambda **kwargs: models.build(name, **kwargs)
        try:
            model = build(**arguments)
        except Exception as error:  # the user's own code
            raise InputError(
                f"--model {name} cannot be built with {arguments or 'no arguments'}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {name} returned {type(model).__name__}; needed is a torch.nn.Module.")
    return (load_weights(model, checkpoint, prefix=options.prefix) if checkpoint else model).eval()


def example(model: nn.Module, shape: Sequence[int] | None) -> Tensor | None:
    """A seeded normal input that the network has accepted."""
    if shape is None:
        return None
    written = " ".join(map(str, shape))
    if min(shape) < 1:
        raise InputError(f"--example_shape {written}: every extent must be at least 1.")
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return accepted(model, x, f"an input of --example_shape {written}", x)


def accepted(model: nn.Module, x: Tensor, what: str, sample: Tensor) -> Tensor:
    """The input, after the network has run on a sample of it."""
    try:
        with evaluating(model):
            call(model, sample)
    except Exception as error:  # the user's own code
        raise InputError(f"{type(model).__name__} does not take {what}: {error}") from error
    return x


@contextmanager
def from_here() -> Iterator[None]:
    """Modules in the working folder can be imported, as with ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def import_(name: str) -> Callable[..., Any]:
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
