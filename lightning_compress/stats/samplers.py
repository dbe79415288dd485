"""Inputs for a model without data: noise, points of a domain, random fields, or images made from its BatchNorm."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from lightning_compress.functional import sampling
from lightning_compress.names import name_of
from lightning_compress.stats.drawing import Draw, drawn_like, fields
from lightning_compress.stats.synthesis import can_match, channel_scale, match_batchnorm

KINDS = ("normal", "uniform", "grf", "bn_stats")
_SOBOL = 16  # coordinates up to which a low-discrepancy sequence covers the domain better than chance
_COORDINATES = 8
Bounds = Sequence[float] | Sequence[Sequence[float]] | Tensor


@dataclass(frozen=True)
class Sampler:
    """Draws inputs: a function of their number and of a generator.

    Args:
        draw: function (n, generator) -> n inputs: a tensor, a tuple of arguments or a dict of keywords.
        name: what it draws, in words.
        reason: why it was chosen, if nobody chose it.
        seed: of everything that is drawn without a generator of one's own.
        other: as ``draw``, of inputs that it never draws; None if every draw is new anyway.

    Examples:
        >>> sampler = Sampler(lambda n, generator: torch.rand(n, 2, generator=generator), "squares")
        >>> sampler(3).shape, torch.equal(sampler(3), sampler(3))
        (torch.Size([3, 2]), True)
        >>> [len(x) for (x,) in sampler.loader(batch_size=4, batches=2)]
        [4, 4]
    """

    draw: Callable[[int, torch.Generator], Any] = field(repr=False)
    name: str
    reason: str = ""
    seed: int = 0
    other: Callable[[int, torch.Generator], Any] | None = field(default=None, repr=False)

    def __call__(self, n: int, generator: torch.Generator | None = None) -> Any:
        """Draw n inputs; without a generator the same ones every time."""
        return self.draw(n, torch.Generator().manual_seed(self.seed) if generator is None else generator)

    @property
    def __name__(self) -> str:
        """The name, as reports show that of a function."""
        return self.name

    def loader(self, batch_size: int, batches: int) -> DataLoader[Any]:
        """New batches ``(x,)``, each from a generator of its own, so that batch i is the same whatever came before.

        Args:
            batch_size: inputs of each, >= 1.
            batches: how many, >= 1.

        Returns:
            A loader with a length; the same batches every time it is read.
        """
        if batch_size < 1 or batches < 1:
            raise ValueError(f"batch_size={batch_size}, batches={batches}: allowed is >= 1.")
        # A loader draws a seed for its workers, though it has none: not from the global generator.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(_Batches(self, batch_size, batches), batch_size=None, generator=generator)

    def held_out(self) -> Sampler:
        """The sampler of inputs that this one does not draw, to judge by.

        Returns:
            As this one, with another seed, and where it draws from a stock another stock.
        """
        seed = _mixed(self.seed, "held out")
        return replace(self, draw=self.other or self.draw, seed=seed, other=None)

    def describe(self) -> str:
        """What it draws, and the seed, for reports."""
        return f"{self.name} seed={self.seed}"


class _Batches(Dataset[Any]):
    def __init__(self, sampler: Sampler, size: int, count: int) -> None:
        self.sampler, self.size, self.count = sampler, size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Any]:
        generator = torch.Generator().manual_seed(_mixed(self.sampler.seed, i))
        return (self.sampler(self.size, generator),)


def _mixed(seed: int, what: Any) -> int:
    """A seed of 63 bits that has nothing to do with its neighbours."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {what}".encode(), digest_size=8).digest()) >> 1


