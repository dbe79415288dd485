"""One row per technique: what was done, how many bytes it takes, what it costs in output error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NAN = float("nan")


def plain(value: Any) -> Any:
    """JSON values: tuples become lists, NaN and infinity, which JSON lacks, null.

    Args:
        value: numbers, strings, None, and mappings and sequences of them.

    Returns:
        What ``json.dumps(..., allow_nan=False)`` takes.

    Examples:
        >>> from lightning_compress.analysis.rows import plain
        >>> plain({"ber": float("nan"), "thresholds": (0.1, 0.2)})
        {'ber': None, 'thresholds': [0.1, 0.2]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Row:
    """One technique at one strength, measured on a model that exists; what cannot be measured is NaN, with a reason.

    Args:
        name: of the row and of its file.
        group: "pruning", "quantization", "sharing", "lowrank", "students" or "combined".
        parameters: options of the technique, JSON values.
        status: "ok", "failed" or "skipped".
        reason: why it failed, was skipped, or has a NaN; "" otherwise.
        file_bytes: length of its archive; 0 if there is none.
        dense_bytes: of the original model as float32.
        sparsity: zeros / elements of the targets.
        nonzero: elements of the targets that are not zero.
        bits_mean: bits of a weight under its code, before entropy coding.
        params: real numbers of all parameters.
        macs: multiply-accumulates for one input; NaN without an input.
        weight_sqnr_db: 10 log10(Σ|w|² / Σ|w − ŵ|²) over targets in both models; NaN where the structure differs.
        weight_relative_error: sqrt(Σ|w − ŵ|² / Σ|w|²), likewise.
        ber: output error rate against the original.
        ber_se: its standard error.
        ber_low: lower end of its 95 % interval.
        ber_high: upper end.
        agreement: 1 − ber for classification, NaN otherwise.
        n_samples: inputs that were used.
        inputs: where they came from.
        seconds: that the technique took.
        coverage: share of the model's bytes that were changed.
        product_of_ratios: of a combined pipeline: what multiplying the ratios of its parts would have promised.
        pareto: whether it is on the front.
        knee: whether it is the knee.
        seed: of this row.
        metric: of the test data, if there were any.
        metric_change: against the original.
        extra: values of further metrics, by name.
    """

    name: str
    group: str
    parameters: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""
    file_bytes: int = 0
    dense_bytes: int = 0
    sparsity: float = NAN
    nonzero: int = 0
    bits_mean: float = NAN
    params: int = 0
    macs: float = NAN
    weight_sqnr_db: float = NAN
    weight_relative_error: float = NAN
    ber: float = NAN
    ber_se: float = NAN
    ber_low: float = NAN
    ber_high: float = NAN
    agreement: float = NAN
    n_samples: int = 0
    inputs: str = ""
    seconds: float = NAN
    coverage: float = NAN
    product_of_ratios: float = NAN
    pareto: bool = False
    knee: bool = False
    seed: int = 0
    metric: float = NAN
    metric_change: float = NAN
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def compression_ratio(self) -> float:
        """``dense_bytes / file_bytes``; above 1 is smaller; NaN without a file."""
        return self.dense_bytes / self.file_bytes if self.file_bytes else NAN

    @property
    def size_fraction(self) -> float:
        """``file_bytes / dense_bytes``; NaN without a file."""
        return self.file_bytes / self.dense_bytes if self.file_bytes and self.dense_bytes else NAN

    def to_json(self) -> dict[str, Any]:
        """All columns as JSON values; what is unknown is null."""
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        ratios = {"compression_ratio": self.compression_ratio, "size_fraction": self.size_fraction}
        found: dict[str, Any] = plain({**columns, **ratios})
        return found

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Row:
        """Inverse of ``to_json``; null becomes NaN.

        Args:
            value: what ``to_json`` returned.

        Returns:
            The row.

        Examples:
            >>> from lightning_compress.analysis.rows import Row
            >>> Row.from_json(Row("a", "pruning", file_bytes=10, dense_bytes=40).to_json()).compression_ratio
            4.0
        """
        names = {f.name for f in dataclasses.fields(Row)}
        given: dict[str, Any] = {k: NAN if v is None else v for k, v in value.items() if k in names}
        given["extra"] = {k: NAN if v is None else v for k, v in value["extra"].items()}
        return Row(**given)
