"""torch's exporter: a model as a function of tensors, and as the bytes of an ONNX file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.export.graph import tidy
from lightning_compress.stats.running import Operations, observing


class Flat(nn.Module):
    """A model as a function of tensors that returns a tuple of tensors.

    Args:
        model: any module.
        x: an example input: a tensor, a tuple of positional arguments or a mapping of keyword arguments. What is not
            a tensor in it stays as it is.

    Examples:
        >>> flat = Flat(nn.Linear(2, 1), {"input": torch.zeros(3, 2)})
        >>> flat.names, [tuple(t.shape) for t in flat(*flat.tensors)]
        (['input'], [(3, 1)])
    """

    def __init__(self, model: nn.Module, x: Any) -> None:
        super().__init__()
        self.model, self.x = model, x
        self.leaves, self.structure = pytree.tree_flatten(x)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]
        self.tensors = tuple(self.leaves[i] for i in self.places)
        count = len(self.tensors)
        if isinstance(x, Mapping) and len(x) == count:
            self.names = [str(key) for key in x]
        else:
            self.names = ["x"] if count == 1 else [f"x_{i}" for i in range(count)]

    def of(self, model: nn.Module) -> Flat:
        """Another model with the same example input."""
        return Flat(model, self.x)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """All tensors of the model's output."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        x = pytree.tree_unflatten(leaves, self.structure)
        args, kwargs = ((), x) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
        out = self.model(*args, **kwargs)
        return tuple(t for t in pytree.tree_leaves(out) if isinstance(t, Tensor))


class _Transforms(Operations):  # type: ignore[no-untyped-call]
    """Which Fourier transforms run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def wants(self, name: str) -> bool:
        return name.startswith("_fft_")

    def seen(self, name: str, args: Any, result: Any) -> None:
        self.names.add(name.removeprefix("_"))


def serialized(flat: Flat, dynamic_axes: bool, opset: int) -> bytes:
    """A model as the bytes of an ONNX file.

    Args:
        flat: the model, with its example input.
        dynamic_axes: whether the number of samples, the first axis of the first tensor, is free.
        opset: of ONNX.

    Returns:
        The file, tidied and checked.
    """
    import onnx

    with observing(flat), _Transforms() as transforms:
        outputs = flat(*flat.tensors)
    if transforms.names:
        raise ValueError(
            f"{type(flat.model).__name__} computes {', '.join(sorted(transforms.names))}, and ONNX has no complex "
            "numbers: models with a Fourier transform cannot be exported yet. Save them with lc.save."
        )
    results = ["y"] if len(outputs) == 1 else [f"y_{i}" for i in range(len(outputs))]
    results = [f"{name}_out" if name in flat.names else name for name in results]
    samples = flat.tensors[0].shape[:1]
    named = [*zip(flat.names, flat.tensors, strict=True), *zip(results, outputs, strict=True)]
    free = {name: {0: "samples"} for name, t in named if samples and t.shape[:1] == samples}
    buffer = io.BytesIO()
    with observing(flat), warnings.catch_warnings():
        # The exporter that needs no other package is the older one, which says so; what it cannot fold is no matter.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding")
        torch.onnx.export(
            flat,
            flat.tensors,
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            input_names=flat.names,
            output_names=results,
            dynamic_axes=free if dynamic_axes else None,
            opset_version=opset,
            autograd_inlining=False,
        )
    proto = tidy(onnx.load_from_string(buffer.getvalue()))
    onnx.checker.check_model(proto, full_check=True)
    data: bytes = proto.SerializeToString()
    return data
