"""When computing weights costs less than reading them: by hand, and rules that hold for every circuit."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.cgp.balance import BreakEven, break_even
from lightning_compress.cgp.gates.circuit import CircuitCost
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.energy import EnergyTable

int8 = st.integers(-128, 127)


def cost(energy: float) -> CircuitCost:
    return CircuitCost(energy, math.nan, 1.0, 1, 1)


def test_by_hand() -> None:
    """Ten weights, four of them with the value of an input; one of three inputs is a constant; six values in all."""
    problem = Problem.of([[1, 2, 0]], [[1, 2, 0, 0, 10, 10, 10, 20, 20, 30]], loaded=2)
    found = break_even(problem, cost(0.5), reads=4, coded_bytes=5, already_loaded=1)
    assert (found.weights, found.wired, found.loaded) == (10, 4, 2)
    assert found.saved_pj == 10 * 4 * 1.25 == 50.0
    assert found.inputs_pj == 2 * 4 * 1.25 == 10.0
    assert found.selection_pj == (0.0, 0.0) and found.paid_pj == (10.5, 10.5)
    assert found.net_pj == (39.5, 39.5) and found.shared_net_pj == (44.5, 44.5)
    assert found.pj_per_byte == (10.5 / 40, 10.5 / 40)
    assert found.pays_from_pj_per_byte == (0.5 / 32, 0.5 / 32)
    assert found.coded_saved_pj == 5 * 4 * 1.25 == 25.0
    assert found.coded_net_pj == (14.5, 14.5) and found.coded_pj_per_byte == (10.5 / 20, 10.5 / 20)

    indexed = break_even(problem, cost(0.5), reads=4, wiring="indexed", memory="dram")
    index = 10 * 3 / 8 * 4 * 160  # ten weights, three bits for six values
    assert indexed.index_pj == index == 2400.0
    assert indexed.choice_pj == (
        pytest.approx(10 * math.log2(6) * 4 * 0.014),
        pytest.approx(10 * 5 * 4 * 0.014),
    )
    assert indexed.paid_pj[1] == pytest.approx(0.5 + 8 * 160 + 2400 + 2.8)
    assert indexed.net_pj == (
        pytest.approx(6400 - indexed.paid_pj[1]),
        pytest.approx(6400 - indexed.paid_pj[0]),
    )
    assert indexed.coded_net_pj is None and indexed.coded_pj_per_byte is None


def test_weights_that_are_inputs_gain_nothing() -> None:
    """Two of five weights are read and give the others: three are saved, whoever else has their values."""
    problem = Problem.of([[7, 9]], [[7, 9, 7, 9, 7]])
    assert break_even(problem, cost(0.0)).net_pj == (3 * 1.25, 3 * 1.25)
    every = Problem.of([[7, 9]], [[7, 9]])
    assert break_even(every, cost(0.0)).net_pj == (0.0, 0.0)


def test_data_sets_are_evaluated_one_after_the_other() -> None:
    problem = Problem.of([[1, 2], [3]], [[4], [5, 6]])
    found = break_even(problem, cost(0.5))
    assert (found.loaded, found.circuit_pj, found.saved_pj) == (3, 1.0, 3 * 1.25)


def test_table_in_words() -> None:
    problem = Problem.of([[1, 2]], [[1, 10, 20, 30]])
    text = str(
        break_even(problem, cost(0.5), wiring="indexed", reads=3, coded_bytes=3, already_loaded=2)
    ).splitlines()
    cells = {line[2:].split("  ")[0]: line.split("  ")[-1] for line in text[1:-2]}
    assert text[0] == "pJ per inference, each weight read 3 times; weights that take the value of an input: 1"
    assert cells["saved: weights not read one by one, 4"].strip() == "15"
    assert cells["paid: inputs read, 2"].strip() == "7.5"
    assert "net, with 2 inputs read anyhow" in cells and "paid per entropy-coded byte" in cells
    assert any("(sram 1.25; SRAM 1.25, DRAM 160)" in line for line in text)
    assert text[-2].startswith("A hardware synthesizer ties off constants for nothing")
    assert text[-1] == "and it is simulated."
    plain = str(break_even(problem, cost(0.5)))
    assert "anyhow" not in plain and "entropy" not in plain and " to " not in plain


problems = st.builds(
    lambda x, y, multiplex, loaded: Problem.of(x, y, multiplex=multiplex, loaded=min(loaded, len(x[0]))),
    st.lists(st.lists(int8, min_size=3, max_size=3), min_size=2, max_size=2),
    st.lists(st.lists(int8, min_size=1, max_size=40), min_size=2, max_size=2),
    st.booleans(),
    st.integers(0, 3),
)


@given(problems, st.floats(0, 100), st.integers(1, 50), st.sampled_from(["sram", "dram"]))
def test_rules(problem: Problem, energy: float, reads: int, memory: str) -> None:
    options = {"reads": reads, "memory": memory, "coded_bytes": problem.weights // 2}
    unrolled = break_even(problem, cost(energy), **options)
    indexed = break_even(problem, cost(energy), wiring="indexed", **options)
    assert indexed.net_pj[1] <= unrolled.net_pj[0]  # never better
    assert indexed.pays_from_pj_per_byte[0] >= unrolled.pays_from_pj_per_byte[1]
    shared = break_even(problem, cost(energy), already_loaded=problem.loaded, **options)
    for found in (unrolled, indexed, shared):
        assert found.net_pj[0] <= found.net_pj[1] and found.shared_net_pj[0] >= found.net_pj[0]
        assert found.coded_net_pj is not None and found.coded_net_pj[1] <= found.net_pj[1]
        assert found.saved_pj == pytest.approx(problem.weights * reads * found.memory_pj_per_byte)
        for net, price in zip(found.net_pj, found.pj_per_byte[::-1], strict=True):
            if abs(net) > 1e-6:
                assert (net > 0) == (price < found.memory_pj_per_byte)
    assert shared.shared_net_pj == pytest.approx((shared.saved_pj - 2 * energy,) * 2)


@given(problems, st.floats(0.001, 100), st.integers(1, 5))
def test_at_the_price_from_which_it_pays_nothing_is_gained(
    problem: Problem, energy: float, reads: int
) -> None:
    price = break_even(problem, cost(energy), reads=reads).pays_from_pj_per_byte[0]
    if math.isfinite(price):
        table = dataclasses.replace(EnergyTable.default(), sram_pj_per_byte=price)
        assert break_even(problem, cost(energy), reads=reads, table=table).net_pj[0] == pytest.approx(
            0, abs=1e-9
        )
    else:
        assert problem.weights <= problem.loaded


def test_nothing_computed() -> None:
    found = break_even(Problem.of([[1, 2]], [[2, 1]]), cost(0.0), wiring="indexed")
    index = 2 / 8 * 1.25 + 2 * 0.014  # two weights, one bit each, one multiplexer each
    assert found.net_pj == (pytest.approx(-index), pytest.approx(-index))
    assert found.pays_from_pj_per_byte == (math.inf, math.inf)
    assert "inf" in str(found) and isinstance(found, BreakEven)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wiring": "wireless"}, "wiring='wireless' is unknown; allowed: unrolled, indexed"),
        ({"memory": "disk"}, "memory='disk' is unknown; allowed: sram, dram"),
        ({"reads": 0}, "reads=0.*reads >= 1"),
        ({"already_loaded": 3}, "0 <= already_loaded <= 2"),
        ({"coded_bytes": -1}, "coded_bytes >= 0"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        break_even(Problem.of([[1, 2]], [[2, 5]]), cost(0.0), **options)


def test_values_are_those_of_the_problem() -> None:
    """Every output of its own or one for each value: the index tells values apart, not outputs."""
    outputs = np.random.default_rng(0).integers(-3, 4, 100)
    both = [
        break_even(Problem.of([[99]], [outputs], multiplex=m), cost(1.0), wiring="indexed")
        for m in (True, False)
    ]
    assert both[0] == both[1]
