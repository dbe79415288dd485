"""How the texts of an analysis are laid out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_compress import tables
from lightning_compress.analysis.advice import ERROR_BANDS, RATIO_BANDS, word
from lightning_compress.analysis.rows import Row


def title(text: str) -> str:
    """The first line of a text, underlined."""
    return f"{text}\n{'=' * len(text)}"


def section(heading: str, lines: Iterable[str]) -> str:
    """A heading and its lines; nothing without lines."""
    body = "\n".join(lines)
    return f"{heading}\n{'-' * len(heading)}\n{body}" if body else ""


def measured(row: Row) -> str:
    """What a row measured, in a few words."""
    ratio = (
        f"{row.name}, ratio {tables.cell(row.compression_ratio)} ({word(RATIO_BANDS, row.compression_ratio)})"
    )
    if not math.isfinite(row.ber):
        return f"{ratio}, output error rate unknown"
    return f"{ratio}, output error rate {tables.cell(row.ber)} ({word(ERROR_BANDS, row.ber)})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns; what is not finite is unknown, as in the JSON."""
    return tables.text(header, [[finite(value) for value in row] for row in rows])


def finite(value: Any) -> Any:
    """The value; None for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def whole(count: float) -> int | None:
    """A count that may be unknown, for a table; None instead of NaN."""
    return round(count) if math.isfinite(count) else None
