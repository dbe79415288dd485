"""What the documentation shows runs: code blocks page by page, docstring examples module by module."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_compress as lc

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "lightning_compress"
FENCE = re.compile(r"^([ \t]*)```([^\n`]*)\n(.*?)^\1```[ \t]*$", re.MULTILINE | re.DOTALL)
# First line of a block that readers see and the tests leave out; the reason is part of it.
NOT_RUN = re.compile(r"# not run: \S.+")


def blocks(text: str) -> list[tuple[int, str]]:
    """(line, code) of each fenced Python block that is to be run."""
    found = []
    for match in FENCE.finditer(text):
        indent, info, code = match.groups()
        language = re.split(r"[\s{,]", info.strip(" {.}"), maxsplit=1)[0].lower()
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        if language in {"python", "py", "python3"} and not NOT_RUN.match(code):
            found.append((text.count("\n", 0, match.start(3)) + 1, code))
    return found


def pages() -> list[str]:
    """README and every docs page with a block to run."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [f.relative_to(ROOT).as_posix() for f in files if blocks(f.read_text(encoding="utf-8"))]


def modules() -> list[str]:
    """Library modules whose docstrings hold examples."""
    files = sorted(f for f in LIBRARY.rglob("*.py") if ">>>" in f.read_text(encoding="utf-8"))
    dotted = (".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files)
    return [name.removesuffix(".__init__") for name in dotted]


@pytest.mark.parametrize("page", pages())
def test_code_blocks_run(page: str) -> None:
    """The blocks of one page run in order, in one namespace, in an empty folder."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks((ROOT / page).read_text(encoding="utf-8")):
        # Blank lines in front let a traceback show the page's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), namespace)


@pytest.mark.parametrize("module", modules())
def test_docstring_examples_run(module: str) -> None:
    """Examples may use torch, nn, lc and the public names without importing them."""
    tested = importlib.import_module(module)
    names = {**vars(lc), "lc": lc, "torch": torch, "nn": nn, **vars(tested)}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(tested, globs=names, optionflags=flags)
    assert result.attempted > 0, f"{module} holds >>> that doctest does not see: outside a docstring?"
    assert result.failed == 0, "the captured output shows which"


def test_readme_map_is_complete() -> None:
    """README links every module and folder of the library, and its relative links lead somewhere."""
    links = set(re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {link for link in links if not (ROOT / link).exists()} == set()
    entries = {f.relative_to(ROOT).as_posix() for f in LIBRARY.iterdir() if not f.name.startswith("_")}
    assert entries - {link.rstrip("/") for link in links} == set()


def test_api_page_shows_functions_named_like_their_module() -> None:
    """For these the page generator shows the module instead, that is nothing, unless they are listed."""
    hidden = {n for n in lc.__all__ if f"lightning_compress.{n}" in sys.modules and callable(getattr(lc, n))}
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert hidden
    assert {name for name in hidden if f"::: lightning_compress.{name}.{name}\n" not in page} == set()


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n\n```bash\ny\n```\n- item\n\n  ```py\n  z = 2\n  ```\n"
    assert blocks(text) == [(3, "x = 1\n"), (12, "z = 2\n")]


def test_only_a_stated_reason_leaves_a_block_out() -> None:
    assert blocks("```python\n# not run: needs a GPU\nx = 1\n```\n") == []
    assert blocks("```python\n# not run:\nx = 1\n```\n") == [(2, "# not run:\nx = 1\n")]
