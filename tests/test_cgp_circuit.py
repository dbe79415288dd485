"""Circuits: every function on all operands, hand-made circuits, random ones against their exported source."""

import dataclasses
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.cgp import Circuit, CircuitCost, Grid, to_python, to_testbench, to_verilog
from lightning_compress.cgp.gates.functions import FUNCTIONS, SELECTING, STANDARD, WIRE, apply
from lightning_compress.energy import EnergyTable, Operation

A, B = (grid.ravel() for grid in np.meshgrid(np.arange(-128, 128), np.arange(-128, 128), indexing="ij"))


def byte(value: int) -> int:
    """Two's complement, by its bits."""
    bits = value % 256
    return bits - 256 if bits > 127 else bits


DEFINITIONS = {
    0: lambda a, b: 127 - a,
    1: lambda a, b: a + b,
    2: lambda a, b: a - b,
    3: lambda a, b: a * b,
    4: lambda a, b: 0 - a,
    5: lambda a, b: a - 128,
    6: lambda a, b: math.floor(a / 4),
    7: lambda a, b: math.floor(a / 2),
    8: lambda a, b: (a % 256) & (b % 256),
    9: lambda a, b: (a % 256) | (b % 256),
    10: lambda a, b: (a % 256) ^ (b % 256),
    11: lambda a, b: 255 - a % 256,
    12: lambda a, b: 2 * a,
    13: lambda a, b: a + 1,
    14: lambda a, b: a - 1,
    15: lambda a, b: math.floor(a / 8),
    16: lambda a, b: math.floor(a / 16),
    17: lambda a, b: math.floor(a / 32),
    18: lambda a, b: 4 * a,
    19: lambda a, b: 8 * a,
    20: lambda a, b: 16 * a,
    21: lambda a, b: 32 * a,
    22: lambda a, b: 1,
    23: lambda a, b: -1,
    24: lambda a, b: 0,
    25: lambda a, b: -128,
    26: lambda a, b: 127,
    WIRE: lambda a, b: a,
}
BY_DATA_SET = {27: lambda a, b, s: [a, b][s], 28: lambda a, b, s: [a, 0][s]}


def test_every_function_is_tested() -> None:
    assert DEFINITIONS.keys() | BY_DATA_SET.keys() == set(FUNCTIONS)
    assert set(STANDARD) == set(DEFINITIONS) and set(SELECTING) == set(BY_DATA_SET)
    assert {number for number, function in FUNCTIONS.items() if function.selects} == set(SELECTING)


@pytest.mark.parametrize("number", BY_DATA_SET)
@pytest.mark.parametrize("s", [0, 1])
def test_multiplexers_on_all_operands(number: int, s: int) -> None:
    wanted = [BY_DATA_SET[number](a, b, s) for a, b in zip(A.tolist(), B.tolist(), strict=True)]
    assert apply(number, A, B, s).tolist() == wanted
    assert FUNCTIONS[number].uses_a and FUNCTIONS[number].uses_b == (number == 27)


@pytest.mark.parametrize("number", DEFINITIONS)
def test_functions_on_all_operands(number: int) -> None:
    wanted = [byte(DEFINITIONS[number](a, b)) for a, b in zip(A.tolist(), B.tolist(), strict=True)]
    found = apply(number, A.astype(np.int8), B.astype(np.int8))
    assert found.dtype == np.int8 and found.tolist() == wanted
    uses_a = any(
        DEFINITIONS[number](a, 3) != DEFINITIONS[number](0, 3) for a in (1, 64, -128)
    )  # what "uses" says is what the values say
    uses_b = any(byte(DEFINITIONS[number](5, b)) != byte(DEFINITIONS[number](5, 0)) for b in (1, 64, -128))
    assert (FUNCTIONS[number].uses_a, FUNCTIONS[number].uses_b) == (uses_a, uses_b)


