"""What every tensor operation does to the labels of channels.

A rule gets the watcher, the arguments by their names, and the result. Operations on each entry by itself need none of
their own: PyTorch tags them.
"""

from __future__ import annotations

from typing import Any

import torch

from lightning_compress.channels import parts, products, shapes  # noqa: F401  (they register their rules)
from lightning_compress.channels.entries import entrywise
from lightning_compress.channels.registry import RULES, Rule


def rule_of(operation: Any) -> Rule | None:
    """The rule of an operation of PyTorch, or None.

    Args:
        operation: what ``__torch_dispatch__`` gets.

    Returns:
        The rule.
    """
    name = operation._schema.name.removeprefix("aten::")
    plain = name.removesuffix("_") if not name.endswith("__") else name
    if plain in RULES:
        return RULES[plain]
    return entrywise if torch.Tag.pointwise in operation.tags else None
