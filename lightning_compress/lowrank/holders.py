"""Weights of spectral convolutions held as factors: neuraloperator's own layer slices and contracts them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.functional.tensors import along
from lightning_compress.targets import Axes


class Part(NamedTuple):
    """Some modes of a weight, as a spectral convolution takes them for one input size.

    Args:
        shape: of the dense weight it stands for.
        factors: by parameter name.
    """

    shape: tuple[int, ...]
    factors: dict[str, Tensor]


class FactoredWeight(nn.Module, ABC):
    """A complex weight [in, out, *modes] (separable: [channels, *modes]) as factors, which are its Parameters.

    ``layer.weight`` of a ``SpectralConv`` may be such a module; ``layer._contract`` is then ``contract_channels`` or
    ``contract_modes``.

    Args:
        shape: of the dense weight.
        factors: complex tensors by name.

    Attributes:
        modes_in: name of the factor that has the mode axes, as its last ones.
    """

    modes_in: ClassVar[str]

    def __init__(self, shape: Sequence[int], **factors: Tensor) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        for name, factor in factors.items():
            self.register_parameter(
                name, factor if isinstance(factor, nn.Parameter) else nn.Parameter(factor)
            )

    @property
    @abstractmethod
    def axes(self) -> dict[str, Axes]:
        """Output and input axis of every factor."""

    @abstractmethod
    def to_tensor(self) -> Tensor:
        """The dense weight, with gradients to the factors."""

    @abstractmethod
    def order(self) -> int:
        """Number of mode axes."""

    def __getitem__(self, index: tuple[slice, ...]) -> Part:
        """The weight at some of its modes.

        Args:
            index: one slice per axis of the dense weight; those of channels are whole.

        Returns:
            Views of the factors.
        """
        factors: dict[str, Any] = dict(self._parameters)
        modes = index[-self.order() :]
        factors[self.modes_in] = factors[self.modes_in][(..., *modes)]
        sizes = factors[self.modes_in].shape[-len(modes) :]
        return Part((*self.shape[: -len(modes)], *sizes), factors)

    def truncated(self, box: Sequence[slice]) -> FactoredWeight:
        """The weight with some of its modes only.

        Args:
            box: one slice per mode axis.

        Returns:
            A holder of the same kind; Parameters of which nothing is lost stay the same objects.
        """
        part = self[(slice(None), *box)]
        factors: dict[str, Any] = dict(self._parameters)
        held = factors[self.modes_in]
        if part.shape != tuple(self.shape):
            kept = part.factors[self.modes_in].detach().clone()
            factors[self.modes_in] = nn.Parameter(kept, requires_grad=held.requires_grad)
        return type(self)(part.shape, **factors).train(self.training)

    def extra_repr(self) -> str:
        """Shapes of the weight and its factors."""
        sizes = ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters())
        return f"shape={tuple(self.shape)}, {sizes}"


class ChannelFactors(FactoredWeight):
    """``W[i, o, m] = sum V[i, a] G[a, b, m] U[b, o]``, V stored once for all modes; without V or U: that axis is whole.

    Its factors are ``core`` G, and ``input`` V, ``output`` U or both.

    Examples:
        >>> held = ChannelFactors((8, 6, 4, 3), input=torch.randn(8, 2) + 0j, core=torch.randn(2, 6, 4, 3) + 0j)
        >>> held.to_tensor().shape, held[:, :, 1:3, :2].shape
        (torch.Size([8, 6, 4, 3]), (8, 6, 2, 2))
    """

    modes_in = "core"

    @property
    def axes(self) -> dict[str, Axes]:
        """Inputs first, outputs second, in every factor."""
        return {name: Axes(1, 0) for name in self._parameters}

    def to_tensor(self) -> Tensor:
        """``sum V[i, a] G[a, b, m] U[b, o]``."""
        factors: dict[str, Any] = dict(self._parameters)
        made: Tensor = factors["core"]
        if "input" in factors:
            made = along(made, factors["input"], 0)
        return along(made, factors["output"].mT, 1) if "output" in factors else made

    def order(self) -> int:
        """Number of mode axes."""
        return len(self.shape) - 2


class ModeFactors(FactoredWeight):
    """``W[i, o, m] = sum A[i, o, r] B[r, m]``: every pair of channels combines r patterns of modes.

    Its factors are ``coefficients`` A ([channels, r] if separable) and ``modes`` B.

    Examples:
        >>> held = ModeFactors((8, 6, 4, 3), coefficients=torch.ones(8, 6, 2) + 0j, modes=torch.ones(2, 4, 3) + 0j)
        >>> held.to_tensor()[0, 0, 0, 0]
        tensor(2.+0.j, grad_fn=<SelectBackward0>)
    """

    modes_in = "modes"

    @property
    def axes(self) -> dict[str, Axes]:
        """Coefficients as the weight itself; one output per pattern."""
        whole = Axes(1, 0) if self.get_parameter("coefficients").dim() == 3 else Axes(0, None)
        return {"coefficients": whole, "modes": Axes(0, None)}

    def to_tensor(self) -> Tensor:
        """``sum A[i, o, r] B[r, m]``."""
        made: Tensor = torch.tensordot(
            self.get_parameter("coefficients"), self.get_parameter("modes"), dims=1
        )
        return made

    def order(self) -> int:
        """Number of mode axes."""
        return self.get_parameter("modes").dim() - 1


def contract_channels(x: Tensor, weight: Part, separable: bool = False) -> Tensor:
    """Multiply Fourier coefficients by ``ChannelFactors``, one factor after the other; half precision in complex64.

    Args:
        x: [batch, in, *modes], complex.
        weight: the modes that meet them.
        separable: False; neuraloperator passes it.

    Returns:
        [batch, out, *modes].

    Examples:
        >>> weight = ChannelFactors((3, 2, 4), core=torch.ones(1, 2, 4) + 0j, input=torch.ones(3, 1) + 0j)
        >>> contract_channels(torch.ones(5, 3, 4) + 0j, weight[:, :, :]).detach()[0, 0]
        tensor([3.+0.j, 3.+0.j, 3.+0.j, 3.+0.j])
    """
    factors = weight.factors
    rows = _full(x).flatten(2).permute(2, 0, 1)  # [modes, batch, in]
    if "input" in factors:
        rows = rows @ factors["input"]
    rows = rows @ factors["core"].flatten(2).permute(2, 0, 1)
    if "output" in factors:
        rows = rows @ factors["output"]
    made = rows.permute(1, 2, 0).reshape(x.shape[0], weight.shape[1], *x.shape[2:])
    return made.to(x.dtype)


def contract_modes(x: Tensor, weight: Part, separable: bool = False) -> Tensor:
    """Multiply Fourier coefficients by ``ModeFactors``, whose product is formed once; half precision in complex64.

    Args:
        x: [batch, in, *modes], complex.
        weight: the modes that meet them.
        separable: whether every channel meets its own weight only.

    Returns:
        [batch, out, *modes].

    Examples:
        >>> weight = ModeFactors((3, 2, 4), coefficients=torch.ones(3, 2, 1) + 0j, modes=torch.ones(1, 4) + 0j)
        >>> contract_modes(torch.ones(5, 3, 4) + 0j, weight[:, :, :]).detach()[0, 0]
        tensor([3.+0.j, 3.+0.j, 3.+0.j, 3.+0.j])
    """
    coefficients, modes = weight.factors["coefficients"], weight.factors["modes"].flatten(1)
    dense = coefficients.flatten(0, -2) @ modes
    if separable:
        return (_full(x) * dense.reshape(weight.shape)).to(x.dtype)
    matrices = dense.reshape(*weight.shape[:2], math.prod(weight.shape[2:])).permute(2, 0, 1)
    rows = _full(x).flatten(2).permute(2, 0, 1) @ matrices
    return rows.permute(1, 2, 0).reshape(x.shape[0], weight.shape[1], *x.shape[2:]).to(x.dtype)


def _full(x: Tensor) -> Tensor:
    """Half precision has no matrix products."""
    return x.to(torch.complex64) if x.dtype == torch.complex32 else x
