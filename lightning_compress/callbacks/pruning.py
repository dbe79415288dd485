"""Prune along a schedule while training: zeros are held exactly, through checkpoints, averaging and resume."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress import codes
from lightning_compress.callbacks.base import log_due, logged_step, unowned, updated_by
from lightning_compress.callbacks.scheduled import ScheduledCallback
from lightning_compress.functional.masks import apply_mask_, pack_bits, unpack_bits
from lightning_compress.names import clean, name_of
from lightning_compress.pruning.criteria import criterion
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.tables import reasons
from lightning_compress.targets import Target, survey


class ScheduledPruning(ScheduledCallback):
    r"""Raise the sparsity along a schedule during ``Trainer.fit``, then hold the zeros and let the rest heal.

    ``s(t) = start + (target - start) f(clip((t - begin) / (end - begin), 0, 1))``, with t the number of optimizer
    steps that really happened (accumulated micro-batches are one step, steps skipped by AMP do not count, several
    optimizers count once). After step t the masks are recomputed when ``(t - begin) mod every = 0`` and at
    ``end``; then they stay.

    The module keeps its Parameters, keys and order: masks live in the callback's state, zeros are written in place
    after every optimizer step, the gradient and the optimizer's moments of masked entries are zero. Every
    checkpoint has its zeros and loads without this library.

    Args:
        transform: what to prune; or give the options of ``lightning_compress.Prune`` directly.
        schedule: "constant", "linear", "cubic", "polynomial", "cosine", "exponential", a mapping of steps, a
            function of progress, or its import path.
        start: sparsity before ``begin``, in [0, 1).
        begin: first point of the schedule.
        end: last point; from then on the sparsity is the target's.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        every: optimizer steps between mask updates.
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
        if (
            transform is not None and options != Prune()
        ):  # a configuration file gives every option its default
            raise ValueError(f"give either transform= or its options, not both: {sorted(prune_options)}.")
        self.transform = options if transform is None else transform
        if not 0 <= start < 1:
            raise ValueError(f"start={start}: allowed is 0 <= start < 1.")
        self.start, self.rewind = start, rewind
        self.masks: dict[str, Tensor] = {}  # parameter name -> True = kept
        self._shares: dict[str, float] = {}  # parameter name -> final sparsity
        self._initial: dict[str, Tensor] = {}  # for rewind
        self._kept = 0
        self._targets: list[Target] = []

    def __getstate__(self) -> dict[str, Any]:
        """Options, masks and counters; never the model, its optimizers or the trainer."""
        return super().__getstate__() | {"_targets": []}

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
        t = self.last_due(self.steps) if t is None else t
        sizes = {key: self.masks[key].numel() for key in self._shares if key in self.masks}
        asked = self._asked(t)
        return sum(asked[key] * size for key, size in sizes.items()) / max(sum(sizes.values()), 1)

    def _asked(self, t: int) -> dict[str, float]:
        """Sparsity of every target at step t."""
        return {key: self.between(min(self.start, share), share)(t) for key, share in self._shares.items()}

    # -- fit ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets (everything is built by now), take over masks, follow the optimizers."""
        needs = getattr(criterion(self.transform.criterion, self.transform.seed), "needs", ())
        if needs:
            raise MisconfigurationException(
                f"criterion {name_of(self.transform.criterion)} needs {', '.join(needs)}, which is not measured while "
                "training: use compress(model, [Prune(...)], data=...) before the fit; its zeros are then kept."
            )
        found = survey(pl_module, self.transform.include, self.transform.exclude)
        self._shares, skipped = self.transform.shares(found.targets)
        skipped |= found.skipped
        updated = updated_by(*trainer.optimizers)
        self._targets = [t for t in found.targets if t.key in self._shares and id(t.weight) in updated]
        lost = [t.key for t in found.targets if t.key in self._shares and id(t.weight) not in updated]
        skipped |= unowned(lost)
        for key in lost:
            del self._shares[key]
        if not self._targets:
            raise MisconfigurationException(
                f"ScheduledPruning found nothing to prune with include={self.transform.include!r}:"
                f"{reasons(skipped) or ' the module has no weights.'}"
            )
        self.masks = self._checked_masks()
        self._kept = sum(int(m.sum()) for m in self.masks.values())
        if self.rewind and not self._initial:
            self._initial = {t.key: t.weight.detach().cpu().clone() for t in self._targets}
        self._hold(self._targets)
        super().on_fit_start(trainer, pl_module)
        entries = sum(t.weight.numel() for t in self._targets)
        rank_zero_info(
            f"ScheduledPruning: {len(self._targets)} weights with {entries:,} entries.{reasons(skipped)}"
        )

    def _checked_masks(self) -> dict[str, Tensor]:
        """Masks from the checkpoint, else from an earlier compression, else everything kept."""
        lost = self.masks.keys() - {t.key for t in self._targets}
        if lost:
            raise MisconfigurationException(
                f"the checkpoint has masks for {sorted(lost)}, which this module does not train: "
                "resume with the model and the include/exclude patterns it was written with."
            )
        masks = {}
        for target in self._targets:
            mask = self.masks.get(target.key, self.transform.present_mask(target))
            if mask.shape != target.weight.shape:
                raise MisconfigurationException(
                    f"the checkpoint's mask of {target.key} has shape {tuple(mask.shape)}, its weight "
                    f"{tuple(target.weight.shape)}: resume with the model it was written with."
                )
            masks[target.key] = mask.to(target.weight.device)
        return masks

    def _owned(self, optimizer: Optimizer) -> list[Target]:
        ids = updated_by(optimizer)
        return [t for t in self._targets if id(t.weight) in ids]

    def _hold(self, targets: list[Target]) -> None:
        for target in targets:
            apply_mask_(target.weight, self.masks[target.key])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Zero the gradient of masked entries, so that clipping and the optimizer see what is used."""
        for target in self._owned(optimizer):
            gradient = target.weight.grad
            if gradient is not None and not gradient.is_sparse:
                apply_mask_(gradient, self.masks[target.key])

    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """An optimizer that updates a target."""
        return bool(self._owned(optimizer))

    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Hold the zeros."""
        self._hold(self._owned(optimizer))

    @torch.no_grad()
    def update(self, trainer: Trainer) -> None:
        """Recompute the masks for the present step, on rank zero for all."""
        scores, _ = self.transform.scores(trainer.lightning_module, self._targets)
        masks = self.transform.masks(self._targets, scores, self.masks, self._asked(self.steps))
        if trainer.world_size > 1:
            packed = trainer.strategy.broadcast({key: pack_bits(mask) for key, mask in masks.items()}, src=0)
            masks = {key: unpack_bits(packed[key], mask.shape).to(mask.device) for key, mask in masks.items()}
        self.masks = masks
        self._kept = sum(int(m.sum()) for m in masks.values())
        for target in self._targets if self.rewind else ():
            target.weight.copy_(self._initial[target.key].to(target.weight.device))
        self._hold(self._targets)
        for optimizer in trainer.optimizers:
            for target in self._targets:
                for state in optimizer.state.get(target.weight, {}).values():
                    if isinstance(state, Tensor) and state.shape == target.weight.shape:
                        apply_mask_(state, masks[target.key])  # stale momentum would fight the mask

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave zeros and masks on the layers, log the end state, and say when the target was not reached."""
        for target in self._targets:
            codes.set_mask(target.module, target.param, self.masks[target.key])
        self.log_values(trainer, self._totals())
        if not self.finished:
            rank_zero_warn(
                f"training stopped at optimizer step {self.steps}, before the pruning schedule ends at step "
                f"{self.span[1]}: sparsity is {self.sparsity:.4f}, asked for was "
                f"{self.target_sparsity(self.span[1]):.4f}. Train longer, lower end=, or set protect_schedule=True."
            )

    def _release(self) -> None:
        super()._release()
        self._targets = []
        self.masks = {key: mask.cpu() for key, mask in self.masks.items()}

    # -- what averaging and saving bring back ------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights surface here: zero them too, so that what is validated is what is saved."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._hold(self._targets)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The saved weights have their zeros, also averaged ones."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        weights = checkpoint["state_dict"]
        for raw in list(weights):
            mask = self.masks.get(clean(raw))
            if mask is not None:
                weights[raw] = weights[raw].detach().clone()
                apply_mask_(weights[raw], mask.to(weights[raw].device))

    # -- logging -----------------------------------------------------------------------------------------------

    @property
    def logged(self) -> tuple[str, ...]:
        """A named instance has tags of its own and leaves the model's totals to a monitor."""
        return () if self.name else ("sparsity", "target_sparsity")

    def _totals(self) -> dict[str, float]:
        return {self._tag("sparsity"): self.sparsity, self._tag("target_sparsity"): self.target_sparsity()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the totals when Lightning logs, straight to the loggers: ``self.log`` costs more than the pruning."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if log_due(trainer):
            self.log_values(trainer, self._totals())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Totals as metrics that other callbacks can monitor; every layer's sparsity to the loggers."""
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.barebones:
            pl_module.log_dict(self._totals(), logger=False, sync_dist=True)
        zeros = {t.name or t.param: 1 - float(self.masks[t.key].float().mean()) for t in self._targets}
        values = {self._tag(f"sparsity/{layer}"): share for layer, share in zeros.items()}
        self.log_values(
            trainer, values, step=logged_step(trainer) - 1
        )  # where Lightning draws what belongs to an epoch

    # -- resume ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (eight entries a byte), counters and the schedule: tensors, numbers, strings, lists, dicts only."""
        return super().state_dict() | {
            "shares": dict(self._shares),
            "masks": {key: pack_bits(mask) for key, mask in self.masks.items()},
            "shapes": {key: list(mask.shape) for key, mask in self.masks.items()},
            "initial": dict(self._initial),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        shapes = state_dict["shapes"]
        self._shares, self._initial = dict(state_dict["shares"]), dict(state_dict["initial"])
        self.masks = {key: unpack_bits(packed, shapes[key]) for key, packed in state_dict["masks"].items()}
        self._kept = sum(int(m.sum()) for m in self.masks.values())
