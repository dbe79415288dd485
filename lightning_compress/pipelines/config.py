"""What to do with a model, as plain data: a list of transforms with their options, or a few flat settings."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.functional.entropy import CODERS
from lightning_compress.pipelines.files import read_yaml
from lightning_compress.pipelines.keys import check_keys, nearest, unknown
from lightning_compress.pipelines.steps import Written, read_all
from lightning_compress.quantization.assignment import KINDS, kinds_of
from lightning_compress.targets import find
from lightning_compress.transform import Transform

TYPES = (
    "weight_sharing",
    "low_rank",
    "mixed_precision",
    "wanda",
    "pruning",
    "huffman",
    "hybrid",
    "evolutionary",
)
STRATEGIES = {
    "cluster": "cluster",
    "hash": "hash",
    "bloom": "bloom",
    "bloom_filter": "bloom",
    "adaptive": "adaptive",
}
_TARGETS = ("target_ratio", "target_bytes", "max_error", "max_ber", "max_accuracy_drop")
_RECIPE = ("transforms", *_TARGETS, "seed", "coder")
_FLAT = (
    "compression_types",
    "sharing_strategy",
    "num_clusters",
    "rank_ratio",
    "mixed_precision_config",
    "wanda_threshold",
    "sparsity",
)


@dataclass(frozen=True)
class CompressionConfig:
    """What `compress_to` is to do, from keywords, a dictionary or a YAML file.

    Two ways of writing, of which a file has one. A recipe lists transforms with their options, in the order in which
    they are applied, and every key must be known:

        transforms:
          - Prune: {sparsity: 0.8}
          - Quantize
        target_ratio: 0.1

    The flat way names techniques; they are put in the canonical order:

        compression_types: [pruning, mixed_precision]
        target_ratio: 0.1

    Options that somebody wrote are held; the others are turned until the target is reached.

    Args:
        compression_types: flat: of weight_sharing, low_rank, mixed_precision, wanda, pruning, huffman (the coder, if
            the library has it; else the shortest), hybrid (low rank, pruning, then sharing or mixed precision) and
            evolutionary (for ``lightning_compress.search``), in any case, also as members of an enum.
        target_ratio: ``file_bytes / dense_bytes`` to reach, in (0, 1); None: no such target. Flat: 0.5; a recipe has
            none unless it is written.
        sharing_strategy: flat: cluster, hash, bloom (bloom_filter) or adaptive.
        num_clusters: flat: values that the weights of a layer share.
        rank_ratio: flat: share of full rank.
        mixed_precision_config: flat: bits by kind of layer (conv linear embedding attention ffn output spectral) or
            name pattern.
        wanda_threshold: flat: a weight goes if its score is below this times its row's mean, unless sparsity is given.
        sparsity: flat: share of zeros.
        steps: recipe: the transforms (``transforms`` in dictionaries and files).
        target_bytes: length of the file to reach, >= 1.
        max_error: largest output error (``max_ber`` in dictionaries and files means the same).
        max_accuracy_drop: largest loss of accuracy.
        seed: of drawn inputs.
        coder: entropy coder of the file.
        given: names of the keys that somebody wrote; `from_dict` fills it in.
        extra: flat: settings of other systems, which mean nothing here; the report lists them.

    Raises:
        ValueError: a value that cannot be used, or a key that is not known; names the nearest that is.
        OrderError: a transform would spoil what an earlier one left.

    Examples:
        >>> steps = [{"Prune": {"sparsity": 0.8}}, {"Quantize": {"bits": 4}}]
        >>> CompressionConfig.from_dict({"transforms": steps}).transforms() == [Prune(0.8), Quantize(4)]
        True
        >>> config = CompressionConfig(compression_types=["mixed_precision", "pruning"], sparsity=0.7)
        >>> [type(transform).__name__ for transform in config.transforms()]
        ['Prune', 'Quantize']
    """

    compression_types: Sequence[Any] = ()
    target_ratio: float | None = 0.5
    sharing_strategy: str = "cluster"
    num_clusters: int = 256
    rank_ratio: float = 0.3
    mixed_precision_config: Mapping[str, int] = field(default_factory=dict)
    wanda_threshold: float = 0.1
    sparsity: float | None = None
    steps: Sequence[Any] = ()
    target_bytes: int | None = None
    max_error: float | None = None
    max_accuracy_drop: float | None = None
    seed: int = 0
    coder: str = "auto"
    given: frozenset[str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.compression_types and self.steps:
            raise ValueError("compression_types and transforms are both given: write one of them.")
        named = (
            [self.compression_types]
            if isinstance(self.compression_types, str | enum.Enum)
            else self.compression_types
        )
        object.__setattr__(self, "compression_types", tuple(_type(name) for name in named))
        if self.given is None:  # keywords: what differs from the defaults was written
            fields = {f.name: f for f in dataclasses.fields(self)}
            same = {n for n in _FLAT if getattr(self, n) in (fields[n].default, {}, ())}
            object.__setattr__(self, "given", frozenset(_FLAT) - same)
        if self.sharing_strategy not in STRATEGIES:
            raise ValueError(unknown(str(self.sharing_strategy), STRATEGIES, "unknown sharing_strategy"))
        if self.coder not in ("auto", *CODERS):
            raise ValueError(unknown(self.coder, ("auto", *CODERS), "unknown coder"))
        if self.coder == "auto" and "huffman" in self.compression_types and "huffman" in CODERS:
            object.__setattr__(self, "coder", "huffman")
        self.written()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionConfig:
        """Read a dictionary: a recipe if it has ``transforms``, flat settings otherwise.

        Args:
            values: key -> value.

        Returns:
            The configuration. Flat settings keep keys that are far from every known one in ``extra``.

        Raises:
            ValueError: an unknown key in a recipe, or in flat settings one that is nearly a known one; a bad value.

        Examples:
            >>> config = CompressionConfig.from_dict({"compression_types": ["LOW_RANK"], "num_workers": 4})
            >>> config.target_ratio, config.extra
            (0.5, {'num_workers': 4})
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a configuration is a mapping from key to value, not {type(values).__name__}.")
        recipe = "transforms" in values
        known = _RECIPE if recipe else (*_FLAT, *_TARGETS, "seed", "coder")
        if recipe:
            check_keys(values, known, "recipe")
        extra = {}
        for key, value in values.items():
            if key not in known:
                if nearest(str(key), (*known, "transforms")):
                    raise ValueError(unknown(str(key), (*known, "transforms"), "unknown key"))
                extra[str(key)] = value
        options = {key: value for key, value in values.items() if key in known}
        if options.keys() >= {"max_error", "max_ber"}:
            raise ValueError("max_error and max_ber are one setting: write one of them.")
        if "max_ber" in options:
            options["max_error"] = options.pop("max_ber")
        if recipe:
            options["steps"] = options.pop("transforms")
            options.setdefault("target_ratio", None)
        try:
            return cls(**options, given=frozenset(options), extra=extra)
        except TypeError as error:
            raise ValueError(f"the configuration cannot be used: {error}") from None

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> CompressionConfig:
        r"""Read a YAML file; see `from_dict`.

        Args:
            path: the file.

        Returns:
            The configuration.

        Raises:
            ValueError: the file is no YAML mapping, has a key twice, or cannot be used; names the file.

        Examples:
            >>> import pathlib, tempfile
            >>> path = pathlib.Path(tempfile.mkdtemp(), "small.yaml")
            >>> _ = path.write_text("transforms: [{Prune: {sparsity: 0.8}}]\ntarget_ratio: 1e-1\n")
            >>> CompressionConfig.from_yaml(path).target_ratio
            0.1
        """
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise type(error)(f"{path}: {error}") from None

    @property
    def search(self) -> bool:
        """Whether settings are to be searched for instead of turned together: "evolutionary" is among the types."""
        return "evolutionary" in self.compression_types

    def transforms(self) -> list[Transform]:
        """What is applied, in order, with the options as written."""
        return [written.transform for written in self.written()]

    def written(self, model: nn.Module | None = None) -> list[Written]:
        """As `transforms`, and which options somebody wrote.

        Args:
            model: leave out bits for kinds of layer that this model does not have.

        Returns:
            The transforms in order.
        """
        if self.steps:
            return read_all(self.steps)
        types = set(self.compression_types)
        entries = []
        if types & {"low_rank", "hybrid", "evolutionary"}:
            entries.append(self._entry("Factorize", rank_ratio="rank_ratio"))
        if types & {"pruning", "wanda", "hybrid", "evolutionary"}:
            entries.append(self._pruning("wanda" in types))
        sharing = "weight_sharing" in types or (
            "hybrid" in types and self._gave("num_clusters", "sharing_strategy")
        )
        if sharing:
            entry = self._entry("ShareWeights", clusters="num_clusters")
            entry["ShareWeights"]["strategy"] = STRATEGIES[self.sharing_strategy]
            entries.append(entry)
        if "mixed_precision" in types or (types & {"hybrid", "evolutionary"} and not sharing):
            bits = self._bits(model)
            entries.append({"Quantize": {"bits": bits} if bits else {}})
        return read_all(entries)

    def _bits(self, model: nn.Module | None) -> dict[str, int]:
        present = set(KINDS)
        if model is not None:
            targets = find(model)
            present = set().union({"output"}, *kinds_of(model, targets).values())
        return {k: v for k, v in self.mixed_precision_config.items() if k not in KINDS or k in present}

    def _gave(self, *keys: str) -> bool:
        return bool(self.given and self.given & set(keys))

    def _entry(self, name: str, **options: str) -> dict[str, dict[str, Any]]:
        """An entry with an option for each key that was written; without a target also for those that were not."""
        held = {
            option: getattr(self, key)
            for option, key in options.items()
            if self._gave(key) or not self.targets
        }
        return {name: held}

    def _pruning(self, wanda: bool) -> dict[str, dict[str, Any]]:
        options: dict[str, Any] = {"criterion": "wanda"} if wanda else {}
        if self.sparsity is not None:
            options["sparsity"] = self.sparsity
        elif wanda and (self._gave("wanda_threshold") or not self.targets):
            options |= {"threshold": self.wanda_threshold, "threshold_unit": "row_mean"}
        return {"Prune": options}

    @property
    def targets(self) -> dict[str, float]:
        """The targets that are set, by name."""
        names = ("target_ratio", "target_bytes", "max_error", "max_accuracy_drop")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _type(name: Any) -> str:
    """A technique by its name, or by a member of an enum whose value or name it is."""
    spellings = [name.value, name.name] if isinstance(name, enum.Enum) else [name]
    for spelling in spellings:
        plain = str(spelling).lower().replace("-", "_").replace(" ", "_")
        if plain in TYPES:
            return plain
    raise ValueError(unknown(str(spellings[0]), TYPES, "unknown compression type"))
