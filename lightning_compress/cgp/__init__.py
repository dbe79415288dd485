"""Cartesian genetic programming: circuits of int8 gates that compute weights.

Reading order: `gates` (circuits), `search` (how they are found), `balance` (when a circuit pays), `layers` (weights
that are computed), `experiments`, `presets` and `campaign` (many runs), `metrics` and `sensitivity` (what a network
makes of them).
"""

from lightning_compress.cgp import campaign, presets
from lightning_compress.cgp.balance import BreakEven, break_even
from lightning_compress.cgp.experiments import Experiment, Place
from lightning_compress.cgp.gates.circuit import Circuit, CircuitCost, Grid
from lightning_compress.cgp.gates.export import to_python, to_testbench, to_verilog
from lightning_compress.cgp.search.evolution import Evolution, evolve
from lightning_compress.cgp.search.logs import log_to
from lightning_compress.cgp.search.problem import Problem
from lightning_compress.cgp.search.settings import EvolutionResult, Row, Settings, Solution, run_seed

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
    "log_to",
    "presets",
    "run_seed",
    "to_python",
    "to_testbench",
    "to_verilog",
]
