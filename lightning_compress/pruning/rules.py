"""The criteria by name: what an element of a weight is worth, and what a whole channel.

Every one is a function ``f(target, stats) -> scores``, higher = keep, with attributes that ``rule`` sets.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_compress.stats import Stats
from lightning_compress.targets import Target

Criterion = Callable[[Target, Stats | None], Tensor]
# Of a target, its statistics, an axis, a norm ("l2" or "l1") and whether sizes are divided out.
ChannelScores = Callable[[Target, Stats | None, int, str, bool], Tensor]


def rule(
    *, needs: Sequence[str] = (), channels: ChannelScores | None = None, whole: bool = False
) -> Callable[[Criterion], Criterion]:
    """Say what a criterion needs and how it scores whole channels.

    Args:
        needs: fields of ``Stats``.
        channels: scores of the indices of an axis; None puts element scores together.
        whole: it has scores of channels only.

    Returns:
        A decorator that sets the attributes ``needs``, ``channels`` and ``whole``.

    Examples:
        >>> @rule(needs=("input_norm",))
        ... def by_input(target, stats):
        ...     return stats.input_norm.expand(target.weight.shape)
        >>> by_input.needs
        ('input_norm',)
    """

    def mark(scores: Criterion) -> Criterion:
        for name, value in (("needs", tuple(needs)), ("channels", channels), ("whole", whole)):
            setattr(scores, name, value)
        return scores

    return mark


def grouped(scores: Tensor, axis: int, norm: str, normalize: bool) -> Tensor:
    """One number for each index of an axis: ``(sum s^2)^(1/2) / m^(1/2)`` ("l2") or ``sum s / m`` ("l1").

    Args:
        scores: real, of every element.
        axis: which one.
        norm: "l2" or "l1".
        normalize: divide by the number m of elements an index has.

    Returns:
        [size of the axis].

    Examples:
        >>> grouped(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), 0, "l2", normalize=False)
        tensor([5., 2.])
    """
    rows = scores.movedim(axis, 0).flatten(1) if scores.dim() > 1 else scores[:, None]
    size = max(rows.shape[1], 1) if normalize else 1
    if norm == "l1":
        return rows.sum(1) / size
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length / math.sqrt(size)


def precise(values: Tensor) -> Tensor:
    """In the precision scores have: double stays double, everything shorter is float32 (complex64)."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@rule()
def magnitude(target: Target, stats: Stats | None = None) -> Tensor:
    """Absolute value, the modulus for complex weights: ``s = |w|``.

    Args:
        target: the weight.
        stats: not used.

    Returns:
        Real scores, shape of the weight.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> magnitude(find(layer)[0])
        tensor([[3., 4.]])

    Source: Han et al. 2015; of channels Li et al. 2017, Pruning Filters for Efficient ConvNets.
    """
    return precise(target.weight.detach()).abs()


def random(seed: int) -> Criterion:
    """Uniform noise, ``s ~ U(0, 1)``, from a private generator seeded by (seed, parameter name) for every layer.

    Args:
        seed: any integer.

    Returns:
        The criterion; a channel gets one number of its own.

    Examples:
        >>> target = find(nn.Linear(4, 4))[0]
        >>> torch.equal(random(0)(target, None), random(0)(target, None))
        True
    """

    def channels(target: Target, stats: Stats | None, axis: int, norm: str, normalize: bool) -> Tensor:
        return _uniform(target, target.weight.shape[axis : axis + 1], f"{seed}:axis {axis}")

    @rule(channels=channels)
    def scores(target: Target, stats: Stats | None = None) -> Tensor:
        return _uniform(target, target.weight.shape, f"{seed}")

    return scores


def _uniform(target: Target, shape: Sequence[int], seed: str) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{target.key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64).to(target.weight.device)


def _taylor_channels(target: Target, stats: Stats | None, axis: int, norm: str, normalize: bool) -> Tensor:
    sums = needed(target, stats, "taylor_sums")
    return sums[axis]


@rule(needs=("taylor", "taylor_sums"), channels=_taylor_channels)
def taylor(target: Target, stats: Stats | None) -> Tensor:
    """Change of the loss to first order, ``s = mean_B (g_B w)^2``, complex ``Re(conj(g_B) w)^2``; B: batches.

    Of a channel it is ``mean_B (sum g_B w)^2``: opposite effects cancel. Without labels and without a loss the batches
    are labelled by the model's own distribution; the gradients are then noise whose size is the Fisher information.

    Args:
        target: the weight.
        stats: with ``taylor``; channels take ``taylor_sums``.

    Returns:
        Real scores, shape of the weight.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))]
        >>> pruned = compress(layer, Prune(0.5, criterion="taylor"), data=data).model

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning.
    """
    scores: Tensor = needed(target, stats, "taylor")
    return scores


def _fisher_channels(target: Target, stats: Stats | None, axis: int, norm: str, normalize: bool) -> Tensor:
    scores = grouped(fisher(target, stats), axis, "l1", normalize=False)
    if (
        stats is not None
        and stats.bias is not None
        and stats.bias_gradient is not None
        and axis == target.axes.out
    ):
        scores = scores + _per_index(stats.bias_gradient * stats.bias.square() / 2, len(scores)).sum(0)
    return scores


