"""Which known numbers the weights of a layer are computed from."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_compress.cgp.gates.functions import Int8
from lightning_compress.cgp.search.problem import Ints, Problem

_ALLOWED = '"layer:NAME", "core:SIZE", "ring:SIZE", "constants", "frequent:COUNT" or "first:COUNT"'


@dataclass(frozen=True, eq=False)
class Selection:
    """Inputs, and the weights that are computed.

    Args:
        inputs: int8 [inputs].
        positions: int64 [weights], places in the flattened weight.
        loaded: inputs that are read from memory: all, or none of constants.
    """

    inputs: Int8
    positions: Ints
    loaded: int

    def problem(self, weights: Int8, *, multiplex: bool = True) -> Problem:
        """The problem of computing these weights.

        Args:
            weights: int8, any shape.
            multiplex: see ``Problem.of``.

        Returns:
            The problem.
        """
        wanted = weights.reshape(-1)[self.positions]
        return Problem.of([self.inputs], [wanted], multiplex=multiplex, loaded=self.loaded)


@dataclass(frozen=True)
class Choice:
    """Which known numbers the weights of a layer are computed from.

    Args:
        kind: "layer" (the weights of another layer), "core" (the centre of every kernel; its outer ring is computed),
            "ring" (the other way round), "constants" (nothing but 0 and the constant gates), "frequent" (the most
            frequent values) or "first" (the first weights in storage order).
        layer: of "layer", its name.
        size: of "core" and "ring" the side of the centre; of "frequent" and "first" how many.

    Examples:
        >>> from lightning_compress.cgp.layers.choices import Choice
        >>> Choice.parse("core:3"), Choice.parse("layer:conv1").layer
        (Choice(kind='core', layer='', size=3), 'conv1')
    """

    kind: str
    layer: str = ""
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read a choice.

        Args:
            text: "layer:NAME", "core:SIZE", "ring:SIZE", "constants", "frequent:COUNT" or "first:COUNT".

        Returns:
            The choice.

        Raises:
            ValueError: something else.
        """
        if text == "constants":
            return cls(text)
        kind, _, value = text.partition(":")
        if kind == "layer" and value:
            return cls(kind, layer=value)
        if kind in ("core", "ring", "frequent", "first") and re.fullmatch(r"[1-9][0-9]{0,8}", value):
            return cls(kind, size=int(value))
        raise ValueError(f"inputs={text!r}: allowed are {_ALLOWED}, with whole numbers >= 1.")

    def select(self, name: str, weights: Int8, source: Int8 | None = None) -> Selection:
        """Inputs and computed weights of one layer.

        Args:
            name: of the layer, for errors.
            weights: int8, shape of the weight.
            source: of "layer", the weights of that layer.

        Returns:
            The selection.

        Raises:
            ValueError: the weight is too small for it or has no kernels; names the layer and its sizes.

        Examples:
            >>> from lightning_compress.cgp.layers.choices import Choice
            >>> kernel = np.arange(9, dtype=np.int8).reshape(1, 1, 3, 3)
            >>> chosen = Choice("core", size=1).select("conv", kernel)
            >>> chosen.inputs.tolist(), chosen.positions.tolist()
            ([4], [0, 1, 2, 3, 5, 6, 7, 8])
        """
        flat = weights.reshape(-1)
        everything = np.arange(len(flat))
        if self.kind == "layer":
            if source is None:
                raise ValueError(f"inputs of {name} are the weights of {self.layer!r}, which are not given.")
            return Selection(source.reshape(-1), everything, source.size)
        if self.kind == "constants":
            return Selection(np.zeros(1, dtype=np.int8), everything, 0)
        if self.kind == "frequent":
            values, counts = np.unique(flat, return_counts=True)
            most = values[np.argsort(-counts, kind="stable")[: self.size]]
            return Selection(most, everything, len(most))
        if self.kind == "first":
            if self.size >= len(flat):
                raise ValueError(
                    f"inputs=first:{self.size}, but {name} has {len(flat)} weights: take fewer, so that some are left "
                    "to compute."
                )
            return Selection(flat[: self.size], everything, self.size)
        inner = centre(name, weights.shape, self.size).reshape(-1)
        taken = inner if self.kind == "core" else ~inner
        return Selection(flat[taken], np.flatnonzero(~taken), int(taken.sum()))


def centre(name: str, shape: tuple[int, ...], size: int) -> npt.NDArray[np.bool_]:
    """The weights in the middle of every kernel.

    Args:
        name: of the layer, for errors.
        shape: of its weight: two axes of channels, then those of the kernel.
        size: side of the middle.

    Returns:
        Bool in this shape.

    Raises:
        ValueError: there are no kernels, they are not larger than the middle, or it has no middle of that size.
    """
    kernel = shape[2:]
    if not kernel:
        raise ValueError(f"{name} of shape {tuple(shape)} has no kernels: take a convolution.")
    if any(size >= extent or (extent - size) % 2 for extent in kernel):
        sides = " x ".join(map(str, kernel))
        allowed = [k for k in range(1, min(kernel)) if all((extent - k) % 2 == 0 for extent in kernel)]
        raise ValueError(
            f"a core of side {size} does not fit in the middle of the {sides} kernels of {name}; allowed: "
            f"{', '.join(map(str, allowed)) or 'none'}."
        )
    mask = np.ones(shape, dtype=np.bool_)
    for axis, extent in enumerate(kernel, 2):
        inside = np.abs(2 * np.arange(extent) + 1 - extent) < size
        mask &= inside.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return mask
