"""Which BatchNorm layers directly follow a layer, and what else must be silent when one of its channels is."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.connections import LAYERS, NORMS, Connections, follow, trace
from lightning_compress.names import clean, matches
from lightning_compress.stats.biases import bias_part
from lightning_compress.stats.running import observing
from lightning_compress.targets import Axes, Target


@dataclass(frozen=True)
class Followed:
    """What reads the output of a layer.

    Args:
        norms: BatchNorm layers that normalize exactly its output channels, and nothing else.
        others: whether something else reads it too.
        last: whether it is, with or without such a BatchNorm, an output of the model.
    """

    norms: tuple[nn.Module, ...] = ()
    others: bool = False
    last: bool = False


def followers(model: nn.Module, x: Any = None) -> dict[nn.Module, Followed]:
    """What directly follows every linear and convolution layer.

    Args:
        model: any module; it is left as it was.
        x: one input, whose tensors are followed; None reads the connections from the code.

    Returns:
        Layer -> what follows it.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> followers(net)[net[0]].norms == (net[1],)
        True
    """
    if not any(isinstance(m, LAYERS) for m in model.modules()):
        return {}
    seen = follow(model, x) if x is not None else _read(model)
    found: dict[nn.Module, Followed] = {}
    for layer in (m for m in model.modules() if isinstance(m, LAYERS)):
        norms = tuple(
            n for n, source in seen.source.items() if source is layer and _normalizes(n, layer, seen)
        )
        readers = seen.users.get(layer, set())
        last = any(_is_end(user) for m in (layer, *norms) for user in seen.users.get(m, ()))
        found[layer] = Followed(norms, bool(readers - set(norms)) or seen.calls[layer] > 1, last)
    return found


def alone_behind(followed: Mapping[nn.Module, Followed]) -> dict[nn.Module, nn.Module]:
    """Layer -> the one BatchNorm through which all of its output goes.

    Args:
        followed: what ``followers`` returned.

    Returns:
        Only layers that have one.
    """
    return {layer: f.norms[0] for layer, f in followed.items() if len(f.norms) == 1 and not f.others}


def _read(model: nn.Module) -> Connections:
    """The connections of a model as its code has them."""
    probe, seen = copy.deepcopy(model), Connections()
    with observing(probe):
        trace(probe, seen)
    ours = dict(zip(probe.modules(), model.modules(), strict=True))
    return Connections(
        calls=type(seen.calls)({ours[m]: n for m, n in seen.calls.items() if m in ours}),
        source={ours[m]: ours[s] for m, s in seen.source.items() if m in ours and s in ours},
        users={ours[m]: {ours.get(u, u) for u in users} for m, users in seen.users.items() if m in ours},
    )


def _normalizes(norm: Any, layer: Any, seen: Connections) -> bool:
    """Whether a BatchNorm runs once, on the output channels of a layer."""
    if not isinstance(norm, NORMS) or seen.calls[norm] != 1:
        return False
    dims = seen.dims.get(layer, layer.weight.dim())
    flat = isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d)
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return not flat and dims == layer.weight.dim() and norm.num_features == channels


def _is_end(user: Any) -> bool:
    return user == "output of the model" or getattr(user, "op", None) == "output"


@dataclass(frozen=True)
class Silenced:
    """What has to be zero, beside the weight, for an output channel to be silent.

    Args:
        parts: parameters and the entries of each that belong to the weight's channels, start and stop.
        skipped: full parameter name -> why it is left alone.
        outputs: whether the channels are outputs of the model.
    """

    parts: tuple[tuple[Target, int, int], ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    outputs: bool = False


def companions(
    model: nn.Module, targets: Sequence[Target], x: Any = None, exclude: str | Sequence[str] = ()
) -> dict[str, Silenced]:
    """Biases, and gamma and beta of the BatchNorm layers that directly follow, of every target.

    Args:
        model: the model the targets belong to.
        targets: weights.
        x: one input, to see what follows what; None reads the code.
        exclude: patterns of layer names that are left alone.

    Returns:
        Target key -> its companions.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> [part.key for part, _, _ in companions(net, find(net))["0.weight"].parts]
        ['0.bias', '1.weight', '1.bias']
    """
    followed = followers(model, x)
    modules = {clean(name): m for name, m in model.named_modules(remove_duplicate=False)}
    names = {m: clean(name) for name, m in model.named_modules()}
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    found = {}
    for target in targets:
        places = [target, *(_elsewhere(target, key, modules) for key in target.aliases)]
        parts: dict[str, tuple[Target, int, int]] = {}
        skipped = {}
        for place in places:
            own = bias_part(place)
            if own is not None:
                bias = Target(place.name, place.module, own.name, Axes(0, None))
                parts[bias.key] = (bias, own.start, own.stop)
            for norm in followed.get(place.module, Followed()).norms:
                for param in (p for p in ("weight", "bias") if norm._parameters.get(p) is not None):
                    scale = Target(names[norm], norm, param, Axes(0, None))
                    parts[scale.key] = (scale, 0, scale.weight.numel())
        for key, (part, _, _) in list(parts.items()):
            blocked = [p for p in patterns if matches(p, part.name, key)]
            if blocked:
                del parts[key]
                skipped[key] = f"excluded by {blocked[0]!r}: channels of {target.key} are not quite silent"
        last = any(followed.get(p.module, Followed()).last for p in places)
        found[target.key] = Silenced(tuple(parts.values()), skipped, last)
    return found


def _elsewhere(target: Target, key: str, modules: Mapping[str, nn.Module]) -> Target:
    """The same weight under another name."""
    name = key[: -len(target.param) - 1] if key.endswith(f".{target.param}") else ""
    return Target(name, modules.get(name, target.module), target.param, target.axes)


def silent(part: tuple[Target, int, int], kept: Tensor) -> Tensor:
    """The mask of a companion.

    Args:
        part: of ``Silenced.parts``.
        kept: bool, of every index of the weight's output axis.

    Returns:
        Bool tensor like the parameter, True = kept. A grouped transposed weight has one index for a channel of each
        group.

    Examples:
        >>> net = nn.Linear(1, 2)
        >>> silent(companions(net, find(net))["weight"].parts[0], torch.tensor([True, False]))
        tensor([ True, False])
    """
    target, start, stop = part
    mask = torch.ones(target.weight.numel(), dtype=torch.bool, device=kept.device)
    mask[start:stop] = kept.repeat((stop - start) // len(kept))
    return mask.view(target.weight.shape)
