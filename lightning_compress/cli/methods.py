"""Verbs that apply one method; their options are the fields of its transform."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from lightning_compress.cli import networks
from lightning_compress.cli.networks import InputError
from lightning_compress.compress import compress
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.lowrank import Factorize
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.sharing import ShareWeights
from lightning_compress.transform import Transform

T = TypeVar("T", bound=Transform)

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


def _add_options(kind: type[Transform], fuse: str, parser: ArgumentParser) -> None:
    """The fields of a transform as options, with their types, defaults and descriptions, and those of all methods."""
    networks.network_options(parser, shape_required=False)
    parser.add_class_arguments(kind, as_group=False, skip={*_TEXTS, *_LISTS, *_LEFT_OUT})
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in _TEXTS:
            named = field.default if isinstance(field.default, str) else "per_channel"
            parser.add_argument(f"--{field.name}", default=named, help=_TEXTS[field.name])
        if field.name in _LISTS:
            given: Any = field.default
            default = given if isinstance(given, str) else list(given)
            parser.add_argument(f"--{field.name}", nargs="+", default=default, **_LISTS[field.name])
    networks.data_options(parser)
    parser.add_argument(
        "--fuse", action="store_true", help=f"fold BatchNorm into the layer before it, {fuse}"
    )
    networks.output_options(parser)


prune_options = partial(_add_options, Prune, "after pruning")
remove_channels_options = partial(_add_options, RemoveChannels, "after removing channels")
factorize_options = partial(_add_options, Factorize, "before factorizing")
share_options = partial(_add_options, ShareWeights, "before sharing")
quantize_options = partial(_add_options, Quantize, "before quantizing")


def prune(options: Namespace) -> None:
    """Zero weights."""
    _compress(options, [_transform(Prune, options), *_fused(options)])


def remove_channels(options: Namespace) -> None:
    """Take channels out."""
    if options.example_shape is None and options.data in (None, *networks.SAMPLERS):
        raise InputError(
            "remove-channels runs the network to see which channels belong together: give --example_shape, e.g. "
            "1 3 32 32, or inputs with --data."
        )
    _compress(options, [_transform(RemoveChannels, options), *_fused(options)])


def factorize(options: Namespace) -> None:
    """Write weights as products."""
    _compress(options, [*_fused(options), _transform(Factorize, options)])


def share(options: Namespace) -> None:
    """Let weights share values."""
    _compress(options, [*_fused(options), _transform(ShareWeights, options)])


def quantize(options: Namespace) -> None:
    """Put weights on few bits."""
    _compress(options, [*_fused(options), _transform(Quantize, options)])


def _fused(options: Namespace) -> list[Transform]:
    return [FuseBatchNorm()] if options.fuse else []


def _compress(options: Namespace, steps: Sequence[Transform]) -> None:
    """Compress a trained network and write what came out."""
    files = networks.output_files(options)
    network = networks.trained(options, options.checkpoint)
    example = networks.example(network, options.example_shape)
    result = compress(network, steps, example_input=example, data=networks.inputs(network, options.data))
    sizes = networks.write(options, files, network, result.model)
    print(result, sizes, sep="\n\n")


def _transform(kind: type[T], options: Namespace) -> T:
    """A transform from the options that `_add_options` added."""
    names = (field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]
    values = {name: options[name] for name in names if name not in _LEFT_OUT}
    with networks.from_here():  # the criterion may be a function there
        return kind(**values)
