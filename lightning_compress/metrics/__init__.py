"""Differences between two models, or a model and the truth: of outputs, of weights, of stored bits.

`OutputErrorRate` (BER in this project) compares a compressed model with its original, `RelativeL2Error` and
`RelativeH1Error` a predicted field with a reference, `weight_error` the weights of two models, `bit_error_rate` two
sets of stored codes. Bit flips have a name of their own: BER always means output error rate.
"""

from lightning_compress.metrics.bits import BitErrors, bit_error_rate, inject_bit_errors
from lightning_compress.metrics.errors import (
    OutputErrorRate,
    RelativeH1Error,
    RelativeL2Error,
    Task,
    output_error_rate,
    relative_h1_error,
    relative_l2_error,
    wilson_interval,
)
from lightning_compress.metrics.weights import WeightError, weight_error

__all__ = [
    "BitErrors",
    "OutputErrorRate",
    "RelativeH1Error",
    "RelativeL2Error",
    "Task",
    "WeightError",
    "bit_error_rate",
    "inject_bit_errors",
    "output_error_rate",
    "relative_h1_error",
    "relative_l2_error",
    "weight_error",
    "wilson_interval",
]
