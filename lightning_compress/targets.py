"""Which weights a method works on.

A layer type is known by its parameter names and two axes; everything else follows from the tensor. Users
add their own with one ``register`` call. Weights are found by *parameter*, so a weight that a module
keeps inside another module (the spectral weights of neural operators) is found like any other, and a weight
shared by several layers is found once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_compress.names import clean, matches

Patterns = str | Sequence[str]


class Axes(NamedTuple):
    """All that a method must know of a layer type: where its channels are.

    Attributes:
        out: axis of the output channels of the weight.
        in_: axis of the input channels; None for depth-wise weights, which have none.

    Examples:
        >>> Axes(0, 1).out
        0
    """

    out: int
    in_: int | None


@dataclass(frozen=True)
class Target:
    """One weight that methods work on.

    Args:
        name: layer name, as in ``model.named_modules()`` without the prefix of
            ``torch.compile``.
        module: the layer.
        param: name of the parameter inside the layer, with dots where it lies deeper (``weight.tensor``).
        axes: output and input axis of the weight.
        aliases: full names of other parameters that are this same object (tied weights).
    """

    name: str
    module: nn.Module
    param: str
    axes: Axes
    aliases: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Full parameter name, as in the plain model's ``state_dict``."""
        return f"{self.name}.{self.param}" if self.name else self.param

    @property
    def weight(self) -> nn.Parameter:
        """The user's own Parameter object, never a copy."""
        return parameter(self.module, self.param)


@dataclass(frozen=True)
class _Kind:
    """How the weights of one layer type are found."""

    axes: Axes | Callable[[nn.Module], Axes]
    param: str
    default: bool


def parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The user's own Parameter object, also of a layer that shows another value in its place while training.

    Args:
        module: the layer.
        name: parameter name inside the layer, with dots where it lies deeper.

    Returns:
        The Parameter.

    Raises:
        AttributeError: there is none of that name.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> parameter(layer, "weight") is layer.weight
        True
    """
    path, _, last = name.rpartition(".")
    holder = module.get_submodule(path)
    found = holder._parameters.get(last)
    if found is None:
        raise AttributeError(f"{type(holder).__name__} has no parameter {last!r}.")
    return found


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the user gave a layer, whatever stands in for it now.

    Args:
        layer: any module.

    Returns:
        Its own class, or the one that its present class names as ``_plain_class``.

    Examples:
        >>> plain_class(nn.Linear(1, 1)).__name__
        'Linear'
    """
    found: type[nn.Module] = getattr(type(layer), "_plain_class", type(layer))
    return found


