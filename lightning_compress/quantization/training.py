"""Quantizers in training: which layer gets which, their state by name, and how well they serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.names import clean
from lightning_compress.quantization import activations, assignment
from lightning_compress.quantization.layers import (
    input_quantizer,
    output_quantizer,
    quantize_input,
    quantize_weight,
    rounded_from,
    weight_quantizer,
)
from lightning_compress.quantization.learned import ClippedInput, LearnedInput, LearnedWeight, WeightQuantizer
from lightning_compress.quantization.observed import CalibratedWeight, ObservedInput
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.quantization.quantizers import TrainingQuantizer
from lightning_compress.tables import listing, reasons
from lightning_compress.targets import Target, survey

METHODS = ("fake_quant", "lsq", "pact")


# Of weights, unless told otherwise. Learned steps are calibrated once. Otherwise it runs at every pass, where "mse",
# which tries 81 ranges, would take longer than the network.
_CALIBRATORS = {"lsq": "mse", "fake_quant": "minmax", "pact": "minmax"}
_ACTIVATION_CALIBRATOR = "mse"  # of the first learned steps; the other methods have rules of their own
# Options of Quantize that describe what happens after training, and their value here.
_AFTERWARDS: dict[str, Any] = {
    "mode": "static",
    "rounding": "nearest",
    "bias_correction": False,
    "equalize": False,
    "budget": None,
}


def options(
    transform: Quantize | None, bits: Mapping[str, Any], method: str, others: Mapping[str, Any]
) -> Quantize:
    """The transform that describes the grids of a training.

    Args:
        transform: given as such, with its bits.
        bits: or by ``bits``, ``activation_bits`` and ``edge_bits``, 8 when not given.
        method: one of ``METHODS``.
        others: and by further options of ``Quantize``.

    Returns:
        The transform.

    Raises:
        ValueError: options that training cannot follow, or given twice.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed: {', '.join(METHODS)}.")
    taken = {"bits": "weight_bits", "activation_bits": "activation_bits", "edge_bits": "edge_layers_bits"}
    for option in taken.keys() & others.keys():
        raise ValueError(f"give {option} as {taken[option]}=.")
    if transform is None:
        chosen = {"calibrator": _CALIBRATORS[method], "activation_calibrator": _ACTIVATION_CALIBRATOR}
        transform = Quantize(**{**chosen, **bits, **others})
    elif (
        set(bits.values()) != {8} or Quantize(**others) != Quantize()
    ):  # a configuration file gives every default
        raise ValueError(
            "give either transform=, with its bits, activation_bits and edge_bits, or weight_bits, activation_bits, "
            f"edge_layers_bits and options, not both: {', '.join(others) or dict(bits)}."
        )
    for option, value in _AFTERWARDS.items():
        if (given := getattr(transform, option)) != value:
            raise ValueError(
                f"{option}={given!r} is for quantization after training; allowed here is {value!r}."
            )
    if method == "lsq" and (transform.format != "int" or not transform.symmetric):
        raise ValueError(
            "method='lsq' learns the step of a symmetric integer grid: format='int', symmetric=True."
        )
    return transform


@dataclass(frozen=True)
class Installed:
    """What a model has after ``install``.

    Args:
        targets: the weights that are quantized, in the order in which their layers run.
        weights: target key -> bits of the weight.
        inputs: layer name -> bits of its input.
        edges: names of the layers with ``edge_bits``.
        quantizers: their quantizers by clean module name, shared ones once.
        skipped: parameter or input -> why it is left alone.
        new: whether any quantizer was put in now.
        note: what went wrong on the way, "" if nothing did.
    """

    targets: list[Target]
    weights: dict[str, int]
    inputs: dict[str, int]
    edges: frozenset[str]
    quantizers: dict[str, TrainingQuantizer]
    skipped: dict[str, str]
    new: bool
    note: str


