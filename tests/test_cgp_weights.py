"""Layers computed by circuits: choices of inputs, the code, the transform, archives."""

import copy
import dataclasses
import functools
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.cgp import Circuit, CircuitCost, Grid, Problem, Settings, Solution
from lightning_compress.cgp.balance import break_even
from lightning_compress.cgp.gates.functions import FUNCTIONS, apply
from lightning_compress.cgp.layers import weights as cgp_weights
from lightning_compress.cgp.layers.choices import Choice
from lightning_compress.cgp.layers.codes import CircuitCode
from lightning_compress.cgp.layers.integers import all_int8, find_int8, read_int8, weight_of
from lightning_compress.cgp.layers.weights import EvolveWeights, best_run
from lightning_compress.cgp.search.settings import EvolutionResult, run_seed
from lightning_compress.compress import Result
from lightning_compress.functional.lengths import encoded_bytes
from lightning_compress.pipelines.config import CompressionConfig
from lightning_compress.plans import from_json, to_json
from lightning_compress.quantization.codes import Affine
from lightning_compress.quantization.integer import to_integer
from lightning_compress.transform import OrderError

SMALL = {"rows": 16, "cols": 24, "patience": 30}


def dense() -> nn.Module:
    torch.manual_seed(0)
    return lc.models.build("lenet5")


@functools.cache
def built() -> nn.Module:
    return lc.compress(dense(), [lc.Quantize(8)]).model


def lenet() -> nn.Module:
    return copy.deepcopy(built())


def affine(channels: int = 1, qmin: int = -127) -> Affine:
    scale = torch.linspace(0.01, 0.02, channels)
    return Affine((0,) if channels > 1 else (), 0, 8, scale, None, qmin, 127)


# -- choices of inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "layer", "layer:", "core", "core:0", "core:-1", "core:3x", "first:1.5", "all"]
)
def test_unknown_choices_are_refused(text):
    with pytest.raises(ValueError, match=r'inputs=.*"layer:NAME", "core:SIZE"'):
        EvolveWeights(text)


@pytest.mark.parametrize("side", [(5, 5), (3, 7), (4, 6), (5,), (3, 3, 5)])
def test_core_and_ring_split_every_kernel(side):
    values = np.random.default_rng(0).integers(-128, 128, (4, 3, *side)).astype(np.int8)
    size = 2 if side == (4, 6) else 1
    inner, outer = [], []
    for place in itertools.product(range(4), range(3), *map(range, side)):
        inside = all(abs(i - (n - 1) / 2) < size / 2 for i, n in zip(place[2:], side, strict=True))
        (inner if inside else outer).append(np.ravel_multi_index(place, values.shape))
    core = Choice.parse(f"core:{size}").select("conv", values)
    ring = Choice.parse(f"ring:{size}").select("conv", values)
    assert core.positions.tolist() == outer and ring.positions.tolist() == inner
    assert core.inputs.tolist() == values.reshape(-1)[inner].tolist() and core.loaded == len(inner)
    assert ring.inputs.tolist() == values.reshape(-1)[outer].tolist() and ring.loaded == len(outer)


def test_the_other_choices():
    values = np.array([[3, 3, 7], [7, 3, -1]], dtype=np.int8)
    frequent = Choice.parse("frequent:2").select("fc", values)
    assert (frequent.inputs.tolist(), frequent.loaded) == ([3, 7], 2)
    assert Choice.parse("frequent:9").select("fc", values).inputs.tolist() == [3, 7, -1]
    first = Choice.parse("first:2").select("fc", values)
    assert (first.inputs.tolist(), first.loaded, len(first.positions)) == ([3, 3], 2, 6)
    constants = Choice.parse("constants").select("fc", values)
    assert (constants.inputs.tolist(), constants.loaded) == ([0], 0)
    layer = Choice.parse("layer:a.b").select("fc", values, np.array([[5], [6]], dtype=np.int8))
    assert (layer.inputs.tolist(), layer.loaded) == ([5, 6], 2)
    with pytest.raises(ValueError, match="first:6, but fc has 6 weights"):
        Choice.parse("first:6").select("fc", values)


# -- the code ------------------------------------------------------------------------------------------------