def synthesize(
    model: nn.Module,
    kind: str | Callable[[int, torch.Generator], Any] = "auto",
    like: Any = None,
    *,
    bounds: Bounds | None = None,
    seed: int = 0,
    **options: Any,
) -> Sampler:
    """A sampler of inputs for a model.

    - "normal": ``N(mean, std^2)`` per channel of the example, or ``N(0, 1)`` if it tells no more than a shape.
    - "uniform": on the bounds of each coordinate; for inputs [N, d] with d <= 16 a scrambled Sobol sequence, which
      leaves no gaps.
    - "grf": Gaussian random fields with the example's mean and deviation per channel, two-valued where it is.
    - "bn_stats": a stock of images after which every BatchNorm sees the statistics it has stored
      (``match_batchnorm``), shifted and flipped at random; takes from seconds to minutes.
    - "bn_stats+normal" and the like: equal shares of several.
    - "auto": what ``choose_kind`` chooses; the sampler says why.

    Args:
        model: the model that is to run.
        kind: one of these, or a function (n, generator) -> inputs.
        like: one or more inputs (tensor, tuple of arguments or dict of keywords, samples first), or the shape of one
            sample, such as (3, 32, 32).
        bounds: of "uniform": (low, high), or one such pair for each coordinate of inputs [N, d]. None takes the range
            of the example's coordinates, or (-1, 1) if it has one value of a coordinate only.
        seed: of what is drawn; the global random state is untouched.
        **options: of "bn_stats": ``pool``, the number of images (512), and ``steps``, ``lr``, ``batch`` and
            ``progress`` of ``match_batchnorm``.

    Returns:
        The sampler.

    Raises:
        ValueError: an unknown kind, no example, or an example that the kind cannot draw from; bounds that do not fit.

    Examples:
        >>> sampler = synthesize(nn.Linear(2, 1), "uniform", (2,), bounds=[(-1, 1), (0, 3)])
        >>> sampler.describe()
        'uniform (Sobol) on [-1, 1] x [0, 3] seed=0'
        >>> bool((sampler(64)[:, 1] > 2).any())
        True

    Source: Sobol 1967; Yin et al. 2020, Dreaming to Distill (DeepInversion); Cai et al. 2020, ZeroQ.
    """
    if isinstance(kind, Sampler):
        return kind
    if callable(kind):
        return Sampler(kind, name_of(kind), "given", seed)
    if like is None:
        raise ValueError(
            f"sampler {kind!r} needs an example input, or the shape of one such as like=(3, 32, 32)."
        )
    example = torch.zeros(1, *like) if _is_shape(like) else like
    reason = ""
    if kind == "auto":
        kind, reason = choose_kind(model, example)
    names = kind.split("+")
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(
            f"sampler {unknown[0]!r} is unknown; allowed: {', '.join(KINDS)}, several joined by '+', 'auto', or a "
            "function (n, generator) -> inputs."
        )
    if options and "bn_stats" not in names:
        raise ValueError(f"options {sorted(options)} are those of 'bn_stats', and the sampler is {kind!r}.")
    made = []
    for name in names:
        if name == "bn_stats":
            made.append(_matched(model, example, seed, **options))
        elif name == "uniform":
            made.append(_uniform(example, bounds, seed))
        else:
            draw, words = (_normal, "normal") if name == "normal" else (fields, "Gaussian random fields")
            made.append(Sampler(_drawing(example, draw), words, seed=seed))
    return replace(made[0] if len(made) == 1 else _mix(made), reason=reason)


def choose_kind(model: nn.Module, example: Any) -> tuple[str, str]:
    """The kind of inputs that suits a model, and why.

    Args:
        model: any module.
        example: one input.

    Returns:
        Kind for ``synthesize``, and the reason in words.

    Examples:
        >>> choose_kind(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), torch.zeros(1, 2))
        ('uniform', 'linear layers on 2 coordinates')
    """
    if takes_coordinates(model, example):
        return "uniform", f"linear layers on {example.shape[1]} coordinates"
    if any(p.is_complex() for p in model.parameters()):
        return "grf", "complex weights: a neural operator, whose inputs are fields"
    if can_match(model, example):
        return "bn_stats+grf", "BatchNorm has stored statistics of the training data"
    if isinstance(example, Tensor) and example.dim() > 3 and example.is_floating_point():
        return "grf", "images, which are smooth as random fields are"
    return "normal", "neither coordinates, nor images, nor an operator"


def takes_coordinates(model: nn.Module, example: Any) -> bool:
    """Whether a model maps few coordinates through linear layers only, as a physics-informed network does.

    Args:
        model: any module.
        example: one input.

    Returns:
        True for real inputs [N, d], d <= 8, where all layers with parameters are linear and none normalizes.

    Examples:
        >>> takes_coordinates(nn.Linear(2, 1), torch.zeros(1, 2)), takes_coordinates(nn.Linear(9, 1), torch.zeros(1, 9))
        (True, False)
    """
    flat = isinstance(example, Tensor) and example.dim() == 2 and example.is_floating_point()
    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    linear = [m for m in layers if isinstance(m, nn.Linear)]
    fixed = all(not p.requires_grad for m in layers if m not in linear for p in m.parameters(recurse=False))
    normalizes = any(isinstance(m, _BatchNorm) for m in model.modules())
    return flat and example.shape[1] <= _COORDINATES and bool(linear) and fixed and not normalizes


