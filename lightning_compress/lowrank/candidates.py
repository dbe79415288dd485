"""Which schemes a weight may take, and the shapes that its layer sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_compress.lowrank.all_schemes import schemes
from lightning_compress.lowrank.schemes import Scheme, Shapes
from lightning_compress.stats.running import call, first_tensor, observing
from lightning_compress.targets import Target, plain_class


def candidates(model: nn.Module, target: Target, name: str, real: bool) -> tuple[list[Scheme], str]:
    """The schemes that a target may take.

    Args:
        model: the model.
        target: the weight.
        name: of a scheme, or "auto" for all that are not slow.
        real: real channel factors for spectral layers.

    Returns:
        The schemes, and why there are none ("" if there are some).
    """
    why = _refusal(model, target)
    if why:
        return [], why
    reasons = {scheme: scheme.fits(target) for scheme in schemes(real)}
    usable = [scheme for scheme, reason in reasons.items() if reason is None]
    wanted = [s for s in usable if s.name == name or (name == "auto" and s.automatic)]
    if wanted:
        return wanted, ""
    said = [reason for s, reason in reasons.items() if reason and name in ("auto", s.name)]
    if said:
        return [], said[0]
    kind = plain_class(target.module).__name__
    return [], f"{kind} has no scheme {name!r}" if usable else f"there is no scheme for {kind}.{target.param}"


def _refusal(model: nn.Module, target: Target) -> str:
    """Why no scheme may touch a target, or ""."""
    layer = target.module
    holders = [m for m in model.modules() if any(p is target.weight for p in m._parameters.values())]
    if len(holders) > 1:
        return f"its weight is shared with {', '.join(target.aliases)}: factors of one would untie them"
    if any(getattr(part, "auxiliary", False) for part in layer.modules()):
        return "its weight or its inputs are quantized: factorize first"
    if layer is model and not target.weight.is_complex():
        return "it is the whole model: put it into nn.Sequential to replace it"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks, which would be lost"
    return ""


def calls_of(model: nn.Module, targets: Sequence[Target], x: Any) -> dict[str, list[Shapes]]:
    """Shapes of the inputs and outputs of every layer in one forward pass.

    Args:
        model: any module; it is left as it was.
        targets: weights of the layers to watch.
        x: one input.

    Returns:
        Target key -> shapes, one pair for each call.
    """
    calls: dict[str, list[Shapes]] = {t.key: [] for t in targets}

    def note(key: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, made = first_tensor((args, kwargs)), first_tensor(output)
        if given is not None and made is not None:
            calls[key].append((tuple(given.shape), tuple(made.shape)))

    hooks = [t.module.register_forward_hook(partial(note, t.key), with_kwargs=True) for t in targets]
    try:
        with observing(model):
            call(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
