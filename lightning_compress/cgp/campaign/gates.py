"""Which functions the best circuits of an experiment use, and how often."""

from __future__ import annotations

from collections import Counter

from lightning_compress.cgp.campaign.folders import Folder
from lightning_compress.cgp.campaign.statistics import write
from lightning_compress.cgp.gates.circuit import Circuit
from lightning_compress.cgp.gates.functions import FUNCTIONS


def write_gates(folder: Folder) -> None:
    """Count the gates that take part in the best circuits of all runs that have finished: ``gate_statistics.csv``.

    Args:
        folder: of an experiment or a batch; without finished runs nothing is written.
    """
    counts: Counter[int] = Counter()
    files = [file for file in map(folder.chromosome, folder.config.numbers) if file.exists()]
    if not files:
        return
    for file in files:
        circuit = Circuit.from_text(file.read_text(encoding="utf-8"))
        counts.update(circuit.gates[circuit.active(), 2].tolist())
    table = folder.experiment.settings.table
    rows = (f"{number},{table[number].name},{counts[number]}\n" for number in sorted(FUNCTIONS))
    write(folder.gate_statistics, "function,name,count\n" + "".join(rows))
