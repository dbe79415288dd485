"""Layers that quantize what they use: the same object with another class, so Parameters, keys and order stay.

A layer with quantizers is an instance of a subclass of its own class, made when first needed. Its weight reads give the
rounded values, while the Parameter, and so training, checkpoints and averaging, keep the float ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.finalize import StandIn
from lightning_compress.plans import Plan
from lightning_compress.quantization.folded import Fold, fold_of, join, part
from lightning_compress.quantization.quantizers import Quantizer
from lightning_compress.targets import plain_class
from lightning_compress.transform import Coverage, Step, record

_INPUT, _OUTPUT = "input_quantizer", "output_quantizer"
_CLASSES: dict[tuple[type, tuple[str, ...], bool], type] = {}


def quantize_weight(holder: nn.Module, param: str, quantizer: Quantizer) -> None:
    """Let reads of a weight give its rounded values; the Parameter stays.

    Args:
        holder: the module that holds the Parameter itself.
        param: its name there.
        quantizer: what rounds; it must also give the code of a weight (``code(weight)``).

    Examples:
        >>> from lightning_compress.quantization.learned import LearnedWeight
        >>> layer = nn.Linear(3, 2)
        >>> quantize_weight(layer, "weight", LearnedWeight(2, layer.weight))
        >>> len(layer.weight.unique()) <= 3, isinstance(layer, nn.Linear), [n for n in layer.state_dict()]
        (True, True, ['weight', 'bias'])
    """
    quantizer.train(holder.training)
    holder.add_module(_slot(param), quantizer)
    _become(holder, (*_params(holder), param), _calls(holder))


def quantize_input(layer: nn.Module, quantizer: Quantizer, output: bool = False) -> None:
    """Round what a layer is given, or what it returns, at every call.

    Args:
        layer: any layer whose first argument is a tensor.
        quantizer: what rounds.
        output: round the output instead.

    Examples:
        >>> from lightning_compress.quantization.quantizers import InputQuantizer
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> quantize_input(layer, InputQuantizer(8, scale=1.0))
        >>> bool(layer(torch.tensor([[1.4]])) == layer.weight), list(layer.state_dict())
        (True, ['weight'])
    """
    quantizer.train(layer.training)
    layer.add_module(_OUTPUT if output else _INPUT, quantizer)
    _become(layer, _params(layer), True)


def input_quantizer(layer: nn.Module) -> Quantizer | None:
    """The quantizer of a layer's input, or None."""
    return cast("Quantizer | None", layer._modules.get(_INPUT) if _calls(layer) else None)


def output_quantizer(layer: nn.Module) -> Quantizer | None:
    """The quantizer of a layer's output, or None."""
    return cast("Quantizer | None", layer._modules.get(_OUTPUT) if _calls(layer) else None)


def weight_quantizer(holder: nn.Module, param: str) -> Quantizer | None:
    """The quantizer of a weight, or None."""
    return cast("Quantizer | None", holder._modules[_slot(param)] if param in _params(holder) else None)


def fold_norm(layer: nn.Module, norm: nn.Module) -> None:
    """Fold a BatchNorm into a layer with a weight quantizer, for the time of training.

    Args:
        layer: the layer before the BatchNorm, without ``fold_refusal``.
        norm: the BatchNorm.
    """
    quantizer, present = weight_quantizer(layer, "weight"), fold_of(layer)
    if present is None or present.quantizer is not quantizer or present.norm is not norm:
        join(layer, cast(Any, norm), quantizer)
        _become(layer, _params(layer), True)


def rounded_from(holder: nn.Module, param: str) -> Tensor:
    """What the quantizer of a weight is given: the weight, with the factors of a BatchNorm that is folded in.

    Args:
        holder: the module that holds the Parameter itself.
        param: its name there.
    """
    weight, fold = cast(Tensor, holder._parameters[param]), _folded(holder, param)
    return weight if fold is None else fold.scaled(weight)


def _folded(holder: nn.Module, param: str = "weight") -> Fold | None:
    """The fold of a layer while it is active."""
    fold = fold_of(holder) if param == "weight" else None
    return fold if fold is not None and fold.active else None


def release(layer: nn.Module) -> None:
    """Take all quantizers off; the float weights are there again. Nothing happens to a layer without any.

    Args:
        layer: any module.
    """
    part(layer)
    for name in (*map(_slot, _params(layer)), _INPUT, _OUTPUT):
        if plain_class(layer) is not type(layer):
            layer._modules.pop(name, None)
    _become(layer, (), False)


# -- classes -------------------------------------------------------------------------------------------------


def _slot(param: str) -> str:
    return f"{param}_quantizer"


def _params(layer: nn.Module) -> tuple[str, ...]:
    return cast("tuple[str, ...]", getattr(type(layer), "_quantized_params", ()))


def _calls(layer: nn.Module) -> bool:
    return bool(getattr(type(layer), "_quantized_calls", False))


