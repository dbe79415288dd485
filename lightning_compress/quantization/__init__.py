"""Few bits: after training (`quantize`), while training (`training`), as integers (`integer`).

Reading order: `grids` (which grid a weight gets), `codes` (how it is stored), `quantizers` and `layers` (how activations
and training weights are rounded on the way), `quantize` (the transform).
"""

from lightning_compress.functional.groups import PerChannel, PerGroup, PerTensor
from lightning_compress.quantization.grids import Log2, MiniFloat
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.quantization.training import parameter_groups

__all__ = ["Log2", "MiniFloat", "PerChannel", "PerGroup", "PerTensor", "Quantize", "parameter_groups"]
