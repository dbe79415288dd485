"""What figures and texts read from rows: which can be shown, which is best, how an error is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from lightning_compress.functional.tradeoff import best_under
from lightning_compress.plots.measured import Measured

WANTED = 0.10  # output error rate that a model should keep when nothing else is said
COLOURS = {  # Okabe and Ito 2008: told apart by colour-blind readers
    "pruning": "#0072B2",
    "quantization": "#D55E00",
    "sharing": "#009E73",
    "lowrank": "#CC79A7",
    "students": "#E69F00",
    "combined": "#000000",
}
MARKERS = {
    "pruning": "o",
    "quantization": "s",
    "sharing": "^",
    "lowrank": "v",
    "students": "D",
    "combined": "P",
}
OTHER = "#56B4E9"  # groups that have no colour of their own


AnyRow = TypeVar("AnyRow", bound=Measured)


def stored(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Rows that became a file, so that their bytes are known.

    Args:
        rows: of an analysis.

    Returns:
        Those with status "ok" and a ratio.
    """
    return [row for row in rows if row.status == "ok" and math.isfinite(row.compression_ratio)]


def scored(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Rows that became a file and whose output error is a number.

    Args:
        rows: of an analysis.

    Returns:
        Those of ``stored`` with a finite ``ber``.
    """
    return [row for row in stored(rows) if math.isfinite(row.ber)]


def error_field(rows: Sequence[Measured]) -> str:
    """Which field says how much a technique harms: the relative error of the weights where no output was compared.

    Args:
        rows: of an analysis.

    Returns:
        "ber", or "weight_relative_error" if rows were stored and not one of them has a ``ber``.
    """
    return "weight_relative_error" if stored(rows) and not scored(rows) else "ber"


def error_name(field: str) -> str:
    """The words for a field that ``error_field`` names.

    Args:
        field: "ber" or "weight_relative_error".

    Returns:
        The words.

    Examples:
        >>> from lightning_compress.plots.rows import error_name
        >>> error_name("ber")
        'output error rate'
    """
    return {"ber": "output error rate", "weight_relative_error": "relative weight error"}[field]


def groups(rows: Sequence[Measured]) -> list[str]:
    """The groups that occur, in the order of their colours, unknown ones last.

    Args:
        rows: of an analysis.

    Returns:
        Names of groups.
    """
    found = {row.group for row in rows}
    return [*(name for name in COLOURS if name in found), *sorted(found - COLOURS.keys())]


def best(rows: Sequence[AnyRow], limit: float = WANTED, field: str = "ber") -> AnyRow | None:
    """The row with the largest ratio among those whose error keeps a limit.

    Args:
        rows: of an analysis.
        limit: largest error allowed.
        field: which error; see ``error_field``.

    Returns:
        The row, of equal ratios that of the smaller error, then the first by name; None if no row keeps the limit.

    Examples:
        >>> from lightning_compress.analysis.rows import Row
        >>> from lightning_compress.plots.rows import best
        >>> rows = [Row("a", "pruning", file_bytes=50, dense_bytes=100, ber=0.01),
        ...         Row("b", "pruning", file_bytes=10, dense_bytes=100, ber=0.5)]
        >>> best(rows).name, best(rows, 0.5).name, best(rows, 0.001)
        ('a', 'b', None)
    """
    usable = stored(rows)
    at = best_under(
        [row.compression_ratio for row in usable],
        [float(getattr(row, field)) for row in usable],
        limit,
        [row.name for row in usable],
    )
    return None if at is None else usable[at]


def gentlest(rows: Sequence[AnyRow], ratio: float = 1.5, field: str = "ber") -> AnyRow | None:
    """The row of the lowest error among those that save something.

    Args:
        rows: of an analysis.
        ratio: the compression ratio must be larger than this.
        field: which error; see ``error_field``.

    Returns:
        The row, of equal errors that of the larger ratio, then the first by name; None if there is none.
    """
    usable = [
        row for row in stored(rows) if row.compression_ratio > ratio and math.isfinite(getattr(row, field))
    ]
    return min(usable, key=lambda r: (getattr(r, field), -r.compression_ratio, r.name), default=None)
