"""Fine-tune a trained CIFAR ResNet with 2 to 8 bit weights and activations, and write what would be deployed.

    python recipes/cifar_qat.py --checkpoint resnet20.safetensors --bits 4 4 --max-steps 300
    python recipes/cifar_qat.py --checkpoint resnet20.safetensors --bits 2 2 --max-steps 150 --lr 0.02

Data and checkpoints are those of ``recipes/cifar_resnet.py``. The first and last layer keep 8 bits.

Measured on ResNet-20 (float32 91.50 %, 909,174 bytes), 5,000 test images (half of the test set), last step, seed 0, one
run each; ``file_bytes`` with BatchNorm folded:

                                  top-1      file_bytes   ratio
    W4A4, 300 steps, lr 0.005     90.40 %       123,264    8.73
    W4A4, 400 steps, lr 0.01      90.20 %       123,283    8.73
    W4A4, 300 steps, lr 0.001     89.86 %       123,282    8.73
    W2A2, as it starts            50.64 %        60,215   17.87
    W2A2, 150 steps, lr 0.02      79.38 %        60,049   17.92

300 steps take three minutes. Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python 3.11, torch 2.15.0,
lightning 2.6.6.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from cifar_resnet import CIFAR10, LitClassifier, add_options, build, logits, normalize, read
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.quantization import parameter_groups
from lightning_compress.tables import text


class LitQuantized(LitClassifier):
    """The classifier of ``cifar_resnet.py``, whose learned steps do not decay."""

    def configure_optimizers(self) -> dict[str, Any]:
        steps, others = parameter_groups(self)
        groups = [{"params": others}, {"params": steps, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(
            [g for g in groups if g["params"]],
            lr=self.hparams.lr,
            momentum=0.9,
            weight_decay=1e-4,
            nesterov=True,
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((logits(net, images).argmax(1) == labels).float().mean())


def compensated(net: nn.Module, options: argparse.Namespace) -> nn.Module:
    """Weights rounded so that the error in every layer's output is small: a better start than the nearest values."""
    inputs = normalize(read(options.data, True, min(options.train_size or 512, 512))[0]).split(128)
    rule = lc.Quantize(options.bits[0], edge_bits=8, rounding="compensated", samples=512)
    return lc.compress(net.eval(), [rule], example_input=inputs[0][:1], data=inputs).model.train()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser, "outputs/cifar_qat", max_steps=300, lr=0.005)
    parser.add_argument("--bits", type=int, nargs=2, default=[4, 4], help="of weights and of activations")
    parser.add_argument("--method", default="lsq", choices=["fake_quant", "lsq", "pact"])
    parser.add_argument("--start", default="compensated", choices=["compensated", "float"])
    options = parser.parse_args(argv)
    out = options.output_dir
    out.mkdir(parents=True, exist_ok=True)
    seed_everything(options.seed, workers=True, verbose=False)
    lit = LitQuantized(options.arch, options.checkpoint, options.lr)
    dense = build(options.arch, options.checkpoint)
    dense.load_state_dict(lit.net.state_dict())
    if options.start == "compensated":
        lit.net = compensated(dense, options)  # its grid is what the steps begin with
    images, labels = read(options.data, False, options.limit_test)
    data = CIFAR10(options.data, options.batch_size, options.train_size, options.limit_test)
    weights, activations = options.bits
    qat = lc.QuantizationAwareTraining(weights, activations, method=options.method)
    Trainer(
        max_steps=options.max_steps,
        callbacks=[qat, lc.CompressionMonitor()],
        logger=[CSVLogger(out, name="csv"), TensorBoardLogger(out, name="tensorboard")],
        log_every_n_steps=options.log_every,
        default_root_dir=out,
    ).fit(lit, data)
    small = lc.finalize(lit).net
    fused = lc.compress(small, [lc.FuseBatchNorm()], example_input=normalize(images[:1])).model
    rows = []
    for name, net in (("float32", dense), (f"W{weights}A{activations}", small), ("the same, fused", fused)):
        info = lc.save(net, out / f"{name.replace(' ', '_').replace(',', '')}.lcz")
        top1 = accuracy(net, images, labels)
        rows.append([name, f"{top1:.2%}", f"{info.file_bytes:,}", f"{info.compression_ratio:.2f}"])
    torch.save(small.state_dict(), out / "rounded.pt")  # plain keys and values; loads without this library
    print(text(["network", "top-1", "file_bytes", "compression_ratio"], rows))


if __name__ == "__main__":
    main()
