"""BatchNorm folded into the layer before it while training: the weight that is rounded is the one that is deployed."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.targets import plain_class

_FOLD = "_fold"
_CLASSES: dict[type, type[nn.Module]] = {}


class Fold:
    r"""A linear or convolution layer, its weight quantizer Q and the BatchNorm behind it as one operation.

    While the statistics move, with mu and sigma of ``conv(x, w) + b``:

        y = conv(x, Q(w gamma / sigma_run)) sigma_run / sigma_batch + beta + gamma (b - mu_batch) / sigma_batch

    BatchNorm's running statistics are updated with these batch statistics, as they would be without folding. In eval
    mode, or once BatchNorm itself is in eval mode:

        y = conv(x, Q(w gamma / sigma_run)) + beta + gamma (b - mu_run) / sigma_run

    ``sigma = sqrt(var + eps)``. The gradient reaches w, b, gamma and beta, also by way of the batch statistics. A
    second convolution in every training step finds those; it is not rounded.

    Args:
        norm: the BatchNorm; it belongs to the model, not to this object.
        quantizer: of the layer's weight; while it is not enabled, both layers are what they were.

    Source: Jacob et al. 2018, section 3.2; Krishnamoorthi 2018, Quantizing deep convolutional networks for efficient
        inference, section 3.2.2 (corrected, then frozen statistics).
    """

    def __init__(self, norm: _BatchNorm, quantizer: Any) -> None:
        self.norm, self.quantizer = norm, quantizer

    @property
    def active(self) -> bool:
        """Whether the two layers compute as one now."""
        return bool(self.quantizer.enabled)

    def scaled(self, weight: Tensor) -> Tensor:
        """``w gamma / sigma_run``, which is rounded.

        Args:
            weight: ``[out, ...]``.

        Returns:
            Shape and dtype of the weight.
        """
        factor = cast(Tensor, self.norm.weight) / self._sigma()
        return weight * factor.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))

    def __call__(self, layer: Any, x: Tensor, rounded: Tensor, weight: Tensor) -> Tensor:
        """The output of BatchNorm.

        Args:
            layer: the linear or convolution layer.
            x: its input, already rounded.
            rounded: ``Q(w gamma / sigma_run)``.
            weight: w.

        Returns:
            y.
        """
        norm: Any = self.norm
        if not norm.training:
            bias = None if layer.bias is None else torch.zeros_like(layer.bias)
            shift = self._shift(layer.bias, norm.running_mean, self._sigma()).to(norm.bias.dtype)
            return F.batch_norm(_linear(layer, x, rounded, bias), *_neutral(norm), shift, eps=norm.eps)
        out, free, before = (
            _linear(layer, x, rounded, None),
            _linear(layer, x, weight, layer.bias),
            self._sigma(),
        )
        with torch.no_grad():
            plain_class(norm).forward(norm, free.detach())  # only for its running statistics
        values = free.to(torch.promote_types(free.dtype, torch.float32))
        var, mean = torch.var_mean(values, [axis for axis in range(free.dim()) if axis != 1], correction=0)
        sigma = (var + norm.eps).sqrt()
        shape = (-1, *[1] * (out.dim() - 2))
        scale, shift = before / sigma, self._shift(layer.bias, mean, sigma)
        y = out * scale.reshape(shape) + shift.reshape(shape)
        return cast(Tensor, y.to(out.dtype))

    def _sigma(self) -> Tensor:
        var = cast(Tensor, self.norm.running_var)
        return (var.to(torch.promote_types(var.dtype, torch.float32)) + self.norm.eps).sqrt()

    def _shift(self, bias: Tensor | None, mean: Tensor, sigma: Tensor) -> Tensor:
        away = -mean if bias is None else bias - mean
        return self.norm.bias + self.norm.weight * away / sigma

    @torch.no_grad()
    def settle(self, layer: Any) -> None:
        """Leave the shift in BatchNorm's bias, and everything else neutral there; the layer's bias becomes zero.

        Args:
            layer: the layer, whose weight the caller has replaced by the rounded one.
        """
        norm: Any = self.norm
        shift = self._shift(layer.bias, norm.running_mean, self._sigma())
        for tensor, value in zip(
            (norm.running_mean, norm.running_var, norm.weight), _neutral(norm), strict=True
        ):
            tensor.copy_(value)
        norm.bias.copy_(shift)
        if layer.bias is not None:
            layer.bias.zero_()


def _neutral(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and weight with which BatchNorm adds its bias and does nothing else."""
    zeros = torch.zeros_like(norm.running_mean)
    return zeros, torch.full_like(norm.running_var, 1 - norm.eps), torch.ones_like(norm.weight)


def _linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return cast(Tensor, layer._conv_forward(x, weight, bias))


def fold_refusal(layer: nn.Module, norm: nn.Module) -> str | None:
    """Why a pair of layers cannot be folded while training, or None.

    Args:
        layer: what feeds the BatchNorm.
        norm: the BatchNorm.
    """
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"{plain_class(layer).__name__} is not a linear or (forward) convolution layer"
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return f"{plain_class(norm).__name__} takes its statistics from several processes"
    if norm.weight is None or norm.bias is None:
        return "it has no weight and bias (affine=False)"
    return None


def fold_of(layer: nn.Module) -> Fold | None:
    """The fold that a layer or a BatchNorm is part of, or None."""
    return cast("Fold | None", vars(layer).get(_FOLD))


def join(layer: nn.Module, norm: _BatchNorm, quantizer: Any) -> None:
    """Make a layer and a BatchNorm two parts of one fold; BatchNorm passes its input on while that is active.

    Args:
        layer: a layer without ``fold_refusal``.
        norm: the BatchNorm; its class changes, nothing else.
        quantizer: of the layer's weight.
    """
    vars(layer)[_FOLD] = vars(norm)[_FOLD] = Fold(norm, quantizer)
    cast(nn.Module, norm).__class__ = _class(plain_class(norm))


def part(layer: nn.Module) -> None:
    """Inverse of ``join``; nothing happens to a layer without a fold."""
    fold = vars(layer).pop(_FOLD, None)
    if fold is not None:
        vars(fold.norm).pop(_FOLD, None)
        fold.norm.__class__ = plain_class(fold.norm)


def _class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            fold = fold_of(self)
            return x if fold is not None and fold.active else cast(Tensor, base.forward(self, x))

        body = {
            "__doc__": f"{base.__name__} that the layer before it computes.",
            "__module__": __name__,
            "__reduce_ex__": lambda self, protocol: (_rebuild, (base,), self.__getstate__()),
            "_plain_class": base,
            "forward": forward,
        }
        _CLASSES[base] = type(f"Folded{base.__name__}", (base,), body)
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    return object.__new__(_class(base))