@rule(needs=("gradient", "bias", "bias_gradient"), channels=_fisher_channels)
def fisher(target: Target, stats: Stats | None) -> Tensor:
    """Change of the loss to second order at a minimum, ``s = E|g|^2 |w|^2 / 2``, E over single samples.

    Of an output channel it is the sum over its weights, plus ``E g_b^2 b^2 / 2`` of its bias b; where a BatchNorm
    directly follows, of the bias ``b' = beta + (b - mu) gamma / sigma`` that the two have together.

    Args:
        target: the weight.
        stats: with ``gradient``; output channels take ``bias`` and ``bias_gradient``, where there are any.

    Returns:
        Real scores, shape of the weight.

    Examples:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(3.0)
        >>> fisher(find(layer)[0], lc.stats.Stats(gradient=torch.tensor([[4.0]])))
        tensor([[18.]])

    Source: Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning.
    """
    scores: Tensor = needed(target, stats, "gradient") * precise(target.weight.detach()).abs().square() / 2
    return scores


def _wanda_channels(target: Target, stats: Stats | None, axis: int, norm: str, normalize: bool) -> Tensor:
    return grouped(wanda(target, stats), axis, "l1", normalize=False)


@rule(needs=("input_norm",), channels=_wanda_channels)
def wanda(target: Target, stats: Stats | None) -> Tensor:
    """Size of what an element adds to the output: ``s = |w_ij| ||x_j||_2``, over samples and positions.

    Convolutions: j is a pixel of the unfolded input, zeros of the padding included; spectral: an input channel's
    Fourier coefficient. Of a channel it is the sum over its weights.

    Args:
        target: the weight.
        stats: with ``input_norm``.

    Returns:
        Real scores, shape of the weight.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> wanda(find(layer)[0], lc.stats.Stats(input_norm=torch.tensor([[2.0, 1.0]])))
        tensor([[6., 4.]])

    Source: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models.
    """
    norms: Tensor = needed(target, stats, "input_norm")
    return (precise(target.weight.detach()).abs() * norms).expand(target.weight.shape)


def _activation_channels(
    target: Target, stats: Stats | None, axis: int, norm: str, normalize: bool
) -> Tensor:
    _output_axis(target, axis, "activation")
    size = target.weight.shape[axis]
    if norm == "l1":
        return _per_index(needed(target, stats, "output_mean_abs"), size).mean(0)
    return _per_index(needed(target, stats, "output_rms"), size).square().mean(0).sqrt()


@rule(needs=("output_rms", "output_mean_abs"), channels=_activation_channels, whole=True)
def activation(target: Target, stats: Stats | None) -> Tensor:
    """Size of an output channel a_c: its root mean square over samples and positions, or with norm="l1" mean |a_c|.

    Args:
        target: the weight.
        stats: with ``output_rms`` and ``output_mean_abs``.

    Raises:
        ValueError: always: it has scores of whole channels only.

    Source: Hu et al. 2016, Network Trimming (share of zeros there); Molchanov et al. 2017 (mean activation).
    """
    raise _only_channels(target, "activation")


def _scale_channels(target: Target, stats: Stats | None, axis: int, norm: str, normalize: bool) -> Tensor:
    _output_axis(target, axis, "batchnorm_scale")
    return _per_index(precise(needed(target, stats, "norm_scale")), target.weight.shape[axis]).mean(0)


@rule(needs=("norm_scale",), channels=_scale_channels, whole=True)
def batchnorm_scale(target: Target, stats: Stats | None) -> Tensor:
    """What the BatchNorm that directly follows multiplies an output channel with: ``s = |gamma_c|``.

    Args:
        target: the weight.
        stats: with ``norm_scale``.

    Raises:
        ValueError: always: it has scores of whole channels only.

    Source: Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming.
    """
    raise _only_channels(target, "batchnorm_scale")


def _redundancy_channels(
    target: Target, stats: Stats | None, axis: int, norm: str, normalize: bool
) -> Tensor:
    weight = target.weight.detach()
    rows = (torch.view_as_real(weight) if weight.is_complex() else weight).movedim(axis, 0).double()
    rows = rows.reshape(len(rows), -1)
    return torch.cdist(rows, rows, p=1.0 if norm == "l1" else 2.0).sum(1)


@rule(channels=_redundancy_channels, whole=True)
def redundancy(target: Target, stats: Stats | None = None) -> Tensor:
    """How far a channel is from the other ones of its layer: ``s_c = sum_d ||w_c - w_d||_2``.

    The lowest is nearest to the geometric median: the others can stand in for it.

    Args:
        target: the weight.
        stats: not used.

    Raises:
        ValueError: always: it has scores of whole channels only.

    Source: He et al. 2019, Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration.
    """
    raise _only_channels(target, "redundancy")


def needed(target: Target, stats: Stats | None, field: str) -> Tensor:
    """A field of the statistics.

    Raises:
        ValueError: it was not measured; names the target.
    """
    value = getattr(stats, field, None)
    if value is None:
        why = "no BatchNorm directly follows it" if field == "norm_scale" else "it was not measured"
        raise ValueError(f"{target.key} has no {field}: {why}.")
    found: Tensor = value
    return found


def _per_index(values: Tensor, size: int) -> Tensor:
    """Values of all output channels as [groups, size]: a grouped transposed weight has one index for several."""
    return values.view(-1, size)


def _output_axis(target: Target, axis: int, name: str) -> None:
    if axis != target.axes.out:
        raise ValueError(
            f"criterion {name!r} scores output channels: axis {axis} of {target.key} is not its output axis "
            f"{target.axes.out}; other axes take magnitude, random, taylor, fisher, wanda or redundancy."
        )


def _only_channels(target: Target, name: str) -> ValueError:
    return ValueError(
        f"criterion {name!r} scores whole channels, not the elements of {target.key}: use pattern='channel'."
    )
