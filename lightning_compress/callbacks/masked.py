"""What callbacks that hold masks do in a Trainer: zeros after every step, in averages and files, and in the logs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.callbacks.base import log_due, logged_step
from lightning_compress.callbacks.masks import HeldMasks, SilentMasks
from lightning_compress.callbacks.scheduled import ScheduledCallback


class MaskingCallback(ScheduledCallback):
    """Base of callbacks that hold masks of weights while these train. Subclasses say which, and when they move."""

    changes_weights: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._held = HeldMasks()
        self._silent = SilentMasks()

    @abstractmethod
    def target_sparsity(self, t: int | None = None) -> float:
        """What is asked for at a step."""

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> mask, True = kept."""
        return self._held.masks

    @property
    def sparsity(self) -> float:
        """Share of masked entries among the targets, each counted once."""
        return self._held.sparsity

    def hold(self, optimizer: Optimizer | None = None) -> None:
        """Write the zeros into the weights, all or those of one optimizer."""
        self._held.hold(optimizer)
        self._silent.hold(optimizer)

    # -- fit ---------------------------------------------------------------------------------------------------

    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """An optimizer that updates a target."""
        return bool(self._held.owned(optimizer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Zero the gradient of masked entries, so that clipping and the optimizer see what is used."""
        self._held.hold_gradients(optimizer)
        self._silent.hold_gradients(optimizer)

    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Hold the zeros."""
        self.hold(optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave zeros and masks on the layers, log the end state."""
        self._held.leave()
        self._silent.leave()
        self.log_values(trainer, self._totals())

    def _release(self) -> None:
        super()._release()
        self._held.stop()
        self._silent.stop()

    # -- what averaging and saving bring back ------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights surface here: zero them too, so that what is validated is what is saved."""
        super().on_validation_epoch_start(trainer, pl_module)
        self.hold()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The saved weights have their zeros, also averaged ones."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self._held.hold_saved(checkpoint["state_dict"])
        self._silent.hold_saved(checkpoint["state_dict"])

    # -- logging -----------------------------------------------------------------------------------------------

    @property
    def logged(self) -> tuple[str, ...]:
        """A named instance has tags of its own and leaves the model's totals to a monitor."""
        return () if self.name else ("sparsity", "target_sparsity")

    def _quantities(self) -> dict[str, float]:
        """What is logged."""
        return {"sparsity": self.sparsity, "target_sparsity": self.target_sparsity()}

    def _totals(self) -> dict[str, float]:
        return {self._tag(quantity): value for quantity, value in self._quantities().items()}

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
        zeros = {t.name or t.param: 1 - float(self.masks[t.key].float().mean()) for t in self._held.targets}
        values = {self._tag(f"sparsity/{layer}"): share for layer, share in zeros.items()}
        step = logged_step(trainer) - 1  # where Lightning draws what belongs to an epoch
        self.log_values(trainer, values, step=step)

    # -- resume ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks (eight entries a byte), counters and the schedule: tensors, numbers, strings, lists, dicts only."""
        return super().state_dict() | self._held.state_dict() | {"silent": self._silent.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        self._held.load_state_dict(state_dict)
        if "silent" in state_dict:
            self._silent.load_state_dict(state_dict["silent"])
