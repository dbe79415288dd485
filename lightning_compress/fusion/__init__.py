"""BatchNorm into the layer beside it: one layer less, the same outputs.

Reading order: `fold` (the arithmetic), `connections` (which tensor goes where), `fuse` (the transform).
"""

from lightning_compress.fusion.fold import fold_batchnorm
from lightning_compress.fusion.fuse import FuseBatchNorm, fold_on_load

__all__ = ["FuseBatchNorm", "fold_batchnorm", "fold_on_load"]
