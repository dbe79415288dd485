"""Quantizers whose step or clip the optimizer learns: LSQ for weights and activations, PACT for activations."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from lightning_compress.codes import Code
from lightning_compress.functional.affine import integer_range, learned_step
from lightning_compress.functional.calibrators import calibrate
from lightning_compress.functional.groups import Granularity, Groups, granularity_of, like, real
from lightning_compress.quantization.codes import Affine, GridCode
from lightning_compress.quantization.quantizers import InputQuantizer, TrainingQuantizer
from lightning_compress.quantization.straight import agree, attached, binary_weight, group_means

SMALLEST = 1e-8
"""Learned steps and clips are kept at or above this."""
_PACT_PERCENTILE = 99.9
_SAMPLE = 1 << 16


class WeightQuantizer(TrainingQuantizer):
    """Rounds a weight while it is trained, and knows the code that the weight then has.

    Args:
        bits: 1 to 16.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.initialized = self.signed = True

    @property
    def active(self) -> bool:
        """Whether values are rounded now; a weight can always be looked at, so it never waits."""
        return self.enabled

    @abstractmethod
    def code(self, weight: Tensor) -> GridCode:
        """How the rounded weight can be stored.

        Args:
            weight: the float weight.

        Returns:
            The code; ``code.project(weight)`` is what ``forward`` gives, bit for bit.
        """


