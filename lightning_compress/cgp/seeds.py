"""Circuits to start from (in the making)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightning_compress.cgp.circuit import Circuit, Grid
from lightning_compress.cgp.problem import Problem
from lightning_compress.energy import EnergyTable


def random_circuit(grid: Grid, functions: Sequence[int], random: np.random.Generator) -> Circuit:
    genes = []
    for g in range(grid.gates):
        inputs, first, end = grid.legal(g // grid.rows)
        pins = [*range(inputs), *range(first, end)]
        genes += [*random.choice(pins, 2), random.choice(functions)]
    inputs, first, end = grid.legal(grid.cols)
    return Circuit(
        np.array([*genes, *random.choice([*range(inputs), *range(first, end)], grid.outputs)]), grid
    )


def adder(problem: Problem, grid: Grid, functions: Sequence[int], table: EnergyTable) -> Circuit:
    return random_circuit(grid, functions, np.random.default_rng(0))
