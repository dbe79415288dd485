"""The transform: which layers become products, under which scheme and at which rank."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_compress.lowrank.all_schemes import scheme_of, schemes
from lightning_compress.lowrank.budget import COSTS, allocate, present_costs
from lightning_compress.lowrank.candidates import calls_of, candidates
from lightning_compress.lowrank.ranks import Cut, Rule
from lightning_compress.lowrank.schemes import Decomposition, Option, Scheme, Shapes
from lightning_compress.names import lookup, matches
from lightning_compress.plans import Plan
from lightning_compress.stats import Calibration, Stats
from lightning_compress.stats.matrices import bias_of, collected, corrected
from lightning_compress.tables import listing
from lightning_compress.targets import Axes, Target, locate, replace_modules, survey
from lightning_compress.transform import Transform

_CRITERIA = ("rank_ratio", "energy_ratio", "params_ratio", "rank")
_DEFAULT_RATIO = 0.5
_NO_AXES = Axes(0, None)  # schemes go by the type of the layer


@dataclass(frozen=True)
class Factorize(Transform):
    r"""Write weights as products of thinner ones: fewer parameters and fewer MACs.

    A weight seen as a matrix W (m x n) becomes ``W_r = (U_r sqrt(S_r)) (sqrt(S_r) V_r^H)``, two layers in a row. With
    ``activation_aware`` the product is the best one for the layer's outputs, ``min E|W x - W_r x|^2``, found in
    ``W G^(1/2)`` with ``G = E[x x^H]`` (centred where a bias makes up for the mean). The layer keeps its bias
    Parameter, which then takes in the mean error.

    Schemes. Linear and Embedding: "svd". Convolutions, grouped and transposed ones too: "channel" (k x k to r
    channels, then 1 x 1); 2-D ones also "spatial" (k x 1, then 1 x k). Spectral convolutions of neural operators:
    "channel_in", "channel_out", "channel", "modes", "tucker", "cp", "tt". A layer is left as it is, with the reason, if
    its factors would store at least as much.

    At most one of the first five options is given; without any, ``rank_ratio=0.5``. The first four may be mappings from
    name pattern to value.

    Args:
        rank_ratio: share of full rank in (0, 1]: ``r = ceil(ratio R)``.
        energy_ratio: share of the energy in (0, 1]: smallest r with ``sum_{i<=r} s_i^2 >= ratio sum s_i^2``.
        params_ratio: share of the layer's parameters in (0, 1]: largest r whose factors store no more.
        rank: r itself, >= 1.
        budget: ("params" | "macs" | "rank", share in (0, 1] of the present cost of all targets together): ranks of
            all layers (and schemes, with "auto") that lose least, found by a multiple-choice knapsack.
        scheme: name, "auto" for the one that loses least per number saved, or a mapping from name pattern to name.
            Layers that have no scheme of that name are left alone.
        activation_aware: weigh errors by the layers' inputs; needs ``data`` or ``example_input``.
        real_channel: real channel factors for spectral layers. They commute with the Fourier transform, which
            then runs on fewer channels.
        damping: >= 0, added to the Gram matrix of inputs, in units of its mean eigenvalue.
        min_rank: lower bound of every r.
        max_rank: upper bound of every r.
        force: factorize also where nothing is saved.
        samples: calibration inputs.
        seed: seed of drawn inputs, when no calibration is given.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: an option outside its range, several criteria, or a scheme that does not exist.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small = compress(net, [Factorize(params_ratio=0.5)]).model
        >>> small[0].first.weight.shape, small[0].second.weight.shape
        (torch.Size([16, 64]), torch.Size([64, 16]))

    Source: Zhang et al. 2016 (channel scheme, outputs); Jaderberg et al. 2014 (spatial scheme); Idelbayev and
        Carreira-Perpinan 2020 (ranks under a budget); Wang et al. 2024, SVD-LLM (whitening).
    """

    rank_ratio: float | Mapping[str, float] | None = None
    energy_ratio: float | Mapping[str, float] | None = None
    params_ratio: float | Mapping[str, float] | None = None
    rank: int | Mapping[str, int] | None = None
    budget: tuple[str, float] | None = None
    scheme: str | Mapping[str, str] = "auto"
    activation_aware: bool = False
    real_channel: bool = False
    damping: float = 1e-6
    min_rank: int = 1
    max_rank: int | None = None
    force: bool = False
    samples: int = 256
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    structural: ClassVar[bool] = True
    stage: ClassVar[str] = "structure"
    refuses_after: ClassVar[Mapping[str, str]] = {
        "mask": "the product of two factors has none of the zeros; factorize first, then prune the factors",
        "grid": "the product of two factors leaves the grid; factorize first, then quantize the factors",
    }

    def __post_init__(self) -> None:
        given = [name for name in (*_CRITERIA, "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: one criterion decides the ranks.")
        for name in _CRITERIA:
            value = getattr(self, name)
            for pattern, v in value.items() if isinstance(value, Mapping) else [("", value)]:
                where = f" for {pattern!r}" if pattern else ""
                if v is not None and not (v >= 1 if name == "rank" else 0 < v <= 1):
                    allowed = "rank >= 1" if name == "rank" else f"0 < {name} <= 1"
                    raise ValueError(f"{name}={v}{where}: allowed is {allowed}.")
        if self.budget is not None and not (self.budget[0] in COSTS and 0 < self.budget[1] <= 1):
            raise ValueError(f"budget={self.budget}: allowed is one of {COSTS} with a share in (0, 1].")
        names = {s.name for s in schemes()}
        asked = self.scheme.values() if isinstance(self.scheme, Mapping) else [self.scheme]
        for name in asked:
            if name != "auto" and name not in names:
                raise ValueError(f"scheme={name!r} is unknown; allowed: auto, {', '.join(sorted(names))}.")
        if self.damping < 0 or self.min_rank < 1 or self.samples < 1:
            raise ValueError(
                f"damping={self.damping}, min_rank={self.min_rank}, samples={self.samples}: allowed are damping >= 0, "
                "min_rank >= 1, samples >= 1."
            )
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"max_rank={self.max_rank} is below min_rank={self.min_rank}.")

    # -- plan ------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide scheme and rank of every layer and compute the factors; writes nothing.

        Args:
            model: any module.
            data: calibration inputs, for ``activation_aware`` and a budget of MACs.

        Returns:
            Scheme, ranks and factors of every layer that becomes smaller.

        Raises:
            ValueError: inputs are needed and there are none; a mapping that fits nothing; a budget that cannot be met.
        """
        inputs = dataclasses.replace(data or Calibration(seed=self.seed), samples=self.samples)
        if self.activation_aware and not inputs.available:
            raise ValueError(
                "activation_aware=True looks at inputs: give compress() data= or example_input=."
            )
        if self.budget is not None and self.budget[0] == "macs" and not inputs.available:
            raise ValueError("a budget of macs needs example_input= (or data=) to count them.")
        found = survey(model, self.include, self.exclude)
        values, skipped = self._values(found.targets), dict(found.skipped)
        fitting: dict[str, list[Scheme]] = {}
        for t in found.targets:
            asked = self.scheme if isinstance(self.scheme, str) else lookup(self.scheme, t.name, t.key)
            usable, why = candidates(model, t, asked or "auto", self.real_channel)
            if usable and t.key not in values:
                why = f"no pattern of {self._criterion()[0]} fits"
            if why:
                skipped[t.key] = why
            else:
                fitting[t.key] = usable
        targets = [t for t in found.targets if t.key in fitting]
        looks = inputs.available and (self.activation_aware or self.budget is not None)
        calls = calls_of(model, targets, inputs.example(model)) if looks else {}
        seen, note = self._seen(model, targets, fitting, inputs, calls) if self.activation_aware else ({}, "")
        for key in seen:  # errors of outputs compare with each other only
            fitting[key] = [scheme for scheme in fitting[key] if scheme.gram] or fitting[key]
        rule = Rule(self._criterion()[0], self.min_rank, self.max_rank, self.force, self.damping)
        chosen: dict[str, Cut] = {}
        if self.budget is None:
            for t in targets:
                of = seen.get(t.key), calls.get(t.key, ())
                best, why = rule.choose(t, fitting[t.key], values[t.key], *of)
                if best is None:
                    skipped[t.key] = why
                else:
                    chosen[t.key] = best
        else:
            x = inputs.example(model) if self.budget[0] == "macs" else None
            present = present_costs(model, found.targets, fitting, self.budget[0], x)
            given = (found.targets, fitting, present, seen, calls)
            chosen, spent = allocate(rule, self.budget, *given)
            skipped |= {t.key: "the budget leaves it as it is" for t in targets if t.key not in chosen}
            note = f"{note} {spent}".strip()
        layers = {
            t.key: self._decided(t, *chosen[t.key], seen.get(t.key)) for t in targets if t.key in chosen
        }
        return Plan(layers, skipped, data=note)

    def _criterion(self) -> tuple[str, Any]:
        for name in _CRITERIA:
            if getattr(self, name) is not None:
                return name, getattr(self, name)
        return "rank_ratio", _DEFAULT_RATIO

    def _values(self, targets: Sequence[Target]) -> dict[str, float]:
        """The value of the criterion for every target that has one."""
        name, value = self._criterion()
        if not isinstance(value, Mapping):
            return {t.key: value for t in targets}
        for pattern in value:
            if not any(matches(pattern, t.name, t.key) for t in targets):
                names = listing([t.name or t.key for t in targets])
                raise ValueError(f"{name} has {pattern!r}, which fits no layer; these are: {names}.")
        found = {t.key: lookup(value, t.name, t.key) for t in targets}
        return {key: v for key, v in found.items() if v is not None}

    def _seen(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        fitting: Mapping[str, Sequence[Scheme]],
        inputs: Calibration,
        calls: Mapping[str, Sequence[Shapes]],
    ) -> tuple[dict[str, Stats], str]:
        """Gram matrices and means of the layers' inputs."""
        if not self.activation_aware:
            return {}, ""
        if not inputs.available:
            raise ValueError(
                "activation_aware=True looks at inputs: give compress() data= or example_input=."
            )
        wanted = {}
        for t in targets:
            reached = bool(calls.get(t.key))
            if not reached:
                warnings.warn(
                    f"{t.name} is not reached by the calibration inputs: its own SVD decides, not its outputs.",
                    stacklevel=2,
                )
            looks = reached and any(s.gram for s in fitting[t.key])
            wanted[t.key] = ["gram", "input_mean"] if looks else []
        return collected(model, targets, inputs, wanted), inputs.describe(model)

    def _decided(
        self, target: Target, cut: Decomposition, option: Option, seen: Stats | None
    ) -> dict[str, Any]:
        decided: dict[str, Any] = {
            "layer": target.name,
            "param": target.param,
            "scheme": option.scheme,
            "real": self.real_channel,
            "ranks": list(option.ranks),
            "shape": list(target.weight.shape),
            "error": option.error,
            "tensors": cut.tensors(option.ranks),
        }
        bias = bias_of(target)
        if (
            bias is not None
            and seen is not None
            and seen.input_mean is not None
            and not target.weight.is_complex()
        ):
            left = target.weight.detach().cpu().double() - cut.product(option.ranks).real
            decided["bias"] = corrected(target, bias, left, seen.input_mean)
        return decided

    # -- apply -----------------------------------------------------------------------------------------------

    @classmethod
    def structure(cls, plan: Plan) -> Plan:
        """Schemes and ranks, without the factors.

        Args:
            plan: what ``plan`` returned.

        Returns:
            A plan of numbers only.
        """
        kept = {
            key: {name: value for name, value in decided.items() if name not in ("tensors", "bias")}
            for key, decided in plan.layers.items()
        }
        return Plan(kept, data=plan.data)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Put the factors in the place of the layers.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` or ``structure`` returned; without factors they are zeros, to be loaded.

        Raises:
            ValueError: the model has no such layer, or of another shape or kind, or ranks do not fit; nothing is
                written then.
        """
        todo = []
        for key, decided in plan.layers.items():
            module, weight = locate(model, decided["layer"], decided["param"])
            target = Target(decided["layer"], module, decided["param"], _NO_AXES)
            scheme = scheme_of(decided["scheme"], target, bool(decided["real"]))
            full = () if scheme is None else scheme.full(module, weight)
            ranks = tuple(int(r) for r in decided["ranks"])
            fits = len(ranks) == len(full) and all(1 <= r <= f for r, f in zip(ranks, full, strict=True))
            if scheme is None or list(weight.shape) != list(decided["shape"]) or not fits:
                raise ValueError(
                    f"the plan factorizes {key} {decided['shape']} by {decided['scheme']!r} at rank "
                    f"{decided['ranks']}, which does not fit {type(module).__name__} {list(weight.shape)}: apply it to "
                    "the architecture it was made for."
                )
            todo.append((module, decided, scheme, ranks))
        replacements: dict[nn.Module, nn.Module] = {}
        for module, decided, scheme, ranks in todo:
            made = scheme.build(module, decided["param"], ranks)
            if made is not module:
                replacements[module] = made
            with torch.no_grad():
                for name, tensor in decided.get("tensors", {}).items():
                    made.get_parameter(name).copy_(tensor)
                if "bias" in decided:
                    bias: Any = module._parameters["bias"]
                    bias.copy_(decided["bias"])
        replace_modules(model, replacements)
