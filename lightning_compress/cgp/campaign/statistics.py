"""The rows of a run: a CSV file that grows by whole lines, and can be cut back to any of them."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

from lightning_compress.cgp.search.settings import MILLI, PICO, Row
from lightning_compress.container import replacing

COLUMNS = (
    "run",
    "generation",
    "timestamp",
    "error",
    "quantized_energy",
    "energy",
    "area",
    "quantized_delay",
    "delay",
    "depth",
    "gate_count",
    "chromosome",
)
HEADER = ",".join(COLUMNS) + "\n"
_PACKED = (1980, 1, 1, 0, 0, 0)  # the same rows give the same archive


def line(run: int, row: Row, area: float, chromosome: str) -> str:
    r"""One row.

    Args:
        run: number of the run.
        row: of its history.
        area: square micrometres; NaN (some gate's is unknown) leaves the cell empty.
        chromosome: text of the circuit, or nothing.

    Returns:
        A line; energies in pJ and 1e-6 pJ, delays in additions and 1e-3 additions, times in seconds since the start.

    Examples:
        >>> from lightning_compress.cgp.campaign.statistics import line
        >>> from lightning_compress.cgp.search.settings import Row
        >>> line(3, Row(10, 2, 0.5, 4, 60_000, 2_000, 2, 2), float("nan"), "")
        '3,10,0.500,4,60000,0.06,,2000,2.0,2,2,\n'
    """
    cells = [run, row.generation, f"{row.seconds:.3f}", row.error, row.energy, repr(row.energy / PICO)]
    cells += ["" if math.isnan(area) else repr(area), row.delay, repr(row.delay / MILLI), row.depth]
    return ",".join(map(str, [*cells, row.gate_count, quoted(chromosome)])) + "\n"


def quoted(chromosome: str) -> str:
    """A chromosome as the last cell of a row; it holds commas and no quotes."""
    return f'"{chromosome}"' if chromosome else ""


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a file of statistics or of a front, plain or zipped.

    Python's ``csv`` refuses chromosomes of large grids as too long, unless ``csv.field_size_limit`` is raised.

    Args:
        path: ``.csv`` or ``.csv.zip``; if it is absent, the other one is read.

    Returns:
        Of every row, column -> text, in order.

    Raises:
        FileNotFoundError: there is neither.
    """
    header, *lines = _text(Path(path)).splitlines()
    names = header.split(",")
    rows = (text.split(",", len(names) - 1) for text in lines)
    return [dict(zip(names, [*cells[:-1], cells[-1].strip('"')], strict=True)) for cells in rows]


def lines_of(path: Path) -> list[str]:
    """The lines of such a file with their ends, the header not among them."""
    return _text(path).splitlines(keepends=True)[1:]


def _text(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix == ".zip" else path
    packed = plain.with_name(plain.name + ".zip")
    if packed.exists():
        with zipfile.ZipFile(packed) as archive:
            return archive.read(plain.name).decode("utf-8")
    return plain.read_text(encoding="utf-8")


def write(path: Path, text: str) -> None:
    """A whole file at once, zipped if its name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix != ".zip":
            file.write(text.encode("utf-8"))
            return
        with zipfile.ZipFile(file, "w") as archive:
            name = zipfile.ZipInfo(path.name.removesuffix(".zip"), _PACKED)
            archive.writestr(name, text, zipfile.ZIP_DEFLATED)


class Growing:
    """A file of rows that is open for more.

    Args:
        path: of a plain file.
        rows: the first so many stay, all others are cut off; without any the file is begun anew.

    Raises:
        ValueError: the file has fewer.
    """

    def __init__(self, path: Path, rows: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = rows
        self._file = path.open("r+b" if path.exists() else "w+b")
        try:
            if rows:
                for at in range(rows + 1):
                    if not self._file.readline().endswith(b"\n"):
                        raise ValueError(f"{path} has {max(0, at - 1)} whole rows, its state names {rows}.")
                self._file.truncate(self._file.tell())
            else:
                self._file.truncate(0)
                self._file.write(HEADER.encode("utf-8"))
        except BaseException:
            self._file.close()
            raise

    def append(self, text: str) -> None:
        """One more row; others see it at once."""
        self._file.write(text.encode("utf-8"))
        self._file.flush()
        self.rows += 1

    def sync(self) -> None:
        """Return when all rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more rows."""
        self._file.close()
