"""Quantization-aware training: weights and activations are rounded on the way, checkpoints and keys stay plain."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_compress.callbacks import averages, folds, learning
from lightning_compress.callbacks.base import callbacks_of, logged_step, updated_by
from lightning_compress.callbacks.pruning import ScheduledPruning
from lightning_compress.callbacks.quantizing import QuantizingCallback
from lightning_compress.quantization import optimizers, training
from lightning_compress.quantization.learned import SMALLEST, ClippedInput, LearnedWeight
from lightning_compress.quantization.measure import measure_all
from lightning_compress.quantization.observed import ObservedInput
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.schedules import to_steps
from lightning_compress.tables import listing, reasons
from lightning_compress.targets import survey

_POINTS = ("begin", "freeze_observer", "freeze_batchnorm")


class QuantizationAwareTraining(QuantizingCallback):
    r"""Train with the rounding that the compressed model will have.

    Weights of the targets and inputs of their layers are rounded to their grid in every forward pass, with
    straight-through gradients; the Parameters stay float, and so do checkpoints, which load without this library.
    ``lightning_compress.finalize(module)`` gives the plain model with the rounded weights and the same outputs.

    - method="fake_quant": weights by the calibrator at every pass, inputs by a running minimum and maximum
    - method="lsq": steps of weights and inputs are learned
    - method="pact": weights as in fake_quant, clips of the inputs are learned

    Learned steps and clips are parameters of the module before ``configure_optimizers`` runs. They should not decay:
    see ``lightning_compress.quantization.parameter_groups``. The callback stands before weight averaging in the list.

    Args:
        weight_bits: 1 to 16, or a mapping from layer name, pattern or kind to bits (see ``Quantize``).
        activation_bits: 2 to 16, or a mapping; None rounds weights only.
        method: "fake_quant", "lsq" or "pact".
        transform: a ``Quantize`` in place of the three bit options and ``quantize_options``.
        edge_layers_bits: bits of weight and input of the layers that run first and last (found by running
            ``example_input_array``, else by parameter order); None: as the others.
        bits_schedule: epoch -> bits of the weights of the other layers from then on. Inputs take them too, but never
            fewer than ``activation_bits``.
        begin: from when on values are rounded; observers learn before.
        unit: "fraction" (of all optimizer steps), "step" or "epoch", of ``begin`` and the two freezing points.
        observer_momentum: c in (0, 1] of ``m <- m + c (m_batch - m)``.
        freeze_observer: from when on observers stay as they are; None: never.
        fold_batchnorm: round the weight with the factors of the BatchNorm behind its layer, as it is deployed (see
            ``lightning_compress.quantization.folded.Fold``), in place of the weight alone. A second convolution in
            every step finds the statistics while they move. Keys stay; ``finalize`` leaves BatchNorm with its bias.
        freeze_batchnorm: from when on BatchNorm uses its running statistics and leaves them as they are; None: never.
        pact_strength: lambda of ``lambda sum alpha^2``, whose gradient is added once per optimizer step.
        protect_schedule: hold early stopping back until ``begin`` and the last change of bits.
        gate: name of a validation metric; logs ``compress/at_target/<gate>``, infinite before that point, so that
            "best" means best at the final bits.
        name: distinguishes several instances.
        quantize_options: options of ``lightning_compress.Quantize``: include, exclude, granularity, calibrator …
            The calibrator is "mse" for lsq, which uses it once, for the first steps of the weights, and "minmax" for
            the others, which use it at every pass.

    Raises:
        ValueError: an option outside its range.
        MisconfigurationException: nothing to quantize, a wrong place in the callback list, a checkpoint with other
            quantizers, one bit together with pruning.

    Examples:
        >>> from lightning_compress.callbacks.quantization import QuantizationAwareTraining
        >>> callback = QuantizationAwareTraining(4, 4, method="lsq", exclude="head")
        >>> callback.transform.bits, callback.transform.edge_bits, callback.transform.exclude
        (4, 8, 'head')

    Source: Jacob et al. 2018 (fake_quant); Esser et al. 2020, Learned Step Size Quantization (lsq); Choi et al. 2018,
        PACT (pact).
    """

    def __init__(
        self,
        weight_bits: int | Mapping[str, int] = 8,
        activation_bits: int | Mapping[str, int] | None = 8,
        method: str = "fake_quant",
        *,
        transform: Quantize | None = None,
        edge_layers_bits: int | None = 8,
        bits_schedule: Mapping[int, int] | None = None,
        begin: float = 0.0,
        unit: str = "fraction",
        observer_momentum: float = 0.01,
        freeze_observer: float | None = 0.5,
        fold_batchnorm: bool = False,
        freeze_batchnorm: float | None = 0.7,
        pact_strength: float = 1e-4,
        protect_schedule: bool = False,
        gate: str | None = None,
        name: str | None = None,
        **quantize_options: Any,
    ) -> None:
        if method not in training.METHODS:
            raise ValueError(f"method={method!r} is unknown; allowed: {', '.join(training.METHODS)}.")
        for value, option in ((freeze_observer, "freeze_observer"), (freeze_batchnorm, "freeze_batchnorm")):
            to_steps(value or 0.0, unit, total=1, per_epoch=1, name=option)
        if not 0 < observer_momentum <= 1:
            raise ValueError(f"observer_momentum={observer_momentum}: allowed is 0 < observer_momentum <= 1.")
        if pact_strength < 0:
            raise ValueError(f"pact_strength={pact_strength}: allowed is >= 0.")
        bits = {"bits": weight_bits, "activation_bits": activation_bits, "edge_bits": edge_layers_bits}
        super().__init__(
            training.options(transform, bits, method, quantize_options),
            method,
            observer_momentum,
            begin=begin,
            unit=unit,
            protect_schedule=protect_schedule,
            gate=gate,
            name=name,
        )
        self.freeze_observer, self.freeze_batchnorm = freeze_observer, freeze_batchnorm
        self.fold_batchnorm = fold_batchnorm
        if fold_batchnorm and self.transform.outputs:
            raise ValueError(
                "fold_batchnorm=True: outputs=True would round between a layer and its BatchNorm."
            )
        self.pact_strength = pact_strength
        self.bits_schedule = {int(epoch): bits for epoch, bits in sorted((bits_schedule or {}).items())}
        for epoch, width in self.bits_schedule.items():
            if epoch < 0:
                raise ValueError(f"bits_schedule has epoch {epoch}: allowed is >= 0.")
            self.transform.grid(width)

    def _forget(self) -> None:
        """Drop the references into a run."""
        super()._forget()
        self._waiting: set[str] = set()  # quantizers that have seen no batch
        self._norms: list[_BatchNorm] = []
        self._frozen: list[_BatchNorm] = []  # norms that were training
        self._phase: tuple[bool, ...] = ()
        self._eager: Any = None  # torch.compile held back
        self._stays: dict[str, str | None] = {}  # BatchNorm -> why it is not folded

    # -- folding ------------------------------------------------------------------------------------------------

    def _install(self, pl_module: LightningModule) -> bool:
        """As the base, with BatchNorm folded in."""
        new = super()._install(pl_module)
        self._stays = folds.fold_all(pl_module) if self.fold_batchnorm else {}
        return new

    # -- fit ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is built, and weights are loaded: set the steps, and see that an optimizer owns them."""
        done = self._done
        self._averages = averages.averages_of(trainer)
        self._norms = [m for m in pl_module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not self._restored and (self._owner is None or self._owner() is not pl_module):
            self._counts, self._span, self._points = [], None, {}  # another module: time begins anew
            self._set_bits(0)
            self._enable(self.begin == 0)
        self._owner = weakref.ref(pl_module)
        self._waiting = {name for name, q in self._quantizers.items() if not q.initialized}
        self._check_pruning(trainer, pl_module)
        folds.check(pl_module, self._stays if self.fold_batchnorm else None)
        if self.method == "lsq" and self.begin == 0 and not self._restored:
            folds.warn_of_unseen(pl_module)
        learning.adopt(trainer, self._done.targets)
        super().on_fit_start(trainer, pl_module)
        for optimizer in trainer.optimizers:
            self._undo.append(optimizer.register_load_state_dict_pre_hook(self._remap).remove)
        learning.warn_of_decay(trainer, self._learned())
        self._warn_of_heat(pl_module)
        weights, inputs = (
            ", ".join(map(str, sorted(set(bits.values())))) for bits in (done.weights, done.inputs)
        )
        stays = {name: f"not folded: {why}" for name, why in self._stays.items() if why}
        rank_zero_info(
            f"QuantizationAwareTraining({self.method}): {len(done.targets)} weights with {weights} bits, inputs of "
            f"{len(done.inputs)} layers with {inputs or 'all'} bits; first and last: "
            f"{listing(sorted(done.edges)) or 'as the others'}. {done.note}{reasons(done.skipped | stays)}"
        )

    def _enable(self, enabled: bool) -> None:
        """Switch rounding on or off; weights start with steps of what they are now."""
        started = []
        for quantizer in self._quantizers.values():
            quantizer.enabled = enabled
        for target in self._done.targets if enabled else ():
            weight = training.quantizer_of(target)
            if isinstance(weight, LearnedWeight) and not weight.initialized:
                weight.start(training.given(target))
                started.append(id(weight))
        self._to_averages({name for name, q in self._quantizers.items() if id(q) in started})

    def _check_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scheduled = self.bits_schedule.values()
        one = {key for key, bits in self._done.weights.items() if bits == 1 or 1 in scheduled}
        for other in callbacks_of(trainer):
            if one and isinstance(other, ScheduledPruning):
                pruned = {
                    t.key for t in survey(pl_module, other.transform.include, other.transform.exclude).targets
                }
                if one & pruned:
                    raise MisconfigurationException(
                        f"{listing(sorted(one & pruned))}: one bit has no zero, so pruned weights would come back. "
                        "Give them 2 bits or more, or exclude them from ScheduledPruning."
                    )

    def _learned(self) -> list[nn.Parameter]:
        return [p for q in self._quantizers.values() for p in q.parameters()]

    def _warn_of_heat(self, pl_module: LightningModule) -> None:
        """Warn of distillation that is known to go wrong."""
        temperature = getattr(pl_module, "temperature", None) or pl_module.hparams.get("temperature")
        fewest = min([*self._done.weights.values(), *self.bits_schedule.values()])
        if isinstance(temperature, int | float) and temperature > 2 and fewest <= 3:
            rank_zero_warn(
                f"distillation with temperature={temperature} together with {fewest}-bit weights has lost its range "
                "without notice before: lower the temperature to 2 or less, and watch compress/levels_used."
            )

    def _remap(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """A dense run's optimizer state: every moment stays with its parameter."""
        return optimizers.remap_optimizer_state(optimizer, state, self._learned())

    # -- time --------------------------------------------------------------------------------------------------

    def _resolve(self, trainer: Trainer) -> tuple[int, int]:
        """Fix the points; the span ends when the last bits are reached."""
        for name in _POINTS:
            value = getattr(self, name)
            self._points[name] = -1 if value is None else self._in_steps(trainer, value, name) if value else 0
        _, per_epoch = self._length(trainer)
        last = max(self.bits_schedule, default=0) * per_epoch
        return self._within(trainer, self._points["begin"], max(self._points["begin"], last))

    def due(self, t: int) -> bool:
        """Every step may be one of the points."""
        return True

    def update(self, trainer: Trainer) -> None:
        """Switch what the present step switches."""
        phase = tuple(0 <= self._points[name] <= self.steps for name in _POINTS)
        if phase == self._phase:
            return
        rounding, observed, _ = phase
        self._enable(rounding)
        for quantizer in self._quantizers.values():
            quantizer.learning = not observed
        self._phase = phase

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the points in optimizer steps, once, and stand where they say."""
        super().on_train_start(trainer, pl_module)
        self.update(trainer)
        learning.complete_schedulers(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change bits."""
        super().on_train_epoch_start(trainer, pl_module)
        self._set_bits(trainer.current_epoch)

    def _set_bits(self, epoch: int) -> None:
        scheduled = [bits for start, bits in self.bits_schedule.items() if start <= epoch]
        wanted: dict[int, int] = {}  # by identity: tied weights share a quantizer
        for target in self._done.targets:
            bits, inputs = self._done.weights[target.key], self._done.inputs.get(target.name)
            if scheduled and target.name not in self._done.edges:
                bits, inputs = scheduled[-1], inputs and max(inputs, scheduled[-1])
            wanted[id(training.quantizer_of(target))] = bits
            for quantizer in training.input_quantizers(target):
                wanted[id(quantizer)] = inputs or quantizer.bits
        changed = {n: bits for n, q in self._quantizers.items() if (bits := wanted[id(q)]) != q.bits}
        for own in (self._quantizers, *map(training.quantizers, self._averages.values() if changed else ())):
            for name, bits in changed.items():
                own[name].set_bits(bits)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold BatchNorm frozen, whatever has switched modes in between."""
        if self._waiting and self._eager is None:
            # First batches decide on signs in Python: compiled, they would be split into a graph for every layer.
            self._eager = torch.compiler.set_stance("force_eager")
            self._undo.append(self._compile_again)
        if (
            trainer.fit_loop._skip_backward
        ):  # Lightning's SWA measures the statistics anew, in an epoch without steps
            self._thaw()
        elif self._phase and self._phase[2]:
            for norm in self._norms:
                if norm.training:
                    norm.eval()
                    self._frozen.append(norm)

    def _thaw(self) -> None:
        while self._frozen:
            self._frozen.pop().train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look after quantizers that have just seen their first batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._compile_again()
        if not self._waiting:
            return
        started = {name for name in self._waiting if self._quantizers[name].initialized}
        self._waiting -= started
        self._to_averages(started)
        clipped = [
            n for n in started if isinstance(self._quantizers[n], ClippedInput) and self._quantizers[n].signed
        ]
        if clipped:
            rank_zero_info(
                f"PACT: {listing(sorted(clipped))} take negative values, so they clip to [-alpha, alpha]."
            )

    def _compile_again(self) -> None:
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
            self._eager = None

    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """An optimizer that updates a weight or a step."""
        ours = {id(t.weight) for t in self._done.targets} | {id(p) for p in self._learned()}
        return bool(ours & updated_by(optimizer))

    @torch.no_grad()
    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Keep learned steps positive."""
        for parameter in self._learned():
            parameter.clamp_min_(SMALLEST)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of ``pact_strength sum alpha^2``."""
        if self.method != "pact" or not self.pact_strength:
            return
        learning.penalize(trainer, optimizer, self._quantizers.values(), self.pact_strength)

    # -- leave -------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        self._thaw()
        super()._release()

    # -- logging -----------------------------------------------------------------------------------------------

    @property
    def logged(self) -> tuple[str, ...]:
        """A named instance has tags of its own."""
        return () if self.name else ("weight_bits", "step", "input_step", "alpha", "sqnr_db", "levels_used")

    @property
    def weight_bits(self) -> float:
        """Mean bits of a weight among the targets, as they are rounded now."""
        sizes = [(t.weight.numel(), training.quantizer_of(t), t.weight) for t in self._done.targets]
        bits = sum(n * (q.bits if q.enabled else w.element_size() * 8) for n, q, w in sizes)
        return bits / sum(n for n, _, _ in sizes)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bits as a metric that other callbacks can monitor; steps, clips and errors of every layer to the loggers."""
        super().on_train_epoch_end(trainer, pl_module)
        widened = [n for n, q in self._quantizers.items() if isinstance(q, ObservedInput) and q.widen()]
        if widened:
            rank_zero_info(
                f"{listing(widened)} take negative values since their first batch: their grids are signed now."
            )
        if self._waiting and self._phase and self._phase[0]:
            rank_zero_warn(
                f"{listing(sorted(self._waiting))} saw no batch in training mode in this epoch, so their layers take "
                "unrounded inputs: exclude layers that never run, or train them with .train()."
            )
            self._waiting = set()
        total = {self._tag("weight_bits"): self.weight_bits}
        if not trainer.barebones:
            pl_module.log_dict(total, logger=False, sync_dist=True)
        if trainer.is_global_zero and trainer.loggers:
            values = {self._tag(name): v for name, v in measure_all(self._done.targets).items()}
            self.log_values(trainer, total | values, step=logged_step(trainer) - 1)
