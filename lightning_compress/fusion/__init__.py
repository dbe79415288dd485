"""BatchNorm into the layer beside it: one layer less, the same outputs.

Reading order: `fold` (the arithmetic), `fuse` (the transform); which tensor goes where is in `connections`, one
folder up.
"""

from lightning_compress.fusion.fold import fold_batchnorm
from lightning_compress.fusion.fuse import FuseBatchNorm, fold_on_load

__all__ = ["FuseBatchNorm", "fold_batchnorm", "fold_on_load"]
