"""What every callback of the library does: keep module and checkpoints plain, carry structure, leave nothing behind.

Hook order and what is safe where is Lightning's; the reasons for the choices are in ``docs/architecture.md``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.transform import Step, applied, replay


def logged_step(trainer: Trainer) -> int:
    """The step at which Lightning draws its own scalars (with several optimizers that is not ``global_step``).

    Args:
        trainer: the running trainer.

    Returns:
        x value for ``logger.log_metrics``.
    """
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def log_due(trainer: Trainer) -> bool:
    """Whether Lightning logs step metrics at the present step.

    Args:
        trainer: the running trainer.

    Returns:
        True every ``log_every_n_steps`` steps.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and (logged_step(trainer) + 1) % every == 0


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a Trainer (its connector sets the attribute, so type checkers do not know it).

    Args:
        trainer: any trainer.

    Returns:
        The callbacks in their order.
    """
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return found


def loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """By what the gradients are still multiplied when an optimizer is about to step.

    Args:
        trainer: the running trainer.
        optimizer: fused ones divide by the scale themselves, later.

    Returns:
        The scale of the gradient scaler, or 1.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def updated_by(*optimizers: Optimizer) -> set[int]:
    """What optimizers update.

    Args:
        optimizers: any.

    Returns:
        The ids of their parameters.
    """
    return {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}


def unowned(keys: Sequence[str]) -> dict[str, str]:
    """Why weights are left alone that no optimizer updates.

    Args:
        keys: their names.

    Returns:
        Name -> reason.
    """
    return dict.fromkeys(keys, "no optimizer updates it (frozen, or not returned by configure_optimizers)")