def _become(layer: nn.Module, params: tuple[str, ...], calls: bool) -> None:
    base = getattr(type(layer), "_quantized_class", type(layer))
    names = tuple(dict.fromkeys(params))
    layer.__class__ = _class(base, names, calls) if names or calls else base


def _class(base: type[nn.Module], params: tuple[str, ...], calls: bool) -> type[nn.Module]:
    """The subclass whose reads of these parameters, and whose calls, are quantized."""
    key = (base, params, calls)
    if key not in _CLASSES:
        body: dict[str, Any] = {
            "__doc__": f"{base.__name__} with quantizers.",
            "__module__": __name__,
            "__reduce_ex__": _reduce,
            "_plain_class": getattr(base, "_plain_class", base),
            "_quantized_class": base,
            "_quantized_params": params,
            "_quantized_calls": calls,
            **{param: property(_reader(param)) for param in params},
        }
        if calls:
            body["forward"] = _forward(base)
        body["plain"] = _plain
        # tltorch's factorized tensors register every subclass by its name
        name = getattr(base, "_name", "") if hasattr(base, "_factorizations") else ""
        make: Any = type(base)
        made = make(
            f"Quantized{base.__name__}", (base,), body, **({"name": f"quantized {name}"} if name else {})
        )
        if name:
            made._name = name
        StandIn.register(made)
        _CLASSES[key] = made
    return cast("type[nn.Module]", _CLASSES[key])


def _reader(param: str) -> Callable[[nn.Module], Tensor]:
    def read(layer: nn.Module) -> Tensor:
        if layer._parameters.get(param) is None:
            raise AttributeError(
                param
            )  # the usual lookup goes on: a slice of the tensor holds a buffer there
        rounded: Tensor = layer._modules[_slot(param)](rounded_from(layer, param))  # type: ignore[misc]
        return rounded

    return read


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    count = 3 if issubclass(base, nn.MultiheadAttention) else 2 if issubclass(base, nn.Bilinear) else 1
    names = ("query", "key", "value")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        quantizer, after = self._modules.get(_INPUT), self._modules.get(_OUTPUT)
        if quantizer is not None:
            met: list[tuple[Tensor, Tensor]] = []

            def rounded(value: Any) -> Any:
                if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                    return value
                if count == 1:
                    return quantizer(value)
                for given, result in met:
                    if given is value:  # self-attention tells by identity that its arguments are one
                        return result
                met.append((value, quantizer(value)))
                return met[-1][1]

            args = tuple(rounded(a) if i < count else a for i, a in enumerate(args))
            if not args or count == 3:
                taken = [k for k in kwargs if k in names] if count == 3 else list(kwargs)[:count]
                kwargs = {k: rounded(v) if k in taken else v for k, v in kwargs.items()}
        fold = _folded(self)
        if fold is None:
            out = base.forward(self, *args, **kwargs)
        else:
            x = args[0] if args else kwargs["input"]
            out = fold(self, x, cast(Tensor, self.weight), cast(Tensor, self._parameters["weight"]))
        return after(out) if after is not None else out

    return forward


def _plain(self: nn.Module) -> nn.Module:
    """Weights on their grid, with their codes; the input quantizer is frozen and stays in front."""
    around = [cast(Any, q) for q in (input_quantizer(self), output_quantizer(self)) if q is not None]
    if not _params(self) and all(q.frozen() is q for q in around):
        return self  # quantized after training: nothing here is about to change
    for param in _params(self):
        quantizer = cast(Any, weight_quantizer(self, param))
        weight = self._parameters[param]
        assert weight is not None
        if not quantizer.active:
            continue
        # Tied weights share their quantizer. The code is that of the float weight, which the first layer overwrites.
        given = rounded_from(self, param).detach()
        code = quantizer.final = vars(quantizer).get("final") or quantizer.code(given)
        weight.data.copy_(code.project(given))
        codes.attach(self, param, code)
    fold = _folded(self)
    if fold is not None:
        fold.settle(self)
    found = {name: cast(Any, self._modules.get(name)) for name in (_INPUT, _OUTPUT) if _calls(self)}
    kept = {name: q.frozen() for name, q in found.items() if q is not None and q.active}
    release(self)
    for name, quantizer in kept.items():
        quantize_input(self, quantizer, output=name == _OUTPUT)
    if kept:  # what a fresh model needs to become like this one
        inputs = {"layer": "", **{name: quantizer.config() for name, quantizer in kept.items()}}
        record(self, Step("Quantize", {}, Plan({"input": inputs}), Coverage({}, {}, 0, 0.0)))
    return self


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    cls: Any = type(self)
    made_by = cls._quantized_class, cls._quantized_params, cls._quantized_calls
    return _rebuild, made_by, self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(base: type[nn.Module], params: tuple[str, ...], calls: bool) -> nn.Module:
    cls = _class(base, params, calls)
    return cls.__new__(cls)
