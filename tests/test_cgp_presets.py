"""The known experiments, against loops over kernels."""

import copy
import functools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.cgp import Grid, Settings, evolve, presets
from lightning_compress.cgp.gates.functions import SELECTING
from lightning_compress.cgp.layers import ordering
from lightning_compress.cgp.layers.integers import all_int8, find_int8
from lightning_compress.cgp.layers.writing import write
from lightning_compress.cgp.search.seeds import random_circuit


@functools.cache
def lenet() -> nn.Module:
    torch.manual_seed(0)
    return lc.compress(lc.models.build("lenet5"), [lc.Quantize(8)]).model


@functools.cache
def integers() -> dict[str, np.ndarray]:
    return {key: values for key, _, _, values, _ in all_int8(lenet())}


def kernels(key: str) -> np.ndarray:
    """All kernels of a convolution, [filters * channels, side, side]."""
    values = integers()[key]
    return values.reshape(-1, *values.shape[2:])


EVERY = [
    (presets.layer_bypass, {}),
    (presets.le_selector, {}),
    (presets.all_layers, {}),
    (presets.single_channel, {"layers": ["conv2"], "channel": 3}),
    (presets.single_filter, {"count": 4}),
    (presets.single_filter_zero_outer, {}),
    (presets.reversed_single_filter, {"count": 2}),
    (presets.grid_size, {"grids": [(5, 5), (9, 3)], "count": 2}),
    (presets.worst_case, {}),
    (presets.mobilenet, {}),
]


def test_every_preset_is_listed():
    assert list(presets.PRESETS.values()) == [preset for preset, _ in EVERY]
    assert all(name == preset.__name__ for name, preset in presets.PRESETS.items())


@pytest.mark.parametrize("multiplex", [True, False])
@pytest.mark.parametrize(("preset", "options"), EVERY, ids=lambda v: getattr(v, "__name__", ""))
def test_wanted_outputs_give_back_the_weights(preset, options, multiplex):
    """A circuit that gives just what is wanted leaves the network as it was (or with the ring at 0)."""
    experiments = preset(lenet(), multiplex=multiplex, settings=Settings(rows=8, seed=3), **options)
    names = [e.name for e in experiments]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[A-Za-z0-9_.-]+", n) for n in names)
    for e in experiments:
        assert e.settings.seed == 3 and (e.settings.rows == 8 or preset is presets.grid_size)
        assert (e.problem.counts.max() == 1) or multiplex
        assert e.problem.targets.shape[1] <= 256 or not multiplex
        before = integers() | {"": np.arange(-128, 128).astype(np.int8)}
        written = e.written(before, e.problem.targets)
        assert written.keys() == {place.key for place in e.places}
        for key, values in written.items():
            wanted = np.array(before[key])
            if preset is presets.single_filter_zero_outer:
                wanted.reshape(-1)[e.places[0].positions] = 0
                assert len(e.places[0].positions) == 16
            assert np.array_equal(values, wanted)


def test_sizes_are_those_of_the_known_experiments():
    bypass = presets.layer_bypass(lenet())
    assert [e.settings.error_threshold for e in bypass] == [250, 150, 100, 50, 25, 15, 10, 0]
    assert {(e.problem.loaded, e.problem.weights) for e in bypass} == {(150, 2400)}
    assert np.array_equal(bypass[0].problem.inputs[0], integers()["conv1.weight"].reshape(-1))

    [selector] = presets.le_selector(lenet())
    assert (selector.problem.loaded, selector.problem.weights) == (0, 2550)
    assert not selector.problem.inputs.any() and selector.problem.inputs.shape[1] == 1
    assert selector.problem.datasets == 1 and [p.key for p in selector.places] == [
        "conv1.weight",
        "conv2.weight",
    ]

    [both] = presets.all_layers(lenet())
    sizes = [(9 * len(kernels(f"{n}.weight")), 16 * len(kernels(f"{n}.weight"))) for n in ("conv1", "conv2")]
    assert sizes[1] == (864, 1536) and [len(w) for w in both.problem.wires] == [n for _, n in sizes]
    assert set(SELECTING) <= set(both.settings.ids(both.problem.datasets))

    [worst] = presets.worst_case()
    assert worst.problem.inputs.shape == (1, 65) and worst.problem.targets.shape == (1, 256 - 65)

    nets = presets.mobilenet(lenet(), layers=["conv2"])
    assert [(e.settings.rows, e.settings.cols, e.runs, e.settings.error_threshold) for e in nets] == [
        (256, 31, 20, t) for t in (0, 1, 5, 11)
    ]
    assert np.array_equal(nets[0].problem.inputs[0], integers()["conv2.weight"].reshape(-1)[:96])


