"""What criteria need to know of layers, measured while they train: their inputs, outputs and gradients of steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.callbacks.sums import LayerSums, StepSums
from lightning_compress.connections import LAYERS
from lightning_compress.pruning.followers import alone_behind, followers
from lightning_compress.spectral import is_spectral
from lightning_compress.stats.fields import BATCHED, OUTPUTS, SINGLE, Stats
from lightning_compress.stats.running import first_tensor
from lightning_compress.targets import Target

_OF_LAYERS = OUTPUTS | {"input_norm"}
MEASURED = _OF_LAYERS | BATCHED | {"norm_scale"}
_SUMS = ("moments", "outputs")  # of a Tracker


class TrainingStats:
    """Running sums of the statistics that a criterion needs, over the batches and steps since the last update.

    Norms are of all samples and positions that the layers get in ``training_step``; "taylor" is the mean over optimizer
    steps of ``(g w)^2``, with the gradient g that the step uses.

    Args:
        needs: fields of ``lightning_compress.stats.Stats``, of those in ``MEASURED``.
        name: of the criterion, for errors.

    Attributes:
        listening: whether forward passes count now.

    Raises:
        MisconfigurationException: a field that cannot be measured in training.
    """

    def __init__(self, needs: Collection[str], name: str) -> None:
        self.needs = frozenset(needs)
        if missing := self.needs - MEASURED:
            why = (
                "the gradient of a step is a mean over samples and says nothing of single ones"
                if missing & SINGLE
                else f"measured are {', '.join(sorted(MEASURED))}"
            )
            raise MisconfigurationException(
                f"criterion {name} needs {', '.join(sorted(missing))}, which is not measured while training ({why}): "
                "use compress(model, [Prune(...)], data=...) before the fit; its zeros are then kept."
            )
        self.listening = False
        self._trackers: dict[str, LayerSums] = {}
        self._derivatives: dict[str, StepSums] = {}
        self._pending: dict[str, StepSums] = {}  # of a step that may yet be skipped
        self._norms: dict[str, nn.Module] = {}
        self._restored: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """The sums; never the model."""
        lent: dict[str, Any] = {"_trackers": {}, "_derivatives": {}, "_pending": {}, "_norms": {}}
        return self.__dict__ | lent | {"_restored": self.state_dict()}

    def refusals(self, model: nn.Module, targets: Sequence[Target], x: Any) -> dict[str, str]:
        """Why some weights cannot be measured.

        Args:
            model: the module.
            targets: its weights.
            x: one input, to see which BatchNorm follows what; None reads the code.

        Returns:
            Target key -> reason.
        """
        refused = {}
        if "norm_scale" in self.needs:
            behind = alone_behind(followers(model, x))
            self._norms = {t.key: behind[t.module] for t in targets if t.module in behind}
            without = (t.key for t in targets if t.key not in self._norms)
            refused = dict.fromkeys(without, "no BatchNorm directly follows it")
        if self.needs & _OF_LAYERS:
            why = (
                "inputs and outputs are measured in training for linear layers, convolutions and dense spectral "
                "convolutions only"
            )
            refused |= {t.key: why for t in targets if not _is_called(t)}
        return refused

    def start(self, targets: Sequence[Target]) -> list[Callable[[], None]]:
        """Follow weights.

        Args:
            targets: the weights.

        Returns:
            Functions that end it.
        """
        self._trackers = {t.key: LayerSums(t, self.needs) for t in targets if self.needs & _OF_LAYERS}
        self._derivatives = {t.key: StepSums(t, self.needs, None) for t in targets if self.needs & BATCHED}
        self._pending = {}
        for t in targets:
            self._restore(t)
        hooks = [
            tracker.target.module.register_forward_hook(
                functools.partial(self._ran, tracker), with_kwargs=True
            )
            for tracker in self._trackers.values()
        ]
        return [hook.remove for hook in hooks]

    def stop(self) -> None:
        """Let go of the weights; the sums stay."""
        self._restored = self.state_dict()
        self._trackers, self._derivatives, self._pending, self._norms = {}, {}, {}, {}
        self.listening = False

    def reset(self) -> None:
        """Forget what was measured."""
        for tracker in self._trackers.values():
            tracker.forget()
        for derivatives in self._derivatives.values():
            derivatives.products, derivatives.batches = None, 0

    def see(self, targets: Iterable[Target], scale: float) -> None:
        """Take the gradients of a step that is about to be made.

        Args:
            targets: the weights that it updates.
            scale: by what the gradients are still multiplied.
        """
        for t in targets if self.needs & BATCHED else ():
            gradient = t.weight.grad
            self._pending[t.key] = StepSums(t, self.needs, None)
            self._pending[t.key].batched([None if gradient is None else gradient / scale])

    def stepped(self, targets: Iterable[Target]) -> None:
        """The step was made: its gradients count.

        Args:
            targets: the weights that it updated.
        """
        for t in targets:
            step = self._pending.pop(t.key, None)
            if step is not None:
                self._derivatives[t.key].join(step)

    def gather(self, trainer: Trainer) -> None:
        """Bring the sums of all processes to rank zero; those of gradients are the same everywhere.

        Args:
            trainer: the running trainer.
        """
        if trainer.world_size == 1 or not self._trackers:
            return
        self._flush()
        mine = {
            key: {name: _cpu(getattr(tracker, name)) for name in _SUMS}
            for key, tracker in self._trackers.items()
        }
        everyone: list[dict[str, dict[str, Tensor | None]]] = [mine] * trainer.world_size
        torch.distributed.all_gather_object(everyone, mine)
        for key, tracker in self._trackers.items():
            for name in _SUMS:
                parts = [found for one in everyone if (found := one[key][name]) is not None]
                total = sum(parts[1:], parts[0]) if parts and trainer.is_global_zero else None
                setattr(tracker, name, None if total is None else total.to(tracker.target.weight.device))

    def stats(self) -> dict[str, Stats]:
        """What was measured since the last update, by target key."""
        self._flush()
        found: dict[str, Stats] = {}
        for key in {**self._trackers, **self._derivatives, **self._norms}:
            fields: dict[str, Any] = {}
            if key in self._trackers:
                fields |= self._trackers[key].fields()
            if key in self._derivatives:
                fields |= self._derivatives[key].fields()
            gamma = getattr(self._norms.get(key), "weight", None)
            found[key] = Stats(**fields, norm_scale=None if gamma is None else gamma.detach().abs())
        return found

    # -- layers --------------------------------------------------------------------------------------------------

    def _ran(self, tracker: LayerSums, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward hook."""
        x, out = first_tensor((args, kwargs)), first_tensor(output)
        if not self.listening or not torch.is_grad_enabled() or x is None or out is None:
            return
        with torch.no_grad():
            if isinstance(module, nn.Linear):
                tracker.linear(x, out)
            elif isinstance(module, LAYERS):
                tracker.convolved(x, out)
            else:
                tracker.watch(module, args, kwargs, output)

    # -- resume --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The sums as tensors on the CPU, by target key."""
        self._flush()
        state: dict[str, dict[str, Any]] = {key: dict(sums) for key, sums in self._restored.items()}
        for key, tracker in self._trackers.items():
            sums = {name: _cpu(getattr(tracker, name)) for name in _SUMS}
            state[key] = {name: value for name, value in sums.items() if value is not None}
        for key, derivatives in self._derivatives.items():
            if derivatives.products is not None:
                products = [value.cpu() for value in derivatives.products]
                state.setdefault(key, {}).update(products=products, batches=derivatives.batches)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, before ``start``."""
        self._restored = {key: dict(sums) for key, sums in state_dict.items()}

    def _flush(self) -> None:
        for tracker in self._trackers.values():
            tracker.flush()

    def _restore(self, target: Target) -> None:
        sums, device = self._restored.pop(target.key, {}), target.weight.device
        if target.key in self._trackers:
            for name in sums.keys() & set(_SUMS):
                setattr(self._trackers[target.key], name, sums[name].to(device))
        if target.key in self._derivatives and "products" in sums:
            derivatives = self._derivatives[target.key]
            derivatives.products = [value.to(device) for value in sums["products"]]
            derivatives.batches = int(sums["batches"])


def _is_called(target: Target) -> bool:
    """Whether the layer of a weight runs with its inputs; attention takes the weights of its projections itself."""
    if is_spectral(target.module):
        return tuple(target.weight.shape) == tuple(target.module.weight.shape)  # type: ignore[arg-type]
    own = isinstance(target.module, LAYERS) and not isinstance(target.module, NonDynamicallyQuantizableLinear)
    return own and target.param == "weight"


def _cpu(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().cpu()
