"""Running sums that a training step can afford: of a layer's inputs and outputs, of the gradients of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.connections import TRANSPOSED
from lightning_compress.stats.fields import OUTPUTS
from lightning_compress.stats.gradients import Derivatives
from lightning_compress.stats.tracker import Tracker
from lightning_compress.targets import Target


class LayerSums(Tracker):
    """Cheap for every step: squares are summed over samples, and a kernel looks at their sum once, as at one sample.

    Whether values are finite shows in the scores: a training step must not wait for the device to say so.
    """

    def __init__(self, target: Target, wanted: frozenset[str]) -> None:
        super().__init__(target, wanted)
        self._energy: Tensor | None = None  # sum over samples of |x|^2, [in channels, ...]
        self._sizes: tuple[int, ...] = ()  # of the output that belongs to it

    def linear(self, x: Tensor, out: Tensor) -> None:
        """A call of a linear layer."""
        squares = self._squares(x).reshape(-1, x.shape[-1]).sum(0, keepdim=True)
        self.product(squares.double().sqrt(), self.target.weight.t(), out, biased=True)

    def convolved(self, x: Tensor, out: Tensor) -> None:
        """A call of a convolution."""
        x, out = (t[None] if t.dim() < self.target.weight.dim() else t for t in (x, out))
        if self.wanted & OUTPUTS:
            self._add_outputs(out, [0, *range(2, out.dim())])
        if "input_norm" in self.wanted:
            squares, sizes = self._squares(x).sum(0), tuple(out.shape[1:])
            if self._energy is not None and (self._energy.shape, self._sizes) != (squares.shape, sizes):
                self.flush()
            self._energy = squares.double() if self._energy is None else self._energy.add_(squares)
            self._sizes = sizes

    def flush(self) -> None:
        """Let the kernel look at what was summed up."""
        if self._energy is None:
            return
        layer: Any = self.target.module
        size, padding, self._energy = self._energy.sqrt()[None], layer.padding, None
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            size = functional.pad(size, layer._reversed_padding_repeated_twice, mode)
            padding = (0,) * len(layer.kernel_size)
        transposed = isinstance(layer, TRANSPOSED)
        form = (layer.stride, padding, layer.dilation, transposed, layer.output_padding, layer.groups)
        no_outputs = size.new_empty(0, *self._sizes)
        self.convolution((size, self.target.weight, None, *form), no_outputs)

    def forget(self) -> None:
        """Start anew."""
        self.moments = self.outputs = self._energy = None

    def _squares(self, x: Tensor) -> Tensor:
        x = self._finite(x)
        return (x.abs() if x.is_complex() else x).square()

    def _finite(self, x: Tensor) -> Tensor:
        return x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()


class StepSums(Derivatives):
    """Of the gradients that an optimizer takes, in float64.

    Steps that a gradient scaler skips may have gradients that are not finite; they are never joined.
    """

    def _finite(self, gradient: Tensor) -> Tensor:
        return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()

    def join(self, step: StepSums) -> None:
        """Add the sums of one step."""
        self.batches += step.batches
        if self.products is None or step.products is None:
            self.products = self.products or step.products
        else:
            for total, square in zip(self.products, step.products, strict=True):
                total.add_(square)
