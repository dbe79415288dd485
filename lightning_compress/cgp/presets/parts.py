"""What presets have in common: the int8 weights of layers by name, and an experiment for every threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import nn

from lightning_compress.cgp.experiments import Experiment, Place
from lightning_compress.cgp.gates.functions import Int8
from lightning_compress.cgp.layers.integers import find_int8
from lightning_compress.cgp.search.problem import Ints, Problem
from lightning_compress.cgp.search.settings import Settings

LENET = ("conv1", "conv2")  # layers that presets take unless others are named
PERFECT = (0.0,)  # thresholds


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The int8 weights of one layer.

    Args:
        key: full parameter name.
        values: the integers.
    """

    key: str
    values: Int8

    @property
    def name(self) -> str:
        """Of the layer."""
        return self.key.rpartition(".")[0] or self.key

    @property
    def flat(self) -> Int8:
        """In storage order."""
        return self.values.reshape(-1)

    @property
    def whole(self) -> Place:
        """All of them."""
        places: Ints = np.arange(self.values.size)
        return Place(self.key, places)


def layer_of(model: nn.Module, name: str) -> Layer:
    """The int8 weights of a layer.

    Args:
        model: with int8 weights.
        name: of the layer or of the parameter.

    Returns:
        Its weights.

    Raises:
        ValueError: it is unknown or has no int8 weights.
    """
    key, values, _ = find_int8(model, name)
    return Layer(key, values)


def layers_of(model: nn.Module, names: Sequence[str]) -> list[Layer]:
    """The int8 weights of several layers.

    Args:
        model: with int8 weights.
        names: of layers or parameters, each once.

    Returns:
        Their weights, in this order.

    Raises:
        ValueError: no names, one of them twice, or a layer is unknown or has no int8 weights.
    """
    if not names or isinstance(names, str) or len(set(names)) < len(names):
        raise ValueError(f"layers={names!r}: needed is a list of names, each once.")
    return [layer_of(model, name) for name in names]


def at_thresholds(
    name: str,
    problem: Problem,
    places: Sequence[Place],
    thresholds: Sequence[float],
    settings: Settings | None,
    runs: int,
) -> list[Experiment]:
    """One experiment for every threshold.

    Args:
        name: what the names of all of them begin with.
        problem: of all.
        places: of all.
        thresholds: root mean square errors.
        settings: of all, but for their thresholds; None takes the defaults.
        runs: of every one.

    Returns:
        The experiments, in the order of the thresholds, equal ones once.

    Raises:
        ValueError: there is no threshold.
    """
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