class LearnedWeight(WeightQuantizer):
    r"""LSQ for a weight: ``w^ = s clip(round(w / s), qmin, qmax)`` with learned steps s, one per group.

    ``dw^/ds`` as in ``lightning_compress.functional.affine.learned_step``, times ``1 / sqrt(N qmax)`` with N weights in
    a group. Steps start at ``s = 2 E|w| / sqrt(qmax)``, or at ``T / qmax`` with T by another calibrator; a group of
    zeros takes ``E|w| = 1 / (2 sqrt(N))``, that of PyTorch's initialization. One bit means the two values -s and s
    with ``s = E|w|``, which is not learned.

    Args:
        bits: 1 to 16.
        weight: real or complex; the two planes of a complex weight share their steps.
        granularity: which weights share a step.
        out: output axis of the weight.
        narrow: leave the most negative integer out.
        calibrator: rule for the first steps. The paper's, "lsq", makes them wide: 1.8 times the best ones for normally
            distributed weights of 4 bits, which "mse" finds.
        code: how the weight was quantized before training; while it describes the weight and is of the same grid, its
            scales are the first steps.

    Raises:
        ValueError: bits outside 1..16, or a granularity that does not fit the weight.

    Examples:
        >>> quantizer = LearnedWeight(2, torch.tensor([0.5, -1.5, 0.1, 0.0]))
        >>> [round(v, 3) for v in quantizer(torch.tensor([0.5, -1.5, 0.6])).tolist()]  # s = 2 * 0.525 / sqrt(1)
        [0.0, -1.05, 1.05]
        >>> list(quantizer.state_dict())
        []

    Source: Esser et al. 2020, Learned Step Size Quantization; one bit: Rastegari et al. 2016, XNOR-Net.
    """

    def __init__(
        self,
        bits: int,
        weight: Tensor,
        granularity: Granularity | str = "per_tensor",
        out: int = 0,
        narrow: bool = True,
        calibrator: str = "lsq",
        code: Code | None = None,
    ) -> None:
        super().__init__(bits)
        self.calibrator, self.given = calibrator, code
        self.groups = Groups.of(granularity_of(granularity), weight.shape, out)
        self.narrow = narrow
        # Real numbers that share a step; runs that are cut off at the end of a row count as the average.
        self.share = real(weight).numel() / self.groups.count(weight.shape)
        self.step = nn.Parameter(self._initial(weight))

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return integer_range(self.bits, narrow=self.narrow)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Set the steps from a weight.

        Args:
            weight: of the shape given at first.
        """
        self.step.copy_(self._initial(weight))
        self.initialized = True

    def set_bits(self, bits: int) -> None:
        """Another grid; the steps grow as its largest integer shrinks, so that the range stays."""
        before = self.range[1]
        super().set_bits(bits)
        self.step.data.mul_(before / self.range[1])

    def forward(self, weight: Tensor) -> Tensor:
        """Shape and dtype of the weight."""
        if not self.enabled:
            return attached(weight, self.step)
        if self.bits == 1:
            return attached(binary_weight(weight, self._expand(self._means(weight), weight)), self.step)
        step, (qmin, qmax) = self._expand(self._steps(weight), weight), self.range
        rounded = learned_step(real(weight), step, qmin, qmax, 1 / math.sqrt(self.share * qmax))
        return like(rounded, weight.dtype)

    def code(self, weight: Tensor) -> Affine:
        """Integers and steps."""
        scale = self._means(weight) if self.bits == 1 else self._steps(weight)
        kept = scale.detach().cpu().clone()
        return Affine(self.groups.axes, self.groups.size, self.bits, kept, None, *self.range)

    def _steps(self, weight: Tensor) -> Tensor:
        """The learned steps; before there are any, those that training would start with."""
        return self.step if self.initialized else self._initial(weight)

    def _expand(self, step: Tensor, weight: Tensor) -> Tensor:
        return self.groups.expand(step, weight.shape, weight.is_complex())

    def _means(self, weight: Tensor) -> Tensor:
        return group_means(self.groups, weight)

    @torch.no_grad()
    def _initial(self, weight: Tensor) -> Tensor:
        qmin, qmax = self.range
        before = self.given
        if (
            isinstance(before, Affine)
            and before.zero_point is None
            and (before.groups, before.width, before.qmin) == (self.groups, self.bits, qmin)
            and before.matches(weight)
        ):
            return before.scale.to(weight.device)
        blocks = [block.detach().float() for block in self.groups.blocks(weight)]
        clips = [calibrate(self.calibrator, block, qmin=qmin, qmax=qmax)[1] for block in blocks]
        step = self.groups.join(clips, weight.shape).to(weight.device) / qmax
        usual = 1 / math.sqrt(self.share * qmax)  # 2 E|w| / sqrt(qmax) with E|w| = 1 / (2 sqrt(N))
        return torch.where(step > 0, step, usual).clamp_min(SMALLEST)


class LearnedInput(TrainingQuantizer):
    r"""LSQ for activations: ``y = s clip(round(x / s), qmin, qmax)`` with one learned step s.

    The first batch in training mode sets ``s = 2 E|x| / sqrt(qmax)``, or ``T / qmax`` with T by another calibrator,
    and whether the grid has negative integers; with several processes all take the mean, and negative values anywhere
    count. Until then values pass through. The gradient of s is scaled by ``1 / sqrt(N qmax)``, N values per sample
    (the first axis counts samples).

    Args:
        bits: 2 to 16.
        calibrator: rule for the first step; other ones than the paper's "lsq" look at 65,536 values at most.

    Examples:
        >>> quantizer = LearnedInput(2)
        >>> rounded = quantizer(torch.tensor([[0.0, 2.0, 10.0]]))  # s = 2 * 4 / sqrt(3) = 4.619
        >>> [round(v, 3) for v in rounded[0].tolist()], quantizer.signed
        ([0.0, 0.0, 9.238], False)

    Source: Esser et al. 2020, Learned Step Size Quantization.
    """

    residual = True  # whether the rounding error is part of the gradient

    def __init__(self, bits: int, calibrator: str = "lsq") -> None:
        super().__init__(bits)
        self.calibrator = calibrator
        self.step = nn.Parameter(torch.ones(1))

    @property
    def learned(self) -> nn.Parameter:
        """What the optimizer moves."""
        return self.step

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return integer_range(self.bits, self.signed, narrow=False)

    @property
    def scale(self) -> Tensor:
        """The step of the grid."""
        return self.step

    def set_bits(self, bits: int) -> None:
        """Another grid; the step grows as its largest integer shrinks, so that the range stays."""
        before = self.range[1]
        super().set_bits(bits)
        self.step.data.mul_(before / self.range[1])

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of x."""
        if x.is_complex():
            return torch.view_as_complex(self(torch.view_as_real(x)))
        if self.enabled and self.training and not self.initialized and x.numel():
            self._start(x.detach())
        if not self.active:
            return attached(x, self.learned)
        qmin, qmax = self.range
        return learned_step(x, self.scale, qmin, qmax, self._gradient_scale(x), self.residual)

    def frozen(self) -> InputQuantizer:
        """The present grid."""
        qmin, qmax = self.range
        return InputQuantizer(self.bits, float(self.scale.detach()), 0, qmin, qmax)

    def _gradient_scale(self, x: Tensor) -> float:
        samples = x.shape[0] if x.dim() > 1 else 1
        return 1 / math.sqrt(max(x.numel() // max(samples, 1), 1) * self.range[1])

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        """All processes start alike; a batch of zeros says nothing."""
        self.signed = float(agree(-x.float().amin(), "max")) > 0
        value = agree(self._initial(x.float()), "mean")
        if 0 < float(value) < math.inf:
            self.learned.copy_(value.clamp_min(SMALLEST))
            self.initialized = True

    def _initial(self, x: Tensor) -> Tensor:
        if self.calibrator == "lsq":
            return 2 * x.abs().mean() / math.sqrt(self.range[1])
        few = x.flatten()[:: max(x.numel() // _SAMPLE, 1)].view(1, -1)
        qmin, qmax = self.range
        return calibrate(self.calibrator, few, qmin=qmin, qmax=qmax)[1].squeeze() / qmax


class ClippedInput(LearnedInput):
    r"""PACT for activations: ``y = clip(x, 0, alpha)``, rounded with ``s = alpha / (2^b - 1)``; alpha is learned.

    ``dy/dalpha = 1`` where ``x >= alpha``, else 0. Behind a ReLU that is the clipped ReLU of the paper, since ReLU and
    clip together are the clip. Values that can be negative are clipped to [-alpha, alpha], with
    ``s = alpha / (2^(b-1) - 1)``. alpha starts at the 99.9 percentile of \|x\| in the first batch in training mode, the
    mean over processes. Until then values pass through.

    Args:
        bits: 2 to 16.

    Examples:
        >>> quantizer = ClippedInput(2)
        >>> quantizer(torch.tensor([0.0, 1.0, 3.0, 3.0])).tolist()
        [0.0, 1.0, 3.0, 3.0]
        >>> quantizer(torch.tensor([0.4, 9.0])).tolist(), quantizer.alpha.tolist()
        ([0.0, 3.0], [3.0])

    Source: Choi et al. 2018, PACT: Parameterized Clipping Activation for Quantized Neural Networks.
    """

    residual = False

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        del self.step
        self.alpha = nn.Parameter(torch.ones(1))

    @property
    def learned(self) -> nn.Parameter:
        """What the optimizer moves."""
        return self.alpha

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer; as many below zero as above, for one clip serves both."""
        return integer_range(self.bits, self.signed)

    @property
    def scale(self) -> Tensor:
        """The step of the grid."""
        return self.alpha / self.range[1]

    def set_bits(self, bits: int) -> None:
        """Another grid on the same range."""
        self.bits = bits

    def _gradient_scale(self, x: Tensor) -> float:
        return 1.0  # of the step, which is alpha / qmax: autograd does the rest

    def _initial(self, x: Tensor) -> Tensor:
        qmin, qmax = self.range
        _, high = calibrate(
            "percentile", x.abs().reshape(1, -1), qmin=qmin, qmax=qmax, percentile=_PACT_PERCENTILE
        )
        return high
