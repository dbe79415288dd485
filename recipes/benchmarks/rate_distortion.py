"""Bytes against accuracy, without data: this library beside nncodec (ISO/IEC 15938-17), in one run.

    pip install nncodec
    python recipes/benchmarks/rate_distortion.py --data DIR

DIR holds ``cifar10_*.npz``, ``mnist.npz``, ``darcy_16_32.npz`` and the checkpoints ``resnet20_cifar10.safetensors``,
``resnet56_cifar10.safetensors``, ``lenet5_mnist.safetensors``, ``fno_darcy16.safetensors``. Both sides get the
trained network and nothing else: nncodec one quantization parameter (dependent quantization, its other settings as
they come), this library ``FuseBatchNorm`` where there is BatchNorm and ``RateDistortionQuantize(bits)`` on inputs that
are synthesized from the network, or drawn. Bytes are those of nncodec's stream and of the ``.lcz`` file. OER is
the share of changed predictions of the test images, or the mean relative L2 distance of the outputs. "encode" turns a
network whose weights are decided into bytes (nncodec's cannot be separated from deciding them), "decide" is what comes
before, "decode" turns the bytes into tensors, "load" also puts them into a network (ours checks that they fit, and
folds its BatchNorm away); medians of several turns, each side in turn. Peak memory is that of a copy of the process
above where it stood.

Measured with seed 0, one run, half of the test data (5,000 images: standard error 0.39 points on CIFAR-10 and 0.12 on
MNIST; 25 Darcy fields, 16 x 16), nncodec 2.1.3. In every row ours is as accurate as nncodec within the standard error:

    network              nncodec                      this library              bytes, ours
                         bytes    score    OER        bytes    score    OER     over nncodec's
    ResNet-20  91.50   193,488    91.60   0.50      137,004    91.48   0.94     0.71
      1,084,392 B      159,933    91.58   1.18      103,412    91.54   1.70     0.65
                       128,829    91.42   2.60       79,993    91.30   3.16     0.62
                       100,026    89.48   5.70       59,879    90.92   4.62     0.60
    ResNet-56  93.30   525,921    93.36   0.52      377,451    93.38   0.34     0.72
      3,428,328 B      424,289    93.20   0.86      250,052    93.40   1.12     0.59
                       331,265    92.88   2.48      218,412    92.84   2.36     0.66
    LeNet-5    99.28    42,325    99.22   0.06       23,934    99.24   0.08     0.57
      246,824 B         34,623    99.22   0.14       18,551    99.26   0.22     0.54
                        27,407    99.32   0.04       16,222    99.22   0.18     0.59
    FNO         9.04   175,543     9.12   0.92       64,519     9.01   1.03     0.37
      767,524 B        151,002     9.09   1.00       57,377     9.12   1.19     0.38
      (errors in %)    126,398     9.46   2.83       43,199     9.22   2.21     0.34

Milliseconds per MB of float32 at qp -24 and 3 bits, medians of 9 turns (``--turns 9``), and how many times faster:

                 encode                  decode                  load
    ResNet-20    175.7    78.6  2.24      24.8    12.1  2.04      26.5    17.0  1.56
    ResNet-56    213.0    84.1  2.53      22.3    11.0  2.02      23.7    15.5  1.53
    LeNet-5      130.2   103.4  1.26      20.8    15.9  1.31      21.9    17.5  1.25
    FNO          197.7    74.2  2.67      31.0    13.9  2.23      31.5    16.3  1.93
    together                    2.42                    2.02                    1.58

Reading a header and making tensors takes a few milliseconds whatever their size, which is most of LeNet-5's time. Peaks
are 10 to 16 MB, blocks and the coders' buffers; nncodec's are 3 to 16.

What it costs: inputs are synthesized once (ResNet-20: a minute; ResNet-56 with --samples 128: two), deciding takes 20
to 60 s a rate on these machines; LeNet-5 takes a second. nncodec decides and encodes in under a second.
Machine: 2 shared cores of an Intel Xeon at 2.1 GHz, CPU only. Python 3.11, torch 2.15.0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.archive import dense_bytes, load_tensors
from lightning_compress.checkpoints import load_weights
from lightning_compress.stats import Calibration
from lightning_compress.tables import text

sys.path.append(str(Path(__file__).resolve().parents[1]))
import cifar_resnet

QP = (-32, -28, -24, -20)
BITS = (4.0, 3.5, 3.0, 2.6, 2.3, 2.0, 1.7)


@dataclass
class Problem:
    """A trained network, and what it is tested on."""

    build: Callable[[], nn.Module]
    net: nn.Module
    inputs: Tensor
    labels: Tensor
    batch: int = 250
    mean: float = 0.0
    std: float = 1.0

    @torch.inference_mode()
    def outputs(self, net: nn.Module) -> Tensor:
        found = torch.cat([net.eval()(x) for x in self.inputs.split(self.batch)])
        return found * self.std + self.mean

    @property
    def classifies(self) -> bool:
        return self.labels.dim() == 1

    def score(self, outputs: Tensor) -> float:
        """Top-1 in percent, or mean relative L2 error in percent."""
        if self.classifies:
            return 100 * float((outputs.argmax(1) == self.labels).double().mean())
        return 100 * float(_relative(outputs, self.labels))

    def changed(self, outputs: Tensor, original: Tensor) -> float:
        if self.classifies:
            return 100 * float((outputs.argmax(1) != original.argmax(1)).double().mean())
        return 100 * float(_relative(outputs, original))


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    return ((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).mean()


def problem(name: str, data: Path, limit: int | None) -> Problem:
    if name.startswith("resnet"):
        images, labels = cifar_resnet.read(str(data), False, limit)
        file = data / f"{name}_cifar10.safetensors"

        def build() -> nn.Module:
            return cifar_resnet.build(name, str(file)).eval()

        return Problem(build, build(), cifar_resnet.normalize(images), labels)
    if name == "lenet5":

        def build() -> nn.Module:
            return load_weights(lc.models.LeNet5(), data / "lenet5_mnist.safetensors").eval()

        with np.load(data / "mnist.npz") as pack:
            x = torch.from_numpy(pack["x_test"][:limit]).float()[:, None] / 255
            y = torch.from_numpy(pack["y_test"][:limit]).long()
        return Problem(build, build(), (x - 0.1307) / 0.3081, y)
    if name == "fno":
        from neuralop.models import FNO

        sizes = {"in_channels": 1, "out_channels": 1, "hidden_channels": 24, "n_layers": 4}

        def build() -> nn.Module:
            net = FNO(n_modes=(8, 8), **sizes, projection_channel_ratio=2)
            return load_weights(net, data / "fno_darcy16.safetensors").eval()

        with np.load(data / "darcy_16_32.npz") as pack:
            x, y = (torch.from_numpy(pack[f"{k}_test_16"].astype(np.float32))[:, None] for k in "xy")
            mean, std = float(pack["y_train_16"].mean()), float(pack["y_train_16"].std())
        return Problem(build, build(), x, y, mean=mean, std=std)
    raise SystemExit(f"--models {name}: allowed are resnet20, resnet32, resnet44, resnet56, lenet5, fno.")


# -- both sides ----------------------------------------------------------------------------------------------


class Standard:
    """nncodec; complex tensors go in as their real and imaginary parts."""

    def __init__(self, given: Problem, qp: int, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.options = {"qp": qp, "use_dq": True, "verbose": False, "results": str(folder)}
        self.shapes: dict[str, Tensor] = {}

    def encode(self) -> bytes:
        from nncodec.nn import encode

        arrays = {}
        for name, value in self.given.net.state_dict().items():
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                self.shapes[name] = value
                arrays[name] = (torch.view_as_real(value) if value.is_complex() else value).numpy().copy()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return bytes(encode(arrays, self.options))

    def decode(self, data: bytes) -> dict[str, Any]:
        from nncodec.nn import decode

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(decode(bytearray(data)))

    def load(self, data: bytes) -> nn.Module:
        arrays, net = self.decode(data), self.target
        with torch.no_grad():
            state = net.state_dict()
            for name, value in self.shapes.items():
                found = torch.as_tensor(np.asarray(arrays[name]))
                found = torch.view_as_complex(found.contiguous()) if value.is_complex() else found
                state[name].copy_(found.reshape(value.shape))
        return net

    def fresh(self) -> None:
        self.target = self.given.build()


class Ours:
    """The archive of what ``compress`` made."""

    def __init__(
        self, given: Problem, bits: float, inputs: str | list[Tensor], folder: Path, seed: int
    ) -> None:
        self.given, self.path = given, folder / "net.lcz"
        transforms: list[lc.Transform] = [lc.RateDistortionQuantize(bits=bits)]
        if any(isinstance(m, nn.BatchNorm2d) for m in given.net.modules()):
            transforms.insert(0, lc.FuseBatchNorm())
        begin = time.perf_counter()
        self.net = lc.compress(
            given.net, transforms, example_input=given.inputs[:1], data=inputs, seed=seed
        ).model
        self.decided = time.perf_counter() - begin

    def encode(self) -> bytes:
        lc.save(self.net, self.path, verify=False)
        return self.path.read_bytes()

    def decode(self, data: bytes) -> dict[str, Any]:
        return dict(load_tensors(self.path))

    def load(self, data: bytes) -> nn.Module:
        return lc.load(self.path, into=self.target)

    def fresh(self) -> None:
        self.target = self.given.build()


def peak(call: Callable[[], Any]) -> float:
    """MB that a call needs above what the process holds, in a copy of it: there Linux begins a new maximum."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    source, sink = os.pipe()
    if not os.fork():
        torch.set_num_threads(1)  # a copy has no other threads
        before = _resident(status, "VmRSS")
        call()
        os.write(sink, f"{_resident(status, 'VmHWM') - before}".encode())
        os._exit(0)
    os.wait()
    needed = int(os.read(source, 64))
    os.close(source)
    os.close(sink)
    return needed / 1024


