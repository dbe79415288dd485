"""A mapping whose values are made when they are asked for, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

V = TypeVar("V")


class Computed(Mapping[str, V], Generic[V]):
    """Key -> ``make(key)``, made anew every time: what is as large as a model then never exists as a whole.

    Args:
        keys: in order.
        make: gives the same value every time.

    Examples:
        >>> squares = Computed(["1", "2"], lambda key: int(key) ** 2)
        >>> squares["2"], list(squares)
        (4, ['1', '2'])
    """

    def __init__(self, keys: Iterable[str], make: Callable[[str], V]) -> None:
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> V:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
