"""The known experiments: which weights of a quantized network are computed from which others.

Names of layers are those of LeNet-5 unless others are given; any model with int8 weights will do.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_compress.cgp.experiments import Experiment
from lightning_compress.cgp.presets.kernels import (
    all_layers,
    grid_size,
    reversed_single_filter,
    single_channel,
    single_filter,
    single_filter_zero_outer,
)
from lightning_compress.cgp.presets.layers import layer_bypass, le_selector, mobilenet, worst_case

# name -> function of a model
PRESETS: dict[str, Callable[..., list[Experiment]]] = {
    f.__name__: f
    for f in (
        *(layer_bypass, le_selector, all_layers, single_channel, single_filter, single_filter_zero_outer),
        *(reversed_single_filter, grid_size, worst_case, mobilenet),
    )
}

__all__ = [
    "PRESETS",
    "all_layers",
    "grid_size",
    "layer_bypass",
    "le_selector",
    "mobilenet",
    "reversed_single_filter",
    "single_channel",
    "single_filter",
    "single_filter_zero_outer",
    "worst_case",
]
