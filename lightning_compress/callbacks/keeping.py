"""Fine-tune a compressed model while it stays what its codes say: masks, codebooks, hashed weights, grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import rank_zero_info, rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress import codes
from lightning_compress.callbacks.base import callbacks_of, unowned, updated_by
from lightning_compress.callbacks.keepers import GridKeeper, Keeper, keeper, restored
from lightning_compress.callbacks.pruning import ScheduledPruning
from lightning_compress.callbacks.quantizing import QuantizingCallback
from lightning_compress.callbacks.removal import ScheduledRemoval
from lightning_compress.callbacks.scheduled import ScheduledCallback
from lightning_compress.names import clean
from lightning_compress.tables import listing, reasons
from lightning_compress.targets import Patterns, Survey, locate, parameter, survey

_MODES = ("mean", "sum")


class KeepCompressed(ScheduledCallback):
    r"""Train a model that was compressed, and keep it compressed.

    What ``compress`` left on the layers says what is kept:

    - masks (``Prune``): zeros stay zero in weights, gradients and files
    - shared values (``ShareWeights``): who shares a value stays, the values are trained. The gradient of each member is
      ``s_i / n_k sum_j s_j g_j`` over the n_k members of its value (signs s, of hashed weights), so they move together
      under every element-wise optimizer; after a step they are set to their mean
    - grids (``Quantize``): scales stay, integers are trained. Steps are far smaller than the grid, so they add up in a
      latent weight, in the callback's state, and the weight is the nearest point of the grid to it (straight-through).
      To learn the scales too, or to round activations, take ``QuantizationAwareTraining``

    In every forward pass, checkpoint and validation the weights are what can be stored. When the fit ends, the codes
    on the layers are renewed, so that ``save`` goes through them. Weights without a code train as usual.

    Args:
        mode: "mean", or "sum" for the gradient of the shared value itself: its step grows with the number of members.
        hold_zeros: of weights on grids, entries that are 0 stay 0, as after ``Prune``; False lets them move, for
            models that were not pruned. Masks and codebooks know which zeros were pruned.
        include: patterns of layer names to keep.
        exclude: patterns of layer names that may leave their codes.
        name: distinguishes several instances.

    Raises:
        ValueError: an option outside its range.
        MisconfigurationException: nothing is compressed, a wrong place in the callback list, another callback that
            moves the same masks or grids, grids together with weight averaging, a checkpoint of another model.

    Examples:
        >>> from lightning_compress.callbacks.keeping import KeepCompressed
        >>> callback = KeepCompressed()
        >>> callback.mode, callback.hold_zeros
        ('mean', True)

    Source: Han et al. 2016, Deep Compression (trained codebooks); Chen et al. 2015, Compressing Neural Networks with
        the Hashing Trick; Bengio et al. 2013 (straight-through gradients).
    """

    changes_weights: ClassVar[bool] = True

    def __init__(
        self,
        mode: str = "mean",
        *,
        hold_zeros: bool = True,
        include: Patterns = "*",
        exclude: Patterns = (),
        name: str | None = None,
    ) -> None:
        if mode not in _MODES:
            raise ValueError(f"mode={mode!r} is unknown; allowed: {', '.join(_MODES)}.")
        super().__init__(
            schedule="constant",
            begin=0,
            end=0,
            unit="step",
            every=1,
            protect_schedule=False,
            gate=None,
            name=name,
        )
        self.mode, self.hold_zeros, self.include, self.exclude = mode, hold_zeros, include, exclude
        self._places: dict[str, tuple[str, str]] = {}  # parameter name -> layer, name inside the layer
        self._keepers: dict[str, Keeper] = {}
        self._pending: dict[str, Any] | None = None  # stored states that wait for a module
        self._layers: dict[str, nn.Module] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Options and own state; never the model."""
        return super().__getstate__() | {"_layers": {}}

    @property
    def kept(self) -> dict[str, str]:
        """Parameter name -> kind of the code that it is kept to."""
        return {key: found.code.kind for key, found in self._keepers.items()}

    # -- fit ---------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what is compressed (weights are loaded by now), or go on from a checkpoint."""
        skipped: dict[str, str] = {}
        if self._pending is not None:
            self._restore(pl_module, self._pending)
            self._pending = None
        else:
            self._counts, self._span = [], None
            skipped = self._find(trainer, pl_module)
        self._layers = {key: locate(pl_module, *place)[0] for key, place in self._places.items()}
        self._check_others(trainer, pl_module)
        self.hold()
        super().on_fit_start(trainer, pl_module)
        kinds = list(self.kept.values())
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        rank_zero_info(f"KeepCompressed: {len(kinds)} weights ({counts}).{reasons(skipped)}")

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        """Take the codes from the layers; parameter name -> why it is not kept."""
        updated = updated_by(*trainer.optimizers)
        self._places, self._keepers = {}, {}
        skipped: dict[str, str] = {}
        coded = {key: (module, param, code) for key, module, param, code in codes.of(pl_module)}
        wanted = _survey(pl_module, self.include, self.exclude, list(coded))
        for key, (module, param, code) in coded.items():
            weight = parameter(module, param)
            if key not in wanted:
                skipped[key] = "left out by include and exclude"
            elif id(weight) not in updated:
                skipped |= unowned([key])
            elif not code.matches(weight):
                skipped[key] = f"it has left its {code.kind} code since it was compressed"
                rank_zero_warn(
                    f"{key} is not what its {code.kind} code says, so it trains freely: compress the model after its "
                    "weights are loaded."
                )
            else:
                found = keeper(code, weight, self.mode, self.hold_zeros)
                if found is None:
                    skipped[key] = f"nothing is known of how to train under a {code.kind} code"
                else:
                    self._keepers[key] = found
                    self._places[key] = (key.removesuffix(param).removesuffix("."), param)
        if not self._keepers:
            raise MisconfigurationException(
                "KeepCompressed found no compressed weight that trains: compress the model first "
                f"(lightning_compress.compress).{reasons(skipped)}"
            )
        return skipped

    def _check_others(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse callbacks that decide otherwise about the same weights."""
        grids = [key for key, found in self._keepers.items() if isinstance(found, GridKeeper)]
        for other in callbacks_of(trainer):
            who, theirs = type(other).__name__, set[str]()
            if isinstance(other, ScheduledRemoval):
                raise MisconfigurationException(
                    "KeepCompressed and ScheduledRemoval in one fit: who shares a value is not known any more when "
                    "channels go. Remove channels first, then compress, then keep."
                )
            if isinstance(other, WeightAveraging | StochasticWeightAveraging) and grids:
                raise MisconfigurationException(
                    f"averages of weights on a grid are not on it ({listing(grids)}): leave {who} out, or train with "
                    "QuantizationAwareTraining, which keeps the weights in full precision until the end."
                )
            if isinstance(other, ScheduledPruning | QuantizingCallback):
                options = other.transform
                theirs = {t.key for t in survey(pl_module, options.include, options.exclude).targets}
            elif isinstance(other, KeepCompressed) and other is not self:
                theirs = set(other._keepers)
            both = sorted(theirs & self._keepers.keys())
            if both:
                raise MisconfigurationException(
                    f"KeepCompressed and {who} both decide about {listing(both)}: exclude these from one of them, or "
                    "run one fit after the other."
                )

    def counts_steps_of(self, optimizer: Optimizer) -> bool:
        """An optimizer that updates a kept weight."""
        return bool(self._owned(optimizer))

    def _owned(self, optimizer: Optimizer) -> list[tuple[Keeper, nn.Parameter]]:
        ids = updated_by(optimizer) if self._layers else set()
        return [(k, weight) for k, weight in self._pairs() if id(weight) in ids]

    def _pairs(self) -> list[tuple[Keeper, nn.Parameter]]:
        return [
            (self._keepers[key], parameter(layer, self._places[key][1]))
            for key, layer in self._layers.items()
        ]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Give all that share a value the same gradient, and zeros none, so that clipping sees what is used."""
        for found, weight in self._owned(optimizer):
            if weight.grad is not None and not weight.grad.is_sparse:
                weight.grad.copy_(found.gradient(weight.grad))

    @torch.no_grad()
    def after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Back to what can be stored."""
        for found, weight in self._owned(optimizer):
            weight.copy_(found.stepped(weight))

    def update(self, trainer: Trainer) -> None:
        """Nothing is due at any step."""

    @torch.no_grad()
    def hold(self) -> None:
        """Write the nearest weights that can be stored."""
        for found, weight in self._pairs():
            weight.copy_(found.held(weight))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave codes on the layers that say what the weights are now."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same for a fit that was interrupted: it may go on, or be saved."""
        self._leave()
        super().on_exception(trainer, pl_module, exception)

    @torch.no_grad()
    def _leave(self) -> None:
        for key, layer in self._layers.items():
            param = self._places[key][1]
            weight = parameter(layer, param)
            final, code = self._keepers[key].finished(weight)
            weight.copy_(final)
            codes.attach(layer, param, code)

    def _release(self) -> None:
        super()._release()
        self._layers = {}

    # -- what averaging and saving bring back ------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averaged weights surface here: what is validated is what is saved."""
        super().on_validation_epoch_start(trainer, pl_module)
        self.hold()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The saved weights are what can be stored, also averaged ones."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        weights = checkpoint["state_dict"]
        for raw in list(weights) if self._layers else []:
            found = self._keepers.get(clean(raw))
            if found is not None:
                weights[raw] = found.held(weights[raw])

    # -- resume ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Who shares which value, masks, grids and sums of steps: tensors, numbers, strings, lists, dicts only."""
        kept = {
            key: {"place": list(self._places[key]), **found.state()} for key, found in self._keepers.items()
        }
        return super().state_dict() | {"kept": self._pending if self._pending is not None else kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as if training had not been interrupted; the layers need no codes for that."""
        super().load_state_dict(state_dict)
        self._pending = dict(state_dict["kept"])

    def _restore(self, pl_module: LightningModule, stored: Mapping[str, Any]) -> None:
        self._places, self._keepers = {}, {}
        for key, state in stored.items():
            layer, param = state["place"]
            try:
                weight: Tensor = locate(pl_module, layer, param)[1]
                self._keepers[key] = restored(state, weight, self.mode, self.hold_zeros)
            except ValueError as error:
                raise MisconfigurationException(
                    f"the checkpoint keeps {key}, and that cannot go on here: {error}. Resume with the model it was "
                    "written with."
                ) from error
            self._places[key] = (layer, param)


def _survey(module: nn.Module, include: Patterns, exclude: Patterns, coded: list[str]) -> set[str]:
    """Names of coded parameters that the patterns mean; "*" means all of them, also embeddings and biases."""
    wanted = [include] if isinstance(include, str) else list(include)
    named = [pattern for pattern in wanted if pattern != "*"] + (coded if "*" in wanted else [])
    found: Survey = survey(module, named, exclude)
    return {target.key for target in found.targets}
