"""How much a network bears: scores with a constant added to the int8 weights of a layer."""

from __future__ import annotations

import copy
import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from lightning_compress.cgp.gates.functions import Int8
from lightning_compress.cgp.layers.choices import centre
from lightning_compress.cgp.layers.integers import all_int8, weight_of
from lightning_compress.cgp.metrics import Batches, scores
from lightning_compress.names import matches
from lightning_compress.targets import parameter

KINDS = ("inner", "outer", "all")
COLUMNS = ("layer", "kind", "e", "Top-1", "Top-5", "loss")


@dataclass(frozen=True)
class Shift:
    """Scores of a network some of whose weights are off.

    Args:
        layer: name of the parameter.
        kind: which of its weights: "inner" (cores of kernels), "outer" (rings around them) or "all".
        e: what is added to their integers, which end at -128 and 127.
        top1: share of samples, 0 to 1.
        top5: share of samples, 0 to 1.
        loss: mean cross-entropy, in nats.
    """

    layer: str
    kind: str
    e: int
    top1: float
    top5: float
    loss: float


def sensitivity(
    model: nn.Module,
    batches: Batches,
    *,
    core: int = 3,
    errors: Sequence[int] = range(-128, 127),
    kinds: Sequence[str] = KINDS,
    include: str | Sequence[str] = "*",
) -> list[Shift]:
    """Top-1, Top-5 and loss with ``min(max(q + e, -128), 127)`` in place of the integers q of one layer at a time.

    Args:
        model: with int8 weights; it is not changed.
        batches: pairs of inputs and classes; they are gone through once for each row.
        core: side of the middle of a kernel. Layers without kernels that have such a middle are shifted whole only.
        errors: values of e, -128 to 127.
        kinds: of "inner", "outer" and "all".
        include: patterns of layer names.

    Returns:
        Rows by layer, kind and e.

    Raises:
        ValueError: no layer has int8 weights, an unknown kind, or an e out of its range.

    Examples:
        >>> from lightning_compress.cgp.sensitivity import sensitivity
        >>> net = compress(models.build("lenet5"), [Quantize(8)]).model
        >>> images = [(torch.zeros(4, 1, 28, 28), torch.zeros(4))]
        >>> [(row.kind, row.e) for row in sensitivity(net, images, errors=[-9, 9], include="conv1")]
        [('inner', -9), ('inner', 9), ('outer', -9), ('outer', 9), ('all', -9), ('all', 9)]
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    beyond = [e for e in errors if not -128 <= e <= 127]
    if unknown or beyond or core < 1:
        raise ValueError(
            f"kinds={unknown or list(kinds)}, errors {beyond}, core={core}: allowed are kinds of {', '.join(KINDS)}, "
            "errors from -128 to 127 and a core >= 1."
        )
    shifted = copy.deepcopy(model)
    patterns = (include,) if isinstance(include, str) else include
    layers = [
        entry
        for entry in all_int8(shifted)
        if any(matches(pattern, entry[0], entry[0].rpartition(".")[0]) for pattern in patterns)
    ]
    if not layers:
        raise ValueError(f"no layer of {include!r} has int8 weights: quantize first: Quantize(8).")
    todo = [
        (*entry, kind, mask, e)
        for entry in layers
        for kind, mask in _masks(entry[0], entry[3], core)
        if kind in kinds
        for e in errors
    ]
    rows = []
    for key, module, param, values, base, kind, mask, e in tqdm(
        todo, desc="sensitivity", unit="row", leave=False, disable=None
    ):
        weight = parameter(module, param)
        before = weight.detach().clone()
        integers = np.where(mask, np.clip(values.astype(np.int64) + e, -128, 127), values).astype(np.int8)
        with torch.no_grad():
            weight.copy_(weight_of(base, integers, weight.dtype)[0])
            found = scores(shifted, batches)
            weight.copy_(before)
        rows.append(Shift(key, kind, e, found.top1, found.top5, found.loss))
    return rows


def _masks(key: str, values: Int8, core: int) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    try:
        inner = centre(key, values.shape, core)
    except ValueError:  # no kernels, or too small ones
        pass
    else:
        yield "inner", inner
        yield "outer", ~inner
    yield "all", np.ones(values.shape, dtype=np.bool_)


def write_sensitivity(rows: Sequence[Shift], path: str | os.PathLike[str]) -> None:
    """Write rows as CSV: ``layer,kind,e,Top-1,Top-5,loss``.

    Args:
        rows: of ``sensitivity``.
        path: file to write.
    """
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(astuple(row) for row in rows)