@st.composite
def coded(draw):
    """A random circuit, its inputs, and weights that are some of its inputs and outputs."""
    count, rows, cols = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    grid = Grid(count, draw(st.integers(0, 6)), rows, cols)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    functions = [f for f in FUNCTIONS if f not in (27, 28)]
    genes = [
        gene
        for g in range(grid.gates)
        for gene in (*random.integers(0, count + g // rows * rows, 2), random.choice(functions))
    ]
    circuit = Circuit(
        np.array([*genes, *random.integers(0, count + grid.gates, grid.outputs)], np.int32), grid
    )
    inputs = random.integers(*draw(st.sampled_from([(-128, 128), (0, 3)])), count).astype(np.int8)
    every = np.concatenate([inputs, circuit.evaluate(inputs)])
    values = random.choice(every, (2, draw(st.integers(1, 20))))
    return circuit, inputs, values


def by_hand(code: CircuitCode) -> list[int]:
    """The values of all pins, from the stored arrays as the description of the format has them."""
    pins = [v for v in range(-128, 128) if code.inputs[v + 128]]
    a, b = iter(code.a.tolist()), iter(code.b.tolist())
    for number in code.functions.tolist():
        function, own = FUNCTIONS[number], len(pins)
        left = pins[own - next(a)] if function.uses_a else 0
        right = pins[own - next(b)] if function.uses_b else 0
        pins.append(int(apply(number, left, right)))
    return pins


@given(coded())
@settings(max_examples=200)
def test_weights_come_back_from_circuit_and_indices(case):
    circuit, inputs, values = case
    base = affine(2, -128)
    code = CircuitCode.of(base, circuit, inputs, values, len(inputs))
    weight = torch.from_numpy(values * base.scale.numpy()[:, None])
    arrays = code.arrays(weight)
    pins = by_hand(code)
    table = sorted(pins[i] for i in np.flatnonzero(code.taken.numpy()))
    assert table == np.unique(values).tolist() == code.values.tolist()
    assert np.array_equal(np.array(table)[arrays["codes"].numpy()], values)
    again = CircuitCode.restore(arrays, json.loads(json.dumps(code.config())))
    assert again == code and torch.equal(again.rebuild(arrays, torch.float32), weight)
    assert code.matches(weight) and not code.matches(weight + 0.001)

    least, cost = code.cost(), circuit.cost()
    assert least.energy_pj <= cost.energy_pj + 1e-12 and least.gate_count <= cost.gate_count
    assert 100 not in code.functions.tolist() and code.circuit.active().sum() == len(code.functions)
    problem = code.problem(weight)
    outputs = code.circuit.evaluate(problem.inputs[0])[code.circuit.outputs >= len(code.given)]
    assert np.array_equal(np.sort(outputs), problem.targets[0])
    assert np.array_equal(problem.decode(problem.targets)[0], values.reshape(-1))
    assert problem.computed == sum(int(v) not in inputs.tolist() for v in values.reshape(-1))
    assert problem.loaded <= len(code.given) == len(set(code.given.tolist()) & set(inputs.tolist()))


@given(coded(), st.data())
@settings(max_examples=150)
def test_forged_arrays_never_crash(case, data):
    code = CircuitCode.of(affine(1, -128), *case, 0)
    weight = torch.from_numpy(case[2] * code.base.scale.numpy())
    arrays = code.arrays(weight)
    name = data.draw(st.sampled_from(sorted(arrays)))
    array = arrays[name].clone()
    how = data.draw(st.sampled_from(["value", "dtype", "shorter", "shape", "missing"]))
    if how == "value" and array.numel() and not array.is_floating_point():
        info = (
            (0, 1)
            if array.dtype == torch.bool
            else (torch.iinfo(array.dtype).min, torch.iinfo(array.dtype).max)
        )
        array.view(-1)[data.draw(st.integers(0, array.numel() - 1))] = data.draw(st.integers(*info))
    elif how == "dtype":
        array = array.to(data.draw(st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool])))
    elif how == "shorter":
        array = array.reshape(-1)[:-1]
    elif how == "shape":
        array = array[None]
    forged = {k: v for k, v in (arrays | {name: array}).items() if k != name or how != "missing"}
    config = code.config() | data.draw(
        st.sampled_from(
            [{}, {"loaded": 99}, {"loaded": None}, {"base": "circuit"}, {"base": []}, {"options": {}}]
        )
    )
    try:
        value = CircuitCode.restore(forged, config).rebuild(forged, torch.float32)
    except ValueError:
        return
    assert value.shape == weight.shape or how in ("shape", "shorter")


