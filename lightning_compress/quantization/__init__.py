"""Few bits: after training (`quantize`), while training (`training`), as integers (`integer`).

Reading order: `grids` (which grid a weight gets), `codes` (how it is stored), `quantizers` and `layers` (how
activations and training weights are rounded on the way), `quantize` (the transform),
`rate_distortion` (the transform for the smallest file).
"""

from lightning_compress.functional.groups import PerChannel, PerGroup, PerTensor
from lightning_compress.quantization.grids import Log2, MiniFloat
from lightning_compress.quantization.integer import to_integer
from lightning_compress.quantization.optimizers import parameter_groups
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.quantization.rate_distortion import RateDistortionQuantize

__all__ = [
    "Log2",
    "MiniFloat",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Quantize",
    "RateDistortionQuantize",
    "parameter_groups",
    "to_integer",
]
