"""What an analysis tries: names, groups and the transforms behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.lowrank import Factorize
from lightning_compress.pipelines.keys import nearest, unknown
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.pruning.modes import TruncateModes
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.quantization.rate_distortion import RateDistortionQuantize
from lightning_compress.sharing import ShareWeights
from lightning_compress.transform import Transform

STUDENT = "student_{:g}percent"  # name of a row
GROUPS = ("pruning", "quantization", "sharing", "lowrank", "students")


@dataclass(frozen=True)
class Technique:
    """One row to be.

    Args:
        name: of the row and of its file.
        group: of the row.
        parameters: of the row, JSON values.
        transforms: applied in order.
        instead: what is applied where ``transforms`` are refused or find nothing to change; empty: nothing is.
        student: share of the parameters of a student that is trained first; None starts from the original.
        runs: whether the model must run: with weights alone the row is skipped.
        parts: of a combined pipeline: what it is made of.
    """

    name: str
    group: str
    parameters: dict[str, Any] = field(default_factory=dict)
    transforms: tuple[Transform, ...] = ()
    instead: tuple[Transform, ...] = ()
    student: float | None = None
    runs: bool = False
    parts: tuple[Technique, ...] = ()


@dataclass(frozen=True)
class Grid:
    """How strongly each technique is tried.

    Args:
        pruning_amounts: shares of zeros, in (0, 1).
        quantization_bits: of integers.
        log2_bits: of powers of two.
        minifloat_formats: "e4m3", "e5m2", "e3m4", "e2m1".
        rate_distortion_bits: coded bits per weight.
        cluster_counts: different values of a layer.
        rank_ratios: shares of a layer's parameters that its factors take.
        mode_ratios: shares of the modes of every axis that spectral layers keep.
        student_ratios: shares of the parameters, in (0, 1).
    """

    pruning_amounts: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    quantization_bits: Sequence[int] = (4, 6, 8)
    log2_bits: Sequence[int] = (4, 6, 8)
    minifloat_formats: Sequence[str] = ("e4m3", "e5m2", "e3m4")
    rate_distortion_bits: Sequence[float] = (2.0, 3.0, 4.0)
    cluster_counts: Sequence[int] = (16, 64, 256)
    rank_ratios: Sequence[float] = (0.75, 0.5, 0.25)
    mode_ratios: Sequence[float] = (0.75, 0.5)
    student_ratios: Sequence[float] = (0.25, 0.10, 0.05)


def seed_of(seed: int, name: str) -> int:
    """The seed of a row, which depends on its name and not on the rows before it.

    Args:
        seed: of the analysis.
        name: of the row.

    Returns:
        In [0, 2^31).

    Examples:
        >>> from lightning_compress.analysis.techniques import seed_of
        >>> seed_of(0, "pruned_random_0.5") == seed_of(0, "pruned_random_0.5") != seed_of(1, "pruned_random_0.5")
        True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class _Family:
    """One technique at several strengths; ``name`` is filled with the strength.

    Args:
        group: of the rows.
        option: field of the grid that holds the strengths; "" for one row.
        name: of the rows.
        parameter: what the strength is called.
        make: strength and seed -> transform; None for students.
        runs: whether the model must run.
        instead: strength -> what to do where that is refused.
    """

    group: str
    option: str
    name: str
    parameter: str
    make: Callable[[Any, int], Transform] | None
    runs: bool = False
    instead: Callable[[Any], Transform] | None = None

    def technique(self, value: Any, seed: int) -> Technique:
        """The row of one strength."""
        name = self.name.format(100 * value if self.make is None else value)
        return Technique(
            name,
            self.group,
            {self.parameter: value},
            () if self.make is None else (self.make(value, seed_of(seed, name)),),
            () if self.instead is None else (self.instead(value),),
            student=value if self.make is None else None,
            runs=self.runs,
        )