def own_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the user's model, without those that a method has added for the time of training.

    Args:
        model: any module.
        remove_duplicate: give a shared parameter once.

    Yields:
        Name, as ``model.named_parameters`` gives it, and parameter.

    Examples:
        >>> [name for name, _ in own_parameters(nn.Linear(2, 1))]
        ['weight', 'bias']
    """
    added = {id(p) for m in model.modules() if getattr(m, "auxiliary", False) for p in m.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        if id(parameter) not in added:
            yield name, parameter


UNREGISTERED = "not a registered weight (give its full name in include, or lc.register its layer type)"
_REGISTRY: dict[type | str, list[_Kind]] = {}


def register(
    layer: type | str,
    axes: Axes | tuple[int, int | None] | Callable[[nn.Module], Axes],
    param: str = "weight",
    *,
    default: bool = True,
) -> None:
    """Make a layer type known to every method.

    Args:
        layer: the class, or its dotted name when the package may be absent (``"package.module.Layer"``).
            Subclasses inherit.
        axes: output and input axis of the weight, or a function of the layer that returns them.
        param: name of the parameter, or a glob pattern for several (``"weight_*"``); a module found there is
            searched for its parameters (factorized tensors).
        default: False if the weight is only touched when an include pattern names it, as for embeddings.

    Raises:
        TypeError: ``layer`` is neither a class nor a dotted name.

    Examples:
        >>> class MyLinear(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.kernel = nn.Parameter(torch.randn(3, 2))
        >>> register(MyLinear, Axes(out=1, in_=0), param="kernel")
        >>> [t.key for t in find(nn.Sequential(MyLinear()))]
        ['0.kernel']
    """
    if not isinstance(layer, type | str):
        raise TypeError(f"register() takes a layer class or its dotted name, not {layer!r}.")
    resolved = axes if callable(axes) else Axes(*axes)
    kinds = [k for k in _REGISTRY.get(layer, []) if k.param != param]
    _REGISTRY[layer] = [*kinds, _Kind(resolved, param, default)]


def _conv_axes(module: nn.Module) -> Axes:
    groups: Any = module.groups
    return Axes(0, None if groups > 1 and groups == module.in_channels else 1)


def _spectral_axes(module: nn.Module) -> Axes:
    return Axes(0, None) if getattr(module, "separable", False) else Axes(1, 0)


register(nn.Linear, Axes(0, 1))
for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_conv, _conv_axes)
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register(_transposed, Axes(1, 0))
for _projection in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
    register(nn.MultiheadAttention, Axes(0, 1), _projection)
register(nn.Bilinear, Axes(0, 1))
register(nn.Embedding, Axes(0, 1), default=False)
register(nn.EmbeddingBag, Axes(0, 1), default=False)
for _recurrent in (nn.RNNBase, nn.RNNCellBase):
    register(_recurrent, Axes(0, 1), "weight_*", default=False)
register("neuralop.layers.spectral_convolution.SpectralConv", _spectral_axes)


@dataclass(frozen=True)
class Survey:
    """Every parameter of a model: the targets, and why the others are not.

    Args:
        targets: in the order of ``model.named_parameters()``.
        skipped: full parameter name -> reason.
    """

    targets: list[Target]
    skipped: dict[str, str]


def _as_patterns(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _kinds(module: nn.Module) -> list[_Kind]:
    for cls in type(module).__mro__:
        for key in (cls, f"{cls.__module__}.{cls.__qualname__}"):
            if key in _REGISTRY:
                return _REGISTRY[key]
    return []


def _inner_axes(holder: nn.Module, param: str, axes: Axes) -> Axes:
    """Axes of one parameter of a factorized weight: those it names, the layer's own if dense, else rows and ranks."""
    own: Mapping[str, Axes] = getattr(holder, "axes", {})
    if param in own:
        return own[param]
    tensor = parameter(holder, param)
    if tuple(tensor.shape) == tuple(getattr(holder, "shape", ())):
        return axes
    return Axes(0, 1 if tensor.dim() > 1 else None)


def _registered(module: nn.Module) -> Iterator[tuple[str, Axes, bool]]:
    """(parameter name, axes, default) of the weights of one layer, by its registered type."""
    for kind in _kinds(module):
        axes = kind.axes if isinstance(kind.axes, Axes) else kind.axes(module)
        held = getattr(module, kind.param, None)
        if isinstance(held, nn.Module):
            for inner, _ in held.named_parameters():
                yield f"{kind.param}.{inner}", _inner_axes(held, inner, axes), kind.default
        for own, weight in module._parameters.items():
            if weight is not None and fnmatch.fnmatchcase(own, kind.param):
                yield own, axes, kind.default


def survey(model: nn.Module, include: Patterns = "*", exclude: Patterns = ()) -> Survey:
    """Every parameter of the model, sorted into targets and others with the reason.

    Patterns are matched against the layer name (``layer1.0.conv1``) and the full parameter name
    (``layer1.0.conv1.weight``). Weights registered with ``default=False`` (embeddings) need a pattern other
    than ``"*"``; parameters of layers that are not registered (biases, norm gains) need their full name. A
    pattern that fits nothing is an error.

    Args:
        model: any module.
        include: patterns to take.
        exclude: patterns to leave, applied last.

    Returns:
        The survey.

    Raises:
        ValueError: a pattern fits no layer (the message lists the nearest names), or a weight is not built
        yet.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> survey(net).skipped["1.weight"]
        'not a registered weight (give its full name in include, or lc.register its layer type)'
    """
    wanted, unwanted = _as_patterns(include), _as_patterns(exclude)
    used: set[str] = set()
    seen: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    found: dict[str, Target] = {}
    skipped: dict[str, str] = {}
    module_names = {clean(n) for n, _ in model.named_modules()}

    def fits(patterns: Sequence[str], *names: str) -> list[str]:
        hits = [p for p in patterns if matches(p, *names)]
        used.update(hits)
        return hits

    owned: dict[str, tuple[str, nn.Module, str, Axes, bool]] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        for param, axes, default in _registered(module):
            name = clean(raw)
            owned[f"{name}.{param}" if name else param] = (name, module, param, axes, default)

    for raw, parameter in own_parameters(model, remove_duplicate=False):
        key = clean(raw)
        name, _, param = key.rpartition(".")
        owner = owned.get(key)
        layer = owner[0] if owner else name
        hits = fits(wanted, layer, key)
        misses = fits(unwanted, layer, key)
        if id(parameter) in seen:
            aliases.setdefault(seen[id(parameter)], []).append(key)
            continue
        seen[id(parameter)] = key
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{key} has no shape yet (lazy layer): run one forward pass before compressing.")
        if misses:
            skipped[key] = f"excluded by {misses[0]!r}"
        elif ".parametrizations." in f".{key}":
            skipped[key] = "its weight is computed by a torch parametrization: remove that first"
        elif owner is None and key not in wanted:
            skipped[key] = UNREGISTERED
        elif not hits:
            skipped[key] = f"no include pattern of {list(wanted)} fits"
        elif owner and not owner[4] and hits == ["*"]:
            skipped[key] = f"{type(owner[1]).__name__} weights are touched only when a pattern names them"
        elif not (parameter.is_floating_point() or parameter.is_complex()):
            skipped[key] = f"dtype {parameter.dtype} is not real or complex floating point"
        elif parameter.numel() == 0:
            skipped[key] = "it has no elements"
        elif owner:
            found[key] = Target(owner[0], owner[1], owner[2], owner[3])
        else:
            module = model.get_submodule(raw.rpartition(".")[0])
            found[key] = Target(name, module, param, Axes(0, 1 if parameter.dim() > 1 else None))
    unused = [
        p
        for p in (*wanted, *unwanted)
        if p not in used | {"*"} and not any(matches(p, n) for n in module_names)
    ]
    if unused:
        names = sorted({t.name for t in found.values()} | module_names | set(skipped) | set(found))
        near = get_close_matches(unused[0], names, n=4, cutoff=0.3) or names[:4]
        raise ValueError(
            f"pattern {unused[0]!r} fits no layer of the model; nearest names: {', '.join(n for n in near if n)}."
        )
    return Survey(
        [Target(t.name, t.module, t.param, t.axes, tuple(aliases.get(k, ()))) for k, t in found.items()],
        skipped,
    )


def locate(model: nn.Module, layer: str, param: str) -> tuple[nn.Module, nn.Parameter]:
    """The layer and the Parameter that a plan names.

    Args:
        model: any module, also compiled or wrapped.
        layer: clean layer name.
        param: parameter name inside the layer.

    Returns:
        The layer and its Parameter.

    Raises:
        ValueError: there is no such layer or parameter.

    Examples:
        >>> locate(nn.Sequential(nn.Linear(3, 2)), "0", "weight")[1].shape
        torch.Size([2, 3])
    """
    module = _compiled(model)
    try:
        for part in layer.split(".") if layer else ():
            module = _compiled(module._modules[part])
        return module, parameter(module, param)
    except (AttributeError, KeyError):
        raise ValueError(
            f"{type(model).__name__} has no weight {layer}.{param}: is it the architecture that was compressed?"
        ) from None


def _compiled(module: Any) -> nn.Module:
    """The module that ``torch.compile`` has wrapped, or this one."""
    inner: nn.Module = module
    while isinstance(inner._modules.get("_orig_mod"), nn.Module):
        inner = inner._modules["_orig_mod"]  # type: ignore[assignment]
    return inner


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, under every name that they have.

    Args:
        model: any module, changed in place; it cannot be replaced itself.
        replacements: old module -> new module.

    Examples:
        >>> net = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
        >>> replace_modules(net, {net[0]: nn.Identity()})
        >>> net[0]
        Identity()
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def find(model: nn.Module, include: Patterns = "*", exclude: Patterns = ()) -> list[Target]:
    """The weights a method would work on; see ``survey`` for the rules.

    Args:
        model: any module.
        include: glob patterns (or ``re:`` expressions) on layer names.
        exclude: patterns to leave out.

    Returns:
        Targets in parameter order, shared weights once.

    Raises:
        ValueError: a pattern fits no layer.

    Examples:
        >>> [t.key for t in find(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Embedding(4, 2)))]
        ['0.weight']
    """
    return survey(model, include, exclude).targets
