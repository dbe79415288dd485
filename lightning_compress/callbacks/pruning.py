"""Prune along a schedule while training: zeros are held in place, exactly, through checkpoints, averaging and resume."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress import codes
from lightning_compress.callbacks.base import CompressionCallback, logged_step
from lightning_compress.functional.masks import apply_mask_, pack_bits, unpack_bits
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.schedules import Schedule, shape, to_steps
from lightning_compress.tables import reasons
from lightning_compress.targets import Target, clean, survey


class ScheduledPruning(CompressionCallback):
    r"""Raise the sparsity along a schedule during ``Trainer.fit``, then hold the zeros and let the rest heal.

    ``s(t) = start + (end - start) f(clip((t - begin) / (end - begin), 0, 1))``, with t the number of optimizer steps that really
    happened (accumulated micro-batches are one step, steps skipped by AMP do not count, several optimizers count once). After step t the
    masks are recomputed when ``(t - begin) mod every = 0`` and at ``end``; then they stay.

    The module keeps its Parameters, keys and order: masks live in the callback's state, zeros are written in place after every optimizer
    step, the gradient and the optimizer's moments of masked entries are zero. Every checkpoint has its zeros and loads without this library.

    Args:
        transform: what to prune; or give the options of :class:`lightning_compress.Prune` directly.
        schedule: "constant", "linear", "cubic", "polynomial", "cosine", "exponential", a mapping of steps, a function of progress, or its
            import path.
        start: sparsity before ``begin``, in [0, 1).
        begin: first point of the schedule.
        end: last point; from then on the sparsity is the target's.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        every: optimizer steps between mask updates.
        rewind: after every update set the kept weights back to what they were at the first step (lottery ticket).
        protect_schedule: hold early stopping back until ``end``.
        gate: name of a validation metric; logs ``compress/at_target/<gate>``, infinite before ``end``, so that "best" means best at target.
        name: distinguishes several instances.
        prune_options: options of :class:`lightning_compress.Prune`: sparsity, criterion, scope, include, exclude …

    Raises:
        ValueError: an option outside its range, or a schedule that ends before it begins.
        MisconfigurationException: nothing to prune, masks in the checkpoint that fit no layer, a wrong place in the callback list, or
            fractions of a training without a known length.

    Example:
        >>> callback = ScheduledPruning(sparsity=0.9, begin=0.1, end=0.7)
        >>> callback.transform.sparsity
        0.9

    Source: Zhu & Gupta 2017, To Prune or Not to Prune (cubic schedule); Frankle & Carbin 2019 (rewinding).
    """

    changes_weights: ClassVar[bool] = True

    def __init__(
        self,
        transform: Prune | None = None,
        *,
        schedule: str | dict[float, float] = "cubic",
        start: float = 0.0,
        begin: float = 0.1,
        end: float = 0.7,
        unit: str = "fraction",
        every: int = 50,
        rewind: bool = False,
        protect_schedule: bool = False,
        gate: str | None = None,
        name: str | None = None,
        **prune_options: Any,
    ) -> None:
        super().__init__(name)
        if transform is not None and prune_options:
            raise ValueError(f"give either transform= or its options, not both: {sorted(prune_options)}.")
        self.transform = transform if transform is not None else Prune(**prune_options)
        if not 0 <= start < 1:
            raise ValueError(f"start={start}: allowed is 0 <= start < 1.")
        if every < 1:
            raise ValueError(f"every={every}: allowed is >= 1 optimizer steps.")
        if end < begin:
            raise ValueError(f"the schedule ends (end={end}) before it begins (begin={begin}): set begin <= end.")
        for value, option in ((begin, "begin"), (end, "end")):
            to_steps(value, unit, total=1, per_epoch=1, name=option)
        self.shape = shape(schedule)
        self.schedule, self.start, self.begin, self.end, self.unit, self.every = schedule, start, begin, end, unit, every
        self.rewind, self.protect_schedule, self.gate = rewind, protect_schedule, gate
        self.masks: dict[str, Tensor] = {}  # parameter name -> True = kept
        self._shares: dict[str, float] = {}  # parameter name -> final sparsity
        self._counts: list[int] = []  # real steps of every optimizer
        self._span: tuple[int, int] | None = None  # (begin, end) in optimizer steps
        self._initial: dict[str, Tensor] = {}  # for rewind
        self._kept = 0
        self._forget()

    def _forget(self) -> None:
        """Drop the references into a running fit."""
        self._targets: list[Target] = []
        self._owned: list[list[Target]] = []
        self._hooked: list[Optimizer] = []

    def __getstate__(self) -> dict[str, Any]:
        """Options, masks and counters; never the model, its optimizers or the trainer."""
        return super().__getstate__() | {"_targets": [], "_owned": [], "_hooked": []}

    # -- what it is at ---------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps that really happened, t."""
        return max(self._counts, default=0)

    @property
    def finished(self) -> bool:
        """Whether the schedule has reached its end."""
        return self._span is not None and self.steps >= self._span[1]

    @property
    def sparsity(self) -> float:
        """Share of masked entries among the targets, each counted once."""
        total = sum(m.numel() for m in self.masks.values())
        return 1.0 - self._kept / total if total else 0.0

    def target_sparsity(self, t: int | None = None) -> float:
        """What the schedule asks for.

        Args:
            t: optimizer step; the last step at which masks were due if None.

        Returns:
            Sparsity in [0, 1), averaged over the targets by size.
        """
        t = self._last_due(self.steps) if t is None else t
        sizes = {key: self.masks[key].numel() for key in self._shares if key in self.masks}
        total = sum(sizes.values())
        return sum(self._schedule(self._shares[key])(t) * size for key, size in sizes.items()) / total if total else 0.0

    def _schedule(self, share: float) -> Schedule:
        begin, end = self._span or (0, 0)
        return Schedule(self.shape, begin, end, min(self.start, share), share)

    def _due(self, t: int) -> bool:
        begin, end = self._span or (0, 0)
        return begin <= t <= end and ((t - begin) % self.every == 0 or t == end)

    def _last_due(self, t: int) -> int:
        begin, end = self._span or (0, 0)
        if t < begin or t >= end:
            return t
        return t - (t - begin) % self.every

    # -- fit -------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets (everything is built by now), take over masks, hook the optimizers."""
        self._forget()
        found = survey(pl_module, self.transform.include, self.transform.exclude)
        self._shares, skipped = self.transform.shares(found.targets)
        skipped |= found.skipped
        updated = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        for target in found.targets:
            if target.key in self._shares and id(target.weight) in updated:
                self._targets.append(target)
            else:
                self._shares.pop(target.key, None)
                skipped.setdefault(target.key, "no optimizer updates it (frozen, or not returned by configure_optimizers)")
        if not self._targets:
            raise MisconfigurationException(
                f"ScheduledPruning found nothing to prune with include={self.transform.include!r}:"
                f"{reasons(skipped) or ' the module has no weights.'}"
            )
        lost = self.masks.keys() - {t.key for t in self._targets}
        if lost:
            raise MisconfigurationException(
                f"the checkpoint has masks for {sorted(lost)}, which this module does not train: "
                "resume with the model and the include/exclude patterns it was written with."
            )
        for target in self._targets:
            self._check_mask(target)
        self._kept = sum(int(m.sum()) for m in self.masks.values())
        self._apply(self._targets)
        if self.rewind and not self._initial:
            self._initial = {t.key: t.weight.detach().cpu().clone() for t in self._targets}
        self._hook(trainer)
        n = sum(t.weight.numel() for t in self._targets)
        rank_zero_info(f"ScheduledPruning: {len(self._targets)} weights with {n:,} entries; {len(skipped)} parameters are left alone.")

    def _check_mask(self, target: Target) -> None:
        """Take the mask from the checkpoint, else from an earlier compression, else everything."""
        weight = target.weight
        mask = self.masks.get(target.key)
        if mask is None:
            mask = self.transform.present_mask(target)
        if mask.shape != weight.shape:
            raise MisconfigurationException(
                f"the checkpoint's mask of {target.key} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}: "
                "resume with the model it was written with."
            )
        self.masks[target.key] = mask.to(weight.device)

    def _hook(self, trainer: Trainer) -> None:
        """Follow every optimizer; called again when optimizers were replaced."""
        if [id(o) for o in trainer.optimizers] == [id(o) for o in self._hooked]:
            return
        self._hooked = list(trainer.optimizers)
        self._counts = (self._counts + [0] * len(self._hooked))[: len(self._hooked)]
        self._owned = []
        for index, optimizer in enumerate(self._hooked):
            ids = {id(p) for g in optimizer.param_groups for p in g["params"]}
            self._owned.append([t for t in self._targets if id(t.weight) in ids])
            hook = functools.partial(self._after_step, trainer, index)
            self._undo.append(optimizer.register_step_post_hook(hook).remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule in optimizer steps, once; prune at once when it begins at step zero."""
        if self._span is None:
            self._span = self._resolve(trainer)
            if self.steps == 0 and self._due(0):
                self._update(trainer)
        if self.protect_schedule:
            self._protect(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow optimizers that were replaced."""
        self._hook(trainer)

    def _resolve(self, trainer: Trainer) -> tuple[int, int]:
        """(begin, end) in optimizer steps; the target is trained for at least one step."""
        total = float(trainer.estimated_stepping_batches)
        automatic = trainer.lightning_module.automatic_optimization
        if not automatic and trainer.max_steps != -1:
            total = min(total, math.ceil(trainer.max_steps / len(self._hooked)))  # Lightning counts every optimizer
        per_epoch = math.ceil(trainer.num_training_batches / (trainer.accumulate_grad_batches if automatic else 1))
        begin = to_steps(self.begin, self.unit, total=total, per_epoch=per_epoch, name="begin")
        end = to_steps(self.end, self.unit, total=total, per_epoch=per_epoch, name="end")
        end = end if math.isinf(total) else min(end, max(int(total) - 1, 0))
        return min(begin, end), end

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the gradient of masked entries, so that clipping and the optimizer see what is used."""
        for index, candidate in enumerate(self._hooked):
            if candidate is getattr(optimizer, "optimizer", optimizer):
                for target in self._owned[index]:
                    if target.weight.grad is not None and not target.weight.grad.is_sparse:
                        apply_mask_(target.weight.grad, self.masks[target.key])

    def _after_step(self, trainer: Trainer, index: int, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After every real optimizer step: hold the zeros; when the step is due, move the masks."""
        self._apply(self._owned[index])
        if not self._owned[index]:
            return
        before = self.steps
        self._counts[index] += 1
        if self._span is not None and self.steps > before and self._due(self.steps):
            self._update(trainer)

    def _apply(self, targets: list[Target]) -> None:
        for target in targets:
            apply_mask_(target.weight, self.masks[target.key])

    @torch.no_grad()
    def _update(self, trainer: Trainer) -> None:
        """Recompute the masks for the present step, on rank zero for all."""
        t = self.steps
        scores, _ = self.transform.scores(trainer.lightning_module, self._targets)
        shares = {key: self._schedule(share)(t) for key, share in self._shares.items()}
        masks = self.transform.masks(self._targets, scores, self.masks, shares)
        if trainer.world_size > 1:
            for target in self._targets:
                packed = pack_bits(masks[target.key]).to(target.weight.device)
                shared = trainer.strategy.broadcast(packed, src=0)
                masks[target.key] = unpack_bits(shared, target.weight.shape).to(target.weight.device)
        self.masks = masks
        self._kept = sum(int(m.sum()) for m in masks.values())
        if self.rewind:
            for target in self._targets:
                target.weight.copy_(self._initial[target.key].to(target.weight.device))
        self._apply(self._targets)
        for optimizer in self._hooked:
            for target in self._targets:
                for state in optimizer.state.get(target.weight, {}).values():
                    if isinstance(state, Tensor) and state.shape == target.weight.shape:
                        apply_mask_(state, masks[target.key])  # stale momentum would fight the mask

    # -- what averaging and saving bring back ----------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights surface here: zero them too, so that what is validated is what is saved."""
        self._apply(self._targets)
        for other in trainer.callbacks:
            never = getattr(other, "_latest_update_step", 1) == 0 and getattr(other, "_latest_update_epoch", 0) < 0
            if isinstance(other, WeightAveraging) and never and self.steps and not trainer.sanity_checking:
                rank_zero_warn(
                    f"{type(other).__name__} has not averaged anything yet, so what is validated now are the initial weights, "
                    "not the trained ones."
                )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The saved weights have their zeros, also averaged ones."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        weights = checkpoint["state_dict"]
        for raw in list(weights):
            mask = self.masks.get(clean(raw))
            if mask is not None:
                weights[raw] = weights[raw].detach().clone()
                apply_mask_(weights[raw], mask.to(weights[raw].device))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the zeros and their masks on the layers, log the end state, and say when the target was not reached."""
        for target in self._targets:
            codes.set_mask(target.module, target.param, self.masks[target.key])
        self.log_values(trainer, self._totals())
        if not self.finished:
            begin, end = self._span or (0, 0)
            rank_zero_warn(
                f"training stopped at optimizer step {self.steps}, before the pruning schedule ends at step {end}: sparsity is "
                f"{self.sparsity:.4f}, asked for was {self.target_sparsity(end):.4f}. Train longer, lower end=, or set protect_schedule=True."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo every hook and drop every reference into the run."""
        super().teardown(trainer, pl_module, stage)
        self._forget()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error."""
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    # -- logging ---------------------------------------------------------------------------------------------------------------

    def _totals(self) -> dict[str, float]:
        return {"compress/sparsity": self.sparsity, "compress/target_sparsity": self.target_sparsity()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the totals at the steps at which Lightning logs (straight to the loggers: ``self.log`` costs more than the pruning)."""
        if self.protect_schedule:
            self._keep_going(trainer)
        if trainer.log_every_n_steps and (logged_step(trainer) + 1) % trainer.log_every_n_steps == 0:
            self.log_values(trainer, self._totals())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Totals as metrics that other callbacks can monitor; every layer's sparsity to the loggers."""
        if self.protect_schedule:
            self._keep_going(trainer)
        if not trainer.barebones:
            pl_module.log_dict(self._totals(), logger=False, sync_dist=True)
        self.log_values(
            trainer, {f"compress/sparsity/{t.name or t.param}": 1 - float(self.masks[t.key].float().mean()) for t in self._targets}
        )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the gated metric: infinite until the schedule has ended."""
        if self.gate is None or trainer.sanity_checking or trainer.barebones:
            return
        if self.gate not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"gate={self.gate!r} is not a logged metric; logged are: {', '.join(sorted(trainer.callback_metrics)) or 'none'}."
            )
        value = trainer.callback_metrics[self.gate] if self.finished else torch.tensor(math.inf)
        pl_module.log(f"compress/at_target/{self.gate}", value, sync_dist=True)

    # -- early stopping --------------------------------------------------------------------------------------------------------

    def _protect(self, trainer: Trainer) -> None:
        assert self._span is not None
        loop = trainer.fit_loop.epoch_loop
        self._undo.append(functools.partial(setattr, loop, "min_steps", loop.min_steps))
        loop.min_steps = max(loop.min_steps or 0, (self._span[1] + 1) * len(self._hooked))

    def _keep_going(self, trainer: Trainer) -> None:
        if not self.finished:
            trainer.should_stop = False
            for callback in trainer.callbacks:
                if isinstance(callback, EarlyStopping):
                    callback.wait_count = 0

    # -- resume ----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (eight entries a byte), counters and the schedule: tensors, numbers, strings, lists and dicts only."""
        return super().state_dict() | {
            "version": 1,
            "counts": list(self._counts),
            "span": list(self._span) if self._span else [],
            "shares": dict(self._shares),
            "masks": {key: pack_bits(mask) for key, mask in self.masks.items()},
            "shapes": {key: list(mask.shape) for key, mask in self.masks.items()},
            "initial": dict(self._initial),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        self._counts = [int(c) for c in state_dict["counts"]]
        self._span = (int(state_dict["span"][0]), int(state_dict["span"][1])) if state_dict["span"] else None
        self._shares = dict(state_dict["shares"])
        self._initial = dict(state_dict["initial"])
        self.masks = {key: unpack_bits(packed, state_dict["shapes"][key]) for key, packed in state_dict["masks"].items()}
        self._kept = sum(int(m.sum()) for m in self.masks.values())
