"""Quantizers: small modules that round a tensor to a grid; its scale is theirs and leaves no trace in a state dict."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lightning_compress.functional.affine import choose_qparams, fake_quantize, integer_range


class Quantizer(nn.Module):
    """Rounds a tensor to a grid.

    Its tensors move with the model, but are not part of any ``state_dict``: the keys of the user's model stay
    theirs, and plain checkpoints load. ``tensors`` and ``load`` carry them instead.

    Args:
        bits: 1 to 16.
    """

    auxiliary: ClassVar[bool] = True  # no part of the user's model

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def active(self) -> bool:
        """Whether values are rounded now, in eval mode; if not, they pass through."""
        return True

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The nearest values on the grid, with a gradient that training can use."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of ``tensors``, in place.

        Args:
            tensors: what ``tensors`` gave.

        Raises:
            ValueError: names or shapes differ.
        """
        own = self.tensors()
        given = {name: tuple(value.shape) for name, value in tensors.items()}
        if given != {name: tuple(value.shape) for name, value in own.items()}:
            raise ValueError(
                f"{type(self).__name__} holds { {n: tuple(v.shape) for n, v in own.items()} }, given is {given}."
            )
        for name, value in own.items():
            value.copy_(tensors[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model, but its tensors keep their dtype: a grid of half precision would miss its integers."""
        dtypes = {name: value.dtype for name, value in self.tensors().items()}
        before = {name: value.detach() for name, value in self.tensors().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in self.tensors().items():
            if value.dtype != dtypes[name]:
                value.data = before[name].to(value.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: see the class."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Nothing is missed."""


class TrainingQuantizer(Quantizer):
    """A quantizer whose grid training sets.

    Bits and flags are attributes, not tensors: nothing averages, casts or broadcasts them.

    Args:
        bits: 1 to 16.

    Attributes:
        enabled: whether it rounds; off, values pass through.
        initialized: whether its tensors were set from what it saw.
        learning: whether an observer still follows what it sees.
        signed: whether there are negative integers.
    """

    flags: ClassVar[tuple[str, ...]] = ("enabled", "initialized", "learning", "signed")

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.enabled, self.initialized, self.learning, self.signed = True, False, True, False

    @property
    def active(self) -> bool:
        """Whether values are rounded now, in eval mode."""
        return self.enabled and self.initialized

    def forget(self) -> None:
        """Wait for other values to start from."""
        self.initialized = False

    def set_bits(self, bits: int) -> None:
        """Another grid; what is learned of the range stays.

        Args:
            bits: 1 to 16 for weights, 2 to 16 for activations.
        """
        self.bits = bits

    def state(self) -> dict[str, Any]:
        """Tensors (copies on the CPU), bits and flags, enough for ``restore``."""
        tensors = {name: value.detach().cpu().clone() for name, value in self.tensors().items()}
        flags = {name: bool(getattr(self, name)) for name in self.flags}
        return {"tensors": tensors, "bits": self.bits, "flags": flags}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``.

        Args:
            state: what ``state`` gave.

        Raises:
            ValueError: tensors of other names or shapes.
        """
        self.set_bits(int(state["bits"]))
        self.load(state["tensors"])
        for name in self.flags:
            setattr(self, name, bool(state["flags"][name]))

    def extra_repr(self) -> str:
        """Bits and what it is at."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in ("bits", *self.flags))


class InputQuantizer(Quantizer):
    """Rounds activations to integers: with frozen scale (static), or with the range of every batch (dynamic).

    - static: ``s (clip(round(x / s) + z, qmin, qmax) - z)``
    - dynamic: the same, s and z from the smallest and largest value of x at every forward, unsigned asymmetric

    Args:
        bits: 2 to 16.
        scale: s; None for dynamic.
        zero_point: z.
        qmin: smallest integer; of the unsigned grid if None.
        qmax: largest integer.

    Examples:
        >>> static = InputQuantizer(8, scale=0.5)
        >>> static(torch.tensor([0.6, -3.0, 200.0])).tolist()
        [0.5, 0.0, 127.5]
        >>> InputQuantizer(8)(torch.tensor([-1.0, 2.0])).tolist()
        [-1.0, 2.0]
        >>> list(static.state_dict())
        []

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        bits: int,
        scale: float | None = None,
        zero_point: int = 0,
        qmin: int | None = None,
        qmax: int | None = None,
    ) -> None:
        super().__init__(bits)
        unsigned = integer_range(bits, signed=False)
        self.qmin = unsigned[0] if qmin is None else qmin
        self.qmax = unsigned[1] if qmax is None else qmax
        self.dynamic = scale is None
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale}: allowed is a finite scale > 0, or None for dynamic ranges.")
        if not self.qmin <= zero_point <= self.qmax:
            raise ValueError(f"zero_point={zero_point}: allowed is {self.qmin} to {self.qmax}.")
        self.register_buffer("scale", torch.tensor(1.0 if scale is None else scale), persistent=False)
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32), persistent=False)

    @property
    def signed(self) -> bool:
        """Whether there are negative integers."""
        return self.qmin < 0

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for an input.

        Args:
            x: the input; static quantizers do not look at it.

        Returns:
            Two tensors without axes.
        """
        if not self.dynamic:
            return self.scale.float(), self.zero_point
        lo, hi = x.detach().float().aminmax()
        return choose_qparams(lo, hi, self.qmin, self.qmax, symmetric=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape and dtype of x."""
        if x.is_complex():
            return torch.view_as_complex(self(torch.view_as_real(x)))
        scale, zero_point = self.qparams(x)
        return fake_quantize(x, scale, zero_point, self.qmin, self.qmax)

    def frozen(self) -> InputQuantizer:
        """Itself."""
        return self

    def config(self) -> dict[str, Any]:
        """What ``InputQuantizer(**config)`` needs to be equal, as JSON values."""
        return {
            "bits": self.bits,
            "scale": None if self.dynamic else float(self.scale),
            "zero_point": int(self.zero_point),
            "qmin": self.qmin,
            "qmax": self.qmax,
        }

    def extra_repr(self) -> str:
        """Bits, integers and scale."""
        how = (
            "dynamic" if self.dynamic else f"scale={float(self.scale):.3g}, zero_point={int(self.zero_point)}"
        )
        return f"bits={self.bits}, {self.qmin}..{self.qmax}, {how}"
