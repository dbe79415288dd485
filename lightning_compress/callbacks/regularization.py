"""Penalties that make the ranks of weights small while training, so that factorizing afterwards costs little."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.base import unowned
from lightning_compress.callbacks.copies import ExampleInput, part_of
from lightning_compress.callbacks.matrices import PairView, View
from lightning_compress.callbacks.penalized import PenalizingCallback, with_options
from lightning_compress.callbacks.views import SchemeChooser, find_views, one_by_one
from lightning_compress.compress import compress
from lightning_compress.finalize import finalize
from lightning_compress.functional.factor import rank_from_energy, tails
from lightning_compress.functional.penalties import PENALTIES, Penalty, orthogonality
from lightning_compress.functional.ranks import entropy_rank
from lightning_compress.functional.singular import spectra
from lightning_compress.lowrank.all_schemes import schemes
from lightning_compress.lowrank.factorize import Factorize
from lightning_compress.names import name_of
from lightning_compress.targets import Patterns


class LowRankRegularization(PenalizingCallback):
    r"""Make the singular values of weights few while training: ``loss + strength(t) sum_layers P(sigma)``.

    With the weight as a matrix ``W = U diag(sigma) V^H``, one per group, of rank R at most:

    - kind="nuclear": ``P = sum sigma_i``
    - kind="entropy": ``P = -sum p_i ln p_i``, ``p_i = sigma_i / sum sigma`` (option ``distribution``: "linear" or
      "softmax")
    - kind="l1_l2": ``P = |sigma|_1 / |sigma|_2`` (option ``squared``)
    - kind="hoyer": ``P = (|sigma|_1 / |sigma|_2 - 1) / (sqrt(R) - 1)``
    - kind="scad": ``P = sum rho(sigma_i)``, which leaves large values alone (options ``lam``, ``a``)
    - kind="orthogonality": ``P = (|A A^H - I|^2 + |B^H B - I|^2) / r^2`` for pairs of factors
    - kind="truncate": no loss; W is cut to the smallest rank with ``energy_ratio`` of its energy

    Schemes that make several axes of a tensor thin give it a matrix for each of these axes.

    The gradient ``U diag(dP/dsigma) V^H`` is added once per optimizer step, to unscaled gradients before they are
    clipped. Of layers that ``Factorize`` has made, the product is penalized. The module keeps its Parameters and keys.

    It logs ``compress/penalty`` (strength times P), ``compress/effective_rank`` (the mean over layers of
    ``exp(-sum p_i ln p_i)``) and, for every epoch, ``compress/effective_rank/<layer>``.

    Args:
        kind: a name from above, or a function (or its import path) from sigma [.., R] to P [..] and dP/dsigma [.., R].
        strength: lambda >= 0. Of the size of the weight decay that the training would bear.
        options: options of the kind.
        schedule: of the strength, from 0 at ``begin``: "constant", "linear", "cubic", "cosine" … For "truncate", of the
            share of the energy that may go.
        every: act on every so many optimizer steps, with ``strength * every``.
        proximal: for "nuclear": ``sigma <- max(sigma - lr strength every, 0)`` after the step, in place of the
            gradient. Singular values become exactly 0.
        energy_ratio: for "truncate", in (0, 1].
        matrix: "auto" takes the matrix of the scheme that ``Factorize`` takes; or the name of a scheme ("spatial"), or
            a mapping from name pattern to name. Layers without that scheme are as with "auto".
        factorize: how to factorize a copy when the fit ends.
        attribute: the submodule of that copy, such as "model"; None for the whole LightningModule.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.
        begin: when to start.
        end: when the schedule has reached the strength.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        name: distinguishes several instances; their tags are ``compress/<name>/...``.

    Attributes:
        factorized: the factorized copy, in eval mode; None before the end of a fit, without ``factorize``, and when it
            found nothing to do.

    Raises:
        ValueError: an option outside its range, an unknown kind, or options that it does not take.
        MisconfigurationException: nothing to penalize, a place behind ScheduledPruning in the callback list, a strategy
            that shards weights, a sparse gradient.

    Examples:
        >>> LowRankRegularization("scad", 1e-3, options={"lam": 0.5}, begin=0.1).kind
        'scad'

    Source: Fazel 2002 (nuclear); Cai et al. 2010 (proximal step); Roy & Vetterli 2007 (entropy); Yang et al. 2020
    (Hoyer, orthogonality); Xu et al. 2020, Trained Rank Pruning (truncate); Lewis 1996 (gradients).
    """

    def __init__(
        self,
        kind: str | Callable[..., tuple[Tensor, Tensor]] = "nuclear",
        strength: float = 1e-4,
        *,
        options: Mapping[str, Any] | None = None,
        schedule: str | dict[float, float] = "constant",
        every: int = 1,
        proximal: bool = False,
        energy_ratio: float | None = None,
        matrix: str | Mapping[str, str] = "auto",
        factorize: Factorize | None = None,
        attribute: str | None = None,
        include: Patterns = "*",
        exclude: Patterns = (),
        begin: float = 0.0,
        end: float = 1.0,
        unit: str = "fraction",
        name: str | None = None,
    ) -> None:
        super().__init__(
            strength,
            schedule=schedule,
            every=every,
            begin=begin,
            end=end,
            unit=unit,
            include=include,
            exclude=exclude,
            name=name,
        )
        if proximal and kind != "nuclear":
            raise ValueError(f"proximal=True with kind={name_of(kind)!r}: allowed is kind='nuclear'.")
        if (kind == "truncate") != (energy_ratio is not None):
            raise ValueError(
                f"energy_ratio={energy_ratio} with kind={name_of(kind)!r}: kind='truncate' needs it, others take none."
            )
        if energy_ratio is not None and not 0 < energy_ratio <= 1:
            raise ValueError(f"energy_ratio={energy_ratio}: allowed is 0 < energy_ratio <= 1.")
        known = {s.name for s in schemes()}
        for wanted in [matrix] if isinstance(matrix, str) else matrix.values():
            if wanted not in known | {"auto"}:
                raise ValueError(f"matrix={wanted!r} is unknown; allowed: auto, {', '.join(sorted(known))}.")
        self.kind, self.options = kind, dict(options or {})
        self.rule: Penalty = with_options(kind, _RULES, self.options)
        self.rule(torch.ones(2, dtype=torch.float64))  # lets it refuse values
        self.proximal, self.energy_ratio, self.matrix = proximal, energy_ratio, matrix
        self.factorize, self.attribute = factorize, attribute
        self.factorized: nn.Module | None = None
        self._views: list[View] = []
        self._example = self._new_example()
        self._schemes: dict[str, str] = {}  # parameter name -> scheme whose matrix is penalized
        self._cut_at = -1  # steps at the last truncation

    def __getstate__(self) -> dict[str, Any]:
        """Options, counters and the factorized copy; nothing of a running fit."""
        return super().__getstate__() | {"_views": [], "_example": self._new_example()}

    def _new_example(self) -> ExampleInput:
        return ExampleInput(self.attribute, type(self).__name__)

    @property
    def in_loss(self) -> bool:
        """Proximal steps and truncation come after the step instead."""
        return not self.proximal and self.kind != "truncate"

    # -- what is penalized -------------------------------------------------------------------------------------

    def find(self, pl_module: LightningModule, updated: Collection[int]) -> dict[str, str]:
        """Pairs of factors as products, other weights by themselves."""
        chooser = SchemeChooser(self.matrix, self.factorize, self.attribute, self._schemes)
        pairs_only = self.kind == "orthogonality"
        views, skipped = find_views(pl_module, self.include, self.exclude, pairs_only, chooser)
        self._views, self._schemes = [], chooser.chosen
        for view in views:
            m, n = view.matrices().shape[1:]
            lost = [key for key, p in view.parts.items() if id(p) not in updated]
            if lost:
                skipped |= unowned(lost)
            elif min(m, n) == 1:
                skipped |= dict.fromkeys(view.parts, f"a matrix of {m} x {n} has rank 1 anyway")
            else:
                self._views.append(view)
        return skipped

    @property
    def penalized(self) -> Mapping[str, nn.Parameter]:
        """The parameters of all matrices."""
        return {key: p for view in self._views for key, p in view.parts.items()}

    # -- fit ---------------------------------------------------------------------------------------------------

    def gradients(self, owned: Collection[int]) -> dict[str, Tensor]:
        """``U diag(dP/dsigma) V^H``, in the order of the weights."""
        views = {v.name: v for v in self._views if any(id(p) in owned for p in v.parts.values())}
        found: dict[str, Tensor] = {}
        if self.kind == "orthogonality":
            for view in views.values():
                assert isinstance(view, PairView)
                a, b = view.halves()
                _, to_b, to_a = orthogonality(b, a)
                found |= view.to_parts(to_a, to_b)
            return found
        for name, spectrum in spectra({name: v.matrices() for name, v in views.items()}).items():
            for key, part in views[name].gradients(spectrum.compose(self.rule(spectrum.sigma)[1])).items():
                found[key] = found[key] + part if key in found else part
        return found

    def due(self, t: int) -> bool:
        """As the base; what is truncated is truncated in the last step too."""
        return super().due(t) or (self.kind == "truncate" and t == self.span[1])

    @torch.no_grad()
    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Shrink or cut the singular values."""
        if self.in_loss or not self._stepping(optimizer):
            return
        t = self.steps_of(optimizer)
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        views = []
        for view in self._views:
            first, *_ = view.parts.values()  # a pair goes with the optimizer of its first part
            if id(first) in rates and first.grad is not None:
                views.append(view)
        if self.kind == "truncate":
            self._cut(views, t)
            return
        amount = self.strength_at(t) * self.every
        for turn in one_by_one(views):
            for name, found in spectra({name: v.matrices() for name, v in turn.items()}).items():
                less = amount * rates[id(next(iter(turn[name].parts.values())))]
                if less:
                    turn[name].write(found, (found.sigma - less).clamp_min(0))

    def _cut(self, views: Sequence[View], t: int) -> None:
        """Drop the smallest singular values, with no more of the energy than the schedule allows."""
        assert self.energy_ratio is not None
        energy = self.between(1.0, self.energy_ratio)(t)
        for turn in one_by_one(views):
            for name, found in spectra({name: v.matrices() for name, v in turn.items()}).items():
                rank = rank_from_energy(tails(found.sigma), energy)
                if bool(found.sigma[..., rank:].any()):
                    ranks = torch.arange(found.sigma.shape[-1], device=found.sigma.device)
                    turn[name].write(found, found.sigma.where(ranks < rank, 0))
        self._cut_at = t + 1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the matrices; wait for an input that the factorized copy may need."""
        self.factorized = None
        if self.factorize is not None:
            self._example.start(pl_module, self._undo)
        super().on_fit_start(trainer, pl_module)

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave truncated what training that was stopped has moved since."""
        if self.kind == "truncate" and 0 < self.steps != self._cut_at and self.steps > self.span[0]:
            self._cut(self._views, self.steps - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Factorize a copy."""
        if self.factorize is None:
            return
        example = self._example.value(trainer, pl_module)
        part = part_of(pl_module, self.attribute, type(self).__name__)
        try:
            result = compress(finalize(part), self.factorize, example_input=example)
        except Exception as error:  # whatever it is: raising would end a program whose training has succeeded
            rank_zero_warn(f"LowRankRegularization makes no factorized copy: {error}")
            return
        self.factorized = result.model
        rank_zero_info(
            f"LowRankRegularization: factorized {len(result.plan[0].layers)} layers, "
            f"{result.before.params:,} -> {result.after.params:,} parameters."
        )

    def _release(self) -> None:
        super()._release()
        self._views = []
        self._example = self._new_example()

    # -- logging -----------------------------------------------------------------------------------------------

    @property
    def logged(self) -> tuple[str, ...]:
        """A named instance has tags of its own."""
        return () if self.name else ("penalty", "effective_rank")

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """Penalty and effective ranks of the weights as they are now."""
        found = spectra({view.name: view.matrices() for view in self._views})
        ranks = {name: float(entropy_rank(s.sigma).mean()) for name, s in found.items()}
        totals = {"effective_rank": sum(ranks.values()) / len(ranks)}
        if self.kind == "orthogonality":
            halves = [v.halves() for v in self._views if isinstance(v, PairView)]
            values = [orthogonality(b, a)[0] for a, b in halves]
        else:
            values = [self.rule(s.sigma)[0] for s in found.values()]
        if self.kind != "truncate":
            strength = self.strength_at(max(self.steps - 1, 0))
            totals["penalty"] = strength * sum(float(v.sum()) for v in values)
        return totals, {f"effective_rank/{name}": rank for name, rank in ranks.items()}

    # -- resume ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the scheme that each weight was given."""
        return super().state_dict() | {"schemes": dict(self._schemes), "cut_at": self._cut_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        self._schemes, self._cut_at = dict(state_dict["schemes"]), int(state_dict["cut_at"])


def _no_loss(sigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(sigma[..., 0]), torch.zeros_like(sigma)


_RULES = PENALTIES | dict.fromkeys(
    ("orthogonality", "truncate"), _no_loss
)  # two are no functions of sigma alone