@pytest.mark.parametrize("backwards", [False, True])
def test_a_kernel_is_split_into_core_and_ring(backwards):
    preset = presets.reversed_single_filter if backwards else presets.single_filter
    for e in preset(lenet(), layers=["conv2"], count=5, multiplex=False):
        o, c = map(int, re.search(r"conv2_(\d+)_(\d+)_t0", e.name).groups())
        kernel = integers()["conv2.weight"][o, c]
        core = kernel[1:4, 1:4].reshape(-1).tolist()
        ring = [int(kernel[y, x]) for y in range(5) for x in range(5) if not (0 < y < 4 and 0 < x < 4)]
        given, wanted = (ring, core) if backwards else (core, ring)
        assert e.problem.inputs[0].tolist() == given and e.problem.targets[0].tolist() == wanted


def test_one_channel_of_all_filters():
    [e] = presets.single_channel(lenet(), layers=["conv2"], channel=3, multiplex=False)
    part = integers()["conv2.weight"][:, 3]
    assert e.problem.inputs[0].tolist() == part[:, 1:4, 1:4].reshape(-1).tolist()
    assert len(e.places[0].positions) == 16 * 16


def test_drawn_kernels_follow_the_seed_and_are_the_same_on_all_grids():
    def names(seed: int) -> list[str]:
        return [e.name for e in presets.single_filter(lenet(), count=8, settings=Settings(seed=seed))]

    assert names(1) == names(1) != names(2)
    grids = presets.grid_size(lenet(), count=3, grids=[(5, 5), (7, 2)])
    assert [(e.settings.rows, e.settings.cols) for e in grids] == [(5, 5)] * 3 + [(7, 2)] * 3
    assert [e.name.replace("5x5", "") for e in grids[:3]] == [e.name.replace("7x2", "") for e in grids[3:]]


def test_other_models_by_name():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 12, 3), nn.Sequential(nn.Conv2d(12, 4, 5)), nn.Linear(4, 4))
    net = lc.compress(net, [lc.Quantize(8)]).model
    [e] = presets.layer_bypass(net, inputs="0", outputs="1.0", thresholds=[2.5])
    assert (e.name, e.places[0].key, e.settings.error_threshold) == (
        "layer_bypass_0_1.0_t2.5",
        "1.0.weight",
        2.5,
    )
    [linear] = presets.layer_bypass(net, inputs="0.weight", outputs="2", thresholds=[0])
    assert linear.problem.weights == 16
    assert [e.name for e in presets.mobilenet(net, thresholds=[0])] == ["mobilenet_0_t0", "mobilenet_1.0_t0"]
    assert find_int8(net, "1.0")[1].shape == (4, 12, 5, 5)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda m: presets.layer_bypass(m, outputs="conv9"), "'conv9' is unknown.*conv1, conv2, fc1"),
        (lambda m: presets.layer_bypass(m, outputs="conv1"), "both the 150 weights of conv1"),
        (lambda m: presets.layer_bypass(m, thresholds=[]), "at least one"),
        (lambda m: presets.layer_bypass(m, thresholds=[-1]), "error_threshold=-1"),
        (lambda m: presets.layer_bypass(m, runs=0), "runs=0"),
        (lambda m: presets.all_layers(m, core=5), "side 5 .* 5 x 5 kernels of conv1; allowed: 1, 3"),
        (lambda m: presets.all_layers(m, core=2), "allowed: 1, 3"),
        (lambda m: presets.all_layers(m, layers=["fc1"]), r"fc1 of shape \(120, 400\) has no kernels"),
        (lambda m: presets.all_layers(m, layers="conv1"), "list of names"),
        (lambda m: presets.single_channel(m, channel=1), "conv1 of shape .* has channels 0 to 0"),
        (lambda m: presets.single_filter(m, count=103), "conv1, conv2 have 102 kernels"),
        (lambda m: presets.mobilenet(m, layers=["conv1"], count=150), "conv1 has 150 weights"),
        (lambda m: presets.mobilenet(m, count=3000), "no convolution has more than 3000"),
        (lambda m: presets.le_selector(lc.models.build("lenet5")), r"quantize first: Quantize\(8\)"),
    ],
)
def test_mistakes_are_explained(run, words):
    with pytest.raises(ValueError, match=words):
        run(lenet())


