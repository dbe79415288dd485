"""Teach a CIFAR ResNet of half the width by a trained ResNet-56, and train the same one without a teacher.

    python recipes/distill_cifar.py --checkpoint resnet56.safetensors
    python recipes/distill_cifar.py --checkpoint resnet56.safetensors --validation 2000 --seeds 10

Data and checkpoints are those of ``recipes/cifar_resnet.py``. What the teacher answers to every training image and to
its mirror image is computed once, so a step costs what the student costs. The student is a ResNet-20 of half the width:
68,050 parameters, the teacher has 853,018 (akamaster's weights, 93.30 %).

Measured with 10,000 training and 5,000 test images, 200 steps of 64 images, seeds 0, 1 and 2, options as they are:

                                 top-1, each seed             mean      standard deviation
    alone                        44.48 %  45.74 %  33.68 %    41.30 %   6.63
      at learning rate 0.03      40.10 %  43.32 %  35.00 %    39.47 %   4.20
    with the teacher             46.16 %  46.02 %  45.04 %    45.74 %   0.61
    difference                   +1.68    +0.28    +11.36     +4.44     6.03

Better with the teacher for all three seeds, but by how much is one bad start of the student alone. Learning rates were
chosen with one seed on 2,000 training images that did not train: alone 42.7 % at 0.03 and 43.5 % at 0.1, with the
teacher 45.5 % at 0.03. Each seed ran in a process of its own, from answers of the teacher that were computed once for
all of them. Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python
3.11, torch 2.15.0, lightning 2.6.6. CIFAR-100 needs a GPU and other data: not tested.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cifar_resnet import add_options, build, logits, normalize, read
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.distillation.module import Distillation
from lightning_compress.tables import text


class Remembered(nn.Module):
    """A teacher that looks its answers up: the student is called with (images, numbers of the images), and so is this.

    Args:
        answers: (views × images, classes).
    """

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.register_buffer("answers", answers)

    def forward(self, images: Tensor, numbers: Tensor) -> Tensor:
        return self.answers[numbers]


class LitThin(LightningModule):
    """A thin CIFAR ResNet; every image comes as it is or mirrored.

    Args:
        depth: of the network.
        width: channels of its first stage.
        lr: learning rate of SGD at its highest, after a fifth of the steps.
        images: of the training set, by which the second view of an image is numbered.
    """

    def __init__(self, depth: int, width: int, lr: float, images: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = lc.models.ResNetCIFAR(depth, width=width)

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, numbers = batch
        mirrored = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        loss = F.cross_entropy(self(normalize(images), numbers + mirrored * self.hparams.images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        lr, steps = self.hparams.lr, int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def trained(
    wrap: Callable[[LitThin], LightningModule],
    lr: float,
    seed: int,
    data: TensorDataset,
    options: argparse.Namespace,
) -> nn.Module:
    """The network after one training; with the same seed it starts from the same weights and sees the same batches."""
    seed_everything(seed, workers=True, verbose=False)
    lit = LitThin(options.depth, options.width, lr, len(data))
    Trainer(
        max_steps=options.max_steps,
        logger=CSVLogger(options.output_dir, name="csv"),
        log_every_n_steps=options.log_every,
        enable_checkpointing=False,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        default_root_dir=options.output_dir,
    ).fit(wrap(lit), DataLoader(data, options.batch_size, shuffle=True, drop_last=True))
    return lit.net.eval()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, "outputs/distill_cifar", max_steps=200, lr=0.03)
    parser.set_defaults(arch="resnet56", train_size=10_000, batch_size=64)
    parser.add_argument("--depth", type=int, default=20, help="of the student")
    parser.add_argument(
        "--width", type=int, default=8, help="channels of its first stage; the teacher has 16"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr-alone", type=float, default=0.1, help="learning rate without a teacher")
    parser.add_argument("--alpha", type=float, default=0.9, help="share of the teacher in the loss")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--loss", default="kd", help="kd or dkd")
    parser.add_argument(
        "--validation",
        type=int,
        default=0,
        help="judge by so many further training images instead of the test images",
    )
    parser.add_argument("--progress", action="store_true", help="draw progress bars")
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    images, labels = read(options.data, True, options.train_size + options.validation)
    held = images[options.train_size :], labels[options.train_size :]
    images, labels = images[: options.train_size], labels[: options.train_size]
    judged = held if options.validation else read(options.data, False, options.limit_test)
    teacher = build(options.arch, options.checkpoint).eval()
    answers = torch.cat([logits(teacher, view) for view in (images, images.flip(3))]).clone()
    data = TensorDataset(images, labels, torch.arange(len(images)))

    def taught(lit: LitThin) -> LightningModule:
        return Distillation(
            lit, Remembered(answers), options.loss, alpha=options.alpha, temperature=options.temperature
        )

    def accuracy(net: nn.Module) -> float:
        return float((logits(net, judged[0]).argmax(1) == judged[1]).float().mean())

    rows = [[f"teacher, {options.arch}", lc.cost(teacher).params, "", f"{accuracy(teacher):.2%}", "", ""]]
    runs: dict[str, list[float]] = {"alone": [], "distilled": []}
    for seed in options.seeds:
        runs["alone"].append(accuracy(trained(lambda lit: lit, options.lr_alone, seed, data, options)))
        net = trained(taught, options.lr, seed, data, options)
        runs["distilled"].append(accuracy(net))
        torch.save(net.state_dict(), options.output_dir / f"distilled_{seed}.pt")
        print(
            f"seed {seed}: " + ", ".join(f"{name} {found[-1]:.2%}" for name, found in runs.items()),
            flush=True,
        )
    for name, found in runs.items():
        each = " ".join(f"{value:.2%}" for value in found)
        rows.append(
            [
                f"student, {name}",
                lc.cost(net).params,
                each,
                f"{statistics.mean(found):.2%}",
                deviation(found),
                "",
            ]
        )
    gains = [b - a for a, b in zip(runs["alone"], runs["distilled"], strict=True)]
    rows.append(
        ["difference", "", " ".join(f"{g:+.2%}" for g in gains), f"{statistics.mean(gains):+.2%}", deviation(gains),
         f"{sum(g > 0 for g in gains)} of {len(gains)} seeds"]
    )  # fmt: skip
    print(text(["network", "parameters", "top-1, each seed", "mean", "deviation", "better"], rows))


def deviation(values: list[float]) -> str:
    """Sample standard deviation."""
    return f"{statistics.stdev(values):.2%}" if len(values) > 1 else "-"


if __name__ == "__main__":
    main()
