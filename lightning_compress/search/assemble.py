"""From what a genome says to a compressed model, remembering what was decided for each layer.

Layers are compressed independently of one another: zeros are ranked within a layer, and no method looks at inputs. So
a layer's decisions depend on its own settings alone; they are planned once and used by every genome that shares them.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_compress.lowrank import Factorize
from lightning_compress.pipelines.keys import check_keys
from lightning_compress.plans import Plan
from lightning_compress.pruning.layers import DropLayers
from lightning_compress.pruning.sparsify import Prune
from lightning_compress.quantization.quantize import Quantize
from lightning_compress.search.space import Settings
from lightning_compress.sharing import ShareWeights
from lightning_compress.stats import Calibration
from lightning_compress.steps import digests, measured, run_step
from lightning_compress.targets import find
from lightning_compress.transform import Step, Transform, record

_CACHE_BYTES = 256 << 20
# setting -> transform, whose option of that name takes a mapping, and options that keep layers independent; in order
METHODS: dict[str, tuple[type[Transform], dict[str, Any]]] = {
    "rank_ratio": (Factorize, {}),
    "sparsity": (Prune, {"scope": "layer"}),
    "clusters": (ShareWeights, {}),
    "bits": (Quantize, {}),
}
_WHOLE = ("bits", "clusters")
_Decided = dict[str, dict[str, Any]]


class Assembler:
    """Compresses copies of one model as genomes say; can be pickled, without what it remembers.

    Args:
        model: the original.
        layers: full names of all weights that may be asked for.
        options: transform name -> further options, such as ``{"Quantize": {"calibrator": "minmax"}}``.
        x: an input, to leave blocks out.

    Raises:
        ValueError: options of a transform that is not used here.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        x: Any = None,
    ) -> None:
        self.model, self.layers, self.options, self.x = model, tuple(layers), dict(options or {}), x
        check_keys(self.options, [kind.__name__ for kind, _ in METHODS.values()], "options")
        named = {t.key: t.name for t in find(model, ["*", *self.layers])}
        self._names = {key: named[key] for key in self.layers}
        usual = {t.key for t in find(model)}
        # Such as embeddings, which are taken only by a pattern of their own, and the factors they may become.
        self._include = ["*", *(f"{name}*" for key, name in self._names.items() if key not in usual)]
        self._plans: OrderedDict[Any, _Decided] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Assembler, (self.model, self.layers, self.options, self.x)

    def build(self, settings: Settings) -> tuple[nn.Module, list[Transform]]:
        """A compressed copy: the model that ``compress(model, transforms)`` gives.

        Args:
            settings: layer or block -> setting -> value.

        Returns:
            The copy, which carries its steps, and the transforms.
        """
        work = copy.deepcopy(self.model)
        done: list[Transform] = []
        for kind in METHODS:
            transform = self._step(work, kind, settings)
            if transform is not None:
                done.append(transform)
        dropped = tuple(name for name, chosen in settings.items() if chosen.get("keep") == 0)
        if dropped:
            done.append(DropLayers(layers=dropped))
            run_step(work, done[-1], Calibration(example_input=self.x))
        return work, done

    def _step(self, work: nn.Module, kind: str, settings: Settings) -> Transform | None:
        """Apply one method to all layers that have its setting."""
        wanted = {layer for layer in self.layers if kind in settings.get(layer, {})}
        owner: dict[str, str] = {}
        for target in find(work, self._include) if wanted else ():
            layer = self._owner(target.key)
            if layer in wanted and bool(target.weight.detach().any()):
                owner[target.key] = layer
        if not owner:
            return None
        known: dict[str, _Decided] = {}
        for layer in sorted(wanted):
            held = self._recall((kind, layer, self._history(kind, settings[layer])))
            if held is not None:
                known[layer] = held
        missing = {key: layer for key, layer in owner.items() if layer not in known}
        if missing:
            known |= {layer: {} for layer in missing.values()}
            known |= self._planned(work, kind, settings, missing)
            for layer in set(missing.values()):
                self._remember((kind, layer, self._history(kind, settings[layer])), known[layer])
        decided = {key: entry for layer in known for key, entry in known[layer].items()}
        if not decided:
            return None
        transform = self._transform(kind, settings, owner)
        plan = Plan({key: decided[key] for key in owner if key in decided})
        before = digests(work)
        transform.apply(work, plan)
        coverage = measured(before, work, {})
        record(work, Step(type(transform).__name__, transform.config(), plan, coverage))
        return transform

    def _planned(
        self, work: nn.Module, kind: str, settings: Settings, missing: Mapping[str, str]
    ) -> dict[str, _Decided]:
        """Decisions for layers that are not remembered, by layer."""
        transform = self._transform(kind, settings, missing)
        found: dict[str, _Decided] = {}
        for key, entry in transform.plan(work).layers.items():
            if key not in missing:
                raise ValueError(
                    f"{type(transform).__name__} with {self.options} also changes {key}: layers must not depend on one "
                    "another in a search; leave that option out."
                )
            found.setdefault(missing[key], {})[key] = entry
        return found

    def _transform(self, kind: str, settings: Settings, owner: Mapping[str, str]) -> Transform:
        method, fixed = METHODS[kind]
        values = {key: settings[layer][kind] for key, layer in owner.items()}
        table = {key: int(value) if kind in _WHOLE else value for key, value in values.items()}
        include = self._include if len(self._include) > 1 else "*"
        return method(**{kind: table, "include": include, **fixed, **self.options.get(method.__name__, {})})

    def _owner(self, key: str) -> str:
        """The weight of the original that a weight is, or is a factor of; "" if it is of another layer."""
        if key in self._names:
            return key
        inside = [k for k, name in self._names.items() if key.startswith((f"{k}.", f"{name}."))]
        return max(inside, key=lambda k: (key.startswith(f"{k}."), len(self._names[k])), default="")

    @staticmethod
    def _history(kind: str, chosen: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
        """The settings that a layer's decisions depend on: this one and those applied before."""
        kinds = list(METHODS)
        return tuple((k, chosen[k]) for k in kinds[: kinds.index(kind) + 1] if k in chosen)

    def _recall(self, key: Any) -> _Decided | None:
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
            return self._plans.get(key)

    def _remember(self, key: Any, decided: _Decided) -> None:
        with self._lock:
            if key not in self._plans:
                self._plans[key] = decided
                self._bytes += _nbytes(decided)
            while self._bytes > _CACHE_BYTES and len(self._plans) > 1:
                self._bytes -= _nbytes(self._plans.popitem(last=False)[1])


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_nbytes, parts))
