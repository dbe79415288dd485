"""What is known of channels while a model runs: the labels of tensors, and numbers of modules that count them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.channels.attention import numbers
from lightning_compress.channels.labels import Ids, Labels
from lightning_compress.names import clean
from lightning_compress.stats.running import first_tensor

AxisLabels = tuple[Ids | None, ...]
_HEADS = re.compile(r"(num|n)?_?(attention|attn)?_?heads?$|nhead$", re.IGNORECASE)
_FEATURES = re.compile(r"(attention_)?head_(dim|size)$|d_?(im_)?(per_)?head$|d_kv$", re.IGNORECASE)
# Numbers that may equal a number of channels without being one.
_OTHER = re.compile(
    r"step|layer|depth|kernel|stride|dilat|len|iter|level|seed|epoch|time|i?d?x$|index|count|window|patch|image|"
    r"resolution|position|vocab|class|token|batch",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Attribute:
    """A number of a module that says how many channels there are.

    Args:
        module: name of the module.
        name: of the attribute.
        index: position in it, if it is a tuple.
        labels: the channels that it counts.
        sure: False for one that is only known to have the same value.
    """

    module: str
    name: str
    index: int | None
    labels: Ids
    sure: bool = True


@dataclass(frozen=True)
class Work:
    """Multiplications of one operation: a constant times the lengths of some axes.

    Args:
        constant: what does not depend on channels.
        axes: labels of the axes that do.
    """

    constant: float
    axes: tuple[Ids, ...]


@dataclass
class Trace:
    """What one forward pass shows.

    Args:
        axes: full name of a parameter or buffer -> labels of each of its axes.
        attributes: numbers of modules that count channels.
        work: multiplications.
        grouped: what was decided where channels can be taken apart in more than one way, such as the full name of the
            weight of a grouped convolution -> "groups" (whole groups go) or "positions" (the same of every group).
        classes: label -> class; what is in one class goes together.
        frozen: class -> why it stays.
        shapes: shapes of the tensors that the model gave out.
        trains: whether it also ran in training mode, which is tried if some of its parameters have no use otherwise.
    """

    axes: dict[str, AxisLabels]
    attributes: list[Attribute] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    grouped: dict[str, str] = field(default_factory=dict)
    classes: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    frozen: dict[int, str] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ()
    trains: bool = False


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their clean full names, shared ones once.

    Args:
        model: any module.

    Returns:
        Name -> tensor.
    """
    return {clean(name): t for name, t in chain(model.named_parameters(), model.named_buffers())}


