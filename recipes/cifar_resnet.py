"""Prune a trained CIFAR ResNet at once, without training, or while fine-tuning it for a few steps.

    python recipes/cifar_resnet.py --checkpoint resnet20.safetensors --post-training --sparsity 0.3 0.5 0.7
    python recipes/cifar_resnet.py --checkpoint resnet20.safetensors --sparsity 0.8 --max-steps 100
    python recipes/cifar_resnet.py fit --config recipes/configs/cifar_resnet.yaml \\
        --model.checkpoint resnet20.safetensors

CIFAR-10 is downloaded by torchvision into data/, or with ``--data DIR`` read from ``.npz`` packs (`read` shows their
members). Checkpoints use the names of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause).

Measured on ResNet-20 (akamaster's weights) with 5,000 test images (the ``.npz`` pack: half of the test set, one image
is 0.02 points), N = 268,336 target weights. All files are ``.lcz``; the plain dense state dict takes 1,118,423 bytes.

                               top-1     OutputErrorRate   zeros     file_bytes   ratio   speed-up
    dense                      91.50 %                           0      909,174    1.19
    post-training, 30 %        91.52 %    2.22 %            80,501      643,715    1.69   0.96
    post-training, 50 %        89.78 %    6.22 %           134,168      469,503    2.31   1.00
    post-training, 50 % --fuse 89.78 %    6.22 %           134,168      462,990    2.32   1.16
    post-training, 70 %        73.24 %   25.22 %           187,835      292,134    3.71   0.99
    post-training, 90 %         9.62 %   90.30 %           241,502      107,767   10.06   0.97
    fine-tuning to 80 %        84.00 %   13.84 %           214,669      201,115    5.39   0.99
      the same, fused          84.00 %   13.84 %           214,669      195,584    5.50   1.12

MACs are 40,551,040 in every row: zeros save bytes, not MACs. A speed-up other than 1 comes from the folded BatchNorm or
is noise (dense against itself: 1.00 to 1.02; median of 20 paired ratios, one image, one thread, about 3 ms).
Fine-tuning is 100 steps of 128 images at learning rate 0.01 (not tuned), seed 0; seed 1 gives 84.26 %. It took 3.4
minutes, and post-training with four sparsities 1.8. Runs: post-training three (--fuse two), fine-tuning with seed 0
two, each with the same accuracies and bytes; the speed-ups are of the last. Machine: 2 shared cores of an Intel Xeon at
2.1 GHz, CPU only. Python 3.11, torch 2.15.0, lightning 2.6.6.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.archive import dense_bytes
from lightning_compress.checkpoints import load_weights
from lightning_compress.tables import text

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# -- data ----------------------------------------------------------------------------------------------------


class CIFAR10(LightningDataModule):
    """CIFAR-10 in memory, as bytes; the model augments and normalizes batches, on its own device.

    Args:
        folder: of ``.npz`` packs; None downloads the data set with torchvision into ``data/``.
        batch_size: images per training step.
        train_size: use the first so many training images (their order is random); None for all.
        limit_test: the same for the test images.
    """

    def __init__(
        self,
        folder: str | None = None,
        batch_size: int = 128,
        train_size: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.batch_size = folder, batch_size
        self.train_size, self.limit_test = train_size, limit_test

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train = TensorDataset(*read(self.folder, True, self.train_size))
        if stage == "test":
            self.test = TensorDataset(*read(self.folder, False, self.limit_test))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=500)


def read(folder: str | None, train: bool, limit: int | None) -> tuple[Tensor, Tensor]:
    """The first images as (N, 3, 32, 32) uint8, and their labels."""
    if folder is None:
        from torchvision.datasets import CIFAR10 as Download

        downloaded = Download("data", train=train, download=True)
        images, labels = downloaded.data[:limit].transpose(0, 3, 1, 2), np.array(downloaded.targets[:limit])
    elif not train:
        with np.load(Path(folder) / "cifar10_test.npz") as pack:
            images, labels = pack["x_test"][:limit].transpose(0, 3, 1, 2), pack["y_test"][:limit]
    else:
        files = sorted(Path(folder).glob("cifar10_train_*.npz"))
        if not files:
            raise SystemExit(f"{folder} holds no cifar10_train_*.npz; leave --data out to download CIFAR-10.")
        parts, left = [], 50_000 if limit is None else limit
        for file in files:
            if left > 0:  # a whole pack takes seconds
                with np.load(file) as pack:
                    parts.append((decode(pack["x_train_delta"][:left]), pack["y_train"][:left]))
                left -= len(parts[-1][1])
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))


def decode(residual: np.ndarray) -> np.ndarray:
    """Pixels of a training pack: red and blue are stored minus green, then as differences down and along the rows."""
    pixels = np.cumsum(np.cumsum(residual, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return pixels


def augment(images: Tensor) -> Tensor:
    """Shift every image by up to 4 pixels (black comes in), and mirror every second one."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), device=images.device)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    columns = torch.where(torch.rand(n, 1, device=images.device) < 0.5, columns.flip(0), columns)
    image = torch.arange(n, device=images.device)[:, None, None]
    return padded[image, :, (top + rows)[:, :, None], (left + columns)[:, None, :]].movedim(-1, 1)


