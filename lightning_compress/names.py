"""Options that may be a name, an import path or a function."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def resolve(value: str | T, known: Mapping[str, T], option: str) -> T:
    """The thing meant by a name, an import path, or itself.

    Args:
        value: a key of ``known``; ``"package.module.name"`` or ``"package.module:name"``; or a function.
        known: name -> thing.
        option: the option's name, for errors.

    Returns:
        The thing.

    Raises:
        ValueError: unknown name, or an import path that leads nowhere.

    Examples:
        >>> resolve("half", {"half": 0.5}, "share"), resolve("math.sqrt", {}, "f")(4.0)
        (0.5, 2.0)
    """
    if not isinstance(value, str):
        return value
    if value in known:
        return known[value]
    module, _, name = value.replace(":", ".").rpartition(".")
    if not module:
        allowed = ", ".join(known)
        raise ValueError(f"{option}={value!r} is unknown; allowed: {allowed}, an import path, or a function.")
    try:
        found: T = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}={value!r} cannot be imported: {error}.") from None
    return found


def name_of(value: Any) -> str:
    """Short name of an option that may be a function, for tables and errors.

    Args:
        value: a name or a function.

    Returns:
        Its name.

    Examples:
        >>> name_of("magnitude"), name_of(len)
        ('magnitude', 'len')
    """
    return value if isinstance(value, str) else getattr(value, "__name__", repr(value))
