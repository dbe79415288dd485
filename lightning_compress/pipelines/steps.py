"""Transforms by name: ``{"Prune": {"sparsity": 0.8}}`` and the like, checked against what a transform takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_compress.batchnorm import ReestimateBatchNorm
from lightning_compress.cgp.layers.weights import EvolveWeights
from lightning_compress.compress import check_order
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.lowrank import Factorize, MergeFactors
from lightning_compress.names import resolve
from lightning_compress.pipelines.keys import check_keys, unknown
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.pruning.fourier import PartialFourier
from lightning_compress.pruning.layers import DropLayers
from lightning_compress.pruning.modes import TruncateModes
from lightning_compress.pruning.patterns import NM, pattern
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.quantization.rate_distortion import RateDistortionQuantize
from lightning_compress.sharing import ShareWeights
from lightning_compress.transform import OrderError, Transform

# Where each method stands when only names are given; a method that is not listed stands with its stage.
_ORDER: tuple[tuple[type[Transform], ...], ...] = (
    (DropLayers, TruncateModes, PartialFourier, MergeFactors, RemoveChannels),
    (FuseBatchNorm, ReestimateBatchNorm),
    (Factorize,),
    (Prune,),
    (ShareWeights,),
    (Quantize, RateDistortionQuantize),
    (EvolveWeights,),
)
_STAGES = {"structure": 2, "fusion": 1, "mask": 3, "grid": 5}


@dataclass(frozen=True)
class Written:
    """A transform, and which of its options somebody wrote.

    Args:
        transform: with all its options.
        given: names of the options that were written; the others have their defaults.
    """

    transform: Transform
    given: frozenset[str]


def read(entry: Any) -> Written:
    """A transform from one entry of a list.

    Args:
        entry: a transform; its class or name; ``{name: options}``; or ``{"class_path": name, "init_args": options}``.
            Case does not count in names; a dotted name is imported.

    Returns:
        The transform, and the options that were given.

    Raises:
        ValueError: an unknown name or option, with the nearest known one; a value out of range.

    Examples:
        >>> from lightning_compress.pipelines.steps import read
        >>> read({"Prune": {"sparsity": 0.8}}).transform == Prune(0.8)
        True
        >>> read({"Prune": {"sparsty": 0.8}})
        Traceback (most recent call last):
            ...
        ValueError: Prune: unknown key 'sparsty'; did you mean 'sparsity'? Allowed: sparsity, criterion, scope, ...
    """
    if isinstance(entry, Transform):
        defaults = type(entry)()
        names = [f.name for f in dataclasses.fields(entry)]  # type: ignore[arg-type]
        given = {name for name in names if getattr(entry, name) != getattr(defaults, name)}
        return Written(entry, frozenset(given))
    name, options = _split(entry)
    kind = _kind(name)
    allowed = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    check_keys(options, allowed, kind.__name__)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return Written(kind(**values), frozenset(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind.__name__}: {error}") from None


def read_all(entries: Any) -> list[Written]:
    """Transforms from a list of entries, in its order; bare names alone are put in the canonical order.

    Canonical: layers, modes and channels go; BatchNorm is folded; factors; zeros; shared or quantized values.

    Args:
        entries: see `read`; one entry may stand alone.

    Returns:
        The transforms in the order in which they are applied.

    Raises:
        ValueError: an entry cannot be used.
        OrderError: one would spoil what an earlier one left.

    Examples:
        >>> from lightning_compress.pipelines.steps import read_all
        >>> [type(w.transform).__name__ for w in read_all(["quantize", "prune"])]
        ['Prune', 'Quantize']
    """
    listed = [entries] if isinstance(entries, str | type | Mapping | Transform) else entries
    if not isinstance(listed, Iterable):
        raise ValueError(f"transforms is {entries!r}: give a list, such as [{{Prune: {{sparsity: 0.8}}}}].")
    listed = list(listed)
    found = [read(entry) for entry in listed]
    if all(isinstance(entry, str | type) for entry in listed):
        found.sort(key=lambda written: _place(written.transform))
    check([written.transform for written in found])
    return found


def check(transforms: Sequence[Transform], model: nn.Module | None = None) -> None:
    """Refuse an order in which a method would spoil what an earlier one left.

    Besides what each transform refuses by itself: channels cannot go after zeros in the pattern N:M.

    Args:
        transforms: what is to be applied, in order.
        model: a model whose own steps come first.

    Raises:
        OrderError: with both methods and the reason.

    Examples:
        >>> from lightning_compress.pipelines.steps import check
        >>> check([Quantize(4), Prune(0.5)])
        Traceback (most recent call last):
            ...
        lightning_compress.transform.OrderError: Prune after Quantize is refused: ...
    """
    check_order(transforms, nn.Module() if model is None else model)
    patterned = ""
    for transform in transforms:
        if isinstance(transform, RemoveChannels) and patterned:
            raise OrderError(
                f"RemoveChannels after Prune(pattern={patterned!r}) is refused: where channels go, n of every m does "
                "not hold any more; remove channels first."
            )
        if isinstance(transform, Prune) and isinstance(pattern(transform.pattern), NM):
            patterned = str(transform.pattern)


def _place(transform: Transform) -> int:
    listed = (i for i, kinds in enumerate(_ORDER) if isinstance(transform, kinds))
    return next(listed, _STAGES.get(transform.stage, 2))


def _split(entry: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and options of an entry."""
    if isinstance(entry, type) and issubclass(entry, Transform):
        return entry.__name__, {}
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and "class_path" in entry:
        check_keys(entry, ["class_path", "init_args"], str(entry["class_path"]))
        name, options = entry["class_path"], entry.get("init_args")
    elif isinstance(entry, Mapping) and len(entry) == 1:
        [(name, options)] = entry.items()
    else:
        raise ValueError(
            f"{entry!r:.100} is no transform: write a name, {{name: {{option: value}}}}, or class_path and init_args."
        )
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ValueError(f"{name}: options are {options!r:.60}; needed is a mapping from option to value.")
    return str(name), options


def _kind(name: str) -> type[Transform]:
    """The class that a name means."""
    head, _, last = name.rpartition(".")
    known = {n: kind for n, kind in Transform.registry.items() if not n.startswith("_")}
    if head and head.split(".")[0] != __name__.split(".")[0]:
        kind: Any = resolve(name, {}, "class_path")
        if not (isinstance(kind, type) and issubclass(kind, Transform)):
            raise ValueError(f"{name} is no Transform.")
        found: type[Transform] = kind
        return found
    plain = {n.lower(): kind for n, kind in known.items()}
    key = last.lower().replace("_", "").replace("-", "")
    if key not in plain:
        raise ValueError(unknown(last, sorted(known), "unknown transform"))
    return plain[key]