def _resident(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))


def rows(name: str, given: Problem, options: argparse.Namespace) -> list[list[Any]]:
    options.output_dir.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    source = Calibration(given.inputs[:1], None, options.samples, options.seed)
    inputs = "normal" if source.is_noise(given.net) else list(source.batches(given.net))
    drawn = time.perf_counter() - begin
    original = given.outputs(given.net)
    dense = dense_bytes(given.net)
    score = given.score(original)
    print(f"{name}: {dense:,} bytes, {score:.2f}; inputs made in {drawn:.0f} s", flush=True)
    made: list[tuple[str, Any]] = [
        *((f"nncodec qp {qp}", Standard(given, qp, options.output_dir)) for qp in options.qp),
        *(
            (f"{bits:g} bits", Ours(given, bits, inputs, options.output_dir, options.seed))
            for bits in options.bits
        ),
    ]
    found: list[list[Any]] = []
    for label, side in made:
        data = side.encode()
        side.fresh()
        outputs = given.outputs(side.load(data))
        seconds = f"{side.decided:.1f}" if isinstance(side, Ours) else ""
        found.append(
            [
                name,
                label,
                len(data),
                f"{len(data) / dense:.4f}",
                f"{given.score(outputs):.2f}",
                f"{given.changed(outputs, original):.2f}",
                seconds,
            ]
        )
        print(*found[-1], flush=True)
    if options.qp and options.turns:
        timed(name, made[len(options.qp) // 2][1], made[-1][1], options, dense)
    return found


def timed(name: str, one: Standard, other: Ours, options: argparse.Namespace, dense: int) -> None:
    """Median seconds of both sides, in turns, and peak memory."""
    sides: dict[str, Standard | Ours] = {"nncodec": one, "ours": other}
    spent: dict[tuple[str, str], list[float]] = {}
    data = {label: side.encode() for label, side in sides.items()}
    for _ in range(options.turns):
        for label, side in sides.items():
            for what, call in calls(side, data[label]).items():
                side.fresh()
                begin = time.perf_counter()
                call()
                spent.setdefault((label, what), []).append(time.perf_counter() - begin)
    median = {key: float(np.median(values)) for key, values in spent.items()}
    memory = {}
    for label, side in sides.items():
        for what, call in calls(side, data[label]).items():
            side.fresh()
            memory[label, what] = peak(call)
    per = dense / 1e6
    for what in ("encode", "decode", "load"):
        a, b = median["nncodec", what], median["ours", what]
        print(
            f"{name} {what}: nncodec {1000 * a / per:.1f} ms, ours {1000 * b / per:.1f} ms per MB of float32, ratio "
            f"{a / b:.2f}; peak {memory['nncodec', what]:.1f} and {memory['ours', what]:.1f} MB",
            flush=True,
        )


def calls(side: Standard | Ours, data: bytes) -> dict[str, Callable[[], Any]]:
    return {"encode": side.encode, "decode": lambda: side.decode(data), "load": lambda: side.load(data)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of packs and checkpoints")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56", "lenet5", "fno"])
    parser.add_argument("--qp", nargs="*", type=int, default=list(QP), help="none: without nncodec")
    parser.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    parser.add_argument("--samples", type=int, default=256, help="inputs that are made from the network")
    parser.add_argument("--turns", type=int, default=5, help="timed turns, 0: none")
    parser.add_argument("--limit-test", type=int, help="use the first so many test inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/rate_distortion"))
    options = parser.parse_args(argv)
    found = [
        row
        for name in options.models
        for row in rows(name, problem(name, options.data, options.limit_test), options)
    ]
    print(text(["network", "setting", "bytes", "share of dense", "score", "OER", "decide s"], found))


if __name__ == "__main__":
    main()