_AMOUNTS, _BITS = "pruning_amounts", "quantization_bits"
_FAMILIES = {
    "pruned_magnitude": _Family(
        "pruning", _AMOUNTS, "pruned_magnitude_{:g}", "amount", lambda a, _: Prune(a, scope="layer")
    ),
    "pruned_magnitude_global": _Family(
        "pruning", _AMOUNTS, "pruned_magnitude_global_{:g}", "amount", lambda a, _: Prune(a)
    ),
    "pruned_random": _Family(
        "pruning", _AMOUNTS, "pruned_random_{:g}", "amount", lambda a, s: Prune(a, "random", "layer", seed=s)
    ),
    "pruned_structured": _Family(
        "pruning",
        _AMOUNTS,
        "pruned_structured_{:g}",
        "amount",
        lambda a, _: RemoveChannels(a),
        runs=True,
        instead=lambda a: Prune(a, pattern="channel", scope="layer"),
    ),
    "pruned_nm": _Family("pruning", "", "pruned_nm_2_4", "pattern", lambda _, s: Prune(pattern="2:4")),
    "pruned_wanda": _Family(
        "pruning", _AMOUNTS, "pruned_wanda_{:g}", "amount", lambda a, _: Prune(a, "wanda"), runs=True
    ),
    "quantized_static": _Family(
        "quantization",
        _BITS,
        "quantized_static_int{}",
        "bits",
        lambda b, s: Quantize(b, activation_bits=b, seed=s),
        runs=True,
    ),
    "quantized_dynamic": _Family(
        "quantization",
        "",
        "quantized_dynamic_int8",
        "bits",
        lambda _, s: Quantize(8, activation_bits=8, mode="dynamic"),
        runs=True,
    ),
    "quantized_weights": _Family(
        "quantization", _BITS, "quantized_weights_int{}", "bits", lambda b, _: Quantize(b)
    ),
    "quantized_log2": _Family(
        "quantization", "log2_bits", "quantized_log2_{}bit", "bits", lambda b, _: Quantize(b, format="log2")
    ),
    "quantized_minifloat": _Family(
        "quantization", "minifloat_formats", "quantized_{}", "format", lambda f, _: Quantize(format=f)
    ),
    "quantized_rate_distortion": _Family(
        "quantization",
        "rate_distortion_bits",
        "quantized_rate_distortion_{:g}bit",
        "bits",
        lambda b, s: RateDistortionQuantize(b, seed=s),
    ),
    "clustered": _Family(
        "sharing", "cluster_counts", "clustered_{}", "clusters", lambda k, _: ShareWeights(clusters=k)
    ),
    "lowrank": _Family(
        "lowrank", "rank_ratios", "lowrank_{:g}", "params_ratio", lambda r, _: Factorize(params_ratio=r)
    ),
    "truncated_modes": _Family(
        "lowrank",
        "mode_ratios",
        "truncated_modes_{:g}",
        "keep_ratio",
        lambda r, _: TruncateModes(keep_ratio=r),
    ),
    "student": _Family("students", "student_ratios", STUDENT, "ratio", None, runs=True),
}
_SINGLE: dict[str, Any] = {"pruned_nm": "2:4", "quantized_dynamic": 8}  # strength of the families of one row


def catalogue(grid: Grid, seed: int = 0) -> dict[str, Technique]:
    """Every technique by name, in the order of the report.

    Args:
        grid: how strongly each is tried.
        seed: of the analysis.

    Returns:
        Name -> technique.

    Raises:
        ValueError: a value that a method does not allow, or an unknown format; names the technique.

    Examples:
        >>> from lightning_compress.analysis.techniques import Grid, catalogue
        >>> list(catalogue(Grid(pruning_amounts=(), quantization_bits=(8,))))[:3]
        ['pruned_nm_2_4', 'quantized_static_int8', 'quantized_dynamic_int8']
    """
    return {t.name: t for family in _FAMILIES for t in _members(family, grid, seed)}


def choose(techniques: str | Sequence[str], grid: Grid, seed: int = 0) -> dict[str, Technique]:
    """The techniques that some names mean.

    Args:
        techniques: "all"; or names of groups ("pruning"), families ("pruned_magnitude") or techniques.
        grid: how strongly each is tried.
        seed: of the analysis.

    Returns:
        Name -> technique, in the order of the report.

    Raises:
        ValueError: an unknown name, with the nearest ones; a value that a method does not allow.

    Examples:
        >>> from lightning_compress.analysis.techniques import Grid, choose
        >>> list(choose(["sharing", "lowrank_0.5"], Grid()))
        ['clustered_16', 'clustered_64', 'clustered_256', 'lowrank_0.5']
    """
    every = catalogue(grid, seed)
    wanted = [techniques] if isinstance(techniques, str) else list(techniques)
    if "all" in wanted:
        return every
    chosen: set[str] = set()
    for name in wanted:
        if name in GROUPS:
            chosen |= {t.name for t in every.values() if t.group == name}
        elif name in _FAMILIES:
            chosen |= {t.name for t in _members(name, grid, seed)}
        elif name in every:
            chosen.add(name)
        else:
            near = nearest(name, every)  # of so many names only the nearest
            names = ["all", *GROUPS, *_FAMILIES, *([near] if near else [])]
            raise ValueError(unknown(name, names, "unknown technique"))
    return {name: t for name, t in every.items() if name in chosen}


def _members(name: str, grid: Grid, seed: int) -> Iterator[Technique]:
    family = _FAMILIES[name]
    values: Sequence[Any] = getattr(grid, family.option) if family.option else [_SINGLE[name]]
    for value in values:
        try:
            if family.option in ("pruning_amounts", "student_ratios") and not 0 < value < 1:
                raise ValueError("allowed is 0 < value < 1.")
            yield family.technique(value, seed)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{family.option}: {value!r} is not possible: {error}") from None
