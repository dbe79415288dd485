"""Quantizers whose grid follows what they see: weights by a calibrator, activations by a running range."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.functional.affine import choose_qparams, fake_quantize, integer_range
from lightning_compress.functional.calibrators import calibrate
from lightning_compress.functional.groups import Groups, granularity_of, like, real
from lightning_compress.quantization.codes import Affine, GridCode
from lightning_compress.quantization.grids import Grid
from lightning_compress.quantization.learned import WeightQuantizer
from lightning_compress.quantization.quantizers import InputQuantizer, TrainingQuantizer
from lightning_compress.quantization.straight import agree, binary_weight, group_means, straight_through


class CalibratedWeight(WeightQuantizer):
    """A weight rounded to the grid that its calibrator chooses anew at every forward pass; nothing is stored.

    The gradient is that of ``lightning_compress.functional.affine.fake_quantize``: 1 inside the range, else 0. Powers
    of two, minifloats and one bit pass it on everywhere.

    Args:
        grid: bits, format, granularity and calibrator. "mse" tries 81 ranges at every pass; "minmax" is the fastest.
        weight: the weight, for its shape.
        out: its output axis.

    Raises:
        ValueError: a granularity that does not fit the weight.

    Examples:
        >>> from lightning_compress.quantization.grids import Grid
        >>> weight = torch.tensor([[0.7, -0.26], [7.0, 2.4]])
        >>> quantizer = CalibratedWeight(Grid(bits=4, calibrator="minmax"), weight)
        >>> [[round(v, 2) for v in row] for row in quantizer(weight).tolist()]
        [[0.7, -0.3], [7.0, 2.0]]

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """

    def __init__(self, grid: Grid, weight: Tensor, out: int = 0) -> None:
        super().__init__(grid.bits)
        self.grid, self.out = grid, out
        self.groups = Groups.of(granularity_of(grid.granularity), weight.shape, out)

    def forget(self) -> None:
        """Nothing is remembered."""

    def set_bits(self, bits: int) -> None:
        """Another grid, calibrated from the next pass on."""
        super().set_bits(bits)
        self.grid = self.grid.with_bits(bits)

    def forward(self, weight: Tensor) -> Tensor:
        """Shape and dtype of the weight."""
        if not self.enabled:
            return weight
        if self.grid.format != "int":
            return straight_through(weight, self.code(weight).project(weight.detach()))
        scale, zero = (None if t is None else self._expand(t, weight) for t in self._qparams(weight))
        assert scale is not None
        if self.bits == 1:
            return binary_weight(weight, scale)
        return like(fake_quantize(real(weight), scale, zero, *self._range), weight.dtype)

    def code(self, weight: Tensor) -> GridCode:
        """The code that the calibrator chooses."""
        if self.grid.format != "int":
            return self.grid.code(weight, self.out)
        scale, zero = (None if t is None else t.cpu() for t in self._qparams(weight))
        assert scale is not None
        return Affine(self.groups.axes, self.groups.size, self.bits, scale, zero, *self._range)

    @property
    def _range(self) -> tuple[int, int]:
        return integer_range(self.bits, narrow=self.grid.narrow)

    def _expand(self, values: Tensor, weight: Tensor) -> Tensor:
        return self.groups.expand(values, weight.shape, weight.is_complex())

    @torch.no_grad()
    def _qparams(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every group, where the weight is: on an accelerator, nothing is copied."""
        if self.bits == 1:
            return group_means(self.groups, weight), None
        (qmin, qmax), symmetric = self._range, self.grid.symmetric
        calibrator, percentile = self.grid.calibrator, self.grid.percentile
        pairs = [
            _calibrated(block.float(), calibrator, qmin, qmax, symmetric, percentile)
            for block in self.groups.blocks(weight.detach())
        ]
        scale, zero = (self.groups.join(list(parts), weight.shape) for parts in zip(*pairs, strict=True))
        return scale, None if symmetric else zero


