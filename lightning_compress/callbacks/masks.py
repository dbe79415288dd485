"""Masks of weights in training: held at zero in weights, gradients, moments and checkpoints, moved at one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress import codes
from lightning_compress.callbacks.base import updated_by
from lightning_compress.functional.masks import apply_mask_, pack_bits, unpack_bits
from lightning_compress.names import clean
from lightning_compress.pruning.followers import Silenced, companions, silent
from lightning_compress.pruning.patterns import Channel, pattern
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.targets import Target


class HeldMasks:
    """Masks beside a module, by parameter name: the module keeps its Parameters, keys and order.

    Attributes:
        masks: parameter name -> True = kept; on the weights' devices during a fit, then on the CPU.
        targets: the weights during a fit; none before and after, so that copies and pickles hold no model.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.targets: list[Target] = []
        self._kept = 0

    def __getstate__(self) -> dict[str, Any]:
        """The masks; never the model."""
        return self.__dict__ | {"targets": []}

    @property
    def sparsity(self) -> float:
        """Share of masked entries among all, each counted once."""
        total = sum(m.numel() for m in self.masks.values())
        return 1.0 - self._kept / total if total else 0.0

    def start(self, targets: Sequence[Target], present: Callable[[Target], Tensor]) -> None:
        """Take over the weights of a module that is about to be trained.

        Args:
            targets: the weights.
            present: the mask that a weight has if none was restored.

        Raises:
            MisconfigurationException: restored masks do not fit the weights.
        """
        lost = self.masks.keys() - {t.key for t in targets}
        if lost:
            raise MisconfigurationException(
                f"the checkpoint has masks for {sorted(lost)}, which this module does not train: "
                "resume with the model and the include/exclude patterns it was written with."
            )
        masks = {}
        for target in targets:
            mask = self.masks[target.key] if target.key in self.masks else present(target)
            if mask.shape != target.weight.shape:
                raise MisconfigurationException(
                    f"the checkpoint's mask of {target.key} has shape {tuple(mask.shape)}, its weight "
                    f"{tuple(target.weight.shape)}: resume with the model it was written with."
                )
            masks[target.key] = mask.to(target.weight.device)
        self.targets = list(targets)
        self._set(masks)
        self.hold()

    def stop(self) -> None:
        """Let go of the weights; the masks stay."""
        self.targets = []
        self.masks = {key: mask.cpu() for key, mask in self.masks.items()}

    def owned(self, optimizer: Optimizer) -> list[Target]:
        """The weights that an optimizer updates."""
        ids = updated_by(optimizer) if self.targets else set()
        return [t for t in self.targets if id(t.weight) in ids]

    def hold(self, optimizer: Optimizer | None = None) -> None:
        """Write the zeros into the weights, all or those of one optimizer."""
        for target in self.targets if optimizer is None else self.owned(optimizer):
            apply_mask_(target.weight, self.masks[target.key])

    def hold_gradients(self, optimizer: Optimizer) -> None:
        """Write the zeros into the gradients of what an optimizer updates."""
        for target in self.owned(optimizer):
            gradient = target.weight.grad
            if gradient is not None and not gradient.is_sparse:
                apply_mask_(gradient, self.masks[target.key])

    @torch.no_grad()
    def move(self, masks: Mapping[str, Tensor], trainer: Trainer) -> None:
        """Go over to other masks, rank zero's: zeros in the weights, and in the moments, which would fight them.

        Args:
            masks: parameter name -> mask, of every weight.
            trainer: the running trainer.
        """
        if trainer.world_size > 1:
            packed = trainer.strategy.broadcast({key: pack_bits(mask) for key, mask in masks.items()}, src=0)
            masks = {key: unpack_bits(packed[key], mask.shape).to(mask.device) for key, mask in masks.items()}
        self._set(masks)
        self.hold()
        for optimizer in trainer.optimizers:
            for target in self.targets:
                for state in optimizer.state.get(target.weight, {}).values():
                    if isinstance(state, Tensor) and state.shape == target.weight.shape:
                        apply_mask_(state, masks[target.key])

    def leave(self) -> None:
        """Leave zeros and masks on the layers, as their codes."""
        for target in self.targets:
            codes.set_mask(target.module, target.param, self.masks[target.key])

    def hold_saved(self, weights: dict[str, Any]) -> None:
        """Write the zeros into weights that are being saved, averaged ones perhaps, not into the module's own.

        Args:
            weights: a ``state_dict``, changed in place.
        """
        for raw in list(weights):
            mask = self.masks.get(clean(raw))
            if mask is not None:
                weights[raw] = weights[raw].detach().clone()
                apply_mask_(weights[raw], mask.to(weights[raw].device))

    def state_dict(self) -> dict[str, Any]:
        """Masks, eight entries a byte, and their shapes."""
        return {
            "masks": {key: pack_bits(mask) for key, mask in self.masks.items()},
            "shapes": {key: list(mask.shape) for key, mask in self.masks.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; what else it holds is left alone."""
        packed, shapes = state_dict["masks"], state_dict["shapes"]
        self._set({key: unpack_bits(bits, shapes[key]) for key, bits in packed.items()})

    def _set(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)
        self._kept = sum(int(m.sum()) for m in masks.values())


class SilentMasks(HeldMasks):
    """Masks of what goes with masked channels: biases, and gamma and beta of BatchNorm; no sparsity counts them."""

    def __init__(self) -> None:
        super().__init__()
        self._silenced: dict[str, Silenced] = {}  # weight -> what goes with its channels

    def __getstate__(self) -> dict[str, Any]:
        """The masks; never the model."""
        return super().__getstate__() | {"_silenced": {}}

    def find(self, model: nn.Module, targets: Sequence[Target], x: Any, transform: Prune) -> dict[str, str]:
        """Look for what belongs to the channels of weights; there is nothing for other patterns.

        Args:
            model: the module.
            targets: its weights.
            x: one input, to see what follows what; None reads the code.
            transform: with the pattern, and names to leave.

        Returns:
            Parameter name -> why it is left alone.
        """
        channels = isinstance(pattern(transform.pattern), Channel)
        self._silenced = companions(model, targets, x, transform.exclude) if channels else {}
        for key in (key for key, what in self._silenced.items() if what.outputs):
            rank_zero_warn(
                f"channels of {key} are outputs of the module: leave that layer out with exclude=."
            )
        parts = {part.key: part for what in self._silenced.values() for part, _, _ in what.parts}
        self.start(list(parts.values()), transform.present_mask)
        return {key: why for what in self._silenced.values() for key, why in what.skipped.items()}

    def follow(self, weights: HeldMasks, trainer: Trainer) -> None:
        """Go over to the masks that belong to those of the weights.

        Args:
            weights: with the new masks.
            trainer: the running trainer.
        """
        masks = dict(self.masks)
        for target in weights.targets if self._silenced else ():
            kept = Channel().units(target, weights.masks[target.key])
            for part in self._silenced[target.key].parts:
                masks[part[0].key] = masks[part[0].key] & silent(part, kept)
        self.move(masks, trainer)

    def stop(self) -> None:
        """Let go of the weights; the masks stay."""
        super().stop()
        self._silenced = {}
