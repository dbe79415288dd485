"""A quiet training of a student on its teacher's answers."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_compress.distillation.module import Distillation
from lightning_compress.distillation.terms import Loss
from lightning_compress.stats.running import call, device_of

TEMPERATURE = 4.0
_LAST_LR = 1e-5
_DECAY = 1e-5
_CLIP = 1.0


def fit_student(
    teacher: nn.Module,
    student: nn.Module,
    loss: str | Loss,
    batches: Iterable[Any],
    steps: int,
    lr: float,
    seed: int,
    trainer_options: Mapping[str, Any],
) -> None:
    """Train a student, in place; the teacher and the global random state stay as they were.

    Adam whose learning rate falls to 1e-5 along half a cosine, weight decay 1e-5, gradients clipped to norm 1.

    Args:
        teacher: any module.
        student: another one, on the same device.
        loss: as ``Distillation`` takes it; labels have no part in it.
        batches: ``(x,)``, read as often as it takes.
        steps: optimizer steps.
        lr: first learning rate.
        seed: of what is random in the student.
        trainer_options: further options of the Trainer.
    """

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, weight_decay=_DECAY)

    def falling(step: int) -> float:
        last = min(_LAST_LR / lr, 1.0)
        return last + (1 - last) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2

    def scheduler(made: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(made, falling)

    options = {
        "max_steps": steps,
        "max_epochs": -1,
        "accelerator": "cpu" if device_of(student).type == "cpu" else "auto",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": _CLIP,
        **trainer_options,
    }
    device = device_of(student)
    with _as_it_was(teacher), isolate_rng(), _quiet():
        torch.manual_seed(seed)
        module = Distillation(
            _Whole(student.train()),
            _Whole(teacher),
            loss,
            temperature=TEMPERATURE,
            alpha=1.0,
            optimizer=optimizer,
            scheduler=scheduler,
        )
        Trainer(**options).fit(module, batches)
    student.to(device)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards modes, which parameters ask for gradients, and the device are as before."""
    modes = [(m, m.training) for m in model.modules()]
    learned = [(p, p.requires_grad) for p in model.parameters()]
    device = device_of(model)
    try:
        yield
    finally:
        model.to(device)
        for module, training in modes:
            module.training = training
        for parameter, asks in learned:
            parameter.requires_grad_(asks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says nothing of devices and of loaders without workers."""
    logs = [
        logging.getLogger(f"lightning.pytorch.{name}")
        for name in ("utilities.rank_zero", "accelerators.cuda")
    ]
    levels = [log.level for log in logs]
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*smaller than the logging interval.*",
            ".*LeafSpec.*",
            ".*no `val_dataloader`.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            for log in logs:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)


class _Whole(nn.Module):
    """A network whose input is one thing: a tensor, a tuple of arguments or a dict of keywords.

    It also keeps steps and hooks of a LightningModule, which are about labelled data, out of training.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any) -> Any:
        return call(self.network, x)