class ObservedInput(TrainingQuantizer):
    r"""Activations rounded to the range that an observer follows: ``m <- m + c (m_batch - m)`` for minimum and maximum.

    The first batch sets both, and whether the grid has negative integers: ``0 ... 2^b - 1`` with ``s = max / (2^b -
    1)`` for values that are never negative, else ``-2^(b-1) ... 2^(b-1) - 1`` with ``s = max |m| / (2^(b-1) - 1)``. It
    learns in training mode, until ``learning`` is off; with several processes from the extremes of all. Until the first
    batch values pass through; a batch with values that are not finite is not counted.

    Args:
        bits: 2 to 16.
        momentum: c in (0, 1].

    Examples:
        >>> quantizer = ObservedInput(2, momentum=0.5)
        >>> quantizer(torch.tensor([0.0, 1.2, 3.0])).tolist()
        [0.0, 1.0, 3.0]
        >>> quantizer(torch.tensor([0.0, 1.2, 9.0])).tolist(), float(quantizer.high)
        ([0.0, 2.0, 6.0], 6.0)
        >>> quantizer.eval()(torch.tensor([30.0])).tolist(), float(quantizer.high)
        ([6.0], 6.0)

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, momentum: float = 0.01) -> None:
        super().__init__(bits)
        self.momentum = momentum
        self.register_buffer("low", torch.zeros(1), persistent=False)
        self.register_buffer("high", torch.zeros(1), persistent=False)

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return integer_range(self.bits, self.signed, narrow=False)

    @property
    def scale(self) -> Tensor:
        """The step of the grid."""
        low = self.low if self.signed else torch.zeros_like(self.low)
        return choose_qparams(low, self.high, *self.range)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of x."""
        if x.is_complex():
            return torch.view_as_complex(self(torch.view_as_real(x)))
        # Frozen before it ever saw a batch, it would pass values through for good.
        if self.training and x.numel() and (self.learning or not self.initialized):
            self._observe(x.detach())
        if not self.active:
            return x
        return fake_quantize(x, self.scale, None, *self.range)

    def frozen(self) -> InputQuantizer:
        """The present grid."""
        qmin, qmax = self.range
        return InputQuantizer(self.bits, float(self.scale.detach()), 0, qmin, qmax)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = x.float().aminmax()
        ends = agree(torch.stack([-low, high]), "max")
        low, high = -ends[:1], ends[1:]
        if not self.initialized:
            self._start(low, high)
            return
        finite = torch.isfinite(ends).all()  # a tensor: no wait for the accelerator
        for value, seen in ((self.low, low), (self.high, high)):
            value.copy_(torch.where(finite, value + self.momentum * (seen - value), value))

    def _start(self, low: Tensor, high: Tensor) -> None:
        if bool(torch.isfinite(high - low)):
            self.low.copy_(low)
            self.high.copy_(high)
            self.signed, self.initialized = bool(low < 0), True

    def widen(self) -> bool:
        """Take negative integers in, if negative values came after the first batch.

        Returns:
            Whether the grid changed.
        """
        if self.initialized and not self.signed and bool(self.low < 0):
            self.signed = True
            return True
        return False


# An operator of its own: torch.compile takes it as it is, in place of tracing 81 passes over every weight.
@torch.library.custom_op("lightning_compress::calibrated", mutates_args=())
def _calibrated(
    rows: Tensor, calibrator: str, qmin: int, qmax: int, symmetric: bool, percentile: float
) -> tuple[Tensor, Tensor]:
    lo, hi = calibrate(calibrator, rows, qmin=qmin, qmax=qmax, symmetric=symmetric, percentile=percentile)
    return choose_qparams(lo, hi, qmin, qmax, symmetric)


@_calibrated.register_fake
def _(
    rows: Tensor, calibrator: str, qmin: int, qmax: int, symmetric: bool, percentile: float
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape[0], dtype=torch.int32)
