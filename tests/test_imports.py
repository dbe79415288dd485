"""Importing the library is cheap, and imports inside it point one way."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"lightning", "lightning_compress", "numpy", "torch", "torchmetrics", "tqdm"}

# Prints what the library's own modules import while `import lightning_compress` runs.
SPY = """
import builtins
original = builtins.__import__

def spy(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and (globals or {}).get("__name__", "").partition(".")[0] == "lightning_compress":
        print(name.partition(".")[0])
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = spy
import lightning_compress
"""


def run(script: str) -> set[str]:
    """Words that a fresh Python process prints."""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


def loaded_after(statement: str) -> set[str]:
    """Top-level packages in a fresh process after the statement."""
    return run(f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})")


def test_library_imports_only_what_it_always_needs() -> None:
    """torchvision, neuralop, onnx, matplotlib, ... and constriction are imported where they are used."""
    imported = run(SPY) - set(sys.stdlib_module_names)
    assert {"lightning_compress", "torch"} <= imported <= ALLOWED


def test_import_loads_nothing_beyond_lightning() -> None:
    """Also not through others; what `import lightning` itself loads is not ours to change."""
    loaded = loaded_after("import lightning_compress") - loaded_after("import lightning")
    assert loaded - set(sys.stdlib_module_names) == {"lightning_compress"}


def test_import_contracts_hold() -> None:
    """The contracts of pyproject.toml, run as the command line runs them."""
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or "lint-imports"
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
