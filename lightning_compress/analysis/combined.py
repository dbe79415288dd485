"""Pipelines of several techniques: which ones, made from what the single techniques have shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from lightning_compress.analysis.outcome import best_row, knee_row
from lightning_compress.analysis.rows import Row
from lightning_compress.analysis.techniques import Grid, Technique, catalogue
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.rate_distortion import RateDistortionQuantize
from lightning_compress.transform import Transform

LIMIT = 0.10  # of the output error, for the parts of a pipeline


def pipelines(
    rows: Sequence[Row],
    every: Mapping[str, Technique],
    groups: Collection[str],
    student_ratios: Sequence[float],
    seed: int = 0,
) -> list[Technique]:
    """The combined pipelines whose parts are known and belong to some groups.

    1. ``minimal_loss``: 30 % of the weights to zero, then int8.
    2. ``hardware``: 30 % of the channels removed, then 6-bit powers of two.
    3. ``maximum``: the smallest student, then int8.
    4. ``deep_compression``: pruning as in the best pruning row with an error up to 10 %, then 16 shared values.
    5. ``knee_pair``: the pruning and the quantization whose ratios are nearest to that of the knee.
    6. ``best_of_groups``: student, pruning and quantization of the best rows with an error up to 10 %.

    Args:
        rows: of the single techniques.
        every: the single techniques by name.
        groups: of the techniques that may be parts.
        student_ratios: sizes of students.
        seed: of the analysis.

    Returns:
        Techniques of the group "combined", with their ``parts``.

    Examples:
        >>> from lightning_compress.analysis.combined import pipelines
        >>> found = pipelines([], {}, ["pruning", "quantization"], [])
        >>> [technique.name for technique in found]
        ['minimal_loss', 'hardware']

    Source: Han et al. 2016, Deep Compression (4).
    """
    fixed = catalogue(Grid((0.3,), (8,), (6,), (), (), (16,), (), (), student_ratios), seed)
    int8, smallest = fixed["quantized_weights_int8"], min(student_ratios, default=None)
    students = [t for t in fixed.values() if t.student is not None and t.student == smallest]

    def best(group: str) -> Technique | None:
        found = best_row([row for row in rows if row.group == group and row.name in every], LIMIT)
        return None if found is None else every[found.name]

    def near_knee(group: str) -> Technique | None:
        knee = knee_row(rows)
        fit = [row for row in rows if row.group == group and row.status == "ok" and row.name in every]
        if knee is None or not fit:
            return None
        ratio = knee.compression_ratio
        return every[min(fit, key=lambda row: (abs(row.compression_ratio - ratio), row.name)).name]

    parts: dict[str, Sequence[Technique | None]] = {
        "minimal_loss": [fixed["pruned_magnitude_0.3"], int8],
        "hardware": [fixed["pruned_structured_0.3"], fixed["quantized_log2_6bit"]],
        "maximum": [students[0] if students else None, int8],
        "deep_compression": [best("pruning"), fixed["clustered_16"]],
        "knee_pair": [near_knee("pruning"), near_knee("quantization")],
        "best_of_groups": [best("students"), best("pruning"), best("quantization")],
    }
    found = []
    for name, wanted in parts.items():
        known = [part for part in wanted if part is not None]
        if len(known) > 1 and all(part.group in groups for part in known):
            complete = name == "best_of_groups" or len(known) == len(wanted)
            found += [joined(name, known)] if complete else []
    return found


def joined(name: str, parts: Sequence[Technique]) -> Technique:
    """One technique that does what several do, in order.

    Args:
        name: of the row.
        parts: a student, if there is one, first.

    Returns:
        The technique.
    """
    whole = _shared_bits([t for part in parts for t in part.transforms])
    instead = _shared_bits([t for part in parts for t in (part.instead or part.transforms)])
    return Technique(
        name,
        "combined",
        {part.name: part.parameters for part in parts},
        whole,
        instead if any(part.instead for part in parts) else (),
        student=next((part.student for part in parts if part.student is not None), None),
        runs=any(part.runs for part in parts),
        parts=tuple(parts),
    )


def _shared_bits(transforms: Sequence[Transform]) -> tuple[Transform, ...]:
    """The same; where weights are zeroed first, bits per weight count for those that are left."""
    left, found = 1.0, []
    for transform in transforms:
        if isinstance(transform, Prune) and isinstance(transform.sparsity, float):
            left *= 1 - transform.sparsity
        if isinstance(transform, RateDistortionQuantize):
            transform = replace(transform, bits=transform.bits * left)
        found.append(transform)
    return tuple(found)
