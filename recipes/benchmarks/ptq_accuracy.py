"""What post-training quantization costs in accuracy: CIFAR ResNets, with no data, or with 1,024 training images.

    python recipes/benchmarks/ptq_accuracy.py --data DIR --checkpoint resnet20=A.safetensors resnet56=B.safetensors

Checkpoints and data are those of ``recipes/cifar_resnet.py``. BatchNorm is folded first; "no data" means inputs that
were synthesized from the network's own BatchNorm statistics. The first and last layer keep 8 bits, but for "all layers"
rows; "nearest" rows round to nearest, the others with compensated rounding and bias correction. Every row is one
network that was really quantized and written.

Measured with 5,000 test images (half of the test set, one image is 0.02 points; 5,000 images resolve about ±0.4), seed
0, one run; ResNet-56 with 128 synthesized inputs, ResNet-20 with 256:

                                 ResNet-20                    ResNet-56
                    inputs       top-1    file_bytes          top-1
    float32                      91.50     909,174            93.30
    W8              no data      91.50     250,198
    W6              no data      91.78     183,191
    W4, nearest     no data      89.70     121,821            91.90
    W4              no data      91.52     122,689            93.04
    W4, all layers  no data      91.50     121,977
    W3, nearest     no data      74.58      91,874
    W3              no data      90.80      93,202
    W8A8            no data      91.46     250,756            93.50
    W4A8            no data      91.68     123,237            93.22
    W8A8            1024 images  91.56     250,762
    W4              1024 images  91.66     122,706
    W4A8            1024 images  91.76     123,256
    W3A8            1024 images  91.18      93,723
    W4A4            1024 images  90.86     123,255

Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python 3.11, torch 2.15.0.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.stats import Calibration
from lightning_compress.tables import text

sys.path.append(str(Path(__file__).resolve().parents[1]))
from cifar_resnet import augment, build, normalize, read

BEST = {"edge_bits": 8, "rounding": "compensated", "bias_correction": True}
PLAIN = {"edge_bits": 8}
ROWS: list[tuple[str, bool, dict[str, Any]]] = [  # name, with data, options
    ("W8", False, {"bits": 8}),
    ("W6", False, {"bits": 6, **PLAIN}),
    ("W4, nearest", False, {"bits": 4, **PLAIN}),
    ("W4", False, {"bits": 4, **BEST}),
    ("W4, all layers", False, {"bits": 4, **BEST, "edge_bits": None}),
    ("W3, nearest", False, {"bits": 3, **PLAIN}),
    ("W3", False, {"bits": 3, **BEST}),
    ("W8A8", False, {"bits": 8, "activation_bits": 8}),
    ("W4A8", False, {"bits": 4, "activation_bits": 8, **BEST}),
    ("W8A8", True, {"bits": 8, "activation_bits": 8}),
    ("W4", True, {"bits": 4, **BEST}),
    ("W4A8", True, {"bits": 4, "activation_bits": 8, **BEST}),
    ("W3A8", True, {"bits": 3, "activation_bits": 8, **BEST}),
    ("W4A4", True, {"bits": 4, "activation_bits": 4, "activation_calibrator": "mse", **BEST}),
]


@torch.inference_mode()
def top1(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    found = torch.cat([net.eval()(normalize(batch)).argmax(1) for batch in images.split(500)])
    return float((found == labels).float().mean())


def quantized(net: nn.Module, inputs: Calibration, options: dict[str, Any], seed: int) -> nn.Module:
    transforms = [lc.FuseBatchNorm(), lc.Quantize(samples=inputs.samples, **options)]
    return lc.compress(net, transforms, example_input=inputs.example_input, data=inputs.data, seed=seed).model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", nargs="+", required=True, help="arch=file, for every architecture")
    parser.add_argument("--data", help="folder of .npz packs; left out, torchvision downloads CIFAR-10")
    parser.add_argument("--rows", nargs="+", help="only rows that begin so, such as 'W4A8, no data'")
    parser.add_argument("--samples", type=int, default=256, help="synthesized inputs")
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--limit-test", type=int, help="use the first so many test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/ptq_accuracy"))
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    images, labels = read(options.data, False, options.limit_test)
    source = {False: "no data", True: f"{options.calibration} images"}
    rows = [r for r in ROWS if not options.rows or f"{r[0]}, {source[r[1]]}".startswith(tuple(options.rows))]
    table: dict[tuple[str, bool], list[Any]] = {}
    header = ["network", "inputs"]
    for given in options.checkpoint:
        arch, _, file = given.partition("=")
        net = build(arch, file).eval()
        x = normalize(images[:1])
        inputs = {False: Calibration(x, synthesized(net, x, options), options.samples, options.seed)}
        if any(with_data for _, with_data, _ in rows):
            torch.manual_seed(options.seed)
            train = normalize(augment(read(options.data, True, options.calibration)[0]))
            inputs[True] = Calibration(x, train.split(128), options.calibration, options.seed)
        dense = top1(net, images, labels)
        header += [f"{arch} top-1", "loss", "file_bytes"]
        info = lc.save(net, options.output_dir / f"{arch}.lcz")
        table.setdefault(("float32", False), ["float32", ""]).extend([f"{dense:.2%}", "", info.file_bytes])
        for name, with_data, wanted in rows:
            begin = time.perf_counter()
            small = quantized(net, inputs[with_data], wanted, options.seed)
            accuracy = top1(small, images, labels)
            info = lc.save(small, options.output_dir / f"{arch}.lcz")
            cells = table.setdefault((name, with_data), [name, source[with_data]])
            cells.extend([f"{accuracy:.2%}", f"{100 * (dense - accuracy):.2f}", info.file_bytes])
            took = time.perf_counter() - begin
            print(f"{arch} {name}, {source[with_data]}: {accuracy:.2%}, {took:.0f} s", flush=True)
    print(text(header, list(table.values())))


def synthesized(net: nn.Module, x: Tensor, options: argparse.Namespace) -> list[Tensor]:
    """The inputs that every row without data uses: synthesized once."""
    drawn = Calibration(x, "batchnorm", options.samples, options.seed)
    return list(drawn.batches(net))


if __name__ == "__main__":
    main()
