"""Gradients of a loss on calibration inputs: squares of single samples, products with the weight of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_compress.stats.biases import shift_of
from lightning_compress.stats.calibration import Calibration
from lightning_compress.stats.drawing import sample_count, take_samples
from lightning_compress.stats.fields import BATCHED, SINGLE
from lightning_compress.stats.running import call, first_tensor, observing
from lightning_compress.targets import Target

Loss = Callable[[Any, Any], Tensor]


class Derivatives:
    """Running sums of one target's gradients.

    Args:
        target: the weight.
        wanted: fields of ``Stats``; only those of gradients count.
        norm: the BatchNorm that directly follows the layer, if there is one.
    """

    def __init__(self, target: Target, wanted: frozenset[str], norm: nn.Module | None) -> None:
        self.target, self.wanted = target, wanted
        self.shift = shift_of(target, norm) if wanted & {"bias", "bias_gradient"} else None
        self.square: Tensor | None = None
        self.shift_square: Tensor | None = None
        self.products: list[Tensor] | None = None  # of the entries, then sums for every axis
        self.samples = 0
        self.batches = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is differentiated: the weight, then the bias if it is wanted."""
        return [self.target.weight, *([] if self.shift is None else [self.shift.parameter])]

    def single(self, gradients: Sequence[Tensor | None]) -> None:
        """Gradients of one sample, as ``parameters``; None for one that it does not reach."""
        self.samples += 1
        first = gradients[0]
        if first is not None:
            square = self._finite(first).abs().double().square()
            self.square = square if self.square is None else self.square.add_(square)
        if self.shift is not None and gradients[1] is not None:
            part = self._finite(gradients[1]).reshape(-1)[self.shift.part].double() * self.shift.factor
            square = part.square()
            self.shift_square = square if self.shift_square is None else self.shift_square.add_(square)

    def batched(self, gradients: Sequence[Tensor | None]) -> None:
        """Gradients of the mean loss of one batch."""
        self.batches += 1
        if gradients[0] is None:
            return
        weight = self.target.weight.detach()
        wide = torch.complex128 if weight.is_complex() else torch.float64
        product = (self._finite(gradients[0]).to(wide).conj() * weight.to(wide)).real
        axes = range(product.dim())
        sums = [
            product.sum([a for a in axes if a != axis]) if product.dim() > 1 else product for axis in axes
        ]
        squares = [value.square() for value in (product, *sums)]
        if self.products is None:
            self.products = squares
        else:
            for total, square in zip(self.products, squares, strict=True):
                total.add_(square)

    def missing(self) -> set[str]:
        """Wanted fields that no pass has filled; there need not be a bias."""
        absent = {"gradient"} if self.square is None else set()
        return (absent | (set(BATCHED) if self.products is None else set())) & self.wanted

    def fields(self) -> dict[str, Any]:
        """What was measured, by field of ``Stats``."""
        weight = self.target.weight
        dtype = torch.promote_types(torch.float32, weight.real.dtype if weight.is_complex() else weight.dtype)
        found: dict[str, Any] = {"count": self.samples} if self.samples else {}
        if self.square is not None:
            found["gradient"] = (self.square / self.samples).to(dtype)
        if self.shift is not None and self.shift_square is not None:
            found["bias"] = self.shift.value.to(dtype)
            found["bias_gradient"] = (self.shift_square / self.samples).to(dtype)
        if self.products is not None:
            entries, *sums = [(total / self.batches).to(dtype) for total in self.products]
            found |= {"taylor": entries, "taylor_sums": tuple(sums)}
        return {name: value for name, value in found.items() if name in self.wanted or name == "count"}

    def _finite(self, gradient: Tensor) -> Tensor:
        gradient = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
        bad = int((~torch.isfinite(gradient)).sum())
        if bad:
            raise ValueError(
                f"{self.target.key}: {bad} of {gradient.numel()} entries of its gradient are not finite: check the "
                "loss, the data and the weights."
            )
        return gradient


def differentiate(
    model: nn.Module,
    derivatives: Sequence[Derivatives],
    calibration: Calibration,
    loss: Loss | None,
    task: str | None,
) -> None:
    """The passes with gradients: one of single samples, because a batch mean would mix them, and one of batches.

    Args:
        model: any module; it is left exactly as it was.
        derivatives: take the gradients; each wants the same fields.
        calibration: where inputs and labels come from.
        loss: of the output and the labels; None: see ``collect``.
        task: "classification", "regression" or None, of the model's own distribution.
    """
    wanted = derivatives[0].wanted if derivatives else frozenset()
    parameters = list(dict.fromkeys(p for d in derivatives for p in d.parameters))
    generator = torch.Generator().manual_seed(calibration.seed)
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for parameter in (p for p in parameters if not p.requires_grad):
            parameter.requires_grad_(True)
            stack.callback(parameter.requires_grad_, False)

        def gradients(value: Tensor) -> Sequence[tuple[Derivatives, list[Tensor | None]]]:
            found = dict(
                zip(parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True)
            )
            return [(d, [found[p] for p in d.parameters]) for d in derivatives]

        if wanted & SINGLE:
            for batch in calibration.pairs(model):
                count = sample_count(batch[0])
                for i in range(count):
                    inputs, labels = take_samples(batch, count, i, i + 1)
                    value = _loss(call(model, inputs), labels, loss, task, generator)
                    for derivative, parts in gradients(value):
                        derivative.single(parts)
        if wanted & BATCHED:
            for inputs, labels in calibration.pairs(model):
                output, count = call(model, inputs), sample_count(inputs)
                known = _labelled(output, labels, task) if loss is None else None
                if known is None:
                    known = _loss(output, labels, loss, task, generator) / (count if loss is None else 1)
                for derivative, parts in gradients(known):
                    derivative.batched(parts)


def _loss(
    output: Any, labels: Any, loss: Loss | None, task: str | None, generator: torch.Generator
) -> Tensor:
    """The given loss, or the sum over samples of that of the model's own distribution."""
    if loss is None:
        return _own_loss(output, task, generator)
    if labels is None:
        raise ValueError("loss= needs labels: give data of (inputs, labels) batches.")
    value = loss(output, labels)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"loss= gave {getattr(value, 'shape', type(value).__name__)}; needed is one number.")
    return value


def _labelled(output: Any, labels: Any, task: str | None) -> Tensor | None:
    """Cross-entropy or half the squared error, mean over samples, where the labels are of such a kind."""
    f = first_tensor(output)
    if f is None or not f.is_floating_point() or not isinstance(labels, Tensor):
        return None
    classes = not labels.is_floating_point() and f.dim() > 1 and labels.shape == (f.shape[0], *f.shape[2:])
    if classes and task != "regression" and labels.dtype == torch.int64:
        return cross_entropy(f.float(), labels, reduction="sum") / len(f)
    if labels.is_floating_point() and task != "classification" and labels.shape == f.shape:
        return (f - labels).square().sum() / (2 * len(f))
    return None


def _own_loss(output: Any, task: str | None, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of a label drawn from the model's own prediction."""
    f = first_tensor(output)
    if f is None or not f.is_floating_point():
        raise ValueError(f"gradients of {type(output).__name__} outputs need loss= and labels.")
    if not bool(torch.isfinite(f).all()):
        raise ValueError("the model's output is not finite: check the calibration data and the weights.")
    if task == "classification" or (task is None and f.dim() == 2 and f.shape[1] > 1):
        scores = f.float().log_softmax(1)
        y = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(f.device)
        return -scores.gather(1, y).sum()
    noise = torch.randn(f.shape, generator=generator).to(f)
    return (f - (f.detach() + noise)).square().sum() / 2
