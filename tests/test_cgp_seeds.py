"""Circuits that evolution starts from: every wanted value, legal pins, and no more energy than simpler ways need."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from lightning_compress.cgp import Circuit, Grid
from lightning_compress.cgp.gates.functions import FUNCTIONS, SELECTING, STANDARD, WIRE, apply
from lightning_compress.cgp.search.derivation import derive
from lightning_compress.cgp.search.layout import place
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.seeds import adder, random_circuit
from lightning_compress.energy import EnergyTable, Operation

TABLE = EnergyTable.default()
VALUES = list(range(-128, 128))
int8 = st.integers(-128, 127)


def grid_of(problem: Problem, rows: int, cols: int, look_back: int | None = None) -> Grid:
    return Grid(problem.inputs.shape[1], problem.targets.shape[1], rows, cols, look_back, problem.datasets)


def greedy_energy(start: set[int], wanted: set[int]) -> float:
    """The cheapest missing value by one operation, again and again, free ones first; then what nobody needs goes."""
    there: set[int] = set()
    made: dict[int, tuple[float, set[int]]] = {}
    offers: dict[
        int, tuple[float, set[int]]
    ] = {}  # value -> energy of one operation that gives it, its operands

    def offer(f: int, a: list[int], b: list[int]) -> None:
        energy = TABLE[f].energy_pj
        for value, left, right in zip(apply(f, a, b).tolist(), a, b, strict=True):
            if value not in there and (value not in offers or energy < offers[value][0]):
                offers[value] = energy, {left, right} if FUNCTIONS[f].uses_b else {left}

    def add(value: int) -> None:
        there.add(value)
        offers.pop(value, None)
        others = sorted(there)
        for f in STANDARD:
            if FUNCTIONS[f].uses_b:
                offer(f, others, [value] * len(others))
                offer(f, [value] * len(others), others)
            elif FUNCTIONS[f].uses_a:
                offer(f, [value], [value])

    for value in (0, 1, -1, -128, 127):
        offers[value] = 0.0, set()
    for value in start:
        add(value)
    while not wanted <= there:
        value = min(offers, key=lambda v: (offers[v][0], v))
        made[value] = offers[value]
        add(value)
    needed = set(wanted)
    for value in reversed(made):
        needed |= made[value][1] if value in needed else set()
    return sum(energy for value, (energy, _) in made.items() if value in needed)


def test_all_values_from_one_constant_take_the_least_energy() -> None:
    """Values to which no free operation leads from another value need one that costs 0.0005 pJ at least."""
    free = [f for f in STANDARD if FUNCTIONS[f].uses_a and TABLE[f].energy_pj == 0]
    values = np.array(VALUES)
    edges = np.concatenate([np.stack([values, apply(f, values, values)]) for f in free], axis=1) + 128
    links = csr_array((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(256, 256))
    count, part = connected_components(links, connection="strong")
    entered = set(part[edges[1]][part[edges[0]] != part[edges[1]]].tolist())
    constants = {int(apply(f, 0, 0)) for f in STANDARD if not FUNCTIONS[f].uses_a}
    sources = [p for p in range(count) if p not in entered and not {part[v + 128] for v in constants} & {p}]
    problem = Problem.of([[0]], [VALUES], loaded=0)
    circuit = adder(problem, grid_of(problem, 64, 16), STANDARD, TABLE)
    assert (problem.outputs(circuit) == problem.targets).all()
    energy = circuit.cost().energy_pj
    assert energy == pytest.approx(0.0005 * len(sources)) and len(sources) == 63
    assert energy <= 0.060  # what adding the cheapest value gives


@given(st.sets(int8, min_size=1, max_size=30), st.sets(int8, min_size=1, max_size=60))
@settings(max_examples=8)
def test_never_more_energy_than_the_greedy_way(start: set[int], wanted: set[int]) -> None:
    problem = Problem.of([sorted(start)], [sorted(wanted)])
    circuit = adder(problem, grid_of(problem, 32, 32), STANDARD, TABLE)
    assert problem.decode(problem.outputs(circuit))[0].tolist() == sorted(wanted)
    assert circuit.cost().energy_pj <= greedy_energy(start, wanted) + 1e-12


@given(
    st.lists(int8, min_size=1, max_size=12),
    st.lists(int8, min_size=1, max_size=40),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([STANDARD, (1, WIRE, 22), (2, 13, WIRE), (0, 1, 3, 8, 12, 13), (14, 100)]),
)
@settings(max_examples=20)
@pytest.mark.filterwarnings("error")
def test_every_value_on_a_large_grid(
    inputs: list[int], outputs: list[int], look_back: int, multiplex: bool, functions: tuple[int, ...]
) -> None:
    problem = Problem.of([inputs], [outputs], multiplex=multiplex)
    deep = 14 in functions  # 255 times minus one
    grid = grid_of(problem, 80, 300 if deep else 40, look_back if WIRE in functions else None)
    circuit = adder(problem, grid, functions, TABLE)
    assert problem.decode(problem.outputs(circuit))[0].tolist() == outputs
    assert set(circuit.gates[:, 2].tolist()) <= set(functions)
    check_all_pins(circuit)


def check_all_pins(circuit: Circuit) -> None:
    """Also those of gates that nobody reads, since a mutation may put them to use."""
    grid = circuit.grid
    for gate, (a, b, _) in enumerate(circuit.gates.tolist()):
        inputs, first, end = grid.legal(gate // grid.rows)
        if inputs or first < end:
            assert all(0 <= pin < inputs or first <= pin < end for pin in (a, b))


@given(st.data())
@settings(max_examples=15)
def test_several_data_sets(data: st.DataObject) -> None:
    """Targets that differ between even and odd rows need a multiplexer; equal ones are computed from equal inputs."""
    sets = data.draw(st.integers(2, 4))
    inputs = [data.draw(st.lists(int8, min_size=3, max_size=3)) for _ in range(sets)]
    halves = [data.draw(st.lists(int8, min_size=5, max_size=5)) for _ in range(2)]
    problem = Problem.of(inputs, [halves[d % 2] for d in range(sets)], multiplex=data.draw(st.booleans()))
    circuit = adder(problem, grid_of(problem, 32, 24), (*STANDARD, *SELECTING), TABLE)
    decoded = problem.decode(problem.outputs(circuit))
    assert [row.tolist() for row in decoded] == [halves[d % 2] for d in range(sets)]
    check_all_pins(circuit)


def test_a_multiplexer_of_inputs_where_it_is_cheaper() -> None:
    """5 is in both rows but on different pins; computing it costs more than choosing if additions are all there is."""
    problem = Problem.of([[5, 1], [1, 5]], [[5], [5]], multiplex=False)
    circuit = adder(problem, grid_of(problem, 2, 2), (1, 22, 27), TABLE)
    assert problem.outputs(circuit).tolist() == [[5], [5]]
    assert circuit.cost().energy_pj == pytest.approx(0.014)
    assert adder(problem, grid_of(problem, 2, 3), (22, 24, 18, 9), TABLE).cost().energy_pj == pytest.approx(
        0.008
    )
    demultiplexed = Problem.of([[5], [7]], [[1], [0]], multiplex=False)
    circuit = adder(demultiplexed, grid_of(demultiplexed, 2, 2), (22, 28), TABLE)
    assert demultiplexed.outputs(circuit).tolist() == [[1], [0]]


def test_too_few_gates() -> None:
    """The values that most weights have come first, and others get what is nearest."""
    outputs = [10] * 9 + [-30] * 5 + [77] + [78] * 2
    problem = Problem.of([[0]], [outputs], loaded=0)
    with pytest.warns(UserWarning, match="1 x 5 gates lacks 3 of 4 values") as caught:
        circuit = adder(problem, grid_of(problem, 1, 5), (1, 2, 12, 22, 23), TABLE)
    assert caught[0].filename == __file__
    found = dict(zip(problem.targets[0].tolist(), problem.outputs(circuit)[0].tolist(), strict=True))
    there = {0} | {int(v) for v in found.values()}
    assert found[10] == 10
    assert all(abs(value - wanted) == min(abs(v - wanted) for v in there) for wanted, value in found.items())
    with pytest.warns(UserWarning, match="2 of 2 values"):  # nothing leads to odd numbers
        circuit = adder(Problem.of([[4]], [[1, 3]]), Grid(1, 2, 3, 3), (12, WIRE), TABLE)
    assert circuit.evaluate([4]).tolist() == [4, 4]


def test_outputs_without_weights_cost_nothing() -> None:
    problem = Problem(
        np.array([[3]], np.int8),
        np.array([[6, 99, 6]], np.int8),
        np.array([[1, 0, 4]]),
        (np.array([1, 3, 3, 3, 3]),),
        1,
    )
    circuit = adder(problem, Grid(1, 3, 4, 4, 1), STANDARD, TABLE)
    assert circuit.evaluate([3]).tolist() == [6, 6, 6] and circuit.cost().gate_count == 1
    nothing = Problem.of([[3]], [[3]])
    assert adder(nothing, Grid(1, 0, 2, 2), STANDARD, TABLE).cost().gate_count == 0


def test_costs_of_another_table() -> None:
    """Where multiplication is cheapest of all, it is used."""
    table = EnergyTable(
        {n: dataclasses.replace(o, energy_pj=0.001 if n == 3 else 1.0) for n, o in TABLE.operations.items()}
    )
    problem = Problem.of([[3, 5]], [[15, 45, 75]])
    circuit = adder(problem, grid_of(problem, 8, 8), STANDARD, table)
    assert circuit.cost(table).energy_pj == pytest.approx(0.003)
    assert isinstance(table[3], Operation)


def test_a_grid_of_another_problem() -> None:
    problem = Problem.of([[3]], [[5, 6]])
    with pytest.raises(
        ValueError, match=r"has \(2, 2, 1\) inputs, outputs and data sets; the problem has \(1, 2, 1\)"
    ):
        adder(problem, Grid(2, 2, 4, 4), STANDARD, TABLE)


@given(
    st.integers(0, 4),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_random_circuits_are_legal(
    inputs: int, outputs: int, rows: int, cols: int, look_back: int, seed: int
) -> None:
    grid = Grid(inputs, outputs, rows, cols, look_back)
    circuit = random_circuit(grid, STANDARD, np.random.default_rng(seed))
    again = random_circuit(grid, STANDARD, np.random.default_rng(seed))
    assert (circuit.genome == again.genome).all()
    check_all_pins(circuit)
    if inputs == 0:
        assert all(22 <= number <= 26 for number in circuit.gates[:rows, 2])


def test_random_genes_are_spread_evenly() -> None:
    grid = Grid(2, 4000, 1, 4, 2)
    circuit = random_circuit(grid, STANDARD, np.random.default_rng(0))
    pins, counts = np.unique(circuit.outputs, return_counts=True)
    assert pins.tolist() == [4, 5] and abs(counts - 2000).max() < 200
    wide = random_circuit(Grid(3, 1, 3000, 2), (1, 2, 24), np.random.default_rng(0))
    assert abs(np.unique(wide.gates[:, 2], return_counts=True)[1] - 2000).max() < 200
    share = float((wide.gates[3000:, 0] < 3).mean())
    assert share == pytest.approx(3 / 3003, abs=0.003)
    with pytest.raises(ValueError, match="need a constant"):
        random_circuit(Grid(0, 1, 2, 2), (1,), np.random.default_rng(0))
    with pytest.raises(ValueError, match="functions"):
        random_circuit(Grid(1, 1, 2, 2), (), np.random.default_rng(0))


@given(st.data())
@settings(max_examples=60)
def test_moved_gates_compute_the_same(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    old = Grid(2, data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5)))
    circuit = random_circuit(old, STANDARD, random)
    new = dataclasses.replace(
        old,
        rows=data.draw(st.integers(1, 8)),
        cols=data.draw(st.integers(1, 12)),
        look_back=data.draw(st.integers(1, 12)),
    )
    moved = place(circuit, new, WIRE, random_circuit(new, STANDARD, random).genome)
    if moved is None:
        assert (
            circuit.active().sum() > new.rows * new.cols
            or circuit.cost().depth > new.cols
            or new.rows * new.look_back < 16
        )
        return
    x = random.integers(-128, 128, (20, 2))
    assert (moved.evaluate(x) == circuit.evaluate(x)).all()
    assert dataclasses.replace(moved.cost(), area_um2=0.0) == dataclasses.replace(
        circuit.cost(), area_um2=0.0
    )


def levels_by_hand(there: set[int], functions: tuple[int, ...], most: int) -> dict[int, int]:
    """The least number of operations in a chain to each value: all operations on all that one less leads to."""
    found = dict.fromkeys(there, 0)
    for level in range(1, most + 1):
        known = np.array(sorted(found), dtype=np.int64)
        a, b = (grid.ravel() for grid in np.meshgrid(known, known, indexing="ij"))
        for f in functions:
            if len(known) or not (FUNCTIONS[f].uses_a or FUNCTIONS[f].uses_b):
                for value in np.unique(apply(f, a if len(a) else 0, b if len(b) else 0)).tolist():
                    found.setdefault(value, level)
    return found


@given(
    st.sets(int8, max_size=4),
    st.sets(int8, min_size=1, max_size=40),
    st.sampled_from([STANDARD, (1, 22), (2, 12, 22), (5, 7, 12, 18, 24), (3, 8, 13)]),
    st.integers(1, 6),
    st.sampled_from(["dense", "plain", "shallow"]),
    st.sampled_from([0.0, 0.01, 100.0]),
)
@settings(max_examples=60)
def test_derivations(
    start: set[int], wanted: set[int], functions: tuple[int, ...], levels: int, way: str, price: float
) -> None:
    """Each value is what its operation makes of its operands, which stand on lower levels; nothing is unused."""
    there, needed = (np.isin(VALUES, sorted(values)) for values in (start, wanted))
    found = derive(there, needed, functions, TABLE, levels=levels, gate_pj=price, way=way)
    used = set()
    for v in np.flatnonzero(found.function >= 0).tolist():
        f, operands = FUNCTIONS[int(found.function[v])], (int(found.a[v]), int(found.b[v]))
        assert (operands[0] >= 0) == (f.uses_a or f.uses_b) and (operands[1] >= 0) == f.uses_b
        a, b = (operand - 128 if operand >= 0 else 0 for operand in operands)
        assert apply(int(found.function[v]), a, b) == v - 128
        assert found.level[v] == 1 + max(int(found.level[p]) if p >= 0 else 0 for p in operands) <= levels
        used |= {p for p in operands if p >= 0}
    made = set(np.flatnonzero(found.function >= 0).tolist())
    assert made <= used | {v + 128 for v in wanted} and not made & {v + 128 for v in start}
    least = levels_by_hand(start, functions, levels)
    missing = {v for v in wanted if found.level[v + 128] < 0}
    assert missing >= wanted - set(least)
    if way == "shallow":
        assert missing == wanted - set(least)


def test_chains_end_where_columns_do() -> None:
    """7 = ((0 + 1) + 1) + ...: a chain of levels that are allowed."""
    there, wanted = (np.arange(-128, 128) == v for v in (0, 7))
    for way in ("dense", "plain", "shallow"):
        assert derive(there, wanted, (13,), TABLE, levels=7, way=way).level[7 + 128] == 7
        assert derive(there, wanted, (13,), TABLE, levels=6, way=way).level[7 + 128] == -1
    doubled = derive(there, wanted, (1, 22), TABLE, levels=4)
    assert (
        doubled.level[7 + 128] == 4 and (doubled.function >= 0).sum() == 5
    )  # 1, 2, 3, 6, 7 or 1, 2, 3, 4, 7


def test_few_columns() -> None:
    """All values from 0 within four columns, which the cheapest chains do not leave."""
    problem = Problem.of([[0]], [VALUES], loaded=0)
    circuit = adder(problem, grid_of(problem, 256, 4), STANDARD, TABLE)
    assert (problem.outputs(circuit) == problem.targets).all()
    with pytest.warns(UserWarning, match="2 x 3 gates lacks"):  # more values than outputs can see
        adder(problem, grid_of(problem, 2, 3, 1), STANDARD, TABLE)
