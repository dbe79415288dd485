"""Cartesian genetic programming: circuits of int8 gates that compute weights.

Reading order: `functions` (what a gate can do), `circuit` (gates on a grid), `export` (as source code); `problem` (what
is wanted), `settings`, `evolution` (the search), which begins with `seeds` (built by `derivation`, put on the grid by
`layout`) and goes on with `engine` and `loops` (`reference` says the same in plain Python); `balance` (when a circuit
pays); `integers`, `choices`, `codes` and `weights` (layers whose weights are computed); `experiments`, `presets` and
`campaign` (many runs), `metrics` and `sensitivity` (what a network makes of them).
"""

from lightning_compress.cgp import campaign, presets
from lightning_compress.cgp.balance import BreakEven, break_even
from lightning_compress.cgp.circuit import Circuit, CircuitCost, Grid
from lightning_compress.cgp.evolution import Evolution, evolve
from lightning_compress.cgp.experiments import Experiment, Place
from lightning_compress.cgp.export import to_python, to_testbench, to_verilog
from lightning_compress.cgp.problem import Problem
from lightning_compress.cgp.settings import EvolutionResult, Row, Settings, Solution, run_seed

__all__ = [
    "BreakEven",
    "Circuit",
    "CircuitCost",
    "Evolution",
    "EvolutionResult",
    "Experiment",
    "Grid",
    "Place",
    "Problem",
    "Row",
    "Settings",
    "Solution",
    "break_even",
    "campaign",
    "evolve",
    "presets",
    "run_seed",
    "to_python",
    "to_testbench",
    "to_verilog",
]
