"""Calibration: where inputs come from (``Calibration``) and what one pass over them measures."""

from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.measure import Stats, collect
from lightning_compress.stats.synthesis import match_batchnorm

__all__ = ["Calibration", "Stats", "collect", "match_batchnorm"]
