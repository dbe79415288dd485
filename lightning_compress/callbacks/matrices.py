"""The matrices whose singular values are penalized: a weight by itself, or the product of a pair of factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.factor import balanced
from lightning_compress.functional.singular import Spectrum
from lightning_compress.lowrank.factors import Factors
from lightning_compress.lowrank.matrices import MatrixScheme
from lightning_compress.targets import Target, parameter

Form = Callable[[Tensor], Tensor]


class View(ABC):
    """Parameters seen as one matrix per group; reads and writes follow what happens to them.

    Args:
        name: of the layer.
        parts: the parameters by full name.
    """

    def __init__(self, name: str, parts: Mapping[str, nn.Parameter]) -> None:
        self.name, self.parts = name, parts

    @abstractmethod
    def matrices(self) -> Tensor:
        """[g, m, n], without a graph."""

    @abstractmethod
    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its gradient, from that of the matrices."""

    @abstractmethod
    def write(self, found: Spectrum, sigma: Tensor) -> None:
        """Give the matrices other singular values, in place."""


class WeightView(View):
    """One weight.

    Args:
        name: of the layer.
        target: the weight.
        form: reorders it into [g, m, n].
    """

    def __init__(self, name: str, target: Target, form: Form) -> None:
        super().__init__(name, {target.key: target.weight})
        self.key, self.weight, self.form = target.key, target.weight, form

    def matrices(self) -> Tensor:
        """The weight in the order of its scheme."""
        return self.form(self.weight.detach())

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """The same numbers in the weight's order."""
        return {self.key: reordered(self.form, self.weight, gradient)}

    def write(self, found: Spectrum, sigma: Tensor) -> None:
        """``W = U diag(sigma) V^H``."""
        self.weight.copy_(reordered(self.form, self.weight, found.compose(sigma)))


class PairView(View):
    """The product ``A B`` of two factors, ``A [g, m, r]`` of the second layer and ``B [g, r, n]`` of the first.

    Args:
        name: of the pair.
        pair: the layers.
        scheme: what made them.
    """

    def __init__(self, name: str, pair: Factors, scheme: MatrixScheme) -> None:
        self.layers = [pair.get_submodule(child) for child in ("first", "second")]
        prefix = f"{name}." if name else ""
        keys = (f"{prefix}first.weight", f"{prefix}second.weight")
        super().__init__(name, {k: parameter(m, "weight") for k, m in zip(keys, self.layers, strict=True)})
        self.scheme = scheme

    def halves(self) -> tuple[Tensor, Tensor]:
        """A and B, without a graph."""
        return self._halves([p.detach() for p in self.parts.values()])

    def matrices(self) -> Tensor:
        """The product, in double precision, for its rank is to be seen."""
        a, b = self.halves()
        wide = torch.complex128 if a.is_complex() else torch.float64
        return a.to(wide) @ b.to(wide)

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """``dA = G B^H`` and ``dB = A^H G``."""
        a, b = (half.to(gradient.dtype) for half in self.halves())
        return self.to_parts(gradient @ b.mH, a.mH @ gradient)

    def to_parts(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Values in the order of A and B, in the order of the parameters."""
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self.parts.values()]
            halves = self._halves(leaves)
            values = [v.to(h.dtype) for v, h in zip((a, b), halves, strict=True)]
            found = torch.autograd.grad(halves, leaves, values)
        return dict(zip(self.parts, found, strict=True))

    def write(self, found: Spectrum, sigma: Tensor) -> None:
        """Balanced factors of the new product, zeros beyond its rank."""
        rank = self.halves()[0].shape[-1]
        for key, value in self.to_parts(*balanced(found.left, sigma, found.right, rank)).items():
            self.parts[key].copy_(value)

    def _halves(self, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        first, second = (_With(m, w) for m, w in zip(self.layers, weights, strict=True))
        return self.scheme.halves(first, second)


def reordered(form: Form, weight: Tensor, values: Tensor) -> Tensor:
    """Values in the order of the matrices, in the order of the weight.

    Args:
        form: reorders entries and does nothing else, so that its adjoint is its inverse.
        weight: what it is given.
        values: of the shape that it returns.

    Returns:
        The values in the shape and dtype of the weight.

    Examples:
        >>> reordered(lambda w: w.mT, torch.zeros(1, 2), torch.tensor([[1.0], [2.0]]))
        tensor([[1., 2.]])
    """
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        made = form(leaf)
        (found,) = torch.autograd.grad(made, leaf, values.to(made.dtype))
    return found


class _With:
    """A layer with another weight, as far as a scheme looks; quantized layers would show it a rounded one."""

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self.layer, self.weight = layer, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)
