"""Which layer feeds which: seen in one forward pass, or, without an input, read from the code."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_compress.stats.running import call, observing

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FOLLOWED = (*LAYERS, *NORMS)

# Operations f with f(s x) = s f(x) for s > 0 that keep channels apart, by plain name, and what they are called here.
_ELEMENTWISE = {"relu": "relu", "leaky_relu": "leaky_relu"}
_POOLS = {"max_pool": "max_pool", "avg_pool": "mean_pool"}  # parts of names; the number of axes follows
_REDUCTIONS = {"amax": "max_pool", "mean": "mean_pool"}
_REORDERED = ("permute", "transpose", "t", "squeeze", "unsqueeze")
_RESHAPED = (
    "view",
    "_unsafe_view",
    "reshape",
    "flatten",
    "unflatten",
    "alias",
    "clone",
    "contiguous",
    "detach",
)


@dataclass
class Connections:
    """How the linear, convolution and BatchNorm layers of a model are connected.

    Args:
        calls: layer -> how often it runs.
        source: layer -> the layer whose output is exactly its input.
        users: layer -> everything that reads its output.
        dims: layer -> dimensions of its output, where a real tensor was seen.
        touched: layers whose own tensors are read outside of their own call.
        inputs: layer -> the tensor it got, where that is known to come from another layer.
    """

    calls: Counter[nn.Module] = field(default_factory=Counter)
    source: dict[nn.Module, nn.Module] = field(default_factory=dict)
    users: dict[nn.Module, set[Any]] = field(default_factory=dict)
    dims: dict[nn.Module, int] = field(default_factory=dict)
    touched: set[nn.Module] = field(default_factory=set)
    inputs: dict[nn.Module, _Tensor] = field(default_factory=dict)

    def predecessor(self, layer: nn.Module) -> Predecessor | None:
        """The layer that feeds this one, directly or through operations that commute with a factor per channel.

        Args:
            layer: a linear, convolution or BatchNorm layer of the model that ran.

        Returns:
            None if something else lies between (an addition, a concatenation, a sigmoid, channels that are mixed),
            if either of them ran several times, or if no forward pass was seen.
        """
        made = self.inputs.get(layer)
        if made is None or made.stale:
            return None
        if self.calls[layer] != 1 or self.calls[made.layer] != 1:
            return None
        # Every axis but the one that the layer's weight meets must stay within one channel.
        channels = made.channels()
        rows = channels.transpose(0, _axis(layer, channels.dim())).flatten(1)
        if bool((rows != rows[:, :1]).any()):
            return None
        chain = list(made.chain())
        return Predecessor(made.layer, made.via, rows[:, 0].long(), max(len(part.readers) for part in chain))


class Predecessor(NamedTuple):
    """What lies before a layer.

    Args:
        layer: the linear, convolution or BatchNorm layer that it gets its values from.
        via: operations between them, in order: "relu", "leaky_relu", "max_pool", "mean_pool", and "shape" for
            reshaping and reordering; empty if the output of one is the input of the other.
        channels: channel of ``layer`` that each input channel (feature) comes from.
        consumers: how many read the output of ``layer``, or a tensor on the way, where it is read most: 1 if nobody
            but this layer depends on it.
    """

    layer: nn.Module
    via: tuple[str, ...]
    channels: Tensor
    consumers: int


@dataclass
class _Tensor:
    """A tensor on the way from one layer to another."""

    layer: nn.Module
    value: Tensor  # holding on to it keeps its id its own
    origins: Tensor | None = None  # None: it is the layer's output
    via: tuple[str, ...] = ()
    parent: _Tensor | None = None
    readers: set[Any] = field(default_factory=set)
    stale: bool = False  # changed in place, through another view of its memory

    def channels(self) -> Tensor:
        """For each entry, the channel of the layer's output that it comes from."""
        if self.origins is None:
            axis, dims = _axis(self.layer, self.value.dim()), self.value.dim()
            numbers = torch.arange(self.value.shape[axis], dtype=torch.int32, device=self.value.device)
            numbers = numbers.view([-1 if d == axis else 1 for d in range(dims)])
            self.origins = numbers.expand_as(self.value)  # takes no memory
        return self.origins

    def chain(self) -> Iterator[_Tensor]:
        """This tensor and those it was made from, back to the layer's output."""
        part: _Tensor | None = self
        while part is not None:
            yield part
            part = part.parent


def _axis(layer: Any, dims: int) -> int:
    """Channel axis of a layer's inputs and outputs of so many dimensions."""
    if isinstance(layer, NORMS):
        return 1
    return dims - 1 if isinstance(layer, nn.Linear) else dims - 1 - len(layer.kernel_size)


