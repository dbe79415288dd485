"""The known experiments: which weights of a quantized network are computed from which others.

Names of layers are those of LeNet-5 unless others are given; any model with int8 weights will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_compress.cgp.choices import Choice, centre
from lightning_compress.cgp.experiments import Experiment, Place
from lightning_compress.cgp.functions import STANDARD, Int8
from lightning_compress.cgp.integers import all_int8, find_int8
from lightning_compress.cgp.problem import Ints, Problem
from lightning_compress.cgp.settings import Settings

_LENET = ("conv1", "conv2")
_BYPASS = (250.0, 150.0, 100.0, 50.0, 25.0, 15.0, 10.0, 0.0)
_PERFECT = (0.0,)


def layer_bypass(
    model: nn.Module,
    *,
    inputs: str = "conv1",
    outputs: str = "conv2",
    thresholds: Sequence[float] = _BYPASS,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """All weights of one layer from all weights of another.

    Args:
        model: with int8 weights.
        inputs: layer that is read.
        outputs: layer that is computed.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: a layer is unknown or has no int8 weights, or both are the same.

    Examples:
        >>> from lightning_compress.cgp.presets import layer_bypass
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> first = layer_bypass(net)[0]
        >>> first.name, first.problem.loaded, first.problem.weights
        ('layer_bypass_conv1_conv2_t250', 150, 2400)
    """
    source, wanted = _layer(model, inputs), _layer(model, outputs)
    if source.key == wanted.key:
        raise ValueError(
            f"inputs and outputs are both the {source.values.size} weights of {source.key}: name two layers."
        )
    problem = Problem.of([source.flat], [wanted.flat], multiplex=multiplex)
    return _at(
        f"layer_bypass_{source.name}_{wanted.name}", problem, [wanted.whole], thresholds, settings, runs
    )


def le_selector(
    model: nn.Module,
    *,
    layers: Sequence[str] = _LENET,
    thresholds: Sequence[float] = _PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """All weights of some layers from nothing but the constant 0.

    Every layer is a data set; as all of them have the same input and functions that know of data sets are left out,
    the circuit is that of a single one.

    Args:
        model: with int8 weights.
        layers: that are computed.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: a layer is unknown or has no int8 weights.

    Examples:
        >>> from lightning_compress.cgp.presets import le_selector
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> [(e.name, e.problem.loaded, e.problem.weights) for e in le_selector(net)]
        [('le_selector_t0', 0, 2550)]
    """
    found = _layers(model, layers)
    zero = np.zeros(1, dtype=np.int8)
    problem = Problem.of([zero] * len(found), [f.flat for f in found], multiplex=multiplex, loaded=0)
    chosen = settings or Settings()
    if isinstance(chosen.functions, str):
        chosen = dataclasses.replace(chosen, functions=STANDARD)
    return _at("le_selector", problem, [f.whole for f in found], thresholds, chosen, runs)


def all_layers(
    model: nn.Module,
    *,
    layers: Sequence[str] = _LENET,
    core: int = 3,
    thresholds: Sequence[float] = _PERFECT,
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
        >>> [(e.problem.inputs.shape, e.problem.weights) for e in all_layers(net)]
        [((2, 864), 1632)]
    """
    found = _layers(model, layers)
    parts = [Choice("core", size=core).select(f.name, f.values) for f in found]
    problem = Problem.of(
        [p.inputs for p in parts],
        [f.flat[p.positions] for f, p in zip(found, parts, strict=True)],
        multiplex=multiplex,
    )
    places = [Place(f.key, p.positions) for f, p in zip(found, parts, strict=True)]
    return _at("all_layers", problem, places, thresholds, settings, runs)


