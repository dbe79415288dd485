"""The benchmark of circuits: the plain loops in C and numba walk through the same circuits as the engine."""

import shutil

import numpy as np
import pytest


def test_a_small_run(capsys: pytest.CaptureFixture[str], recipes: None) -> None:
    import cgp_speed

    argv = ["--grids", "40x8", "--rounds", "2", "--children", "400", "--reference", "1"]
    tables = cgp_speed.main(argv)  # raises where a loop comes to another circuit
    loops = ["ours", "numba", *(["C"] if shutil.which("cc") else [])]
    assert [(row["start"], row["loop"]) for row in tables["speeds"]] == [
        (start, loop) for start in ("random", "adder") for loop in loops
    ]
    for row in tables["speeds"]:
        assert row["children/s"] >= row["evaluated/s"] > 0
        assert row["ours is faster by"] == 1 or row["loop"] != "ours"
    assert [row["start"] for row in tables["shares"]] == ["random", "adder"]
    for row in tables["shares"]:
        assert 0 < row["gates that take part"] <= 320 and 0 <= row["not evaluated %"] <= 100
    printed = capsys.readouterr().out
    assert "ours is faster by" in printed and "error ns" in printed and "reference in Python, 40x8" in printed


def test_a_loop_that_goes_elsewhere_is_found_out(monkeypatch: pytest.MonkeyPatch, recipes: None) -> None:
    import cgp_speed

    from lightning_compress.cgp import Settings

    monkeypatch.setattr(cgp_speed.Numba, "genome", lambda self: np.zeros(3))
    with pytest.raises(RuntimeError, match="numba came to another circuit than ours from the random start"):
        cgp_speed.compare(Settings(rows=40, cols=8), "random", 1, 2)
