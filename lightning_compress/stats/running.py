"""Running a model without a trace: modes, buffers, hooks and the global random state stay as they were."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without tensors."""
    return next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile``, DDP and DataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings, or None."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((t for t in map(first_tensor, parts) if t is not None), None)


def move(value: Any, device: torch.device) -> Any:
    """The same nested tuples, lists and mappings with tensors on ``device``; other values as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: move(v, device) for k, v in value.items()}
    return tuple(move(v, device) for v in value) if isinstance(value, tuple | list) else value


def call(model: nn.Module, x: Any) -> Any:
    """The model's output for a tensor, a tuple of positional arguments or a mapping of keyword arguments.

    Args:
        model: any module.
        x: one input; it is moved to the model's device.

    Returns:
        What ``model(...)`` returns.

    Examples:
        >>> call(nn.Bilinear(2, 3, 1), (torch.ones(4, 2), torch.ones(4, 3))).shape
        torch.Size([4, 1])
    """
    x = move(x, device_of(model))
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards mode flags, buffers and the global random state are as before.

    Mode flags are written directly: ``model.eval()`` may be overridden with side effects.

    Args:
        model: any module.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    dense = [b for b in model.buffers() if b.layout == torch.strided and not b.is_meta]
    buffers = [(buffer, buffer.detach().clone()) for buffer in dense]
    cuda = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                if buffer.shape == before.shape and not torch.equal(buffer, before):
                    buffer.copy_(before)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """As ``evaluating``, and every submodule runs: no fused attention or compiled code skips its hooks.

    Args:
        model: any module.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if any(getattr(m, "_compiled_call_impl", None) or "_orig_mod" in m._modules for m in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class Operations(TorchDispatchMode, ABC):
    """Watches the tensor operations that run inside, by plain name ("addmm" also for "addmm_")."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @abstractmethod
    def wants(self, name: str) -> bool:
        """Whether the operation is to be seen whole."""

    @abstractmethod
    def seen(self, name: str, args: Any, result: Any) -> None:
        """An operation has run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if self.wants(name):
            result = func(*args, **kwargs)
            self.seen(name, args, result)
            return result
        with self:  # in inference mode, operations made of others arrive whole
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result
