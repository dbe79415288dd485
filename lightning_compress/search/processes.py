"""The same work for many items, here or in an executor."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


class Work(Generic[Item, Found]):
    """Applies a function to items; results come in the order of the items.

    Args:
        function: item -> result. With an executor it is pickled once and sent with every item.
        executor: of ``concurrent.futures`` or alike; None works here, one item after the other.

    Examples:
        >>> from lightning_compress.search.processes import Work
        >>> list(Work(abs, None)([-1, 2]))
        [1, 2]
    """

    def __init__(self, function: Callable[[Item], Found], executor: Executor | None) -> None:
        self.function, self.executor = function, executor
        self.packed = b"" if executor is None else pickle.dumps(function)
        self.name = hashlib.sha256(self.packed).hexdigest()

    def __call__(self, items: Sequence[Item]) -> Iterator[Found]:
        """Results, one by one.

        Args:
            items: what to work on.

        Yields:
            ``function(item)``.
        """
        if self.executor is None:
            yield from map(self.function, items)
            return
        jobs = [self.executor.submit(_done, self.name, self.packed, item) for item in items]
        try:
            for job in jobs:
                yield job.result()
        finally:
            for job in jobs:
                job.cancel()


_UNPACKED: dict[str, Callable[[Any], Any]] = {}  # of the process that works: the last function it was sent


def _done(name: str, packed: bytes, item: Any) -> Any:
    function = _UNPACKED.get(name)
    if function is None:
        function = pickle.loads(packed)
        _UNPACKED.clear()
        _UNPACKED[name] = function
    return function(item)
