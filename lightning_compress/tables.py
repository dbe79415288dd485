"""Plain-text and Markdown tables; every report of the library is drawn by these functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def cell(value: Any) -> str:
    """One table cell: counts with thousands separators, other numbers with four significant digits.

    Args:
        value: anything; NaN and None mean unknown.

    Returns:
        Short text.

    Examples:
        >>> cell(1234567), cell(0.123456), cell(float("nan")), cell("conv1")
        ('1,234,567', '0.1235', '-', 'conv1')
    """
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def listing(names: Sequence[str], most: int = 4) -> str:
    """Names in a sentence, the first few of many.

    Args:
        names: what to list.
        most: how many to spell out.

    Returns:
        Comma-separated names and the number of those left out.

    Examples:
        >>> listing(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def reasons(skipped: Mapping[str, str]) -> str:
    """Why things were left alone, one line a reason.

    Args:
        skipped: name -> reason.

    Returns:
        Indented lines, each starting with a newline; empty if nothing was skipped.

    Examples:
        >>> print("skipped:" + reasons({"a": "too small", "b": "too small", "c": "excluded"}))
        skipped:
          a, b: too small
          c: excluded
    """
    names: dict[str, list[str]] = {}
    for name, why in skipped.items():
        names.setdefault(why, []).append(name)
    return "".join(f"\n  {listing(group)}: {why}" for why, group in names.items())


def text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns for a terminal; the first column to the left, numbers to the right.

    Args:
        header: column names.
        rows: one sequence of values per row, as long as the header.

    Returns:
        The table, lines joined by newlines.

    Examples:
        >>> print(text(["layer", "zeros"], [["fc", 12], ["conv1", 3]]))
        layer  zeros
        -----  -----
        fc        12
        conv1      3
    """
    body = [[cell(v) for v in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *body]) for i in range(len(header))]

    def line(cells: Sequence[str], numeric: Sequence[bool]) -> str:
        aligned = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    numeric = [
        bool(rows) and all(isinstance(r[i], int | float | None) for r in rows) for i in range(len(header))
    ]
    return "\n".join(
        [line(header, numeric), "  ".join("-" * w for w in widths), *(line(r, numeric) for r in body)]
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same table in Markdown, for TensorBoard's text page and for documents.

    Args:
        header: column names.
        rows: one sequence of values per row, as long as the header.

    Returns:
        The table, lines joined by newlines.

    Examples:
        >>> print(markdown(["layer", "zeros"], [["fc", 12]]))
        | layer | zeros |
        | --- | --- |
        | fc | 12 |
    """
    lines = [list(header), ["---"] * len(header), *([cell(v) for v in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
