"""The small LightningModule, data and Trainer that the tests of callbacks share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Lit(pl.LightningModule):
    """Two layers, Adam, logged losses."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.lr = lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def loader(n: int = 32, batch: int = 4, shape: tuple[int, ...] = (8,)) -> DataLoader[Any]:
    """Fixed data in fixed order: eight batches of four."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (n,), generator=generator)), batch_size=batch)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on one CPU; two epochs and no logger unless told otherwise."""
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        quiet["enable_checkpointing"] = False
    return pl.Trainer(
        **{**quiet, "max_epochs": 2, "callbacks": list(callbacks), "num_sanity_val_steps": 0, **options}
    )


def sparsity(module: nn.Module, include: str = "") -> float:
    """Share of zeros among weights of two or more dimensions, counted without the library."""
    weights = [p for n, p in module.named_parameters() if p.dim() > 1 and include in n]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
