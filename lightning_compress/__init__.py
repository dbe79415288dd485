"""Compression for Lightning: honest bytes, honest milliseconds, exact resume, any layer."""

from lightning_compress import models
from lightning_compress.analysis import Analysis, analyze, quick, write_report
from lightning_compress.archive import inspect, load, save
from lightning_compress.batchnorm import ReestimateBatchNorm
from lightning_compress.benchmark import benchmark
from lightning_compress.callbacks.batchnorm import BatchNormReestimation
from lightning_compress.callbacks.fusion import BatchNormFusion
from lightning_compress.callbacks.keeping import KeepCompressed
from lightning_compress.callbacks.monitor import CompressionMonitor
from lightning_compress.callbacks.pruning import ScheduledPruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.callbacks.regularization import LowRankRegularization
from lightning_compress.callbacks.removal import ScheduledRemoval
from lightning_compress.callbacks.sparsity import SparsityRegularization
from lightning_compress.cgp.layers.weights import EvolveWeights
from lightning_compress.codes import Code
from lightning_compress.compress import compress
from lightning_compress.cost import cost
from lightning_compress.distillation.datafree import DataFreeDistillation, distill
from lightning_compress.distillation.module import Distillation
from lightning_compress.distillation.narrow import Narrow
from lightning_compress.distillation.student import make_student
from lightning_compress.export import export_onnx
from lightning_compress.finalize import finalize
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.lowrank import Factorize, MergeFactors
from lightning_compress.metrics import OutputErrorRate, RelativeH1Error, RelativeL2Error
from lightning_compress.pipelines import CompressionConfig, TargetResult, compress_to
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.pruning.fourier import PartialFourier
from lightning_compress.pruning.layers import DropLayers
from lightning_compress.pruning.modes import TruncateModes
from lightning_compress.pruning.patterns import NM, Block
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization import (
    Log2,
    MiniFloat,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantize,
    RateDistortionQuantize,
)
from lightning_compress.search import SearchResult, search
from lightning_compress.sharing import ShareWeights
from lightning_compress.stats.samplers import synthesize
from lightning_compress.targets import Axes, find, register
from lightning_compress.transform import NothingChangedError, Transform

__all__ = [
    "NM",
    "Analysis",
    "Axes",
    "BatchNormFusion",
    "BatchNormReestimation",
    "Block",
    "Code",
    "CompressionConfig",
    "CompressionMonitor",
    "DataFreeDistillation",
    "Distillation",
    "DropLayers",
    "EvolveWeights",
    "Factorize",
    "FuseBatchNorm",
    "KeepCompressed",
    "Log2",
    "LowRankRegularization",
    "MergeFactors",
    "MiniFloat",
    "Narrow",
    "NothingChangedError",
    "OutputErrorRate",
    "PartialFourier",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Prune",
    "QuantizationAwareTraining",
    "Quantize",
    "RateDistortionQuantize",
    "ReestimateBatchNorm",
    "RelativeH1Error",
    "RelativeL2Error",
    "RemoveChannels",
    "ScheduledPruning",
    "ScheduledRemoval",
    "SearchResult",
    "ShareWeights",
    "SparsityRegularization",
    "TargetResult",
    "Transform",
    "TruncateModes",
    "analyze",
    "benchmark",
    "compress",
    "compress_to",
    "cost",
    "distill",
    "export_onnx",
    "finalize",
    "find",
    "inspect",
    "load",
    "make_student",
    "models",
    "quick",
    "register",
    "save",
    "search",
    "synthesize",
    "write_report",
]
