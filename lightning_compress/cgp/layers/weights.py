"""Layers whose weights a circuit computes instead of their being read: the transform."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_compress import codes, tables
from lightning_compress.cgp.gates.functions import Int8
from lightning_compress.cgp.layers.choices import Choice, Selection
from lightning_compress.cgp.layers.codes import CircuitCode
from lightning_compress.cgp.layers.integers import find_int8, read_int8, tensors_of, weight_of
from lightning_compress.cgp.search.evolution import Callback, Evolution, evolve
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.settings import PICO, EvolutionResult, Settings, run_seed
from lightning_compress.codes import Code
from lightning_compress.energy import EnergyTable
from lightning_compress.functional.lengths import encoded_bytes
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration
from lightning_compress.targets import Target, locate, survey
from lightning_compress.transform import Transform

_COLUMNS = (
    *("layer", "inputs", "computed", "RMS error", "met", "energy pJ", "gates", "depth", "delay"),
    *("bytes", "bytes as int8"),
)


@dataclass(frozen=True)
class EvolveWeights(Transform):
    r"""Compute the int8 weights of a layer from a few known numbers, by a circuit that evolution has found.

    Weights are ``w = s q``; a circuit of int8 gates gives the integers q, or some at most ``error_threshold`` away:
    ``sqrt(mean (q^ - q)^2) <= t``. Scales stay. What is left on the layer is the circuit, its inputs, and which value
    each weight takes; weights are computed when an archive is loaded. That saves reads from memory where every weight
    has a wire of its own (see ``lightning_compress.cgp.break_even``). A file does not get smaller: to say which value a
    weight takes needs as many bits as the weight, and the circuit and its inputs (those of another layer once more)
    come on top; the report counts both.

    Args:
        inputs: what circuits compute from: "layer:NAME" (all weights of another layer), "core:SIZE" (the centre of
            every kernel of the same layer, the ring around it is computed), "ring:SIZE" (the other way round),
            "constants", "frequent:COUNT" (the layer's most frequent values) or "first:COUNT" (its first weights).
        error_threshold: root mean square error of a weight, in int8 steps, >= 0; of fitness "AE" mean absolute error.
        rows: gates of a column, >= 1.
        cols: columns, >= 1.
        look_back: columns that a gate may look back; None: all.
        offspring: children of a generation, >= 1.
        mutation: largest share of the genes that a child draws anew, in (0, 1].
        patience: generations without improvement that end a phase, >= 1.
        generations: all of them, >= 0; None: until patience ends.
        fitness: "SE", "MSE" or "AE".
        functions: ids of ``lightning_compress.cgp.gates.functions``, or "standard".
        multiplex: one output for each different value; False: one for each weight.
        seed_circuit: "adder" or "random".
        energy: costs of the functions; a path names a CSV file of them; None takes the default table.
        runs: of which the best is taken, >= 1.
        seed: of the first of them.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: an option outside its range.

    Examples:
        >>> from lightning_compress import codes
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> evolve = EvolveWeights("constants", rows=16, generations=10, include="0")
        >>> evolved = compress(net, [Quantize(8), evolve]).model
        >>> code = codes.read(evolved[0], "weight")
        >>> code.kind, torch.equal(evolved[0].weight, compress(net, [Quantize(8)]).model[0].weight)
        ('circuit', True)

    Source: Miller and Thomson 2000, Cartesian Genetic Programming; Horowitz 2014, Computing's Energy Problem.
    """

    inputs: str = "constants"
    error_threshold: float = 0.0
    rows: int = 64
    cols: int = 16
    look_back: int | None = None
    offspring: int = 8
    mutation: float = 0.01
    patience: int = 2000
    generations: int | None = None
    fitness: str = "SE"
    functions: Sequence[int] | str = "standard"
    multiplex: bool = True
    seed_circuit: str = "adder"
    energy: EnergyTable | str | None = None
    runs: int = 1
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    stage: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        Choice.parse(self.inputs)
        _ = self.settings  # checks them
        if self.runs < 1:
            raise ValueError(f"runs={self.runs}: allowed is >= 1.")

    @property
    def settings(self) -> Settings:
        """Of the search."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings) if hasattr(self, f.name)}
        energy = EnergyTable.from_csv(self.energy) if isinstance(self.energy, str) else self.energy
        return Settings(**own | {"energy": energy})

    def config(self) -> dict[str, Any]:
        """The options as JSON values; costs as rows of id, name, energy, delay and area."""
        energy = self.energy if isinstance(self.energy, str) else self.settings.config()["energy"]
        plain = dataclasses.replace(self, energy=None)
        return super(EvolveWeights, plain).config() | {"energy": energy}

    # -- plan ------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Evolve a circuit for every layer; writes nothing.

        Args:
            model: any module; layers that have int8 weights are taken.
            data: not used.

        Returns:
            Circuits, their inputs, and which value every weight takes.

        Raises:
            ValueError: the layer that gives the inputs is unknown, has no int8 weights, or is the one to compute.
        """
        found = survey(model, self.include, self.exclude)
        choice, skipped = Choice.parse(self.inputs), dict(found.skipped)
        key, source = self._source(model, choice)
        todo: list[tuple[Target, Int8, Code, Selection]] = []
        for t in found.targets:
            try:
                if t.key == key:
                    raise ValueError("its weights are the inputs")
                values, base = read_int8(t.module, t.param)
                todo.append((t, values, base, choice.select(t.name or t.key, values, source)))
            except ValueError as error:
                skipped[t.key] = str(error)
        layers, rows, same = {}, [], True
        with tqdm(todo, desc="EvolveWeights", unit="layer", leave=False, disable=None) as bar:
            for t, values, base, chosen in bar:
                problem = chosen.problem(values, multiplex=self.multiplex)
                result = best_run(problem, self.settings, self.runs, _shown(bar, t.key))
                code, new = _carried(chosen, result, values, base, t.weight)
                same &= torch.equal(new, t.weight.detach().cpu())
                layers[t.key] = {
                    "layer": t.name,
                    "param": t.param,
                    "config": code.config(),
                    "arrays": code.arrays(new),
                }
                rows.append(self._row(t.key, values, base, result, code, new))
        table = f"{self.inputs}\n{tables.text(_COLUMNS, rows)}\n" if rows else ""
        return Plan(layers, skipped, identity=bool(layers) and same, data=table)

    def _source(self, model: nn.Module, choice: Choice) -> tuple[str, Int8 | None]:
        """Key and weights of the layer that gives the inputs."""
        if choice.kind != "layer":
            return "", None
        key, values, _ = find_int8(model, choice.layer, "inputs: layer")
        names = (self.include,) if isinstance(self.include, str) else tuple(self.include)
        if {key, key.rpartition(".")[0]} & set(names):
            raise ValueError(
                f"inputs={self.inputs!r} and include={self.include!r}: the {values.size} weights of {key} are the "
                "inputs and cannot be computed from themselves; take another layer."
            )
        return key, values

    def _row(
        self, key: str, values: Int8, base: Code, result: EvolutionResult, code: CircuitCode, new: Tensor
    ) -> list[Any]:
        """Of the table of layers."""
        cost, problem, arrays = code.cost(self.settings.table), result.problem, code.arrays(new)
        gap = code.values[arrays["codes"].numpy()].astype(np.float64) - values
        error = math.sqrt(float((gap**2).sum()) / problem.weights)
        return [
            *(key, code.loaded, code.problem(new).computed, error),
            *("yes" if result.met else "no", cost.energy_pj, cost.gate_count, cost.depth, cost.delay),
            encoded_bytes(arrays),
            encoded_bytes({"codes": torch.from_numpy(values), **tensors_of(base)}),
        ]

    # -- apply -----------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Write the computed weights in place and attach the circuits.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model has no such weight, or of another shape, or a decision is malformed; nothing is
                written then.
        """
        todo: list[tuple[nn.Module, str, nn.Parameter, Tensor, CircuitCode]] = []
        for key, decided in plan.layers.items():
            try:
                module, weight = locate(model, decided["layer"], decided["param"])
                code = CircuitCode.restore(decided["arrays"], decided["config"])
                value = code.rebuild(decided["arrays"], weight.dtype)
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
                raise ValueError(f"the decision about {key!r} does not fit this model: {error!r}.") from error
            if value.shape != weight.shape:
                raise ValueError(
                    f"the plan has a circuit for {key} of shape {tuple(value.shape)}, and here its shape is "
                    f"{tuple(weight.shape)}: apply it to the architecture it was made for."
                )
            todo.append((module, decided["param"], weight, value, code))
        with torch.no_grad():
            for module, param, weight, value, code in todo:
                weight.copy_(value)
                codes.attach(module, param, code)


def best_run(
    problem: Problem, settings: Settings, runs: int = 1, callback: Callback | None = None
) -> EvolutionResult:
    """The best of several searches that differ in their seeds.

    One that meets the threshold comes before one that does not; then the smaller energy, error, delay, gate count and
    depth count, of those that do not first the error.

    Args:
        problem: inputs and wanted weights.
        settings: of all of them; run r has the seed ``run_seed(settings.seed, r)``.
        runs: how many, >= 1.
        callback: of every one, see ``evolve``.

    Returns:
        The result of the best run.

    Examples:
        >>> from lightning_compress.cgp.search.problem import Problem
        >>> from lightning_compress.cgp.search.settings import Settings
        >>> from lightning_compress.cgp.layers.weights import best_run
        >>> result = best_run(Problem.of([[3]], [[6, 7]]), Settings(rows=4, cols=4, generations=20), runs=2)
        >>> result.best.error
        0
    """

    def rank(result: EvolutionResult) -> tuple[float, ...]:
        cost, error = result.best.cost, result.best.error
        energy = round(cost.energy_pj * PICO)
        first = (0, energy, error) if result.met else (1, error, energy)
        return *first, cost.delay, cost.gate_count, cost.depth

    seeds = (run_seed(settings.seed, run) for run in range(runs))
    return min(
        (evolve(problem, dataclasses.replace(settings, seed=seed), callback=callback) for seed in seeds),
        key=rank,
    )


def _carried(
    chosen: Selection, result: EvolutionResult, values: Int8, base: Code, weight: Tensor
) -> tuple[CircuitCode, Tensor]:
    """The code of a layer, and the weight that it gives."""
    problem, circuit = result.problem, result.best.circuit
    computed = np.array(values)
    computed.reshape(-1)[chosen.positions] = problem.decode(problem.outputs(circuit))[0]
    code = CircuitCode.of(base, circuit, problem.inputs[0], computed, problem.loaded)
    return code, weight_of(base, computed, weight.dtype)[0]


def _shown(bar: tqdm[Any], key: str) -> Callback:
    """Progress of one layer."""

    def show(evolution: Evolution) -> None:
        best = evolution.best
        bar.set_postfix_str(
            f"{key}: generation {evolution.generation}, error {best.error}, {best.cost.energy_pj:.4g} pJ"
        )

    return show
