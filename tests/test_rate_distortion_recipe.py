"""The benchmark beside nncodec, on its own side: what it prints is in the file that it leaves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lightning_compress as lc


def test_rows_of_lenet5(tmp_path: Path, capsys: pytest.CaptureFixture[str], recipes: None) -> None:
    import rate_distortion

    generator = np.random.default_rng(0)
    pack = {
        "x_test": generator.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        "y_test": generator.integers(0, 10, 30, dtype=np.uint8),
    }
    np.savez(tmp_path / "mnist.npz", **pack)
    torch.manual_seed(0)
    save_file(lc.models.LeNet5().state_dict(), tmp_path / "lenet5_mnist.safetensors")
    out = tmp_path / "out"
    argv = ["--data", str(tmp_path), "--models", "lenet5", "--bits", "4", "2", "--samples", "16", "--qp"]
    rate_distortion.main([*argv, "--output-dir", str(out)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("lenet5  ")]
    assert [row[1] for row in rows] == ["4", "2"]
    small = int(rows[1][3].replace(",", ""))
    assert small == (out / "net.lcz").stat().st_size < int(rows[0][3].replace(",", ""))
    assert float(rows[0][6]) <= float(rows[1][6]) <= 100  # share of changed predictions
