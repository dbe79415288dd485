"""Entries of a tensor that are one value: their mean and their sum, given back to each of them."""

from __future__ import annotations

import torch
from torch import Tensor


class Ties:
    """Which entries of a tensor share a value.

    Sums run in double precision and in the order of the entries, so they are the same on every process and in every
    run, and entries that are equal already keep their bits.

    Args:
        labels: integers; entries with the same label >= 0 share a value, those labelled -1 are zero.
        signs: -1 and 1, shape of the labels: an entry is its sign times the value. None: all 1.

    Examples:
        >>> ties = Ties(torch.tensor([0, 1, 0, -1]), torch.tensor([1.0, 1.0, -1.0, 1.0]))
        >>> ties.mean(torch.tensor([2.0, 5.0, -4.0, 7.0])).tolist()
        [3.0, 5.0, -3.0, 0.0]
        >>> ties.sum(torch.tensor([2.0, 5.0, -4.0, 7.0])).tolist()
        [6.0, 5.0, -6.0, 0.0]
        >>> len(ties)
        2
    """

    def __init__(self, labels: Tensor, signs: Tensor | None = None) -> None:
        flat = labels.reshape(-1)
        order = flat.argsort(stable=True)
        self.shape = labels.shape
        self.members = order[int((flat < 0).sum()) :]
        found = torch.unique_consecutive(flat[self.members], return_inverse=True, return_counts=True)
        self.group, self.counts = found[1:]
        self.signs = None if signs is None else signs.reshape(-1)[self.members].double()

    def __len__(self) -> int:
        """How many values there are, without the zero."""
        return len(self.counts)

    def mean(self, x: Tensor) -> Tensor:
        """``s_i / n_k sum_j s_j x_j`` over the n_k entries j that share the value k of entry i; 0 at those labelled -1.

        Args:
            x: real, shape of the labels.

        Returns:
            Shape and dtype of x.
        """
        return self._spread(self._sums(x) / self.counts, x)

    def sum(self, x: Tensor) -> Tensor:
        """``s_i sum_j s_j x_j``, as `mean`: if x is a gradient, that of the shared value.

        Args:
            x: real, shape of the labels.

        Returns:
            Shape and dtype of x.
        """
        return self._spread(self._sums(x), x)

    def _sums(self, x: Tensor) -> Tensor:
        values = x.detach().reshape(-1)[self.members].double()
        values = values if self.signs is None else self.signs * values
        if not len(values):
            return values
        found: Tensor = torch.segment_reduce(values, "sum", lengths=self.counts)
        return found

    def _spread(self, sums: Tensor, x: Tensor) -> Tensor:
        values = sums[self.group] if self.signs is None else self.signs * sums[self.group]
        out = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
        out[self.members] = values.to(x.dtype)
        return out.view(self.shape)