def _is_shape(like: Any) -> bool:
    return isinstance(like, torch.Size | tuple | list) and all(type(n) is int for n in like)


def _drawing(example: Any, draw: Draw) -> Callable[[int, torch.Generator], Any]:
    return lambda n, generator: drawn_like(example, n, draw, generator)


def _normal(example: Tensor, n: int, generator: torch.Generator) -> Tensor:
    noise = sampling.normal((n, *example.shape[1:]), generator)
    if example.dim() < 2:
        return noise
    mean, std = channel_scale(example.float())
    return mean + std * noise


def _uniform(example: Any, bounds: Bounds | None, seed: int) -> Sampler:
    coordinates = isinstance(example, Tensor) and example.dim() == 2 and example.is_floating_point()
    box = _box(example if coordinates else None, bounds)
    sobol = coordinates and example.shape[1] <= _SOBOL

    def draw(like: Tensor, n: int, generator: torch.Generator) -> Tensor:
        size = like.shape[1:].numel()
        if sobol:
            start = int(torch.randint(2**31, (), generator=generator))
            engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=start)  # type: ignore[no-untyped-call]
            points = engine.draw(n)
        else:
            points = torch.rand((n, *like.shape[1:]), generator=generator)
        return box[:, 0] + (box[:, 1] - box[:, 0]) * points

    where = " x ".join(f"[{low:g}, {high:g}]" for low, high in box.tolist())
    return Sampler(_drawing(example, draw), f"uniform{' (Sobol)' * sobol} on {where}", seed=seed)


def _box(coordinates: Tensor | None, bounds: Bounds | None) -> Tensor:
    """[d or 1, 2], lower and upper bound of each coordinate."""
    count = 1 if coordinates is None else coordinates.shape[1]
    if bounds is None:
        box = torch.tensor([[-1.0, 1.0]])
        if coordinates is not None:
            low, high = coordinates.detach().float().cpu().aminmax(dim=0)
            box = torch.stack([low, high], 1) if bool((low < high).all()) else box.expand(count, 2)
        return box
    box = torch.as_tensor(bounds, dtype=torch.float32)
    box = box.expand(count, 2) if box.shape == (2,) else box
    if box.shape not in ((count, 2), (1, 2)) or not bool((box[:, 0] < box[:, 1]).all()):
        raise ValueError(
            f"bounds={bounds!r}: allowed are (low, high) with low < high"
            + (f", or {count} such pairs, one for each coordinate." if coordinates is not None else ".")
        )
    return box


def _matched(model: nn.Module, example: Any, seed: int, pool: int = 512, **options: Any) -> Sampler:
    if pool < 4:
        raise ValueError(f"pool={pool}: allowed is >= 4 images.")
    stock = match_batchnorm(model, example, pool, seed=seed, **options)
    spared = pool // 4  # kept back to judge by
    name = f"images matched to BatchNorm statistics (stock of {pool - spared})"
    return Sampler(_from(stock[spared:]), name, seed=seed, other=_from(stock[:spared]))


def _from(stock: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """Draws from a stock: different images as long as there are enough, shifted by up to an eighth and flipped."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        rounds = -(-n // len(stock))
        order = torch.cat([torch.randperm(len(stock), generator=generator) for _ in range(rounds)])[:n]
        drawn = stock[order]
        if drawn.dim() < 4:
            return drawn
        for i, image in enumerate(drawn):
            most = [size // 8 for size in image.shape[1:]]
            steps = [int(torch.randint(-m, m + 1, (), generator=generator)) for m in most]
            image = image.roll(steps, list(range(1, image.dim())))
            drawn[i] = image.flip(-1) if bool(torch.rand((), generator=generator) < 0.5) else image
        return drawn

    return draw


def _mix(samplers: Sequence[Sampler]) -> Sampler:
    """Equal shares of several samplers of tensors, the first ones in front."""

    def joined(
        draws: Sequence[Callable[[int, torch.Generator], Any]],
    ) -> Callable[[int, torch.Generator], Any]:
        def draw(n: int, generator: torch.Generator) -> Any:
            ends = [n * i // len(draws) for i in range(len(draws) + 1)]
            parts = [d(b - a, generator) for d, a, b in zip(draws, ends[:-1], ends[1:], strict=True) if b > a]
            return torch.cat(parts)

        return draw

    name = " and ".join(s.name for s in samplers)
    other = joined([s.other or s.draw for s in samplers])
    return Sampler(joined([s.draw for s in samplers]), name, seed=samplers[0].seed, other=other)
