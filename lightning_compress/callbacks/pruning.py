"""Prune along a schedule while training: zeros are held exactly, through checkpoints, averaging and resume."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.callbacks.base import loss_scale, unowned, updated_by
from lightning_compress.callbacks.masked import MaskingCallback
from lightning_compress.callbacks.observed import TrainingStats
from lightning_compress.callbacks.regrowth import Regrowth
from lightning_compress.names import name_of
from lightning_compress.pruning.criteria import criterion
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.tables import reasons
from lightning_compress.targets import Target, survey


class ScheduledPruning(MaskingCallback):
    r"""Raise the sparsity along a schedule during ``Trainer.fit``, then hold the zeros and let the rest heal.

    ``s(t) = start + (target - start) f(clip((t - begin) / (end - begin), 0, 1))``, with t the number of optimizer
    steps that really happened (accumulated micro-batches are one step, steps skipped by AMP do not count, several
    optimizers count once). After step t the masks are recomputed when ``(t - begin) mod every = 0`` and at
    ``end``; then they stay.

    The module keeps its Parameters, keys and order: masks live in the callback's state, zeros are written in place
    after every optimizer step, the gradient and the optimizer's moments of masked entries are zero. Every
    checkpoint has its zeros and loads without this library.

    With ``regrow`` the masks move instead, at constant sparsity from the first step to the last (dynamic sparse
    training): at each of those steps every layer gives up the share ``a(t) = regrow_share (1 - f(p(t)))`` of its kept
    entries, those with the smallest ``|w|``, and takes as many others, which start at zero. With the default schedule,
    "cosine" from the first step on, ``a(t) = regrow_share / 2 (1 + cos(pi t / end))`` as in the paper.

    Args:
        transform: what to prune; or give the options of ``lightning_compress.Prune`` directly.
        schedule: "constant", "linear", "cubic", "polynomial", "cosine", "exponential", a mapping of steps, a
            function of progress, or its import path; None is "cubic", and "cosine" with ``regrow``.
        start: sparsity before ``begin``, in [0, 1).
        begin: first point of the schedule; None is 0.1 of training, and its beginning with ``regrow``.
        end: last point; from then on the sparsity is the target's, and the masks stay.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        every: optimizer steps between mask updates.
        regrow: None; "gradient", entries come where the loss gradient is largest (RigL); or "random" (SET).
        regrow_share: largest share of a layer's kept entries that is exchanged at once, in (0, 1].
        distribution: with ``regrow``, what each layer keeps: "erk" (more of small layers), "uniform", or None, as the
            ranking by ``criterion`` and ``scope`` says.
        rewind: after every update set the kept weights back to what they were at the first step (lottery ticket).
        protect_schedule: hold early stopping back until ``end``.
        gate: name of a validation metric; logs ``compress/at_target/<gate>``, infinite before ``end``, so that
            "best" means best at target.
        name: distinguishes several instances; their tags are ``compress/<name>/...``.
        prune_options: options of ``lightning_compress.Prune``: sparsity, criterion, scope, include, exclude …

    Raises:
        ValueError: an option outside its range, or a schedule that ends before it begins.
        MisconfigurationException: nothing to prune, masks in the checkpoint that fit no layer, a wrong place in
            the callback list, or fractions of a training without a known length.

    Examples:
        >>> callback = ScheduledPruning(sparsity=0.9, begin=0.1, end=0.7)
        >>> callback.transform.sparsity
        0.9
        >>> ScheduledPruning(sparsity=0.9, regrow="gradient", distribution="erk", criterion="random").schedule
        'cosine'

    Source: Zhu & Gupta 2017, To Prune or Not to Prune (cubic schedule); Frankle & Carbin 2019 (rewinding); Evci et al.
    2020, Rigging the Lottery (RigL, ERK); Mocanu et al. 2018 (SET).
    """

    def __init__(
        self,
        transform: Prune | None = None,
        *,
        schedule: str | dict[float, float] | None = None,
        start: float = 0.0,
        begin: float | None = None,
        end: float = 0.7,
        unit: str = "fraction",
        every: int = 50,
        regrow: str | None = None,
        regrow_share: float = 0.3,
        distribution: str | None = None,
        rewind: bool = False,
        protect_schedule: bool = False,
        gate: str | None = None,
        name: str | None = None,
        **prune_options: Any,
    ) -> None:
        if schedule is None:
            schedule = "cosine" if regrow else "cubic"
        if begin is None:
            begin = 0.0 if regrow else 0.1
        super().__init__(
            schedule=schedule,
            begin=begin,
            end=end,
            unit=unit,
            every=every,
            protect_schedule=protect_schedule,
            gate=gate,
            name=name,
        )
        options = Prune(**prune_options)
        if transform is not None and not isinstance(transform, Prune):
            raise TypeError(
                f"ScheduledPruning({transform!r}): the first argument is a Prune; for a share of zeros give "
                f"sparsity={transform!r}."
            )
        if (
            transform is not None and options != Prune()
        ):  # a configuration file gives every option its default
            raise ValueError(f"give either transform= or its options, not both: {sorted(prune_options)}.")
        self.transform = options if transform is None else transform
        if not 0 <= start < 1:
            raise ValueError(f"start={start}: allowed is 0 <= start < 1.")
        self.start, self.rewind = start, rewind
        self.regrow, self.regrow_share, self.distribution = regrow, regrow_share, distribution
        self._regrowth = (
            None if regrow is None else Regrowth(regrow, regrow_share, distribution, self.transform)
        )
        self._check_regrowth()
        needs = getattr(criterion(self.transform.criterion, self.transform.seed), "needs", ())
        self._stats = TrainingStats(needs, name_of(self.transform.criterion)) if needs else None
        self._shares: dict[str, float] = {}  # parameter name -> final sparsity
        self._initial: dict[str, Tensor] = {}  # for rewind

    def _check_regrowth(self) -> None:
        """Refuse options that mean something only with, or only without, ``regrow``."""
        if self._regrowth is None and self.distribution is not None:
            raise ValueError(
                f"distribution={self.distribution!r} needs regrow=: without it, scope says what is ranked together."
            )
        if self._regrowth is not None and (self.start or self.rewind):
            option = "start" if self.start else "rewind"
            raise ValueError(
                f"{option}= has no meaning with regrow=: sparsity is constant, and what comes is zero."
            )
        if self._regrowth is not None and self.shape(0.0) >= 1:
            raise ValueError(
                f"schedule={name_of(self.schedule)!r} is at its end at once, so regrow= would exchange nothing: take "
                "'cosine', or another one that goes from 0 to 1."
            )

    def target_sparsity(self, t: int | None = None) -> float:
        """What the schedule asks for.

        Args:
            t: optimizer step; the last step at which masks were due if None.

        Returns:
            Sparsity in [0, 1), averaged over the targets by size.
        """
        t = self.last_due(self.steps) if t is None else t
        sizes = {key: self.masks[key].numel() for key in self._shares if key in self.masks}
        asked = self._asked(t)
        return sum(asked[key] * size for key, size in sizes.items()) / max(sum(sizes.values()), 1)

    def _asked(self, t: int) -> dict[str, float]:
        """Sparsity of every target at step t."""
        if self._regrowth is not None:
            return self._shares
        return {key: self.between(min(self.start, share), share)(t) for key, share in self._shares.items()}

    # -- fit ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets (everything is built by now), take over masks, follow the optimizers."""
        targets, skipped = self._find(trainer, pl_module)
        self._held.start(targets, self.transform.present_mask)
        if self._stats is not None:
            self._undo += self._stats.start(targets)
            if not trainer.is_global_zero:
                self._stats.reset()  # a checkpoint has the sums of all processes, which go to one
        if self.rewind and not self._initial:
            self._initial = {t.key: t.weight.detach().cpu().clone() for t in targets}
        super().on_fit_start(trainer, pl_module)
        entries = sum(t.weight.numel() for t in targets)
        rank_zero_info(
            f"ScheduledPruning: {len(targets)} weights with {entries:,} entries.{reasons(skipped)}"
        )

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[Target], dict[str, str]]:
        """The weights to prune, and why the others are not; what goes with their channels."""
        found = survey(pl_module, self.transform.include, self.transform.exclude)
        self._shares, skipped = self.transform.shares(found.targets)
        skipped |= found.skipped
        targets = [t for t in found.targets if t.key in self._shares]
        updated = updated_by(*trainer.optimizers)
        lost = unowned([t.key for t in targets if id(t.weight) not in updated])
        plugin, x = trainer.precision_plugin, pl_module.example_input_array
        with plugin.forward_context():
            x = None if x is None else plugin.convert_input(x)
            if self._stats is not None:
                lost |= self._stats.refusals(pl_module, targets, x)
            targets = [t for t in targets if t.key not in lost]
            skipped |= lost | self._silent.find(pl_module, targets, x, self.transform)
        self._shares = {t.key: self._shares[t.key] for t in targets}
        if not targets:
            raise MisconfigurationException(
                f"ScheduledPruning found nothing to prune with include={self.transform.include!r}:"
                f"{reasons(skipped) or ' the module has no weights.'}"
            )
        return targets, skipped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the schedule, and at constant sparsity with the first masks."""
        if self._regrowth is not None and self._span is None:
            self._held.move(self._regrowth.start(pl_module, self._held.targets, self._shares), trainer)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen to the layers while an update lies ahead."""
        if self._stats is not None:
            self._stats.listening = self._update_ahead

    @property
    def _update_ahead(self) -> bool:
        """Whether the next update takes in what the present batch shows."""
        return self._span is not None and self.span[0] - self.every <= self.steps < self.span[1]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradients that a rule or a criterion needs, then zero those of masked entries."""
        if self._regrowth is not None and self._span is not None and self.due(self.steps + 1):
            self._regrowth.see(self._held.owned(optimizer))
        if self._stats is not None and self._update_ahead:
            self._stats.see(self._held.owned(optimizer), loss_scale(trainer, optimizer))
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Hold the zeros; the gradients of the step count."""
        super().after_step(trainer, optimizer)
        if self._stats is not None:
            self._stats.stepped(self._held.owned(optimizer))

    @torch.no_grad()
    def update(self, trainer: Trainer) -> None:
        """Go over to the masks of the present step: the one place where they move."""
        if self._stats is not None:
            self._stats.gather(trainer)
        if self.steps or (
            self._stats is None and self._regrowth is None
        ):  # these look at steps that were made
            self._held.move(self._masks_now(trainer), trainer)
            self._silent.follow(self._held, trainer)
        if self._stats is not None:
            self._stats.reset()
        for target in self._held.targets if self.rewind else ():
            target.weight.copy_(self._initial[target.key].to(target.weight.device))
        if self.rewind:
            self.hold()

    def _masks_now(self, trainer: Trainer) -> dict[str, Tensor]:
        """What the rule says at the present step; only rank zero has the statistics, and its masks are everyone's."""
        targets = self._held.targets
        if self._regrowth is not None:
            share = self.between(self._regrowth.share, 0.0)(self.steps)
            return self._regrowth.masks(targets, self.masks, share, self.steps)
        if self._stats is not None and not trainer.is_global_zero:
            return self.masks
        measured = None if self._stats is None else self._stats.stats()
        scores, _ = self.transform.scores(trainer.lightning_module, targets, measured=measured)
        return self.transform.masks(targets, scores, self.masks, self._asked(self.steps))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave zeros and masks on the layers, log the end state, and say when the target was not reached."""
        super().on_train_end(trainer, pl_module)
        if not self.finished and self._regrowth is None:
            rank_zero_warn(
                f"training stopped at optimizer step {self.steps}, before the pruning schedule ends at step "
                f"{self.span[1]}: sparsity is {self.sparsity:.4f}, asked for was "
                f"{self.target_sparsity(self.span[1]):.4f}. Train longer, lower end=, or set protect_schedule=True."
            )

    def _release(self) -> None:
        super()._release()
        if self._stats is not None:
            self._stats.stop()

    def _quantities(self) -> dict[str, float]:
        regrown = {} if self._regrowth is None else {"regrown": self._regrowth.regrown}
        return super()._quantities() | regrown

    # -- resume ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The saved weights have their zeros; statistics are those of all processes."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._stats is not None and trainer.world_size > 1:
            self._stats.gather(trainer)
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Masks, counters, what was measured since the last update."""
        state = super().state_dict() | {"shares": dict(self._shares), "initial": dict(self._initial)}
        state |= {} if self._regrowth is None else {"regrowth": self._regrowth.state_dict()}
        return state | ({} if self._stats is None else {"stats": self._stats.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        self._shares, self._initial = dict(state_dict["shares"]), dict(state_dict["initial"])
        if self._regrowth is not None and "regrowth" in state_dict:
            self._regrowth.load_state_dict(state_dict["regrowth"])
        if self._stats is not None and "stats" in state_dict:
            self._stats.load_state_dict(state_dict["stats"])
