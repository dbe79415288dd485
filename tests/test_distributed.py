"""Killed and spawned processes: resume after SIGKILL, two ranks with equal masks, weights that come home.

Every run is a Python process of its own, started from a script, as a user would.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

RUN = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
import lightning_compress as lc
from lit import Lit, loader, trainer


class Resumable:
    '''A loader that knows where it stands: Lightning saves and restores its state.'''

    def __init__(self):
        self.batches, self.position = list(loader(64)), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, self.position = self.position, 0
        for i in range(start, len(self.batches)):
            self.position = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self):
        return {{"position": self.position}}

    def load_state_dict(self, state):
        self.position = state["position"]


class Slow(pl.Callback):
    def on_train_batch_end(self, *args):
        time.sleep({delay})


folder = Path({folder!r})
save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=0)
prune = lc.ScheduledPruning(sparsity=0.8, begin=4, end=37, unit="step", every=2)
lit = Lit()
log = CSVLogger(folder, name="", version={version!r})
t = trainer(prune, Slow(), save, max_epochs=3, logger=log, log_every_n_steps=1)
last = folder / "last.ckpt"
t.fit(lit, Resumable(), ckpt_path=last if {resume} else None)
end = {{"weights": lit.state_dict(), "masks": prune.masks, "optimizer": t.optimizers[0].state_dict()}}
torch.save(end, folder / "end.pt")
"""


def start(folder: Path, version: str, *, delay: float = 0.0, resume: bool = False) -> subprocess.Popen[bytes]:
    code = RUN.format(tests=str(TESTS), folder=str(folder), version=version, delay=delay, resume=resume)
    (folder / f"{version}.py").write_text(code)
    return subprocess.Popen(
        [sys.executable, f"{version}.py"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()[-3000:]


def curve(folder: Path, version: str) -> dict[int, float]:
    rows = csv.DictReader((folder / version / "metrics.csv").open())
    return {int(r["step"]): float(r["compress/sparsity"]) for r in rows if r["compress/sparsity"]}


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_01_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    reference = start(whole, "run")
    victim = start(cut, "killed", delay=0.1)
    while (
        not (cut / "last.ckpt").exists()
        or torch.load(cut / "last.ckpt", weights_only=True)["global_step"] < 21
    ):
        assert victim.poll() is None
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    saved = torch.load(cut / "last.ckpt", weights_only=True)
    assert 16 < saved["global_step"] < 48 and saved["global_step"] % 16  # in the middle of an epoch
    finish(reference)
    finish(start(cut, "resumed", resume=True))
    a, b = (torch.load(f / "end.pt", weights_only=True) for f in (whole, cut))
    assert a["masks"] and equal(a, b)
    logged = curve(whole, "run")
    again = curve(cut, "resumed")
    assert again and all(logged[step] == value for step, value in again.items())
    assert set(logged) == set(again) | {s for s in curve(cut, "killed") if s < saved["global_step"]} | {
        s for s in logged if s < saved["global_step"]
    }


RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
import lightning_compress as lc
from lit import Lit, loader, trainer, sparsity

folder, devices = Path({folder!r}), {devices}


class Rank(pl.Callback):
    def on_train_end(self, t, module):
        logged = sorted(t.callback_metrics)
        end = {{"masks": prune.masks, "weights": module.state_dict(), "logged": logged}}
        torch.save(end, folder / f"rank{{t.global_rank}}.pt")


class SGD(Lit):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Split(torch.utils.data.Sampler):
    '''Rank r of n sees the r-th part of every global batch.'''

    def __init__(self, rank, size):
        part = range(rank * 8 // size, (rank + 1) * 8 // size)
        self.order = [start + i for start in range(0, 32, 8) for i in part]

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        sampler = Split(self.trainer.global_rank, self.trainer.world_size)
        return torch.utils.data.DataLoader(loader().dataset, batch_size=8 // self.trainer.world_size, sampler=sampler)


prune = lc.ScheduledPruning(sparsity=0.75, begin=1, end=9, unit="step", every=2, criterion={criterion!r})
lit = SGD()
options = {{"logger": CSVLogger(folder), "log_every_n_steps": 1}}
if devices == 2:
    options |= {{"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}}
t = trainer(prune, Rank(), lc.CompressionMonitor(), max_epochs=3, **options)
t.fit(lit, datamodule=Data())
print("sparsity at home", sparsity(lit))
"""


def ranks(folder: Path, devices: int, criterion: str) -> str:
    folder.mkdir()
    (folder / "run.py").write_text(
        RANKS.format(tests=str(TESTS), folder=str(folder), devices=devices, criterion=criterion)
    )
    done = subprocess.run([sys.executable, "run.py"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_34_50_two_ranks_have_equal_masks_and_the_weights_of_one_process(tmp_path, criterion):
    """Behaviours 34 (weights come home from forked processes) and 50 (ranks log the same keys), besides equality."""
    home = ranks(tmp_path / "two", 2, criterion)
    ranks(tmp_path / "one", 1, criterion)
    a, b = (torch.load(tmp_path / "two" / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    one = torch.load(tmp_path / "one" / "rank0.pt", weights_only=True)
    assert equal(a, b)
    assert equal(a["masks"], one["masks"]) and a["logged"] == b["logged"]
    for key, weight in one["weights"].items():
        assert torch.allclose(a["weights"][key], weight, atol=1e-6, rtol=0), key
    assert "sparsity at home 0.75" in home
