"""Few values: weights that share them (``ShareWeights``).

Reading order: `codes`, `vectors` and `hashes` (how such weights are stored), `build` (which values a weight gets),
`adaptive` (which strategy), `share` (the transform).
"""

from lightning_compress.sharing.share import ShareWeights

__all__ = ["ShareWeights"]
