"""One experiment: which weights of a network are computed from which others, and how circuits are searched for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.functions import Int8
from lightning_compress.cgp.search.problem import Ints, Problem
from lightning_compress.cgp.search.settings import Settings

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Place:
    """Some entries of one weight.

    Args:
        key: full parameter name, such as "conv1.weight".
        positions: int64 [n], places in the flattened weight.
    """

    key: str
    positions: Ints


@dataclass(frozen=True, eq=False)
class Experiment:
    """A problem that comes from a network, with the settings of its search.

    Args:
        name: of its folder: letters, digits, ``_``, ``-`` and ``.``.
        problem: inputs and wanted weights.
        settings: of the search; run r has the seed ``run_seed(settings.seed, r)``.
        places: the entries that the weights are, of all data sets one after the other; a data set may have several.
        runs: how many there are, >= 1.

    Raises:
        ValueError: places and problem do not fit together.
    """

    name: str
    problem: Problem
    settings: Settings
    places: tuple[Place, ...]
    runs: int = 1

    def __post_init__(self) -> None:
        sizes = [len(place.positions) for place in self.places]
        sets = [len(wires) for wires in self.problem.wires]
        if not {0, *np.cumsum(sets).tolist()} <= {0, *np.cumsum(sizes).tolist()} or sum(sizes) != sum(sets):
            raise ValueError(
                f"experiment {self.name!r} has places for {sizes} weights: needed are such for {sets}, one data set "
                "after the other."
            )
        if self.runs < 1:
            raise ValueError(f"experiment {self.name!r} has runs={self.runs}: allowed is >= 1.")

    def located(self, rows: Sequence[Array]) -> Iterator[tuple[Place, int, Array]]:
        """Where the weights of all data sets are.

        Args:
            rows: of every data set, something for each of its weights, such as what ``Problem.decode`` gives.

        Yields:
            A place, the number of its data set, and the part of the row that belongs there.
        """
        places = iter(self.places)
        for number, row in enumerate(rows):
            start = 0
            while start < len(row):
                place = next(places)
                yield place, number, row[start : start + len(place.positions)]
                start += len(place.positions)

    def written(self, codes: Mapping[str, Int8], outputs: npt.ArrayLike) -> dict[str, Int8]:
        """The integers of the network with the weights that some outputs give.

        Args:
            codes: parameter name -> int8 weights of any shape; they are not changed.
            outputs: int8 [datasets, outputs], of a circuit.

        Returns:
            Parameter name -> int8 weights, of those that are computed.
        """
        result: dict[str, Int8] = {}
        for place, _, values in self.located(self.problem.decode(outputs)):
            changed = result.setdefault(place.key, np.array(codes[place.key], dtype=np.int8))
            changed.reshape(-1)[place.positions] = values
        return result
