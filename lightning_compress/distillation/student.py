"""A small model of a large one's architecture, to be trained on its outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_compress import codes
from lightning_compress.distillation.fresh import reinitialize
from lightning_compress.distillation.narrow import Narrow
from lightning_compress.stats import Calibration
from lightning_compress.steps import run_step

_STARTS = ("random", "teacher")
_BUILDS = 40


def make_student(
    teacher: nn.Module,
    ratio: float = 0.25,
    *,
    example_input: Any = None,
    tolerance: float = 0.1,
    factory: Callable[[float], nn.Module] | None = None,
    init: str = "random",
    round_to: int = 1,
    minimum: int = 8,
    seed: int = 0,
) -> nn.Module:
    """A thinner model of the teacher's architecture with ``ratio`` of its real parameters.

    One rule for every architecture: all families of channels that belong together are scaled by one factor
    (``Narrow``), be they channels of convolutions, hidden features, attention heads, or channels of neural operators.
    Depth, activations, normalization and shortcuts are the teacher's, and so are the inputs and outputs. Of fixed
    Fourier features those frequencies stay that keep the range.

    The student is an ordinary model of the teacher's classes and shares nothing with the teacher, which is left as it
    is. Its narrowing is a step that it carries: ``save`` writes it, and ``load`` into a fresh model of the *teacher's*
    architecture makes the student from it. A student by ``factory`` carries no step: load it into ``factory(w)``.

    For a shallower student give a teacher that has lost layers already, ``compress(teacher, [DropLayers(...)]).model``,
    and for one with fewer modes ``compress(teacher, [TruncateModes(...)]).model``: ``ratio`` is then a share of that.

    Args:
        teacher: any module that runs.
        ratio: share of the parameters, in (0, 1); a complex one counts as two.
        example_input: one input, unless ``factory`` is given or the teacher has an ``example_input_array``.
        tolerance: how far off the size may be, relative, > 0.
        factory: instead of that rule: function of the width w in (0, 1] that builds a model; w is found by bisection.
        init: "random": as before any training, whatever the teacher's weights; "teacher": its channels with the largest
            weights.
        round_to: widths are multiples of it where a layer has so many.
        minimum: channels that every layer keeps, of those it has; halved as long as it is in the way of the ratio.
        seed: of the random weights; the global random state is untouched.

    Returns:
        The student, in training mode, on the teacher's device.

    Raises:
        ValueError: an option outside its range; no input; a ratio that no widths reach, with the nearest that can be.

    Examples:
        >>> teacher = models.LeNet5()
        >>> student = make_student(teacher, 0.1, example_input=torch.zeros(1, 1, 28, 28))
        >>> abs(cost(student).params / cost(teacher).params / 0.1 - 1) < 0.1
        True
        >>> student(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network; Howard et al. 2017, MobileNets.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio={ratio}: allowed is 0 < ratio < 1.")
    if init not in _STARTS:
        raise ValueError(f"init={init!r} is unknown; allowed: {', '.join(_STARTS)}.")
    if factory is not None:
        if init != "random":
            raise ValueError(
                f"init={init!r} and factory: a model that was built anew has no weights of the teacher."
            )
        return _built(teacher, ratio, tolerance, factory, seed).train()
    x = getattr(teacher, "example_input_array", None) if example_input is None else example_input
    if x is None:
        raise ValueError(
            "make_student runs the teacher to see which channels belong together: give example_input=, such as "
            "torch.zeros(1, 3, 32, 32), or build the student yourself with factory=lambda w: MyNet(round(64 * w))."
        )
    channels = "even" if init == "random" else "norm"
    rule = Narrow(ratio, tolerance, round_to, minimum, channels)
    student = copy.deepcopy(teacher)
    run_step(student, rule, Calibration(example_input=x))
    if init == "random":
        for _, module, param, _ in list(codes.of(student)):
            codes.remove(module, param)
        reinitialize(student, seed)
    if not any(
        p.requires_grad for p in student.parameters()
    ):  # of a teacher that was frozen for good measure
        student.requires_grad_(True)
    return student.train()


def real_parameters(model: nn.Module) -> int:
    """Real numbers in the parameters of a model: a complex one counts as two.

    Args:
        model: any module.

    Returns:
        Their number, shared ones counted once.

    Examples:
        >>> real_parameters(nn.Linear(2, 3))
        9
    """
    return sum(p.numel() * (1 + p.is_complex()) for p in model.parameters())


def _built(
    teacher: nn.Module, ratio: float, tolerance: float, factory: Callable[[float], nn.Module], seed: int
) -> nn.Module:
    """The model of a factory whose size comes closest."""
    goal, low, high = ratio * real_parameters(teacher), 0.0, 1.0
    best: nn.Module | None = None
    width, off = 1.0, float("inf")
    with torch.random.fork_rng():
        for _ in range(_BUILDS):
            torch.manual_seed(seed)
            model = factory(width)
            size = real_parameters(model)
            if abs(size - goal) < off:
                best, off = model, abs(size - goal)
            if off <= tolerance * goal:
                break
            low, high = (width, high) if size < goal else (low, width)
            width = (low + high) / 2
    if best is None or off > tolerance * goal:
        found = 0 if best is None else real_parameters(best)
        raise ValueError(
            f"factory gives no model within tolerance={tolerance} of ratio={ratio}: the nearest has {found:,} "
            f"parameters, a ratio of {found / real_parameters(teacher):.4g}."
        )
    return best
