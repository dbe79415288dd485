"""Cartesian genetic programming: circuits of int8 gates that compute weights.

Reading order: `functions` (what a gate can do), `circuit` (gates on a grid), `export` (as source code), `problem` (what
is wanted), `settings`, `seeds` (where a search starts), `engine` (generations; `reference` says the same in plain
Python), `evolution` (the search).
"""

from lightning_compress.cgp.circuit import Circuit, CircuitCost, Grid
from lightning_compress.cgp.evolution import Evolution, evolve
from lightning_compress.cgp.export import to_python, to_testbench, to_verilog
from lightning_compress.cgp.problem import Problem
from lightning_compress.cgp.settings import EvolutionResult, Row, Settings, Solution, run_seed

__all__ = [
    "Circuit",
    "CircuitCost",
    "Evolution",
    "EvolutionResult",
    "Grid",
    "Problem",
    "Row",
    "Settings",
    "Solution",
    "evolve",
    "run_seed",
    "to_python",
    "to_testbench",
    "to_verilog",
]
