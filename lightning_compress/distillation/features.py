"""Pairs of layers: which axis of a feature holds the channels, the projections between them, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.distillation.losses import (
    attention_loss,
    contrastive_loss,
    feature_loss,
    relational_loss,
)
from lightning_compress.distillation.tensors import equal_size, pooled, wide
from lightning_compress.distillation.watching import layers_named

# What each loss compares: whole features, maps of positions, or one vector per sample.
FEATURE_LOSSES: dict[str, Callable[..., Tensor]] = {
    "feature": feature_loss,
    "attention": attention_loss,
    "relational": relational_loss,
    "contrastive": contrastive_loss,
}
PROJECTED = ("feature", "contrastive")  # these compare channels one by one


class Projection(nn.Module):
    """W f + b over the channels at every position: a 1×1 convolution, a linear layer, or one over tokens.

    It is its own type of layer, so methods that compress linear layers and convolutions do not take it for one of the
    student's.

    Args:
        in_channels: of the student's feature.
        out_channels: of the teacher's.
        generator: draws the start; PyTorch's own if None.

    Examples:
        >>> Projection(3, 5)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        bound = 1 / math.sqrt(in_channels)
        shape = (out_channels, in_channels)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, f: Tensor) -> Tensor:
        """Map (N, in_channels, …) to (N, out_channels, …)."""
        return F.linear(f.to(self.weight).movedim(1, -1), self.weight, self.bias).movedim(-1, 1)

    def extra_repr(self) -> str:
        """Show the channels."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class Projections(nn.ModuleDict):
    """Pairs of layers, the loss over them, and the projections that it needs, by number of the pair.

    A projection is made where the channels of a pair differ; loading a state dict also makes those that it has and this
    lacks.

    Args:
        names: the student's layer -> the teacher's.
        kind: key of ``FEATURE_LOSSES``.
        options: further ones of the loss.

    Examples:
        >>> student, teacher = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 5))
        >>> pairs = Projections({"0": "0"}, "feature", {})
        >>> pairs.prepare(student, {"0": torch.zeros(1, 3)}, {"0": torch.zeros(1, 5)})
        >>> pairs
        Projections(
          (0): Projection(3, 5)
        )
    """

    def __init__(self, names: Mapping[str, str], kind: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.names, self.kind, self.options = dict(names), kind, dict(options)

    @property
    def needed(self) -> bool:
        """Whether this loss needs projections where channels differ."""
        return bool(self.names) and self.kind in PROJECTED

    def layers(
        self, student: nn.Module, teacher: nn.Module
    ) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """The student's and the teacher's layers by name.

        Raises:
            ValueError: an unknown name.
        """
        return (
            layers_named(student, self.names, "student"),
            layers_named(teacher, dict.fromkeys(self.names.values()), "teacher"),
        )

    @torch.no_grad()
    def prepare(self, student: nn.Module, own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Make the projections for features of these sizes; their start is the same in every process.

        Args:
            student: whose layers they are.
            own: layer -> feature of the student.
            others: layer -> feature of the teacher.

        Raises:
            ValueError: features that cannot be matched.
        """
        generator = torch.Generator().manual_seed(0)
        for pair, (s, t) in enumerate(self._pairs(student, own, others).values()):
            if s.shape[1] != t.shape[1] and str(pair) not in self:
                self[str(pair)] = Projection(s.shape[1], t.shape[1], generator).to(s)
        self(student, own, others)  # what cannot be compared says so before training

    def forward(self, student: nn.Module, own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
        """The loss over all pairs, added up."""
        values = []
        for pair, (names, (s, t)) in enumerate(self._pairs(student, own, others).items()):
            if self.kind == "contrastive":
                s, t = pooled(s), pooled(t)
            if self.kind in PROJECTED:
                s, t = equal_size(s, t)  # before the projection, where it costs less
                s = self[str(pair)](s) if str(pair) in self else s
            sides: list[Any] = [s, t] if self.kind in ("relational", "contrastive") else [[s], [t]]
            try:
                values.append(FEATURE_LOSSES[self.kind](*sides, **self.options))
            except ValueError as error:
                raise ValueError(f"student layer {names[0]!r}, teacher layer {names[1]!r}: {error}") from None
        return torch.stack(values).sum()

    def _pairs(
        self, student: nn.Module, own: Mapping[str, Tensor], others: Mapping[str, Tensor]
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        layers = layers_named(student, self.names, "student")
        for whose, found, names in (("student", own, self.names), ("teacher", others, self.names.values())):
            silent = [name for name in names if name not in found]
            if silent:
                raise ValueError(
                    f"layers of the {whose} gave no tensor when it was called: {', '.join(silent)}. Name layers whose "
                    "forward runs."
                )
        return {(a, b): checked((a, b), layers[a], own[a], others[b]) for a, b in self.names.items()}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *others: Any) -> None:
        for pair in map(str, range(len(self.names))):
            weight = state_dict.get(f"{prefix}{pair}.weight")
            if weight is not None and pair not in self:
                self[pair] = Projection(weight.shape[1], weight.shape[0]).to(weight)
        super()._load_from_state_dict(state_dict, prefix, *others)


def channels_first(layer: nn.Module, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features as real (N, C, …).

    Tokens (N, L, C) and images with channels at the end are recognized by their sizes, and by whether the layer holds a
    convolution. Complex features become twice as many real ones.

    Args:
        layer: the student's layer.
        student: its output.
        teacher: of the teacher's layer.

    Returns:
        Both, with the channels on axis 1.

    Examples:
        >>> s, t = channels_first(nn.Linear(4, 4), torch.zeros(2, 7, 4), torch.zeros(2, 7, 6))
        >>> s.shape, t.shape
        (torch.Size([2, 4, 7]), torch.Size([2, 6, 7]))
    """
    if _channels_last(layer, student.shape, teacher.shape):
        student, teacher = student.movedim(-1, 1), teacher.movedim(-1, 1)
    if student.is_complex() or teacher.is_complex():
        student, teacher = (
            torch.cat([x.real, x.imag], 1) if x.is_complex() else x for x in (student, teacher)
        )
    return wide(student), wide(teacher)


def _channels_last(layer: nn.Module, own: Sequence[int], other: Sequence[int]) -> bool:
    if min(len(own), len(other)) < 3 or any("Conv" in type(m).__name__ for m in layer.modules()):
        return False
    positions_agree, channels_agree = own[1:-1] == other[1:-1], own[-1] == other[-1]
    # Where both agree nothing tells, and three axes are tokens more often than a sequence of channels.
    return positions_agree and (not channels_agree or len(own) == 3)


def checked(
    names: tuple[str, str], layer: nn.Module, student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """``channels_first`` of features that can be compared.

    Args:
        names: of the student's and the teacher's layer, for errors.
        layer: the student's layer.
        student: its output.
        teacher: of the teacher's layer.

    Returns:
        Both, with the channels on axis 1.

    Raises:
        ValueError: they differ in the number of axes or samples.

    Examples:
        >>> f = torch.zeros(2, 3)
        >>> checked(("a", "b"), nn.ReLU(), f, f)[0].shape
        torch.Size([2, 3])
    """
    if student.ndim != teacher.ndim or student.ndim < 2 or len(student) != len(teacher):
        raise ValueError(
            f"student layer {names[0]!r} gives {tuple(student.shape)} and teacher layer {names[1]!r} "
            f"{tuple(teacher.shape)}: these cannot be matched. Both need the same number of axes, two or more, and of "
            "samples; choose layers of the same kind."
        )
    return channels_first(layer, student, teacher)
