"""Remove channels of a trained CIFAR ResNet until a budget of MACs is met, and fine-tune what is left.

    python recipes/cifar_channels.py --checkpoint resnet20.safetensors --max-steps 0
    python recipes/cifar_channels.py --checkpoint resnet20.safetensors

Data and checkpoints are those of ``recipes/cifar_resnet.py``.

Measured on ResNet-20 (akamaster's weights) with 5,000 test images, budget of MACs 1 / 1.65, 512 training images to fit
with, 400 steps of 128 images, the dense network as teacher (0.9 of the loss, T = 4), last step:

                                             top-1     OutputErrorRate  MACs         parameters  file_bytes
    dense                                    91.50 %                    40,551,040   269,722     909,174
    inside the blocks, what follows fitted   83.94 %   14.16 %          24,404,608   161,018     543,151
      400 steps                              89.56 %    7.66 %          24,404,608   161,018     543,165
    everywhere (--include "*"), fitted       85.14 %   12.44 %          24,548,468   164,689     554,710
      400 steps at learning rate 0.02        88.92 %    7.98 %          24,548,468   164,689     554,637

Where channels go and the learning rate were chosen by 2,000 training images that did not train. One run each, seed 0.
Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only, about 1.5 s a step. Python 3.11, torch 2.15.0, lightning
2.6.6. What the clock says of such networks is in ``recipes/benchmarks/latency.py``.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from cifar_lowrank import fit
from cifar_resnet import LitClassifier, add_options, augment, normalize, read, report
from lightning.pytorch import seed_everything
from torch import Tensor, nn

import lightning_compress as lc


class LitTaught(LitClassifier):
    """The classifier of ``cifar_resnet.py``, which also learns what the network it began with answers.

    Args:
        arch: as there.
        checkpoint: as there.
        lr: learning rate at the first step.
        share: of the teacher in the loss, from 0 to 1.
        temperature: the answers of both are divided by it.
    """

    def __init__(
        self, arch: str, checkpoint: str | None, lr: float, share: float, temperature: float
    ) -> None:
        super().__init__(arch, checkpoint, lr)
        self.teacher = (
            copy.deepcopy(self.net).eval(),
        )  # no submodule: not trained, not saved, not compressed

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = normalize(augment(batch[0])), batch[1]
        share, temperature = self.hparams.share, self.hparams.temperature
        answers = self(x)
        loss = F.cross_entropy(answers, labels)
        if share:
            with torch.no_grad():
                soft = F.softmax(self.teacher[0](x) / temperature, 1)
            taught = F.kl_div(F.log_softmax(answers / temperature, 1), soft, reduction="batchmean")
            loss = (1 - share) * loss + share * temperature**2 * taught
        self.log("train_loss", loss)
        return loss


def add_removal_options(parser: argparse.ArgumentParser, macs_ratio: float) -> None:
    """Which channels go; the names are those of RemoveChannels."""
    parser.add_argument("--macs-ratio", type=float, default=macs_ratio, help="how many times fewer MACs")
    parser.add_argument("--criterion", default="magnitude", help="as RemoveChannels takes it")
    parser.add_argument("--scope", default="layer", choices=["layer", "global"])
    parser.add_argument("--per", default="channel", choices=["channel", "mac"])
    parser.add_argument("--round-to", type=int, default=1, help="keep a multiple of so many channels")
    patterns = "patterns of layers whose outputs may go"
    parser.add_argument("--include", nargs="+", default=["*"], help=patterns)
    parser.add_argument("--exclude", nargs="*", default=[], help="patterns of layers whose outputs stay")
    parser.add_argument("--samples", type=int, default=512, help="training images to score and to fit with")
    parser.add_argument(
        "--reconstruct",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fit the layers behind what went",
    )


def removal(options: argparse.Namespace) -> lc.RemoveChannels:
    """The transform that the options mean."""
    same = ("criterion", "scope", "per", "round_to", "include", "exclude", "samples", "reconstruct", "seed")
    return lc.RemoveChannels(
        budget=("macs", 1 / options.macs_ratio), **{name: getattr(options, name) for name in same}
    )


def smaller(net: nn.Module, options: argparse.Namespace) -> nn.Module:
    """The network without the channels that it misses least."""
    images, labels = read(options.data, True, min(options.train_size or options.samples, options.samples))
    batches = list(zip(normalize(images).split(128), labels.split(128), strict=True))
    steps: list[lc.Transform] = [removal(options)]
    if options.reestimate:
        steps.append(lc.ReestimateBatchNorm(samples=options.samples))
    result = lc.compress(net, steps, example_input=batches[0][0][:1], data=batches)
    print(result)
    return result.model


def held_out(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The images to judge by: the test images, or with --validation the last training images, which do not train."""
    if not options.validation:
        return read(options.data, False, options.limit_test)
    images, labels = read(options.data, True, None)
    left = len(images) - options.validation
    options.train_size = min(options.train_size or left, left)
    return images[left:], labels[left:]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, "outputs/cifar_channels", max_steps=400, lr=0.01)
    add_removal_options(parser, 1.65)
    parser.set_defaults(include=["layer*.conv1"])  # inside the blocks, where nothing else is coupled
    parser.add_argument(
        "--reestimate", action=argparse.BooleanOptionalAction, default=False, help="BatchNorm"
    )
    parser.add_argument("--teacher", type=float, default=0.9, help="share of the dense network in the loss")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument(
        "--validation", type=int, default=0, help="judge by so many training images, which do not train"
    )
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed, workers=True, verbose=False)
    lit = LitTaught(options.arch, options.checkpoint, options.lr, options.teacher, options.temperature)
    dense = lit.teacher[0]
    images, labels = held_out(options)
    networks = {"dense": dense, "removed": smaller(dense, options)}
    if options.max_steps:
        lit.net = copy.deepcopy(networks["removed"]).train()
        fit(lit, options.max_steps, "fine_tune", options)
        networks["fine-tuned"] = lc.finalize(lit).net
        fused = lc.compress(networks["fine-tuned"], [lc.FuseBatchNorm()], example_input=normalize(images[:1]))
        networks["fused"] = fused.model
    report(networks, images, labels, options.output_dir)


if __name__ == "__main__":
    main()
