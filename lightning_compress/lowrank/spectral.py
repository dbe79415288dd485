"""Schemes of spectral convolutions that stay neuraloperator's own layer: complex channel factors, patterns of modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress.lowrank.bases import BasisScheme
from lightning_compress.lowrank.holders import (
    ChannelFactors,
    FactoredWeight,
    ModeFactors,
    contract_channels,
    contract_modes,
)
from lightning_compress.lowrank.real_channels import REAL_CHANNEL_SCHEMES
from lightning_compress.lowrank.schemes import Ranks, Scheme
from lightning_compress.lowrank.tensorized import TENSOR_SCHEMES
from lightning_compress.spectral import dense_weight, set_weight


class _Held(BasisScheme):
    """The weight becomes a holder of its factors; forward, bias and modes of the layer stay."""

    holder: ClassVar[type[FactoredWeight]]
    contract: ClassVar[Callable[..., Tensor]]

    def build(self, layer: Any, param: str, ranks: Ranks) -> nn.Module:
        weight = dense_weight(layer)
        shapes = self.shapes(layer, weight.shape, ranks)
        zeros = {name: torch.zeros(s, dtype=weight.dtype, device=weight.device) for name, s in shapes.items()}
        held = self.holder(weight.shape, **zeros)
        set_weight(layer, held.requires_grad_(weight.requires_grad), type(self).contract)
        layer.factorization, layer.rank = self.name, ranks if len(ranks) > 1 else ranks[0]
        built: nn.Module = layer
        return built


class _ChannelIn(_Held):
    """``W[i, o, m] = sum V[i, r] G[r, o, m]``."""

    name = "channel_in"
    separable = False
    holder = ChannelFactors
    contract = staticmethod(contract_channels)

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return (0,)

    def named(self, shape: Sequence[int], core: Tensor, bases: dict[int, Tensor]) -> dict[str, Tensor]:
        made = {"weight.core": core}
        if 0 in bases:
            made["weight.input"] = bases[0]
        if 1 in bases:
            made["weight.output"] = bases[1].mT
        return made

    def shapes(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> dict[str, tuple[int, ...]]:
        inner = dict(zip(self.axes(layer, len(shape)), ranks, strict=True))
        a, b = inner.get(0, shape[0]), inner.get(1, shape[1])
        made: dict[str, tuple[int, ...]] = {"core": (a, b, *shape[2:])}
        if 0 in inner:
            made["input"] = (shape[0], a)
        if 1 in inner:
            made["output"] = (b, shape[1])
        return made

    def multiplications(self, layer: Any, shape: Sequence[int], ranks: Ranks, batch: int) -> int:
        modes = math.prod(shape[2:])
        every = self.shapes(layer, shape, ranks)
        per_mode = sum(math.prod(s) for name, s in every.items() if name != "core") + math.prod(
            every["core"][:2]
        )
        return batch * modes * per_mode


class _ChannelOut(_ChannelIn):
    """``W[i, o, m] = sum G[i, r, m] U[r, o]``."""

    name = "channel_out"

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return (1,)


class _Channel(_ChannelIn):
    """``W[i, o, m] = sum V[i, a] G[a, b, m] U[b, o]``."""

    name = "channel"

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return (0, 1)


class _Modes(_Held):
    """``W[i, o, m] = sum A[i, o, r] B[r, m]``."""

    name = "modes"
    gram = False
    holder = ModeFactors
    contract = staticmethod(contract_modes)

    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        return (0,)

    def arranged(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.flatten(0, _channel_axes(layer) - 1)

    def named(self, shape: Sequence[int], core: Tensor, bases: dict[int, Tensor]) -> dict[str, Tensor]:
        channels = shape[: len(shape) + 1 - core.dim()]
        return {"weight.coefficients": bases[0].reshape(*channels, -1), "weight.modes": core}

    def shapes(self, layer: Any, shape: Sequence[int], ranks: Ranks) -> dict[str, tuple[int, ...]]:
        first = _channel_axes(layer)
        return {"coefficients": (*shape[:first], ranks[0]), "modes": (ranks[0], *shape[first:])}

    def multiplications(self, layer: Any, shape: Sequence[int], ranks: Ranks, batch: int) -> int:
        return math.prod(shape) * (ranks[0] + batch)


def _channel_axes(layer: Any) -> int:
    return 1 if layer.separable else 2


SPECTRAL_SCHEMES: tuple[Scheme, ...] = (_ChannelIn(), _ChannelOut(), _Channel(), _Modes(), *TENSOR_SCHEMES)
REAL_SPECTRAL_SCHEMES: tuple[Scheme, ...] = REAL_CHANNEL_SCHEMES
