"""Running sums of one weight's layer in passes without gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.inputs import Histogram, spectrum, taps
from lightning_compress.stats.biases import bias_part
from lightning_compress.stats.fields import ENDS, FACTORS, OUTPUTS
from lightning_compress.stats.running import first_tensor
from lightning_compress.targets import Target


class Tracker:
    """Running sums for one target.

    Args:
        target: the weight.
        wanted: fields of ``Stats``; those of gradients are not seen here.
    """

    def __init__(self, target: Target, wanted: frozenset[str]) -> None:
        self.target = target
        self.wanted = wanted
        self.called = False
        self.count = 0
        self.rows = 0
        self.moments: Tensor | None = None  # sums of |x|^2, x and 1: [3, *broadcastable to the weight]
        self.gram: Tensor | None = None
        self.range = {"input_range": (math.inf, -math.inf), "output_range": (math.inf, -math.inf)}
        self.histograms = {"histogram": Histogram(), "output_histogram": Histogram()}
        self.outputs: Tensor | None = None  # sums of |a|^2, |a| and 1: [3, out channels]
        self.bias = bias_part(target)

    def product(self, x: Tensor, used: Tensor, out: Tensor, *, biased: bool) -> None:
        """``out = x @ used``, where ``used`` [.., k, m] is the weight, its transpose or some of its output rows."""
        weight = self.target.weight
        if used.dim() == 3 and (used.stride(0) == 0 or len(used) == 1):  # one matrix for the whole batch
            used = used[0]
        axis = _contracted(weight, used, self.target.axes.in_)
        if axis is None:
            return
        x = self._finite(x.reshape(-1, x.shape[-1]))
        first = (used.storage_offset() - weight.storage_offset()) // weight.stride(1 - axis)
        if self.wanted & OUTPUTS and 1 - axis == self.target.axes.out:
            rows = slice(first, first + used.shape[1])
            out = out.reshape(-1, used.shape[1])
            if self.bias is not None and not biased:
                out = out + self.bias.of(self.bias.parameter.detach())[rows]
            self._add_outputs(out, [0], rows)
        if not self.wanted & FACTORS:
            return
        moments = _moments(x, [0]).unsqueeze(2 - axis)
        if used.shape[1] < weight.shape[1 - axis]:
            # Attention with separate queries, keys and values: each block of rows has its own input.
            if "gram" in self.wanted:
                raise ValueError(
                    f"{self.target.key}: its rows see different inputs: there is no Gram matrix; exclude it."
                )
            block, moments = moments, moments.new_zeros(3, *weight.shape)
            moments.narrow(2 - axis, first, used.shape[1]).copy_(block)
        self._add(moments, len(x) if first == 0 else 0)
        if "gram" in self.wanted:
            self._add_gram(x.double().mH @ x.double() if not x.is_complex() else x.mH @ x)

    def lookup(self, entries: Tensor) -> None:
        """Rows of an embedding were looked up: a product with vectors of one 1 and zeros."""
        if "gram" in self.wanted:
            raise ValueError(f"{self.target.key}: an embedding has no Gram matrix of inputs; exclude it.")
        if self.wanted & FACTORS:
            counts = torch.bincount(entries.reshape(-1), minlength=len(self.target.weight)).double()
            moments = torch.stack([counts, counts, torch.full_like(counts, entries.numel())])
            self._add(moments.unsqueeze(2), entries.numel())

    def convolution(self, args: Any, result: Tensor) -> None:
        """One call of ``aten.convolution`` with the whole weight."""
        x, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
        if weight.shape != self.target.weight.shape:
            return
        axes = [0, *range(2, x.dim())]
        if self.wanted & OUTPUTS:
            self._add_outputs(result, axes)
        if not self.wanted & FACTORS:
            return
        kernel, channels = weight.shape[2:], x.shape[1]
        x = self._finite(x)
        views = list(
            taps(
                x,
                kernel,
                result.shape[2:],
                stride=stride,
                padding=padding,
                dilation=dilation,
                transposed=transposed,
            )
        )
        moments = torch.stack([_moments(v, axes) for v in views], dim=2)
        if transposed:
            moments = moments.view(3, channels, 1, *kernel)
        else:
            moments = moments.view(3, groups, channels // groups, *kernel)
            moments = moments.repeat_interleave(len(weight) // groups, dim=1) if groups > 1 else moments
        self._add(moments, result.numel() // result.shape[1])
        if "gram" in self.wanted:
            for sample in range(len(x)):  # the unfolded input is large
                rows = torch.stack([v[sample].flatten(1) for v in views], dim=1).double()  # [C, K, L]
                rows = rows.view(groups, -1, rows.shape[-1])
                self._add_gram((rows @ rows.mT).squeeze(0))

    def watch(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the target's module."""
        self.called = True
        x, out = first_tensor((args, kwargs)), first_tensor(output)
        for tensor, extremes, counts in ((x, *ENDS[::2]), (out, *ENDS[1::2])):
            if tensor is not None and self.wanted & {extremes, counts}:
                self._widen(extremes, tensor)
                if counts in self.wanted:
                    self.histograms[counts].add(tensor)
        if x is not None and self.wanted & FACTORS and is_spectral(self.target):
            self._spectral(module, self._finite(x))
        if out is not None and self.wanted & OUTPUTS and is_spectral(self.target):
            self._add_outputs(out, [0, *range(2, out.dim())])

    def missing(self) -> set[str]:
        """Wanted fields that no pass has filled."""
        absent = {
            *(FACTORS if self.moments is None else ()),
            *(OUTPUTS if self.outputs is None else ()),
            *(() if self.called else ENDS),
        }
        return absent & self.wanted

    def fields(self) -> dict[str, Any]:
        """What was measured, by field of ``Stats``."""
        found = {
            "input_norm": self._norm(),
            "input_mean": self._mean(),
            "gram": self.gram,
            "output_rms": None
            if self.outputs is None
            else (self.outputs[0] / self.outputs[2].clamp_min(1)).sqrt().float(),
            "output_mean_abs": None
            if self.outputs is None
            else (self.outputs[1] / self.outputs[2].clamp_min(1)).float(),
            **self.range,
            **{name: (h.counts, h.upper) for name, h in self.histograms.items()},
        }
        return {name: value for name, value in found.items() if name in self.wanted} | {
            "count": self.count,
            "rows": self.rows,
        }

    def _spectral(self, layer: Any, x: Tensor) -> None:
        weight, axes = self.target.weight, self.target.axes
        stored = weight.shape[1:] if axes.in_ is None else weight.shape[2:]
        real = not layer.complex_data
        used, kept = spectrum(x, stored, layer.n_modes, layer.max_n_modes, real=real, norm=layer.fft_norm)
        inside = _moments(used, [0])
        moments = inside.new_zeros(3, x.shape[1], *stored)
        moments[(slice(None), slice(None), *kept)] = inside
        self._add(moments if axes.in_ is None else moments.unsqueeze(2), len(x))
        if "gram" in self.wanted:
            rows = used.movedim(1, -1).movedim(0, -1).to(torch.complex128)  # [*kept, C, N]
            gram = rows.new_zeros(*stored, x.shape[1], x.shape[1])
            gram[kept] = rows @ rows.mH
            self._add_gram(gram)

    def _add_outputs(self, out: Tensor, axes: list[int], channels: slice = slice(None)) -> None:
        """Sums over these axes of what comes out; ``channels``: all of the layer's, or those of a linear layer."""
        size = self._finite(out).abs()
        sums = torch.stack(
            [
                size.square().sum(axes, dtype=torch.float64),
                size.sum(axes, dtype=torch.float64),
                size.new_full((out.shape[1],), math.prod(out.shape[a] for a in axes), dtype=torch.float64),
            ]
        )
        if self.outputs is None:
            total = self.target.weight.shape[self.target.axes.out] if channels.stop else out.shape[1]
            self.outputs = sums.new_zeros(3, total)
        self.outputs[:, channels] += sums

    def _add(self, moments: Tensor, rows: int) -> None:
        self.moments = moments if self.moments is None else self.moments + moments
        self.rows += rows

    def _norm(self) -> Tensor | None:
        return None if self.moments is None else self.moments[0].real.sqrt().float()

    def _mean(self) -> Tensor | None:
        if self.moments is None:
            return None
        _, sums, terms = self.moments
        mean: Tensor = sums / terms.real.clamp_min(
            1
        )  # rows of an attention weight that were never used have 0 / 0
        return mean.to(torch.complex64 if mean.is_complex() else torch.float32)

    def _add_gram(self, gram: Tensor) -> None:
        self.gram = gram if self.gram is None else self.gram.add_(gram)

    def _widen(self, field: str, x: Tensor) -> None:
        x = self._finite(x)
        low, high = (torch.view_as_real(x) if x.is_complex() else x).aminmax()
        self.range[field] = (min(self.range[field][0], float(low)), max(self.range[field][1], float(high)))

    def _finite(self, x: Tensor) -> Tensor:
        x = x.detach()
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(
                f"{self.target.key}: {bad} of {x.numel()} calibration values at its layer are not finite: "
                "check the data and the weights before it."
            )
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _contracted(weight: Tensor, used: Tensor, prefer: int | None) -> int | None:
    """Axis of ``weight`` that ``x @ used`` sums over, by the strides of the view; None if there is none."""
    if weight.dim() != 2 or used.dim() != 2:
        return None
    first = 1 if prefer is None else prefer
    for axis in (first, 1 - first):
        sizes = used.shape[0] == weight.shape[axis] and used.shape[1] <= weight.shape[1 - axis]
        strides = (used.stride(0), used.stride(1)) == (weight.stride(axis), weight.stride(1 - axis))
        if sizes and strides:
            return axis
    return None


def _moments(x: Tensor, axes: list[int]) -> Tensor:
    """Sums of ``|x|^2``, x and 1 over axes, in double precision, stacked."""
    sums = x.sum(axes, dtype=torch.complex128 if x.is_complex() else torch.float64)
    squares = x.abs().square().sum(axes, dtype=torch.float64).to(sums.dtype)
    return torch.stack([squares, sums, torch.full_like(sums, math.prod(x.shape[a] for a in axes))])


def is_spectral(target: Target) -> bool:
    """Whether it is the dense weight of a spectral convolution, not a factor of one."""
    whole = getattr(getattr(target.module, "weight", None), "shape", None)
    return hasattr(target.module, "max_n_modes") and tuple(target.weight.shape) == tuple(whole or ())
