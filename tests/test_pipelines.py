"""Recipes as data: names, keys, order, knobs and bisection, each against what is written down independently."""

import enum
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress.pipelines import CompressionConfig
from lightning_compress.pipelines.bisection import weakest
from lightning_compress.pipelines.files import read_yaml
from lightning_compress.pipelines.keys import nearest
from lightning_compress.pipelines.knobs import KNOBS, free_knob, geometric, knob_of, mixed, turned
from lightning_compress.pipelines.limits import Limits
from lightning_compress.pipelines.steps import check, read, read_all
from lightning_compress.sharing import ShareWeights
from lightning_compress.transform import OrderError, Transform

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "recipes" / "configs").glob("compress_*.yaml"))


def names(transforms: list[Transform]) -> list[str]:
    return [type(t).__name__ for t in transforms]


# -- entries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"Prune": {"sparsity": 0.8, "exclude": ["fc"]}},
        {"prune": {"sparsity": 0.8, "exclude": ["fc"]}},
        {"class_path": "lightning_compress.Prune", "init_args": {"sparsity": 0.8, "exclude": ["fc"]}},
        {"class_path": "Prune", "init_args": {"sparsity": 0.8, "exclude": ["fc"]}},
        lc.Prune(0.8, exclude=("fc",)),
    ],
)
def test_every_way_of_writing_gives_the_same_transform(entry: Any) -> None:
    written = read(entry)
    assert written.transform == lc.Prune(0.8, exclude=("fc",))
    assert written.given == {"sparsity", "exclude"}


@pytest.mark.parametrize(
    "entry", ["fuse_batch_norm", "FuseBatchNorm", lc.FuseBatchNorm, {"FuseBatchNorm": None}]
)
def test_a_name_alone_has_the_defaults(entry: Any) -> None:
    assert read(entry).transform == lc.FuseBatchNorm() and read(entry).given == frozenset()


