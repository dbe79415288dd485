"""YAML as people mean it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file: ``1e-3`` is a number, and a key that comes twice is an error. No object is built.

    Args:
        path: the file.

    Returns:
        Mappings, lists, numbers and texts.

    Raises:
        ValueError: the file is no YAML, or has a key twice; names file and line.

    Examples:
        >>> import pathlib, tempfile
        >>> from lightning_compress.pipelines.files import read_yaml
        >>> path = pathlib.Path(tempfile.mkdtemp(), "small.yaml")
        >>> _ = path.write_text("{target_ratio: 1e-1}")
        >>> read_yaml(path)
        {'target_ratio': 0.1}
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                line = node.start_mark.line + 1
                raise ValueError(f"{path}: key {twice[0]!r} comes twice in the mapping of line {line}.")
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
