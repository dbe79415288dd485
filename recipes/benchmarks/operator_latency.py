"""How much faster a compressed FNO is: forward passes in turns, the original before and after each of the others.

    python recipes/benchmarks/operator_latency.py --checkpoint fno.safetensors --data darcy.npz

Every pass of a compressed network is divided by the mean of the two passes of the original around it; the median of
these ratios is the speed-up. ``--profile`` adds where the time of each goes. Without ``--checkpoint`` the weights are
random, which changes no time; ``--data`` (an .npz with ``x_train_16``) gives the inputs by which ranks are chosen.
"""

from __future__ import annotations

import argparse
import platform
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import lightning_compress as lc
from lightning_compress.checkpoints import load_weights
from lightning_compress.tables import text

SPECTRAL = "fno_blocks.convs.*"


def variants(fno: nn.Module, inputs: Tensor, half: tuple[int, ...]) -> dict[str, nn.Module]:
    """The original and what is compared with it."""
    steps = {
        "same modes": [],
        "half the modes": [lc.TruncateModes(modes=half)],
        "half the numbers": [
            lc.Factorize(
                params_ratio=0.5, scheme="channel", real_channel=True, activation_aware=True, include=SPECTRAL
            )
        ],
    }
    made = {"original": fno}
    for name, first in steps.items():
        if first:
            made[name] = lc.compress(fno, first, example_input=inputs[:1], data=[inputs]).model
        made[f"{name}, partial Fourier"] = lc.compress(
            made.get(name, fno), [lc.PartialFourier()], example_input=inputs[:1]
        ).model
    return made


@torch.inference_mode()
def passes(networks: dict[str, nn.Module], x: Tensor, runs: int) -> dict[str, tuple[float, float]]:
    """Name -> median milliseconds, and median ratio of the original's passes around each of its own."""

    def milliseconds(net: nn.Module) -> float:
        start = time.perf_counter()
        net(x)
        return (time.perf_counter() - start) * 1e3

    for net in networks.values():
        for _ in range(3):
            net(x)
    original, *others = networks
    times: dict[str, list[float]] = {name: [] for name in networks}
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(runs):
        before = milliseconds(networks[original])
        for name in others:
            own = milliseconds(networks[name])
            after = milliseconds(networks[original])
            times[name].append(own)
            times[original].append(after)
            ratios[name].append((before + after) / 2 / own)
            before = after
    return {
        name: (float(np.median(t)), float(np.median(ratios[name])) if name in ratios else 1.0)
        for name, t in times.items()
    }


def where(net: nn.Module, x: Tensor) -> str:
    """Share of the time of one forward pass that each operation takes itself."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as measured:
        for _ in range(3):
            net(x)
    events = sorted(measured.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    shares = [f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in events[:6]]
    return ", ".join(shares)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="weights of an FNO of the sizes below")
    parser.add_argument("--data", help=".npz with x_train_16")
    parser.add_argument("--hidden-channels", type=int, default=24)
    parser.add_argument("--n-modes", type=int, nargs=2, default=[8, 8])
    parser.add_argument(
        "--half-modes",
        type=int,
        nargs=2,
        default=[5, 6],
        help="stored as 5 x 4 of 8 x 5, the last axis being halved",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    fno = lc.models.fno(options.n_modes, options.hidden_channels)
    if options.checkpoint:
        fno = load_weights(fno, options.checkpoint)
    inputs = torch.randn(64, 1, 16, 16)
    if options.data:
        with np.load(options.data) as pack:
            inputs = torch.from_numpy(pack["x_train_16"][:128]).float()[:, None]
    networks = variants(fno.eval(), inputs, tuple(options.half_modes))
    rows = []
    for size in options.sizes:
        for batch in options.batch_sizes:
            x = torch.randn(batch, 1, size, size)
            for name, (median, ratio) in passes(networks, x, options.runs).items():
                counted = lc.cost(networks[name], x)
                rows.append([size, batch, name, counted.params, counted.macs / batch, median, ratio])
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.runs} passes"
    )
    print(text(["size", "batch", "network", "parameters", "MACs", "median ms", "speed-up"], rows))
    if options.profile:
        x = torch.randn(options.batch_sizes[-1], 1, options.sizes[-1], options.sizes[-1])
        print(*(f"{name}: {where(net, x)}" for name, net in networks.items()), sep="\n")


if __name__ == "__main__":
    main()
