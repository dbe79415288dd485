"""Low rank: weights as products of thinner ones (``Factorize``), and back (``MergeFactors``, ``merge_factors``)."""

from lightning_compress.functional.ranks import effective_rank
from lightning_compress.lowrank.factorize import Factorize
from lightning_compress.lowrank.factors import Factors
from lightning_compress.lowrank.merge import MergeFactors, merge_factors

__all__ = ["Factorize", "Factors", "MergeFactors", "effective_rank", "merge_factors"]
