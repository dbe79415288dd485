"""``lightning-compress analyze``: all files in one folder, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress.cli import main

OPTIONS = ["--samples", "60", "--student-steps", "2", "--student-ratios", "0.3"]
LINES = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))

def batches():
    return [(torch.ones(4, 12), torch.tensor([0, 1, 2, 0]))]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "analyzed.py").write_text(LINES)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3)).state_dict(), "w.pt")
    return tmp_path


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}


def test_all_files_and_nothing_beside_them(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name for p in here.iterdir()} | {"out", "__pycache__"}
    given = [
        "analyze",
        "w.pt",
        "--factory",
        "analyzed:net",
        "--example-shape",
        "1",
        "12",
        "-o",
        "out",
        *OPTIONS,
    ]
    few = ["--benchmark", "quantized_weights", "pruned_nm", "student", "--test-data", "analyzed:batches"]
    assert main([*given, *few, "--bit-errors", "--measure"]) == 0
    assert {p.name for p in here.iterdir()} <= before
    names = {p.name for p in (here / "out").iterdir()}
    wanted = "compression_report.txt ber_compression_analysis.txt results.json results.csv report.html"
    assert {*wanted.split(), "compressed_models", "analysis.jsonl"} <= names
    found = rows(here / "out")
    assert {"quantized_weights_int4", "pruned_nm_2_4", "student_30percent", "maximum"} <= set(found)
    for name, row in found.items():
        assert (here / "out" / "compressed_models" / f"{name}.lcz").stat().st_size == row["file_bytes"]
        assert row["extra"]["latency_ms"] > 0 and row["metric"] is not None
    shown = capsys.readouterr().out
    assert "quantized_weights_int4" in shown and "files in out" in shown


def test_quick_says_whether_the_target_is_met(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["analyze", "analyzed:net", "--example-shape", "1", "12", "--quick", "--export", "best", *OPTIONS]
    assert main([*given, "--target-compression", "2", "-o", "a"]) == 0
    assert "met; chosen:" in capsys.readouterr().out
    assert main([*given, "--target-compression", "500", "--no-train-students", "-o", "b", "-v"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("Compression of Sequential")
    kept = {p.stem for p in (here / "b" / "compressed_models").iterdir()}
    assert kept == {name for name, row in rows(here / "b").items() if row["pareto"]}


def test_weights_alone(here: Path) -> None:
    assert (
        main(
            [
                "analyze",
                "w.pt",
                "--benchmark",
                "clustered",
                "-o",
                "out",
                "--export",
                "none",
                "--no-ber-analysis",
            ]
        )
        == 0
    )
    assert not (here / "out" / "ber_compression_analysis.txt").exists()
    found = rows(here / "out")
    assert all(
        row["ber"] is None and "no architecture given" in row["reason"]
        for row in found.values()
        if row["params"]
    )
    assert found["clustered_16"]["weight_sqnr_db"] > 20 and found["clustered_256"]["status"] == "skipped"
    assert not list((here / "out" / "compressed_models").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pt"], "there is no file absent.pt"),
        (["absent.pt", "--factory", "analyzed:net"], "there is no file absent.pt of weights"),
        (["analyzed:net"], "give example_input="),
        (["analyzed:net", "--example-shape", "1", "7"], "does not run on example_input of shape (1, 7)"),
        (["analyzed:net", "--example-shape", "0", "7"], "every extent must be at least 1"),
        (["w.pt", "--export", "some"], "allowed are all, best, none"),
        (["w.pt", "--benchmark", "prunin"], "did you mean 'pruning'"),
        (["w.pt", "--measure"], "give --example_shape"),
        (["w.pt", "--data", "x.npy"], "give --factory"),
        (["w.pt", "--quick"], "no architecture given"),
    ],
)
def test_errors_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["analyze", *arguments, "-o", "out"]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