class _Patch:
    """A method of one module with calls put ahead of it; copies and pickles of the module get the plain method."""

    def __init__(self, module: LightningModule, attribute: str) -> None:
        self.module, self.attribute = module, attribute
        self.own = module.__dict__.get(attribute)
        self.method = getattr(module, attribute)
        self.before: list[Callable[..., Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for function in self.before:
            function(self.module, *args, **kwargs)
        return self.method(*args, **kwargs)

    def drop(self, function: Callable[..., Any]) -> None:
        self.before.remove(function)
        if not self.before and self.module.__dict__.get(self.attribute) is self:
            del self.module.__dict__[self.attribute]
            if self.own is not None:
                self.module.__dict__[self.attribute] = self.own

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_method, (self.module, self.attribute)


def _plain_method(module: LightningModule, attribute: str) -> Any:
    return getattr(type(module), attribute).__get__(module)


def _strip_non_tensors(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Drop what is not a tensor and not PyTorch's own extra state: strict and ``weights_only`` loading fail on it."""
    for key in [
        k for k, v in state_dict.items() if not isinstance(v, Tensor) and not k.endswith("_extra_state")
    ]:
        del state_dict[key]


def structural(module: LightningModule) -> tuple[str, ...]:
    """The structural steps that a module carries.

    Args:
        module: any.

    Returns:
        JSON text of each step and where it was applied, in order.
    """
    return tuple(json.dumps({"prefix": p, "step": s.to_json()}) for p, s in applied(module) if s.structural)


class CompressionCallback(Callback):
    """Base of the library's callbacks.

    It strips non-tensor entries (neuraloperator's ``_metadata``) from checkpoints, stores the structural
    steps the model carries and replays them on a fresh module before weights load, refuses strategies and
    orders that cannot work, and undoes all it did to the module or an optimizer in ``teardown`` and,
    because Lightning skips that on errors, in ``on_exception``.

    Args:
        name: distinguishes several instances of one class in a Trainer; part of the checkpoint key.

    Attributes:
        changes_weights: whether the callback must stand after weight-averaging callbacks.
    """

    changes_weights: ClassVar[bool] = False

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        if name is not None and "/" in name:
            raise ValueError(f"name={name!r}: a slash is not allowed (profilers use the name in file names).")
        self.name = name
        self._structure: tuple[str, ...] = ()
        self._undo: list[Callable[[], Any]] = []

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    @property
    def logged(self) -> tuple[str, ...]:
        """Quantities it logs by itself as ``compress/<quantity>``, which a monitor leaves to it."""
        return ()

    def __getstate__(self) -> dict[str, Any]:
        """Options and own state only, so copies and pickles never hold a model, a trainer or an optimizer."""
        lent = ("log", "log_dict")  # bound methods of the module, which Lightning puts here for a run
        return {k: v for k, v in self.__dict__.items() if k not in lent} | {"_undo": []}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what cannot work and prepare the module; may run several times on one module."""
        self._release()
        self._check(trainer)
        self._structure = structural(pl_module)
        self._patch(pl_module, "on_load_checkpoint", self._replay)
        if not any(hook is _strip_non_tensors for hook in pl_module._state_dict_hooks.values()):
            self._undo.append(pl_module._register_state_dict_hook(_strip_non_tensors).remove)  # type: ignore[no-untyped-call]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo every hook and patch."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo every hook and patch; Lightning calls no ``teardown`` after an error."""
        self._release()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the weights in the checkpoint plain tensors, also when the hooks are already gone."""
        for key in ("state_dict", "current_model_state", "averaging_state"):
            _strip_non_tensors(pl_module, checkpoint.get(key, {}), "", {})

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say when a resumed checkpoint knows nothing of this callback."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            rank_zero_warn(
                f"the checkpoint has no state of {self.state_key}: it starts anew from the loaded weights."
            )

    def state_dict(self) -> dict[str, Any]:
        """Structural steps as JSON text; subclasses add their own."""
        return {"structure": list(self._structure)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Structure was already replayed before the weights loaded; subclasses restore their own."""

    def _replay(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give a fresh module the structure the checkpoint was written with (runs before its weights are loaded)."""
        stored = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("structure", ())
        replay(pl_module, [(e["prefix"], Step.from_json(e["step"])) for e in map(json.loads, stored)])
        self._structure = structural(pl_module)

    def _check(self, trainer: Trainer) -> None:
        """Refuse orders and strategies that would silently do the wrong thing."""
        me = type(self).__name__
        if trainer.strategy.restore_checkpoint_after_setup:
            raise MisconfigurationException(
                f"{me} cannot work under {type(trainer.strategy).__name__}, which shards the weights before a "
                "callback sees them; use strategy='ddp' or one device, or compress the consolidated checkpoint "
                "after training."
            )
        callbacks = callbacks_of(trainer)
        later = callbacks[callbacks.index(self) + 1 :] if self in callbacks and self.changes_weights else []
        for other in later:
            if isinstance(other, WeightAveraging | StochasticWeightAveraging):
                raise MisconfigurationException(
                    f"{me} must come after {type(other).__name__} in Trainer(callbacks=[...]): averaged "
                    f"weights are dense and are only compressed again by what follows. Put {me} last."
                )

    def _patch(self, module: LightningModule, attribute: str, before: Callable[..., Any]) -> None:
        """Run ``before(module, ...)`` ahead of a method, on this instance only, until release."""
        patch = module.__dict__.get(attribute)
        if not isinstance(patch, _Patch):
            patch = _Patch(module, attribute)
            object.__setattr__(module, attribute, patch)
        patch.before.append(before)
        self._undo.append(functools.partial(patch.drop, before))

    def _release(self) -> None:
        """Undo what was done to module and optimizers; subclasses also drop their references into the run."""
        while self._undo:
            self._undo.pop()()

    def log_values(
        self, trainer: Trainer, values: Mapping[str, float | Tensor], step: int | None = None
    ) -> None:
        """Send values straight to every logger, on rank zero.

        Args:
            trainer: the running trainer.
            values: tag -> value; for many values this costs nothing, where ``self.log`` costs milliseconds.
            step: x value; the step that Lightning's own scalars use if None.
        """
        if trainer.is_global_zero and not trainer.sanity_checking:
            step = logged_step(trainer) if step is None else step
            for logger in trainer.loggers:
                logger.log_metrics({k: float(v) for k, v in values.items()}, step=step)
