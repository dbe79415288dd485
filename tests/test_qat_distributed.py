"""Forked processes under quantization: equal ranks, quantizers that come home. Killed ones: test_qat_deployment.py.

Two ranks start from a script, as a user would start them; one process runs all fits, for most of its time goes into
imports.
"""

import subprocess
import sys
from pathlib import Path

import torch
from killed import equal

TESTS = Path(__file__).parent
FITS = (("fake_quant", 0.0), ("lsq", 0.25), ("pact", 0.0))

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


for method, begin in {fits!r}:
    folder = Path({folder!r}, method)
    folder.mkdir()
    qat = QuantizationAwareTraining(4, 4, method, edge_layers_bits=None, begin=begin)
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


def test_25_two_ranks_with_different_data_have_equal_quantizers_which_come_home(tmp_path):
    code = RANKS.format(tests=str(TESTS), folder=str(tmp_path), fits=FITS)
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "call callback.bring_home(trainer, module)" in done.stderr
    for method, _ in FITS:
        folder = tmp_path / method
        a, b = (torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1))
        assert equal(a, b), method
        home = torch.load(folder / "home.pt", weights_only=True)
        assert equal(home["quantizers"], a["state"]["quantizers"])
        assert equal(home["points"], a["state"]["points"])
        own = a["state"]["quantizers"]["net.0.input_quantizer"]
        assert own["flags"]["signed"] and own["flags"]["initialized"]  # one rank alone saw negative values
        if method == "fake_quant":
            first = torch.load(folder / "first0.pt", weights_only=True)["quantizers"]["net.0.input_quantizer"]
            assert float(first["tensors"]["high"]) > 10  # and one alone the large ones