def normalize(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


# -- model ---------------------------------------------------------------------------------------------------


class LitClassifier(LightningModule):
    """A CIFAR ResNet with SGD and a cosine learning rate.

    Args:
        arch: resnet20, resnet32, resnet44, resnet56 or resnet110.
        checkpoint: weights to start from: .safetensors, .ckpt or .pt.
        lr: learning rate at the first step.
    """

    def __init__(self, arch: str = "resnet20", checkpoint: str | None = None, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="checkpoint")
        self.net = build(arch, checkpoint)
        self.example_input_array = torch.zeros(1, 3, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(normalize(augment(images))), labels)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_accuracy", (self(normalize(images)).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def build(arch: str, checkpoint: str | None) -> nn.Module:
    net = lc.models.build(arch)
    return load_weights(net, checkpoint) if checkpoint else net


# -- runs ----------------------------------------------------------------------------------------------------


def post_training(options: argparse.Namespace) -> None:
    """No Trainer: prune a copy of the trained network in one call, once for each sparsity."""
    images, labels = read(options.data, False, options.limit_test)
    dense = build(options.arch, options.checkpoint).eval()
    networks = {"dense": dense}
    for sparsity in options.sparsity:
        small = lc.compress(dense, [lc.Prune(sparsity)]).model
        zeros, size = zeros_among_targets(small)
        if zeros != math.floor(sparsity * size + 0.5):
            raise RuntimeError(f"{zeros} zeros among {size} entries at sparsity {sparsity}.")
        if options.fuse:
            small = lc.compress(small, [lc.FuseBatchNorm()], example_input=normalize(images[:1])).model
        networks[f"sparsity_{sparsity}"] = small
    report(networks, images, labels, options.output_dir)


def fine_tune(options: argparse.Namespace) -> None:
    """Prune along a schedule while training; the same run as configs/cifar_resnet.yaml."""
    out, (sparsity,) = options.output_dir, options.sparsity
    lit = LitClassifier(options.arch, options.checkpoint, options.lr)
    dense = build(options.arch, options.checkpoint)
    dense.load_state_dict(lit.net.state_dict())
    pruning = lc.ScheduledPruning(
        sparsity=sparsity, schedule="cubic", begin=0.1, end=0.7, every=options.every
    )
    fusion = lc.BatchNormFusion(attribute="net")
    logger = CSVLogger(out, name="csv")
    Trainer(
        max_steps=options.max_steps,
        callbacks=[pruning, fusion, lc.CompressionMonitor()],
        logger=[logger, TensorBoardLogger(out, name="tensorboard")],
        log_every_n_steps=options.log_every,
        default_root_dir=out,
    ).fit(lit, CIFAR10(options.data, options.batch_size, options.train_size, options.limit_test))
    check_curve(Path(logger.log_dir) / "metrics.csv", sparsity, zeros_among_targets(lit.net)[1], options)
    torch.save(lit.net.state_dict(), out / "pruned.pt")  # loads without this library
    networks = {"dense": dense, "pruned": lit.net, "fused": fusion.fused}
    report(networks, *read(options.data, False, options.limit_test), out)


def check_curve(metrics: Path, sparsity: float, size: int, options: argparse.Namespace) -> None:
    """What was logged is s(t) = sparsity (1 - (1 - p)^3), p = clip((t - begin) / (end - begin), 0, 1)."""
    begin, end = (math.floor(share * options.max_steps + 0.5) for share in (0.1, 0.7))
    with metrics.open() as file:
        lines = [line for line in csv.DictReader(file) if line["compress/sparsity"]]
    rows = []
    for line in lines:
        t = min(int(line["step"]) + 1, options.max_steps)  # Lightning counts from 0
        due = t - (t - begin) % options.every if begin <= t < end else t  # masks change every so many steps
        p = min(max((due - begin) / max(end - begin, 1), 0), 1)
        rows.append([t, float(line["compress/sparsity"]), sparsity * (1 - (1 - p) ** 3)])
        if abs(rows[-1][1] - rows[-1][2]) > 0.5 / size + 1e-9:
            raise RuntimeError(
                f"after step {t} the sparsity is {rows[-1][1]}, by the schedule {rows[-1][2]}."
            )
    print(text(["after step", "sparsity, logged", "s(t)"], rows))


@torch.inference_mode()
def logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net.eval()(normalize(batch)) for batch in images.split(500)])


