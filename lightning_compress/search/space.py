"""What may be chosen: a gene for every layer and setting, and what a genome says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from lightning_compress.functional.tradeoff import Floats
from lightning_compress.names import lookup, matches
from lightning_compress.pipelines.config import CompressionConfig
from lightning_compress.pipelines.keys import check_keys
from lightning_compress.pruning.units import units
from lightning_compress.tables import listing
from lightning_compress.targets import find

Genome = tuple[float, ...]
Settings = dict[str, dict[str, float]]  # layer or unit -> setting -> value

# setting -> smallest and largest value allowed, and whether it is an integer; the weakest value comes first
_ALLOWED: dict[str, tuple[float, float, bool]] = {
    "rank_ratio": (1.0, 0.001, False),
    "sparsity": (0.0, 0.999, False),
    "clusters": (65536, 2, True),
    "bits": (16, 1, True),
    "keep": (1, 0, True),
}
KINDS = tuple(_ALLOWED)
_DEFAULTS = {"rank_ratio": (0.1, 1.0), "sparsity": (0.0, 0.95), "clusters": (2, 256), "bits": (2, 8)}
_OF_TYPE = {
    "low_rank": ("rank_ratio",),
    "pruning": ("sparsity",),
    "wanda": ("sparsity",),
    "weight_sharing": ("clusters",),
    "mixed_precision": ("bits",),
    "hybrid": ("sparsity", "bits"),
}


@dataclass(frozen=True)
class Gene:
    """One setting of one layer.

    Args:
        layer: full name of the weight; of a unit for "keep".
        kind: "rank_ratio", "sparsity", "clusters", "bits" or "keep".
        values: a real gene's smallest and largest value; otherwise all values, in rising order, and the gene is a
            position among them.
        real: whether any number between two values may be taken.
    """

    layer: str
    kind: str
    values: tuple[float, ...]
    real: bool

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest number that the gene may be."""
        return (self.values[0], self.values[-1]) if self.real else (0.0, len(self.values) - 1.0)

    def value(self, number: float) -> float:
        """What a number means."""
        return number if self.real else self.values[int(number)]

    def at(self, strength: float) -> float:
        """The number at a strength in [0, 1], from the weakest to the strongest value."""
        low, high = self.bounds
        rising = _ALLOWED[self.kind][0] < _ALLOWED[self.kind][1]
        return self.tidy(low + (strength if rising else 1 - strength) * (high - low))

    def tidy(self, number: float) -> float:
        """The number that is stored: reals with four decimals."""
        return round(float(number), 4) if self.real else float(round(number))


@dataclass(frozen=True)
class Space:
    """All genes of a model.

    Args:
        genes: in order.
    """

    genes: tuple[Gene, ...]

    @property
    def low(self) -> Floats:
        """Smallest number of every gene [L]."""
        return np.array([gene.bounds[0] for gene in self.genes])

    @property
    def high(self) -> Floats:
        """Largest number of every gene [L]."""
        return np.array([gene.bounds[1] for gene in self.genes])

    @property
    def integer(self) -> Any:
        """Which genes are integers [L]."""
        return np.array([not gene.real for gene in self.genes])

    def tidy(self, numbers: Floats) -> Genome:
        """A genome from numbers."""
        return tuple(gene.tidy(number) for gene, number in zip(self.genes, numbers, strict=True))

    def random(self, rng: np.random.Generator) -> Genome:
        """A genome with every gene drawn uniformly from its range."""
        low, high, integer = self.low, self.high, self.integer
        real = low + rng.random(len(low)) * (high - low)
        whole = np.floor(low + rng.random(len(low)) * (high - low + 1))
        return self.tidy(np.where(integer, np.minimum(whole, high), real))

    def settings(self, genome: Genome) -> Settings:
        """What a genome says of every layer; settings that change nothing (no zeros, full rank) are left out."""
        found: Settings = {}
        for gene, number in zip(self.genes, genome, strict=True):
            value = gene.value(number)
            if value != _ALLOWED[gene.kind][0] or gene.kind in ("bits", "clusters"):
                found.setdefault(gene.layer, {})[gene.kind] = value
        return found

    def describe(self) -> list[list[Any]]:
        """The genes as JSON values."""
        return [[gene.layer, gene.kind, list(gene.values), gene.real] for gene in self.genes]