def follow(model: nn.Module, x: Any) -> Connections:
    """How the layers of a model are connected, seen in one forward pass in eval mode.

    Args:
        model: any module; it is left as it was.
        x: one input: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The connections.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
        >>> found = follow(net, torch.zeros(1, 1, 4, 4)).predecessor(net[3])
        >>> found.layer, found.via, found.channels.tolist(), found.consumers
        (Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1)), ('relu', 'shape'), [0, 0, 0, 0, 1, 1, 1, 1], 1)
    """
    watch = Watch(model)
    output(model, x, watch)
    return watch.seen


def tensors_of(layer: nn.Module) -> dict[str, Tensor | None]:
    """The layer's own parameters and buffers by name."""
    return {**layer._parameters, **layer._buffers}


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
        stack.enter_context(torch.inference_mode(False))  # there, operations made of others arrive whole
        stack.enter_context(torch.no_grad())
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
        self._on_the_way: dict[int, _Tensor] = {}
        self._running: list[nn.Module] = []
        held = ((t, m) for m in self.layers for t in tensors_of(m).values() if t is not None and t.numel())
        self._owners = {t.untyped_storage().data_ptr(): m for t, m in held}
        self._operations = 0

    def use(self, values: Any, user: Any) -> None:
        """Somebody reads these values."""
        for tensor in tensors_in(values):
            if id(tensor) in self._made:
                self.seen.users[self._made[id(tensor)][0]].add(user)
            if id(tensor) in self._on_the_way:
                self._on_the_way[id(tensor)].readers.add(user)

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer begins its forward."""
        self.use((args, kwargs), layer)
        given = id(args[0] if args else kwargs.get("input"))
        if given in self._made:
            self.seen.source[layer] = self._made[given][0]
        if given in self._on_the_way:
            self.seen.inputs[layer] = self._on_the_way[given]
        self.seen.calls[layer] += 1
        self._running.append(layer)

    def leave(self, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """A layer has ended its forward."""
        self._running.pop()
        self.seen.users.setdefault(layer, set())
        if isinstance(out, Tensor):
            self._made[id(out)] = layer, out
            self.seen.dims[layer] = out.dim()
            self._on_the_way[id(out)] = _Tensor(layer, out)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.use(operands, self._running[-1] if self._running else self._operations)
        for tensor in operands:
            owner = self._owners.get(tensor.untyped_storage().data_ptr())
            if owner is not None and owner not in self._running:
                self.seen.touched.add(owner)
        out = func(*args, **(kwargs or {}))
        if not self._running:
            self._carry(func, args, out)
        return out

    def _carry(self, func: Any, args: Any, out: Any) -> None:
        """Follow a tensor through one operation between layers."""
        name, changed = func._schema.name.removeprefix("aten::"), func._schema.is_mutable
        made = self._on_the_way.get(id(args[0])) if args else None
        if changed and args and isinstance(args[0], Tensor):
            memory = args[0].untyped_storage().data_ptr()
            for other in self._on_the_way.values():
                other.stale |= other.value.untyped_storage().data_ptr() == memory
        result = out[0] if isinstance(out, tuple) else out
        if made is None or not isinstance(result, Tensor):
            return
        step, origins = _through(name.removesuffix("_") if changed else name, func, made, args, result)
        if step is not None:
            via = made.via if made.via[-1:] == (step,) == ("shape",) else (*made.via, step)
            self._on_the_way[id(result)] = _Tensor(made.layer, result, origins, via, made)


def _through(name: str, func: Any, made: _Tensor, args: Any, out: Tensor) -> tuple[str | None, Tensor | None]:
    """What an operation is called in ``Predecessor.via``, and where its entries come from; None for all others."""
    if name in _ELEMENTWISE:
        return _ELEMENTWISE[name], made.channels()
    if func._schema.is_mutable:
        return None, None
    if name in _REORDERED:
        return "shape", func(made.channels(), *args[1:])
    if name in _RESHAPED and out.dtype == made.value.dtype:
        return "shape", made.channels().reshape(out.shape)
    pool = next((called for part, called in _POOLS.items() if part in name), None)
    axes: Any = args[1] if name in _REDUCTIONS and len(args) > 1 else None
    if pool is not None:
        axes = list(range(-int(name[name.index("pool") + 4]), 0))
    if not axes:
        return None, None
    low, high = (reduce(made.channels(), axes, keepdim=True) for reduce in (torch.amin, torch.amax))
    if not torch.equal(low, high):  # it mixes channels
        return None, None
    if pool is not None:
        return pool, low.expand(out.shape)
    return _REDUCTIONS[name], low.reshape(out.shape)


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