def test_what_was_written_counts_even_if_it_is_the_default() -> None:
    assert read({"Quantize": {"bits": 8}}).given == {"bits"}
    assert read(lc.Quantize(bits=8)).given == frozenset()  # cannot be told from Quantize()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("Prun", "did you mean 'Prune'"),
        ("quantise", "did you mean 'Quantize'"),
        ("zzz", r"unknown transform 'zzz'; allowed: .*Prune"),
        ({"Prune": {"sparsty": 0.5}}, "did you mean 'sparsity'"),
        ({"Prune": {"zzz": 0.5}}, "Prune: unknown key 'zzz'; allowed: sparsity, "),
        ({"Prune": {"sparsity": 2}}, r"Prune: sparsity=2: allowed is 0 <= sparsity < 1"),
        ({"Prune": {"sparsity": "half"}}, "Prune: "),
        ({"Prune": 0.5}, "needed is a mapping"),
        ({"class_path": "Prune", "init_arg": {}}, "did you mean 'init_args'"),
        ({"Prune": {}, "Quantize": {}}, "is no transform"),
        (3, "is no transform"),
        ("collections.OrderedDict", "is no Transform"),
        ("no.such.Thing", "cannot be imported"),
    ],
)
def test_entries_that_cannot_be_used_are_refused_by_name(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(entry)


def test_names_alone_are_put_in_order_and_options_keep_theirs() -> None:
    given = ["quantize", "prune", "factorize", "fuse_batch_norm", "remove_channels"]
    wanted = ["RemoveChannels", "FuseBatchNorm", "Factorize", "Prune", "Quantize"]
    assert names([w.transform for w in read_all(given)]) == wanted
    mixed_list = [{"Prune": {"sparsity": 0.5}}, "FuseBatchNorm"]
    assert names([w.transform for w in read_all(mixed_list)]) == ["Prune", "FuseBatchNorm"]
    with pytest.raises(OrderError, match="Prune after Quantize"):
        read_all([{"Quantize": {"bits": 4}}, "Prune"])


def test_orders_that_spoil_something_are_refused_with_the_reason() -> None:
    for later, earlier in (
        (lc.Prune(0.5), lc.Quantize(4)),
        (lc.Factorize(), lc.Prune(0.5)),
        (lc.Prune(), ShareWeights()),
    ):
        with pytest.raises(
            OrderError, match=f"{type(later).__name__} after {type(earlier).__name__} is refused: "
        ):
            check([earlier, later])
    with pytest.raises(
        OrderError, match=r"RemoveChannels after Prune\(pattern='2:4'\).*remove channels first"
    ):
        check([lc.Prune(pattern="2:4"), lc.RemoveChannels()])
    check([lc.RemoveChannels(), lc.Prune(pattern="2:4")])
    check([lc.Prune(0.5), lc.RemoveChannels()])
    model = lc.compress(nn.Linear(8, 8), [lc.Quantize(4)]).model
    with pytest.raises(OrderError, match="Prune after"):
        check([lc.Prune(0.5)], model)


@given(st.text(alphabet="abcdefgh_", min_size=3, max_size=12))
def test_a_name_is_nearest_to_itself(name: str) -> None:
    if name.replace("_", ""):
        assert nearest(name, ["zzzzzz", name, "yyyyyy"]) == name


# -- configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_files_of_the_recipes_are_sound(path: Path) -> None:
    config = CompressionConfig.from_yaml(path)
    assert config.transforms() and config.targets and not config.extra


def test_there_are_files_to_test() -> None:
    assert len(CONFIGS) >= 4


def test_a_recipe_has_no_target_unless_it_is_written() -> None:
    assert CompressionConfig.from_dict({"transforms": ["Prune"]}).targets == {}
    config = CompressionConfig.from_dict(
        {"transforms": ["Prune"], "max_ber": 0.1, "target_bytes": 9, "seed": 3}
    )
    assert config.targets == {"target_bytes": 9, "max_error": 0.1} and config.seed == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"transforms": ["Prune"], "target_ration": 0.5},
            "recipe: unknown key 'target_ration'; did you mean 'target_ratio'",
        ),
        ({"transforms": ["Prune"], "anything": 1}, "recipe: unknown key 'anything'"),
        ({"transforms": ["Prune"], "compression_types": ["pruning"]}, "unknown key 'compression_types'"),
        ({"transforms": 3}, "give a list"),
        ({"compression_types": ["prunning"]}, "did you mean 'pruning'"),
        ({"compression_types": ["zip"]}, "unknown compression type 'zip'; allowed: weight_sharing"),
        ({"compression_types": ["pruning"], "num_cluster": 4}, "did you mean 'num_clusters'"),
        ({"transform": ["Prune"]}, "did you mean 'transforms'"),
        ({"compression_types": ["weight_sharing"], "sharing_strategy": "clusters"}, "did you mean 'cluster'"),
        ({"compression_types": ["pruning"], "coder": "zip"}, "unknown coder 'zip'"),
        ({"transforms": ["Prune"], "max_ber": 0.1, "max_error": 0.1}, "one setting"),
        (["Prune"], "a configuration is a mapping"),
    ],
)
def test_configurations_that_cannot_be_meant_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionConfig.from_dict(values)