# -- writing what was evolved ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [presets.layer_bypass, presets.le_selector, presets.all_layers])
@pytest.mark.parametrize("multiplex", [True, False])
def test_circuits_go_into_the_network_and_its_file(preset, multiplex, tmp_path):
    """Random circuits with multiplexers: what each data set makes of them is what its layer keeps."""
    net = copy.deepcopy(lenet())
    chosen = Settings(rows=16, cols=8, seed_circuit="random", generations=0)
    [e] = preset(net, thresholds=[0], settings=chosen, multiplex=multiplex)
    circuit = evolve(e.problem, e.settings).best.circuit
    wanted = e.written(integers(), e.problem.outputs(circuit))
    assert write(net, e, circuit) == tuple(wanted)
    for key, values in wanted.items():
        assert np.array_equal(find_int8(net, key)[1], values)
        assert codes.read(net.get_submodule(key.removesuffix(".weight")), "weight").kind == "circuit"
    assert not lc.save(net, tmp_path / "net.lcz").stale
    fresh = lc.load(tmp_path / "net.lcz", into=lc.models.build("lenet5"))
    assert all(map(torch.equal, fresh.parameters(), net.parameters()))


def test_a_layer_with_other_weights_keeps_its_integers():
    net = copy.deepcopy(lenet())
    [e] = presets.single_filter(net, layers=["conv2"], settings=Settings(rows=8, cols=8, generations=0))
    result = evolve(e.problem, e.settings)
    assert write(net, e, result.best.circuit) == ()
    assert codes.read(net.conv2, "weight").kind == "affine" and torch.equal(
        net.conv2.weight, lenet().conv2.weight
    )


@given(st.integers(0, 2**32), st.integers(0, 5))
def test_a_data_set_sees_multiplexers_as_wires(seed, dataset):
    grid, random = Grid(3, 5, 4, 4, None, 6), np.random.default_rng(seed)
    circuit = random_circuit(grid, [1, 2, 8, 27, 28], random)
    x = random.integers(-128, 128, (6, 3)).astype(np.int8)
    alone = ordering.alone(circuit, dataset)
    assert alone.evaluate(x[dataset]).tolist() == circuit.evaluate(x)[dataset].tolist()
    assert not set(SELECTING) & set(alone.gates[:, 2].tolist())


def test_networks_of_another_kind_are_refused():
    [e] = presets.layer_bypass(lenet(), thresholds=[0], settings=Settings(rows=16, generations=0))
    circuit = evolve(e.problem, e.settings).best.circuit
    small = lc.compress(nn.Sequential(nn.Linear(4, 4)), [lc.Quantize(8)]).model
    with pytest.raises(ValueError, match=r"'conv2\.weight', which this model .*there are: 0\.weight"):
        write(small, e, circuit)
    with pytest.raises(ValueError, match="there are: none"):
        write(lc.models.build("lenet5"), e, circuit)
    other = lc.compress(nn.ModuleDict({"conv2": nn.Linear(4, 4)}), [lc.Quantize(8)]).model
    with pytest.raises(ValueError, match=r"weight 2399 of conv2\.weight, which has 16"):
        write(other, e, circuit)
