"""Stand-ins for a model's weights and quantizers that the exporter writes as integers and what turns these to floats.

Called, each gives what the quantizer gave. Traced for ONNX, it leaves its own nodes in the graph, so whatever a model
does with a weight or an activation, the file does with its integers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.functional.affine import fake_quantize
from lightning_compress.quantization.quantizers import InputQuantizer

TABLE = "lightning_compress::Table"  # no operator of ONNX: graph.py makes Cast and Gather of it
_BYTES = (torch.int8, torch.uint8)


class StoredIntegers(nn.Module):
    """A weight or bias that the file holds as integers: ``w = s (q - z)``.

    Args:
        value: the weight, on its grid.
        codes: int8, uint8 or int32, shape of the weight; or rows ``[G, n]`` with a scale each.
        scale: float32, one for each index of ``axis``, or without axes.
        zero_point: dtype of ``codes``, shape of ``scale``; None for int32, of which ONNX has none.
        axis: axis of ``codes`` along which scales differ; None for one scale.
        moved: for rows: the weight's shape with the axes of the groups first, and the permutation back.
    """

    value: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        value: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        axis: int | None,
        moved: tuple[list[int], list[int]] | None = None,
    ) -> None:
        super().__init__()
        tensors = {"value": value, "codes": codes, "scale": scale, "zero_point": zero_point}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone().contiguous())
        self.axis, self.moved, self.used = axis, moved, False

    def forward(self, _: Tensor) -> Tensor:
        """The weight; what is given, the float one, is not looked at."""
        self.used = True
        zero_point = () if self.zero_point is None else (self.zero_point,)
        options = {} if self.axis is None else {"axis_i": self.axis}
        result: Tensor = _Dequantize.apply(
            options, self.moved, self.value, self.codes, self.scale, *zero_point
        )
        return result


class StoredValues(nn.Module):
    """A weight that the file holds as a table of its values and who has which: ``w_i = c[k_i]``.

    Args:
        table: c, float32 [K], K <= 256.
        codes: k, uint8, shape of the weight.

    Examples:
        >>> from lightning_compress.export.nodes import StoredValues
        >>> node = StoredValues(torch.tensor([-1.0, 0.5]), torch.tensor([[0, 1, 1]], dtype=torch.uint8))
        >>> node(torch.empty(0))
        tensor([[-1.0000,  0.5000,  0.5000]])
    """

    table: Tensor
    codes: Tensor

    def __init__(self, table: Tensor, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table.detach().clone())
        self.register_buffer("codes", codes.detach().clone().contiguous())
        self.used = False

    def forward(self, _: Tensor) -> Tensor:
        """The weight; what is given, the float one, is not looked at."""
        self.used = True
        result: Tensor = _Take.apply(self.table, self.codes)
        return result


class RoundedValues(nn.Module):
    """An activation on the grid of a quantizer.

    Static grids of at most eight bits are QuantizeLinear, DequantizeLinear; those of fewer bits with a Clip of the
    integers between. Dynamic ones of unsigned eight bits are DynamicQuantizeLinear. Wider grids, for which ONNX has no
    integers, are rounded in float32.

    Args:
        quantizer: of the layer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: InputQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.integers = integer_type(quantizer)
        dtype = self.integers or torch.float32
        self.register_buffer("scale", quantizer.scale.detach().clone().float())
        self.register_buffer("zero_point", quantizer.zero_point.detach().clone().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of x."""
        result: Tensor = _QuantizeDequantize.apply(x, self.scale, self.zero_point, self.quantizer)
        return result


def integer_type(quantizer: InputQuantizer) -> torch.dtype | None:
    """int8 or uint8, whichever holds the integers of an activation; None if neither does.

    Args:
        quantizer: of a layer's input or output.

    Returns:
        The dtype.

    Examples:
        >>> from lightning_compress.quantization.quantizers import InputQuantizer
        >>> integer_type(InputQuantizer(8, scale=1.0)), integer_type(InputQuantizer(9, scale=1.0))
        (torch.uint8, None)
    """
    lo, hi = quantizer.qmin, quantizer.qmax
    return next((t for t in _BYTES if torch.iinfo(t).min <= lo and hi <= torch.iinfo(t).max), None)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Any, moved: Any, value: Tensor, *_: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def symbolic(g: Any, options: dict[str, int], moved: Any, value: Any, *stored: Any) -> Any:
        node = g.op("DequantizeLinear", *stored, **options)
        if moved is not None:
            shape, back = moved
            node = g.op("Reshape", node, g.op("Constant", value_t=torch.tensor(shape)))
            node = g.op("Transpose", node, perm_i=back)
        node.setType(value.type())
        return node


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor) -> Tensor:
        return table[codes.to(torch.int64)]

    @staticmethod
    def symbolic(g: Any, table: Any, codes: Any) -> Any:
        # The exporter would cast stored indices to four bytes each by itself.
        node = g.op(TABLE, table, codes)
        node.setType(table.type().with_sizes(codes.type().sizes()))
        return node


class _QuantizeDequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quantizer: InputQuantizer) -> Tensor:
        x = (
            x.clone()
        )  # of itself the tracer would take what comes out of x.to(its own dtype) for x from here on
        scale, zero_point = quantizer.qparams(x)
        return fake_quantize(x, scale, zero_point, quantizer.qmin, quantizer.qmax)

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any, quantizer: InputQuantizer) -> Any:
        lo, hi = quantizer.qmin, quantizer.qmax
        dtype = integer_type(quantizer)

        def ends(dtype: torch.dtype) -> list[Any]:
            return [g.op("Constant", value_t=torch.tensor(end, dtype=dtype)) for end in (lo, hi)]

        if quantizer.dynamic:
            integers, scale, zero_point = g.op("DynamicQuantizeLinear", x, outputs=3)
        elif dtype is not None:
            integers = g.op("QuantizeLinear", x, scale, zero_point)
            if (lo, hi) != (torch.iinfo(dtype).min, torch.iinfo(dtype).max):
                integers = g.op("Clip", integers, *ends(dtype))
        else:
            rounded = g.op("Add", g.op("Round", g.op("Div", x, scale)), zero_point)
            centred = g.op("Sub", g.op("Clip", rounded, *ends(torch.float32)), zero_point)
            result = g.op("Mul", centred, scale)
            result.setType(x.type())
            return result
        result = g.op("DequantizeLinear", integers, scale, zero_point)
        result.setType(cast(Any, x).type())
        return result
