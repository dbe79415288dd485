"""The integer model: what an integer runtime computes, layer by layer, with exact accumulators."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.codes import Code
from lightning_compress.finalize import finalize
from lightning_compress.functional.affine import quantize
from lightning_compress.names import clean
from lightning_compress.quantization.codes import Affine
from lightning_compress.quantization.layers import input_quantizer, output_quantizer
from lightning_compress.quantization.quantizers import InputQuantizer
from lightning_compress.stats.running import call, evaluating, first_tensor
from lightning_compress.tables import reasons
from lightning_compress.targets import parameter, plain_class

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_FORWARDS = ("forward", "_conv_forward")
_EXACT = 2**53  # integers up to here are exact in float64
_TOLERANCE = 0.01


class IntegerLayer(nn.Module):
    """A linear or convolution layer on integers.

    ``a = sum (q_x - z_x) (q_w - z_w)`` of the integers of input and weight, exactly; then ``y = s_x s_w a + b``. A
    weight whose scales change along its inputs (``PerGroup``) has one sum for each run of inputs: ``y = s_x sum_g s_g
    a_g + b``. Integers are added up in float64, which is exact up to 2^53.

    Args:
        layer: a quantized layer, in place of which this one stands; it is not changed.

    Raises:
        ValueError: the layer has no integer form; the message says why (see ``refusal``).

    Examples:
        >>> from lightning_compress.quantization.codes import Affine
        >>> from lightning_compress.quantization.layers import quantize_input
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, -1.0]]))
        >>> codes.attach(layer, "weight", Affine((), 0, 8, torch.tensor([0.5]), None, -127, 127))
        >>> quantize_input(layer, InputQuantizer(8, scale=0.1))
        >>> integer = IntegerLayer(layer)
        >>> integer.codes.tolist(), integer.codes.dtype
        ([[1, -2]], torch.int8)
        >>> integer.accumulators(torch.tensor([[0.31, 0.2]])).tolist()  # 3 * 1 + 2 * -2
        [[[-1.0]]]
        >>> round(float(integer(torch.tensor([[0.31, 0.2]]))), 6)
        -0.05

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    geometry: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        why = refusal(layer)
        if why is not None:
            raise ValueError(f"{type(layer).__name__} has no integer form: {why}.")
        weight, bias = parameter(layer, "weight"), layer._parameters["bias"]
        code = cast(Affine, _arithmetic(layer))
        rows, zero = weight.shape[_out(layer)], code.zero_point
        runs = code.scale.view(rows, -1).t() if code.size else code.scale.expand(1, rows)
        channels = int(getattr(layer, "groups", 1)) if isinstance(layer, _TRANSPOSED) else 1
        tensors = {
            "codes": code.arrays(weight)["codes"],
            "scale": runs.repeat(1, channels),  # [K, outputs]
            "zero_point": None if zero is None else code.groups.expand(zero, weight.shape),
            "bias": None if bias is None else bias.detach().clone(),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.to(weight.device))
        self.size = code.size
        self.input_quantizer, self.output_quantizer = input_quantizer(layer), output_quantizer(layer)
        # Padding and strides, from the layer without its tensors; no submodule, for it is not a layer of the model.
        geometry = copy.copy(layer)
        geometry._modules, geometry._parameters = {}, {"weight": None, "bias": None}
        geometry.__class__ = plain_class(layer)
        self.__dict__["geometry"] = geometry
        self.train(layer.training)

    def accumulators(self, x: Tensor, *args: Any) -> Tensor:
        """The exact sums of products of integers.

        Args:
            x: input of the layer, not yet rounded.
            *args: other arguments of the layer (``output_size`` of a transposed convolution).

        Returns:
            Integers in float64, ``[K, *shape of the output]``, one for each of the K runs of inputs (1 without groups).
        """
        return self._sums(x, self._scale(x), *args)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Shape and dtype of the quantized layer's output."""
        grid = self._scale(x)
        sums = self._sums(x, grid, *args)
        channels = [-1] + [1] * (self.codes.dim() - 2)  # of the output: last axis of a linear layer
        spread = [len(sums), *[1] * (sums.dim() - len(channels) - 1), *channels]
        scale = (self.scale.double() * grid[0].double()).view(spread)
        y = (sums * scale).sum(0)
        if self.bias is not None:
            y = y + self.bias.double().view(channels)
        y = y.to(x.dtype)
        return y if self.output_quantizer is None else cast(Tensor, self.output_quantizer(y))

    def extra_repr(self) -> str:
        """The layer that it stands for."""
        shape, dtype = tuple(self.codes.shape), str(self.codes.dtype).removeprefix("torch.")
        return f"{type(self.geometry).__name__}, {dtype} weight {shape}, {len(self.scale)} sums an output"

    def _scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return cast(InputQuantizer, self.input_quantizer).qparams(x)

    def _sums(self, x: Tensor, grid: tuple[Tensor, Tensor], *args: Any) -> Tensor:
        quantizer = cast(InputQuantizer, self.input_quantizer)
        integers = quantize(x, *grid, quantizer.qmin, quantizer.qmax).double() - grid[1]
        weight = self.codes.double() if self.zero_point is None else self.codes.double() - self.zero_point
        return torch.stack([self._sum(integers, part, *args) for part in self._parts(weight)])

    def _parts(self, weight: Tensor) -> list[Tensor]:
        """The weight with all but one run of inputs set to zero, run by run."""
        if not self.size:
            return [weight]
        out = _out(self.geometry)
        rows = weight.movedim(out, 0)
        place = torch.arange(rows[0].numel(), device=weight.device).view(rows[0].shape) // self.size
        return [(rows * (place == k)).movedim(0, out) for k in range(len(self.scale))]

    def _sum(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        if isinstance(self.geometry, nn.Linear):
            return F.linear(x, weight)
        if not isinstance(self.geometry, _TRANSPOSED):
            return cast(Tensor, cast(Any, self.geometry)._conv_forward(x, weight, None))
        layer, n = cast(Any, self.geometry), weight.dim() - 2
        padding = layer._output_padding(
            x, args[0] if args else None, layer.stride, layer.padding, layer.kernel_size, n, layer.dilation
        )
        convolve = getattr(F, f"conv_transpose{n}d")
        result: Tensor = convolve(
            x, weight, None, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )
        return result


def refusal(layer: nn.Module) -> str | None:
    """Why a layer cannot compute with integers, or None.

    Args:
        layer: any module with a weight.

    Returns:
        The reason.

    Examples:
        >>> refusal(nn.Linear(2, 1))
        'its weight is not on an integer grid'
    """
    if not isinstance(layer, _LAYERS):
        return f"{type(layer).__name__} is neither linear nor a convolution"
    base = next(c for c in _LAYERS if isinstance(layer, c))
    kind = plain_class(layer)
    if any(getattr(kind, name, None) is not getattr(base, name, None) for name in _FORWARDS):
        return f"{kind.__name__} has a forward of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks, which may change what it computes"
    code = _arithmetic(layer)
    if not isinstance(code, Affine):
        return "its weight is not on an integer grid" + (
            "" if code is None else f" but stored as {code.kind}"
        )
    if not code.matches(parameter(layer, "weight")):
        return "its weight has left its grid since it was quantized: quantize it again"
    if not code.size and not {*code.axes} <= {_out(layer)}:
        return f"its scales differ along axes {code.axes} of the weight, not only along its outputs"
    quantizer = input_quantizer(layer)
    if not isinstance(quantizer, InputQuantizer):
        return "its inputs are not quantized (weights only)"
    products = (
        (quantizer.qmax - quantizer.qmin) * (code.qmax - code.qmin) * parameter(layer, "weight").numel()
    )
    return None if products < _EXACT else f"its sums could exceed 2^{int(math.log2(_EXACT))}"


def _arithmetic(layer: nn.Module) -> Code | None:
    """The code that products with the weight of a layer are computed by."""
    code = codes.read(layer, "weight")
    return None if code is None else code.arithmetic


def _out(layer: nn.Module) -> int:
    """Output axis of the weight."""
    return 1 if isinstance(layer, _TRANSPOSED) else 0


def to_integer(model: nn.Module, example_input: Any = None) -> nn.Module:
    """A copy that computes its quantized linear and convolution layers with integers: ``y = s_x s_w a + b``.

    Weights are stored as integers (int8 up to eight bits). Sums are exact, so the copy tells what an integer runtime
    makes of the model up to the rounding of ``s_x s_w a + b``. It is a reference, not fast: speed comes with
    ``export_onnx``. Everything else, and layers of which only the weights are quantized, computes as before; a warning
    lists those that are quantized, with the reasons.

    Args:
        model: a quantized model, or one with quantizers in training; it stays as it is.
        example_input: one input (tensor, tuple of arguments or dict of keywords); if given, the outputs of the copy
            are compared with the model's.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: no layer can compute with integers (the message says why, layer by layer), or the outputs on
            ``example_input`` differ by more than 1 % (L2).

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = compress(net, [Quantize(8, activation_bits=8)], data=torch.randn(64, 8)).model
        >>> integer = to_integer(small, torch.randn(4, 8))
        >>> [type(layer).__name__ for layer in integer], integer[0].codes.dtype
        (['IntegerLayer', 'ReLU', 'IntegerLayer'], torch.int8)

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """
    plain = finalize(model)
    result = copy.deepcopy(plain) if example_input is not None else plain
    skipped: dict[str, str] = {}
    made: dict[nn.Module | None, nn.Module] = {}
    for name, module in result.named_modules():
        if "weight" not in module._parameters and codes.read(module, "weight") is None:
            continue
        why = refusal(module)
        if why is None:
            made[module] = IntegerLayer(module)
        elif codes.read(module, "weight") is not None or input_quantizer(module) is not None:
            skipped[clean(name)] = why
    if not made:
        listed = reasons(skipped) or " no weight is quantized."
        raise ValueError(f"{type(model).__name__} has no layer that can compute with integers:{listed}")
    for parent in list(result.modules()):
        for child, module in parent._modules.items():
            if module in made:
                parent._modules[child] = made[module]
    result = made.get(result, result)
    if skipped:
        warnings.warn(f"these layers do not compute with integers:{reasons(skipped)}", stacklevel=2)
    if example_input is not None:
        _compare(plain, result, example_input)
    return result.eval()


def _compare(plain: nn.Module, integer: nn.Module, x: Any) -> None:
    with evaluating(plain), evaluating(integer):
        expected, found = (first_tensor(call(m, x)) for m in (plain, integer))
    if expected is None or found is None:
        raise ValueError("the model's output on example_input holds no tensor to compare.")
    gap = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not gap <= _TOLERANCE:
        raise ValueError(
            f"the integer model's output on example_input differs by {gap:.2%} (allowed is {_TOLERANCE:.0%})."
        )
