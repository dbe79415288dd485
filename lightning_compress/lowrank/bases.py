"""Weights as a core and thin bases on some axes: the best ones for the weight, or for the outputs of inputs seen."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_compress.functional.channels import (
    damped,
    fitted_core,
    input_factor,
    output_basis,
    output_energy,
)
from lightning_compress.functional.factor import hosvd, rank_from_energy, tails
from lightning_compress.functional.tensors import along, energy, tucker, tucker_product
from lightning_compress.lowrank.operators import SpectralScheme
from lightning_compress.lowrank.schemes import Decomposition, Ranks, equal_shares
from lightning_compress.stats import Stats
from lightning_compress.targets import Target

_STEPS = 32  # on a path
_ROUNDS = 3  # of two factors in turn


class BasisScheme(SpectralScheme):
    """A scheme with thin bases on some axes of the weight, and a core.

    Attributes:
        real: bases are real; the weight is then arranged with its real and imaginary parts as a last axis.
    """

    real: ClassVar[bool] = False

    @abstractmethod
    def axes(self, layer: Any, order: int) -> tuple[int, ...]:
        """The axes that get a basis, of a weight with so many axes, once arranged."""

    @abstractmethod
    def named(self, shape: Sequence[int], core: Tensor, bases: dict[int, Tensor]) -> dict[str, Tensor]:
        """Names inside the new layer of core and bases [n, r] by axis, for a weight of this shape."""

    def arranged(self, layer: Any, weight: Tensor) -> Tensor:
        """The tensor that is decomposed."""
        return torch.view_as_real(weight.resolve_conj()) if self.real else weight

    def full(self, layer: Any, weight: Tensor) -> Ranks:
        """Per axis the smaller of its size and the product of the others."""
        shape = self.arranged(layer, torch.empty_like(weight, device="meta")).shape
        return tuple(min(shape[a], math.prod(shape) // shape[a]) for a in self.axes(layer, weight.dim()))

    def decompose(self, target: Target, seen: Stats | None, damping: float) -> Decomposition:
        """HOSVD improved by HOOI; for the outputs if the scheme can use a Gram matrix and there is one."""
        weight = target.weight.detach().cpu()
        if self.gram and seen is not None and seen.gram is not None:
            metric = mode_metric(seen.gram.cpu(), real=not target.module.complex_data)
            if bool(metric.any()):
                return _ForOutputs(self, target.module, weight, metric, damping)
        return _Bases(self, target.module, weight)


def mode_metric(gram: Tensor, real: bool) -> Tensor:
    """What an error in the weights of each mode does to the outputs in space: ``S_m = w_m sum conj(x_m) x_m^T``.

    Args:
        gram: ``sum x_m x_m^H`` [*modes, in, in].
        real: whether fields are real; then frequencies above 0 on the last axis stand for two, w = 2.

    Returns:
        [modes, in, in].
    """
    metric = gram.conj().resolve_conj()
    if real:
        weights = torch.full((metric.shape[-3], 1, 1), 2.0, dtype=torch.float64)
        weights[0] = 1
        metric = metric * weights
    return metric.flatten(0, -3)


class _Bases(Decomposition):
    """The best for the weight itself."""

    def __init__(self, scheme: BasisScheme, layer: Any, weight: Tensor) -> None:
        self.scheme, self.shape, self.dtype = scheme, weight.shape, weight.dtype
        self.axes = scheme.axes(layer, weight.dim())
        self.tensor = scheme.arranged(layer, weight.to(torch.complex128))
        self.start, values = hosvd(self.tensor, self.axes)
        self.lost = [tails(s) for s in values]
        self.full = tuple(len(s) for s in values)
        self.direct = len(self.axes) == 1  # one SVD has the answer for every rank
        self.cuts: dict[Ranks, tuple[Tensor, list[Tensor]]] = {}

    def error(self, ranks: Ranks) -> float:
        if self.direct:
            return float(self.lost[0][ranks[0]])
        total = energy(self.tensor)
        return (
            max(0.0, 1 - energy(self._cut(ranks)[0]) / total) if total else 0.0
        )  # the bases are orthonormal

    def at_energy(self, ratio: float) -> Ranks:
        share = 1 - (1 - ratio) / len(self.axes)
        return tuple(rank_from_energy(lost, share) for lost in self.lost)

    def tensors(self, ranks: Ranks) -> dict[str, Tensor]:
        core, bases = _even(*self._cut(ranks), self.axes)
        made = self.scheme.named(self.shape, self._complex(core), dict(zip(self.axes, bases, strict=True)))
        real = self.dtype.to_real()
        return {name: t.contiguous().to(self.dtype if t.is_complex() else real) for name, t in made.items()}

    def product(self, ranks: Ranks) -> Tensor:
        core, bases = self._cut(ranks)
        return self._complex(tucker_product(core, bases, self.axes)).reshape(self.shape)

    def path(self) -> list[Ranks]:
        """At most 32 steps where each takes iterations."""
        every = equal_shares(self.full)
        return every if self.direct else thinned(every)

    def _cut(self, ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
        """Core and bases of the arranged weight."""
        if ranks not in self.cuts:
            self.cuts = {ranks: self._solved(ranks)}  # the last one only: they are large
        return self.cuts[ranks]

    def _solved(self, ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
        return tucker(self.tensor, ranks, self.axes, start=self.start)

    def _complex(self, arranged: Tensor) -> Tensor:
        return torch.view_as_complex(arranged.contiguous()) if self.scheme.real else arranged


class _ForOutputs(_Bases):
    """The best for the outputs: principal directions on axis 1, then a factor on axis 0 with the core by least squares.

    With both, each is solved for again once the other is known.
    """

    def __init__(
        self, scheme: BasisScheme, layer: Any, weight: Tensor, metric: Tensor, damping: float
    ) -> None:
        super().__init__(scheme, layer, weight)
        self.direct = False
        self.weight = weight.to(torch.complex128).flatten(2).permute(2, 0, 1)  # [modes, in, out]
        self.metric, self.fit = metric, damped(metric, damping)
        self.total = output_energy(self.weight, metric)
        self.errors: dict[Ranks, float] = {}

    def error(self, ranks: Ranks) -> float:
        if ranks not in self.errors:
            left = self.weight - self.product(ranks).flatten(2).permute(2, 0, 1)
            self.errors[ranks] = output_energy(left, self.metric) / self.total if self.total else 0.0
        return self.errors[ranks]

    def at_energy(self, ratio: float) -> Ranks:
        if ratio >= 1:
            return self.full
        allowed = 1 - ratio + 1e-12
        if len(self.axes) == 1:
            return (smallest(1, self.full[0], lambda r: self.error((r,)) <= allowed),)
        outputs = smallest(
            1, self.full[1], lambda r: self.error((self.full[0], r)) <= (1 - ratio) / 2 + 1e-12
        )
        return smallest(1, self.full[0], lambda r: self.error((r, outputs)) <= allowed), outputs

    def _solved(self, ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
        asked = dict(zip(self.axes, ranks, strict=True))
        plain = dict(zip(self.axes, super()._solved(ranks)[1], strict=True))
        if 1 not in asked:
            basis, core = self._inputs(self.weight, asked[0], plain[0])
            return self._arranged(core), [basis]
        outputs = self._outputs(self.weight, asked[1])
        if 0 not in asked:
            return self._arranged(self._toward(outputs)), [outputs]
        found = [(u, *self._inputs(self._toward(u), asked[0], plain[0])) for u in (outputs, plain[1])]
        lost, (outputs, basis, core) = min(((self._lost(*f), f) for f in found), key=lambda entry: entry[0])
        for _ in range(_ROUNDS if ranks != self.full else 0):
            # Of what the factor on axis 0 lets through, the principal directions; then that factor for these.
            through = basis.to(self.weight.dtype) @ fitted_core(self.weight, basis, self.fit)
            outputs = self._outputs(through, asked[1])
            basis, core = self._inputs(self._toward(outputs), asked[0], basis)
            before, lost = lost, self._lost(outputs, basis, core)
            if before - lost <= 1e-3 * before:
                break
        return self._arranged(core), [basis, outputs]

    def _outputs(self, weight: Tensor, rank: int) -> Tensor:
        return output_basis(weight, self.fit, self.scheme.real)[0][:, :rank]

    def _inputs(self, weight: Tensor, rank: int, plain: Tensor) -> tuple[Tensor, Tensor]:
        return input_factor(weight, self.fit, rank, plain, self.scheme.real)

    def _toward(self, outputs: Tensor) -> Tensor:
        """The weight in the coordinates of some directions of the outputs."""
        return self.weight @ outputs.to(self.weight.dtype).conj()

    def _lost(self, outputs: Tensor, basis: Tensor, core: Tensor) -> float:
        product = basis.to(core.dtype) @ core @ outputs.to(core.dtype).mT
        return output_energy(self.weight - product, self.fit)

    def _arranged(self, core: Tensor) -> Tensor:
        """[modes, a, b] as the core of the arranged weight."""
        made = core.permute(1, 2, 0)
        made = made.reshape(*made.shape[:2], *self.shape[2:])
        return torch.view_as_real(made) if self.scheme.real else made


def smallest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The smallest rank in a range that is enough, by bisection; ``high`` if none is.

    Args:
        low: first rank.
        high: last rank.
        enough: whether a rank is; then so are all larger ones.

    Returns:
        The rank.

    Examples:
        >>> smallest(1, 10, lambda r: r * r >= 30)
        6
    """
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def thinned(path: list[Ranks]) -> list[Ranks]:
    """At most 32 steps of a path, evenly, with the last one: each takes a decomposition.

    Args:
        path: ranks in rising order.

    Returns:
        The path, or 32 of its steps.

    Examples:
        >>> thinned([(r,) for r in range(1, 65)])[:2]
        [(2,), (4,)]
    """
    if len(path) <= _STEPS:
        return path
    return [path[math.ceil(k * len(path) / _STEPS) - 1] for k in range(1, _STEPS + 1)]


def _even(core: Tensor, bases: Sequence[Tensor], axes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The same product with the scale spread over core and bases alike."""
    made = []
    for basis, axis in zip(bases, axes, strict=True):
        others = [a for a in range(core.dim()) if a != axis]
        scale = torch.linalg.vector_norm(core, dim=others) ** (1 / (len(axes) + 1))
        scale = scale.where(scale > 0, 1)
        made.append(basis * scale)
        core = along(core, torch.diag(1 / scale).to(core.dtype), axis)
    return core, made
