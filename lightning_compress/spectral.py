"""What methods must know of the spectral convolutions of neuraloperator: where modes lie, and how weights are held."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_compress.names import clean, matches
from lightning_compress.targets import Patterns, plain_class, survey

_LAYER = "neuralop.layers.spectral_convolution.SpectralConv"


def is_spectral(layer: nn.Module) -> bool:
    """Whether a layer is a spectral convolution of neuraloperator, or of a subclass that keeps its forward.

    Args:
        layer: any module.

    Returns:
        True also for a class that stands in for it (``plain_class``).

    Examples:
        >>> is_spectral(nn.Linear(1, 1))
        False
    """
    kind: Any = plain_class(layer)
    base: Any = next((k for k in kind.__mro__ if f"{k.__module__}.{k.__qualname__}" == _LAYER), None)
    return base is not None and kind.forward is base.forward


def spectral_layers(model: nn.Module, include: Patterns = "*", exclude: Patterns = ()) -> dict[str, Any]:
    """The spectral convolutions of a model by name, each once.

    Args:
        model: any module.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Returns:
        Clean layer name -> layer, in the order of ``model.named_modules()``.

    Raises:
        ValueError: a pattern fits no layer.
    """
    survey(model, include, exclude)  # raises for a pattern that fits nothing
    wanted, unwanted = ([p] if isinstance(p, str) else list(p) for p in (include, exclude))
    found = {}
    for raw, layer in model.named_modules():
        name = clean(raw)
        names = (name, f"{name}.weight", f"{name}.weight.tensor")
        asked = any(matches(p, *names) for p in wanted) and not any(matches(p, *names) for p in unwanted)
        if asked and is_spectral(layer):
            found[name] = layer
    return found


def stored_modes(layer: Any) -> tuple[int, ...]:
    """Sizes K_1 ... K_d of the mode axes of a layer's weight.

    Args:
        layer: a spectral convolution.

    Returns:
        Sizes as stored: of real data, the last axis holds the non-negative frequencies only.
    """
    return tuple(layer.weight.shape)[1 if layer.separable else 2 :]


def dense_weight(layer: Any) -> Tensor:
    """The weight of a spectral convolution as one complex tensor, whatever its form.

    Args:
        layer: a spectral convolution.

    Returns:
        [in, out, *modes], or [channels, *modes] if separable; the Parameter itself where it is dense.
    """
    weight = layer.weight
    if isinstance(weight, Tensor):
        return weight
    tensor: Tensor = weight.tensor if hasattr(weight, "tensor") else weight.to_tensor()
    return tensor


def set_weight(layer: Any, weight: Any, contract: Any = None) -> None:
    """Give a spectral convolution another weight, which its own forward then slices and contracts.

    Args:
        layer: a spectral convolution, changed in place.
        weight: a complex tensor, which becomes a dense weight under the key ``weight.tensor`` as neuraloperator makes
            it; or a module with ``shape`` and ``__getitem__`` that holds the Parameters.
        contract: ``f(x, weight, separable=...)``; None takes neuraloperator's own for this kind of weight.
    """
    from neuralop.layers.spectral_convolution import FactorizedTensor, get_contract_fun

    if isinstance(weight, Tensor):
        given = weight.detach()
        weight = FactorizedTensor.new(tuple(given.shape), factorization="Dense", dtype=given.dtype)
        weight.tensor = nn.Parameter(given.clone())
        layer.factorization = "Dense"
    weight.train(layer.training)
    layer._parameters.pop("weight", None)
    layer._modules["weight"] = weight
    layer._contract = contract or get_contract_fun(weight, "factorized", layer.separable)


def is_factorized(layer: Any) -> bool:
    """Whether the weight of a spectral convolution is held as factors (Tucker, CP, TT, or those of ``Factorize``).

    Args:
        layer: a spectral convolution.

    Returns:
        False for one dense tensor.
    """
    return not isinstance(layer.weight, Tensor) and not hasattr(layer.weight, "tensor")
