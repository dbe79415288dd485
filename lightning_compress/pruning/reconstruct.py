"""After inputs of a layer have gone, the weights with which the remaining ones come closest to its old outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.functional.inputs import taps
from lightning_compress.names import clean
from lightning_compress.stats import Calibration
from lightning_compress.stats.running import call, observing
from lightning_compress.targets import plain_class

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def can_reconstruct(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear layer or convolution, padded with zeros by number.

    Args:
        layer: any module.

    Returns:
        True if ``reconstruct`` takes it.

    Examples:
        >>> can_reconstruct(nn.Conv2d(1, 1, 3)), can_reconstruct(nn.Conv2d(1, 1, 3, padding="same"))
        (True, False)
    """
    kind = plain_class(layer)
    if kind is nn.Linear:
        return True
    return kind in _CONVOLUTIONS and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def reconstruct(
    original: nn.Module,
    small: nn.Module,
    layers: Sequence[str],
    rows: Callable[[str], Tensor],
    inputs: Calibration,
    damping: float,
) -> dict[str, Tensor]:
    r"""Fit the weights of layers whose inputs have changed, one after the other, in place.

    Layer by layer in the order of the forward pass, with x the inputs of the layer in the small model, which already
    has the new weights before it, and y the outputs that the layer had in the original:
    ``W = argmin E ||y - W x - b||^2 + damping tr(E x x^T) / n ||W - W_0||^2``, with W_0 the weights that were kept; a
    layer without a bias has none.

    Args:
        original: the model before; left as it is.
        small: the model after; its weights are changed.
        layers: names of linear layers and convolutions.
        rows: layer name -> output channels that were kept.
        inputs: calibration inputs.
        damping: > 0, how strongly the kept weights hold.

    Returns:
        Full parameter name -> new value, on the CPU.

    Source: He et al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks; Luo et al. 2017, ThiNet.
    """
    old, new = ({clean(n): m for n, m in model.named_modules()} for model in (original, small))
    changed: dict[str, Tensor] = {}
    for name in _in_order(small, new, layers, inputs):
        first, second = old[name], new[name]
        sums = _Sums(second, rows(name))
        for batch in inputs.batches(original):
            y = _seen(original, first, batch, outputs=True)
            x = _seen(small, second, batch, outputs=False)
            for part, wanted in zip(x, y, strict=True):
                sums.add(part, wanted)
        for param, value in sums.solve(damping).items():
            getattr(second, param).data.copy_(value)
            changed[f"{name}.{param}" if name else param] = getattr(second, param).detach().cpu().clone()
    return changed


class _Sums:
    """Sums over samples and positions, for one layer, by group: of x x^T, y x^T, x and y."""

    def __init__(self, layer: Any, rows: Tensor) -> None:
        self.layer, self.rows = layer, rows
        self.groups = int(getattr(layer, "groups", 1))
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """One call: the inputs of the small layer, the outputs of the original."""
        y = y.double()
        if isinstance(self.layer, _CONVOLUTIONS):
            layer: Any = self.layer
            how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            views = list(taps(x.double(), layer.kernel_size, y.shape[2:], **how))
            wide = torch.stack(views, 2)  # [N, C, K, ..]
            split = wide.view(len(x), self.groups, -1, len(views), *y.shape[2:]).flatten(2, 3).flatten(3)
            a = split.movedim(1, 0).movedim(2, 1).flatten(2)  # [groups, inputs x kernel, N x positions]
            b = y.index_select(1, self.rows).view(len(y), self.groups, -1, *y.shape[2:]).flatten(3)
            b = b.movedim(1, 0).movedim(2, 1).flatten(2)
        else:
            a = x.double().reshape(-1, x.shape[-1]).T[None]
            b = y.index_select(-1, self.rows).reshape(-1, len(self.rows)).T[None]
        if self.layer.bias is not None:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        self.gram = self.gram + a @ a.mT
        self.cross = self.cross + b @ a.mT
        self.count += a.shape[-1]

    def solve(self, damping: float) -> dict[str, Tensor]:
        """The new weight, and the new bias if there is one."""
        weight, bias = self.layer.weight.detach(), self.layer.bias
        present = weight.double().view(self.groups, len(weight) // self.groups, -1)
        if bias is not None:
            present = torch.cat([present, bias.detach().double().view(self.groups, -1, 1)], -1)
        scale = self.gram.diagonal(dim1=-2, dim2=-1)
        if bias is not None:
            scale = scale[:, :-1]
        held = (
            damping
            * scale.mean(-1, keepdim=True).clamp_min(1e-30).expand(len(scale), present.shape[-1]).clone()
        )
        matrix = self.gram + torch.diag_embed(held)
        right = self.cross + present * held[:, None]
        found = torch.linalg.solve(matrix, right.mT).mT
        values = {
            "weight": (found[..., :-1] if bias is not None else found).reshape(weight.shape).to(weight.dtype)
        }
        if bias is not None:
            values["bias"] = found[..., -1].reshape(-1).to(bias.dtype)
        return values


def _in_order(
    model: nn.Module, modules: dict[str, nn.Module], layers: Sequence[str], inputs: Calibration
) -> list[str]:
    """The layers in the order of their first calls; those that do not run are left out."""
    order: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        for name in layers:
            hook = modules[name].register_forward_pre_hook(lambda *_, name=name: order.append(name))
            stack.callback(hook.remove)
        call(model, next(iter(inputs.batches(model))))
    return list(dict.fromkeys(order))


def _seen(model: nn.Module, layer: nn.Module, batch: Any, *, outputs: bool) -> list[Tensor]:
    """What a layer gives out, or gets, in its calls."""
    with observing(model), _watched(layer, outputs) as found:
        call(model, batch)
    return found


@contextmanager
def _watched(layer: nn.Module, outputs: bool) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found.append((output if outputs else args[0]).detach())

    handle = layer.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
