"""Loops as machine code, compiled when the first of a module is called: importing the library stays cheap."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

# module -> name -> function and options
_WAITING: dict[str, dict[str, tuple[Callable[..., Any], dict[str, Any]]]] = {}
_LOCK = threading.Lock()


def compiled(**options: Any) -> Callable[[Function], Function]:
    """Compile a function of a module with numba at the first call of any such function there.

    Compiled functions of one module may call each other, by their names in the module.

    Args:
        options: of ``numba.njit``; ``cache=True`` is always given.

    Returns:
        A decorator.

    Examples:
        >>> from lightning_compress.functional.vectors import nearest_rows  # its loop is not compiled yet
        >>> nearest_rows([[0.9]], [[0.0], [1.0]]).tolist()
        [1]
    """

    def decorate(function: Function) -> Function:
        module, name = function.__module__, function.__name__
        _WAITING.setdefault(module, {})[name] = function, options

        @wraps(function)
        def first(*args: Any) -> Any:
            _compile(module)
            return vars(sys.modules[module])[name](*args)

        return first  # type: ignore[return-value]

    return decorate


def _compile(module: str) -> None:
    """Put compiled functions in the place of all that wait in a module."""
    from numba import njit

    with _LOCK:
        made = {
            name: njit(cache=True, **options)(function)
            for name, (function, options) in _WAITING.get(module, {}).items()
        }
        vars(sys.modules[module]).update(made)
        _WAITING.pop(module, None)
