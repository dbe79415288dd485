"""float32 against int8 files in ONNX Runtime: time, size, and agreement with the fake-quantized PyTorch model.

    python recipes/benchmarks/int8_latency.py --data DIR --models resnet20 resnet56 lenet5 mobilenet_v2 \
        --checkpoint resnet20=A.safetensors resnet56=B.safetensors lenet5=C.safetensors

Every network is quantized to W8A8 three times: "inputs" rounds what each layer takes in, "outputs" also what it returns
to an addition, and "po2" takes powers of two as scales. All files of a network run in one process, in turns: one pass
of each, float32 first, then again. A ratio pairs an int8 pass with the float32 passes right before and after it.

Measured with ``--images 400 --calibration 128``, batch 32, one thread of a shared two-core x86-64 machine with VNNI, 20
passes, seed 0, torch 2.15.0, onnxruntime 1.31.1; MobileNetV2 has random weights:

    network       file           median ms  speed-up  size ratio  same top-1  within a step  max difference
    resnet20      float32            35.88     1
                  int8, inputs       50.84     0.749       0.276     100.00%        100.00%          0.1928
                  int8, outputs      23.97     1.499       0.279     100.00%        100.00%          0.2742
                  int8, po2          24.45     1.448       0.278     100.00%        100.00%          0
    resnet56      float32            93.90     1
                  int8, inputs      139.70     0.734       0.273      99.75%         99.95%          0.2199
                  int8, outputs      66.16     1.699       0.275      99.75%        100.00%          0.2170
                  int8, po2          59.63     1.623       0.274     100.00%        100.00%          0
    lenet5        float32             0.82     1
                  int8, po2           2.37     0.354       0.278     100.00%        100.00%          0
    mobilenet_v2  float32            55.18     1
                  int8, po2          79.57     0.716       0.278     100.00%        100.00%          0

Without ``--data`` images are random; without ``--checkpoint`` weights are, with BatchNorm statistics from one batch.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.export import export_onnx
from lightning_compress.tables import text

sys.path.append(str(Path(__file__).resolve().parents[1]))
from cifar_resnet import load_weights, normalize

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
FORMS = {"inputs": {}, "outputs": {"outputs": True}, "po2": {"outputs": True, "scale": "po2"}}


def network(name: str, checkpoint: str | None) -> nn.Module:
    if name == "mobilenet_v2":
        from torchvision.models import mobilenet_v2

        net: nn.Module = mobilenet_v2(num_classes=10)
    else:
        net = lc.models.build(name)
    return load_weights(net, checkpoint) if checkpoint else net


def images(name: str, folder: str | None, count: int) -> Tensor:
    """Network inputs: real images of the right data set, or random ones."""
    side, channels = (28, 1) if name == "lenet5" else (32, 3)
    if folder is None:
        x = torch.randn(count, channels, side, side)
    elif name == "lenet5":
        with np.load(Path(folder) / "mnist.npz") as pack:
            pixels = torch.from_numpy(pack["x_test"][:count].copy()).float().unsqueeze(1)
        x = (pixels / 255 - MNIST_MEAN) / MNIST_STD
    else:
        with np.load(Path(folder) / "cifar10_test.npz") as pack:
            x = normalize(torch.from_numpy(pack["x_test"][:count].transpose(0, 3, 1, 2).copy()))
    return nn.functional.interpolate(x, size=(96, 96)) if name == "mobilenet_v2" else x


@torch.no_grad()
def settle(net: nn.Module, x: Tensor) -> None:
    """Give random weights the BatchNorm statistics of a batch, as training would."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    net.train()(x)


def session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(files: dict[str, Path], x: Tensor, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of every pass; the files take turns."""
    sessions = {name: session(path, options.threads) for name, path in files.items()}
    feed = {"x": x.numpy()}
    times: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(options.warmup + options.runs + 1):
        for name, each in sessions.items():
            start = time.perf_counter()
            each.run(None, feed)
            if turn >= options.warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(name: str, checkpoint: str | None, folder: Path, options: argparse.Namespace) -> list[list[Any]]:
    x = images(name, options.data, options.images)
    net = network(name, checkpoint)
    if checkpoint is None:
        settle(net, x[: options.batch_size])
    net.eval()
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        net = lc.compress(net, [lc.FuseBatchNorm()], example_input=x[:2]).model
    files, reports = {"float32": folder / f"{name}.onnx"}, {}
    for form, extra in FORMS.items():
        quantize = lc.Quantize(8, activation_bits=8, seed=options.seed, **extra)
        small = lc.compress(net, [quantize], example_input=x[:2], data=x[: options.calibration]).model
        files[form] = folder / f"{name}_{form}.onnx"
        reports[form] = export_onnx(small, x, files[form])
    plain = export_onnx(small, x[:2], files["float32"], precision="float32")
    times = timed(files, x[: options.batch_size], options)
    base = np.array(times["float32"])
    rows: list[list[Any]] = [
        [name, "float32", float(np.median(base)), 1.0, plain.file_bytes, 1.0, "", "", ""]
    ]
    for form, report in reports.items():
        # Turn by turn: float32 i, int8 i, ..., float32 i + 1.
        ratio = float(np.median((base[:-1] + base[1:]) / 2 / np.array(times[form])[:-1]))
        sizes = [report.file_bytes, report.file_bytes / plain.file_bytes]
        agree = [f"{report.top1_agreement:.2%}", f"{report.within_step:.2%}", report.max_difference]
        rows.append([name, f"int8, {form}", float(np.median(times[form])), ratio, *sizes, *agree])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["lenet5", "resnet20"])
    parser.add_argument("--checkpoint", nargs="*", default=[], help="name=file, for any of the models")
    parser.add_argument(
        "--data", help="folder with cifar10_test.npz and mnist.npz; left out, images are random"
    )
    parser.add_argument("--images", type=int, default=64, help="images to compare outputs on")
    parser.add_argument("--calibration", type=int, default=64, help="the first of them that calibrate")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="first passes, which do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    checkpoints = dict(given.split("=", 1) for given in options.checkpoint)
    torch.manual_seed(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            rows += measure(name, checkpoints.get(name), Path(folder), options)
    header = ["network", "file", "median ms", "speed-up", "file_bytes", "size ratio"]
    print(text([*header, "same top-1", "within a step", "max difference"], rows))
    print(
        f"\nbatch {options.batch_size}, {options.threads} threads of {os.cpu_count()}, {platform.machine()}, "
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}; {options.runs} passes each"
    )


if __name__ == "__main__":
    main()