def halves() -> CircuitCode:
    circuit = Circuit.from_text("{1,2,1,2,2,1,1}([1]0,0,7)([2]0,0,6)(1,2)")
    values = np.array([63, 31, 127, 127], dtype=np.int8)
    return CircuitCode.of(affine(), circuit, np.array([127], dtype=np.int8), values, loaded=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"functions": [7, 99]}, "unknown function 99"),
        ({"a": [2, 2]}, "gate 1 uses pin -1"),
        ({"a": [0, 2]}, "gate 1 uses pin 1"),
        ({"a": [1]}, "1 operands a for 2 gates"),
        ({"b": [1]}, "1 operands b for 0 gates"),
        ({"taken": [True, True]}, "as many pins as inputs and gates"),
        ({"taken": [False, False, False]}, "0 pins"),
        ({"functions": [7, 7], "a": [1, 2]}, "2 different values"),
        ({"inputs": [False] * 256}, "0 inputs of 256 values.*needed are an input"),
        ({"inputs": [True]}, "1 inputs of 1 values"),
    ],
)
def test_forged_circuits_are_refused(change, words):
    code = halves()
    arrays = code.arrays(torch.tensor([1.27, 0.63]) * 1.0)
    arrays |= {k: torch.tensor(v, dtype=arrays[k].dtype) for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        CircuitCode.restore(arrays, code.config())


def test_indices_beyond_the_values_are_refused():
    code = halves()
    with pytest.raises(ValueError, match="an index is 3; allowed are 0 to 2"):
        code.rebuild({"codes": torch.tensor([0, 3], dtype=torch.uint8)}, torch.float32)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        code.rebuild({"codes": torch.tensor([0, 2])}, torch.float32)


def test_a_weight_that_the_circuit_does_not_give_is_refused():
    with pytest.raises(ValueError, match="a weight is 5, which is neither"):
        CircuitCode.of(affine(), halves().circuit, np.array([127], np.int8), np.array([5], np.int8), 1)


def test_counted_bits():
    """Two bits an index, 256 values that may be inputs, two gates of 8, two distances of 8, three pins, one scale."""
    weight = halves().base.scale * torch.tensor([63, 31, 127, 127])
    assert halves().bits(weight) == 4 * 2 + 256 + 2 * 8 + 2 * 8 + 3 + 32


def test_scales_take_factors_in():
    code = halves()
    exact = code.rebuild({"codes": torch.tensor([[1, 0], [2, 2]], dtype=torch.uint8)}, torch.float32)
    new, scaled = code.scaled(exact, torch.tensor([2.0, 0.5]), 0)
    assert torch.allclose(new, exact * torch.tensor([[2.0], [0.5]])) and scaled.matches(new)
    assert scaled.values.tolist() == code.values.tolist()
    assert code.scaled(exact, torch.tensor([2.0, -0.5]), 0) is None


def test_values_outside_the_grid_widen_it():
    """Narrow grids have no -128, but circuits do."""
    circuit = Circuit.from_text("{1,1,1,1,2,1,1}([1]0,0,25)(1)")
    values = np.array([-128, 0], dtype=np.int8)
    code = CircuitCode.of(affine(), circuit, np.zeros(1, np.int8), values, 0)
    weight, base = weight_of(affine(), values, torch.float32)
    assert (code.base.qmin, code.base) == (-128, base) and code.matches(weight)
    assert weight.tolist() == (torch.tensor([-128.0, 0.0]) * affine().scale).tolist()


# -- the transform -------------------------------------------------------------------------------------------


CHOICES = ["layer:conv1", "core:3", "ring:3", "constants", "frequent:16", "first:96"]


@functools.cache
def evolved(inputs: str, threshold: float = 0.0) -> Result:
    step = EvolveWeights(inputs, threshold, include=("conv1", "conv2", "conv*"), **SMALL)
    if inputs.startswith("layer"):
        step = dataclasses.replace(step, include="conv*")
    return lc.compress(lenet(), [step])


@pytest.mark.parametrize("inputs", CHOICES)
def test_without_error_the_network_is_the_same_and_has_circuits(inputs, tmp_path):
    result = evolved(inputs)
    names = ["conv2.weight"] if inputs == "layer:conv1" else ["conv1.weight", "conv2.weight"]
    found = {key: code for key, _, _, code in codes.of(result.model) if code.kind == "circuit"}
    assert list(found) == names
    for (name, old), new in zip(built().named_parameters(), result.model.parameters(), strict=True):
        assert torch.equal(old, new), name
    assert result.steps[0].plan.identity and not result.coverage.changed
    assert set(found) == set(result.steps[0].plan.layers)
    for name in ("fc1.weight", "fc2.weight"):
        assert "no include pattern" in result.coverage.skipped[name]
    for name in names:
        assert name in result.report

    info = lc.save(result.model, tmp_path / "net.lcz")
    stored = {t.name: t.kind for t in info.tensors}
    assert {n for n, kind in stored.items() if kind == "circuit"} == set(names)
    fresh = lc.load(tmp_path / "net.lcz", into=dense())
    twins = fresh, copy.deepcopy(result.model), pickle.loads(pickle.dumps(result.model))
    for twin in twins:
        assert [c for *_, c in codes.of(twin)] == [c for *_, c in codes.of(result.model)]
        assert all(map(torch.equal, twin.parameters(), result.model.parameters()))


@pytest.mark.parametrize("inputs", ["layer:conv1", "core:3", "constants"])
def test_a_threshold_bounds_the_error(inputs):
    result = evolved(inputs, 6.0)
    changed = 0
    for key, decided in result.steps[0].plan.layers.items():
        before = find_int8(built(), key)[1].astype(np.float64)
        after = find_int8(result.model, key)[1].astype(np.float64)
        size = len(Choice.parse(inputs).select(key, before.astype(np.int8), before.astype(np.int8)).positions)
        assert np.sqrt(((after - before) ** 2).sum() / size) <= 6.0
        changed += (after != before).any()
        assert decided["config"]["base"] == "affine"
    assert changed == len(result.coverage.changed) and not result.steps[0].plan.identity
    perfect = evolved(inputs)
    for key in result.steps[0].plan.layers:
        layer = key.removesuffix(".weight")
        energy = [
            codes.read(r.model.get_submodule(layer), "weight").cost().energy_pj for r in (result, perfect)
        ]
        assert energy[0] <= energy[1] + 1e-12


def test_the_report_counts_both_ways_of_storing():
    result = evolved("constants")
    lines = result.steps[0].plan.data.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if ".weight" in line}
    for key, row in rows.items():
        module = result.model.get_submodule(key.removesuffix(".weight"))
        code, weight = codes.read(module, "weight"), module.weight.detach()
        _, values, base = find_int8(built(), key)
        whole = encoded_bytes({"codes": torch.from_numpy(values), "scale": base.scale})
        assert [int(cell.replace(",", "")) for cell in row[-2:]] == [
            encoded_bytes(code.arrays(weight)),
            whole,
        ]
        assert int(row[6]) == code.cost().gate_count and row[4] == "yes"
    assert len(rows) == 2


