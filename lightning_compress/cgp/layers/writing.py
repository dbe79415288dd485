"""Putting what a circuit computes into a network."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lightning_compress import codes
from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.layers.codes import CircuitCode
from lightning_compress.cgp.layers.integers import QUANTIZE, all_int8, weight_of
from lightning_compress.cgp.layers.ordering import alone
from lightning_compress.targets import parameter


def write(model: nn.Module, experiment: Experiment, circuit: Circuit) -> tuple[str, ...]:
    """Write the weights that a circuit gives in place of those of a network; scales stay.

    A layer all of whose weights are inputs or outputs of the circuit keeps the circuit as its code, so that a file
    holds it instead of the integers; of several data sets each layer keeps what its own one needs.

    Args:
        model: with int8 weights, changed in place.
        experiment: that was made from it, or from one like it.
        circuit: of the experiment.

    Returns:
        Names of the parameters that keep the circuit.

    Raises:
        ValueError: the model has no such int8 weights, or too few; nothing is written then.

    Examples:
        >>> from lightning_compress.cgp import Settings, evolve, presets
        >>> from lightning_compress.cgp.layers.writing import write
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> first = presets.layer_bypass(net, thresholds=[5], settings=Settings(generations=20))[0]
        >>> write(net, first, evolve(first.problem, first.settings).best.circuit)
        ('conv2.weight',)
    """
    layers = {key: (module, param, values, base) for key, module, param, values, base in all_int8(model)}
    for place in experiment.places:
        if place.key not in layers:
            raise ValueError(
                f"{experiment.name} computes weights of {place.key!r}, which this model does not have as int8: "
                f"{QUANTIZE}; there are: {', '.join(layers) or 'none'}."
            )
        size = layers[place.key][2].size
        if len(place.positions) and int(place.positions.max()) >= size:
            raise ValueError(
                f"{experiment.name} computes weight {int(place.positions.max())} of {place.key}, which has {size}: "
                "take the model that it was made from."
            )
    problem = experiment.problem
    outputs = problem.outputs(circuit)
    sets: dict[str, set[int]] = {}
    for place, number, _ in experiment.located(problem.wires):
        sets.setdefault(place.key, set()).add(number)
    given = {key: values for key, (_, _, values, _) in layers.items()}
    kept = []
    for key, values in experiment.written(given, outputs).items():
        module, param, _, base = layers[key]
        weight = parameter(module, param)
        value, code = weight_of(base, values, weight.dtype)
        first = min(sets[key])
        there = np.concatenate([problem.inputs[first], outputs[first]])
        if len(sets[key]) == 1 and np.isin(values, there).all():
            own = alone(circuit, first)
            code = CircuitCode.of(base, own, problem.inputs[first], values, problem.loaded)
            kept.append(key)
        with torch.no_grad():
            weight.copy_(value)
        codes.attach(module, param, code)
    return tuple(kept)
