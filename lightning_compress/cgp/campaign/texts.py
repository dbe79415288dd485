"""An experiment as text files, which rebuild it without the network, to the last integer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.experiments import Place
from lightning_compress.cgp.search.problem import Ints, Problem
from lightning_compress.cgp.search.settings import Settings
from lightning_compress.energy import EnergyTable, Operation

IGNORED = "x"


def train_data(problem: Problem) -> str:
    """Of every data set a line of inputs and a line of wanted outputs, ``x`` where the output does not matter."""
    lines = []
    for given, wanted, counts in zip(problem.inputs, problem.targets, problem.counts, strict=True):
        outputs = (str(v) if n else IGNORED for v, n in zip(wanted.tolist(), counts.tolist(), strict=True))
        lines += [" ".join(map(str, given.tolist())), " ".join(outputs)]
    return "\n".join(lines) + "\n"


def details(problem: Problem, places: Sequence[Place]) -> dict[str, Any]:
    """What ``train_data`` leaves out, as JSON values: how weights are read from the pins, and where they go."""
    return {
        "loaded": problem.loaded,
        "counts": problem.counts.tolist(),
        "ignored": problem.targets[problem.counts == 0].tolist(),
        "wires": [wires.tolist() for wires in problem.wires],
        "places": [{"key": place.key, "positions": _stretches(place.positions)} for place in places],
    }


def rebuild(train: str, given: Mapping[str, Any]) -> tuple[Problem, tuple[Place, ...]]:
    r"""Inverse of ``train_data`` and ``details``.

    Args:
        train: the lines.
        given: the JSON values.

    Returns:
        The problem, and the places of its weights.

    Examples:
        >>> from lightning_compress.cgp.campaign.texts import details, rebuild, train_data
        >>> from lightning_compress.cgp.experiments import Place
        >>> from lightning_compress.cgp.search.problem import Problem
        >>> problem = Problem.of([[3, 4]], [[7, 3, 7]])
        >>> train_data(problem)
        '3 4\n7\n'
        >>> places = [Place("fc.weight", np.array([0, 1, 5]))]
        >>> again, [place] = rebuild(train_data(problem), details(problem, places))
        >>> again.targets.tolist(), again.wires[0].tolist(), place.positions.tolist()
        ([[7]], [2, 0, 2], [0, 1, 5])
    """
    lines = train.split("\n")
    counts = np.array(given["counts"], dtype=np.int64).reshape(len(given["wires"]), -1)
    ignored = iter(given["ignored"])
    targets = np.array(
        [[next(ignored) if v == IGNORED else int(v) for v in line.split()] for line in lines[1::2]],
        dtype=np.int8,
    )
    problem = Problem(
        np.array([[int(v) for v in line.split()] for line in lines[: 2 * len(counts) : 2]], dtype=np.int8),
        targets.reshape(counts.shape),
        counts,
        tuple(np.array(wires, dtype=np.int64) for wires in given["wires"]),
        given["loaded"],
    )
    return problem, tuple(Place(p["key"], _positions(p["positions"])) for p in given["places"])


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Inverse of ``Settings.config``.

    Args:
        values: its JSON values.

    Returns:
        The settings.

    Raises:
        ValueError: a setting that this version does not have, or a value out of its range.
    """
    given, table = dict(values), None
    if isinstance(given.get("functions"), list):
        given["functions"] = tuple(given["functions"])
    if given.get("energy") is not None:
        operations = (
            Operation(number, name, energy, delay, math.nan if area is None else area)
            for number, name, energy, delay, area in given["energy"]
        )
        table = EnergyTable({operation.id: operation for operation in operations})
    try:
        return Settings(**given | {"energy": table})
    except TypeError as error:
        raise ValueError(f"settings of another version of this library: {error}.") from None


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """In words, what differs between two JSON values.

    Args:
        there: one.
        here: the other.
        name: of both.

    Returns:
        One sentence for each value; empty if there are none.

    Examples:
        >>> from lightning_compress.cgp.campaign.texts import differences
        >>> differences({"rows": 64, "cols": 16}, {"rows": 32, "cols": 16})
        ['rows: 64 there, 32 here']
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [*there, *(key for key in here if key not in there)]
        return [
            line
            for key in keys
            for line in differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if there == here else [f"{name}: {there} there, {here} here"]


def _stretches(positions: Ints) -> list[list[int]]:
    """[first, length] of neighbours: positions are mostly whole layers, or rows of kernels."""
    ends = np.append(np.flatnonzero(np.diff(positions) != 1) + 1, len(positions))
    starts = np.append(0, ends[:-1])
    return [[int(positions[a]), int(b - a)] for a, b in zip(starts, ends, strict=True) if b > a]


def _positions(stretches: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    pieces = [np.arange(first, first + length, dtype=np.int64) for first, length in stretches]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
