"""Weights as before any training, from a private generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.stats.running import device_of


def reinitialize(model: nn.Module, seed: int) -> None:
    """Give a model random weights, in place; the global random state is untouched.

    Layers that say how they begin (``reset_parameters``) do so, which also forgets the running statistics of BatchNorm;
    attention begins as PyTorch's; factorized weights of neural operators with ``sqrt(2 / (in + out))``. Parameters
    that no layer resets become ``N(0, s^2)`` with the root mean square s of what they were, and vectors their mean:
    scales stay near 1 and biases near 0. Buffers other than statistics stay.

    Args:
        model: any module.
        seed: the same one gives the same weights, on any device.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> reinitialize(net, 0); first = net.weight.clone()
        >>> reinitialize(net, 0); torch.equal(net.weight, first)
        True
    """
    device = device_of(model)
    model.cpu()
    done: set[int] = set()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        for module in reversed(list(model.modules())):  # parts before the whole, which may know better
            _reset(module)
            own = list(module.parameters(recurse=False))
            if any(callable(getattr(module, n, None)) for n in ("reset_parameters", "normal_")):
                done |= {id(p) for p in module.parameters()}
            elif isinstance(module, nn.MultiheadAttention):
                done |= {id(p) for p in own}
        for parameter in model.parameters():
            if id(parameter) not in done and parameter.is_floating_point() | parameter.is_complex():
                _redraw(parameter)
    model.to(device)


def _reset(module: Any) -> None:
    """As the module's constructor begins."""
    if callable(getattr(module, "reset_parameters", None)):
        module.reset_parameters()
    elif isinstance(module, nn.MultiheadAttention):  # its own code takes all sizes to follow from one
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
    elif callable(getattr(module, "normal_", None)) and len(getattr(module, "shape", ())) > 1:
        module.normal_(0, (2 / (module.shape[0] + module.shape[1])) ** 0.5)


def _redraw(parameter: Tensor) -> None:
    if sum(n > 1 for n in parameter.shape) <= 1:
        parameter.fill_(parameter.mean())
    else:
        parameter.normal_(0, float(parameter.abs().square().mean().sqrt()))
