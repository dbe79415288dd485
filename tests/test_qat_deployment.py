"""From a pruned and quantized fit to files: killed and resumed, archived, exported; and a range that is lost shows."""

import csv
from pathlib import Path

import pytest
import torch
from killed import Resumable, equal, kill, saving
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lit import Lit, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks.quantization import QuantizationAwareTraining

BATCHES = 12


class NormLeNet5(lc.models.LeNet5):
    """LeNet-5 with BatchNorm behind its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)) for layer in (self.conv1, self.conv2)
        )


NETS = {"lenet5": lambda: lc.models.build("lenet5"), "batchnorm": NormLeNet5}


def digits(n: int = 16 * BATCHES) -> DataLoader:
    """Images of the size of MNIST: ten coarse patterns, in noise."""
    generator = torch.Generator().manual_seed(2)
    patterns = torch.randn(10, 1, 7, 7, generator=generator)
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = nn.functional.interpolate(patterns, scale_factor=4.0)[labels]
    images = images + 0.5 * torch.randn(images.shape, generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def fit(folder, *callbacks, net, resume=False):
    """Three epochs of pruning to 80 % and 4-bit training; all that must be equal at the end."""
    torch.manual_seed(0)
    logger = CSVLogger(folder) if net == "lenet5" else TensorBoardLogger(folder)
    qat = QuantizationAwareTraining(4, 4, "lsq", freeze_batchnorm=0.6)
    prune = lc.ScheduledPruning(sparsity=0.8, begin=2, end=28, unit="step", every=2)
    fusion, monitor = lc.BatchNormFusion(attribute="net"), lc.CompressionMonitor(figures=False)
    lit = Lit(NETS[net](), lr=2e-3)
    lit.example_input_array = torch.zeros(2, 1, 28, 28)
    t = trainer(
        qat,
        prune,
        fusion,
        monitor,
        saving(folder),
        *callbacks,
        max_epochs=3,
        logger=logger,
        log_every_n_steps=1,
    )
    t.fit(lit, Resumable(digits()), ckpt_path=folder / "last.ckpt" if resume else None)
    end = {
        "weights": dict(lit.state_dict()),
        "quantizers": qat.state_dict(),
        "masks": prune.masks,
        "optimizer": t.optimizers[0].state_dict(),
        "metrics": {k: v for k, v in t.callback_metrics.items() if k.startswith("compress/")},
    }
    return lit, fusion, end


@pytest.mark.filterwarnings("ignore:BatchNormFusion leaves the module as it is")
@pytest.mark.parametrize("net", NETS)
def test_a_killed_fit_resumes_and_its_network_is_the_same_in_every_file(tmp_path, net):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    lit, fusion, end = fit(whole, net=net)
    assert kill("test_qat_deployment", cut, step=BATCHES + 7, net=net) % BATCHES
    again, _, resumed = fit(cut, net=net, resume=True)
    assert equal(end, resumed) and end["quantizers"]["quantizers"]
    assert float(end["metrics"]["compress/sparsity"]) == pytest.approx(0.8, abs=1e-3)

    small, (x, y) = lc.finalize(lit).net, digits().dataset.tensors
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(lit.eval()(x), expected) and torch.equal(again.eval()(x), expected)
        assert (expected.argmax(1) == y).float().mean() > 0.9
        info = lc.save(small, tmp_path / "small.lcz")
        assert torch.equal(lc.load(tmp_path / "small.lcz", into=NETS[net]()).eval()(x), expected)
        assert info.file_bytes < 0.1 * info.dense_bytes
        if net == "batchnorm":
            fused = fusion.fused
            assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
            torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
            lc.save(fused, tmp_path / "fused.lcz")
            assert torch.equal(lc.load(tmp_path / "fused.lcz", into=NETS[net]()).eval()(x), fused(x))

    runtime = pytest.importorskip("onnxruntime")
    lc.export_onnx(small, x[:16], tmp_path / "small.onnx")
    session = runtime.InferenceSession(tmp_path / "small.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (torch.from_numpy(logits).argmax(1) == expected.argmax(1)).float().mean() >= 0.99


class Distilled(Lit):
    """Soft labels of a teacher at temperature 5; learned steps have a learning rate of their own."""

    def __init__(self, step_lr: float) -> None:
        super().__init__()
        self.save_hyperparameters({"temperature": 5.0})
        self.step_lr = step_lr
        self.teacher = [nn.Linear(8, 3).requires_grad_(False)]  # in a list: no part of the module

    def training_step(self, batch, batch_idx):
        t = self.hparams["temperature"]
        soft = (2 * self.teacher[0](batch[0]) / t).softmax(1)
        return t**2 * nn.functional.kl_div((self(batch[0]) / t).log_softmax(1), soft, reduction="batchmean")

    def configure_optimizers(self):
        steps, others = lc.quantization.parameter_groups(self)
        return torch.optim.SGD([{"params": others}, {"params": steps, "lr": self.step_lr}], lr=1e-2)


def logged(folder: Path, tag: str) -> list[float]:
    text = Path(CSVLogger(folder, version=0).log_dir, "metrics.csv").read_text()
    return [float(row[tag]) for row in csv.DictReader(text.splitlines()) if row.get(tag)]


@pytest.mark.parametrize("lost", [False, True])
def test_a_range_that_is_lost_in_hot_distillation_shows_in_the_logs(tmp_path, lost):
    """Steps that learn too fast outgrow every weight; the loss alone would not say so."""
    lit = Distilled(step_lr=100.0 if lost else 1e-3)
    qat = QuantizationAwareTraining(2, 4, "lsq", edge_layers_bits=None)
    with pytest.warns(UserWarning, match=r"temperature=5\.0 together with 2-bit weights"):
        trainer(qat, logger=CSVLogger(tmp_path, version=0), max_epochs=3).fit(lit, loader())
    sqnr, levels = (
        [logged(tmp_path, f"compress/{quantity}/net.{i}") for i in (0, 2)]
        for quantity in ("sqnr_db", "levels_used")
    )
    assert all(len(values) == 3 for values in sqnr + levels)
    for layer, used in zip((lit.net[0], lit.net[2]), levels, strict=True):
        assert used[-1] == pytest.approx(len(layer.weight.sign().unique()) / 3)  # 2 bits: -s, 0, s
    if lost:
        assert levels[1][1:] == pytest.approx([1 / 3] * 2) and sqnr[1][1:] == [0.0] * 2  # every weight is 0
        assert max(sqnr[0][1:]) < 2.0
    else:
        assert levels == [[1.0] * 3] * 2 and min(map(min, sqnr)) > 3.0
