"""All files of an analysis, written one by one and each whole, into one folder and nowhere else."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from lightning_compress.analysis.limits import ber_text
from lightning_compress.analysis.outcome import Outcome
from lightning_compress.analysis.page import page
from lightning_compress.analysis.report import report_text
from lightning_compress.analysis.rows import Row
from lightning_compress.container import replacing

MODELS = "compressed_models"
_CHOICES = ("all", "pareto", "none")
_DPI = 110


def write(
    outcome: Outcome,
    models_folder: str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str] = "compression_results",
    models: str = "all",
    *,
    ber: bool = True,
) -> tuple[Path, ...]:
    """Write texts, JSON, CSV, figures, a page that opens offline, and the archives of the rows.

    Without matplotlib everything but the figures is written, with one warning.

    Args:
        outcome: what was found.
        models_folder: where the archives of the rows are, ``<name of the row>.lcz``; None only with models="none".
        output_dir: where to write; made if it does not exist.
        models: which archives are copied to ``compressed_models/``: "all", "pareto" or "none". Archives that an earlier
            report left there and that are not among them are removed. Where that folder is ``models_folder`` itself,
            nothing in it is touched.
        ber: whether the text and the figure of errors against ratios are among the files.

    Returns:
        The files, in the order in which they were written.

    Raises:
        OSError: the folder cannot be made or written into; raised before anything is written.
        ValueError: ``models`` is none of the three, or an archive is missing or not the one that was measured.
    """
    chosen = _chosen(outcome.rows, models_folder, models)
    folder = prepare(output_dir)
    kept = _copy(chosen, models_folder, folder)
    figures = _figures(outcome)
    values = json.dumps(outcome.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {
        "compression_report.txt": report_text(outcome).encode(),
        "ber_compression_analysis.txt": ber_text(outcome).encode(),
        "results.json": values.encode(),
        "results.csv": csv_text(outcome).encode(),
        **figures,
        "report.html": page(outcome, figures).encode(),
    }
    if not ber:
        contents = {name: content for name, content in contents.items() if not name.startswith("ber_")}
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content)
    return (*kept, *(folder / name for name in contents))


def prepare(output_dir: str | os.PathLike[str]) -> Path:
    """Make a folder, and make sure that files can be written into it.

    Args:
        output_dir: of a report.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be made or written into.

    Examples:
        >>> import tempfile
        >>> from lightning_compress.analysis.write import prepare
        >>> prepare(tempfile.mkdtemp() + "/results").is_dir()
        True
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir={os.fspath(output_dir)!r} cannot be written into ({error.strerror or error}): "
            "give a folder that can."
        ) from error
    return folder


def csv_text(outcome: Outcome) -> str:
    """The rows of ``outcome.to_json()`` as CSV: one line each, further metrics as columns of their own.

    Args:
        outcome: of an analysis.

    Returns:
        Lines; what is unknown is an empty cell, parameters are JSON.
    """
    rows = [{**row, **row.pop("extra", {})} for row in map(dict, outcome.to_json()["rows"])]
    buffer = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(buffer, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return buffer.getvalue()


def _chosen(
    rows: tuple[Row, ...], models_folder: str | os.PathLike[str] | None, models: str
) -> dict[str, Path]:
    """Name of a file -> where it is now."""
    if models not in _CHOICES:
        raise ValueError(f"models={models!r} is unknown; allowed: {', '.join(_CHOICES)}.")
    wanted = [row for row in rows if row.status == "ok" and row.file_bytes and models != "none"]
    if models == "pareto":
        wanted = [row for row in wanted if row.pareto]
    if not wanted:
        return {}
    if models_folder is None:
        raise ValueError(
            f"models={models!r} needs the folder with the archives of the rows; or pass models='none'."
        )
    found = {}
    for row in wanted:
        name = f"{row.name}.lcz"
        path = Path(models_folder) / name
        size = path.stat().st_size if Path(name).name == name and path.is_file() else None
        if size != row.file_bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"{path} {state}, and row {row.name} measured {row.file_bytes} bytes: give the folder that this "
                "analysis saved its models in, or models='none'."
            )
        found[name] = path
    return found


def _copy(chosen: dict[str, Path], models_folder: str | os.PathLike[str] | None, folder: Path) -> list[Path]:
    """Copies of the archives; those that an earlier report has left there go."""
    target = folder / MODELS
    if models_folder is not None and target.is_dir() and target.samefile(models_folder):
        return []  # the analysis itself keeps them there, and goes on from them
    if chosen:
        target.mkdir(exist_ok=True)
    for name, source in chosen.items():
        with source.open("rb") as origin, replacing(target / name) as file:
            shutil.copyfileobj(origin, file)
    for name in _earlier(folder) - chosen.keys():
        path = target / name
        if path.is_file() and path.parent.samefile(target):
            path.unlink()
    return [target / name for name in chosen]


def _earlier(folder: Path) -> set[str]:
    """Names of the archives of the report that is in the folder now."""
    try:
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
        return {f"{row['name']}.lcz" for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _figures(outcome: Outcome) -> dict[str, bytes]:
    """Name of a file -> PNG, the same whatever style the user has set; nothing without matplotlib."""
    from lightning_compress import plots

    images = {}
    try:
        from matplotlib import style

        with style.context("default"):
            made = {
                "compression_analysis.png": plots.compression_analysis(outcome),
                "ber_compression_analysis.png": plots.ber_compression_analysis(outcome),
            }
            for name, figure in made.items():
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
                images[name] = buffer.getvalue()
    except ImportError:
        warnings.warn(
            "The report has no figures, which need matplotlib: pip install 'lightning-compress[tensorboard]'.",
            stacklevel=3,
        )
        return {}
    return images
