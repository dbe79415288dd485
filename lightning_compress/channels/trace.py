"""Which channels of which tensors belong together: one forward pass, watched operation by operation.

Every axis of every parameter and buffer starts with a label of its own for each index. Operations make labels equal
(an addition, the inputs of a layer and the outputs of the one before), carry them on to their results, or
fix them (a size that is written in the user's code, an operation that is not known).
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.channels.attention import decoupled
from lightning_compress.channels.rules import rule_of
from lightning_compress.channels.watcher import Trace, Watcher
from lightning_compress.names import clean
from lightning_compress.stats.running import call, observing


def trace(model: nn.Module, x: Any, grouped: dict[str, str] | None = None) -> Trace:
    """Run the model once and see which channels belong together; the model is left as it was.

    Args:
        model: any module.
        x: one input: a tensor, a tuple of arguments or a dict of keywords.
        grouped: decisions of an earlier trace (see ``Trace``), which are followed.

    Returns:
        The trace.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> seen = trace(net, torch.ones(1, 2))
        >>> out, into = seen.axes["0.weight"][0], seen.axes["2.weight"][1]
        >>> bool((seen.classes[out] == seen.classes[into]).all())
        True
    """
    watcher = Watcher(model, grouped or {})
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        stack.enter_context(decoupled(model))
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(watcher.enter(clean(name), module)).remove)
            stack.callback(module.register_forward_hook(watcher.leave, always_call=True).remove)
        stack.enter_context(_Scales(watcher))
        with _Operations(watcher):
            output = call(model, x)
        given = watcher.gives(output)
        work, trains = list(watcher.work), False
        if watcher.asleep():
            # Layers stay in evaluation mode: no dropout, no statistics of one sample.
            for module in model.modules():
                module.training = any(True for _ in module.children())
            with suppress(Exception), _Operations(watcher):  # training may need other inputs
                watcher.gives(call(model, x))
                trains = True
    return replace(watcher.result(given), work=work, trains=trains)


class _Operations(TorchDispatchMode):
    """Sees every operation on tensors that runs inside, and applies its rule."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watcher = watcher

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = rule_of(func)
        if rule is None:
            with self:  # in inference mode, operations made of others arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        given = {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            given[argument.name] = value
        for argument in func._schema.arguments[len(args) :]:
            given[argument.name] = kwargs.get(argument.name, argument.default_value)
        if rule is None:
            self.watcher.unknown(func._schema.name.removeprefix("aten::"), given)
        else:
            rule(self.watcher, given, result)
        return result


class _Scales(TorchFunctionMode):
    """Sees attention before it is taken apart: its scale may follow from a number of channels, which then stay."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = args[0] if args else kwargs["query"]
            why = f"{self.watcher.here} divides by the root of their number"
            self.watcher.freeze(query, [query.dim() - 1], why)
        return func(*args, **kwargs)