def test_a_circuit_by_hand() -> None:
    """y0 = (x0 + x1) << 1 and y1 = -128 + (x0 + x1); a multiplication that nobody reads, a constant, a wire."""
    text = "{2,3,3,2,2,3,1}([2]0,1,1)([3]0,1,3)([4]2,0,12)([5]2,3,5)([6]0,0,22)([7]5,0,100)(4,7,6)"
    circuit = Circuit.from_text(text)
    assert circuit.to_text() == text
    assert circuit.active().tolist() == [True, False, True, True, True, True]
    assert circuit.evaluate([30, 40]).tolist() == [byte(140), byte(70 - 128), 1]
    assert circuit.evaluate([[30, 40], [-1, 1]]).tolist() == [[-116, -58, 1], [0, -128, 1]]
    cost = circuit.cost()
    assert cost.energy_pj == pytest.approx(
        0.03 + 0.0005
    )  # addition, shift, most significant bit, constant, wire
    assert (cost.delay, cost.depth, cost.gate_count) == (pytest.approx(1.05), 2, 4)
    assert math.isnan(cost.area_um2)


def test_constants_start_a_path() -> None:
    """Operands that a function does not use lead nowhere: neither delay nor energy."""
    circuit = Circuit.from_text("{1,1,2,1,2,2,1}([1]0,0,3)([2]1,1,26)(2)")
    assert circuit.active().tolist() == [False, True]
    assert circuit.cost().delay == 0.0 and circuit.cost().energy_pj == 0.0 and circuit.cost().depth == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{2,1,1,1,2,1,1}([2]0,7,1)(2)", "gate 2 uses pin 7; allowed there: 0 to 1"),
        ("{2,1,1,1,2,1,1}([2]0,1,99)(2)", "gate 2 has function 99"),
        ("{2,1,3,1,2,1,1}([2]0,1,1)([3]2,2,1)([4]0,3,1)(4)", "gate 4 uses pin 0; allowed there: 3 to 3"),
        ("{2,1,2,1,2,1,1}([2]0,1,1)([3]2,2,1)(2)", "output 0 uses pin 2; allowed there: 3 to 3"),
        ("{2,1,1,1,2,1,1}([3]0,1,1)(2)", r"position 15: needed is \(\[2\]a,b,function\)"),
        ("{2,1,1,1,2,1,1}([2]0,1)(2)", "position 15"),
        ("{2,1,1,1,2,1,1}([2]0,1,1)(2,2)", "position 25: 2 outputs"),
        ("{2,1,1,1,2,1,1}([2]0,x,1)(2)", "no whole number"),
        ("[2,1]", "position 0: needed is the sizes"),
        ("{2,1,1,1,3,1,1}([2]0,1,1)(2)", r"sizes \[2, 1, 1, 1, 3, 1, 1\] at position 0; needed are 7"),
        ("{2,1,1,1,2,1}([2]0,1,1)(2)", "needed are 7"),
        ("{2,1,1,1,2,1,0}([2]0,1,1)(2)", "datasets=0"),
        ("{2,1,1,1,2,0,1}([2]0,1,1)(2)", "look_back=0"),
        ("{-2,1,1,1,2,1,1}([2]0,1,1)(2)", "inputs=-2"),
        ("{2,1,99999,99999,2,1,1}([2]0,1,1)(2)", "9999800001 gates"),
        ("{2,1,9999,9999,2,1,1}([2]0,1,1)(2)", "position 31: .*gate 3"),
        ("{2,1,1,1,2,1,1}([2]0,-1,1)(2)", "gate 2 uses pin -1; allowed there: 0 to 1"),
        ("{2,1,1,1,2,1,1}([2]0,-1,11)(2)", "gate 2 uses pin -1; allowed there: 0 to 2"),
        ("{2,1,1,1,2,1,1}([2]0,3,11)(2)", "gate 2 uses pin 3; allowed there: 0 to 2"),
        ("{2,1,1,1,2,1,1}([2]0,4294967296,1)(2)", "gate 2 uses pin"),
        ("{2,1,1,1,2,1,1}([2]0,1,1)(-1)", "output 0 uses pin -1"),
        ("{2,1,1,1,2,1,1}([2]0,1_0,1)(2)", "no whole number"),
        ("{2,1,1,1,2,1,1}([2]0,99999999999,1)(2)", "no whole number of at most 10 digits"),
    ],
)
def test_texts_that_are_no_circuits(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Circuit.from_text(text)


@st.composite
def circuits(draw: st.DrawFn) -> Circuit:
    look_back = draw(st.one_of(st.none(), st.integers(1, 5)))
    rows, cols, sets = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    grid = Grid(draw(st.integers(1, 4)), draw(st.integers(0, 5)), rows, cols, look_back, sets)
    genes: list[int] = []

    def pin(column: int) -> int:
        inputs, first, end = grid.legal(column)
        return draw(st.sampled_from([*range(inputs), *range(first, end)]))

    for gate in range(grid.gates):
        column = gate // grid.rows
        genes += [pin(column), pin(column), draw(st.sampled_from(list(FUNCTIONS)))]
    return Circuit(np.array(genes + [pin(grid.cols) for _ in range(grid.outputs)], dtype=np.int32), grid)


class Simulator:
    """Runs the Verilog of ``to_verilog``: one assignment after the other, on Python integers."""

    def __init__(self, source: str) -> None:
        self.assignments = re.findall(r"(?:wire signed \[7:0\]|assign) (\w+) = (.*);", source)
        self.selects = re.search(r"^  input s,?$", source, re.MULTILINE) is not None

    def __call__(self, x: list[int], s: int) -> list[int]:
        values = {f"x{i}": v for i, v in enumerate(x)} | ({"s": s} if self.selects else {})
        for name, formula in self.assignments:
            plain = re.sub(r"8'sh([0-9a-f]{2})", lambda m: str(byte(int(m[1], 16))), formula)
            plain = re.sub(r"8'sd", "", plain).replace(">>>", ">>")
            plain = re.sub(r"^(\w+) \? (\w+) : (\w+)$", r"\2 if \1 else \3", plain)
            values[name] = byte(eval(plain, {}, values))
        return [values[f"y{i}"] for i in range(sum(name.startswith("y") for name in values))]


@given(circuits(), st.lists(st.lists(st.integers(-128, 127), min_size=4, max_size=4), min_size=3, max_size=6))
@settings(max_examples=200)
def test_text_python_and_verilog_say_the_same(circuit: Circuit, rows: list[list[int]]) -> None:
    grid = circuit.grid
    sets = grid.datasets
    x = np.array([row[: grid.inputs] for row in rows[: len(rows) // sets * sets]])
    wanted = circuit.evaluate(x if sets == 1 else x.reshape(-1, sets, grid.inputs)).reshape(
        len(x), grid.outputs
    )
    again = Circuit.from_text(circuit.to_text())
    assert (again.genome == circuit.genome).all() and again.to_text() == circuit.to_text()
    assert dataclasses.replace(again.grid, look_back=None) == dataclasses.replace(grid, look_back=None)
    assert again.grid.reach == grid.reach
    scope: dict = {}
    exec(to_python(circuit, "made"), scope)
    verilog = Simulator(to_verilog(circuit))
    for k, row in enumerate(x.tolist()):
        select = [k % sets % 2] if verilog.selects else []
        assert scope["made"](row, *select) == wanted[k].tolist()
        assert verilog(row, k % sets % 2) == wanted[k].tolist()


@given(circuits(), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_data_sets_are_evaluated_each_by_itself(circuit: Circuit, seed: int) -> None:
    """Without multiplexers they are so many rows; with them, odd ones take the other operand."""
    grid = circuit.grid
    x = np.random.default_rng(seed).integers(-128, 128, (5, grid.datasets, grid.inputs))
    found = circuit.evaluate(x if grid.datasets > 1 else x[:, 0]).reshape(5, grid.datasets, grid.outputs)
    for d in range(grid.datasets):
        genes = circuit.genome.copy()
        gates = genes[: 3 * grid.gates].reshape(-1, 3)
        for gate, (_, b, number) in enumerate(circuit.gates.tolist()):
            if number == 27:
                gates[gate] = [b, b, WIRE] if d % 2 else [gates[gate, 0], b, WIRE]
            if number == 28:
                gates[gate, 2] = 24 if d % 2 else WIRE
        plain = Circuit(genes, dataclasses.replace(grid, datasets=1))
        assert (plain.evaluate(x[:, d]) == found[:, d]).all()


@given(circuits(), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_compact_circuits(circuit: Circuit, seed: int) -> None:
    compact = circuit.compact()
    used = int(circuit.active().sum())
    assert compact.grid.gates == max(1, used) and compact.active().sum() == used
    x = np.random.default_rng(seed).integers(-128, 128, (5, circuit.grid.datasets, circuit.grid.inputs))
    x = x if circuit.grid.datasets > 1 else x[:, 0]
    assert (compact.evaluate(x) == circuit.evaluate(x)).all()
    assert str(compact.cost()) == str(circuit.cost())  # an unknown area is not equal to itself
    assert (compact.compact().genome == compact.genome).all()


def test_nothing_to_look_at() -> None:
    circuit = Circuit(np.array([0, 0, 24, 0, 0, 22]), Grid(0, 0, 2, 1))
    assert circuit.evaluate([]).shape == (0,) and circuit.compact().grid.gates == 1
    assert circuit.cost() == CircuitCost(0.0, 0.0, 0.0, 0, 0)
    assert (
        Circuit.from_text(circuit.to_text()).to_text()
        == circuit.to_text()
        == "{0,0,1,2,2,1,1}([0]0,0,24)([1]0,0,22)()"
    )
    assert "PASS" in to_testbench(circuit, np.zeros((3, 0), np.int8))
    far = Circuit.from_text("{2000000000,1,1,1,2,1,1}([2000000000]0,0,11)(2000000000)")
    assert far.cost().gate_count == 1 and far.compact().grid.inputs == 2_000_000_000  # no array of all inputs


@pytest.mark.parametrize(
    ("genome", "message"),
    [
        (np.array([0, 0, 1.5, 1]), "dtype float64"),
        (np.array([0, 0, 1]), r"shape \(3,\)"),
        (np.array([2**32, 0, 1, 1]), "gate 1 uses pin 2147483647"),
        (np.array([0, 0, 2**32 + 1, 1]), "function 2147483647"),
    ],
)
def test_genomes_that_are_no_circuits(genome: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Circuit(genome, Grid(1, 1, 1, 1))


def test_inputs_that_do_not_fit() -> None:
    circuit = Circuit.from_text("{2,1,1,1,2,1,2}([2]0,1,27)(2)")
    assert circuit.evaluate([[1, 2], [3, 4]]).tolist() == [[1], [4]]
    for x in ([1, 2], [[1, 2]], [[1, 2], [3, 128]], [[1, 2], [3, 0.5]]):
        with pytest.raises(ValueError, match=r"whole numbers from -128 to 127 of shape \[..., 2, 2\]"):
            circuit.evaluate(x)


@given(circuits())
def test_costs_count_what_the_outputs_need(circuit: Circuit) -> None:
    """By another way: recursion from the outputs."""
    table = EnergyTable.default()
    seen: set[int] = set()

    def walk(pin: int) -> tuple[float, int]:
        if pin < circuit.grid.inputs:
            return 0.0, 0
        a, b, number = circuit.gates[pin - circuit.grid.inputs].tolist()
        seen.add(pin)
        used = [p for p, letter in ((a, "a"), (b, "b")) if letter in FUNCTIONS[number].formula]
        found = [walk(p) for p in used] or [(0.0, 0)]
        return max(d for d, _ in found) + table[number].delay, max(n for _, n in found) + (number != WIRE)

    ends = [walk(pin) for pin in circuit.outputs.tolist()] or [(0.0, 0)]
    cost = circuit.cost()
    numbers = [int(circuit.gates[pin - circuit.grid.inputs, 2]) for pin in seen]
    assert cost.delay == pytest.approx(max(d for d, _ in ends)) and cost.depth == max(n for _, n in ends)
    assert cost.energy_pj == pytest.approx(sum(table[n].energy_pj for n in numbers))
    assert cost.gate_count == sum(n != WIRE for n in numbers)
    assert circuit.active().sum() == len(seen)


@pytest.mark.skipif(shutil.which("iverilog") is None, reason="Icarus Verilog is not installed")
@pytest.mark.parametrize("sets", [1, 2, 3])
def test_icarus_runs_the_test_bench(sets: int) -> None:
    rng = np.random.default_rng(0)
    grid = Grid(3, 6, 8, 6, datasets=sets)
    functions = list(FUNCTIONS) if sets > 1 else list(STANDARD)
    genes: list[int] = []
    for gate in range(grid.gates):
        end = grid.legal(gate // grid.rows)[2]
        genes += [*rng.integers(0, end, 2).tolist(), functions[gate % len(functions)]]
    ends = grid.inputs + (np.array([26, 27, 45, 46, 47, 44]) if sets > 1 else rng.integers(0, grid.gates, 6))
    circuit = Circuit(np.array([*genes, *ends.tolist()]), grid)
    x = rng.integers(-128, 128, (20, sets, 3) if sets > 1 else (50, 3))
    verilog = to_verilog(circuit)
    assert ("  input s,\n" in verilog) == (sets > 1)
    Path("circuit.v").write_text(verilog, encoding="utf-8")
    Path("good.v").write_text(to_testbench(circuit, x), encoding="utf-8")
    other = re.sub(r"!== 8'sh..", "!== 8'sh5a", to_testbench(circuit, x))
    Path("bad.v").write_text(other, encoding="utf-8")
    for name, wanted in (("good", "PASS"), ("bad", "FAIL")):
        subprocess.run(["iverilog", "-g2012", "-o", name, "circuit.v", f"{name}.v"], check=True)
        done = subprocess.run(["vvp", "-n", name], capture_output=True, text=True)
        assert wanted in done.stdout and (done.returncode == 0) == (name == "good")


def test_names_in_exported_code() -> None:
    circuit = Circuit.from_text("{1,1,1,1,2,1,1}([1]0,0,4)(1)")
    with pytest.raises(ValueError, match="no word of the language"):
        to_python(circuit, "lambda")
    with pytest.raises(ValueError, match="no word of the language"):
        to_python(circuit, "wrap")
    for name in ("a b", "reg", "endcase"):
        with pytest.raises(ValueError, match="no word of the language"):
            to_verilog(circuit, name)
        with pytest.raises(ValueError, match="no word of the language"):
            to_testbench(circuit, [[1]], name)


def test_energy_tables() -> None:
    table = EnergyTable.default()
    assert set(table.operations) == set(FUNCTIONS)
    assert table.sram_pj_per_byte == 1.25 and table.dram_pj_per_byte == 160.0
    table.to_csv("costs.csv")
    back = EnergyTable.from_csv("costs.csv")
    assert {n: (o.name, o.energy_pj, o.delay) for n, o in back.operations.items()} == {
        n: (o.name, o.energy_pj, o.delay) for n, o in table.operations.items()
    }
    assert all(o.source == "given" for o in back.operations.values())
    lines = Path("costs.csv").read_text(encoding="utf-8").splitlines()
    Path("short.csv").write_text("\n".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks operations 100 \(a\)"):
        EnergyTable.from_csv("short.csv")
    Path("words.csv").write_text("\n".join([*lines[:2], "1,a + b,cheap,,1"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"words\.csv, line 3: could not convert"):
        EnergyTable.from_csv("words.csv")
    areas = EnergyTable(
        {n: dataclasses.replace(o, area_um2=2.0) for n, o in table.operations.items() if n != WIRE}
        | {WIRE: table[WIRE]}
    )
    wired = Circuit.from_text("{1,1,2,1,2,2,1}([1]0,0,11)([2]1,1,100)(2)")
    assert wired.cost(areas).area_um2 == 2.0  # a wire is no gate, even one of unknown area
    with pytest.raises(ValueError, match="energy_pj of operation 1"):
        EnergyTable({1: Operation(1, "a + b", -0.1, 1.0)})
