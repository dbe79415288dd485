"""The recipe of the physics-informed network runs for a few steps, and its equation is Burgers'."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_compress as lc

pytestmark = pytest.mark.usefixtures("recipes")


def test_trains_and_compresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, t = np.linspace(-1, 1, 9), np.linspace(0, 0.99, 5)
    pack = tmp_path / "references.npz"
    np.savez(
        pack, burgers_x=x, burgers_t=t, burgers_u=np.outer(-np.sin(np.pi * x), np.exp(-t)).astype(np.float32)
    )
    recipe, out = importlib.import_module("pinn"), tmp_path / "out"
    few = "--max-steps 3 --distill-steps 2 --batch-size 16 --ratios 0.25 0.1 --log-every 1"
    recipe.main(["--data", str(pack), "--output-dir", str(out), *few.split()])
    printed = capsys.readouterr().out
    for name in ("network", "8 bits", "80% zeros", "student 25%", "student 10%, 8 bits"):
        matching = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        file_bytes = int(matching.removeprefix(name).split()[1].replace(",", ""))
        stored = out / f"{name.replace(' ', '_').replace('%', '')}.lcz"
        assert stored.stat().st_size == file_bytes
    assert list((out / "csv").rglob("metrics.csv"))
    thin = lc.load(out / "student_10.lcz", into=recipe.network())
    share = sum(p.numel() for p in thin.parameters()) / sum(p.numel() for p in recipe.network().parameters())
    assert abs(share / 0.1 - 1) <= 0.1
    weights = torch.load(out / "network.pt", weights_only=True)
    same = lc.load(out / "network.lcz", into=recipe.network()).state_dict()
    assert all(torch.equal(same[key], value) for key, value in weights.items())


def test_residual_of_known_functions() -> None:
    """x / (1 + t) solves u_t + u u_x = 0 without curvature; of sin(x) e^-t all terms are known."""
    recipe = importlib.import_module("pinn")

    class Field(nn.Module):
        def __init__(self, of: object) -> None:
            super().__init__()
            self.of = of

        def forward(self, points: Tensor) -> Tensor:
            return self.of(points[:, :1], points[:, 1:])  # type: ignore[operator, no-any-return]

    points = torch.rand(20, 2, dtype=torch.float64)
    x, t = points[:, :1], points[:, 1:]
    still = recipe.residual(Field(lambda x, t: x / (1 + t)), points)
    torch.testing.assert_close(still, torch.zeros_like(still))
    u = x.sin() * torch.exp(-t)
    wanted = -u + u * x.cos() * torch.exp(-t) + 0.01 / torch.pi * u
    torch.testing.assert_close(recipe.residual(Field(lambda x, t: x.sin() * torch.exp(-t)), points), wanted)
