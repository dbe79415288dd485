"""Names: of layers, with the patterns that select them, and of options that may be a name, a path or a function."""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def clean(name: str) -> str:
    """Name without the prefix that ``torch.compile`` puts in front.

    Args:
        name: module or parameter name.

    Returns:
        The name that the plain model uses.

    Examples:
        >>> clean("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return ".".join(p for p in name.split(".") if p != "_orig_mod") if "_orig_mod" in name else name


def matches(pattern: str, *names: str) -> bool:
    r"""Whether a glob pattern, or a regular expression written ``re:...``, fits one of the names.

    Args:
        pattern: ``"layer1.*"`` or ``"re:layer[12]\..*"`` (the whole name must fit).
        names: candidates.

    Returns:
        True if one fits.

    Raises:
        ValueError: the regular expression is malformed.

    Examples:
        >>> matches("layer?.*", "layer1.0.conv1"), matches("re:layer[23].*", "layer1.0.conv1")
        (True, False)
    """
    if pattern.startswith("re:"):
        try:
            return any(re.fullmatch(pattern[3:], n) for n in names)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}.") from None
    return any(fnmatch.fnmatchcase(n, pattern) for n in names)


def lookup(table: Mapping[str, T], *names: str) -> T | None:
    """Value for a name in a mapping from pattern to value: exact name first, then patterns in order, then ``"*"``.

    Args:
        table: pattern -> value.
        names: the names of one layer, any of which may fit.

    Returns:
        The value, or None when nothing fits.

    Examples:
        >>> lookup({"*": 0.5, "fc*": 0.9, "fc1": 0.1}, "fc1"), lookup({"*": 0.5, "fc*": 0.9}, "fc2")
        (0.1, 0.9)
    """
    for name in names:
        if name in table:
            return table[name]
    for pattern, value in table.items():
        if pattern != "*" and matches(pattern, *names):
            return value
    return table.get("*")


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
