"""One experiment: which weights of a network are computed from which others, and how circuits are searched for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.functions import Int8
from lightning_compress.cgp.problem import Ints, Problem
from lightning_compress.cgp.settings import Settings


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
        places: of every data set, the entries that its weights are.
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
        if sizes != [len(wires) for wires in self.problem.wires] or self.runs < 1:
            raise ValueError(
                f"experiment {self.name!r} has places for {sizes} weights and {self.runs} runs: needed are "
                f"{[len(wires) for wires in self.problem.wires]} and at least 1."
            )

    def written(self, codes: dict[str, Int8], outputs: npt.ArrayLike) -> dict[str, Int8]:
        """The integers of the network with the weights that some outputs give.

        Args:
            codes: parameter name -> int8 weights of any shape; they are not changed.
            outputs: int8 [datasets, outputs], of a circuit.

        Returns:
            Parameter name -> int8 weights, of those that are computed.
        """
        result: dict[str, Int8] = {}
        for place, values in zip(self.places, self.problem.decode(outputs), strict=True):
            changed = result.setdefault(place.key, np.array(codes[place.key], dtype=np.int8))
            changed.reshape(-1)[place.positions] = values
        return result
