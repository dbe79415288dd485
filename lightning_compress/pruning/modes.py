"""Fewer modes in spectral convolutions: the outer frequencies are cut out of the weight itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.names import clean, lookup, matches
from lightning_compress.plans import Plan
from lightning_compress.pruning.boxes import centred, cut, cut_masks, refusal, smallest_box
from lightning_compress.pruning.operators import agree_on_modes, left_alone
from lightning_compress.spectral import (
    dense_weight,
    is_spectral,
    set_weight,
    spectral_layers,
    stored_modes,
)
from lightning_compress.stats import Calibration
from lightning_compress.tables import listing
from lightning_compress.transform import Transform

_OPTIONS = ("modes", "keep_ratio", "energy_ratio")


@dataclass(frozen=True)
class TruncateModes(Transform):
    r"""Keep only the lowest frequencies of spectral convolutions of neuraloperator.

    Of a mode axis that stores K frequencies, k stay: indices ``floor(K/2) - floor(k/2) ... + k - 1``, centred on
    frequency 0; of the last axis the first k, since it holds the non-negative frequencies only. The weight is cut:
    fewer numbers are stored and multiplied, outputs equal those with the other modes at zero, and the result is what
    neuraloperator would build with fewer modes. Dense weights lose the modes themselves, Tucker and CP weights the
    rows of their mode factors, TT weights the slices of their mode cores. Masks are cut along.

    Args:
        modes: modes to keep in units of the constructor, where n of the last axis means n // 2 + 1 stored; or a
            mapping from name pattern to modes.
        keep_ratio: instead: share of every axis, ``k = max(1, round(ratio K))``, in (0, 1].
        energy_ratio: instead: per layer the smallest box with ``sum |w|^2 >= ratio total``, found by taking one mode
            at a time off the axis that loses least, in (0, 1].
        include: patterns of layer names to truncate.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: not exactly one of the first three options; modes that a layer does not store.

    Examples:
        >>> from neuralop.models import FNO
        >>> net = FNO(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=4, n_layers=1)
        >>> cut = compress(net, [TruncateModes(modes=(4, 4))]).model
        >>> net.fno_blocks.convs[0].weight.shape, cut.fno_blocks.convs[0].weight.shape
        (torch.Size([4, 4, 8, 5]), torch.Size([4, 4, 4, 3]))
        >>> cut.n_modes
        (4, 4)

    Source: Li et al. 2021, Fourier Neural Operator for Parametric Partial Differential Equations.
    """

    modes: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    keep_ratio: float | None = None
    energy_ratio: float | None = None
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    structural: ClassVar[bool] = True
    refuses_after: ClassVar[Mapping[str, str]] = {
        "grid": "the scales of quantized weights belong to the uncut ones; truncate first, then quantize"
    }

    def __post_init__(self) -> None:
        given = [name for name in _OPTIONS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"TruncateModes got {' and '.join(given)}: give one of {', '.join(_OPTIONS)}.")
        for name in ("keep_ratio", "energy_ratio"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}={share}: allowed is 0 < {name} <= 1.")
        tables = [] if self.modes is None else [self.modes]
        for counts in tables if not isinstance(self.modes, Mapping) else self.modes.values():
            if isinstance(counts, int | str) or not all(isinstance(n, int) and n >= 1 for n in counts):
                raise ValueError(
                    f"modes={self.modes!r}: allowed are tuples of integers >= 1, one for each axis."
                )

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide how many modes every layer keeps; writes nothing.

        Args:
            model: any module.
            data: not used.

        Returns:
            Layer name -> start and stop of every mode axis, shape of the weight before, modes in constructor units.
            ``data`` of the plan names layers that used fewer modes than they store.

        Raises:
            ValueError: none of the options is given; modes of a wrong length or beyond what a layer stores.
        """
        if all(getattr(self, name) is None for name in _OPTIONS):
            raise ValueError(f"TruncateModes needs one of {', '.join(_OPTIONS)}.")
        found = spectral_layers(model, self.include, self.exclude)
        skipped = left_alone(model, found, self.include, self.exclude)
        wanted = self._wanted(found)
        layers: dict[str, dict[str, Any]] = {}
        reduced, whole = [], bool(found)
        for name, layer in found.items():
            why = refusal(model, layer) or (
                None if name in wanted else f"no pattern of modes={self.modes} fits"
            )
            if why:
                skipped[name], whole = why, False
                continue
            stored, used = stored_modes(layer), tuple(layer.n_modes)
            kept, units = wanted[name]
            whole = whole and kept == stored
            if kept == used == stored:
                skipped[name] = f"it stores {_times(stored)} modes, as asked"
                continue
            if used != stored:
                reduced.append(f"{name} used {_times(used)} of {_times(stored)} stored modes")
            box = centred(stored, kept)
            layers[name] = {
                "start": [s.start for s in box],
                "stop": [s.stop for s in box],
                "shape": list(layer.weight.shape),
                "n_modes": list(units),
            }
        note = f"{'; '.join(reduced)}: cut from the stored weight" if reduced else ""
        return Plan(layers, skipped, identity=whole, data=note)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Cut the weights, and tell layers, blocks and models their new modes.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model has no such layer, or of another shape, or a decision is malformed; nothing is
                written then.
        """
        modules = {clean(name): module for name, module in model.named_modules(remove_duplicate=False)}
        todo = [_checked(model, name, modules.get(name), d) for name, d in plan.layers.items()]
        for layer, box, _ in todo:
            masks = cut_masks(layer, box)
            with torch.no_grad():
                weight = cut(layer.weight, box)
            if isinstance(weight, Tensor):
                layer.weight = weight
            else:
                set_weight(layer, weight, layer._contract)
            for param, mask in masks.items():
                codes.set_mask(layer, param, mask)
            layer._n_modes = [s.stop - s.start for s in box]
            layer.max_n_modes = list(layer._n_modes)
        agree_on_modes(model, {layer: units for layer, _, units in todo})

    def _wanted(self, found: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Layer name -> modes to store, and the same in constructor units."""
        if isinstance(self.modes, Mapping):
            for pattern in self.modes:
                if not any(p == pattern or matches(pattern, *_names(p)) for p in found) and pattern != "*":
                    raise ValueError(
                        f"modes has {pattern!r}, which fits no spectral convolution; these are: "
                        f"{listing(list(found))}."
                    )
        wanted = {}
        for name, layer in found.items():
            stored = stored_modes(layer)
            if self.modes is not None:
                counts = lookup(self.modes, *_names(name)) if isinstance(self.modes, Mapping) else self.modes
                if counts is not None:
                    wanted[name] = (_stored(name, layer, counts), tuple(counts))
                continue
            if self.keep_ratio is not None:
                kept = tuple(max(1, round(self.keep_ratio * size)) for size in stored)
            else:
                assert self.energy_ratio is not None
                energy = dense_weight(layer).detach().abs().double().square()
                kept = smallest_box(energy.flatten(0, -len(stored) - 1).sum(0), self.energy_ratio)
            last = kept[-1] if layer.complex_data else max(1, 2 * (kept[-1] - 1))
            wanted[name] = kept, (*kept[:-1], last)
        return wanted