@pytest.mark.parametrize("inputs", CHOICES)
def test_the_balance_of_an_evolved_layer(inputs):
    """Counted from the integers: which values are read."""
    model = evolved(inputs).model
    code, weight = codes.read(model.conv2, "weight"), model.conv2.weight
    balance = break_even(code.problem(weight), code.cost())
    given, values = set(code.given.tolist()), find_int8(built(), "conv2")[1].reshape(-1).tolist()
    assert balance.wired == sum(v in given for v in values)
    assert balance.weights == 2400 and balance.circuit_pj == code.cost().energy_pj
    assert balance.loaded == (0 if inputs == "constants" else len(given))


def test_the_file_holds_no_integers():
    """Without the circuit the indices say nothing: their table is not in the file."""
    code = codes.read(evolved("constants").model.conv2, "weight")
    assert code.values.size > 200
    stored = code.arrays(evolved("constants").model.conv2.weight)
    assert set(stored) == {"codes", "inputs", "functions", "a", "b", "taken", "scale"}
    assert stored["inputs"].sum() == 1 and stored["codes"].dtype == torch.uint8


def test_plans_replay_on_a_fresh_model_and_forged_ones_write_nothing():
    plan = evolved("core:3", 6.0).steps[0].plan
    plan = from_json(json.loads(json.dumps(to_json(plan))))
    fresh = dense()
    EvolveWeights().apply(fresh, plan)
    for name in ("conv1", "conv2"):
        same = torch.equal(
            fresh.get_submodule(name).weight, evolved("core:3", 6.0).model.get_submodule(name).weight
        )
        assert same

    good = plan.layers["conv2.weight"]
    forgeries = [
        {k: v for k, v in good.items() if k != "arrays"},
        good | {"layer": "conv9"},
        good | {"param": "nothing"},
        good | {"layer": "conv1"},
        good | {"config": good["config"] | {"base": "mask"}},
        good | {"config": None},
        good | {"arrays": good["arrays"] | {"codes": good["arrays"]["codes"].long()}},
        good | {"arrays": {k: v for k, v in good["arrays"].items() if k != "codes"}},
        good | {"arrays": good["arrays"] | {"scale": good["arrays"]["scale"][:3]}},
    ]
    for forged in forgeries:
        model = dense()
        with pytest.raises(ValueError):
            EvolveWeights().apply(
                model, dataclasses.replace(plan, layers={**plan.layers, "conv2.weight": forged})
            )
        assert not list(codes.of(model))
        assert all(map(torch.equal, model.parameters(), dense().parameters()))


