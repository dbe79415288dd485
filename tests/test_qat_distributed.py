"""Killed and forked processes under quantization: resume after SIGKILL, equal ranks, quantizers that come home.

Every run is a Python process of its own, started from a script, as a user would.
"""

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
import lightning_compress as lc
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
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


torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
folder = Path({folder!r})
save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=0)
qat = QuantizationAwareTraining(4, 4, {method!r}, edge_layers_bits=None, freeze_observer=0.8, begin=0.1)
prune = lc.ScheduledPruning(sparsity=0.8, begin=4, end=37, unit="step", every=2)
lit = Lit(net)
t = trainer(qat, prune, lc.BatchNormFusion(), lc.CompressionMonitor(file_bytes="never"), Slow(), save, max_epochs=3)
t.fit(lit, Resumable(), ckpt_path=folder / "last.ckpt" if {resume} else None)
end = {{"weights": lit.state_dict(), "state": qat.state_dict(), "optimizer": t.optimizers[0].state_dict()}}
torch.save(end, folder / "end.pt")
"""


def start(
    folder: Path, name: str, method: str, *, delay: float = 0.0, resume: bool = False
) -> subprocess.Popen[bytes]:
    code = RUN.format(tests=str(TESTS), folder=str(folder), delay=delay, resume=resume, method=method)
    (folder / f"{name}.py").write_text(code)
    return subprocess.Popen(
        [sys.executable, f"{name}.py"], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error.decode()[-3000:]


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("method", ["lsq"])
def test_a_killed_fit_resumes_as_if_it_had_not_been_killed(tmp_path, method):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    reference = start(whole, "run", method)
    victim = start(cut, "killed", method, delay=0.1)
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
    finish(start(cut, "resumed", method, resume=True))
    a, b = (torch.load(f / "end.pt", weights_only=True) for f in (whole, cut))
    assert a["state"]["quantizers"] and equal(a, b)


RANKS = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import lightning.pytorch as pl
import torch
import lightning_compress as lc
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.quantization.training import quantizers
from lit import Lit, loader, trainer

folder = Path({folder!r})


class Rank(pl.Callback):
    def on_train_end(self, t, module):
        end = {{"state": qat.state_dict(), "weights": module.state_dict(), "logged": sorted(t.callback_metrics)}}
        torch.save(end, folder / f"rank{{t.global_rank}}.pt")

    def on_train_batch_end(self, t, module, *args):
        if t.global_step == 1:
            torch.save(qat.state_dict(), folder / f"first{{t.global_rank}}.pt")


class Data(pl.LightningDataModule):
    '''Ranks see different data: one of them never a negative value, the other values twenty times as large.'''

    def train_dataloader(self):
        rank = self.trainer.global_rank
        x, y = loader().dataset.tensors
        data = torch.utils.data.TensorDataset((20 * x) if rank else x.abs(), y)
        return torch.utils.data.DataLoader(data, batch_size=4)


if __name__ == "__main__":
    qat = QuantizationAwareTraining(4, 4, {method!r}, edge_layers_bits=None, begin={begin})
    lit = Lit()
    t = trainer(qat, Rank(), strategy="ddp_fork", devices=2, use_distributed_sampler=False)
    t.fit(lit, datamodule=Data())
    assert not quantizers(lit)
    qat.bring_home(t, lit)
    torch.save(qat.state_dict(), folder / "home.pt")
    lit.eval()
    x = torch.randn(5, 8)
    assert all(q.active for q in quantizers(lit).values()) and torch.equal(lc.finalize(lit)(x), lit(x))
"""


@pytest.mark.parametrize(("method", "begin"), [("fake_quant", 0.0), ("lsq", 0.25), ("pact", 0.0)])
def test_25_two_ranks_with_different_data_have_equal_quantizers_which_come_home(tmp_path, method, begin):
    code = RANKS.format(tests=str(TESTS), folder=str(tmp_path), method=method, begin=begin)
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert equal(a, b)
    home = torch.load(tmp_path / "home.pt", weights_only=True)
    assert equal(home["quantizers"], a["state"]["quantizers"]) and equal(home["points"], a["state"]["points"])
    assert "call callback.bring_home(trainer, module)" in done.stderr
    own = a["state"]["quantizers"]["net.0.input_quantizer"]
    assert own["flags"]["signed"] and own["flags"]["initialized"]  # one rank alone saw negative values
    if method == "fake_quant":
        first = torch.load(tmp_path / "first0.pt", weights_only=True)["quantizers"]["net.0.input_quantizer"]
        assert float(first["tensors"]["high"]) > 10  # and one alone the large ones
