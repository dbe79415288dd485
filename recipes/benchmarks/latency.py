"""How much faster removed channels make a network: the original against the small one, in turns, in three runtimes.

    python recipes/benchmarks/latency.py --checkpoint resnet20.safetensors --include "layer2.*" --round-to 8
    python recipes/benchmarks/latency.py --model mobilenet_v2 --size 224 --batch-sizes 1 --layers

Measured with half of the MACs left, magnitudes, one thread, 30 passes, wall time; the first command, and the same with
``--model resnet56``:

    network     runtime       batch   original ms   small ms   speed-up   MACs ratio   gain / MACs
    resnet20    eager             1         3.112      2.360      1.319         2.03         0.650
                compile           1         2.279      1.900      1.226         2.03         0.604
                onnxruntime       1         1.256      0.895      1.380         2.03         0.680
                eager            32         57.63      36.73      1.578         2.03         0.778
                compile          32         34.72      25.07      1.367         2.03         0.673
                onnxruntime      32         29.82      18.05      1.563         2.03         0.770
    resnet56    eager            32        134.80      84.27      1.584         2.01         0.788
                compile          32         90.10      64.94      1.355         2.01         0.674
                onnxruntime      32         71.71      48.82      1.454         2.01         0.724

Which channels go decides as much as how many. ResNet-20, batch 32, speed-up at twice fewer MACs (``gain / MACs``):

                                            eager           onnxruntime
    all layers alike                        1.429 (0.713)   0.957 (0.478)
    all layers, --round-to 8                1.384 (0.658)   1.217 (0.578)
    --include "layer*.conv1"                1.348 (0.671)   1.179 (0.587)
    --include "layer2.*" --round-to 8       1.578 (0.778)   1.563 (0.770)

This processor works on 16 numbers at once and ONNX Runtime stores channels in blocks of 16: 11 channels take as long as
16. Fewer channels in what is added to a shortcut also make the additions and BatchNorm cheaper. One run each, of wall
time; with ``--cpu-time`` beside other work, ``gain / MACs`` of the first command at batch 32 was 0.74 (eager) and 0.73
(ONNX Runtime), for ResNet-56 0.87 and 0.71. Machine: 2 shared cores of an Intel Xeon at 2.1 GHz (AVX-512), CPU only.
Python 3.11, torch 2.15.0, onnxruntime 1.31.1.

``gain / MACs`` is the speed-up divided by how many times fewer MACs there are: 1 if every multiply-add took the same
time. A pass of the small network is divided into the mean of the passes of the original before and after it; the
speed-up is the median of these ratios. Networks that are not built in come from torchvision, with random weights
without ``--checkpoint``: weights change no time. ``--fuse`` and ``--channels-last`` hold for both networks; files for
ONNX Runtime have BatchNorm folded in any case.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import turns
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.checkpoints import load_weights
from lightning_compress.tables import text

sys.path.append(str(Path(__file__).resolve().parents[1]))
from cifar_channels import add_removal_options, removal

ORIGINAL, SMALL = "original", "small"
Networks = dict[str, nn.Module]
Calls = dict[str, Callable[[], object]]


def network(name: str, checkpoint: str | None) -> nn.Module:
    if name in lc.models.names():
        net = lc.models.build(name)
    else:
        from torchvision.models import get_model

        net = get_model(name, weights=None)
    return (load_weights(net, checkpoint) if checkpoint else net).eval()


def eager(networks: Networks, x: Tensor, options: argparse.Namespace) -> Calls:
    return {name: functools.partial(net, x) for name, net in networks.items()}


def compiled(networks: Networks, x: Tensor, options: argparse.Namespace) -> Calls:
    torch.compiler.reset()  # one graph for each shape, none that fits all
    calls: Calls = {}
    for name, net in networks.items():
        calls[name] = functools.partial(torch.compile(net, dynamic=False), x)
        calls[name]()  # compiles; raises here where there is no compiler
    return calls


def onnxruntime(networks: Networks, x: Tensor, options: argparse.Namespace) -> Calls:
    from int8_latency import session  # imports onnxruntime

    calls: Calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, net in networks.items():
            file = Path(folder, f"{name}.onnx")
            lc.export_onnx(net, x, file, precision="float32", dynamic_axes=False, check=False)
            calls[name] = functools.partial(session(file, options.threads).run, None, {"x": x.numpy()})
    return calls


RUNTIMES: dict[str, Callable[[Networks, Tensor, argparse.Namespace], Calls]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": onnxruntime,
}


def measured(
    networks: Networks, x: Tensor, macs_ratio: float, options: argparse.Namespace
) -> Iterator[list[Any]]:
    """A row for each runtime."""
    clock = time.thread_time if options.cpu_time else time.perf_counter
    for name in options.runtimes:
        try:
            calls = RUNTIMES[name](networks, x, options)
        except Exception as error:  # a runtime or compiler that this machine lacks
            print(f"{name} is left out: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            continue
        times = turns.passes(calls, options.runs, clock=clock)
        ratios = 1 / turns.paired(times[ORIGINAL], times[SMALL])
        medians = [float(np.median(times[each])) for each in (ORIGINAL, SMALL)]
        gain, low, high = (float(np.percentile(ratios, q)) for q in (50, 25, 75))
        yield [name, len(x), *medians, gain, f"{low:.3f} to {high:.3f}", macs_ratio, gain / macs_ratio]


def layers(networks: Networks, x: Tensor, runs: int) -> str:
    """MACs per image and own time of every layer that computes something, before and after."""
    report = lc.benchmark(networks[SMALL], x, baseline=networks[ORIGINAL], runs=runs)
    assert report.baseline is not None
    small = {layer.name: layer for layer in report.layers}
    rows: list[list[Any]] = []
    for layer in report.baseline.layers:
        after = small.get(layer.name)
        if after is None or not layer.time_ms or not after.time_ms:
            continue
        macs = [round(each.macs / len(x)) for each in (layer, after)]
        macs += [layer.macs / after.macs if after.macs else None]
        times = [layer.time_ms, after.time_ms, layer.time_ms / after.time_ms]
        rows.append([layer.name or "(model)", layer.kind, *macs, *times])
    return text(["layer", "kind", "MACs", "after", "ratio", "ms", "after", "ratio"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20", help="a built-in network or one of torchvision")
    parser.add_argument("--checkpoint", help="its weights; without, they are random")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--channels", type=int, default=3, help="of the images")
    add_removal_options(parser, 2.0)
    parser.set_defaults(reconstruct=False)  # weights change no time
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--runs", type=int, default=30, help="timed passes of each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fuse", action="store_true", help="fold BatchNorm")
    parser.add_argument(
        "--channels-last", action="store_true", help="for PyTorch; ONNX Runtime has its own layout"
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of the calling thread, not of the wall: for one thread beside other work",
    )
    parser.add_argument(
        "--layers", action="store_true", help="also a table of the layers, for the last batch size"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.cpu_time and options.threads > 1:
        parser.error("--cpu-time needs --threads 1: it is the time of one thread")
    if options.runs < 2:
        parser.error("--runs must be at least 2: a pass stands between two of the original")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = network(options.model, options.checkpoint)
    x = torch.randn(max(options.batch_sizes), options.channels, options.size, options.size)
    networks = {ORIGINAL: net, SMALL: lc.compress(net, [removal(options)], example_input=x[:1]).model}
    counted = {name: lc.cost(each, x[:1]) for name, each in networks.items()}
    ratio = counted[ORIGINAL].macs / counted[SMALL].macs
    if options.fuse:
        networks = {
            name: lc.compress(each, [lc.FuseBatchNorm()], example_input=x[:1]).model
            for name, each in networks.items()
        }
    if options.channels_last:
        x = x.to(memory_format=torch.channels_last)
        networks = {name: each.to(memory_format=torch.channels_last) for name, each in networks.items()}
    sizes = [[name, each.params, each.macs] for name, each in counted.items()]
    print(text([options.model, "parameters", "MACs"], sizes), end="\n\n")
    with torch.inference_mode():
        rows = [row for n in options.batch_sizes for row in measured(networks, x[:n], ratio, options)]
    header = [
        "runtime",
        "batch",
        "original ms",
        "small ms",
        "speed-up",
        "quartiles",
        "MACs ratio",
        "gain / MACs",
    ]
    print(text(header, rows))
    print(
        f"\n{'processor' if options.cpu_time else 'wall'} time, {options.threads} threads, {platform.machine()}, "
        f"torch {torch.__version__}; {options.runs} passes of each"
    )
    if options.layers:
        print("\n" + layers(networks, x[: options.batch_sizes[-1]], options.runs))


if __name__ == "__main__":
    main()
