"""A fit that is killed in the middle of an epoch and resumed; its module name, options and folder are given.

The fit that is not interrupted and the resumed one run in the test's process, only the victim in one of its own:
``python -m killed MODULE FOLDER``, where MODULE has ``fit(folder, *callbacks, **options)``.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Resumable:
    """A loader that knows where it stands: Lightning saves and restores its state."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.position = list(batches), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.position = self.position, 0
        for i in range(start, len(self.batches)):
            self.position = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Kill(pl.Callback):
    """SIGKILL after an optimizer step: no handler, no teardown."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(folder: Path) -> ModelCheckpoint:
    """``last.ckpt``, every three steps."""
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=0)


def kill(module: str, folder: Path, step: int, **options: str) -> int:
    """Run the fit of a module in a process of its own until it is killed.

    Returns:
        The step of the checkpoint that is left.
    """
    arguments = [module, str(folder), str(step), str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-m", "killed", *arguments, *(f"{k}={v}" for k, v in options.items())],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    saved = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    assert saved == step - step % 3
    return int(saved)


def equal(a: object, b: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


if __name__ == "__main__":
    name, path, step, threads, *given = sys.argv[1:]
    torch.set_num_threads(int(threads))
    options = dict(option.split("=") for option in given)
    importlib.import_module(name).fit(Path(path), Kill(int(step)), **options)
