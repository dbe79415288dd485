"""What can be left out of a network: layers, blocks and spectral paths, with the reason for each that cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_compress.names import clean
from lightning_compress.spectral import is_spectral
from lightning_compress.stats.running import call, first_tensor, observing
from lightning_compress.targets import find, plain_class

BLOCKS = "neuralop.layers.fno_block.FNOBlocks"
CODANO = "neuralop.models.codano.CODANO"
UNO = "neuralop.models.uno.UNO"
_LISTS = ("convs", "fno_skips", "channel_mlp", "channel_mlp_skips")  # of FNOBlocks: one entry for each block


@dataclass(frozen=True)
class Unit:
    """Something that can be left out.

    Args:
        how: what ``dropping.drop`` needs, plain values.
        members: the modules that go with it.
    """

    how: dict[str, Any]
    members: tuple[nn.Module, ...]


def is_a(module: nn.Module, kind: str) -> bool:
    """Whether a module is of a class of neuraloperator or inherits from it.

    Args:
        module: any module.
        kind: dotted name of the class.

    Returns:
        False also when the package is absent.

    Examples:
        >>> is_a(nn.Linear(1, 1), "torch.nn.modules.linear.Linear")
        True
    """
    return any(f"{k.__module__}.{k.__qualname__}" == kind for k in type(module).__mro__)


def units(model: nn.Module, unit: str, x: Any) -> tuple[dict[str, Unit], dict[str, str]]:
    """The units of a model, in the order of its modules.

    Args:
        model: any module.
        unit: "block", "spectral" or "layer".
        x: an input, for shapes; None if there is none.

    Returns:
        Unit name -> unit, and name of something of this kind -> why it cannot be left out.

    Examples:
        >>> found, skipped = units(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), "layer", torch.zeros(1, 2))
        >>> list(found), skipped
        (['0'], {'1': 'it maps 1 x 2 to 1 x 3'})
    """
    names = {module: clean(name) for name, module in model.named_modules()}
    if unit == "spectral":
        found = list(_spectral_paths(model, names))
    elif unit == "layer":
        layers = {names[t.module]: t.module for t in find(model)}
        found = list(_same_shape(model, layers, x, "identity"))
    else:
        found = [*_entries(model, names), *_elements(model, names, x)]
    order = {name: i for i, name in enumerate(names.values())}
    found.sort(key=lambda pair: order.get(pair[0], order.get(pair[0].rpartition(".")[0], 0)))
    return {n: u for n, u in found if isinstance(u, Unit)}, {n: u for n, u in found if isinstance(u, str)}


_Found = Iterator[tuple[str, Unit | str]]


def _owners(model: nn.Module) -> list[nn.Module]:
    """Modules that hold blocks as entries of several lists; in a list themselves (UNO), each is one block."""
    whole = [m for m in model.modules() if is_a(m, CODANO)]
    inside = {part for m in whole for part in m.modules()}
    listed = {m for parent in model.modules() if isinstance(parent, nn.ModuleList) for m in parent.children()}
    blocks: list[Any] = [m for m in model.modules() if is_a(m, BLOCKS) and m not in inside]
    return whole + [b for b in blocks if b.n_layers > 1 or b not in listed]


def _entries(model: nn.Module, names: dict[nn.Module, str]) -> _Found:
    """Blocks of FNO and attention layers of CODANO."""
    for owner in _owners(model):
        held: Any = owner
        prefix = f"{names[owner]}." if names[owner] else ""
        codano = is_a(owner, CODANO)
        scales = held.per_layer_scale_factors if codano else held.resolution_scaling_factor
        ends = held.horizontal_skips_map or {} if codano else {}
        for i in range(held.n_layers):
            name = f"{prefix}attention_layers.{i}" if codano else f"{prefix}{i}"
            if held.n_layers == 1:
                yield name, "it is the only one"
            elif scales is not None and any(s != 1 for s in scales[i]):
                yield name, f"it changes the grid: its resolution is scaled by {list(scales[i])}"
            elif i in ends or i in ends.values():
                yield name, "a horizontal skip connection ends at it"
            else:
                how = {"kind": "entry", "of": names[owner], "index": i, "layers": held.n_layers}
                yield name, Unit(how, (held.attention_layers[i],) if codano else tuple(parts(held, i)))


def parts(blocks: Any, index: int) -> list[nn.Module]:
    """The modules that one entry of ``FNOBlocks`` consists of.

    Args:
        blocks: the blocks.
        index: which one.

    Returns:
        Convolution, skips, channel MLP and norms, as far as there are any.
    """
    lists = [getattr(blocks, name, None) for name in _LISTS]
    found = [modules[index] for modules in lists if modules is not None]
    if blocks.norm is not None:
        found += blocks.norm[blocks.n_norms * index : blocks.n_norms * (index + 1)]
    return found


def _elements(model: nn.Module, names: dict[nn.Module, str], x: Any) -> _Found:
    """Composite modules in lists, such as residual blocks, the outermost that fit.

    A Sequential is one only if no other composite module lies in it or around it: else it is a stage, or a part.
    """
    operators = [m for m in model.modules() if is_a(m, BLOCKS) or is_a(m, CODANO)]
    inside = {part for m in operators for part in m.modules() if part is not m} | set(_owners(model))
    listed = {
        child
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        for child in parent.children()
        if child not in inside and any(child.children()) and any(True for _ in child.parameters())
    }
    solid = {m for m in listed if not isinstance(m, nn.Sequential | nn.ModuleList)}
    within = {part for m in solid for part in m.modules()}
    loose = {
        m for m in listed if isinstance(m, nn.Sequential) and m not in within and not solid & set(m.modules())
    }
    chosen = {name: m for m, name in names.items() if m in solid | loose}
    found = dict(_same_shape(model, chosen, x, "bypass"))
    for uno in (m for m in model.modules() if is_a(m, UNO)):
        held: Any = uno
        for i in {*held.horizontal_skips_map, *held.horizontal_skips_map.values()}:
            found[names[held.fno_blocks[i]]] = "a horizontal skip connection ends at it"
    fitting = [chosen[name] for name, unit in found.items() if isinstance(unit, Unit)]
    covered = {part for m in fitting for part in m.modules() if part is not m}
    yield from ((name, unit) for name, unit in found.items() if chosen[name] not in covered)


def _spectral_paths(model: nn.Module, names: dict[nn.Module, str]) -> _Found:
    for blocks in model.modules():
        for layer in blocks.children() if isinstance(blocks, nn.ModuleList) else ():
            if is_spectral(layer):
                yield names[layer], Unit(_spectral(layer, passes=False), (layer,))
    for blocks in (m for m in model.modules() if is_a(m, BLOCKS)):
        held: Any = blocks
        if held.fno_skips is None and getattr(held, "channel_mlp_skips", None) is None:
            yield from ((names[c], "no skip connection lies beside it") for c in held.convs if is_spectral(c))


def _spectral(layer: Any, *, passes: bool) -> dict[str, Any]:
    return {"kind": "spectral", "passes": passes, "shape": list(layer.weight.shape)}


def _same_shape(model: nn.Module, modules: dict[str, nn.Module], x: Any, kind: str) -> _Found:
    """Modules that give every tensor back in its shape."""
    if x is None:
        yield from (
            (n, "the shapes it maps to each other are not known: give an example_input") for n in modules
        )
        return
    seen = _shapes(model, list(modules.values()), x)
    for name, module in modules.items():
        calls = seen[module]
        other = next((c for c in calls if c[0] is None or c[0] != c[1]), None)
        if not calls:
            yield name, "the forward pass does not call it"
        elif other is not None:
            yield name, f"it maps {_text(other[0])} to {_text(other[1])}"
        elif is_spectral(module):
            yield name, Unit(_spectral(module, passes=True), (module,))
        else:
            yield name, Unit({"kind": kind, "class": plain_class(module).__name__}, (module,))


def _text(shape: Sequence[int] | None) -> str:
    return "something else than one tensor" if shape is None else " x ".join(map(str, shape)) or "a scalar"


_Shape = tuple[int, ...] | None


def _shapes(
    model: nn.Module, modules: list[nn.Module], x: Any
) -> dict[nn.Module, list[tuple[_Shape, _Shape]]]:
    """For every call of a module, the shapes of its first argument and of its output."""
    seen: dict[nn.Module, list[tuple[_Shape, _Shape]]] = {module: [] for module in modules}

    def shape(value: Any) -> _Shape:
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def watch(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else first_tensor(kwargs)
        seen[module].append((shape(given), shape(out)))

    with ExitStack() as stack:
        stack.enter_context(observing(model))
        for module in modules:
            stack.callback(module.register_forward_hook(watch, with_kwargs=True).remove)
        call(model, x)
    return seen
