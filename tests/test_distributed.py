"""Killed and spawned processes: resume after SIGKILL, two ranks with equal masks, weights that come home.

Two ranks start from a script, as a user would start them; one process runs all fits, for most of its time goes into
imports.
"""

import csv
import subprocess
import sys
from pathlib import Path

import torch
from killed import Resumable, equal, kill, saving
from lightning.pytorch.loggers import CSVLogger
from lit import Lit, loader, trainer

import lightning_compress as lc

TESTS = Path(__file__).parent
RULES = {
    "magnitude": {"begin": 1},
    "random": {"begin": 1, "criterion": "random"},
    "wanda": {"begin": 1, "criterion": "wanda"},
    "taylor": {"begin": 1, "criterion": "taylor"},
    "gradient": {"regrow": "gradient", "regrow_share": 0.5, "distribution": "erk"},
}


def fit(folder, *callbacks, version="killed", resume=False):
    prune = lc.ScheduledPruning(sparsity=0.8, begin=4, end=37, unit="step", every=2)
    lit, log = Lit(), CSVLogger(folder, name="", version=version)
    t = trainer(prune, saving(folder), *callbacks, max_epochs=3, logger=log, log_every_n_steps=1)
    t.fit(lit, Resumable(loader(64)), ckpt_path=folder / "last.ckpt" if resume else None)
    state = t.optimizers[0].state_dict()
    return {"weights": dict(lit.state_dict()), "masks": prune.masks, "optimizer": state}


def curve(folder, version):
    text = (folder / version / "metrics.csv").read_text()
    rows = csv.DictReader(text.splitlines())
    return {int(r["step"]): float(r["compress/sparsity"]) for r in rows if r["compress/sparsity"]}


def test_01_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    end = fit(whole, version="run")
    saved = kill("test_distributed", cut, step=22)
    assert saved == 21 and saved % 16  # in the middle of an epoch
    assert end["masks"] and equal(end, fit(cut, version="resumed", resume=True))
    logged, again = curve(whole, "run"), curve(cut, "resumed")
    assert all(logged[step] == value for step, value in again.items())
    assert set(again) == {step for step in logged if step >= saved}


RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
import lightning_compress as lc
from lit import Lit, loader, trainer, sparsity

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


for rule, given in {rules!r}.items():
    for devices in (2, 1):
        folder = Path({folder!r}, rule, str(devices))
        folder.mkdir(parents=True)
        prune = lc.ScheduledPruning(sparsity=0.75, end=9, unit="step", every=2, **given)
        lit = SGD()
        options = {{"logger": CSVLogger(folder), "log_every_n_steps": 1}}
        if devices == 2:
            options |= {{"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}}
        t = trainer(prune, Rank(), lc.CompressionMonitor(), max_epochs=3, **options)
        t.fit(lit, datamodule=Data())
        assert sparsity(lit) == 0.75, "at home"
"""


def test_34_50_two_ranks_have_equal_masks_and_the_weights_of_one_process(tmp_path):
    """Behaviours 34 (weights come home from forked processes) and 50 (ranks log the same keys), besides equality."""
    code = RANKS.format(tests=str(TESTS), folder=str(tmp_path), rules=RULES)
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rule in RULES:
        a, b = (torch.load(tmp_path / rule / "2" / f"rank{r}.pt", weights_only=True) for r in (0, 1))
        one = torch.load(tmp_path / rule / "1" / "rank0.pt", weights_only=True)
        assert equal(a, b), rule
        assert equal(a["masks"], one["masks"]) and a["logged"] == b["logged"]
        for key, weight in one["weights"].items():
            assert torch.allclose(a["weights"][key], weight, atol=1e-6, rtol=0), key
