"""What optimizers, schedulers and gradient scalers must know of learned steps and clips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_compress.callbacks.base import loss_scale, updated_by
from lightning_compress.quantization import training
from lightning_compress.quantization.learned import ClippedInput
from lightning_compress.quantization.quantizers import TrainingQuantizer
from lightning_compress.tables import listing
from lightning_compress.targets import Target


def adopt(trainer: Trainer, targets: Iterable[Target]) -> None:
    """Give steps that ``configure_optimizers`` left out to the group that updates their layer's weight.

    Args:
        trainer: with its optimizers.
        targets: weights with quantizers.
    """
    groups = [g for o in trainer.optimizers for g in o.param_groups]
    owned = {id(p): group for group in groups for p in group["params"]}
    missing = []
    for target in targets:
        group = owned.get(id(target.weight))
        layer = (training.quantizer_of(target), *training.input_quantizers(target))
        lost = [p for q in layer for p in q.parameters() if id(p) not in owned]
        if group is not None and lost:
            group["params"].extend(lost)
            owned |= {id(p): group for p in lost}
            missing.append(target.name or target.param)
    if missing:
        rank_zero_warn(
            f"configure_optimizers left the learned steps of {listing(missing)} out; they are updated with their "
            "weights. Return self.parameters(), or lightning_compress.quantization.parameter_groups(self)."
        )


def warn_of_decay(trainer: Trainer, learned: Sequence[nn.Parameter]) -> None:
    """Warn once if an optimizer decays steps or clips.

    Args:
        trainer: with its optimizers.
        learned: steps and clips.
    """
    ids = {id(p) for p in learned}
    for group in (g for o in trainer.optimizers for g in o.param_groups):
        if group.get("weight_decay", 0) and any(id(p) in ids for p in group["params"]):
            rank_zero_warn(
                f"an optimizer group decays learned steps (weight_decay={group['weight_decay']}), which pulls "
                "their range to zero: put them into a group without decay, with "
                "steps, others = lightning_compress.quantization.parameter_groups(self)."
            )
            return


def penalize(
    trainer: Trainer, optimizer: Optimizer, quantizers: Iterable[TrainingQuantizer], strength: float
) -> None:
    """Add the gradient of ``strength sum alpha^2`` to the clips that an optimizer is about to update.

    Args:
        trainer: the running trainer.
        optimizer: its gradients are unscaled, unless it takes scaled ones.
        quantizers: any.
        strength: lambda.
    """
    owned = updated_by(optimizer)
    factor = 2 * strength * loss_scale(trainer, optimizer)
    for quantizer in quantizers:
        if (
            not isinstance(quantizer, ClippedInput)
            or not quantizer.active
            or id(quantizer.alpha) not in owned
        ):
            continue
        if quantizer.alpha.grad is not None:
            quantizer.alpha.grad.add_(quantizer.alpha.detach(), alpha=factor)


def complete_schedulers(trainer: Trainer) -> None:
    """Learning-rate schedulers of a dense run know no group of steps: give it the rates of its optimizer.

    Args:
        trainer: with restored schedulers.
    """
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
        for name, key in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):
            rates = getattr(scheduler, name, None)
            if isinstance(rates, list) and len(rates) < len(groups):
                setattr(scheduler, name, [group.get(key, group["lr"]) for group in groups])
