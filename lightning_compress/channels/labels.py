"""Labels of channels: which entries of which axes must go together, and which must stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Labels:
    """Numbered channels with equalities between them.

    Examples:
        >>> labels = Labels()
        >>> a, b = labels.new(2), labels.new(2)
        >>> labels.equal(a, b)
        >>> labels.freeze(b[1:], "the model gives it out")
        >>> classes = labels.solve()
        >>> bool(classes[a[0]] == classes[b[0]]), labels.frozen(classes)
        (True, {1: 'the model gives it out'})
    """

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[Ids, Ids]] = []
        self._frozen: list[tuple[Ids, str]] = []

    def new(self, n: int) -> Ids:
        """So many labels that nothing is known of."""
        self.count += n
        return np.arange(self.count - n, self.count)

    def equal(self, a: Ids, b: Ids) -> None:
        """The channels of two sequences go pair by pair; one of them may be a single label for all of the other."""
        a, b = np.broadcast_arrays(a, b)
        self._pairs.append((a.reshape(-1), b.reshape(-1)))

    def freeze(self, ids: Ids, why: str) -> None:
        """These channels stay."""
        self._frozen.append((ids.reshape(-1), why))

    def solve(self) -> Ids:
        """For every label the lowest one that it goes together with."""
        parent = np.arange(self.count)
        if not self._pairs:
            return parent
        a = np.concatenate([pair[0] for pair in self._pairs])
        b = np.concatenate([pair[1] for pair in self._pairs])
        while True:  # the lowest label spreads along the pairs, with pointers shortened in between
            x, y = parent[a], parent[b]
            differ = x != y
            if not differ.any():
                return parent
            a, b, x, y = a[differ], b[differ], x[differ], y[differ]
            np.minimum.at(parent, np.maximum(x, y), np.minimum(x, y))
            while True:
                shorter = parent[parent]
                if np.array_equal(shorter, parent):
                    break
                parent = shorter

    def frozen(self, classes: Ids) -> dict[int, str]:
        """Class -> why it stays, the first reason given.

        Args:
            classes: what ``solve`` returned.

        Returns:
            The classes with a channel that must stay.
        """
        found: dict[int, str] = {}
        for ids, why in self._frozen:
            for one in np.unique(classes[ids]):
                found.setdefault(int(one), why)
        return found
