"""The search: the engine against plain Python and against the circuits themselves, phases, resuming, trade-offs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.cgp import Circuit, Evolution, EvolutionResult, Problem, Settings, evolve
from lightning_compress.cgp.gates.functions import FUNCTIONS, apply
from lightning_compress.cgp.search.engine import Compiled
from lightning_compress.cgp.search.seeds import random_circuit

SMALL = Settings(
    rows=5, cols=4, offspring=3, mutation=0.1, patience=60, generations=120, seed=5, seed_circuit="random"
)
X = np.random.default_rng(0).integers(-128, 128, (3, 6)).tolist()
Y = np.random.default_rng(1).integers(-128, 128, (3, 12)).tolist()


def plain(result: EvolutionResult) -> dict[str, object]:
    """All but the times."""
    return {
        "history": [replace(row, seconds=0) for row in result.history],
        "best": result.best.circuit.to_text(),
        "front": [(s.error, s.circuit.to_text(), str(s.cost)) for s in result.front],
        "children": (result.generations, result.evaluations + result.inherited, result.stopped),
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"error_threshold": 40.0},
        {"error_threshold": 15.0, "fitness": "AE"},
        {"look_back": 1, "error_threshold": 60.0},
        {"look_back": 3, "rows": 1, "cols": 9, "seed": 9},
        {"functions": (1, 2, 24, 25, 100), "offspring": 1, "error_threshold": 90.0},
        {"rows": 13, "cols": 11, "mutation": 0.02, "error_threshold": 50.0, "front": 5, "seed": 2},
        {"generations": 0},
        {"seed_circuit": "adder", "rows": 9, "cols": 9, "error_threshold": 8.0},
    ],
)
@pytest.mark.parametrize("sets", [1, 2, 3])
def test_engine_and_reference_are_the_same(change: dict[str, object], sets: int) -> None:
    chosen = replace(SMALL, **change)
    problem = Problem.of(X[:sets], Y[:sets], multiplex=sets != 1)
    fast, slow = (evolve(problem, chosen, engine=engine) for engine in ("compiled", "reference"))
    assert plain(fast) == plain(slow)
    if chosen.generations and chosen.seed_circuit == "random":
        assert len(fast.history) > 3 and fast.inherited > 0


@given(seed=st.integers(0, 10**6), sets=st.integers(1, 3), look=st.sampled_from([None, 1, 2]))
@settings(max_examples=1000, deadline=None)
def test_ten_thousand_circuits(seed: int, sets: int, look: int | None) -> None:
    """The arrays of the engine after some generations say what the circuit itself says: 1000 genomes, ten times."""
    draw = np.random.default_rng(seed)
    rows, cols, inputs = draw.integers(1, [9, 9, 12]).tolist()
    outputs = int(draw.integers(1, 20))
    problem = Problem(
        draw.integers(-128, 128, (sets, inputs)).astype(np.int8),
        draw.integers(-128, 128, (sets, outputs)).astype(np.int8),
        draw.integers(0, 4, (sets, outputs)),
        tuple(np.zeros(0, np.int64) for _ in range(sets)),
        inputs,
    )
    chosen = Settings(
        rows=rows, cols=cols, look_back=look, mutation=0.2, offspring=2, error_threshold=float(seed % 100)
    )
    grid = chosen.grid(problem)
    genome = random_circuit(grid, chosen.ids(sets), draw).genome
    engine = Compiled(problem, chosen, genome, seed | 1)
    engine.weigh(problem.counts, int(chosen.limit(sets * outputs)))
    for _ in range(10):
        circuit = Circuit(engine.genome(), grid)
        gaps = problem.outputs(circuit).astype(np.int64) - problem.targets
        cost = circuit.cost()
        error, energy, delay, gates, depth = engine.cost()
        assert error == int((problem.counts * gaps**2).sum())
        assert (energy, delay) == (round(cost.energy_pj * 1e6), round(cost.delay * 1e3))
        assert (gates, depth) == (cost.gate_count, cost.depth)
        engine.advance(2, 10**9, 2)


def test_functions_of_the_engine_on_all_operands() -> None:
    """65,536 operands of every function in both data sets, through circuits of one gate."""
    every = np.arange(-128, 128)
    for number, function in FUNCTIONS.items():
        inputs = np.stack([np.tile(every, 2), np.tile(every, 2)]).astype(np.int8)
        pairs = [
            (a, b)
            for a in (range(256) if function.uses_a else [0])
            for b in (range(256) if function.uses_b else [0])
        ]
        genes = [v for a, b in pairs for v in (a, 256 + b, number)]
        outputs = 512 + np.arange(len(pairs))
        problem = Problem(
            inputs,
            np.zeros((2, len(pairs)), np.int8),
            np.ones((2, len(pairs)), np.int64),
            (np.zeros(0, np.int64),) * 2,
            512,
        )
        chosen = Settings(rows=len(pairs), cols=1)
        engine = Compiled(problem, chosen, np.array([*genes, *outputs]), 1)
        engine.weigh(problem.counts, 0)
        a, b = (np.array(column) - 128 for column in zip(*pairs, strict=True))
        found = engine.state.values.reshape(-1, 2)[512:]
        for s in (0, 1):
            assert (found[:, s] == apply(number, a, b, s)).all(), number


def test_history_is_monotone_and_energy_never_rises_in_phase_two() -> None:
    problem = Problem.of([[3, 4, -7]], [np.random.default_rng(2).integers(-40, 40, 300)])
    chosen = replace(SMALL, rows=8, cols=8, error_threshold=9.0, generations=9000, patience=150)
    result = evolve(problem, chosen)
    first = [row for row in result.history if row.phase == 1]
    second = [row for row in result.history if row.phase == 2]
    limit = max(chosen.limit(problem.weights), second[0].error)
    assert len(first) > 5 and len(second) > 1
    for before, after in pairwise(second):
        assert after.error <= limit
        keys = [(r.energy, r.error, r.delay, r.gate_count, r.depth) for r in (after, before)]
        assert keys[0] < keys[1]
    assert result.best.error == second[-1].error and result.best.cost.gate_count == second[-1].gate_count
    wanted = np.concatenate(problem.decode(problem.targets)).astype(int)
    found = np.concatenate(problem.decode(problem.outputs(result.best.circuit))).astype(int)
    assert result.best.error == ((wanted - found) ** 2).sum() == pytest.approx(result.rms**2 * 300)
    assert result.met == (result.rms <= 9.0)


def test_trade_offs_dominate_all_that_were_accepted() -> None:
    problem = Problem.of([[1, 50, -100]], [list(range(-60, 60))])
    result = evolve(
        problem, replace(SMALL, rows=12, cols=8, generations=5000, patience=150, error_threshold=8.0)
    )
    points = [(s.error, s.cost.energy_pj, s.cost.delay, s.cost.gate_count) for s in result.front]
    assert 10 < len(points) <= 200 and len(set(points)) == len(points)
    for p in points:
        assert not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)
    for row in (
        r for r in result.history if r.phase == 2
    ):  # each accepted circuit is there, or something better
        given = (row.error, row.energy / 1e6, row.delay / 1e3, row.gate_count)
        assert any(all(a <= b + 1e-12 for a, b in zip(q, given, strict=True)) for q in points)
    for solution in result.front:
        gaps = problem.outputs(solution.circuit).astype(np.int64) - problem.targets
        assert solution.error == (problem.counts * gaps**2).sum()


@pytest.mark.parametrize("engine", ["compiled", "reference"])
@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_stopped_and_resumed_is_uninterrupted(stop: int, engine: str) -> None:
    problem = Problem.of([X[0], X[1]], [Y[0], Y[1]])
    chosen = replace(SMALL, error_threshold=50.0)
    whole = evolve(problem, chosen, engine=engine)
    assert len(whole.history) > stop
    calls = iter(range(1, 10**6))
    first = Evolution(problem, chosen, engine=engine)
    part = first.run(lambda _: next(calls) == stop)
    assert part.stopped == "callback" and len(part.history) == stop
    state = json.loads(json.dumps(first.state_dict()))
    again = evolve(problem, chosen, resume=state, engine=engine)
    assert plain(again) == plain(whole)
    assert plain(first.run()) == plain(whole)  # and so does the evolution itself
    done = Evolution(problem, chosen, engine=engine)
    done.load_state_dict(first.state_dict())
    assert plain(done.run()) == plain(whole)  # nothing is left to do


def test_states_that_do_not_fit_are_refused() -> None:
    problem = Problem.of([X[0]], [Y[0]])
    first = Evolution(problem, SMALL)
    first.run(lambda _: True)
    state = first.state_dict()
    for other, chosen, words in (
        (problem, replace(SMALL, seed=6, rows=6), "rows=5 there, 6 here; seed=5 there, 6 here"),
        (Problem.of([X[1]], [Y[0]]), SMALL, "another problem"),
    ):
        with pytest.raises(ValueError, match=words):
            evolve(other, chosen, resume=state)
    for damage in (
        {"genes": 3},
        {"front": state["genes"]},
        {"format": 2},
        {"history": [[1]]},
        {"genes": {"shape": [1], "zlib": "!"}},
    ):
        fresh = Evolution(problem, SMALL)
        with pytest.raises(ValueError, match="state"):
            fresh.load_state_dict(state | damage)
        assert plain(fresh.run()) == plain(evolve(problem, SMALL))
    forged = dict(state)
    genes = first._engine.genome()
    genes[-1] = 10**6
    forged["genes"] = {"shape": state["genes"]["shape"], "zlib": _packed(genes)}
    with pytest.raises(ValueError, match="output 11 uses pin 1000000"):
        evolve(problem, SMALL, resume=forged)
    genes = first._engine.genome()
    genes[1:3] = 7, 11  # a gate of one operand whose other one would read a gate behind it
    forged["genes"] = {"shape": state["genes"]["shape"], "zlib": _packed(genes)}
    with pytest.raises(ValueError, match="gate 6 uses pin 7"):
        evolve(problem, SMALL, resume=forged)


def _packed(array: np.ndarray) -> str:
    import base64
    import zlib

    return base64.b64encode(zlib.compress(array.astype("<i4").tobytes())).decode()


def test_nothing_to_compute() -> None:
    result = evolve(Problem.of([[5, 6]], [[6, 5, 5]]), SMALL)
    assert (result.stopped, result.best.error, result.best.cost.gate_count) == ("no outputs", 0, 0)
    assert result.met and result.rms == 0
    assert result.problem.decode(result.problem.outputs(result.best.circuit))[0].tolist() == [6, 5, 5]


def test_seeds_differ_and_repeat() -> None:
    problem = Problem.of([X[0]], [Y[0]])
    one, two, three = (evolve(problem, replace(SMALL, seed=s)) for s in (1, 1, 2))
    assert plain(one) == plain(two) != plain(three)


def test_multiplexed_and_direct_problems_decode_alike() -> None:
    for multiplex in (True, False):
        problem = Problem.of([X[0], X[1]], [Y[0], Y[1] + Y[2]], multiplex=multiplex)
        rows = problem.decode(problem.targets)
        assert [row.tolist() for row in rows] == [Y[0], Y[1] + Y[2]]
        assert problem.weights == 36
        assert problem.targets.shape[1] == (
            24 if not multiplex else len({*Y[0], *Y[1], *Y[2]}) - problem_inputs()
        )


def problem_inputs() -> int:
    """Values that an input of their own data set has, so that no output is needed for them."""
    needed = (set(Y[0]) - set(X[0])) | (set(Y[1] + Y[2]) - set(X[1]))
    return len({*Y[0], *Y[1], *Y[2]}) - len(needed)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rows": 0}, "rows=0"),
        ({"fitness": "RMS"}, "SE, MSE, AE"),
        ({"mutation": 0}, "0 < mutation"),
        ({"error_threshold": -1}, "error_threshold=-1"),
        ({"functions": (1, 99)}, "99"),
        ({"functions": "all"}, "standard"),
        ({"seed": -1}, "seed=-1"),
        ({"look_back": 0}, "look_back=0"),
        ({"generations": -1}, "generations=-1"),
        ({"seed_circuit": "best"}, "adder, random"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**wrong)


def test_problems_that_make_no_sense() -> None:
    for inputs, outputs, words in (
        ([[1]], [[200]], "-128 to 127"),
        ([[1.5]], [[2]], "whole numbers"),
        ([[1]], [[]], "0 values"),
        ([[1], [2]], [[1]], "2 rows of inputs and 1 of outputs"),
    ):
        with pytest.raises(ValueError, match=words):
            Problem.of(inputs, outputs)
    with pytest.raises(ValueError, match="engine='gpu'"):
        Evolution(Problem.of([[1]], [[2]]), engine="gpu")
