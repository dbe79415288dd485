"""Which layer feeds which: seen in one forward pass, or, without an input, read from the code."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_compress.fusion.fold import LAYERS, NORMS, tensors_of
from lightning_compress.stats.running import call, observing

_FOLLOWED = (*LAYERS, *NORMS)


@dataclass
class Connections:
    """How the linear, convolution and BatchNorm layers of a model are connected.

    Args:
        calls: layer -> how often it runs.
        source: layer -> the layer whose output is exactly its input.
        users: layer -> everything that reads its output.
        dims: layer -> dimensions of its output, where a real tensor was seen.
        touched: layers whose own tensors are read outside of their own call.
    """

    calls: Counter[nn.Module] = field(default_factory=Counter)
    source: dict[nn.Module, nn.Module] = field(default_factory=dict)
    users: dict[nn.Module, set[Any]] = field(default_factory=dict)
    dims: dict[nn.Module, int] = field(default_factory=dict)
    touched: set[nn.Module] = field(default_factory=set)


def tensors_in(value: Any, met: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor inside nested containers, dataclasses and plain objects."""
    met = set() if met is None else met
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in met:
        met.add(id(value))
        parts: Any = ()
        if isinstance(value, Mapping):
            parts = value.values()
        elif isinstance(value, list | tuple | set):
            parts = value
        elif hasattr(value, "__dict__") and not callable(value):
            parts = vars(value).values()
        for part in parts:
            yield from tensors_in(part, met)


# -- seen in a forward pass --------------------------------------------------------------------------------


def output(model: nn.Module, x: Any, watch: Watch | None = None) -> Any:
    """The model's output in eval mode with exact float32 products, every random draw the same each time.

    Args:
        model: any module.
        x: input, as for ``lightning_compress.compress``.
        watch: fills its connections on the way.

    Returns:
        What the model returns.
    """
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        stack.enter_context(_exact())
        if watch is None:
            return call(model, x)
        for layer in watch.layers:
            stack.callback(layer.register_forward_pre_hook(watch.enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(watch.leave, with_kwargs=True).remove)
        stack.enter_context(watch)
        out = call(model, x)
        watch.use(out, "output of the model")
        return out


@contextmanager
def _exact() -> Iterator[None]:
    """No TF32 and no bfloat16 inside float32 products: they round a hundred times coarser than what is checked."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    flags = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    try:
        with cudnn.flags(**flags, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Watch(TorchDispatchMode):
    """Follows the outputs of the layers through every tensor operation of a forward pass.

    Args:
        model: the model that will run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Connections()
        self.layers = [m for m in model.modules() if isinstance(m, _FOLLOWED)]
        # Outputs by id; holding on to them keeps their ids their own.
        self._made: dict[int, tuple[nn.Module, Tensor]] = {}
        self._running: list[nn.Module] = []
        held = ((t, m) for m in self.layers for t in tensors_of(m).values() if t is not None and t.numel())
        self._owners = {t.untyped_storage().data_ptr(): m for t, m in held}
        self._operations = 0

    def use(self, values: Any, user: Any) -> None:
        """Somebody reads these values."""
        for tensor in tensors_in(values):
            if id(tensor) in self._made:
                self.seen.users[self._made[id(tensor)][0]].add(user)

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer begins its forward."""
        self.use((args, kwargs), layer)
        made = self._made.get(id(args[0] if args else kwargs.get("input")))
        if made is not None:
            self.seen.source[layer] = made[0]
        self.seen.calls[layer] += 1
        self._running.append(layer)

    def leave(self, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """A layer has ended its forward."""
        self._running.pop()
        self.seen.users.setdefault(layer, set())
        if isinstance(out, Tensor):
            self._made[id(out)] = layer, out
            self.seen.dims[layer] = out.dim()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.use(operands, self._running[-1] if self._running else self._operations)
        for tensor in operands:
            owner = self._owners.get(tensor.untyped_storage().data_ptr())
            if owner is not None and owner not in self._running:
                self.seen.touched.add(owner)
        return func(*args, **(kwargs or {}))


# -- read from the code ------------------------------------------------------------------------------------


def trace(module: nn.Module, seen: Connections) -> None:
    """Read the connections from the code: of this module if it can be traced symbolically, else of its parts.

    Args:
        module: in eval mode; its forward runs with symbols, so give a copy.
        seen: is filled.
    """
    if isinstance(module, _FOLLOWED):
        return
    try:
        # Optional arguments take their defaults: a symbol would pass every `if mask is not None`.
        given = inspect.signature(module.forward).parameters.values()
        defaults = {p.name: p.default for p in given if p.default is not p.empty}
        graph = _Tracer().trace(module, defaults or None)
    except Exception:  # anything may fail when a user's forward meets symbols; then the parts tell
        parts = list(module.children())
        if type(module).forward is nn.Sequential.forward:
            for first, second in pairwise(parts):
                seen.source[second] = first
                seen.users.setdefault(first, set()).add(second)
            seen.calls.update(parts)
        for part in parts:
            trace(part, seen)
    else:
        _read(graph, module, seen)


class _Tracer(fx.Tracer):
    """Does not look inside the layers that matter here, nor inside users' subclasses of them."""

    proxy_buffer_attributes = True  # so that reading a statistic is seen, as reading a parameter is

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _FOLLOWED) or super().is_leaf_module(m, module_qualified_name)


def _read(graph: fx.Graph, root: nn.Module, seen: Connections) -> None:
    """Connections of the calls in a traced graph; identities are looked through."""

    def called(node: Any) -> nn.Module | None:
        is_call = isinstance(node, fx.Node) and node.op == "call_module"
        return root.get_submodule(str(node.target)) if is_call else None

    def users(node: fx.Node) -> Iterator[Any]:
        for user in node.users:
            layer = called(user)
            yield from users(user) if isinstance(layer, nn.Identity) else [layer or user]

    for node in graph.nodes:
        layer = called(node)
        if node.op == "get_attr":
            seen.touched.add(root.get_submodule(str(node.target).rpartition(".")[0]))
        if layer is None or isinstance(layer, nn.Identity):
            continue
        origin = node.args[0] if node.args else node.kwargs.get("input")
        while isinstance(called(origin), nn.Identity):
            origin = origin.args[0]
        source = called(origin)
        if source is not None:
            seen.source[layer] = source
        seen.calls[layer] += 1
        seen.users.setdefault(layer, set()).update(users(node))
