"""What a model takes in practice: measured, never estimated."""

from lightning_compress.benchmark.measure import benchmark
from lightning_compress.benchmark.report import BenchmarkReport, LayerTime, Measurement

__all__ = ["BenchmarkReport", "LayerTime", "Measurement", "benchmark"]
