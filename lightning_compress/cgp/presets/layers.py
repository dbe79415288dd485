"""Experiments on whole layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from lightning_compress.cgp.experiments import Experiment, Place
from lightning_compress.cgp.layers.choices import Choice
from lightning_compress.cgp.layers.integers import all_int8
from lightning_compress.cgp.presets.parts import LENET, PERFECT, Layer, at_thresholds, layer_of, layers_of
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.settings import Settings

_BYPASS = (250.0, 150.0, 100.0, 50.0, 25.0, 15.0, 10.0, 0.0)


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
    source, wanted = layer_of(model, inputs), layer_of(model, outputs)
    if source.key == wanted.key:
        raise ValueError(
            f"inputs and outputs are both the {source.values.size} weights of {source.key}: name two layers."
        )
    problem = Problem.of([source.flat], [wanted.flat], multiplex=multiplex)
    return at_thresholds(
        f"layer_bypass_{source.name}_{wanted.name}", problem, [wanted.whole], thresholds, settings, runs
    )


def le_selector(
    model: nn.Module,
    *,
    layers: Sequence[str] = LENET,
    thresholds: Sequence[float] = PERFECT,
    settings: Settings | None = None,
    runs: int = 1,
    multiplex: bool = True,
) -> list[Experiment]:
    """All weights of some layers from nothing but the constant 0.

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
    found = layers_of(model, layers)
    weights = np.concatenate([f.flat for f in found])
    problem = Problem.of([[0]], [weights], multiplex=multiplex, loaded=0)
    return at_thresholds("le_selector", problem, [f.whole for f in found], thresholds, settings, runs)


def worst_case(
    model: nn.Module | None = None,
    *,
    thresholds: Sequence[float] = PERFECT,
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
    return at_thresholds(
        "worst_case", problem, [Place("", np.arange(len(values)))], thresholds, settings, runs
    )


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
        every = (Layer(key, values) for key, _, _, values, _ in all_int8(model))
        found = [f for f in every if f.values.ndim > 2 and f.values.size > count]
        if not found:
            raise ValueError(
                f"no convolution has more than {count} int8 weights: Quantize(8) first, or name layers."
            )
    else:
        found = layers_of(model, layers)
    result = []
    for layer in found:
        part = Choice("first", size=count).select(layer.name, layer.values)
        problem = part.problem(layer.values, multiplex=multiplex)
        result += at_thresholds(f"mobilenet_{layer.name}", problem, [layer.whole], thresholds, chosen, runs)
    return result
