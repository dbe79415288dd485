"""Seeing what a network gets, returns and computes inside, without touching it: hooks that live for one step."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.outputs import main_tensor
from lightning_compress.names import clean


@dataclass
class Call:
    """One call of a network.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        output: what it returned.
        features: name of a watched layer -> its output in this call, the last one if it ran several times.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    features: dict[str, Tensor] = field(default_factory=dict)


def layers_named(model: nn.Module, names: Mapping[str, Any], whose: str) -> dict[str, nn.Module]:
    """The layers of these names; the prefix of ``torch.compile`` does not count.

    Args:
        model: any.
        names: names of layers (their keys are used).
        whose: "student" or "teacher", for errors.

    Returns:
        Name -> layer.

    Raises:
        ValueError: an unknown name; the error lists the nearest ones.

    Examples:
        >>> layers_named(nn.Sequential(nn.Linear(1, 1)), {"0": None}, "student")
        {'0': Linear(in_features=1, out_features=1, bias=True)}
    """
    known = {clean(name): module for name, module in model.named_modules() if clean(name)}
    found = {}
    for name in names:
        if clean(name) not in known:
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.3) or list(known)[:4]
            raise ValueError(
                f"the {whose} ({type(model).__name__}) has no layer {name!r}; the nearest names are {', '.join(near)}."
            )
        found[name] = known[clean(name)]
    return found


def bodies(model: nn.Module) -> list[nn.Module]:
    """The modules whose call means that the network was called: it, and each child that holds all of its parameters.

    A LightningModule is often called by way of its only network, as in ``self.net(x)``.

    Args:
        model: any.

    Returns:
        From the outside to the inside.

    Examples:
        >>> len(bodies(nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))))
        2
    """
    found, everything = [model], {id(p) for p in model.parameters()}
    while everything and not isinstance(
        found[-1]._modules.get("_orig_mod"), nn.Module
    ):  # compiled as a whole
        inner = [c for c in found[-1].children() if everything <= {id(p) for p in c.parameters()}]
        if len(inner) != 1:
            break
        found.append(inner[0])
    return found


@contextmanager
def watched(
    model: nn.Module, layers: Mapping[str, nn.Module] | None = None, *, differentiable: bool = False
) -> Iterator[list[Call]]:
    """Record the calls of a network while the context lasts; afterwards no hook is left.

    Args:
        model: any.
        layers: name -> layer whose outputs are recorded.
        differentiable: give the network inputs that require gradients, cut off from what made them.

    Yields:
        The calls so far.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with watched(model, {"first": model[0]}) as calls:
        ...     y = model(torch.ones(1, 2))
        >>> len(calls), calls[0].output is y, calls[0].features["first"].shape, len(model._forward_hooks)
        (1, True, torch.Size([1, 3]), 0)
    """
    calls: list[Call] = []
    running: list[tuple[nn.Module, Call]] = []  # none or one: calls inside a call are part of it

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if running:
            return None
        if differentiable:
            args = tuple(map(_leaf, args))
            kwargs = {k: _leaf(v) for k, v in kwargs.items()}
        running.append((module, Call(args, kwargs)))
        return args, kwargs

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if running and running[0][0] is module:
            call = running.pop()[1]
            call.output = output
            calls.append(call)

    def inside(name: str) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]  # in a compiled network it breaks the graph
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            value = main_tensor(output)
            if running and value is not None:
                running[0][1].features[name] = value

        return keep

    hooks = []
    try:
        for name, layer in (
            layers or {}
        ).items():  # ahead of those of the network, which may be the layer itself
            hooks.append(layer.register_forward_hook(inside(name)))
        for body in bodies(model):
            hooks.append(body.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(body.register_forward_hook(after, with_kwargs=True))
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _leaf(x: Any) -> Any:
    """The same values as a leaf of the graph."""
    if isinstance(x, Tensor) and x.is_floating_point():
        with torch.enable_grad():
            return x.detach().requires_grad_()
    return x