class Kind(enum.Enum):
    LOW_RANK = "low_rank"
    WANDA = 3


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"compression_types": ["weight_sharing"], "num_clusters": 16}, [ShareWeights(clusters=16)]),
        (
            {"compression_types": ["WEIGHT-SHARING"], "sharing_strategy": "bloom_filter"},
            [ShareWeights(strategy="bloom")],
        ),
        ({"compression_types": [Kind.LOW_RANK], "rank_ratio": 0.2}, [lc.Factorize(rank_ratio=0.2)]),
        (
            {"compression_types": [Kind.WANDA], "wanda_threshold": 0.2},
            [lc.Prune(criterion="wanda", threshold=0.2, threshold_unit="row_mean")],
        ),
        ({"compression_types": ["wanda"], "sparsity": 0.6}, [lc.Prune(0.6, criterion="wanda")]),
        (
            {"compression_types": ["mixed_precision"], "mixed_precision_config": {"conv": 8, "fc*": 4}},
            [lc.Quantize({"conv": 8, "fc*": 4})],
        ),
        ({"compression_types": ["pruning", "huffman"], "sparsity": 0.7}, [lc.Prune(0.7)]),
        (
            {"compression_types": ["hybrid"], "num_clusters": 8},
            [lc.Factorize(), lc.Prune(), ShareWeights(clusters=8)],
        ),
        ({"compression_types": ["hybrid"]}, [lc.Factorize(), lc.Prune(), lc.Quantize()]),
        ({"compression_types": "pruning", "target_ratio": None}, [lc.Prune()]),
        ({"compression_types": ["low_rank"], "target_ratio": None}, [lc.Factorize(rank_ratio=0.3)]),
        (
            {"compression_types": ["wanda"], "target_ratio": None},
            [lc.Prune(criterion="wanda", threshold=0.1, threshold_unit="row_mean")],
        ),
        ({"compression_types": []}, []),
    ],
)
def test_flat_settings_mean_what_the_table_says(values: dict[str, Any], wanted: list[Transform]) -> None:
    config = CompressionConfig.from_dict(values)
    assert config.transforms() == wanted
    assert CompressionConfig(**values).transforms() == wanted  # as keywords


def test_flat_settings_of_other_systems_are_kept_apart() -> None:
    config = CompressionConfig.from_dict({"compression_types": ["pruning"], "device": "cpu", "verbose": True})
    assert config.extra == {"device": "cpu", "verbose": True} and config.target_ratio == 0.5
    assert CompressionConfig.from_dict({"compression_types": ["evolutionary"]}).search
    assert not config.search


def test_bits_for_kinds_of_layer_that_a_model_lacks_are_left_out() -> None:
    values = {
        "compression_types": ["mixed_precision"],
        "mixed_precision_config": {"attention": 4, "linear": 8, "output": 6},
    }
    config = CompressionConfig.from_dict(values)
    [written] = config.written(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))
    assert written.transform == lc.Quantize({"linear": 8, "output": 6})


def test_yaml_numbers_and_keys() -> None:
    Path("a.yaml").write_text("a: 1e-3\nb: [2, 3]\nc: '1e-3'\nd: 1.5e+2\ne: 3\n")
    assert read_yaml("a.yaml") == {"a": 0.001, "b": [2, 3], "c": "1e-3", "d": 150.0, "e": 3}
    Path("b.yaml").write_text("transforms:\n  - Prune: {sparsity: 0.5, sparsity: 0.6}\n")
    with pytest.raises(ValueError, match=r"b\.yaml: key 'sparsity' comes twice in the mapping of line 2"):
        CompressionConfig.from_yaml("b.yaml")
    for bad in ("a: [", "a: !!python/object/apply:os.getcwd []", "\x00"):
        Path("c.yaml").write_text(bad)
        with pytest.raises(ValueError, match=r"c\.yaml: no YAML"):
            CompressionConfig.from_yaml("c.yaml")
    Path("d.yaml").write_text("transforms: [Prun]")
    with pytest.raises(ValueError, match=r"d\.yaml: .*did you mean 'Prune'"):
        CompressionConfig.from_yaml("d.yaml")
    Path("e.yaml").write_text("transforms: [{Quantize: {bits: 4}}, {Prune: {sparsity: 0.5}}]")
    with pytest.raises(OrderError, match=r"e\.yaml: Prune after Quantize"):
        CompressionConfig.from_yaml("e.yaml")