def install(
    model: nn.Module, transform: Quantize, method: str, momentum: float, example: Any = None
) -> Installed:
    """Put quantizers into the layers; those that are there already stay as they are.

    Parameters, state-dict keys and their order stay; the layers' classes change to subclasses of their own.

    Args:
        model: any module, changed in place.
        transform: which layers, and what grid.
        method: "fake_quant" (calibrated weights, observed inputs), "lsq" (learned steps) or "pact" (calibrated
            weights, learned clips of inputs).
        momentum: of the observers.
        example: one input, to find the layers that run first and last; None: they are those of the first and last
            parameter.

    Returns:
        What there is to quantize.

    Raises:
        ValueError: nothing to quantize, or a mapping of bits that fits nothing.

    Examples:
        >>> from lightning_compress.quantization.quantize import Quantize
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> done = install(net, Quantize(bits=4, activation_bits=4), "lsq", momentum=0.01)
        >>> done.weights, list(net.state_dict())
        ({'0.weight': 4, '2.weight': 4}, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    found = survey(model, transform.include, transform.exclude)
    present = quantizers(model)
    skipped = {key: why for key, why in found.skipped.items() if key.rpartition(".")[0] not in present}
    skipped |= {t.key: why for t in found.targets if (why := _refusal(t)) is not None}
    targets = [t for t in found.targets if t.key not in skipped]
    if not targets:
        raise ValueError(
            f"nothing to quantize with include={transform.include!r}:{reasons(skipped) or ' no weights.'}"
        )
    note = ""
    try:
        targets = assignment.execution_order(model, targets, example)
    except Exception as error:  # the example is the user's, and what can go wrong with it too
        note = (
            f"the example input does not run ({error!r}), so first and last are the first and last parameter"
        )
    kinds = assignment.kinds_of(model, targets, targets[-1])
    edges = {targets[0].key, targets[-1].key} if transform.edge_bits is not None else set()
    weights = _widths(transform.bits, targets, kinds, "bits")
    inputs = (
        {}
        if transform.activation_bits is None
        else _widths(transform.activation_bits, targets, kinds, "activation_bits")
    )
    for key in edges:
        weights[key] = cast(int, transform.edge_bits)
        inputs |= {} if transform.activation_bits is None else {key: cast(int, transform.edge_bits)}
    skipped |= {t.key: f"no entry of bits={transform.bits} fits" for t in targets if t.key not in weights}
    targets = [t for t in targets if t.key in weights]
    new, layers = False, dict[str, int]()
    for t in targets:
        new |= _install_weight(model, t, method, transform, weights[t.key])
        why = activations.refusal(t)
        if t.key in inputs and why is not None:
            skipped[f"{t.name}.input" if t.name else "input"] = why
        elif t.key in inputs and t.name not in layers:
            layers[t.name] = inputs[t.key]
            given = transform.outputs, transform.activation_calibrator
            new |= _install_input(t.module, method, momentum, inputs[t.key], *given)
    names = frozenset(t.name for t in targets if t.key in edges)
    held = {id(q) for t in targets for q in (quantizer_of(t), *input_quantizers(t))}
    own = {name: q for name, q in quantizers(model).items() if id(q) in held}
    return Installed(targets, weights, layers, names, own, skipped, new, note)


def _refusal(target: Target) -> str | None:
    """Why a weight cannot be rounded on the way."""
    if isinstance(target.module, nn.RNNBase):
        return "the layer reads its weights as one block that training updates: quantize it after the fit"
    if getattr(target.module, "sparse", False):
        return "its gradient is sparse: set sparse=False"
    return None


def _widths(bits: Any, targets: list[Target], kinds: Mapping[str, set[str]], option: str) -> dict[str, int]:
    if isinstance(bits, Mapping):
        return assignment.assign(bits, targets, kinds, option)
    return {t.key: int(bits) for t in targets}


def _place(target: Target) -> tuple[nn.Module, str]:
    """The module that holds the Parameter itself, and its name there."""
    path, _, last = target.param.rpartition(".")
    return target.module.get_submodule(path), last


def quantizer_of(target: Target) -> WeightQuantizer:
    """The quantizer of a target that ``install`` returned.

    Args:
        target: a weight.

    Returns:
        The quantizer.
    """
    return cast(WeightQuantizer, weight_quantizer(*_place(target)))


def given(target: Target) -> Tensor:
    """What the quantizer of a target rounds: the weight, with the factors of a BatchNorm that is folded in.

    Args:
        target: a weight that ``install`` returned.
    """
    return rounded_from(*_place(target)).detach()


def input_quantizers(target: Target) -> list[TrainingQuantizer]:
    """The quantizers of what the layer of a target is given, and of what it returns.

    Args:
        target: a weight that ``install`` returned.

    Returns:
        None, one or two.
    """
    found = (input_quantizer(target.module), output_quantizer(target.module))
    return [q for q in found if isinstance(q, TrainingQuantizer)]


def _install_weight(model: nn.Module, target: Target, method: str, transform: Quantize, bits: int) -> bool:
    weight, out = target.weight, target.axes.out
    wanted = LearnedWeight if method == "lsq" else CalibratedWeight
    present = weight_quantizer(*_place(target))
    if type(present) is wanted:
        return False
    quantizer: WeightQuantizer
    if method == "lsq":
        shape = transform.granularity, out, transform.narrow, transform.calibrator
        quantizer = LearnedWeight(bits, weight.detach(), *shape, codes.read(target.module, target.param))
        quantizer.forget()  # a checkpoint may still bring other weights
    else:
        quantizer = CalibratedWeight(transform.grid(bits), weight.detach(), out)
    quantizer.to(weight.device)
    places = [_place(target)]
    modules = {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for alias in target.aliases:
        name, _, param = alias.rpartition(".")
        if modules[name] is not places[0][0]:
            places.append((modules[name], param))
    for holder, param in places:  # tied weights share their quantizer
        quantize_weight(holder, param, quantizer)
    return True


def _install_input(
    layer: nn.Module, method: str, momentum: float, bits: int, outputs: bool, calibrator: str
) -> bool:
    make: dict[str, Callable[[], TrainingQuantizer]] = {
        "fake_quant": lambda: ObservedInput(bits, momentum),
        "lsq": lambda: LearnedInput(bits, calibrator),
        "pact": lambda: ClippedInput(bits),
    }
    device = next(layer.parameters()).device
    new = False
    for output, present in (
        (False, input_quantizer(layer)),
        *([(True, output_quantizer(layer))] if outputs else []),
    ):
        quantizer = make[method]().to(device)
        if type(present) is not type(quantizer):
            quantize_input(layer, quantizer, output)
            new = True
    return new


# -- state -----------------------------------------------------------------------------------------------------


def quantizers(model: nn.Module) -> dict[str, TrainingQuantizer]:
    """The quantizers of a model that training sets.

    Args:
        model: any module, also compiled.

    Returns:
        Clean module name -> quantizer, shared ones once.
    """
    return {clean(n): m for n, m in model.named_modules() if isinstance(m, TrainingQuantizer)}


def restore(own: Mapping[str, TrainingQuantizer], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Bring quantizers to stored states.

    Args:
        own: quantizer name -> quantizer.
        states: quantizer name -> what its ``state()`` gave.

    Raises:
        ValueError: other quantizers, with the names.
    """
    if own.keys() != states.keys():
        differ = sorted(own.keys() ^ states.keys())
        raise ValueError(
            f"the stored quantizers are not those of this model; only one of the two has: {listing(differ)}. Use the "
            "model, the method, and the include and exclude patterns of the checkpoint."
        )
    for name, quantizer in own.items():
        try:
            quantizer.restore(states[name])
        except ValueError as error:
            raise ValueError(f"the stored quantizer {name} does not fit: {error}") from None
