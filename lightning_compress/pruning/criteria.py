"""Which weights matter: criteria give every element a score, higher = keep.

A criterion is a plain function ``f(target, stats) -> scores``. One that looks at activations or gradients
says so in its attribute ``needs`` (names of the fields of ``lightning_compress.stats.Stats``), and
gets them measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.names import resolve
from lightning_compress.stats import Stats
from lightning_compress.targets import Target

Criterion = Callable[[Target, Stats | None], Tensor]


def magnitude(target: Target, stats: Stats | None = None) -> Tensor:
    """Absolute value, the modulus for complex weights: ``s = |w|`` (Han 2015).

    Args:
        target: the weight.
        stats: not used.

    Returns:
        Real scores, shape of the weight.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> magnitude(find(layer)[0])
        tensor([[3., 4.]])
    """
    return target.weight.detach().abs().float()


def random(seed: int) -> Criterion:
    """Uniform noise, ``s ~ U(0, 1)``, from a private generator seeded by (seed, parameter name) for every layer.

    Args:
        seed: any integer.

    Returns:
        The criterion.

    Examples:
        >>> target = find(nn.Linear(4, 4))[0]
        >>> torch.equal(random(0)(target, None), random(0)(target, None))
        True
    """

    def scores(target: Target, stats: Stats | None) -> Tensor:
        digest = hashlib.blake2b(f"{seed}:{target.key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.rand(target.weight.shape, generator=generator, dtype=torch.float64).to(
            target.weight.device
        )

    return scores


def criterion(name: str | Criterion, seed: int) -> Criterion:
    """The criterion meant by a name, an import path or a function.

    Args:
        name: "magnitude", "random", ``"package.module.function"``, or a function of (target, stats).
        seed: for "random".

    Returns:
        The criterion.

    Raises:
        ValueError: unknown name.

    Examples:
        >>> criterion("magnitude", seed=0) is magnitude
        True
    """
    return resolve(name, {"magnitude": magnitude, "random": random(seed)}, "criterion")
