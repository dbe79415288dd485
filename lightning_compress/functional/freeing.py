"""Memory that is free goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


def _trim() -> Callable[[int], Any]:
    """The function malloc_trim of glibc; other libraries do without."""
    try:
        found: Callable[[int], Any] = ctypes.CDLL(None).malloc_trim
        return found
    except (AttributeError, OSError, TypeError):
        return lambda pad: None


class Freeing:
    """Counts the bytes that were worked on, and gives free memory back every so often.

    Work that goes through a model tensor by tensor leaves gaps between the few things that stay. glibc keeps them, so
    that the process grows although nothing is held.

    Args:
        every: bytes.

    Examples:
        >>> Freeing().worked_on(1 << 20)
    """

    def __init__(self, every: int = 1 << 21) -> None:
        self._every, self._left, self._trim = every, every, _trim()

    def worked_on(self, size: int) -> None:
        """So many bytes more."""
        self._left -= size
        if self._left <= 0:
            self._trim(0)
            self._left = self._every
