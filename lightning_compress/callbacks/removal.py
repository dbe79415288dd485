"""Remove channels while training: masked at first, or cut out at once, with everything in the Trainer following."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_compress.callbacks.averages import averages_of
from lightning_compress.callbacks.base import callbacks_of, log_due, structural
from lightning_compress.callbacks.copies import ExampleInput, part_of
from lightning_compress.callbacks.masked import MaskingCallback
from lightning_compress.callbacks.masks import HeldMasks
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.callbacks.resized import cut_everywhere
from lightning_compress.callbacks.scheduled import ScheduledCallback
from lightning_compress.channels.families import Channels
from lightning_compress.channels.watcher import tensors_of
from lightning_compress.compress import compress
from lightning_compress.functional.masks import count_pruned
from lightning_compress.names import clean
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.pruning.channels import RemoveChannels
from lightning_compress.pruning.silence import silencing
from lightning_compress.stats import Calibration
from lightning_compress.steps import digests, measured
from lightning_compress.targets import Axes, Target
from lightning_compress.transform import Step, record, replay

_WHEN = ("end", "during")


class ScheduledRemoval(ScheduledCallback):
    r"""Take channels out along a schedule during ``Trainer.fit``.

    The share of channels (or of MACs or parameters, with a budget) that has gone at step t is
    ``f(clip((t - begin) / (end - begin), 0, 1))`` of what the transform asks for, with f the schedule.

    ``remove_at="end"``: channels that have gone are held at zero, wherever parameters have entries for them, in
    weights, gradients and checkpoints, as ``ScheduledPruning`` holds masks; the module keeps its shapes. When the fit
    ends, ``callback.removed`` is a copy without them.

    ``remove_at="during"``: they are cut out of the module at every update, so that the steps after it are faster. The
    Parameters stay the same objects; the optimizer's state, averaged copies and the wrapper of distributed training
    follow. Checkpoints carry the cuts, and a fresh module gets them before its weights are loaded; without this
    library they load into a module with the smaller shapes only.

    The channels that belong together are found by running ``pl_module.example_input_array``, or else the first input
    that ``forward`` got.

    Args:
        transform: what to remove; or give the options of ``lightning_compress.RemoveChannels`` directly.
        remove_at: "end" or "during".
        schedule: "constant", "linear", "cubic", "polynomial", "cosine", "exponential", a mapping of steps, a function
            of progress, or its import path.
        begin: first point of the schedule.
        end: last point; from then on all that is asked for has gone.
        unit: "fraction" (of all optimizer steps), "step" or "epoch".
        every: optimizer steps between removals.
        attribute: name of the submodule to work on; None for the whole LightningModule.
        protect_schedule: hold early stopping back until ``end``.
        gate: name of a validation metric; logs ``compress/at_target/<gate>``, infinite before ``end``.
        name: distinguishes several instances.
        options: options of ``lightning_compress.RemoveChannels``: ratio, budget, criterion, scope, include, exclude …

    Attributes:
        removed: with "end", the copy without the channels after a fit; None before.

    Raises:
        ValueError: an option outside its range; a budget of latency, which cannot follow a schedule.
        MisconfigurationException: nothing to remove; no input to run the module with; with "during", callbacks that
            hold masks or quantizers of the old shapes.

    Examples:
        >>> callback = ScheduledRemoval(ratio=0.5, remove_at="during", every=100)
        >>> callback.transform.ratio
        0.5

    Source: He et al. 2018, Soft Filter Pruning; Zhu & Gupta 2017, To Prune or Not to Prune (schedules); Fang et al.
    2023, DepGraph.
    """

    changes_weights: ClassVar[bool] = True

    def __init__(
        self,
        transform: RemoveChannels | None = None,
        *,
        remove_at: str = "end",
        schedule: str | dict[float, float] = "cubic",
        begin: float = 0.1,
        end: float = 0.5,
        unit: str = "fraction",
        every: int = 100,
        attribute: str | None = None,
        protect_schedule: bool = False,
        gate: str | None = None,
        name: str | None = None,
        **options: Any,
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
        given = RemoveChannels(**options)
        if transform is not None and given != RemoveChannels():
            raise ValueError(f"give either transform= or its options, not both: {sorted(options)}.")
        self.transform = given if transform is None else transform
        if remove_at not in _WHEN:
            raise ValueError(f"remove_at={remove_at!r} is unknown; allowed: {', '.join(_WHEN)}.")
        if self.transform.budget is not None and self.transform.budget[0] == "latency":
            raise ValueError(
                "a budget of latency is measured, and follows no schedule: give one of macs or params."
            )
        if isinstance(self.transform.ratio, str):
            raise ValueError(f"ratio={self.transform.ratio!r} is not for a schedule: give a share in [0, 1).")
        self.remove_at, self.attribute = remove_at, attribute
        self.removed: nn.Module | None = None
        self._sizes: dict[str, int] = {}  # family -> its channels before anything went
        self._before: dict[str, float] = {}  # macs and params before anything went
        self._left: dict[str, float] = {}  # and now, as shares
        self._gone: dict[str, list[int]] = {}  # with "end": family -> channels that have gone
        self._held = HeldMasks()
        self._due = False
        self._example = self._new_example()
        self._trainer: Trainer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Options and own state; nothing of a running fit."""
        return super().__getstate__() | {"_example": self._new_example(), "_trainer": None}

    def _new_example(self) -> ExampleInput:
        return ExampleInput(self.attribute, type(self).__name__)

    # -- fit ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the Trainer whose averaged copies a checkpoint's cuts concern too."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    def _replay(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """As the base, and in averaged copies, which were made before."""
        super()._replay(pl_module, checkpoint)
        steps = [(e["prefix"], Step.from_json(e["step"])) for e in map(json.loads, self._structure)]
        for copy in averages_of(self._trainer).values() if self._trainer is not None else ():
            replay(copy, steps)

    def _check(self, trainer: Trainer) -> None:
        super()._check(trainer)
        others = (MaskingCallback, QuantizationAwareTraining)
        for other in callbacks_of(trainer):
            if self.remove_at == "during" and isinstance(other, others):
                raise MisconfigurationException(
                    f"ScheduledRemoval(remove_at='during') changes shapes that {type(other).__name__} holds masks or "
                    "quantizers for: use remove_at='end', or train with it in a second fit."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first input; take over what a checkpoint says has gone."""
        self.removed = None
        self._example.start(pl_module, self._undo)
        super().on_fit_start(trainer, pl_module)
        if self._held.masks:
            self._hold_these(pl_module)

    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """Any optimizer."""
        return True

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Zero the gradients of channels that have gone."""
        self._held.hold_gradients(optimizer)

    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Hold their zeros."""
        self._held.hold(optimizer)

    def update(self, trainer: Trainer) -> None:
        """Channels go when the batch is over, outside of the optimizer's step."""
        self._due = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove what is due; log."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due:
            self._due = False
            self._remove(trainer, pl_module)
        if log_due(trainer):
            self.log_values(trainer, self._totals())

    def _remove(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The one place where channels go."""
        part = part_of(pl_module, self.attribute, type(self).__name__)
        example = self._example.value(trainer, pl_module)
        if example is None:
            raise MisconfigurationException(
                "ScheduledRemoval found no input to run the module with: set example_input_array, or attribute= to "
                "the submodule that is called with tensors."
            )
        inputs = Calibration(example_input=example, samples=self.transform.samples, seed=self.transform.seed)
        with torch.no_grad():
            (self._cut if self.remove_at == "during" else self._mask)(trainer, pl_module, part, inputs)

    def _first_look(self, found: Channels, part: nn.Module) -> None:
        """Remember what there was."""
        if self._sizes:
            return
        if not found.families:
            raise MisconfigurationException(
                f"ScheduledRemoval found nothing to remove: {next(iter(found.fixed.values()), 'no channels')}."
            )
        self._sizes = {family.name: len(family) for family in found.families}
        self._before = {"macs": found.macs([]), "params": float(found.params([], _shapes(part)))}

    def _options_now(self, found: Channels, part: nn.Module) -> RemoveChannels:
        """The transform with what it still has to remove from the module as it is."""
        done = self.between(0.0, 1.0)(self.steps)
        options = self.transform
        if options.budget is not None:
            kind, share = options.budget
            now = found.macs([]) if kind == "macs" else float(found.params([], _shapes(part)))
            wanted = (1 + (share - 1) * done) * self._before[kind]
            return dataclasses.replace(options, budget=(kind, min(wanted / now, 1.0)))
        if options.scope == "global":
            assert not isinstance(options.ratio, str)
            total, now = sum(self._sizes.values()), sum(map(len, found.families))
            kept = total - count_pruned(float(options.ratio) * done, total)  # type: ignore[arg-type]
            return dataclasses.replace(options, ratio=max(1 - kept / now, 0.0))
        shares = {}
        for family in found.families:
            size = self._sizes.get(family.name, len(family))
            kept = size - count_pruned(options.share(family) * done, size)
            shares[family.name] = max(1 - kept / len(family), 0.0)
        return dataclasses.replace(options, ratio=shares)

    def _cut(
        self, trainer: Trainer, pl_module: LightningModule, part: nn.Module, inputs: Calibration
    ) -> None:
        """Take the channels out, the same ones on every process."""
        layers: Any = None
        if trainer.is_global_zero:
            found, skipped, trials = self.transform.find(part, inputs)
            self._first_look(found, part)
            options = self._options_now(found, part)
            scores, _ = options.scores(part, found, inputs)
            gone = options.choose(part, found, scores, trials)
            plan, gone = options.planned(part, found, skipped, gone, inputs, trials)
            layers = to_json(plan) if gone else None
            self._see_left(found, part, gone)
        seen = layers, self._sizes, self._before, self._left
        layers, self._sizes, self._before, self._left = trainer.strategy.broadcast(seen, src=0)
        if layers is not None:
            plan = from_json(layers)
            before = digests(part)
            cut_everywhere(trainer, part, clean(self.attribute or ""), plan.layers)
            name, plan = _localized(plan)
            step = Step("RemoveChannels", self.transform.config(), plan, measured(before, part, plan.skipped))
            record(part.get_submodule(name), step)
            for copy in averages_of(trainer).values():
                record(copy.get_submodule(self.attribute or "").get_submodule(name), step)
            for callback in callbacks_of(trainer):
                if hasattr(callback, "_structure"):
                    callback._structure = structural(pl_module)  # for checkpoints written from now on

    def _mask(
        self, trainer: Trainer, pl_module: LightningModule, part: nn.Module, inputs: Calibration
    ) -> None:
        """Silence the channels; those that have gone stay gone."""
        found, _, trials = self.transform.find(part, inputs)
        self._first_look(found, part)
        options = self._options_now(found, part)
        scores, _ = options.scores(part, found, inputs)
        for name, indices in self._gone.items():
            scores[name][indices] = -torch.inf
        gone = set(options.choose(part, found, scores, trials))
        for family in found.families:
            lost = [i for i, c in enumerate(family.classes) if c in gone]
            self._gone[family.name] = sorted({*self._gone.get(family.name, ()), *lost})
        self._gone = trainer.strategy.broadcast(self._gone, src=0)
        classes = [f.classes[i] for f in found.families for i in self._gone[f.name]]
        prefix = f"{clean(self.attribute)}." if self.attribute else ""
        masks = {prefix + key: mask for key, mask in silencing(part, found, classes).items()}
        self._held.masks = masks
        self._hold_these(pl_module)
        self._held.move(masks, trainer)
        self._see_left(found, part, classes)

    def _hold_these(self, pl_module: LightningModule) -> None:
        """Follow the parameters that have masks."""
        modules = {clean(name): module for name, module in pl_module.named_modules()}
        targets = []
        for key in self._held.masks:
            owner, _, param = key.rpartition(".")
            targets.append(Target(owner, modules[owner], param, Axes(0, None)))
        self._held.start(targets, lambda t: torch.ones_like(t.weight, dtype=torch.bool))

    def _see_left(self, found: Channels, part: nn.Module, gone: Sequence[int]) -> None:
        """How much is left without these channels."""
        left = {"macs": found.macs(gone), "params": float(found.params(gone, _shapes(part)))}
        self._left = {kind: value / max(self._before[kind], 1.0) for kind, value in left.items()}

    # -- the end -----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the end state, and say when the schedule was cut short."""
        self._held.leave()
        self.log_values(trainer, self._totals())
        if not self.finished:
            rank_zero_warn(
                f"training stopped at optimizer step {self.steps}, before the removal ends at step {self.span[1]}: "
                f"{self._left.get('macs', 1.0):.3f} of the MACs are left. Train longer, lower end=, or set "
                "protect_schedule=True."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With "end": the copy without the channels that have gone."""
        if self.remove_at != "end" or not any(self._gone.values()):
            return
        part = part_of(pl_module, self.attribute, type(self).__name__)
        example = self._example.value(trainer, pl_module)
        options = dataclasses.replace(self.transform, ratio="silent", budget=None)
        try:
            self.removed = compress(part, [options], example_input=example).model
        except Exception as error:  # whatever it is: raising would end a program whose training has succeeded
            rank_zero_warn(f"ScheduledRemoval made no smaller copy, because that failed: {error!r}")
            return
        rank_zero_info(
            f"ScheduledRemoval: {self._left['macs']:.3f} of the MACs are left in callback.removed."
        )

    def _release(self) -> None:
        super()._release()
        self._held.stop()
        self._example = self._new_example()
        self._trainer = None

    # -- what averaging and saving bring back ------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights surface here: their channels are silent too."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._held.hold()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The saved weights have their zeros, also averaged ones."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self._held.hold_saved(checkpoint["state_dict"])

    # -- logging and resume ------------------------------------------------------------------------------------

    @property
    def logged(self) -> tuple[str, ...]:
        """Shares of the original's MACs and parameters."""
        return () if self.name else ("macs_left", "params_left")

    def _totals(self) -> dict[str, float]:
        return {self._tag(f"{kind}_left"): self._left.get(kind, 1.0) for kind in ("macs", "params")}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Totals as metrics that other callbacks can monitor."""
        super().on_train_epoch_end(trainer, pl_module)
        if not trainer.barebones:
            pl_module.log_dict(self._totals(), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """What there was, what has gone, and counters."""
        return (
            super().state_dict()
            | self._held.state_dict()
            | {"sizes": dict(self._sizes), "before": dict(self._before), "left": dict(self._left)}
            | {"gone": {name: list(indices) for name, indices in self._gone.items()}}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted."""
        super().load_state_dict(state_dict)
        self._held.load_state_dict(state_dict)
        self._sizes, self._before = dict(state_dict["sizes"]), dict(state_dict["before"])
        self._left = dict(state_dict["left"])
        self._gone = {name: list(indices) for name, indices in state_dict["gone"].items()}


def _shapes(part: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape."""
    return {key: tuple(t.shape) for key, t in tensors_of(part).items() if isinstance(t, nn.Parameter)}


def _localized(plan: Plan) -> tuple[str, Plan]:
    """The innermost module that holds all that is cut, and the plan for it: so it can be saved by itself."""
    owners = [key.removesuffix("()").split(".")[: None if key.endswith("()") else -1] for key in plan.layers]
    shared = os.path.commonprefix(owners)  # noqa: RUF071 (lists are compared item by item)
    start = len(".".join(shared)) + 1 if shared else 0
    layers = {
        ("()" if key.endswith("()") and len(key) < start + 2 else key[start:]): e
        for key, e in plan.layers.items()
    }
    return ".".join(shared), dataclasses.replace(plan, layers=layers)
