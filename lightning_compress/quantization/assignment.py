"""Which layer gets how many bits: by name, by pattern, by what kind of layer it is, first and last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.names import clean, matches
from lightning_compress.stats.running import call, observing
from lightning_compress.tables import listing
from lightning_compress.targets import Target

# more telling kinds first
KINDS = ("output", "attention", "ffn", "spectral", "embedding", "conv", "linear")
_CONVS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def execution_order(model: nn.Module, targets: Sequence[Target], example: Any) -> list[Target]:
    """The targets in the order in which their layers first run.

    Args:
        model: any module; it is left as it was.
        targets: weights.
        example: one input; None keeps the order of ``model.named_parameters()``.

    Returns:
        All targets; those whose layer never runs come last.

    Examples:
        >>> from lightning_compress import find
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)
        ...     def forward(self, x):
        ...         return self.last(self.first(x))
        >>> [t.name for t in execution_order(Net(), find(Net()), None)]
        ['last', 'first']
        >>> net = Net()
        >>> [t.name for t in execution_order(net, find(net), torch.ones(1, 4))]
        ['first', 'last']
    """
    if example is None:
        return list(targets)
    order: dict[int, int] = {}

    def ran(module: nn.Module, _: Any) -> None:
        order.setdefault(id(module), len(order))

    with observing(model):
        handles = [
            module.register_forward_pre_hook(ran)
            for module in {id(t.module): t.module for t in targets}.values()
        ]
        try:
            call(model, example)
        finally:
            for handle in handles:
                handle.remove()
    return sorted(targets, key=lambda t: order.get(id(t.module), len(order)))


def kinds_of(model: nn.Module, targets: Sequence[Target], last: Target | None = None) -> dict[str, set[str]]:
    """What kinds of layer the targets belong to.

    ``attention``: projections of an attention module; ``ffn``: other linear layers of a block that has attention, or
    names that match ``*ffn*`` or ``*mlp*``; ``output``: the last executed target; the others by type.

    Args:
        model: the module the targets belong to.
        targets: weights.
        last: the last executed target.

    Returns:
        Target key -> some of ``KINDS``.

    Examples:
        >>> from lightning_compress import find
        >>> block = nn.TransformerEncoderLayer(8, 2, 16)
        >>> kinds = kinds_of(block, find(block))
        >>> {key.split(".")[0]: sorted(kind) for key, kind in kinds.items()}
        {'self_attn': ['attention', 'linear'], 'linear1': ['ffn', 'linear'], 'linear2': ['ffn', 'linear']}
    """
    attentive = {
        clean(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) or "attention" in type(module).__name__.lower()
    }
    blocks = {name.rpartition(".")[0] for name in attentive}
    found: dict[str, set[str]] = {}
    for t in targets:
        ancestors = _ancestors(t.name)
        linear = isinstance(t.module, nn.Linear | nn.Bilinear | nn.MultiheadAttention)
        kinds = {
            "output": last is not None and t.key == last.key,
            "attention": linear and any(name in attentive for name in (t.name, *ancestors)),
            "spectral": t.weight.is_complex(),
            "embedding": isinstance(t.module, nn.Embedding | nn.EmbeddingBag),
            "conv": isinstance(t.module, _CONVS),
            "linear": linear,
        }
        beside = ancestors[:1] and ancestors[0] in blocks
        kinds["ffn"] = (
            linear
            and not kinds["attention"]
            and (bool(beside) or matches("*ffn*", t.name.lower()) or matches("*mlp*", t.name.lower()))
        )
        found[t.key] = {kind for kind, holds in kinds.items() if holds}
    return found


def _ancestors(name: str) -> list[str]:
    """Names of the modules around a layer, the nearest first; "" is the model."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)] if name else []


def assign(
    table: Mapping[str, int], targets: Sequence[Target], kinds: Mapping[str, set[str]], option: str
) -> dict[str, int]:
    """Bits of every target: exact name > first pattern that fits > kind > "*".

    Args:
        table: name, pattern or kind -> bits.
        targets: weights.
        kinds: target key -> kinds.
        option: name of the option, for errors.

    Returns:
        Target key -> bits; targets that nothing fits are missing.

    Raises:
        ValueError: an entry of the table that no target uses.

    Examples:
        >>> from lightning_compress import find
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2), nn.Linear(2, 2))
        >>> assign({"linear": 4, "2": 8, "*": 6}, find(net), kinds_of(net, find(net)), "bits")
        {'0.weight': 6, '1.weight': 4, '2.weight': 8}
    """
    used: set[str] = set()
    bits: dict[str, int] = {}
    for t in targets:
        exact = [name for name in (t.name, t.key) if name in table]
        patterns = [p for p in table if p != "*" and p not in KINDS and matches(p, t.name, t.key)]
        by_kind = [kind for kind in KINDS if kind in table and kind in kinds[t.key]]
        fits = [*exact, *patterns, *by_kind, *(["*"] if "*" in table else [])]
        used.update(fits)
        if fits:
            bits[t.key] = table[fits[0]]
    unused = [entry for entry in table if entry not in used and not (entry == "*" and targets)]
    if unused:
        raise ValueError(
            f"{option} has {unused[0]!r}, which fits no layer to quantize; allowed are names and patterns of: "
            f"{listing([t.name or t.key for t in targets])}; kinds: {', '.join(KINDS)}; and '*'."
        )
    return bits
