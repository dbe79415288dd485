"""`.lcz` archives: what the weights of a model *are*, in as few bytes as the coders can, safe to open.

`save` writes the whole state dict and the applied steps; `load` gives a fresh model the same structure and the same
bits; `load_tensors` and `load_tensor` read all tensors or one, without a model; `inspect` reads the description. What
goes in is decided in contents.py, the bytes in container.py and `functional.headers`.
"""

from lightning_compress.archive.baselines import baseline_sizes, dense_bytes
from lightning_compress.archive.info import ArchiveInfo, StoredPart, StoredTensor
from lightning_compress.archive.reading import inspect, load, load_tensor, load_tensors
from lightning_compress.archive.writing import save, size_of
from lightning_compress.container import ArchiveError

__all__ = [
    "ArchiveError",
    "ArchiveInfo",
    "StoredPart",
    "StoredTensor",
    "baseline_sizes",
    "dense_bytes",
    "inspect",
    "load",
    "load_tensor",
    "load_tensors",
    "save",
    "size_of",
]
