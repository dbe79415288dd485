"""What `compress_to` returns: the compressed model, what was asked for, what was reached, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_compress import tables
from lightning_compress.compress import Result
from lightning_compress.pipelines.limits import BOUNDS
from lightning_compress.transform import Transform


@dataclass(frozen=True)
class Trial:
    """One strength that was tried.

    Args:
        strength: of all free knobs, in [0, 1].
        smooth: of those that change sizes smoothly; less than ``strength`` if they were turned back.
        reached: "file_bytes", "size_fraction", and "error" and "accuracy_drop" where they decide.
        met: whether the targets that decide are.
    """

    strength: float
    smooth: float
    reached: dict[str, float]
    met: bool


@dataclass(frozen=True)
class Stage:
    """The model after one step.

    Args:
        name: of the transform.
        file_bytes: length of the archive.
        sparsity: share of zeros.
        mean_bits: bits of the archive for each real number of the original.
        error: output error against the original; NaN if it was not measured.
    """

    name: str
    file_bytes: int
    sparsity: float
    mean_bits: float
    error: float


@dataclass(frozen=True)
class TargetResult(Result):
    """A ``Result`` with its targets.

    Args:
        transforms: what was applied, with the options that were found.
        target: the targets, by the names of ``compress_to``.
        reached: "file_bytes" (``save(model, path, coder=coder)`` writes a file of this length), "size_fraction", and
            "error" and "accuracy_drop" where they were measured.
        target_met: whether every target is.
        strength: of all free knobs; None if none was turned.
        smooth: of those that change sizes smoothly.
        evaluations: every strength that was tried, in order.
        stages: the model after each step.
        dense_bytes: of the original: 4 x real numbers.
        coder: entropy coder that ``file_bytes`` is for.
        elapsed_time: seconds.
        notes: settings that mean nothing here, and transforms that found nothing to change, with the reason.
    """

    transforms: tuple[Transform, ...]
    target: dict[str, float]
    reached: dict[str, float]
    target_met: bool
    strength: float | None
    smooth: float | None
    evaluations: tuple[Trial, ...]
    stages: tuple[Stage, ...]
    dense_bytes: int
    coder: str
    elapsed_time: float
    notes: tuple[str, ...] = ()

    @property
    def stats(self) -> dict[str, Any]:
        """The result in numbers; ``compression_ratio`` is above 1 for a smaller file."""
        size = int(self.reached["file_bytes"])
        return {
            "original_size": self.dense_bytes,
            "compressed_size": size,
            "compression_ratio": self.dense_bytes / size,
            "size_fraction": self.reached["size_fraction"],
            "elapsed_time": self.elapsed_time,
            "techniques_applied": [step.name for step in self.steps],
            "target_met": self.target_met,
        }

    @property
    def report(self) -> str:
        """Targets and what was reached, the stages, what was tried, and the tables of ``Result``."""
        done = (
            f"{int(self.reached['file_bytes']):,} bytes, {self.reached['size_fraction']:.4f} of dense float32"
        )
        asked = [[name, value, self.reached[BOUNDS[name]]] for name, value in self.target.items()]
        stages = [[s.name, s.file_bytes, s.sparsity, s.mean_bits, s.error] for s in self.stages]
        columns = ("file_bytes", "error", "accuracy_drop")
        tried = [
            [t.strength, t.smooth, *(t.reached.get(c) for c in columns), t.met] for t in self.evaluations
        ]
        parts = [f"{done}; target {'met' if self.target_met else 'NOT met'}" if self.target else done]
        if asked:
            parts.append(tables.text(["target", "asked", "reached"], asked))
        parts.append(tables.text(["stage", "file bytes", "sparsity", "mean bits", "error"], stages))
        if tried:
            parts.append(
                tables.text(["strength", "smooth", "file bytes", "error", "accuracy drop", "met"], tried)
            )
        return "\n\n".join([*parts, *self.notes, super().report])