class Watcher:
    """Follows labels through the operations that run inside."""

    def __init__(self, model: nn.Module, grouped: dict[str, str]) -> None:
        self.labels = Labels()
        self.grouped = dict(grouped)
        self.attributes: list[Attribute] = []
        self.work: list[Work] = []
        self.stack: list[tuple[str, nn.Module]] = [("", model)]
        self._taken: list[set[str]] = [set()]
        self._turns: Counter[str] = Counter()
        self.owned = tensors_of(model)
        self._read: set[int] = set()
        self._known: dict[int, tuple[Tensor, AxisLabels]] = {}  # holding on to a tensor keeps its id its own
        self._names = {id(t): name for name, t in self.owned.items()}
        self._storages = {t.untyped_storage().data_ptr() for t in self.owned.values()}
        for tensor in self.owned.values():
            self.set(tensor, [self.labels.new(n) if n > 1 else None for n in tensor.shape])
        self.axes = {name: self.of(t) for name, t in self.owned.items()}
        self._read.clear()

    # -- what rules use ----------------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> AxisLabels:
        """The labels of every axis of a tensor; None for an axis without."""
        self._read.add(id(tensor))
        found = self._known.get(id(tensor))
        return found[1] if found else (None,) * tensor.dim()

    def set(self, tensor: Tensor, axes: Sequence[Ids | None]) -> None:
        """Give a tensor its labels."""
        kept = tuple(a if n > 1 else None for a, n in zip(axes, tensor.shape, strict=True))
        self._known[id(tensor)] = tensor, kept

    def name_of(self, tensor: Tensor) -> str | None:
        """The full name of a parameter or buffer."""
        return self._names.get(id(tensor))

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is a parameter or buffer, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self._storages

    def same(self, a: Ids | None, b: Ids | None, why: str = "") -> Ids | None:
        """The labels of an axis that two tensors share; if only one of them has any, its channels stay."""
        if a is None or b is None:
            either = a if b is None else b
            if either is not None:
                self.labels.freeze(either, why or f"{self.here} joins it with a tensor of fixed size")
            return None
        self.labels.equal(a, b)
        return a

    def freeze(self, tensor: Tensor, axes: Sequence[int] | None, why: str) -> None:
        """The channels of some axes (all if None) of a tensor stay."""
        for i, ids in enumerate(self.of(tensor)):
            if ids is not None and (axes is None or i in axes):
                self.labels.freeze(ids, why)

    @property
    def here(self) -> str:
        """The module that runs now, in words."""
        name, module = self.stack[-1]
        return f"{name} ({type(module).__name__})" if name else type(module).__name__

    def turn(self) -> str:
        """A key for what happens now: the module that runs, and how often it has asked."""
        where = self.stack[-1][0]
        self._turns[where] += 1
        return f"{where}()#{self._turns[where]}"

    def decide(self, key: str, default: str) -> str:
        """One of several ways to take channels apart: that of the earlier trace, if it has decided, or the default."""
        return self.grouped.setdefault(key, default)

    def counts(self, name: str, labels: Ids | None, index: int | None = None) -> None:
        """An attribute of the module that runs now counts these channels."""
        where, module = self.stack[-1]
        if labels is not None and hasattr(module, name):
            self.attributes.append(Attribute(where, name, index, labels))

    def heads(self, labels: Ids) -> Attribute | None:
        """The attribute of a module that runs now that counts so many attention heads."""
        for where, module in reversed(self.stack):
            for name, value in vars(module).items():
                if type(value) is int and value == len(labels) and _HEADS.match(name):
                    return Attribute(where, name, None, labels)
        return None

    def features(self, size: int) -> bool:
        """Whether a module that runs now has an attribute that says that an attention head has so many features."""
        return any(
            type(value) is int and value == size and _FEATURES.match(name)
            for _, module in self.stack
            for name, value in vars(module).items()
        )

    def sized(self, labels: Ids, hint: str = "") -> bool:
        """Whether the module that runs now has an attribute of this value, which may be what its code uses; noted.

        Of several that one which is not taken yet in this call, those with the hint in their name first.
        """
        last = self.attributes[-1:]
        if any(_HEADS.match(a.name) and np.array_equal(np.unique(labels), a.labels) for a in last):
            return True  # noted already
        where, module = self.stack[-1]
        held = ((name, value) for name, value in vars(module).items() if not _OTHER.search(name))
        found = [name for name, value in held if type(value) is int and value == len(labels)]
        left = [name for name in found if name not in self._taken[-1]] or found
        if not left:
            return False
        name = min(left, key=lambda name: hint not in name)
        self._taken[-1].add(name)
        self.attributes.append(Attribute(where, name, None, labels, sure=False))
        return True

    def multiplies(self, constant: float, *axes: Ids | None) -> None:
        """Note multiplications: the constant times the length of every axis with labels."""
        kept = tuple(a for a in axes if a is not None)
        self.work.append(Work(constant, kept))

    def unknown(self, operation: str, given: Any) -> None:
        """An operation without a rule: what goes in stays."""
        why = f"{self.here} uses {operation}, whose channels are not followed"
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self.freeze(tensor, None, why)

    # -- running -----------------------------------------------------------------------------------------------

    def enter(self, name: str, module: nn.Module) -> Any:
        """Forward pre-hook of a module."""

        def hook(*_: Any) -> None:
            self.stack.append((name, module))
            self._taken.append(set())

        return hook

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of every module: layers of other libraries say their sizes as PyTorch's do."""
        where, _ = self.stack.pop()
        self._taken.pop()
        shape = vars(module._modules.get("weight") or module).get("shape", ())
        for index, name, tensor in (
            (0, "in_channels", first_tensor(args)),
            (1, "out_channels", first_tensor(output)),
        ):
            if (
                not isinstance(tensor, Tensor)
                or tensor.dim() < 2
                or vars(module).get(name) != tensor.shape[1]
            ):
                continue
            labels = self.of(tensor)[1]
            if labels is not None:
                self.attributes.append(Attribute(where, name, None, labels))
                if len(shape) > 2 and shape[index] == len(
                    labels
                ):  # a factorized tensor knows the shape it stands for
                    self.attributes.append(Attribute(f"{where}.weight", "shape", index, labels))

    def asleep(self) -> bool:
        """Whether there are parameters that no operation has used."""
        return any(id(t) not in self._read for t in self.owned.values() if isinstance(t, nn.Parameter))

    def gives(self, output: Any) -> list[Tensor]:
        """The tensors that the model gives out: they stay as they are."""
        given = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        for tensor in given:
            self.freeze(tensor, None, "the model gives it out")
        return given

    def result(self, given: Sequence[Tensor]) -> Trace:
        """What was seen."""
        self._count_attention()
        classes = self.labels.solve()
        frozen = self.labels.frozen(classes)
        shapes = tuple(tuple(t.shape) for t in given)
        return Trace(self.axes, self.attributes, self.work, self.grouped, classes, frozen, shapes)

    def _count_attention(self) -> None:
        """What attention layers and transformers of PyTorch say of themselves."""
        for name, module in self.stack[0][1].named_modules():
            for number, (key, axis) in numbers(module).items():
                labels = self.axes.get(f"{clean(name)}.{key}".lstrip("."), (None, None))[axis]
                if labels is not None:
                    self.attributes.append(Attribute(clean(name), number, None, labels))
            if not isinstance(module, nn.MultiheadAttention):
                continue
            stays = self.labels.new(module.head_dim)
            self.attributes.append(Attribute(clean(name), "head_dim", None, stays))
            for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight") if module.num_heads == 1 else ():
                labels = self.axes.get(f"{clean(name)}.{key}".lstrip("."), (None, None))[0]
                if labels is not None:
                    self.labels.freeze(labels, f"{clean(name) or 'the layer'} has one head")
