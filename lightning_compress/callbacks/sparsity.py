"""Penalties that make weights, channels or activations small while training, so that pruning costs little."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.base import log_due, unowned
from lightning_compress.callbacks.grouped import Grouped, batchnorm_scales, stacks
from lightning_compress.callbacks.growing import Growth
from lightning_compress.callbacks.outputs import Outputs, forget_compiled, layers_of
from lightning_compress.callbacks.penalized import PenalizingCallback, with_options
from lightning_compress.functional import activity, sparsity
from lightning_compress.functional.groups import PerGroup
from lightning_compress.functional.layouts import Layout, grouping_of
from lightning_compress.functional.masks import pack_bits, unpack_bits
from lightning_compress.names import clean, name_of
from lightning_compress.schedules import constant
from lightning_compress.tables import listing
from lightning_compress.targets import Patterns, own_parameters, survey

_ON = ("weight", "batchnorm_scale")
_PROXIMAL = ("l1", "group_lasso")
_BY_ENTRY = ("l1", "l2", "scad", "growing")  # groups make no difference to the value
_INSIDE = ("hoyer", "l1_l2_intra")  # need several entries in a group
_BETWEEN = ("l1_l2_inter", "growing")  # need several groups


class SparsityRegularization(PenalizingCallback):
    r"""Make weights, channels or activations small while training: ``loss + strength(t) P``.

    With w_g a group of m_g entries (``grouping``), and P added up over layers:

    - kind="l1", "l2": ``sum |w|``, ``sum |w|^2``
    - kind="group_lasso": ``sum_g sqrt(m_g) |w_g|_2``, which empties whole groups
    - kind="l1_l2_intra": ``mean_g |w_g|_1 / |w_g|_2``, few large entries in every group (option ``squared``)
    - kind="l1_l2_inter": ``|v|_1 / |v|_2`` with ``v_g = |w_g|_2``, few large groups (option ``squared``)
    - kind="hoyer": ``mean_g 1 - (sqrt(m_g) - |w_g|_1 / |w_g|_2) / (sqrt(m_g) - 1)``
    - kind="scad": ``sum rho(|w|)``, which leaves large entries alone (options ``lam``, ``a``)
    - kind="growing": ``sum |w|^2`` over the ``share`` of the groups of every layer whose mean |w| is lowest when it
      begins; the strength grows by ``step`` every ``interval`` optimizer steps, up to ``ceiling``
    - kind="activation_l1", "activation_l2": ``mean |a|``, ``mean |a|^2`` of the outputs of layers
    - kind="activation_l1_l2": ``|v|_1 / |v|_2`` with v_c the norm of channel c of the outputs (options ``norm``,
      ``channel_axis``)

    The gradient of weights is added once per optimizer step, to unscaled gradients before they are clipped; that of
    activations joins the backward pass of every batch, so that the update is that of ``loss + strength P``. Moduli
    stand for complex entries; a group of norm 0 has the gradient 0. The module keeps its Parameters and keys.

    It logs ``compress/penalty`` (strength times P) and ``compress/near_zero``: the share of groups whose mean |w| is at
    most 1 % of the layer's mean (of activations: of entries, or channels); for every epoch also
    ``compress/near_zero/<layer>``.

    Args:
        kind: a name from above, or a function (or its import path) ``u [.., n] -> P [..], dP/du [.., n]`` of the
            magnitudes of one group, whose values are added up.
        strength: lambda >= 0.
        on: "weight", or "batchnorm_scale" (gamma, each entry one channel).
        grouping: what is one group: "channel" (of the output), "input", "element", "row" (as of ``Prune``), "layer", or
            ``PerGroup(n)``, also "per_group:N". For l1, l2 and scad it only says what near_zero counts.
        schedule: of the strength, from 0 at ``begin``: "constant", "linear", "cubic", "cosine" …
        begin: when to start.
        end: when the schedule has reached the strength.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        every: act on every so many optimizer steps, with ``strength * every``.
        proximal: for l1 and group_lasso: after the step ``w <- w max(1 - lr strength every / |w|, 0)``, of groups
            ``w_g <- w_g max(1 - lr strength every sqrt(m_g) / |w_g|_2, 0)``, in place of the gradient. Zeros are exact.
        include: patterns of layer names to take; of activations also layers without weights.
        exclude: patterns of layer names to leave.
        name: distinguishes several instances; their tags are ``compress/<name>/...``.
        options: options of the kind.

    Raises:
        ValueError: an option outside its range, an unknown kind, or options that it does not take.
        MisconfigurationException: nothing to penalize, a place behind ScheduledPruning in the callback list, a strategy
            that shards weights, a sparse gradient.

    Examples:
        >>> from lightning_compress.callbacks.sparsity import SparsityRegularization
        >>> SparsityRegularization("growing", 1e-4, share=0.5, step=1e-4, ceiling=0.1, begin=0.1).kind
        'growing'

    Source: Tibshirani 1996 (l1); Yuan & Lin 2006 (group lasso); Hoyer 2004; Yang et al. 2020, DeepHoyer; Fan & Li 2001
    (SCAD); Liu et al. 2017, Network Slimming (batchnorm_scale); Wang et al. 2021, Neural Pruning via Growing
    Regularization (growing, GReg-1); Georgiadis 2019 (activations).
    """

    def __init__(
        self,
        kind: str | Callable[..., tuple[Tensor, Tensor]] = "l1",
        strength: float = 1e-4,
        *,
        on: str = "weight",
        grouping: str | PerGroup = "channel",
        schedule: str | dict[float, float] = "constant",
        begin: float = 0.0,
        end: float = 1.0,
        unit: str = "fraction",
        every: int = 1,
        proximal: bool = False,
        include: Patterns = "*",
        exclude: Patterns = (),
        name: str | None = None,
        **options: Any,
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
        if on not in _ON:
            raise ValueError(f"on={on!r} is unknown; allowed: {', '.join(_ON)}.")
        if proximal and kind not in _PROXIMAL:
            raise ValueError(
                f"proximal=True with kind={name_of(kind)!r}: allowed is kind={' or '.join(_PROXIMAL)}."
            )
        self.kind, self.on, self.grouping = kind, on, grouping_of(grouping)
        self.proximal, self.options = proximal, dict(options)
        self.of_activations = isinstance(kind, str) and kind in activity.PENALTIES
        self.growth: Growth | None = None
        self.rule: Callable[..., Any] = self._rule()
        if self.of_activations and on != "weight":
            raise ValueError(f"on={on!r} with kind={name_of(kind)!r}, which concerns outputs: leave on= out.")
        if self.growth is not None and (self.shape is not constant or strength > self.growth.ceiling):
            raise ValueError(
                f"kind='growing' with schedule={schedule!r}, strength={strength}: it grows from strength up to "
                f"ceiling={self.growth.ceiling} by itself; allowed is schedule='constant' and strength <= ceiling."
            )
        self._pushed: dict[str, Tensor] = {}  # parameter -> packed mask of what growing is to empty
        self._forget()

    def _rule(self) -> Callable[..., Any]:
        """P with its options, tried out so that it refuses values."""
        if self.kind == "growing":
            self.growth = with_options(self.kind, {"growing": Growth}, self.options, given=0)()
            return sparsity.l2
        known = sparsity.PENALTIES | activity.PENALTIES
        rule = with_options(self.kind, known | {"growing": Growth}, self.options)
        if self.of_activations:
            rule(torch.ones([1] * 8))
        elif isinstance(self.kind, str) and self.kind in known:
            rule([torch.ones(1, 2)])
        else:
            rule(torch.ones(1, 2))
            return functools.partial(sparsity.within, rule)
        return rule

    def _forget(self) -> None:
        """Drop the references into a run."""
        self._weights: dict[str, Grouped] = {}
        self._masks: dict[str, Tensor] = {}
        self._layers: dict[str, nn.Module] = {}
        self._updated: dict[str, nn.Parameter] = {}
        self._outputs: Outputs | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Options and own state; nothing of a running fit."""
        kept = super().__getstate__()
        return kept | {"_weights": {}, "_masks": {}, "_layers": {}, "_updated": {}, "_outputs": None}

    @property
    def in_loss(self) -> bool:
        """Proximal steps come after the step, activations are penalized on the way back."""
        return not self.proximal and not self.of_activations

    def strength_at(self, t: int) -> float:
        """The strength of the step that follows t others; growing has a course of its own."""
        if self.growth is None:
            return super().strength_at(t)
        since = t - self.span[0]
        return self.growth.strength(self.strength, since) if since >= 0 else 0.0

    # -- what is penalized -------------------------------------------------------------------------------------

    def find(self, pl_module: LightningModule, updated: Collection[int]) -> dict[str, str]:
        """Weights, scales of BatchNorm, or layers with outputs."""
        self._forget()
        if self.of_activations:
            self._layers = layers_of(pl_module, self.include, self.exclude)
            self._updated = {clean(k): p for k, p in own_parameters(pl_module) if id(p) in updated}
            return {}
        if self.on == "weight":
            found = survey(pl_module, self.include, self.exclude)
        else:
            found = batchnorm_scales(pl_module, self.include, self.exclude)
        skipped = dict(found.skipped)
        for target in found.targets:
            weight = Grouped.of(target, self.grouping)
            why = self._useless(weight.layout)
            if id(target.weight) not in updated:
                skipped |= unowned([target.key])
            elif why:
                skipped[target.key] = why
            else:
                self._weights[target.key] = weight
        self._masks = {key: self._unpacked(key) for key in self._weights if key in self._pushed}
        return skipped

    def _useless(self, layout: Layout) -> str:
        """Why a penalty would be constant with these groups."""
        groups, entries = sum(g for g, _ in layout.counts), max(n for _, n in layout.counts)
        if self.kind in _INSIDE and entries == 1:
            return f"its groups have one entry each, for which {self.kind} is constant: try grouping='layer'"
        if self.kind in _BETWEEN and groups == 1:
            return f"it is one group, and {self.kind} needs several"
        return ""

    def _unpacked(self, key: str) -> Tensor:
        weight, packed = self._weights[key].weight, self._pushed[key]
        if packed.numel() != -(-weight.numel() // 8):
            raise MisconfigurationException(
                f"the checkpoint chose groups of {key}, which now has another shape ({tuple(weight.shape)}): resume "
                "with the model it was written with."
            )
        return unpack_bits(packed, weight.shape).to(weight.device)

    @property
    def penalized(self) -> Mapping[str, nn.Parameter]:
        """The weights; for activations, everything that is trained."""
        if self.of_activations:
            return self._updated if self._layers else {}
        return {key: weight.weight for key, weight in self._weights.items()}

    @property
    def concerned(self) -> str:
        """What is penalized, in words."""
        return f"outputs of {len(self._layers)} layers" if self.of_activations else super().concerned

    def _stacks(self, keys: Collection[str]) -> Iterator[tuple[list[str], Layout, Tensor]]:
        """Names, groups and values [L, *shape] of weights as the penalty takes them."""
        for members, layout, weights in stacks({key: self._weights[key] for key in keys}):
            if self.growth is not None:
                none = torch.zeros(layout.shape, dtype=torch.bool, device=weights.device)
                weights = weights * torch.stack([self._masks.get(key, none) for key in members])
            yield members, layout.whole() if self.kind in _BY_ENTRY else layout, weights

    # -- fit ---------------------------------------------------------------------------------------------------

    def gradients(self, owned: Collection[int]) -> dict[str, Tensor]:
        """dP/dw by weight."""
        keys = [key for key, w in self._weights.items() if id(w.weight) in owned]
        if self.growth is not None:
            self._choose(keys, self.growth.share)
        found: dict[str, Tensor] = {}
        for members, layout, weights in self._stacks(keys):
            gradient = sparsity.penalty(weights, layout, self.rule)[1]
            found |= dict(zip(members, gradient.unbind(), strict=True))
        return found

    def _choose(self, keys: Collection[str], share: float) -> None:
        """Fix the groups that are to be emptied, once."""
        for key in keys:
            if key not in self._pushed:
                w = self._weights[key]
                self._masks[key] = sparsity.lowest(w.weight.detach(), w.layout, share)
                self._pushed[key] = pack_bits(self._masks[key])

    @torch.no_grad()
    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Shrink entries or groups."""
        if not self.proximal or not self._stepping(optimizer):
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        keys = [k for k, p in self.penalized.items() if id(p) in rates and p.grad is not None]
        amount = self.strength_at(self.steps_of(optimizer)) * self.every
        for members, layout, weights in self._stacks(keys if amount else ()):
            parameters = [self._weights[key].weight for key in members]
            less = torch.tensor([amount * rates[id(p)] for p in parameters], dtype=torch.float64)
            shrunk = sparsity.soft_threshold(weights, layout, less, groups=self.kind == "group_lasso")
            for parameter, values in zip(parameters, shrunk, strict=True):
                parameter.copy_(values)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what to penalize; follow the optimizers, and the layers whose outputs are penalized."""
        super().on_fit_start(trainer, pl_module)
        if self.of_activations:
            by_channel = self.kind == "activation_l1_l2"
            gradient = with_options(self.kind, activity.GRADIENTS, self.options)
            value, slope = (self._at_axis(rule, by_channel) for rule in (self.rule, gradient))
            self._outputs = Outputs(value, slope, by_channel)
            self._undo += self._outputs.listen(self._layers)
            forget_compiled(pl_module)

    def _at_axis(self, rule: Callable[..., Any], by_channel: bool) -> Callable[[Tensor, int], Any]:
        """A rule of (a, channel axis), whether it looks at channels or not; an option goes before what a layer has."""
        given = self.options.get("channel_axis")
        if not by_channel:
            return lambda a, axis: rule(a)
        return lambda a, axis: rule(a, channel_axis=axis if given is None else given)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at outputs from now on."""
        if self._outputs is not None:
            due = self._span is not None and self.due(self.steps) and self.strength_at(self.steps) > 0
            logs = bool(trainer.loggers) and log_due(trainer)
            self._outputs.start(due, counting=logs or trainer.is_last_batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add to the gradients of outputs from now on: as much as if P were a term of this batch's loss."""
        if self._outputs is not None:
            strength = self.strength_at(self.steps) * self.every
            self._outputs.backward(trainer, strength / trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave other gradients alone."""
        if self._outputs is not None:
            self._outputs.backward_done()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and look at no outputs until the next batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        missed = self._outputs.stop() if self._outputs is not None else ()
        if missed:
            rank_zero_warn(
                f"{type(self).__name__}: the first step met no gradient of the outputs of {listing(list(missed))}: "
                "what never runs, or takes no part in the loss, is not penalized."
            )

    def _release(self) -> None:
        super()._release()
        self._forget()

    # -- logging -----------------------------------------------------------------------------------------------

    @property
    def logged(self) -> tuple[str, ...]:
        """A named instance has tags of its own."""
        return () if self.name else ("penalty", "near_zero")

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """Penalty and shares near zero, of the weights as they are now or of the last outputs."""
        strength = self.strength_at(max(self.steps - 1, 0))
        if self._outputs is not None:
            values, shares = self._outputs.measured()
            counts = dict.fromkeys(shares, 1)
        else:
            found = self._stacks(self._weights)
            values = [sparsity.penalty(w, layout, self.rule)[0].sum() for _, layout, w in found]
            sizes = {
                k: torch.cat(sparsity.mean_magnitudes(w.weight, w.layout)) for k, w in self._weights.items()
            }
            shares = {self._weights[k].layer: sparsity.near_zero(size) for k, size in sizes.items()}
            counts = {self._weights[k].layer: len(size) for k, size in sizes.items()}
        layers = {name: float(share) for name, share in shares.items()}
        totals = {"penalty": strength * sum(float(value) for value in values)}
        if layers:
            totals["near_zero"] = sum(layers[n] * counts[n] for n in layers) / sum(counts.values())
        return totals, {f"near_zero/{name}": share for name, share in layers.items()}

    # -- resume ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the groups that growing is to empty."""
        return super().state_dict() | {"pushed": dict(self._pushed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        self._pushed = dict(state_dict["pushed"])