def test_a_changed_weight_is_stored_as_it_is(tmp_path):
    model = copy.deepcopy(evolved("core:3").model)
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = 0.123
    info = lc.save(model, tmp_path / "net.lcz")
    assert list(info.stale) == ["conv2.weight"] and "circuit" in info.stale["conv2.weight"]
    fresh = lc.load(tmp_path / "net.lcz", into=dense())
    assert torch.equal(fresh.conv2.weight, model.conv2.weight)


def test_circuits_follow_circuits():
    """Layers that are computed still are int8: others can be computed from them, and they can be evolved anew."""
    first = EvolveWeights("constants", 3.0, include="conv1", **SMALL)
    model = lc.compress(lenet(), [first, EvolveWeights("layer:conv1", include="conv2", **SMALL)]).model
    assert {key for key, *_, code in codes.of(model) if code.kind == "circuit"} == {
        "conv1.weight",
        "conv2.weight",
    }
    source, base = read_int8(model.conv1, "weight")
    assert base.kind == "affine" and set(codes.read(model.conv2, "weight").given.tolist()) <= set(
        source.reshape(-1).tolist()
    )
    assert len(list(all_int8(model))) == 5
    again = lc.compress(model, [EvolveWeights("core:3", include="conv1", **SMALL)]).model
    assert torch.equal(again.conv1.weight, model.conv1.weight)


def test_flipped_bits_lead_to_other_values_of_the_circuit():
    model = evolved("constants").model
    damaged = lc.metrics.inject_bit_errors(model, 0.01, seed=1).model.conv2.weight.detach()
    scale = codes.read(model.conv2, "weight").base.scale.view(-1, 1, 1, 1)
    allowed = set(codes.read(model.conv2, "weight").values.tolist())
    assert not torch.equal(damaged, model.conv2.weight)
    assert set((damaged / scale).round().int().flatten().tolist()) <= allowed


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("multiplex", [True, False])
def test_any_circuit_is_stored_as_it_is(bits, multiplex, tmp_path):
    """Random circuits give values far from the weights, also outside of their grid."""
    step = EvolveWeights(
        "first:2", seed_circuit="random", generations=0, multiplex=multiplex, include="conv*", **SMALL
    )
    result = lc.compress(dense(), [lc.Quantize(bits), step])
    assert "no" in {row.split()[4] for row in result.steps[1].plan.data.splitlines()[3:5]}
    found = {key: (module, code) for key, module, _, code in codes.of(result.model) if code.kind == "circuit"}
    assert len(found) == 2 and all(code.matches(module.weight) for module, code in found.values())
    for module, code in found.values():
        low, high = int(code.values.min()), int(code.values.max())
        assert code.base.qmin <= low and high <= code.base.qmax < 2 ** (code.base.width - 1)
        assert -code.base.qmin <= 2 ** (code.base.width - 1) and code.base.width <= 8
        assert read_int8(module, "weight")[0].min() == low
    assert not lc.save(result.model, tmp_path / "net.lcz").stale
    fresh = lc.load(tmp_path / "net.lcz", into=dense())
    assert all(map(torch.equal, fresh.parameters(), result.model.parameters()))


