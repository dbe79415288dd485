"""Inputs from nothing but a model: optimized until every BatchNorm sees the statistics it has stored."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from lightning_compress.functional import sampling
from lightning_compress.stats.running import call, device_of, observing

_BETAS = (0.8, 0.95)  # of Adam: shorter memories than its defaults, for so few steps
_DECAY = 1.25  # amplitudes of natural images fall about like 1 / |k|^1.25


def can_match(model: nn.Module, example_input: Any) -> bool:
    """Whether ``match_batchnorm`` has something to match: stored statistics, and one real tensor [N, C, ...] as input.

    Args:
        model: any module.
        example_input: one input.

    Returns:
        True if both are there.

    Examples:
        >>> can_match(nn.BatchNorm1d(3), torch.zeros(1, 3)), can_match(nn.Linear(3, 2), torch.zeros(1, 3))
        (True, False)
    """
    fits = isinstance(example_input, Tensor) and example_input.dim() > 1 and example_input.is_floating_point()
    return fits and bool(_norms(model))


def match_batchnorm(
    model: nn.Module,
    example_input: Tensor,
    n: int,
    *,
    steps: int = 40,
    seed: int = 0,
    lr: float = 0.2,
    batch: int = 64,
    progress: bool = True,
) -> Tensor:
    r"""Inputs whose mean and variance before every BatchNorm are the running ones: a stand-in for lost data.

    Adam changes the inputs x of the model in eval mode to lower

    ``sum_l mean_c ((mu_lc(x) - mu_lc) / sigma_lc)^2 + (sigma_lc(x) / sigma_lc - 1)^2``

    over BatchNorm layers l and channels c, ``sigma = sqrt(var + eps)``, statistics over a batch and its positions.
    Inputs with positions start as random fields with the spectrum of natural images, which brings the Gram matrices
    of the layers' inputs closer to those of real images than white noise does; inputs [N, C] start as N(0, 1). Their
    mean and standard deviation per channel are the example's, or 0 and 1 if it is constant: an example with entries
    of a wrong size is worse than zeros.

    Every batch is matched by itself; whole batches are made and the last is cut, so that the first inputs of a large
    set are those of a small one. The model is left exactly as it was.

    Args:
        model: a module with BatchNorm layers that keep running statistics.
        example_input: one real input [N, C, ...] for the shape.
        n: number of inputs.
        steps: of Adam, per batch; the learning rate falls to zero along half a cosine.
        seed: of the start; the global random state is untouched.
        lr: first learning rate, in standard deviations of the input.
        batch: inputs that are matched together.
        progress: show a progress bar if it takes longer than two seconds.

    Returns:
        [n, C, ...] on the CPU, with the dtype of the example.

    Raises:
        ValueError: there are no running statistics, the input is not one real tensor [N, C, ...], a number is out
            of range, no BatchNorm runs, or the loss is not finite.

    Examples:
        >>> norm = nn.BatchNorm1d(2, affine=False)
        >>> norm.running_mean.fill_(3.0)
        tensor([3., 3.])
        >>> match_batchnorm(norm, torch.zeros(1, 2), 64, progress=False).mean(0).round()
        tensor([3., 3.])

    Source: Cai et al. 2020, ZeroQ; Yin et al. 2020, Dreaming to Distill (DeepInversion).
    """
    if not can_match(model, example_input):
        what = getattr(example_input, "shape", type(example_input).__name__)
        raise ValueError(
            f"match_batchnorm needs BatchNorm layers with running statistics (found {len(_norms(model))}) and one real "
            f"tensor [N, C, ...] as example_input (given: {what}): give data= or another sampler."
        )
    if min(n, steps, batch) < 1 or not lr > 0:
        raise ValueError(f"n={n}, steps={steps}, batch={batch}, lr={lr}: allowed are >= 1, >= 1, >= 1, > 0.")
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    batches = math.ceil(n / batch)
    made = []
    with ExitStack() as stack:
        stack.enter_context(observing(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        bar = tqdm(
            total=batches * steps, desc="inputs from BatchNorm", leave=False, disable=not progress, delay=2
        )
        stack.enter_context(bar)
        match = stack.enter_context(_Mismatch(model))
        mean, std = channel_scale(example_input.detach().float().to(device))
        for _ in range(batches):
            z = _start((batch, *example_input.shape[1:]), generator).to(device).requires_grad_()
            adam = torch.optim.Adam([z], lr=lr, betas=_BETAS)
            for step in range(steps):
                adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                x = (mean + std * z).to(example_input.dtype)
                z.grad = torch.autograd.grad(match.of(model, x), z)[0]
                adam.step()
                bar.update()
            made.append((mean + std * z).detach().to("cpu", example_input.dtype))
    return torch.cat(made)[:n]


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]


class _Mismatch(ExitStack):
    """How far the inputs of the BatchNorm layers are from their running statistics; it hooks them while it is open."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._terms: list[Tensor] = []
        for norm in _norms(model):
            self.callback(norm.register_forward_pre_hook(self._compare).remove)

    def of(self, model: nn.Module, x: Tensor) -> Tensor:
        """The loss for one batch."""
        self._terms.clear()
        call(model, x)
        if not self._terms:
            raise ValueError("no BatchNorm with running statistics runs in the forward pass: give data=.")
        loss = torch.stack(self._terms).sum()
        if not bool(loss.isfinite()):
            raise ValueError(
                "the statistics of BatchNorm inputs are not finite: check the weights and statistics."
            )
        return loss

    def _compare(self, norm: Any, args: Any) -> None:
        x = args[0].float()
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        sigma = (norm.running_var + norm.eps).sqrt()
        off = (mean - norm.running_mean) / sigma
        ratio = (variance + norm.eps).sqrt() / sigma
        self._terms.append(off.square().mean() + (ratio - 1).square().mean())


def channel_scale(example: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of an example; 0 and 1 if it tells no more than a shape.

    Args:
        example: real [N, C, ...].

    Returns:
        Both [C, 1, ...].

    Examples:
        >>> [v.flatten().tolist() for v in channel_scale(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))]
        [[1.0, 3.0], [1.0, 2.0]]
    """
    std, mean = torch.std_mean(example, [0, *range(2, example.dim())], correction=0)
    if not bool((std > 0).all()):
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    shape = (-1, *[1] * (example.dim() - 2))
    return mean.view(shape), std.view(shape)


def _start(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Inputs of mean 0 and variance 1: white noise [N, C], or fields with the spectrum of natural images."""
    count, channels, *grid = shape
    if not grid:
        return sampling.normal(shape, generator)
    fields = sampling.gaussian_random_field((count * channels, *grid), alpha=_DECAY, generator=generator)
    std = fields.flatten(1).std(1, correction=0).clamp_min(1e-12)
    return (fields / std.view(-1, *[1] * len(grid))).view(shape)
