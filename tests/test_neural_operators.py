"""An FNO of neuraloperator through everything: complex spectral weights and a state dict that is not all tensors."""

import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lit import Lit, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.functional.masks import count_pruned
from lightning_compress.targets import find

operators = pytest.importorskip("neuralop.models")
SPECTRAL = "fno_blocks.convs.*"


def fno(**options):
    torch.manual_seed(0)
    sizes = {"n_modes": (8, 8), "hidden_channels": 12, "n_layers": 2, "projection_channel_ratio": 2}
    return operators.FNO(in_channels=1, out_channels=1, **sizes, **options)


class Operator(Lit):
    def __init__(self):
        super().__init__(fno())

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss


def fields():
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.cumsum(-1)), batch_size=2)


def spectral_zeros(state):
    weights = [v for k, v in state.items() if ".convs." in k and k.endswith("weight.tensor")]
    assert len(weights) == 2 and all(w.is_complex() for w in weights)
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_pruning_zeroes_exactly_that_share_of_spectral_entries(sparsity):
    model = fno()
    result = lc.compress(model, [lc.Prune(sparsity)])
    zeros, total = spectral_zeros(result.model.state_dict())
    assert zeros == count_pruned(sparsity, total)
    assert result.coverage.share > 0.95
    x = torch.randn(1, 1, 16, 16)
    assert not torch.allclose(result.model(x), model(x))
    assert set(result.model.state_dict()) == set(model.state_dict())
    only = lc.compress(model, [lc.Prune(sparsity, include=SPECTRAL)])
    assert only.after.zeros == zeros and set(only.coverage.changed) == {t.key for t in find(model, SPECTRAL)}


def test_fit_checkpoint_resume_and_plain_loading(tmp_path):
    def run(epochs, folder, ckpt=None, **options):
        schedule = {"begin": 1, "end": 6, "unit": "step", "every": 1}
        prune, lit = lc.ScheduledPruning(sparsity=0.5, include="net." + SPECTRAL, **schedule), Operator()
        saver = ModelCheckpoint(folder, save_last=True, **options)
        trainer(prune, saver, max_epochs=epochs).fit(lit, fields(), ckpt_path=ckpt)
        return lit, prune

    whole, masks = run(4, tmp_path / "whole")
    run(2, tmp_path / "part")
    part = torch.load(tmp_path / "part" / "last.ckpt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in part["state_dict"].values())
    zeros, total = spectral_zeros(part["state_dict"])
    assert zeros == count_pruned(0.5, total)
    Operator().load_state_dict(part["state_dict"], strict=True)
    again, resumed = run(4, tmp_path / "resumed", ckpt=tmp_path / "part" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(masks.masks[k], resumed.masks[k]) for k in masks.masks)
    run(1, tmp_path / "light", save_weights_only=True)
    light = torch.load(tmp_path / "light" / "last.ckpt", weights_only=True)
    Operator().load_state_dict(light["state_dict"], strict=True)
    assert "_metadata" in whole.net.state_dict()  # the user's model still answers as neuraloperator made it


def test_averaged_operator_weights(tmp_path):
    lit = Operator()
    prune = lc.ScheduledPruning(sparsity=0.5, begin=1, end=4, unit="step", every=1)
    trainer(EMAWeightAveraging(decay=0.9), prune, ModelCheckpoint(tmp_path, save_last=True)).fit(
        lit, fields()
    )
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for state in (saved["state_dict"], lit.state_dict()):
        zeros, total = spectral_zeros(state)
        assert zeros == count_pruned(0.5, total)
    resumed = Operator()
    again = lc.ScheduledPruning(sparsity=0.5, begin=1, end=4, unit="step", every=1)
    trainer(EMAWeightAveraging(decay=0.9), again, max_epochs=3).fit(
        resumed, fields(), ckpt_path=tmp_path / "last.ckpt"
    )


def test_archives_of_operators_come_back_and_list_what_is_no_tensor(tmp_path):
    model = lc.compress(fno(), [lc.Prune(0.5)]).model
    info = lc.save(model, tmp_path / "fno.lcz")
    assert any("_metadata" in name for name in info.skipped)
    fresh = lc.load(tmp_path / "fno.lcz", into=fno())
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(fresh(x), model(x))
    assert info.file_bytes == (tmp_path / "fno.lcz").stat().st_size < info.dense_bytes * 0.6


def test_a_checkpoint_loads_where_the_library_is_not_imported(tmp_path):
    lit = Operator()
    prune = lc.ScheduledPruning(sparsity=0.5, begin=1, end=3, unit="step", every=1)
    trainer(prune, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1).fit(lit, fields())
    code = f"""
import sys, torch
from neuralop.models import FNO
state = torch.load({str(tmp_path / "last.ckpt")!r}, weights_only=True)["state_dict"]
model = FNO(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=12, n_layers=2, projection_channel_ratio=2)
model.load_state_dict({{k.removeprefix("net."): v for k, v in state.items()}}, strict=True)
weights = [p for n, p in model.named_parameters() if ".convs." in n and p.is_complex()]
assert "lightning_compress" not in sys.modules
print(sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    zeros, total = map(int, done.stdout.split()[-2:])
    assert zeros == count_pruned(0.5, total)
