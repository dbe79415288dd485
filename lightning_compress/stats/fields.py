"""The record of what was measured for one weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stats:
    """What one weight's layer saw during calibration; None where it was not asked for.

    Args:
        input_norm: ``sqrt(sum |x_j|^2)`` over samples and positions of the input that each weight entry
            multiplies, broadcastable to the weight: Linear [1, in]; convolution [1, in, *kernel] ([out, in /
            groups, *kernel] if grouped, [in, 1, *kernel] if transposed), zeros of the padding included;
            spectral [in, 1, *modes], of the Fourier coefficients; Embedding [entries, 1], the root of how often
            each is looked up. float32.
        input_mean: mean of the same inputs over the same samples and positions, of the same shape, so that
            ``sum(weight * input_mean)`` per output channel is the mean output without bias. float32;
            complex64 where the inputs are complex.
        gram: ``X^T X`` of the same unfolded inputs, [D, D] with D = in x kernel size in the order of the
            weight, [groups, D, D] if grouped. float64. Spectral: ``sum x_m x_m^H`` over samples of the Fourier
            coefficients x_m of every stored mode m, [*modes, in, in], zeros where no input reached a mode;
            complex128.
        input_range: smallest and largest entry of the layer's input.
        output_range: the same of its output.
        histogram: counts of the input's entries (real and imaginary parts of complex ones) in 2 x 2048 equal
            bins on [-upper, upper), and upper, a power of two.
        output_histogram: the same of its output.
        output_rms: ``sqrt(mean |a_c|^2)`` of every output channel a_c, bias included, over samples and positions.
            float32, [out channels].
        output_mean_abs: ``mean |a_c|`` of the same.
        gradient: ``E |g|^2`` per entry, E over single samples, g the gradient of the loss. float32 (float64 for
            weights of double precision), shape of the weight.
        taylor: mean over batches of ``Re(conj(g) w)^2`` per entry, g the gradient of the batch's mean loss. As
            ``gradient``.
        taylor_sums: for every axis of the weight, mean over batches of ``(sum Re(conj(g) w))^2``, summed over all
            entries that share an index of that axis: one tensor [size of the axis] per axis.
        bias: what the layer adds to every output channel: its own bias, or, where a BatchNorm directly follows,
            ``b' = beta + (b - mu) gamma / sigma``. Float, [out channels]; None also where there is nothing to
            add or no gradient of it.
        bias_gradient: ``E g^2`` of ``bias`` over single samples.
        norm_scale: ``|gamma|`` of the BatchNorm that directly follows, [out channels]; None where there is none.
        count: number of samples.
        rows: rows of X (samples x positions); 0 unless ``input_norm``, ``input_mean`` or ``gram`` was asked
            for.
    """

    input_norm: Tensor | None = None
    input_mean: Tensor | None = None
    gram: Tensor | None = None
    input_range: tuple[float, float] | None = None
    output_range: tuple[float, float] | None = None
    histogram: tuple[Tensor, float] | None = None
    output_histogram: tuple[Tensor, float] | None = None
    output_rms: Tensor | None = None
    output_mean_abs: Tensor | None = None
    gradient: Tensor | None = None
    taylor: Tensor | None = None
    taylor_sums: tuple[Tensor, ...] | None = None
    bias: Tensor | None = None
    bias_gradient: Tensor | None = None
    norm_scale: Tensor | None = None
    count: int = 0
    rows: int = 0


FACTORS = frozenset(("input_norm", "input_mean", "gram"))  # of the inputs as the weight multiplies them
OUTPUTS = frozenset(("output_rms", "output_mean_abs"))  # of what comes out of these products
ENDS = ("input_range", "output_range", "histogram", "output_histogram")  # of a module's input and output
SINGLE = frozenset(("gradient", "bias", "bias_gradient"))  # gradients of single samples
BATCHED = frozenset(("taylor", "taylor_sums"))  # gradients of batches
FIELDS = tuple(name for name in Stats.__dataclass_fields__ if name not in ("count", "rows"))
