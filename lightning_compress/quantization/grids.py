"""Which grid a weight gets: the number format, and the calibrator that sets the scale of every group."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_compress.functional import formats
from lightning_compress.functional.affine import choose_qparams, integer_range
from lightning_compress.functional.calibrators import CALIBRATORS, calibrate
from lightning_compress.functional.groups import Granularity, Groups, PerChannel, granularity_of
from lightning_compress.quantization.codes import Affine, GridCode, MiniFloatCode, PowerOfTwo


@dataclass(frozen=True)
class Log2:
    """Zero and signed powers of two; ``bits`` of the transform: one for the sign, the others for the exponent.

    Args:
        rounding: "log" (nearest exponent) or "linear" (nearest value).

    Raises:
        ValueError: another rounding.
    """

    rounding: str = "log"

    def __post_init__(self) -> None:
        if self.rounding not in ("log", "linear"):
            raise ValueError(f"Log2(rounding={self.rounding!r}): allowed are 'log' and 'linear'.")


@dataclass(frozen=True)
class MiniFloat:
    """Floating-point numbers of 1 + E + M bits, saturating; ``bits`` of the transform is not used.

    Args:
        exponent: E, 2 to 8.
        mantissa: M, 0 to 10.
        scale: what a group is divided by first: "po2" (the power of two at or above ``T / max``), "float" (``T / max``,
            T by the calibrator) or "none".

    Raises:
        ValueError: an option outside its range.
    """

    exponent: int = 4
    mantissa: int = 3
    scale: str = "po2"

    def __post_init__(self) -> None:
        if self.scale not in ("po2", "float", "none"):
            raise ValueError(f"MiniFloat(scale={self.scale!r}): allowed are 'po2', 'float' and 'none'.")
        formats.minifloat_range(self.exponent, self.mantissa)


Format = str | Log2 | MiniFloat
SCALES = ("float", "po2")


def format_of(given: Format) -> Format:
    """The format that a name means.

    Args:
        given: "int", "log2", a name of ``lightning_compress.functional.formats.MINIFLOATS``, or a format.

    Returns:
        "int" or a format.

    Raises:
        ValueError: unknown name.

    Examples:
        >>> format_of("e4m3")
        MiniFloat(exponent=4, mantissa=3, scale='po2')
    """
    if not isinstance(given, str) or given == "int":
        return given
    if given == "log2":
        return Log2()
    if given not in formats.MINIFLOATS:
        names = ", ".join(("int", "log2", *formats.MINIFLOATS))
        raise ValueError(f"format={given!r} is unknown; allowed: {names}, Log2(...) and MiniFloat(...).")
    cast = given in ("fp16", "bf16")  # the range needs no help
    return MiniFloat(*formats.MINIFLOATS[given], scale="none" if cast else "po2")


@dataclass(frozen=True)
class Grid:
    """How the grid of a weight is chosen.

    Args:
        bits: 1 to 16; not used by minifloats.
        format: number format.
        symmetric: whether the integer zero point is 0.
        narrow: leave the most negative integer out.
        granularity: which entries share a scale; also by name, "per_tensor", "per_channel" or "per_group:SIZE".
        calibrator: name of the rule that sets the clip range.
        percentile: for calibrator="percentile".
        scale: of integers: "float", or "po2" for powers of two.

    Raises:
        ValueError: options that do not exist or do not go together.
    """

    bits: int = 8
    format: Format = "int"
    symmetric: bool = True
    narrow: bool = True
    granularity: Granularity | str = PerChannel()
    calibrator: str = "mse"
    percentile: float = 99.99
    scale: str = "float"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale!r} is unknown; allowed: {', '.join(SCALES)}.")
        kind = format_of(self.format)
        integer_range(self.bits)
        granularity_of(self.granularity)
        if self.calibrator not in CALIBRATORS:
            raise ValueError(f"calibrator={self.calibrator!r} is unknown; allowed: {', '.join(CALIBRATORS)}.")
        if isinstance(kind, Log2) and not 2 <= self.bits <= 8:
            raise ValueError(f"format='log2' with bits={self.bits}: allowed is 2 <= bits <= 8.")
        if kind == "int" and self.calibrator == "sawb" and not self.symmetric:
            raise ValueError("calibrator='sawb' is for symmetric weights: set symmetric=True.")
        if kind == "int" and self.bits == 1 and not self.symmetric:
            raise ValueError("bits=1 means the two values -s and s, which is symmetric: set symmetric=True.")

    @property
    def width(self) -> int:
        """Bits of one entry."""
        kind = format_of(self.format)
        return 1 + kind.exponent + kind.mantissa if isinstance(kind, MiniFloat) else self.bits

    def code(self, weight: Tensor, out: int) -> GridCode:
        """The code of a weight: its grid, chosen by the calibrator for every group.

        Args:
            weight: real or complex.
            out: its output axis.

        Returns:
            The code; ``code.project(weight)`` are the nearest values.

        Raises:
            ValueError: a granularity that does not fit the weight.

        Examples:
            >>> code = Grid(bits=4, calibrator="minmax").code(torch.tensor([[0.7, -0.1], [7.0, 2.0]]), out=0)
            >>> [round(s, 4) for s in code.scale.tolist()]
            [0.1, 1.0]
        """
        weight = weight.detach().cpu()
        groups, kind = Groups.of(granularity_of(self.granularity), weight.shape, out), format_of(self.format)
        blocks = [block.float() for block in groups.blocks(weight)]
        if isinstance(kind, Log2):
            exponents = [
                formats.log2_quantize(block, self.bits, rounding=kind.rounding)[1] for block in blocks
            ]
            e_max = groups.join(exponents, weight.shape)
            return PowerOfTwo(groups.axes, groups.size, self.bits, e_max, kind.rounding)
        if isinstance(kind, MiniFloat):
            scales = [self._float_scale(block, kind) for block in blocks]
            scale = groups.join(scales, weight.shape)
            return MiniFloatCode(groups.axes, groups.size, self.width, scale, kind.exponent, kind.mantissa)
        qmin, qmax = integer_range(self.bits, narrow=self.narrow)
        if self.bits == 1:
            means = [block.abs().mean(1) for block in blocks]
            pairs = [
                choose_qparams(mean, mean, qmin, qmax, power_of_two=self.scale == "po2") for mean in means
            ]
        else:
            pairs = [self._affine(block, qmin, qmax) for block in blocks]
        scale, zero = (groups.join(list(parts), weight.shape) for parts in zip(*pairs, strict=True))
        return Affine(
            groups.axes, groups.size, self.bits, scale, None if self.symmetric else zero, qmin, qmax
        )

    def _affine(self, block: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        lo, hi = calibrate(
            self.calibrator, block, qmin=qmin, qmax=qmax, symmetric=self.symmetric, percentile=self.percentile
        )
        return choose_qparams(lo, hi, qmin, qmax, self.symmetric, self.scale == "po2")

    def _float_scale(self, block: Tensor, kind: MiniFloat) -> Tensor:
        if kind.scale == "none":
            return torch.ones(len(block))
        most = formats.minifloat_range(kind.exponent, kind.mantissa).max

        def scale_of(clip: Tensor) -> Tensor:
            scale = clip / most
            if kind.scale == "po2":
                fraction, exponent = torch.frexp(scale)
                scale = formats.power_of_two((exponent - (fraction == 0.5).int()).clamp(-126, 127))
            return torch.where((clip > 0) & (scale >= torch.finfo(torch.float32).tiny), scale, 1.0)

        def error(rows: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
            scale = scale_of(hi).view(-1, 1)
            rounded = formats.minifloat_round(rows / scale, kind.exponent, kind.mantissa) * scale
            return (rounded - rows).square().sum(1)

        integers = integer_range(min(self.width, 8))  # for calibrators that count levels
        _, hi = calibrate(
            self.calibrator,
            block,
            qmin=integers[0],
            qmax=integers[1],
            symmetric=True,
            percentile=self.percentile,
            error=error,
        )
        return scale_of(hi)

    def with_bits(self, bits: int) -> Grid:
        """The same rule with other bits."""
        return replace(self, bits=bits)
