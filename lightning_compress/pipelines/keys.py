"""Names that a person wrote: each must be known, and an unknown one is answered with the nearest that is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that a misspelled one most likely means.

    Args:
        name: what was given; case, dashes and underscores do not count.
        allowed: what may be given.

    Returns:
        The nearest name, or None if none is near.

    Examples:
        >>> nearest("sparsty", ["sparsity", "scope"]), nearest("colour", ["sparsity", "scope"])
        ('sparsity', None)
    """
    plain = {_plain(a): a for a in allowed}
    found = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.75)
    return plain[found[0]] if found else None


def check_keys(given: Iterable[object], allowed: Iterable[str], where: str) -> None:
    """Refuse keys that are not known.

    Args:
        given: keys that were written.
        allowed: keys that may be.
        where: what they belong to, for the error.

    Raises:
        ValueError: an unknown key; names the nearest allowed one and lists all.

    Examples:
        >>> check_keys(["sparsty"], ["sparsity", "scope"], "Prune")
        Traceback (most recent call last):
            ...
        ValueError: Prune: unknown key 'sparsty'; did you mean 'sparsity'? Allowed: sparsity, scope.
    """
    known = list(allowed)
    for key in given:
        if key not in known:
            raise ValueError(unknown(str(key), known, f"{where}: unknown key"))


def unknown(name: str, allowed: Iterable[str], what: str) -> str:
    """The sentence for a name that is not known.

    Args:
        name: what was given.
        allowed: what may be given.
        what: how the sentence begins.

    Returns:
        The sentence, with the nearest allowed name if there is one.
    """
    known = list(allowed)
    near = nearest(name, known)
    hint = f" did you mean {near!r}?" if near else ""
    return f"{what} {name!r};{hint} {'Allowed' if hint else 'allowed'}: {', '.join(known)}."


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
