"""How one weight stays what its code says while an optimizer moves it: zeros, shared values, grids."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_compress.codes import Code, Mask
from lightning_compress.functional.groups import like, real
from lightning_compress.functional.masks import apply_mask_, pack_bits, unpack_bits
from lightning_compress.functional.ties import Ties
from lightning_compress.quantization.codes import GridCode
from lightning_compress.sharing.codes import SharedCode

_FAR = 1e30  # beyond any weight: where it is projected to is the end of a grid


class Keeper(ABC):
    """Holds one weight in the set that its code describes. It keeps no reference to the weight.

    Args:
        code: that the weight has at the start.
        weight: the weight at the start; it matches the code.
    """

    def __init__(self, code: Code, weight: Tensor) -> None:
        self.code = code

    @abstractmethod
    def gradient(self, gradient: Tensor) -> Tensor:
        """What the optimizer is to see in place of the gradient."""

    @abstractmethod
    def held(self, weight: Tensor) -> Tensor:
        """The weight of the set that stands for any weight."""

    def stepped(self, weight: Tensor) -> Tensor:
        """The weight of the set after an optimizer has moved it."""
        return self.held(weight)

    def finished(self, weight: Tensor) -> tuple[Tensor, Code]:
        """The weight as it can be stored, and its code, when training is over."""
        return self.held(weight), self.code

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What ``restored`` needs: tensors, numbers and text."""


class MaskKeeper(Keeper):
    """Zeros stay; everything else is free."""

    def __init__(self, code: Mask, weight: Tensor) -> None:
        super().__init__(code, weight)
        self.mask = code.mask.to(weight.device)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Zero where the weight is."""
        return self.held(gradient)

    def held(self, weight: Tensor) -> Tensor:
        """The weight with its zeros."""
        result = weight.detach().clone()
        apply_mask_(result, self.mask)
        return result

    def state(self) -> dict[str, Any]:
        """The mask, eight entries a byte."""
        return {"kind": Mask.kind, "mask": pack_bits(self.mask), "shape": list(self.mask.shape)}


class SharedKeeper(Keeper):
    """Entries that share a value move together; which of them share one stays.

    Args:
        code: says which.
        weight: at the start.
        mode: "mean" or "sum": what of the members' gradients each of them gets.
    """

    def __init__(self, code: SharedCode, weight: Tensor, mode: str) -> None:
        super().__init__(code, weight)
        self.mode, self.shared = mode, code
        self.arrays, self.dtype = code.arrays(weight), weight.dtype
        self.ties = Ties(*code.tied(weight))

    def gradient(self, gradient: Tensor) -> Tensor:
        """The same for all that share a value."""
        reduce = self.ties.mean if self.mode == "mean" else self.ties.sum
        return like(reduce(real(gradient)), gradient.dtype)

    def held(self, weight: Tensor) -> Tensor:
        """The mean of those that share a value."""
        return like(self.ties.mean(real(weight)), weight.dtype)

    def finished(self, weight: Tensor) -> tuple[Tensor, Code]:
        """The values as they are now, in the precision of the code."""
        return self.shared.refreshed(self.held(weight))

    def state(self) -> dict[str, Any]:
        """The weight at the start through its code: from it follows who shares a value."""
        return {
            "kind": self.code.kind,
            "config": json.dumps(self.code.config()),
            "arrays": self.arrays,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class GridKeeper(Keeper):
    """The weight is on its grid; what steps add up to is kept beside it and decides where on the grid it is.

    Args:
        code: the grid; its scales stay.
        weight: at the start.
        hold_zeros: entries that are 0 stay 0.
    """

    def __init__(self, code: GridCode, weight: Tensor, hold_zeros: bool) -> None:
        super().__init__(code, weight)
        self.grid, self.dtype = code, weight.dtype
        # Steps are smaller than half-precision numbers can hold beside a weight.
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        self.latent, self.shown = wide.clone(), weight.detach().clone()
        ends = torch.full_like(real(wide), _FAR)
        self.low, self.high = (real(code.project(like(sign * ends, wide.dtype))) for sign in (-1, 1))
        self.mask = real(weight.detach()) != 0 if hold_zeros else None

    def gradient(self, gradient: Tensor) -> Tensor:
        """Zero where the weight stays zero."""
        result = gradient.detach().clone()
        if self.mask is not None:
            apply_mask_(real(result), self.mask)
        return result

    def held(self, weight: Tensor) -> Tensor:
        """The nearest values on the grid."""
        result = self.grid.project(weight.detach())
        if self.mask is not None:
            apply_mask_(real(result), self.mask)
        return result

    def stepped(self, weight: Tensor) -> Tensor:
        """Where the sum of all steps is nearest to, no farther than the ends of the grid."""
        self.latent += weight.detach().to(self.latent.dtype) - self.shown.to(self.latent.dtype)
        real(self.latent).clamp_(self.low, self.high)
        self.shown = self.held(self.latent).to(self.dtype)
        return self.shown

    def state(self) -> dict[str, Any]:
        """The grid, the sum of the steps, and which entries stay zero."""
        tensors = {name: t for name, t in vars(self.code).items() if isinstance(t, Tensor)}
        held = None if self.mask is None else pack_bits(self.mask)
        return {
            "kind": self.code.kind,
            "config": json.dumps(self.code.config()),
            "arrays": tensors,
            "dtype": str(self.dtype).removeprefix("torch."),
            "latent": self.latent.cpu().clone(),
            "mask": held,
        }


def keeper(code: Code, weight: Tensor, mode: str, hold_zeros: bool) -> Keeper | None:
    """What keeps a weight in the set of its code.

    Args:
        code: of the weight.
        weight: matches the code.
        mode: of shared values.
        hold_zeros: of grids.

    Returns:
        The keeper; None for codes of other kinds.
    """
    if isinstance(code, Mask):
        return MaskKeeper(code, weight)
    if isinstance(code, SharedCode):
        return SharedKeeper(code, weight, mode)
    return GridKeeper(code, weight, hold_zeros) if isinstance(code, GridCode) else None


def restored(state: Mapping[str, Any], weight: Tensor, mode: str, hold_zeros: bool) -> Keeper:
    """The keeper that a state was taken from.

    Args:
        state: what ``Keeper.state`` returned.
        weight: the weight as it is now, for its shape and device.
        mode: of shared values.
        hold_zeros: of grids.

    Returns:
        The keeper.

    Raises:
        ValueError: the state is that of a weight of another shape.
    """
    if state["kind"] == Mask.kind:
        code: Code = Mask(unpack_bits(state["mask"], state["shape"]))
        start = weight.detach()
        shape: tuple[int, ...] = tuple(state["shape"])
    else:
        code = Code.registry[state["kind"]].restore(state["arrays"], json.loads(state["config"]))
        dtype = getattr(torch, state["dtype"])
        if isinstance(code, GridCode):  # its state holds more than its code
            start = code.project(state["latent"]).to(dtype)
        else:
            start = code.rebuild(state["arrays"], dtype)
        shape = tuple(start.shape)
    if shape != tuple(weight.shape):
        raise ValueError(f"was kept with shape {shape}, but has {tuple(weight.shape)} here")
    found = keeper(code, start.to(weight.device), mode, hold_zeros)
    assert found is not None
    if isinstance(found, GridKeeper):
        found.latent = state["latent"].to(weight.device)
        if state["mask"] is not None:
            found.mask = unpack_bits(state["mask"], real(start).shape).to(weight.device)
        found.shown = found.held(found.latent).to(found.dtype)
    return found