def space_of(
    model: nn.Module, table: Mapping[str, Mapping[str, Any]] | CompressionConfig, x: Any = None
) -> Space:
    """The genes of a model.

    Args:
        model: any module.
        table: layer name or pattern -> setting -> range: ``(low, high)``, or three values or more to choose from.
            Settings: sparsity, bits, rank_ratio, clusters; ``keep: true`` for blocks that may be left out. A layer
            takes the entry of its own name, else the first pattern that fits, else "*"; without one it stays as it is.
            A configuration names settings by its compression types.
        x: an input, to find blocks by.

    Returns:
        The space.

    Raises:
        ValueError: an entry that fits nothing, an unknown setting, a range out of bounds, bits beside clusters, or no
            gene at all.

    Examples:
        >>> from lightning_compress.search import space_of
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> space = space_of(net, {"0": {"bits": (2, 4)}, "*": {"sparsity": (0, 0.9)}})
        >>> [(gene.layer, gene.kind, gene.values) for gene in space.genes]
        [('0.weight', 'bits', (2, 3, 4)), ('1.weight', 'sparsity', (0.0, 0.9))]
    """
    rows = _table(table) if isinstance(table, CompressionConfig) else table
    if not isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows.values()):
        raise ValueError(f"a space is a mapping: layer -> setting -> range, not {table!r:.80}.")
    for pattern, row in rows.items():
        check_keys(row, KINDS, f"space[{pattern!r}]")
    targets = find(model, [*rows] or "*")
    blocks = list(units(model, "block", x)[0]) if any("keep" in row for row in rows.values()) else []
    names = [name for t in targets for name in (t.name, t.key)]
    for pattern, row in rows.items():
        among = blocks if set(row) == {"keep"} else names
        if pattern != "*" and not any(pattern == n or matches(pattern, n) for n in among):
            what = "block that can be left out" if among is blocks else "layer"
            raise ValueError(f"space has {pattern!r}, which fits no {what}; these are: {listing(among)}.")
    genes = []
    for block in blocks:
        if (lookup({p: row for p, row in rows.items() if "keep" in row}, block) or {}).get("keep"):
            genes.append(Gene(block, "keep", (0, 1), False))
    for t in targets:
        row = lookup({p: row for p, row in rows.items() if set(row) != {"keep"}}, t.name, t.key) or {}
        if {"bits", "clusters"} <= set(row):
            raise ValueError(
                f"{t.key} has both bits and clusters: a weight is quantized or shared, give one."
            )
        for kind in KINDS:
            if kind in row and kind != "keep":
                genes.append(_gene(t.key, kind, row[kind], "sparsity" in row))
    if {"bits", "clusters"} <= {gene.kind for gene in genes}:
        raise ValueError(
            "the space has bits and clusters: weights are quantized or shared, give one of them."
        )
    if not genes:
        raise ValueError("the space has no gene: give at least one layer a setting with a range.")
    return Space(tuple(genes))


def _table(config: CompressionConfig) -> dict[str, dict[str, Any]]:
    kinds = {kind for name in config.compression_types for kind in _OF_TYPE.get(name, ())}
    kinds = kinds or {"sparsity", "bits"}
    if "clusters" in kinds:
        kinds.discard("bits")
    return {"*": {kind: _DEFAULTS[kind] for kind in KINDS if kind in kinds}}


def _gene(layer: str, kind: str, given: Any, masked: bool) -> Gene:
    first, last, integer = _ALLOWED[kind]
    least, most = min(first, last), max(first, last)
    if kind == "bits" and masked:
        least = 2  # one bit has no zero
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        raise ValueError(
            f"{kind}={given!r} for {layer}: give (low, high), or three values or more to choose from."
        )
    values = sorted(given)
    if not least <= values[0] < values[-1] <= most or (integer and any(v != int(v) for v in values)):
        what = "integers" if integer else "numbers"
        raise ValueError(f"{kind}={given!r} for {layer}: allowed are different {what} in [{least}, {most}].")
    if len(given) > 2:
        return Gene(layer, kind, tuple(values), False)
    if not integer:
        return Gene(layer, kind, (float(values[0]), float(values[1])), True)
    low, high = int(values[0]), int(values[1])
    if kind == "clusters":  # equal steps of the logarithm
        steps = np.geomspace(low, high, max(2, round(2 * np.log2(high / low)) + 1))
        return Gene(layer, kind, tuple(sorted({round(v) for v in steps})), False)
    return Gene(layer, kind, tuple(range(low, high + 1)), False)
