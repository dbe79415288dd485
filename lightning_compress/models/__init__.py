"""Networks by name: small ones that torchvision does not have, and operators of neuraloperator.

Reading order: `resnet_cifar` (He 2016), `lenet` (LeCun 1998), `mlp`, `pinn` (Raissi 2019), `operators`.
Importing this folder imports torch only.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_compress.models.lenet import LeNet5
from lightning_compress.models.mlp import MLP
from lightning_compress.models.operators import codano, fno, tfno, uno
from lightning_compress.models.pinn import PINN
from lightning_compress.models.resnet_cifar import (
    ResNetCIFAR,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
    resnet110,
    resnet1202,
)

__all__ = [
    "MLP",
    "PINN",
    "LeNet5",
    "ResNetCIFAR",
    "build",
    "codano",
    "fno",
    "names",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet1202",
    "tfno",
    "uno",
]

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet5": LeNet5,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet1202": resnet1202,
    "mlp": MLP,
    "pinn": PINN,
    "fno": fno,
    "tfno": tfno,
    "uno": uno,
    "codano": codano,
}


def names() -> list[str]:
    """Names that `build` knows.

    Returns:
        The names, in order of size within a family.

    Examples:
        >>> names()[:2]
        ['lenet5', 'resnet20']
    """
    return list(_BUILDERS)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by name, with fresh weights from torch's global generator.

    Args:
        name: One of `names()`; case, spaces, dashes and underscores do not matter.
        **kwargs: Passed to the network's constructor, such as ``num_classes`` or ``shortcut``.

    Returns:
        The network, in training mode, on the default device.

    Raises:
        ValueError: If the name is unknown; the message lists the nearest names.

    Examples:
        >>> sum(p.numel() for p in build("ResNet-20", shortcut="projection").parameters())
        272474
    """
    key = "".join(c for c in name.lower() if c not in " -_")
    if key not in _BUILDERS:
        near = difflib.get_close_matches(key, _BUILDERS, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"unknown model {name!r}: {hint}Built-in names are {', '.join(_BUILDERS)}.")
    return _BUILDERS[key](**kwargs)
