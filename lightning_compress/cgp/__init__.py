"""Cartesian genetic programming: circuits of int8 gates that compute weights.

Reading order: `functions` (what a gate can do), `circuit` (gates on a grid), `export` (as source code).
"""

from lightning_compress.cgp.circuit import Circuit, CircuitCost, Grid
from lightning_compress.cgp.export import to_python, to_testbench, to_verilog

__all__ = ["Circuit", "CircuitCost", "Grid", "to_python", "to_testbench", "to_verilog"]
