"""What a module holds at one moment of training: counts of its layers, totals, and tables of them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress import codes
from lightning_compress.archive import ArchiveInfo
from lightning_compress.cost import Cost, LayerCost
from lightning_compress.targets import Target

QUANTITIES = ("params", "nonzero", "sparsity", "weight_bits", "file_bytes", "macs")


class Measured:
    """Counts of a module at one moment.

    Args:
        counted: counts of the whole module.
        targets: its weights.
        more: further totals.

    Attributes:
        totals: quantity -> value.
        layers: layer that holds weights -> quantity -> value.
        cost: those layers; their bits also where zeros are there and no code says so yet.
        rest: the other layers.
    """

    def __init__(self, counted: Cost, targets: list[Target], more: Mapping[str, float]) -> None:
        self._weights: dict[str, list[Target]] = {}
        for target in targets:
            self._weights.setdefault(target.name or "(model)", []).append(target)
        known = {layer.name or "(model)": layer for layer in counted.layers}
        stored = {name: _stored(weights) for name, weights in self._weights.items()}
        self.totals = {**_values(counted, sum(stored.values(), Counter())), **more}
        self.layers = {name: _values(known[name], stored[name]) for name in stored}
        self.cost = Cost(tuple(_without(known[name], stored[name]["saved"]) for name in stored))
        self.rest = Cost(tuple(layer for name, layer in known.items() if name not in stored))

    def add_file(self, info: ArchiveInfo) -> None:
        """Add what an archive of the module takes; a layer takes the streams of its tensors.

        Args:
            info: what ``archive.save`` returned.
        """
        self.totals |= {"file_bytes": info.file_bytes, "compression_ratio": info.compression_ratio}
        for values in self.layers.values():
            values["file_bytes"] = 0
        for tensor in info.tensors:  # a weight may lie deeper: "conv.weight.tensor" belongs to "conv"
            owners = [n for n in self.layers if n == "(model)" or tensor.name.startswith(f"{n}.")]
            if owners:
                self.layers[max(owners, key=len)]["file_bytes"] += tensor.stored_bytes

    def nonzero_weights(self) -> dict[str, Tensor]:
        """Layer -> its weights that are finite and not 0, flat; real and imaginary parts of complex ones."""
        kept = {name: torch.cat([_kept(t.weight.detach()) for t in ts]) for name, ts in self._weights.items()}
        return {name: values for name, values in kept.items() if values.numel()}

    def summary(self, totals: list[list[Any]], draw: Callable[..., str]) -> str:
        """Two tables: totals at the start and now, and the layers now.

        Args:
            totals: rows of name, value at the start, value now.
            draw: function of header and rows, from ``lightning_compress.tables``.

        Returns:
            The tables.
        """
        rows: list[list[Any]] = []
        for layer, values in zip(self.cost.layers, self.layers.values(), strict=True):
            rows.append([layer.name or "(model)", layer.kind, *map(values.get, QUANTITIES)])
        if self.rest.layers:
            rest = {name: getattr(self.rest, name) for name in ("params", "nonzero", "sparsity", "macs")}
            rows.append(["other layers", "", *map(rest.get, QUANTITIES)])
        whole, parts = draw(["total", "start", "end"], totals), draw(["layer", "type", *QUANTITIES], rows)
        return f"From the start to the end of this fit:\n\n{whole}\n\nThe layers at the end:\n\n{parts}"


def _stored(weights: list[Target]) -> Counter[str]:
    """Entries, zeros and counted bits of some weights, and the bits that zeros save where no code says so.

    Pruning attaches its masks when training ends, and other libraries never do; the zeros are there before.
    """
    stored: Counter[str] = Counter()
    for target in weights:
        weight, code = target.weight.detach(), codes.read(target.module, target.param)
        zero, saved = weight == 0, 0
        if code is not None and code.matches(weight):
            bits = code.bits(weight)
        else:
            bits = codes.Mask(~zero).bits(weight)
            saved = weight.element_size() * 8 * weight.numel() - bits
        stored.update(entries=weight.numel(), zeros=int(zero.sum()), bits=bits, saved=saved)
    return stored


def _values(counted: Cost | LayerCost, stored: Counter[str]) -> dict[str, float]:
    entries = stored["entries"] or math.nan
    return {
        "params": counted.params,
        "nonzero": counted.elements - counted.zeros,
        "sparsity": stored["zeros"] / entries,
        "weight_bits": stored["bits"] / entries,
        "macs": counted.macs,
    }


def _without(layer: LayerCost, bits: int) -> LayerCost:
    return dataclasses.replace(layer, bits=layer.bits - bits)


def _kept(weight: Tensor) -> Tensor:
    flat = (torch.view_as_real(weight) if weight.is_complex() else weight).reshape(-1).float()
    return flat[torch.isfinite(flat) & (flat != 0)]
