"""Made-up outcomes of analyses, for texts, figures and pages: rows with every oddity that a real sweep can show."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lightning_compress.analysis.outcome import About, Outcome, marked
from lightning_compress.analysis.rows import Row

NAN = float("nan")
DENSE = 246_824
INPUTS = (
    "synthetic: normal, 1000 inputs, seed 0 (neither coordinates, nor an operator, nor BatchNorm statistics)"
)


def about(**changed: Any) -> About:
    facts: dict[str, Any] = {
        "model": "LeNet5",
        "params": 61_706,
        "dense_bytes": DENSE,
        "file_bytes": 228_331,
        "macs": 416_520.0,
        "task": "classification",
        "task_reason": "10 outputs, arg max",
        "inputs": INPUTS,
        "n_samples": 1000,
        "thresholds": (0.0005, 0.01, 0.05, 0.1, 0.2, 0.3),
        "versions": {"torch": "2.5.1"},
        "machine": "2 threads, cpu",
    }
    return About(**(facts | changed))


def row(name: str, group: str, ratio: float, error: float, **more: Any) -> Row:
    se = math.sqrt(max(0.0, error * (1 - min(error, 1.0))) / 1000)
    facts: dict[str, Any] = {
        "file_bytes": int(DENSE / ratio),
        "dense_bytes": DENSE,
        "nonzero": 40_000,
        "bits_mean": 8.0,
        "params": 61_706,
        "macs": 416_520.0,
        "weight_sqnr_db": 30 - 20 * error,
        "weight_relative_error": 0.003 + 1.3 * error,
        "ber": error,
        "ber_se": se,
        "ber_low": max(0.0, error - 2 * se),
        "ber_high": error + 2 * se,
        "agreement": 1 - error,
        "n_samples": 1000,
        "inputs": INPUTS,
        "seconds": 1.25,
        "coverage": 0.99,
    }
    return Row(name, group, **(facts | more))


def many(scale: float = 1.0) -> list[Row]:
    """56 rows; errors times a scale."""
    rows = []
    kinds = {"magnitude": 0.25, "magnitude_global": 0.2, "random": 1.0, "structured": 0.7, "wanda": 0.22}
    for kind, harm in kinds.items():
        for a in (0.1, 0.3, 0.5, 0.7, 0.9):
            error = round(min(1.0, harm * a**3) * scale, 6)
            more = {"parameters": {"amount": a}, "sparsity": 0.95 * a if kind == "structured" else a}
            rows.append(row(f"pruned_{kind}_{a}", "pruning", 1.05 / (1 - 0.97 * a), error, **more))
    rows.append(
        row("pruned_nm_2_4", "pruning", 1.75, 0.03 * scale, parameters={"pattern": "2:4"}, sparsity=0.5)
    )
    for bits in (4, 6, 8):
        for kind, times in (("static_int{}", 34.0), ("weights_int{}", 35.0), ("log2_{}bit", 40.0)):
            name = f"quantized_{kind.format(bits)}"
            rows.append(row(name, "quantization", times / bits, round(0.3 * scale / 2 ** (bits - 3), 6)))
    rows.append(row("quantized_dynamic_int8", "quantization", 4.3, 0.0))
    rows += [row(f"quantized_{f}", "quantization", 4.6, 0.02 * scale) for f in ("e4m3", "e5m2", "e3m4")]
    rows += [
        row(f"clustered_{k}", "sharing", 35 / math.log2(k), round(1.2 * scale / k, 6)) for k in (16, 64, 256)
    ]
    rows += [
        row(f"lowrank_{r}", "lowrank", 0.9 / r, round(0.3 * scale * (1 - r) ** 2, 6))
        for r in (0.75, 0.5, 0.25)
    ]
    rows += [row(f"student_{p}percent", "students", 95 / p, (0.06 + 0.9 / p) * scale) for p in (25, 10, 5)]
    pipelines = {
        "minimal_loss": (6.1, 0.012, 5.9),
        "hardware": (8.2, 0.18, 9.1),
        "maximum": (71.0, 0.26, 88.0),
        "deep_compression": (19.2, 0.09, 27.0),
        "knee_pair": (14.0, 0.07, 18.3),
        "best_of_groups": (30.0, 0.21, 55.0),
    }
    for name, (ratio, error, product) in pipelines.items():
        rows.append(row(name, "combined", ratio, error * scale, product_of_ratios=product))
    left = "layer conv1: 1 of 6 channels would be left, at least 2 are needed: lower the amount"
    rows.append(Row("pruned_structured_0.95", "pruning", status="failed", reason=left))
    rows.append(Row("student_1percent", "students", status="skipped", reason="train_students=False"))
    return rows


def outcome(kind: str) -> Outcome:
    """``many``, ``five``, ``single``, ``failed``, ``weights`` (no output errors), ``regression`` (errors above 1)."""
    rows = many()
    curves = {"int8": ((1e-5, 0.01), (1e-4, 0.07), (1e-3, 0.4))}
    if kind == "many":
        return Outcome(about(), marked(rows), curves)
    if kind == "five":
        names = (
            "pruned_magnitude_0.5",
            "quantized_weights_int8",
            "clustered_16",
            "student_10percent",
            "maximum",
        )
        return Outcome(about(), marked([r for r in rows if r.name in names]))
    if kind == "single":
        return Outcome(about(), marked(rows[2:3]))
    if kind == "failed":
        lost = {
            "status": "failed",
            "reason": "RuntimeError: shapes <4x5> & <3x2>",
            "file_bytes": 0,
            "ber": NAN,
        }
        return Outcome(about(), marked([dataclasses.replace(r, **lost) for r in rows]))
    if kind == "weights":
        reason = "no architecture given: pass model="
        unknown = {n: NAN for n in ("ber", "ber_se", "ber_low", "ber_high", "agreement", "macs")} | {
            "reason": reason
        }
        kept = [dataclasses.replace(r, **unknown) for r in rows if r.group not in ("students", "combined")]
        facts = about(task="", task_reason=reason, macs=NAN, inputs="", n_samples=0, model="state dict")
        return Outcome(facts, marked([r for r in kept if r.status == "ok"]))
    assert kind == "regression"
    facts = about(
        task="regression", metric=0.0123, metric_name="relative L2", inputs="given data, 1000 inputs"
    )
    more = [
        dataclasses.replace(r, metric=0.02, metric_change=0.01, extra={"latency_ms": 1.5}) for r in many(30.0)
    ]
    return Outcome(facts, marked(more))


KINDS = ("many", "five", "single", "failed", "weights", "regression")
