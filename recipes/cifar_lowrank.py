"""Make the ranks of a trained CIFAR ResNet small, factorize it under a budget of MACs, and fine-tune the factors.

    python recipes/cifar_lowrank.py --checkpoint resnet20.safetensors --regularize-steps 0 --max-steps 0
    python recipes/cifar_lowrank.py --checkpoint resnet20.safetensors

Data and checkpoints are those of ``recipes/cifar_resnet.py``.

Measured on ResNet-20 with 5,000 test images (half of the test set), last step, seed 0, one run, options as they are:

                   top-1      parameters         MACs   file_bytes   ratio   speed-up
    dense          91.50 %       269,722   40,551,040      909,174    1.19
    regularized    90.80 %       269,722   40,551,040      909,143    1.19       0.96
    factorized     71.60 %       100,727   14,274,176      344,107    3.15       1.23
    fine-tuned     87.16 %       100,727   14,274,176      344,119    3.15       1.21
    fused          87.16 %       100,039   14,274,176      337,843    3.21       1.50

150 steps with the penalty and 300 of fine-tuning, 128 images each: a small part of a training. Speed-up: one image, one
thread, paired medians. Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python 3.11, torch 2.15.0,
lightning 2.6.6.
"""

from __future__ import annotations

import argparse
from typing import Any

from cifar_resnet import CIFAR10, LitClassifier, add_options, build, normalize, read, report
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import lightning_compress as lc


def fit(lit: LitClassifier, steps: int, stage: str, options: argparse.Namespace, *callbacks: Any) -> None:
    """One stage of training, with a log of its own."""
    out = options.output_dir
    Trainer(
        max_steps=steps,
        callbacks=[*callbacks, lc.CompressionMonitor()],
        logger=[CSVLogger(out, name=f"csv/{stage}"), TensorBoardLogger(out, name=f"tensorboard/{stage}")],
        log_every_n_steps=options.log_every,
        default_root_dir=out,
    ).fit(lit, CIFAR10(options.data, options.batch_size, options.train_size, options.limit_test))


def factorized(net: nn.Module, options: argparse.Namespace) -> Any:
    """Schemes and ranks that lose least of every layer's output under the budget."""
    inputs = normalize(read(options.data, True, min(options.train_size or 512, 512))[0]).split(128)
    rule = lc.Factorize(budget=("macs", 1 / options.macs_ratio), activation_aware=True, samples=512)
    return lc.compress(net.eval(), [rule], example_input=inputs[0][:1], data=inputs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, "outputs/cifar_lowrank", max_steps=300, lr=0.01)
    parser.add_argument("--macs-ratio", type=float, default=2.84, help="how many times fewer MACs")
    parser.add_argument(
        "--regularize-steps", type=int, default=150, help="with the penalty, before factorizing"
    )
    parser.add_argument("--kind", default="nuclear", choices=["nuclear", "entropy", "l1_l2", "hoyer", "scad"])
    parser.add_argument("--strength", type=float, default=0.05)
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed, workers=True, verbose=False)
    lit = LitClassifier(options.arch, options.checkpoint, options.lr)
    networks = {"dense": build(options.arch, options.checkpoint)}
    networks["dense"].load_state_dict(lit.net.state_dict())
    if options.regularize_steps:
        # The penalty is for the matrices that will be factorized.
        layers = factorized(networks["dense"], options).plan[0].layers.values()
        schemes = {f"net.{decided['layer']}": decided["scheme"] for decided in layers}
        low = lc.LowRankRegularization(options.kind, options.strength, matrix=schemes, include=list(schemes))
        fit(lit, options.regularize_steps, "regularize", options, low)
        networks["regularized"] = lc.finalize(lit).net
    result = factorized(lit.net, options)
    print(result.plan[0].data)
    lit.net = result.model.train()
    networks["factorized"] = lc.finalize(lit).net
    if options.max_steps:
        fit(lit, options.max_steps, "fine_tune", options)
        networks["fine-tuned"] = lc.finalize(lit).net
        networks["fused"] = lc.compress(
            networks["fine-tuned"],
            [lc.FuseBatchNorm()],
            example_input=normalize(read(options.data, False, 1)[0]),
        ).model
    report(networks, *read(options.data, False, options.limit_test), options.output_dir)


if __name__ == "__main__":
    main()
