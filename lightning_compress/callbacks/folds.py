"""Which BatchNorm layers are folded into quantized layers while training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from lightning_compress.finalize import finalize
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.names import clean
from lightning_compress.plans import Plan
from lightning_compress.quantization.folded import Fold, fold_of, fold_refusal
from lightning_compress.quantization.layers import fold_norm, weight_quantizer
from lightning_compress.stats import Calibration
from lightning_compress.tables import listing, reasons


def fold_all(pl_module: LightningModule) -> dict[str, str | None]:
    """Fold every BatchNorm into the quantized layer before it, where that can be done.

    Pairs are those of ``lightning_compress.FuseBatchNorm``, by the module's ``example_input_array`` or by its code.

    Args:
        pl_module: a module with quantizers.

    Returns:
        BatchNorm name -> why it stays as it is; None if it is folded.
    """
    plan = _plan(pl_module)
    modules = {clean(name): module for name, module in pl_module.named_modules()}
    found: dict[str, str | None] = dict(plan.skipped)
    for name, pair in plan.layers.items():
        layer, norm = modules[pair["layer"]], modules[name]
        why = fold_refusal(layer, norm)
        if pair["place"] != "after":
            why = "it stands before its layer"
        elif weight_quantizer(layer, "weight") is None:
            why = f"the weight of {pair['layer']} is not quantized"
        found[name] = why
        if why is None:
            fold_norm(layer, norm)
    return found


def _plan(pl_module: LightningModule) -> Plan:
    plain: Any = finalize(pl_module)
    example = pl_module.example_input_array
    try:
        return FuseBatchNorm().plan(plain, None if example is None else Calibration(example_input=example))
    except Exception:  # the example is the user's, and what can go wrong with it too
        if example is None:
            raise
        return FuseBatchNorm().plan(plain, None)


def check(pl_module: LightningModule, stays: Mapping[str, str | None] | None) -> None:
    """Refuse folds whose BatchNorm is gone, and warn where nothing is folded.

    Args:
        pl_module: a module after ``fold_all``.
        stays: what ``fold_all`` has returned; None if it was not called.

    Raises:
        MisconfigurationException: a folded BatchNorm is no longer part of the module.
    """
    present = set(map(id, pl_module.modules()))
    lost = [name for name, (_, fold) in _folds(pl_module).items() if id(fold.norm) not in present]
    if lost:
        raise MisconfigurationException(
            f"fold_batchnorm=True: the BatchNorm behind {listing(lost)} was replaced after setup, as "
            "Trainer(sync_batchnorm=True) does. Folding takes the statistics of one process: leave one of them out."
        )
    if stays is not None and None not in stays.values():
        kept = {name: why for name, why in stays.items() if why}
        rank_zero_warn(f"fold_batchnorm=True folds nothing:{reasons(kept) or ' there is no BatchNorm.'}")


def warn_of_unseen(pl_module: LightningModule) -> None:
    """Warn of folded BatchNorm layers that have seen no batch, where steps are about to be set by their factors.

    Args:
        pl_module: a module after ``fold_all``.
    """
    norms = {name: fold.norm for name, (module, fold) in _folds(pl_module).items() if module is not fold.norm}
    unseen = [name for name, norm in norms.items() if not int(norm.num_batches_tracked or 0)]
    if unseen:
        rank_zero_warn(
            f"fold_batchnorm=True: the BatchNorm behind {listing(unseen)} has seen no batch, so the first steps "
            "belong to a variance of 1, and the folded weights may leave their range for good: start from a trained "
            "network, or set begin= (0.1, say)."
        )


def _folds(pl_module: LightningModule) -> dict[str, tuple[nn.Module, Fold]]:
    """Name -> module and its fold; both the layer and its BatchNorm have it."""
    found = ((clean(name), module, fold_of(module)) for name, module in pl_module.named_modules())
    return {name: (module, fold) for name, module, fold in found if fold is not None}
