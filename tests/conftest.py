"""What every test gets: one thread, fixed seeds, a working folder of its own and a quiet Lightning."""

import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Python processes that a test starts find the package and the recipes, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("reproducible")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked ``alone`` runs in a process of its own: one whose autograd has worked may not be forked."""
    if pyfuncitem.get_closest_marker("alone") is None or "ALONE" in os.environ:
        return None
    left = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            f"{pyfuncitem.path}::{pyfuncitem.name}",
        ],
        cwd=ROOT,
        env=left | {"ALONE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test writes by a relative path stays out of the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are imported as they are when run."""
    for folder in (ROOT / "recipes", ROOT / "recipes" / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