def test_complex_weights_and_groups_have_circuits_too(tmp_path):
    """Two planes of integers; a scale for every four inputs."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 5, dtype=torch.complex64))
            self.fc = nn.Linear(8, 4)

    lc.register(Spectral, lc.Axes(0, 1), param="kernel")
    torch.manual_seed(2)
    model, fresh = Spectral(), Spectral()
    quantize = lc.Quantize(8, granularity="per_group:4")
    result = lc.compress(model, [quantize, EvolveWeights("frequent:8", 2.0, **SMALL)])
    assert {key: code.kind for key, *_, code in codes.of(result.model)} == dict.fromkeys(
        ["kernel", "fc.weight"], "circuit"
    )
    assert read_int8(result.model, "kernel")[0].shape == (4, 3, 5, 2)
    assert not lc.save(result.model, tmp_path / "net.lcz").stale
    lc.load(tmp_path / "net.lcz", into=fresh)
    assert all(map(torch.equal, fresh.parameters(), result.model.parameters()))


def test_the_best_run_is_taken(monkeypatch):
    """Met before not met; then energy, error, delay, gates, depth; not met: error first."""
    problem = Problem.of([[0]], [[1, 2, 3]])
    circuit = Circuit(np.zeros(6, np.int32), Grid(1, 3, 1, 1))
    order = [  # error, energy, delay, gates, depth; best first
        (3, 0.1, 9.0, 9, 9),
        (0, 0.2, 1.0, 9, 9),
        (2, 0.2, 0.0, 0, 0),
        (2, 0.2, 0.5, 1, 0),
        (2, 0.2, 0.5, 1, 1),
        (4, 0.9, 0.0, 0, 0),
        (5, 0.0, 0.0, 0, 0),
    ]
    seeds = []

    def result(row: tuple[int, float, float, int, int], chosen: Settings) -> EvolutionResult:
        error, energy, delay, gates, depth = row
        cost = CircuitCost(energy, float("nan"), delay, depth, gates)
        return EvolutionResult(problem, chosen, Solution(circuit, error, cost), (), (), 0, 0, 0)

    for one, other in itertools.combinations(order, 2):
        for pair in ((one, other), (other, one)):
            given = iter(pair)

            def stand_in(_, chosen, callback=None, given=given):
                seeds.append(chosen.seed)
                return result(next(given), chosen)

            monkeypatch.setattr(cgp_weights, "evolve", stand_in)
            best = best_run(problem, Settings(error_threshold=1.0, seed=7), 2).best
            assert (best.error, best.cost.energy_pj, best.cost.depth) == (one[0], one[1], one[4])
    assert seeds[:2] == [7, run_seed(7, 1)]


# -- bad input -----------------------------------------------------------------------------------------------


def test_float_models_are_told_to_quantize_first():
    with pytest.raises(lc.NothingChangedError, match=r"quantize first: Quantize\(8\)"):
        lc.compress(dense(), [EvolveWeights()])
    with pytest.raises(ValueError, match=r"'conv1' has no int8 weights: quantize first: Quantize\(8\)"):
        lc.compress(dense(), [EvolveWeights("layer:conv1")])
    mixed = lc.compress(dense(), [lc.Quantize(8, include="conv2"), EvolveWeights("core:3", **SMALL)])
    assert mixed.coverage.skipped["conv1.weight"] == "quantize first: Quantize(8)"


@pytest.mark.parametrize(
    ("quantize", "words"),
    [
        (lc.Quantize(12), "more than 8 bits"),
        (lc.Quantize(1), "one bit"),
        (lc.Quantize(8, symmetric=False), "symmetric=True"),
        (lc.Quantize(format="e4m3"), "stored as minifloat"),
        (lc.Prune(0.5), "quantize first"),
        (lc.ShareWeights(clusters=8), "stored as codebook"),
    ],
)
def test_other_codes_are_left_alone(quantize, words):
    with pytest.raises(lc.NothingChangedError, match=words):
        lc.compress(dense(), [quantize, EvolveWeights()])


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            EvolveWeights("layer:conv3"),
            "'conv3' is unknown; layers with int8 weights: conv1, conv2, fc1, fc2, fc3",
        ),
        (EvolveWeights("layer:conv1", include="conv1"), "150 weights of conv1.weight are the inputs"),
        (
            EvolveWeights("layer:conv1", include=["conv1.weight"]),
            "150 weights of conv1.weight are the inputs",
        ),
        (EvolveWeights("core:5", include="conv*"), "side 5 .* 5 x 5 kernels of conv1; allowed: 1, 3"),
        (EvolveWeights("core:2", include="conv*"), "allowed: 1, 3"),
        (EvolveWeights("core:3", include="fc*"), r"fc1 of shape \(120, 400\) has no kernels"),
        (EvolveWeights("first:150", include="conv1"), "first:150, but conv1 has 150 weights"),
    ],
)
def test_mistakes_are_explained(step, words):
    with pytest.raises(ValueError, match=words):
        lc.compress(lenet(), [step])


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 0},
        {"runs": 0},
        {"mutation": 0},
        {"fitness": "X"},
        {"functions": [999]},
        {"error_threshold": -1},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EvolveWeights(**options)


def test_order():
    step = EvolveWeights("core:3", include="conv*", **SMALL)
    for wrong in (lc.Prune(0.5), lc.Quantize(8), lc.Factorize(0.5)):
        with pytest.raises(OrderError):
            lc.compress(dense(), [lc.Quantize(8), step, wrong])
    with pytest.raises(lc.NothingChangedError, match="stored as circuit already"):
        lc.compress(evolved("core:3").model, [lc.ShareWeights(clusters=16)])


def test_options_are_plain_data(tmp_path):
    table = lc.energy.EnergyTable.default()
    table.to_csv(tmp_path / "table.csv")
    plain = EvolveWeights(functions=[1, 2, 24], energy=table).config()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain.keys() == vars(EvolveWeights()).keys()
    assert {row[0]: row[2] for row in plain["energy"]} == {
        n: o.energy_pj for n, o in table.operations.items()
    }
    (tmp_path / "recipe.yaml").write_text(
        "transforms:\n"
        "  - Quantize\n"
        f"  - EvolveWeights: {{inputs: 'core:3', rows: 8, energy: {tmp_path / 'table.csv'}, include: [conv1]}}\n"
    )
    quantize, step = CompressionConfig.from_yaml(tmp_path / "recipe.yaml").transforms()
    assert quantize == lc.Quantize()
    assert (step.inputs, step.rows, step.include) == ("core:3", 8, ("conv1",))
    assert step.settings.table.operations.keys() == table.operations.keys()
    assert step.config()["energy"] == str(tmp_path / "table.csv")


def test_a_file_cannot_ask_for_endless_work():
    code, gates = halves(), 65537
    far = torch.ones(gates, dtype=torch.uint8)
    arrays = code.arrays(code.base.scale * torch.tensor([63.0, 127.0]))
    arrays |= {"functions": far * 7, "a": far, "taken": torch.arange(gates + 1) < 2}
    with pytest.raises(ValueError, match="65537 gates; allowed are 65536"):
        CircuitCode.restore(arrays, code.config())


def test_onnx_files_and_integer_models_use_the_integers(tmp_path):
    """A circuit is how a weight is stored; products are those of the quantized network."""
    pytest.importorskip("onnxruntime")
    example = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    quantize = lc.Quantize(8, activation_bits=8)
    plain = lc.compress(dense(), [quantize], example_input=example).model
    computed = lc.compress(
        plain, [EvolveWeights(generations=3, include=["conv1", "conv2"])], example_input=example
    ).model
    assert codes.read(computed.conv2, "weight").kind == "circuit"
    reports = [lc.export_onnx(m, example, tmp_path / f"{i}.onnx") for i, m in enumerate((plain, computed))]
    assert [layer.weight for layer in reports[1].layers] == ["int8"] * 5
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    whole = [to_integer(m)(example) for m in (plain, computed)]
    assert torch.equal(*whole)
