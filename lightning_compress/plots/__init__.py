"""Figures, one function each; they return matplotlib Axes, so ``ax.figure.savefig("layers.png")`` stores one.

They never touch pyplot's global state: they draw on the Axes that are given, or on a new Figure of their own.
"""

from lightning_compress.plots.bars import layer_bytes, layer_sparsity, layers
from lightning_compress.plots.choices import best_bytes, summary
from lightning_compress.plots.circuits import circuit_front, evolution_history
from lightning_compress.plots.combined import pipeline_ratios
from lightning_compress.plots.curves import trade_off
from lightning_compress.plots.fronts import pareto_front
from lightning_compress.plots.limits import error_front, ratio_per_threshold, saving_against_error
from lightning_compress.plots.overview import ber_compression_analysis, compression_analysis
from lightning_compress.plots.scatter import error_against_ratio
from lightning_compress.plots.space import space
from lightning_compress.plots.strength import sparsity_reached
from lightning_compress.plots.techniques import error_bars, ratio_bars

__all__ = [
    "ber_compression_analysis",
    "best_bytes",
    "circuit_front",
    "compression_analysis",
    "error_against_ratio",
    "error_bars",
    "error_front",
    "evolution_history",
    "layer_bytes",
    "layer_sparsity",
    "layers",
    "pareto_front",
    "pipeline_ratios",
    "ratio_bars",
    "ratio_per_threshold",
    "saving_against_error",
    "space",
    "sparsity_reached",
    "summary",
    "trade_off",
]
