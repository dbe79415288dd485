"""What a model takes in practice: measured, never estimated."""

from lightning_compress.benchmark.evaluate import Evaluation, Row, evaluate
from lightning_compress.benchmark.measure import benchmark
from lightning_compress.benchmark.report import BenchmarkReport, LayerTime, Measurement

__all__ = ["BenchmarkReport", "Evaluation", "LayerTime", "Measurement", "Row", "benchmark", "evaluate"]