# -- knobs ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=12), st.floats(1, 16))
def test_mixed_integers_have_the_mean_that_is_asked_for(sizes: list[int], mean: float) -> None:
    """Against the nearest mean that the greedy rule guarantees: within the smallest weight that did not fit."""
    numbers = mixed(mean, sizes)
    assert set(numbers) <= {math.floor(mean), math.floor(mean) + 1}
    got = float(np.average(numbers, weights=sizes))
    assert got >= mean - 1e-6  # never fewer than asked for
    raised = [size for size, number in zip(sizes, numbers, strict=True) if number > math.floor(mean)]
    assert got - mean <= (min(raised) if raised else 0) / sum(sizes) + 1e-6


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_turns_its_transform_from_weak_to_strong(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    transform = Transform.registry[name]()
    knob = free_knob(transform)
    assert knob is not None and free_knob(transform, [knob.option]) is None
    assert free_knob(transform, [f"{name}.{knob.option}"]) is None
    assert free_knob(transform, ["exclude"]) == knob

    def mean(strength: float) -> float:
        value = getattr(turned(transform, knob, strength, net), knob.option)
        return float(np.mean(list(value.values()))) if isinstance(value, dict) else float(value)

    values = [mean(s) for s in np.linspace(0, 1, 9)]
    assert values == sorted(values) or values == sorted(values, reverse=True)
    assert values[0] != values[-1]


def test_options_that_decide_the_strength_take_the_knob_away() -> None:
    for transform in (
        lc.Prune(threshold=0.1),
        lc.Prune(pattern="2:4"),
        lc.Quantize(format="e4m3"),
        lc.Factorize(energy_ratio=0.9),
        lc.DropLayers(count=1),
        lc.RemoveChannels(budget=("macs", 0.5)),
        lc.FuseBatchNorm(),
    ):
        assert free_knob(transform) is None
    assert knob_of(ShareWeights(strategy="hash")).option == "ratio"
    assert free_knob(ShareWeights(strategy="hash"), ["ratio"]) is None


def test_a_turned_prune_empties_no_layer() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        net[1].weight *= 1e-6  # a global ranking alone would take all of it
    for strength in (0.6, 1.0):
        model = lc.compress(net, [turned(lc.Prune(), knob_of(lc.Prune()), strength, net)]).model
        assert all(bool(model[i].weight.any()) for i in (0, 1))
    assert turned(lc.Prune(scope="layer"), knob_of(lc.Prune()), 1.0, net).max_layer_sparsity == 1.0


def test_geometric() -> None:
    assert [geometric(s, 16, 2) for s in (0, 1)] == [16, 2]
    assert geometric(1 / 3, 16, 2) == pytest.approx(8)


# -- bisection and limits --------------------------------------------------------------------------------------


@given(st.floats(0.01, 0.99), st.floats(0.3, 5), st.floats(1.2, 50))
def test_bisection_finds_where_a_falling_measure_meets_the_limit(
    root: float, power: float, scale: float
) -> None:
    calls = []

    def measure(s: float) -> float:
        calls.append(s)
        return scale ** ((root - s) * power)

    found, met = weakest(measure, evaluations=20)
    assert met and measure(found) <= 1 and len(calls) <= 21
    assert found - root <= max(1 / 2048, -math.log(0.99) / (power * math.log(scale)))


@given(st.lists(st.floats(0, 3), min_size=30, max_size=30))
def test_bisection_never_returns_less_than_the_best_it_has_seen(values: list[float]) -> None:
    """On any function, and with few evaluations."""
    seen: dict[float, float] = {}

    def measure(s: float) -> float:
        seen[s] = values[min(29, int(30 * s))]
        return seen[s]

    found, met = weakest(measure, evaluations=8)
    assert len(seen) <= 8
    fits = [s for s, value in seen.items() if value <= 1]
    assert (found, met) == ((min(fits), True) if fits else (min(seen, key=lambda s: (seen[s], s)), False))


def test_bisection_takes_nan_and_infinity_as_unmet() -> None:
    assert weakest(lambda s: math.nan if s < 0.5 else 0.5)[1]
    assert weakest(lambda s: math.inf)[1] is False
    calls: list[float] = []
    weakest(lambda s: calls.append(s) or 0.1)
    assert calls == [0.0]  # the mildest is good enough


@pytest.mark.parametrize(
    "asked",
    [
        {"target_ratio": 1},
        {"target_ratio": 0},
        {"target_ratio": -0.5},
        {"target_ratio": math.nan},
        {"target_bytes": 0},
        {"max_error": 0},
        {"max_error": math.inf},
        {"max_accuracy_drop": True},
        {"target_ratio": "0.1"},
    ],
)
def test_targets_out_of_range_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(asked))}=.*allowed is"):
        Limits(asked)
