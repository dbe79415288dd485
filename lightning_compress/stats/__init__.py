"""Calibration: where inputs come from (``Calibration``) and what one pass over them measures."""

from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.measure import Stats, collect

__all__ = ["Calibration", "Stats", "collect"]
