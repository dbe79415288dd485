"""One row per technique: what was done, how many bytes it takes, what it costs in output error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NAN = float("nan")


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