def single_channel(
    model: nn.Module,
    *,
    layers: Sequence[str] = ("conv1",),
    channel: int = 0,
    core: int = 3,
    thresholds: Sequence[float] = _PERFECT,
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
    for found in _layers(model, layers):
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
    layers: Sequence[str] = _LENET,
    count: int = 1,
    core: int = 3,
    thresholds: Sequence[float] = _PERFECT,
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
    layers: Sequence[str] = _LENET,
    count: int = 1,
    core: int = 3,
    thresholds: Sequence[float] = _PERFECT,
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
    layers: Sequence[str] = _LENET,
    count: int = 1,
    core: int = 3,
    thresholds: Sequence[float] = _PERFECT,
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
    layers: Sequence[str] = _LENET,
    count: int = 1,
    core: int = 3,
    grids: Sequence[tuple[int, int]] = ((5, 5),),
    thresholds: Sequence[float] = _PERFECT,
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


def worst_case(
    model: nn.Module | None = None,
    *,
    thresholds: Sequence[float] = _PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """All 256 values of int8 from 65 of them, every fourth and 127: no weights of a layer ask for more.

    Args:
        model: not used.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes the defaults.
        runs: of every experiment.
        multiplex: one output for each different value that is no input; False: one for each value.

    Returns:
        The experiments; they belong to no layer, so the name of their place is empty.

    Examples:
        >>> from lightning_compress.cgp.presets import worst_case
        >>> [(e.name, e.problem.inputs.shape[1], e.problem.weights) for e in worst_case()]
        [('worst_case_t0', 65, 256)]
    """
    values = np.arange(-128, 128)
    problem = Problem.of([[*range(-128, 128, 4), 127]], [values], multiplex=multiplex)
    return _at("worst_case", problem, [Place("", np.arange(len(values)))], thresholds, settings, runs)


def mobilenet(
    model: nn.Module,
    *,
    layers: Sequence[str] | None = None,
    count: int = 96,
    thresholds: Sequence[float] = (0.0, 1.0, 5.0, 11.0),
    settings: Settings | None = None,
    runs: int = 20,
    multiplex: bool = True,
) -> list[Experiment]:
    """All weights of a convolution from its first ones, in storage order.

    Args:
        model: with int8 weights.
        layers: which, one experiment for each; None: every convolution that has more weights than are given.
        count: weights that are given.
        thresholds: root mean square errors that are good enough, one experiment for each.
        settings: of the search, but for its threshold; None takes a grid of 256 x 31.
        runs: of every experiment.
        multiplex: one output for each different value; False: one for each weight.

    Returns:
        The experiments.

    Raises:
        ValueError: a layer is unknown, has no int8 weights or not more than are given, or no layer fits.

    Examples:
        >>> from lightning_compress.cgp.presets import mobilenet
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> [e.name for e in mobilenet(net, thresholds=[1])]
        ['mobilenet_conv1_t1', 'mobilenet_conv2_t1']
    """
    chosen = settings or Settings(rows=256, cols=31)
    if layers is None:
        every = (_Layer(key, values) for key, _, _, values, _ in all_int8(model))
        found = [f for f in every if f.values.ndim > 2 and f.values.size > count]
        if not found:
            raise ValueError(
                f"no convolution has more than {count} int8 weights: Quantize(8) first, or name layers."
            )
    else:
        found = _layers(model, layers)
    result = []
    for layer in found:
        part = Choice("first", size=count).select(layer.name, layer.values)
        problem = part.problem(layer.values, multiplex=multiplex)
        result += _at(f"mobilenet_{layer.name}", problem, [layer.whole], thresholds, chosen, runs)
    return result


PRESETS: dict[str, Callable[..., list[Experiment]]] = {
    f.__name__: f
    for f in (
        *(layer_bypass, le_selector, all_layers, single_channel, single_filter, single_filter_zero_outer),
        *(reversed_single_filter, grid_size, worst_case, mobilenet),
    )
}


# -- layers and their kernels --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """The int8 weights of one layer."""

    key: str
    values: Int8

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[0] or self.key

    @property
    def flat(self) -> Int8:
        return self.values.reshape(-1)

    @property
    def whole(self) -> Place:
        places: Ints = np.arange(self.values.size)
        return Place(self.key, places)


def _layer(model: nn.Module, name: str) -> _Layer:
    key, values, _ = find_int8(model, name)
    return _Layer(key, values)


def _layers(model: nn.Module, names: Sequence[str]) -> list[_Layer]:
    if not names or isinstance(names, str) or len(set(names)) < len(names):
        raise ValueError(f"layers={names!r}: needed is a list of names, each once.")
    return [_layer(model, name) for name in names]


def _kernels(
    model: nn.Module, names: Sequence[str], count: int, core: int, settings: Settings | None
) -> Iterator[tuple[_Layer, str, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]]:
    """Drawn kernels: layer, name, which of its weights they are, and which weights are cores."""
    found = _layers(model, names)
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


# -- experiments ---------------------------------------------------------------------------------------------


def _from_to(
    layer: _Layer,
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
    return _at(name, problem, [place], thresholds, settings, runs)


def _at(
    name: str,
    problem: Problem,
    places: Sequence[Place],
    thresholds: Sequence[float],
    settings: Settings | None,
    runs: int,
) -> list[Experiment]:
    """One experiment for every threshold."""
    if not thresholds:
        raise ValueError(f"{name} has no thresholds: give at least one.")
    return [
        Experiment(
            f"{name}_t{threshold:g}",
            problem,
            dataclasses.replace(settings or Settings(), error_threshold=threshold),
            tuple(places),
            runs,
        )
        for threshold in dict.fromkeys(map(float, thresholds))
    ]
