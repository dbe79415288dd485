"""Whether a file computes what the model computes: ONNX Runtime against PyTorch, value by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.export.report import UNKNOWN
from lightning_compress.export.trace import Flat
from lightning_compress.stats.running import observing

_LEVELS = 255  # of the grid that stands in for an output quantizer
_RANDOM = 16  # samples
_FLOAT = 0.01  # of a step: what float32 files may differ by
_Arrays = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Agreement:
    """What was found; with ``samples=0`` nothing was compared."""

    top1: float = UNKNOWN
    within_step: float = UNKNOWN
    max_difference: float = UNKNOWN
    rms_difference: float = UNKNOWN
    rms_rounding: float = UNKNOWN
    step: float = UNKNOWN
    samples: int = 0


def agreement(flat: Flat, bare: nn.Module | None, data: bytes, dynamic_axes: bool) -> Agreement:
    """Compare a file with a model, on the given inputs and on random ones with their mean and deviation.

    Two exact implementations of one rounded model differ where a value lies so close to the middle of two integers
    that the order of a sum decides, and each such difference makes others in the layers behind. So the size of a
    difference is judged by what rounding the activations does to the outputs itself.

    Args:
        flat: the model, with its example input.
        bare: the model without rounded activations; None if the file has none either.
        data: the bytes of the file.
        dynamic_axes: whether another number of samples may be given; the random inputs then are at most 16.

    Returns:
        Shares and differences on the given inputs, over all outputs. Random inputs are judged in the same way.

    Raises:
        ValueError: the outputs differ by more than one step and by more than rounding changes them (root mean
            square); without rounding, by more than 1 % of a step.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    read = {entry.name for entry in session.get_inputs()}
    found = []
    for tensors in (flat.tensors, _random(flat.tensors, dynamic_axes)):
        expected = _outputs(flat, tensors)
        unrounded = None if bare is None else _outputs(flat.of(bare), tensors)
        feed = {name: t.numpy() for name, t in zip(flat.names, tensors, strict=True) if name in read}
        samples = len(tensors[0]) if tensors[0].dim() else 1
        found.append(_judged(expected, session.run(None, feed), unrounded, _output_steps(data), samples))
    return found[0]


def _outputs(flat: Flat, tensors: tuple[Tensor, ...]) -> _Arrays:
    with observing(flat):
        return [t.numpy() for t in flat(*tensors)]


def _random(tensors: tuple[Tensor, ...], dynamic_axes: bool) -> tuple[Tensor, ...]:
    """Normal values for numbers, the given entries for integers; another number of samples if that is free."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    given = tensors[0].shape[:1]
    for t in tensors:
        free = dynamic_axes and t.dim() > 0 and t.shape[:1] == given
        shape = (min(len(t) + 1, _RANDOM), *t.shape[1:]) if free else tuple(t.shape)
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


def _judged(
    expected: _Arrays, found: _Arrays, unrounded: _Arrays | None, steps: list[float | None], samples: int
) -> Agreement:
    """Over all outputs; differences are those of the output that differs most in its steps."""
    within, top1, worst = [], [], None
    for place, (wanted, got, known) in enumerate(zip(expected, found, steps, strict=True)):
        if not np.issubdtype(wanted.dtype, np.floating):
            within.append((wanted == got).ravel())
            continue
        step = known or float(np.ptp(wanted)) / _LEVELS or 1.0
        gap = np.abs(wanted.astype(np.float64) - got)
        within.append((gap <= step * (1 + 1e-4)).ravel())
        if wanted.ndim > 1 and wanted.shape[1] > 1:
            top1.append((wanted.argmax(1) == got.argmax(1)).ravel())
        rounding = 0.0 if unrounded is None else _rms(wanted - unrounded[place])
        allowed = _FLOAT * step if unrounded is None else max(step, rounding)
        if not _rms(gap) <= allowed:  # also if it is NaN
            raise ValueError(
                f"the file is not kept: its outputs in ONNX Runtime differ from the model's by {_rms(gap):.3g} (root "
                f"mean square; largest {gap.max():.3g}), allowed is {allowed:.3g}: one output step is {step:.3g}, and "
                f"rounding activations changes the outputs by {rounding:.3g}."
            )
        this = (float(gap.max()) / step, float(gap.max()), _rms(gap), rounding, step)
        worst = this if worst is None else max(worst, this)
    share = float(np.concatenate(within).mean())
    agree = float(np.concatenate(top1).mean()) if top1 else UNKNOWN
    return Agreement(agree, share, *(worst or (0.0,) * 5)[1:], samples)


def _rms(values: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))
