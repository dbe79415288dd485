"""Whether a file computes what the model computes: ONNX Runtime against PyTorch, value by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.export.report import UNKNOWN
from lightning_compress.export.trace import Flat
from lightning_compress.stats.running import observing

_WITHIN = 0.99  # of the output values must lie within one step
_LEVELS = 255  # of the grid that stands in for an output quantizer
_Arrays = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Agreement:
    """What was found; with ``samples=0`` nothing was compared."""

    top1: float = UNKNOWN
    within_step: float = UNKNOWN
    max_difference: float = UNKNOWN
    step: float = UNKNOWN
    samples: int = 0


def agreement(flat: Flat, data: bytes, dynamic_axes: bool) -> Agreement:
    """Compare a file with a model, on the given inputs and on random ones with their mean and deviation.

    Args:
        flat: the model, with its example input.
        data: the bytes of the file.
        dynamic_axes: whether another number of samples may be given; then the random inputs are one more.

    Returns:
        Shares and differences over all inputs and outputs.

    Raises:
        ValueError: less than 99 % of the output values lie within one step.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    read = {entry.name for entry in session.get_inputs()}
    runs: list[tuple[_Arrays, _Arrays]] = []
    samples = 0
    for tensors in (flat.tensors, _random(flat.tensors, dynamic_axes)):
        with observing(flat):
            expected = [t.numpy() for t in flat(*tensors)]
        feed = {name: t.numpy() for name, t in zip(flat.names, tensors, strict=True) if name in read}
        runs.append((expected, session.run(None, feed)))
        samples += len(tensors[0]) if tensors[0].dim() else 1
    return _judged(runs, _output_steps(data), samples)


def _random(tensors: tuple[Tensor, ...], dynamic_axes: bool) -> tuple[Tensor, ...]:
    """Normal values for numbers, the given entries in another order for integers; one sample more if that is free."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for t in tensors:
        more = int(dynamic_axes and t.dim() > 0 and t.shape[:1] == tensors[0].shape[:1])
        shape = (t.shape[0] + more, *t.shape[1:]) if t.dim() else ()
        if t.is_floating_point():
            values = t.mean() + t.std(correction=0) * torch.randn(shape, generator=generator)
            drawn.append(values.to(t.dtype))
        else:
            places = torch.randint(t.numel(), shape, generator=generator)
            drawn.append(t.flatten()[places])
    return tuple(drawn)


def _output_steps(data: bytes) -> list[float | None]:
    """The scale of the quantizer that makes an output, for each output that has one."""
    import onnx

    graph = onnx.load_from_string(data).graph
    stored = {t.name: t for t in graph.initializer if not t.dims}
    made = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    scales = [made[o.name].input[1] if o.name in made else "" for o in graph.output]
    return [float(onnx.numpy_helper.to_array(stored[s])) if s in stored else None for s in scales]


def _judged(runs: list[tuple[_Arrays, _Arrays]], steps: list[float | None], samples: int) -> Agreement:
    within, top1, worst = [], [], (-1.0, 0.0, 0.0)
    for place, known in enumerate(steps):
        pairs = [(expected[place], found[place]) for expected, found in runs]
        if not np.issubdtype(pairs[0][0].dtype, np.floating):
            within += [(e == f).ravel() for e, f in pairs]
            continue
        spread = max(float(e.max()) for e, _ in pairs) - min(float(e.min()) for e, _ in pairs)
        step = known if known is not None else spread / _LEVELS
        for expected, found in pairs:
            gap = np.abs(expected.astype(np.float64) - found)
            within.append((gap <= step * (1 + 1e-4)).ravel())  # NaN is not
            worst = max(
                worst, (float(gap.max() / step) if step else float(gap.max()), float(gap.max()), step)
            )
            if expected.ndim > 1 and expected.shape[1] > 1:
                top1.append((expected.argmax(1) == found.argmax(1)).ravel())
    share = float(np.concatenate(within).mean())
    if not share >= _WITHIN:
        raise ValueError(
            f"the file is not kept: {share:.2%} of the output values in ONNX Runtime lie within one step "
            f"({worst[2]:.3g}) of the model's, at least {_WITHIN:.0%} must; the largest difference is {worst[1]:.3g}."
        )
    agree = float(np.concatenate(top1).mean()) if top1 else UNKNOWN
    return Agreement(agree, share, worst[1], worst[2], samples)