def zeros_among_targets(net: nn.Module) -> tuple[int, int]:
    weights = [target.weight for target in lc.find(net)]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


def report(networks: dict[str, nn.Module], images: Tensor, labels: Tensor, folder: Path) -> None:
    """Write an archive of every network and print a table; the first network is the one to compare with."""
    dense, x, rows = next(iter(networks.values())), normalize(images[:1]), []
    threads = torch.get_num_threads()
    reference = logits(dense, images)
    for name, net in networks.items():
        out, errors = logits(net, images), lc.OutputErrorRate()
        errors.update(reference, out)
        info = lc.save(net, folder / f"{name}.lcz")
        zeros, size = zeros_among_targets(net)
        torch.set_num_threads(1)  # more would wait for one another whenever the machine has other work
        timing = lc.benchmark(net, x, baseline=dense, layerwise=False)
        torch.set_num_threads(threads)
        rows.append(
            [
                name,
                f"{(out.argmax(1) == labels).float().mean():.2%}",
                f"{float(errors.compute()):.2%}",
                f"{zeros:,} of {size:,}",
                lc.cost(net).params,
                info.file_bytes,
                dense_bytes(dense) / info.file_bytes,
                timing.macs,
                timing.latency_ms,
                timing.speed_up,
            ]
        )
    quantities = ["file_bytes", "compression_ratio", "MACs", "latency_ms", "speed-up"]
    print(
        text(["network", "top-1", "OutputErrorRate", "zeros among targets", "parameters", *quantities], rows)
    )


def add_options(parser: argparse.ArgumentParser, output: str, *, max_steps: int, lr: float) -> None:
    """What every recipe for CIFAR ResNets takes."""
    archs = [name for name in lc.models.names() if name.startswith("resnet")]
    parser.add_argument("--arch", default="resnet20", choices=archs)
    parser.add_argument("--checkpoint", help="trained weights: .safetensors, .ckpt or .pt")
    parser.add_argument(
        "--data", help="folder of .npz packs; left out, torchvision downloads CIFAR-10 into data/"
    )
    parser.add_argument("--max-steps", type=int, default=max_steps)
    parser.add_argument("--log-every", type=int, default=10, help="optimizer steps between log entries")
    parser.add_argument("--train-size", type=int, help="use the first so many training images")
    parser.add_argument("--limit-test", type=int, help="use the first so many test images")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path(output))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, "outputs/cifar_resnet", max_steps=100, lr=0.01)
    parser.add_argument("--post-training", action="store_true", help="no training; any number of sparsities")
    parser.add_argument(
        "--fuse", action="store_true", help="with --post-training: also fold BatchNorm into the convolutions"
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8])
    parser.add_argument("--every", type=int, default=10, help="optimizer steps between mask updates")
    options = parser.parse_args(argv)
    if not options.post_training and len(options.sparsity) > 1:
        parser.error("several sparsities need --post-training")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed, workers=True, verbose=False)
    post_training(options) if options.post_training else fine_tune(options)


if __name__ == "__main__":
    if sys.argv[1:2] in (["fit"], ["test"]):  # a LightningCLI
        LightningCLI(LitClassifier, CIFAR10)
    else:
        main()
