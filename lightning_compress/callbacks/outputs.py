"""Penalties on the outputs of layers: their gradients join those of the loss on its way back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_compress.functional.layouts import wide
from lightning_compress.functional.sparsity import near_zero
from lightning_compress.names import clean, matches
from lightning_compress.stats.running import first_tensor
from lightning_compress.tables import listing
from lightning_compress.targets import Patterns, find

_CHANNELS_LAST = (nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RNNBase, nn.MultiheadAttention)


def layers_of(module: nn.Module, include: Patterns, exclude: Patterns) -> dict[str, nn.Module]:
    """The layers that patterns name, with weights or without.

    Args:
        module: any.
        include: patterns of layer names; "*" takes the layers of registered weights.
        exclude: patterns to leave.

    Returns:
        Name -> layer, each layer once.

    Raises:
        ValueError: a pattern fits no layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> list(layers_of(net, "*", ())), list(layers_of(net, "1", ()))
        (['0'], ['1'])
    """
    named = {clean(name): layer for name, layer in module.named_modules() if name}
    wanted, unwanted = ((p,) if isinstance(p, str) else tuple(p) for p in (include, exclude))
    for pattern in (*wanted, *unwanted):
        if pattern != "*" and not any(matches(pattern, name) for name in named):
            raise ValueError(f"pattern {pattern!r} fits no layer; these are: {listing(list(named))}.")
    weighted = {target.module for target in find(module)} if "*" in wanted else set()
    patterns = [p for p in wanted if p != "*"]
    return {
        name: layer
        for name, layer in named.items()
        if (layer in weighted or any(matches(p, name) for p in patterns))
        and not any(matches(p, name) for p in unwanted)
    }


def forget_compiled(module: nn.Module) -> None:
    """Have ``torch.compile`` start anew where it was used: code from before a hook was there does not call it.

    Args:
        module: any.

    Examples:
        >>> forget_compiled(nn.Linear(1, 1))
    """
    if any(getattr(m, "_compiled_call_impl", None) or "_orig_mod" in m._modules for m in module.modules()):
        torch.compiler.reset()


def channel_axis(layer: nn.Module, output: Tensor) -> int:
    """The axis of an output's channels: the last of linear and recurrent layers and of [N, C], else the second.

    Args:
        layer: any.
        output: what it gave.

    Returns:
        The axis.

    Examples:
        >>> channel_axis(nn.Conv1d(1, 1, 1), torch.ones(2, 1, 5)), channel_axis(nn.Linear(5, 5), torch.ones(2, 1, 5))
        (1, 2)
    """
    return output.dim() - 1 if isinstance(layer, _CHANNELS_LAST) or output.dim() < 3 else 1


class Outputs:
    """Adds ``factor dP/da`` to the gradient of every output a while the Trainer runs the backward pass of the loss.

    Gradients that are taken for other purposes, passes without gradients and those of validation are left alone. An
    output that a later operation overwrites in place is copied; the first pass shows which are.

    Args:
        value: function ``a, channel axis -> P``; None for a copy of a module, whose hooks do nothing.
        gradient: function ``a, channel axis -> c, x`` with ``dP/da = c x``.
        by_channel: count channels, not entries, that are near zero.
    """

    def __init__(
        self,
        value: Callable[[Tensor, int], Tensor] | None = None,
        gradient: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
        by_channel: bool = False,
    ) -> None:
        self._value, self._gradient, self._by_channel = value, gradient, by_channel
        self._due = self._counting = False
        self._factor: float | None = None
        self._scaler: Any = None
        self._values: list[Tensor] = []
        self._shares: dict[str, list[Tensor]] = {}
        self._overwritten: dict[str, bool] = {}  # layer whose gradient was met -> whether its outputs are
        self._layers: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Outputs, ()

    def listen(self, layers: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
        """Follow the outputs of layers.

        Args:
            layers: name -> layer.

        Returns:
            Functions that end it.
        """
        hooks = [
            layer.register_forward_hook(functools.partial(self._ran, name)) for name, layer in layers.items()
        ]
        self._layers = tuple(layers)
        return [hook.remove for hook in hooks]

    def start(self, due: bool, counting: bool) -> None:
        """A training batch begins.

        Args:
            due: its outputs are penalized.
            counting: values and shares are wanted.
        """
        self._due, self._counting = due, counting
        if counting:
            self._values, self._shares = [], {}

    def stop(self) -> tuple[str, ...]:
        """The batch is over.

        Returns:
            The layers whose outputs took no part in the first one that is penalized; nothing after that.
        """
        missed = [name for name in self._layers if name not in self._overwritten] if self._due else []
        if self._due:
            self._layers = ()
        self._due = self._counting = False
        return tuple(missed)

    def backward(self, trainer: Trainer, factor: float) -> None:
        """The loss is about to go backward.

        Args:
            trainer: its gradient scaler has multiplied the loss.
            factor: of dP/da beside the scale.
        """
        self._factor, self._scaler = factor, getattr(trainer.precision_plugin, "scaler", None)

    def backward_done(self) -> None:
        """The gradient of the loss is there."""
        self._factor = self._scaler = None

    def measured(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """What was counted last: P of every output, and of every layer the share that is near zero."""
        return self._values, {name: torch.stack(ran).mean() for name, ran in self._shares.items()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a trace would keep what is to be added as it was then
    def _ran(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if self._value is None or not (self._due or self._counting) or not torch.is_grad_enabled():
            return
        a = first_tensor(output)
        if a is None or not a.requires_grad or not a.numel():
            return
        axis, now = channel_axis(layer, a), a.detach()
        if self._counting:
            self._values.append(self._value(now, axis))
            u = wide(now).abs()
            sizes = u.movedim(axis, 0).flatten(1).mean(1) if self._by_channel else u.flatten()
            self._shares.setdefault(name, []).append(near_zero(sizes))
        if self._due:
            kept = now.clone() if self._overwritten.get(name, True) else now
            hook = functools.partial(self._join, name, axis, kept, now, now._version)
            a.register_hook(hook)  # type: ignore[no-untyped-call]

    def _join(
        self, name: str, axis: int, kept: Tensor, now: Tensor, version: int, incoming: Tensor
    ) -> Tensor | None:
        if self._factor is None or self._gradient is None:
            return None
        overwritten = now._version != version
        if overwritten and kept is now:
            raise RuntimeError(
                f"the output of {name} was overwritten in place after batches in which it was not: its penalty cannot "
                "be computed. Build what follows it with inplace=False, or exclude it."
            )
        self._overwritten[name] = self._overwritten.get(name, False) or overwritten
        with torch.no_grad():
            c, x = self._gradient(kept, axis)
            c = c * self._factor
            if self._scaler is not None:
                c = self._scaler.scale(c)  # the scale stays on the device
            x = wide(x)
            return torch.addcmul(wide(incoming), x, c.to(x.dtype)).to(incoming.dtype)
