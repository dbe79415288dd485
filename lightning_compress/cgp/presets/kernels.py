"""Experiments on the kernels of convolutions: the ring around a core from the core, and the other way round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_compress.cgp.experiments import Experiment, Place
from lightning_compress.cgp.layers.choices import Choice, centre
from lightning_compress.cgp.presets.parts import LENET, PERFECT, Layer, at_thresholds, layers_of
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.settings import Settings


def all_layers(
    model: nn.Module,
    *,
    layers: Sequence[str] = LENET,
    core: int = 3,
    thresholds: Sequence[float] = PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """The ring of every kernel from the cores of all kernels of the same layer; layers share one circuit.

    Every layer is a data set, and multiplexers switch between them.

    Args:
        model: with int8 weights.
        layers: convolutions.
        core: side of the middle of a kernel.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: a layer is unknown, has no int8 weights, or no kernels larger than the core.

    Examples:
        >>> from lightning_compress.cgp.presets import all_layers
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> [(e.problem.inputs.shape, e.problem.loaded, e.problem.weights) for e in all_layers(net)]
        [((2, 864), 918, 1632)]
    """
    found = layers_of(model, layers)
    parts = [Choice("core", size=core).select(f.name, f.values) for f in found]
    problem = Problem.of(
        [p.inputs for p in parts],
        [f.flat[p.positions] for f, p in zip(found, parts, strict=True)],
        multiplex=multiplex,
        loaded=sum(p.loaded for p in parts),  # each data set has its own
    )
    places = [Place(f.key, p.positions) for f, p in zip(found, parts, strict=True)]
    return at_thresholds("all_layers", problem, places, thresholds, settings, runs)


def single_channel(
    model: nn.Module,
    *,
    layers: Sequence[str] = ("conv1",),
    channel: int = 0,
    core: int = 3,
    thresholds: Sequence[float] = PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """The rings of one input channel of all filters from their cores.

    Args:
        model: with int8 weights.
        layers: convolutions, one experiment for each.
        channel: which input channel.
        core: side of the middle of a kernel.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: a layer is unknown, has no int8 weights, no such channel, or no kernels larger than the core.

    Examples:
        >>> from lightning_compress.cgp.presets import single_channel
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> [(e.name, e.problem.loaded, e.problem.weights) for e in single_channel(net)]
        [('single_channel_conv1_0_t0', 54, 96)]
    """
    result = []
    for found in layers_of(model, layers):
        inner = centre(found.name, found.values.shape, core)
        if not 0 <= channel < found.values.shape[1]:
            raise ValueError(
                f"channel={channel}: {found.name} of shape {found.values.shape} has channels 0 to "
                f"{found.values.shape[1] - 1}."
            )
        part = np.zeros_like(inner)
        part[:, channel] = True
        name = f"single_channel_{found.name}_{channel}"
        result += _from_to(found, name, part & inner, part & ~inner, thresholds, settings, runs, multiplex)
    return result


def single_filter(
    model: nn.Module,
    *,
    layers: Sequence[str] = LENET,
    count: int = 1,
    core: int = 3,
    thresholds: Sequence[float] = PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """The ring of one kernel from its core, for some kernels.

    Args:
        model: with int8 weights.
        layers: convolutions.
        count: kernels, drawn from all of these layers with the seed of the settings; one experiment for each.
        core: side of the middle of a kernel.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments; their names end in the numbers of filter and input channel.

    Raises:
        ValueError: a layer is unknown, has no int8 weights or no kernels larger than the core, or there are fewer.

    Examples:
        >>> from lightning_compress.cgp.presets import single_filter
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> [(e.problem.loaded, e.problem.weights) for e in single_filter(net, count=3)]
        [(9, 16), (9, 16), (9, 16)]
    """
    result = []
    for found, name, part, inner in _kernels(model, layers, count, core, settings):
        name = f"single_filter_{name}"
        result += _from_to(found, name, part & inner, part & ~inner, thresholds, settings, runs, multiplex)
    return result


def single_filter_zero_outer(
    model: nn.Module,
    *,
    layers: Sequence[str] = LENET,
    count: int = 1,
    core: int = 3,
    thresholds: Sequence[float] = PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """As ``single_filter``, with the ring set to 0 first: what a network loses without it.

    Args:
        model: with int8 weights.
        layers: convolutions.
        count: kernels, drawn from all of these layers with the seed of the settings; one experiment for each.
        core: side of the middle of a kernel.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: as ``single_filter``.

    Examples:
        >>> from lightning_compress.cgp.presets import single_filter_zero_outer
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> single_filter_zero_outer(net, multiplex=False)[0].problem.targets.any()
        np.False_
    """
    result = []
    for found, name, part, inner in _kernels(model, layers, count, core, settings):
        cleared = dataclasses.replace(found, values=np.where(part & ~inner, 0, found.values).astype(np.int8))
        name = f"single_filter_zero_outer_{name}"
        result += _from_to(cleared, name, part & inner, part & ~inner, thresholds, settings, runs, multiplex)
    return result


def reversed_single_filter(
    model: nn.Module,
    *,
    layers: Sequence[str] = LENET,
    count: int = 1,
    core: int = 3,
    thresholds: Sequence[float] = PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """The core of one kernel from its ring, for some kernels.

    Args:
        model: with int8 weights.
        layers: convolutions.
        count: kernels, drawn from all of these layers with the seed of the settings; one experiment for each.
        core: side of the middle of a kernel.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: as ``single_filter``.

    Examples:
        >>> from lightning_compress.cgp.presets import reversed_single_filter
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> [(e.problem.loaded, e.problem.weights) for e in reversed_single_filter(net)]
        [(16, 9)]
    """
    result = []
    for found, name, part, inner in _kernels(model, layers, count, core, settings):
        name = f"reversed_single_filter_{name}"
        result += _from_to(found, name, part & ~inner, part & inner, thresholds, settings, runs, multiplex)
    return result


def grid_size(
    model: nn.Module,
    *,
    layers: Sequence[str] = LENET,
    count: int = 1,
    core: int = 3,
    grids: Sequence[tuple[int, int]] = ((5, 5),),
    thresholds: Sequence[float] = PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """As ``single_filter``, on grids of several sizes.

    Args:
        model: with int8 weights.
        layers: convolutions.
        count: kernels, drawn from all of these layers with the seed of the settings; the same for every grid.
        core: side of the middle of a kernel.
        grids: rows and columns, one experiment for each.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold, rows and columns; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: as ``single_filter``.

    Examples:
        >>> from lightning_compress.cgp.presets import grid_size
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> [e.name.split("_")[-2] for e in grid_size(net, grids=[(5, 5), (8, 4)])]
        ['5x5', '8x4']
    """
    result = []
    for rows, cols in grids:
        chosen = dataclasses.replace(settings or Settings(), rows=rows, cols=cols)
        for found, name, part, inner in _kernels(model, layers, count, core, settings):
            name = f"grid_size_{name}_{rows}x{cols}"
            result += _from_to(found, name, part & inner, part & ~inner, thresholds, chosen, runs, multiplex)
    return result


def _kernels(
    model: nn.Module, names: Sequence[str], count: int, core: int, settings: Settings | None
) -> Iterator[tuple[Layer, str, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """Drawn kernels: layer, name, which of its weights they are, and which weights are cores."""
    found = layers_of(model, names)
    inner = [centre(f.name, f.values.shape, core) for f in found]
    every = [
        (i, o, c) for i, f in enumerate(found) for o in range(len(f.values)) for c in range(f.values.shape[1])
    ]
    if not 1 <= count <= len(every):
        raise ValueError(
            f"count={count}: {', '.join(names)} have {len(every)} kernels; allowed is 1 to that."
        )
    random = np.random.default_rng((settings or Settings()).seed)
    for drawn in sorted(random.choice(len(every), count, replace=False).tolist()):
        i, o, c = every[drawn]
        part = np.zeros_like(inner[i])
        part[o, c] = True
        yield found[i], f"{found[i].name}_{o}_{c}", part, inner[i]


def _from_to(
    layer: Layer,
    name: str,
    given: npt.NDArray[np.bool_],
    wanted: npt.NDArray[np.bool_],
    thresholds: Sequence[float],
    settings: Settings | None,
    runs: int,
    multiplex: bool,
) -> list[Experiment]:
    """Some weights of a layer from others of it."""
    problem = Problem.of([layer.values[given]], [layer.values[wanted]], multiplex=multiplex)
    place = Place(layer.key, np.flatnonzero(wanted))
    return at_thresholds(name, problem, [place], thresholds, settings, runs)
