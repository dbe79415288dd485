"""Job scripts for clusters, as text: they are looked at and submitted by hand."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Sequence

from lightning_compress.cgp.campaign.folders import find
from lightning_compress.cgp.campaign.overview import COMMAND

_HEADS = {
    "pbs": (
        "#PBS -N {name}\n#PBS -l walltime={time}\n#PBS -l select=1:ncpus={cpus}:mem={mem}",
        ":scratch_local={scratch}",
    ),
    "slurm": (
        "#SBATCH --job-name={name}\n#SBATCH --time={time}\n#SBATCH --nodes=1\n#SBATCH --ntasks=1\n"
        "#SBATCH --cpus-per-task={cpus}\n#SBATCH --mem={mem}",
        "\n#SBATCH --tmp={scratch}",
    ),
}
_BODY = "\nset -euo pipefail\nexport OMP_NUM_THREADS=1\n{command}\n"
_SCRATCH = (
    '\nset -euo pipefail\nexport OMP_NUM_THREADS=1 TMPDIR="${SCRATCHDIR:-${TMPDIR:-/tmp}}"\n{command}\n'
)
_PLACE = re.compile(r"(?<!\$)\{(\w+)\}")
_TIME = re.compile(r"\d+:[0-5]\d:[0-5]\d")
_BYTES = re.compile(r"(\d+)\s*([kmgt])i?b?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def script(
    folders: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    system: str,
    *,
    name: str,
    time: str,
    cpus: int,
    memory: str,
    scratch: str | None = None,
    template: str | None = None,
) -> list[str]:
    """A job script for every folder of experiments or batches; nothing is submitted.

    A job that is killed at its time limit goes on from its last states when its script is submitted again.

    Args:
        folders: of experiments, batches or whole campaigns, on a disk that the nodes see by the same path.
        system: "pbs" or "slurm".
        name: of the jobs; with several of them, each gets its number.
        time: limit, "hours:minutes:seconds".
        cpus: processes of a job, each for one run, >= 1.
        memory: of a job, such as "4gb".
        scratch: on the disk of the node, for temporary files; None asks for none. PBS has no name for it that all
            clusters share: the script says ``scratch_local``; give a template where it is called otherwise.
        template: another script, with {name}, {time}, {cpus}, {mem}, {scratch} and {command} where these go. Shell
            variables ``${LIKE_THIS}`` are left alone, and so are braces around anything but one word.

    Returns:
        The scripts, one for each folder.

    Raises:
        FileNotFoundError: a folder that was not planned.
        ValueError: an option out of its range, an unknown placeholder, or one that is missing.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from lightning_compress.cgp import Problem, Settings
        >>> from lightning_compress.cgp.campaign import plan, script
        >>> from lightning_compress.cgp.experiments import Experiment, Place
        >>> problem, grid = Problem.of([[3, 4]], [[7, 3, 9]]), Settings(rows=4, cols=4, patience=50)
        >>> tiny = Experiment("tiny", problem, grid, (Place("fc.weight", np.arange(3)),), runs=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     folders = plan([tiny], folder)
        ...     [text] = script(folders, "slurm", name="tiny", time="4:00:00", cpus=4, memory="2gb")
        >>> text.splitlines()[5:7]
        ['#SBATCH --cpus-per-task=4', '#SBATCH --mem=2G']
    """
    values = _values(system, name, time, cpus, memory, scratch)
    if template is None:
        head, tail = _HEADS[system]
        template = f"#!/bin/bash\n{head}{tail if scratch else ''}{_SCRATCH if scratch else _BODY}"
    _check(template, values)
    given = [folders] if isinstance(folders, str | os.PathLike) else folders
    paths = list(dict.fromkeys(str(folder.path.resolve()) for path in given for folder in find(path)))
    jobs = []
    for number, path in enumerate(paths):
        own: dict[str, str | None] = {"command": f"{COMMAND} {shlex.quote(path)} --jobs {cpus}"}
        own |= {"name": f"{name}_{number}"} if len(paths) > 1 else {}
        jobs.append(_filled(template, values | own))
    return jobs


def dask_script(
    system: str, *, name: str, time: str, cpus: int, memory: str, scratch: str | None = None
) -> str:
    """The script with which dask-jobqueue would start a worker of a cluster; nothing is submitted.

    Args:
        system: "pbs" or "slurm".
        name: of the jobs.
        time: limit, "hours:minutes:seconds".
        cpus: of a job; each runs one process for one run, >= 1.
        memory: of a job, such as "4gb".
        scratch: folder on the node for temporary files; None: the default of dask.

    Returns:
        The script.

    Raises:
        ImportError: dask-jobqueue is not installed.
        ValueError: an option out of its range.
    """
    _values(system, name, time, cpus, memory, None)
    try:
        dask_jobqueue = importlib.import_module("dask_jobqueue")
    except ImportError as error:
        raise ImportError(
            "dask_script needs dask-jobqueue: pip install lightning-compress[cluster]."
        ) from error
    kind = {"pbs": dask_jobqueue.PBSCluster, "slurm": dask_jobqueue.SLURMCluster}[system]
    options = {
        "job_name": name,
        "walltime": time,
        "cores": cpus,
        "processes": cpus,
        "local_directory": scratch,
    }
    with kind(**options, memory=f"{_bytes(memory)[0]}{_bytes(memory)[1].upper()}B") as cluster:
        return str(cluster.job_script())


def _values(
    system: str, name: str, time: str, cpus: int, memory: str, scratch: str | None
) -> dict[str, str | None]:
    """What placeholders stand for, as the system writes it; None: not asked for."""
    if system not in _HEADS:
        raise ValueError(f"system={system!r} is unknown; allowed: {', '.join(_HEADS)}.")
    wrong = {
        "name (letters, digits, '_', '-' and '.')": not _NAME.fullmatch(name) and name,
        "time (hours:minutes:seconds)": not _TIME.fullmatch(time) and time,
        "cpus (>= 1)": cpus < 1 and cpus,
        "memory (such as 4gb)": not _BYTES.fullmatch(memory) and memory,
        "scratch (such as 10gb)": scratch is not None and not _BYTES.fullmatch(scratch) and scratch,
    }
    bad = [f"{option}: {value!r}" for option, value in wrong.items() if value is not False]
    if bad:
        raise ValueError(f"{'; '.join(bad)} is not allowed.")

    def size(text: str) -> str:
        number, unit = _bytes(text)
        return f"{number}{unit}b" if system == "pbs" else f"{number}{unit.upper()}"

    sizes = {"mem": size(memory), "scratch": size(scratch) if scratch else None}
    return {"name": name, "time": time, "cpus": str(cpus), **sizes, "command": ""}


def _bytes(text: str) -> tuple[str, str]:
    found = _BYTES.fullmatch(text)
    assert found is not None  # checked by _values
    return found[1], found[2].lower()


def _check(template: str, values: dict[str, str | None]) -> None:
    """ValueError if something asked for would not be in the script, or something in it was not asked for."""
    used = set(_PLACE.findall(template))
    unknown = sorted(used - set(values))
    unasked = sorted(name for name in used & set(values) if values[name] is None)
    lacking = [name for name, value in values.items() if value is not None and name not in used]
    wrong = [f"{{{name}}} is unknown" for name in unknown]
    wrong += [f"{{{name}}} has no value" for name in unasked] + [f"{{{name}}} is missing" for name in lacking]
    if wrong:
        needed = " ".join(f"{{{name}}}" for name, value in values.items() if value is not None)
        raise ValueError(f"template: {'; '.join(wrong)}; needed are {needed}.")


def _filled(template: str, values: dict[str, str | None]) -> str:
    return _PLACE.sub(lambda match: str(values[match[1]]), template)
