"""Which BatchNorm layers are folded into quantized layers while training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from lightning_compress.finalize import finalize
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.names import clean
from lightning_compress.plans import Plan
from lightning_compress.quantization.folded import fold_of, fold_refusal
from lightning_compress.quantization.layers import fold_norm, weight_quantizer
from lightning_compress.stats import Calibration


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


def strayed(pl_module: LightningModule) -> list[str]:
    """Names of layers whose folded BatchNorm is no longer part of the module.

    Args:
        pl_module: a module after ``fold_all``.
    """
    present = set(map(id, pl_module.modules()))
    folds = {clean(name): fold_of(module) for name, module in pl_module.named_modules()}
    return [name for name, fold in folds.items() if fold is not None and id(fold.norm) not in present]


def unseen(pl_module: LightningModule) -> list[str]:
    """Names of layers whose folded BatchNorm has seen no batch yet.

    Args:
        pl_module: a module after ``fold_all``.
    """
    folds = {clean(name): (module, fold_of(module)) for name, module in pl_module.named_modules()}
    pairs = {name: fold.norm for name, (module, fold) in folds.items() if fold and module is not fold.norm}
    return [name for name, norm in pairs.items() if not int(norm.num_batches_tracked or 0)]