def _names(layer: str) -> tuple[str, ...]:
    return layer, f"{layer}.weight", f"{layer}.weight.tensor"


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _stored(name: str, layer: Any, counts: Sequence[int]) -> tuple[int, ...]:
    """Modes to store for modes in constructor units."""
    stored = stored_modes(layer)
    kept = tuple(counts) if layer.complex_data else (*counts[:-1], counts[-1] // 2 + 1)
    if len(kept) != len(stored) or any(k > size for k, size in zip(kept, stored, strict=True)):
        most = stored if layer.complex_data else (*stored[:-1], 2 * stored[-1] - 1)
        raise ValueError(
            f"modes={tuple(counts)}: {name} stores {_times(stored)} modes, so allowed are "
            f"{len(stored)} numbers up to {_times(most)}."
        )
    return kept


def _checked(
    model: nn.Module, name: str, layer: Any, decided: Mapping[str, Any]
) -> tuple[Any, list[slice], list[int]]:
    """The layer that a plan means, its box and its modes in constructor units."""
    if layer is None or not is_spectral(layer):
        raise ValueError(f"the plan truncates {name}, which is not a spectral convolution of this model.")
    try:
        kept = [int(b) - int(a) for a, b in zip(decided["start"], decided["stop"], strict=True)]
        stored, units = stored_modes(layer), [int(n) for n in decided["n_modes"]]
        fits = len(kept) == len(stored) and all(1 <= k <= size for k, size in zip(kept, stored, strict=True))
        box = centred(stored, kept) if fits else []
        fits = fits and [s.start for s in box] == list(decided["start"])
        fits = fits and list(_stored(name, layer, units)) == kept and min(units) >= 1
        fits = fits and list(layer.weight.shape) == list(decided["shape"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"the plan for {name} is malformed: {error!r}.") from None
    if not fits:
        raise ValueError(
            f"the plan cuts {name} of shape {decided['shape']} at {decided['start']} ... {decided['stop']}, "
            f"its weight has shape {list(layer.weight.shape)}: apply the plan to the architecture it was made for."
        )
    why = refusal(model, layer)
    if why:
        raise ValueError(f"{name} cannot be truncated: {why}.")
    return layer, box, units
