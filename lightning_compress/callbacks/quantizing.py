"""What a callback does that trains with quantizers: put them into the module, and keep their state out of its own."""

from __future__ import annotations

import io
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.callbacks import averages
from lightning_compress.callbacks.scheduled import ScheduledCallback
from lightning_compress.quantization import training
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.quantization.quantizers import TrainingQuantizer
from lightning_compress.tables import listing


class QuantizingCallback(ScheduledCallback):
    """A callback whose module computes with quantizers, in every stage.

    The module's Parameters, keys and order stay: quantizers are stripped from its state dict, and their state is this
    callback's. Averages of the module have quantizers of their own, whose tensors are saved beside the live ones.

    Args:
        transform: which layers, and what grid.
        method: see ``lightning_compress.quantization.training.install``.
        observer_momentum: of the observers.
        begin: from when on values are rounded.
        unit: of ``begin``.
        protect_schedule: hold early stopping back until the end of the schedule.
        gate: name of a validation metric that is infinite before.
        name: distinguishes several instances.
    """

    def __init__(
        self,
        transform: Quantize,
        method: str,
        observer_momentum: float,
        *,
        begin: float,
        unit: str,
        protect_schedule: bool,
        gate: str | None,
        name: str | None,
    ) -> None:
        super().__init__(
            schedule="constant",
            begin=begin,
            end=begin,
            unit=unit,
            every=1,
            protect_schedule=protect_schedule,
            gate=gate,
            name=name,
        )
        self.transform, self.method, self.observer_momentum = transform, method, observer_momentum
        self._points: dict[str, int] = {}  # optimizer steps, fixed when training starts; -1: never
        self._pending: dict[str, Any] | None = None  # stored states that wait for a module
        self._kept: dict[str, Any] = {}  # states of the last run
        self._averaged = False  # whether a checkpoint's weights are averages
        self._owner: weakref.ref[LightningModule] | None = None  # whose steps are counted
        self._forget()

    def _forget(self) -> None:
        """Drop the references into a run; subclasses have more of them."""
        self._installed: training.Installed | None = None
        self._quantizers: dict[str, TrainingQuantizer] = {}
        self._averages: averages.Averages = {}
        self._restored = False  # whether this run goes on from a stored state

    def __getstate__(self) -> dict[str, Any]:
        """Options and own state; never the model or an optimizer."""
        clean = type(self).__new__(type(self))
        clean._forget()
        return super().__getstate__() | {"_kept": self._states(), "_owner": None} | vars(clean)

    # -- setup -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the quantizers into the layers, in every stage: a test without them would score the float model."""
        super().setup(trainer, pl_module, stage)
        if is_overridden("configure_model", pl_module):
            # Lightning calls it again, and asks that this be harmless.
            with trainer.precision_plugin.module_init_context():
                pl_module.configure_model()
        new = self._install(pl_module)
        if new and self._home in trainer.callback_metrics:
            packed = trainer.callback_metrics[self._home].numpy().tobytes()
            self.load_state_dict(torch.load(io.BytesIO(packed), weights_only=True))
        if stage == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(
                f"{type(trainer.strategy.launcher).__name__} trains in processes that end with the fit, and only "
                "weights come back from there. trainer.test(module) brings the quantizers too; before "
                "lightning_compress.finalize(module) or another trainer, call callback.bring_home(trainer, module)."
            )

    def _check(self, trainer: Trainer) -> None:
        super()._check(trainer)
        averaging = averages.averaging_before(self, trainer)
        if averaging is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} must come before {averaging} in Trainer(callbacks=[...]): the average needs "
                "the quantizers that this callback puts into the module."
            )

    def _replay(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """As the base; layers that the replay made get their quantizers."""
        super()._replay(pl_module, checkpoint)
        self._install(pl_module)

    def _install(self, pl_module: LightningModule) -> bool:
        """Whether any quantizer was put in."""
        try:
            done = training.install(
                pl_module, self.transform, self.method, self.observer_momentum, pl_module.example_input_array
            )
        except ValueError as error:
            raise MisconfigurationException(f"{type(self).__name__}: {error}") from error
        self._installed, self._quantizers = done, done.quantizers
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._restore(pending)
        return done.new

    def bring_home(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module of this process the quantizers that processes of a fit (ddp_fork, ddp_spawn) left behind.

        Args:
            trainer: the trainer of the fit.
            pl_module: its module.
        """
        self.setup(trainer, pl_module, "validate")
        self.teardown(trainer, pl_module, "validate")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so when what is validated is not rounded as it was trained."""
        self._say_what_waits(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for tests."""
        self._say_what_waits(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for predictions."""
        self._say_what_waits(trainer)

    def _say_what_waits(self, trainer: Trainer) -> None:
        waiting = [name for name, q in self._quantizers.items() if q.enabled and not q.active]
        if waiting and trainer.state.fn != "fit":
            rank_zero_warn(
                f"{len(waiting)} quantizers have seen no training batch, so what they stand for is not rounded: "
                f"{listing(waiting)}. Give a checkpoint that was not saved with save_weights_only=True."
            )

    @property
    def _done(self) -> training.Installed:
        assert self._installed is not None
        return self._installed

    def _to_averages(self, names: set[str]) -> None:
        """Averages of steps that did not exist before begin with the present ones."""
        for module in self._averages.values():
            averages.load_tensors(module, {n: self._quantizers[n].tensors() for n in names})

    # -- leave ----

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Processes that end with the fit send the quantizers home with the metrics."""
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            buffer = io.BytesIO()
            torch.save(self.state_dict(), buffer)
            trainer.callback_metrics[self._home] = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)

    @property
    def _home(self) -> str:
        return f"compress/{self.state_key}"

    def _release(self) -> None:
        super()._release()
        self._kept = self._states()
        self._forget()

    # -- resume ------------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, Any]:
        live = {name: quantizer.state() for name, quantizer in self._quantizers.items()}
        return live or self._kept

    def state_dict(self) -> dict[str, Any]:
        """Quantizers, points and counters: tensors, numbers, strings, lists, dicts only."""
        states = self._states() if self._pending is None else self._pending
        return super().state_dict() | {"quantizers": states, "points": dict(self._points)}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Averaged weights belong with averaged steps."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        own = checkpoint.get("callbacks", {}).get(self.state_key)
        if own is not None and self._averages:
            own["averages"] = averages.tensors_of(self._averages)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Bring the averages back, where there are some."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        stored = checkpoint.get("callbacks", {}).get(self.state_key, {})
        for quantizer in self._quantizers.values() if not stored else ():
            quantizer.forget()  # other weights: steps of earlier ones are worth nothing
        present = averages.averages_of(trainer)
        for kind, module in present.items():
            plain = {name: state["tensors"] for name, state in stored.get("quantizers", {}).items()}
            averages.load_tensors(module, stored.get("averages", {}).get(kind, plain))
        self._averaged = averages.IN_STATE_DICT not in present

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        self._points = dict(state_dict["points"])
        states = dict(state_dict["quantizers"])
        averaged = state_dict.get("averages", {}).get(averages.IN_STATE_DICT, {}) if self._averaged else {}
        self._averaged = False
        for name, tensors in averaged.items():
            states[name] = {**states[name], "tensors": tensors}
        if not states:
            return
        if self._installed is None:
            self._pending = states
        else:
            self._restore(states)

    def _restore(self, states: Mapping[str, Any]) -> None:
        try:
            training.restore(self._quantizers, states)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._restored = True
