"""Compress, save and load random transformers of 1 to 100 million parameters: seconds, and memory beside the model.

python recipes/benchmarks/archive_scale.py [--method quantize4] [--millions 1 3 10 30 100]

Allowed are 1.2 times the largest layer and a tenth of the model; docs/methods/archive.md has the table.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import tables
from lightning_compress.archive import load, save
from lightning_compress.transform import Transform

SHAPES = {0.1: (48, 2), 1: (128, 4), 3: (192, 6), 10: (320, 7), 30: (512, 9), 100: (768, 14)}  # width, layers
SEED = 0
METHODS: dict[str, Callable[[], Transform]] = {
    "prune": lambda: lc.Prune(0.9),
    "prune half": lambda: lc.Prune(0.5),
    "quantize8": lambda: lc.Quantize(8),
    "quantize4": lambda: lc.Quantize(4),
    "share": lambda: lc.ShareWeights(clusters=16),
    "rate-distortion": lambda: lc.RateDistortionQuantize(4),
}


class Transformer(nn.Module):
    """An encoder with an embedding and a head; random weights.

    Args:
        width: channels d; the vocabulary has 10 d entries.
        layers: how many.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10 * width, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)
        for matrix in self.parameters():
            if matrix.dim() > 1:
                nn.init.normal_(matrix, std=0.02)


class Memory:
    """Peak of the resident memory of this process in MB, above what it holds now.

    The system keeps the highest resident memory of a process (VmHWM) and begins anew in a fork of it. So the work goes
    on in a copy of this process, which waits for it. Imports, compiled loops and the code of libraries, which a copy
    reads again, are no part of what is measured: something small is done first.

    Args:
        warm: does it.
    """

    def __init__(self, warm: Callable[[], Any]) -> None:
        warm()
        self._settle()
        if copy := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]))
        warm()
        self._settle()
        self._start = self._now("VmRSS")

    @staticmethod
    def _settle() -> None:
        """What is free is not held."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

    @staticmethod
    def _now(name: str) -> float:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition(f"{name}:")[2].split()[0]) / 1024

    def peak(self) -> float:
        """Since the start."""
        return self._now("VmHWM") - self._start


def measured(work: Callable[[], Any], warm: Callable[[], Any]) -> dict[str, Any]:
    """Seconds and peak of one phase, and what it returns."""
    memory = Memory(warm)
    start = time.perf_counter()
    result = work()
    return {"seconds": time.perf_counter() - start, "peak": memory.peak(), "result": result}


def phases(millions: float, method: str, path: Path) -> dict[str, Any]:
    """Compress and save, or load the file that is there, in this process and its copies."""
    writing = not path.exists()

    def warm() -> None:
        small = Transformer(16, 1)
        lc.compress(small, METHODS[method](), inplace=True)
        save(small, path.with_suffix(".small"))
        load(path.with_suffix(".small"), Transformer(16, 1))

    torch.manual_seed(SEED)
    model = Transformer(*SHAPES[millions])
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    row: dict[str, Any] = {
        "params": sum(sizes) // 4,
        "model": sum(sizes) / 2**20,
        "layer": max(sizes) / 2**20,
    }
    if writing:

        def shrink() -> None:
            lc.compress(model, METHODS[method](), inplace=True)

        row["compress"] = measured(shrink, warm)
        row["save"] = measured(lambda: save(model, path).file_bytes, warm)
    else:
        row["load"] = measured(lambda: load(path, model) is model, warm)
    return row


def row_of(millions: float, method: str) -> dict[str, Any]:
    """One size: a process writes the file and another one reads it."""
    with tempfile.TemporaryDirectory() as folder:
        row: dict[str, Any] = {}
        for _ in range(2):
            row |= child(__file__, "--child", folder, "--method", method, "--millions", f"{millions:g}")
    return row


def child(*arguments: str) -> Any:
    """What another process of Python says in its last line."""
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Sizes in MB = 2^20 bytes."""
    header = ["params", "model", "largest layer", "allowed", "file bytes"]
    kinds = ("compress", "save", "load")
    header += [f"{kind} s" for kind in kinds] + [f"{kind} peak" for kind in kinds]
    body = [
        [r["params"], r["model"], r["layer"], 1.2 * r["layer"] + 0.1 * r["model"], r["save"]["result"]]
        + [r[kind]["seconds"] for kind in kinds]
        + [r[kind]["peak"] for kind in kinds]
        for r in rows
    ]
    return tables.text(header, body)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="quantize4")
    parser.add_argument("--millions", type=float, nargs="+", choices=SHAPES, default=[1, 3, 10, 30, 100])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(phases(options.millions[0], options.method, options.child / "net.lcz")))
        return []
    rows = [row_of(millions, options.method) for millions in options.millions]
    print(f"{options.method}, one thread, MB above the model:\n\n{table(rows)}")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
