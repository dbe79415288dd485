"""Weights that share few values: by clustering, by hashing, in a filter, or the best of these for every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_compress import codes
from lightning_compress.functional.clustering import STARTS
from lightning_compress.functional.groups import real
from lightning_compress.names import lookup, matches
from lightning_compress.plans import Plan
from lightning_compress.sharing import adaptive, build
from lightning_compress.sharing.build import DTYPES, Entries, Precision, Search
from lightning_compress.sharing.codes import MAX_VALUES, SharedCode
from lightning_compress.sharing.writing import carry_out, decision
from lightning_compress.stats import Calibration, collect
from lightning_compress.stats.sensitivity import MEASURES
from lightning_compress.tables import listing
from lightning_compress.targets import Target, survey
from lightning_compress.transform import Transform

STRATEGIES = ("cluster", "hash", "bloom", "adaptive")
_ALLOWED = {
    "strategy": STRATEGIES,
    "init": ("optimal", *STARTS),
    "scope": ("layer", "global"),
    "codebook_dtype": tuple(DTYPES),
    "importance": ("none", "fisher"),
    "sensitivity": MEASURES,
}
_RATIO = 1 / 8  # of "adaptive", unless another is given
_ROOM = "the size leaves room for it as it is"
_LARGER = "its values and who has which would take no fewer bits than it takes now"
_FLOOR = 1e-3  # share of the mean importance that every entry has: far moves cost, whatever the gradient says


@dataclass(frozen=True)
class ShareWeights(Transform):
    r"""Let the weights of a layer share K values, so that only the values and who has which are stored.

    - "cluster": the K values of least squared error, ``min_c sum_i (w_i - c_{k_i})^2``. Stored: indices of
      ``ceil(log2 K)`` bits before entropy coding, and the values.
    - "hash": a hash of its place gives every entry one of K values and a sign; ``v_k = mean of sign_i w_i``. Stored:
      the values alone. At random places values have little to do with the weights: train afterwards.
    - "bloom": for pruned weights. The values of the kept entries are in a filter of ``1.23 t`` bits for each of them,
      ``t = ceil(log2(K / false_positive))``; of the others a share of at most ``false_positive`` gets a value too.
    - "adaptive": one of these, with its own K, or none for every layer: the least loss at a size.

    Masked entries stay zero (except for the false positives of "bloom"). A weight that would take no fewer bits is left
    alone.

    Args:
        strategy: "cluster", "hash", "bloom" or "adaptive".
        clusters: K, 2 to 65,536, or a mapping from layer name or pattern to K; of "hash" per weight.
        ratio: in (0, 1). "hash": ``K = ceil(ratio n)`` of n numbers, instead of ``clusters``; "adaptive": encoded bytes
            of all weights over their bytes as float32 (None: 1/8).
        init: how the values of "cluster" are found: "optimal" (least error), or Lloyd iterations from "linear",
            "quantile" or "kmeans++".
        scope: "layer", or "global": one codebook for all, of weights divided by their root mean square.
        iterations: largest number of Lloyd iterations.
        false_positive: of "bloom", in (0, 1).
        codebook_dtype: type of the stored values: float64, float32, float16 or bfloat16. Indices are chosen after
            rounding.
        codebook_bits: 2 to 16: the values are integers of a grid instead, with one float32 scale.
        block: runs of so many numbers share vectors (product quantization), 1 to 64.
        importance: "none", or "fisher": squared errors weigh ``E[g^2]``, for "cluster" and "bloom" (needs inputs).
        sensitivity: what a layer loses, for "adaptive": "weight", "output", "fisher", or "auto" (output, if there are
            inputs).
        samples: calibration inputs.
        seed: of hashes, filters and draws.
        include: patterns of layer names to take.
        exclude: patterns of layer names to leave.

    Raises:
        ValueError: an option outside its range, or options that do not go together.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> shared = compress(net, [ShareWeights(clusters=16)]).model
        >>> [len(shared[i].weight.unique()) for i in (0, 2)]
        [16, 16]

    Source: Han et al. 2016, Deep Compression; Chen et al. 2015, Compressing Neural Networks with the Hashing Trick;
        Reagen et al. 2018, Weightless; Choi et al. 2017, Towards the Limit of Network Quantization (importance).
    """

    strategy: str = "cluster"
    clusters: int | Mapping[str, int] = 256
    ratio: float | None = None
    init: str = "optimal"
    scope: str = "layer"
    iterations: int = 50
    false_positive: float = 0.01
    codebook_dtype: str = "float32"
    codebook_bits: int | None = None
    block: int = 1
    importance: str = "none"
    sensitivity: str = "weight"
    samples: int = 256
    seed: int = 0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()

    stage: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        for option, allowed in _ALLOWED.items():
            if getattr(self, option) not in allowed:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} is unknown; allowed: {', '.join(allowed)}."
                )
        table = self.clusters if isinstance(self.clusters, Mapping) else {"": self.clusters}
        for name, count in table.items():
            if not 2 <= count <= MAX_VALUES:
                where = f" for {name!r}" if name else ""
                raise ValueError(f"clusters={count}{where}: allowed is 2 <= clusters <= {MAX_VALUES}.")
        for option in ("ratio", "false_positive"):
            value = getattr(self, option)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{option}={value}: allowed is 0 < {option} < 1.")
        for option, low, high in (
            ("codebook_bits", 2, 16),
            ("block", 1, 64),
            ("iterations", 1, None),
            ("samples", 1, None),
        ):
            value = getattr(self, option)
            if value is not None and (value < low or (high is not None and value > high)):
                raise ValueError(f"{option}={value}: allowed is >= {low}{f' and <= {high}' if high else ''}.")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse options that the strategy gives no meaning to."""
        senseless = {
            "ratio": self.ratio is not None and self.strategy not in ("hash", "adaptive"),
            "scope": self.scope == "global" and (self.strategy in ("hash", "adaptive") or self.block > 1),
            "block": self.block > 1 and self.strategy != "cluster",
            "importance": self.importance != "none" and self.strategy not in ("cluster", "bloom"),
        }
        if self.block > 1 and self.init not in ("optimal", "kmeans++"):
            senseless["init"] = True
        if self.scope == "global" and isinstance(self.clusters, Mapping):
            senseless["clusters"] = True
        for option, wrong in senseless.items():
            if wrong:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} has no meaning with strategy={self.strategy!r}, "
                    f"scope={self.scope!r}, block={self.block}: leave it out."
                )

    # -- plan ------------------------------------------------------------------------------------------------

    def plan(self, model: nn.Module, data: Calibration | None = None) -> Plan:
        """Decide the values of every weight; writes nothing.

        Args:
            model: any module.
            data: calibration inputs, for ``importance`` and ``sensitivity``.

        Returns:
            Codebooks and filters; who has which value follows from the weight.

        Raises:
            ValueError: "bloom" without a mask, inputs that are needed and missing, a mapping that fits nothing, or a
                value that the type of the codebook cannot hold.
        """
        found = survey(model, self.include, self.exclude)
        skipped = dict(found.skipped)
        inputs = dataclasses.replace(data or Calibration(seed=self.seed), samples=self.samples)
        targets = []
        for t in found.targets:
            why = self._refusal(t)
            if why is None:
                targets.append(t)
            else:
                skipped[t.key] = why
        counts = self.counts(found.targets)  # an entry for a weight that stays as it is is no mistake
        skipped |= {
            t.key: f"no pattern of clusters={self.clusters} fits" for t in targets if t.key not in counts
        }
        targets = [t for t in targets if t.key in counts]
        parts, source = self._parts(model, targets, inputs)
        notes = [source]
        if self.strategy == "adaptive":
            ratio = _RATIO if self.ratio is None else self.ratio
            chosen, note = adaptive.choose(model, targets, parts, self.code, ratio, self.sensitivity, inputs)
            notes.append(note)
        else:
            chosen = self._codes(parts, counts)
        layers, lost, norm, same = {}, 0.0, 0.0, True
        for t in targets:
            code, part = chosen[t.key], parts[t.key]
            if code is None or code.bits(part.weight) >= part.bits:
                skipped[t.key] = _ROOM if code is None else _LARGER
                continue
            gap, size = build.error(part.weight, code)
            lost, norm, same = lost + gap, norm + size, same and gap == 0
            layers[t.key] = {"layer": t.name, "param": t.param, **decision(code)}
        if layers:
            notes.append(f"weight_error={math.sqrt(lost / norm) if norm else 0.0:.3g}")
        return Plan(layers, skipped, identity=bool(layers) and same, data=" ".join(n for n in notes if n))

    def counts(self, targets: Sequence[Target]) -> dict[str, int]:
        """K of every target: exact name, pattern, "*".

        Args:
            targets: weights, also those that are left alone.

        Returns:
            Target key -> K; targets that nothing fits are missing.

        Raises:
            ValueError: an entry of ``clusters`` that no target uses.
        """
        if not isinstance(self.clusters, Mapping):
            return {t.key: self.clusters for t in targets}
        for entry in self.clusters:
            if entry != "*" and not any(
                entry in (t.name, t.key) or matches(entry, t.name, t.key) for t in targets
            ):
                names = listing([t.name or t.key for t in targets])
                raise ValueError(f"clusters has {entry!r}, which fits no layer to share; these are: {names}.")
        found = {t.key: lookup(self.clusters, t.name, t.key) for t in targets}
        return {key: count for key, count in found.items() if count is not None}

    def _refusal(self, target: Target) -> str | None:
        code, mask = codes.read(target.module, target.param), codes.current_mask(target)
        weight = target.weight.detach()
        if code is not None and code.stage == "grid" and code.matches(weight):
            return f"it is stored as {code.kind} already"
        if self.strategy == "bloom" and mask is None:
            return "it has no mask, and a filter holds the entries that a mask keeps: Prune first"
        kept = weight.numel() if mask is None else int(mask.sum())
        if not bool((weight if mask is None else weight[mask]).any()):
            return "all its entries are zero"
        return f"it has fewer than block={self.block} entries" if kept < self.block else None

    def _parts(
        self, model: nn.Module, targets: Sequence[Target], inputs: Calibration
    ) -> tuple[dict[str, Entries], str]:
        """The weights with what the options need to know of them, and which inputs were used."""
        importance: dict[str, Tensor] = {}
        if self.importance == "fisher" and targets:
            if not inputs.available:
                raise ValueError(
                    "importance='fisher' looks at gradients: give compress() data= or example_input=."
                )
            for key, seen in collect(model, targets, inputs, ["gradient"]).items():
                assert seen.gradient is not None
                square = seen.gradient.double()
                if bool(square.any()):
                    importance[key] = square + _FLOOR * square.mean()
                else:
                    importance[key] = torch.ones_like(square)
        parts = {}
        for t in targets:
            mask, weight = codes.current_mask(t), t.weight.detach()
            part = Entries(t.key, weight, None if mask is None else mask.cpu(), importance.get(t.key))
            if self.scope == "global":
                rms = float(part.numbers.double().square().mean().sqrt())
                part = dataclasses.replace(part, rms=float(torch.tensor(rms)))
            parts[t.key] = part
        return parts, inputs.describe(model) if importance else ""

    def _codes(self, parts: Mapping[str, Entries], counts: Mapping[str, int]) -> dict[str, SharedCode | None]:
        together = None
        if self.scope == "global" and parts:
            together = self.search.centroids(list(parts.values()), min(counts.values()))
        return {key: self.code(part, counts[key], self.strategy, together) for key, part in parts.items()}

    @property
    def search(self) -> Search:
        """How centroids are found."""
        # Many codebooks are tried for each weight then: near the best is enough.
        points = 1 << 14 if self.strategy == "adaptive" else 1 << 20
        return Search(self.init, self.iterations, self.seed, points)

    def code(
        self, part: Entries, count: int, strategy: str = "cluster", centroids: Tensor | None = None
    ) -> SharedCode:
        """The code of one weight.

        Args:
            part: the weight.
            count: K.
            strategy: "cluster", "hash" or "bloom".
            centroids: the values, if they are known already.

        Returns:
            The code.
        """
        precision = Precision(self.codebook_dtype, self.codebook_bits)
        if strategy == "hash":
            if self.strategy == "hash" and self.ratio is not None:
                count = math.ceil(self.ratio * real(part.weight).numel())
            return build.hashed(part, count, precision, self.seed)
        if self.block > 1:
            return build.grouped(part, count, self.block, precision, self.search)
        if centroids is None:
            centroids = self.search.centroids([part], count)
        if strategy == "bloom":
            return build.filtered(part, centroids, precision, self.false_positive, self.seed)
        return build.clustered(part, centroids, precision)

    # -- apply -----------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Write the shared values in place and attach the codes.

        Args:
            model: the model of the plan, or a fresh one.
            plan: what ``plan`` returned.

        Raises:
            ValueError: the model has no such weight, or of another shape, or a decision is malformed; nothing is
                written then.
        """
        carry_out(model, plan)
