"""Fold BatchNorm when training ends: into a copy, or into the module itself."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn

from lightning_compress.callbacks.base import CompressionCallback, callbacks_of, structural
from lightning_compress.callbacks.copies import ExampleInput, part_of
from lightning_compress.compress import Result, compress
from lightning_compress.finalize import finalize
from lightning_compress.fusion import FuseBatchNorm, fold_on_load
from lightning_compress.transform import NothingChangedError, applied, record


class BatchNormFusion(CompressionCallback):
    r"""Fold the BatchNorm layers when ``Trainer.fit`` ends.

    ``W' = W * gamma / sigma`` and ``b' = beta + (b - mu) * gamma / sigma``, from the running statistics. The fused
    copy, in eval mode and without a trainer, is ``callback.fused``. The trained module stays as it is:
    ``trainer.test(ckpt_path="best")``, resuming and a second ``fit`` work. With ``inplace=True`` the module itself
    is fused instead; it still loads checkpoints from before, folding their BatchNorm on the way, and a second
    ``fit`` trains it without BatchNorm. See ``lightning_compress.FuseBatchNorm`` for what is folded.

    The pairs of layers are found by running ``pl_module.example_input_array``, or else two samples of the first
    input that the module's ``forward`` got, or else by reading the code. Nothing is folded before the end of the
    fit, so quantization during training sees BatchNorm, and weight averaging and pruning work as without this
    callback, whatever the order in the list. If nothing can be folded, a warning gives the reasons.

    Args:
        attribute: name of the submodule to fuse, such as "model"; None for the whole LightningModule.
        inplace: fuse the module itself.
        name: distinguishes several instances.

    Attributes:
        fused: the fused copy; None before the end of a fit, when nothing could be folded, and with ``inplace``.

    Raises:
        MisconfigurationException: no such submodule; ``inplace`` with a strategy whose training processes end with
            the fit (ddp_fork, ddp_spawn); a training checkpoint from before the fusion that is to be resumed in a
            module fused in place.

    Examples:
        >>> BatchNormFusion(attribute="model").fused is None
        True

    Source: Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, section 3.2.
    """

    def __init__(self, attribute: str | None = None, inplace: bool = False, name: str | None = None) -> None:
        super().__init__(name)
        self.attribute, self.inplace = attribute, inplace
        self.fused: nn.Module | None = None
        self._fitting = False
        self._example = self._new_example()

    def __getstate__(self) -> dict[str, Any]:
        """Options and the fused copy; nothing of a running fit."""
        return super().__getstate__() | {"_example": self._new_example()}

    def _new_example(self) -> ExampleInput:
        return ExampleInput(self.attribute, type(self).__name__)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what cannot work with this strategy; let a module that is already fused load older weights."""
        super().setup(trainer, pl_module, stage)
        self._fitting = stage == "fit"
        if self._fitting and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            self._check_launcher(type(trainer.strategy.launcher).__name__)
        if self.inplace:
            fold_on_load(pl_module)

    def _check_launcher(self, launcher: str) -> None:
        ends = f"{launcher} trains in processes that end with the fit"
        remedy = "use strategy='ddp', or compress(model, FuseBatchNorm()) after the fit."
        if self.inplace:
            raise MisconfigurationException(
                f"BatchNormFusion(inplace=True): {ends}, and only weights come back from there. Those of the fused "
                f"module would be loaded into the unfused one: {remedy}"
            )
        rank_zero_warn(f"{ends}, so callback.fused will be None in the main process: {remedy}")

    def _replay(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """As the base, and the module stays able to load weights from before the fusion."""
        super()._replay(pl_module, checkpoint)
        if not self.inplace:
            return
        stored = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("structure", ())
        if self._fitting and len(stored) < len(self._structure) and checkpoint.get("optimizer_states"):
            raise MisconfigurationException(
                "this checkpoint was written before the module was fused in place, and its optimizer state belongs "
                "to BatchNorm parameters that are gone: resume with a new module, or load the weights alone and "
                "call fit without ckpt_path."
            )
        fold_on_load(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first input; the modules are all built by now."""
        self.fused = None
        self._example.start(pl_module, self._undo)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold; averaged weights, masks and the best epoch's hooks have settled by now."""
        # The same on every rank, so that all find the same pairs.
        example = self._example.value(trainer, pl_module)
        target = part_of(pl_module, self.attribute, type(self).__name__)
        try:
            result = _fuse(target, example)
        except NothingChangedError as error:
            if any(step.name == FuseBatchNorm.__name__ for _, step in applied(target)):
                self.fused = None if self.inplace else finalize(target)  # fused before this fit
            else:
                rank_zero_warn(f"BatchNormFusion leaves the module as it is. {error}")
            return
        except Exception as error:  # whatever it is: raising would end a program whose training has succeeded
            rank_zero_warn(f"BatchNormFusion leaves the module as it is, because it failed: {error!r}")
            return
        if self.inplace:
            FuseBatchNorm().apply(target, result.plan[0])
            record(target, result.steps[0])
            fold_on_load(target)
            for callback in callbacks_of(trainer):
                if isinstance(callback, CompressionCallback):
                    callback._structure = structural(pl_module)  # for checkpoints written from now on
        else:
            self.fused = result.model
        skipped = "".join(f"\n  {name} stays: {why}" for name, why in result.plan[0].skipped.items())
        rank_zero_info(f"BatchNormFusion folded {len(result.plan[0].layers)} BatchNorm layers.{skipped}")

    def _release(self) -> None:
        super()._release()
        self._example = self._new_example()


def _fuse(target: nn.Module, example: Any) -> Result:
    """Fuse a plain copy; by the code alone if the example does not run."""
    plain = finalize(target)
    try:
        return compress(plain, FuseBatchNorm(), example_input=example)
    except NothingChangedError:
        raise
    except Exception as error:  # the example may fit training_step only by way of the user's own code
        if example is None:
            raise
        rank_zero_info(f"BatchNormFusion reads the code, because the example input fails: {error!r}")
        return compress(plain, FuseBatchNorm())
