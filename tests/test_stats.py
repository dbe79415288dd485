"""Calibration: the inputs that are drawn, and measured statistics against independent NumPy references."""

import copy
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.functional.inputs import Histogram
from lightning_compress.stats import Calibration, Stats, collect
from lightning_compress.targets import find, register


def only(model: nn.Module, data: Any, *what: str, samples: int = 256, **options: Any) -> Stats:
    """The statistics of a model with one target."""
    (stats,) = collect(model, find(model), Calibration(data=data, samples=samples), what, **options).values()
    return stats


def close(measured: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(
        measured.numpy(), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
    )


# Where inputs come from --------------------------------------------------------------------------


def test_without_data_and_example_both_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"data=.*example_input="):
        next(Calibration().batches(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"example_input="):
        next(Calibration(data="normal").batches(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "words"), [({"data": "noise"}, "'normal', 'grf'"), ({"samples": 0}, "at least 1")]
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Calibration(**options)


def test_default_sampler_is_normal_and_seeded() -> None:
    model, example = nn.Linear(3, 2), torch.zeros(5, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    a, b, other = (
        torch.cat(list(Calibration(example, samples=70, seed=seed).batches(model))) for seed in (1, 1, 2)
    )
    assert a.shape == (70, 3) and a.dtype == torch.float64
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert torch.equal(a[:9], torch.cat(list(Calibration(example, samples=9, seed=1).batches(model))))
    assert torch.equal(torch.get_rng_state(), state)
    assert Calibration(example, samples=70, seed=1).describe(model) == "synthetic:normal n=70 seed=1"


def test_models_with_spectral_weights_get_fields_like_the_example() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    smooth = 5 + 2 * torch.randn(4, 1, 32, 32)
    phases = (torch.rand(4, 1, 32, 32) < 0.3).float() * 9 + 3
    calibration = Calibration(torch.cat([smooth, phases], dim=1), samples=64)
    drawn = torch.cat(list(calibration.batches(model)))
    assert calibration.describe(model) == "synthetic:grf n=64 seed=0"
    assert drawn.shape == (64, 2, 32, 32)
    assert abs(float(drawn[:, 0].mean() - smooth.mean())) < 1e-4
    assert abs(float(drawn[:, 0].std() / smooth.std()) - 1) < 1e-2
    assert set(drawn[:, 1].unique().tolist()) == {3.0, 12.0}
    assert abs(float((drawn[:, 1] == 12).float().mean()) - float((phases == 12).float().mean())) < 0.01
    # Neighbours agree, as they do not in white noise.
    steps = (drawn[:, 0, 1:] - drawn[:, 0, :-1]).square().mean() / drawn[:, 0].var()
    assert float(steps) < 0.2
    shape_only = torch.cat(list(Calibration(torch.zeros(1, 1, 16, 16)).batches(model)))
    assert abs(float(shape_only.var()) - 1) < 0.05


def test_drawn_structures_follow_the_example() -> None:
    example = {
        "tokens": torch.tensor([[3, 9, 3]]),
        "x": torch.zeros(1, 2),
        "scale": torch.tensor(2.0),
        "flag": True,
    }
    batches = list(Calibration(example, samples=40).batches(nn.Identity()))
    assert [len(b["x"]) for b in batches] == [32, 8]
    assert set(batches[0]["tokens"].unique().tolist()) == {3, 9} and batches[0]["tokens"].shape == (32, 3)
    assert float(batches[0]["scale"]) == 2.0 and batches[0]["flag"] is True
    pair = next(
        Calibration((torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.complex64))).batches(nn.Identity())
    )
    assert isinstance(pair, tuple) and pair[1].dtype == torch.complex64 and pair[1].shape == (32, 3)


def test_batches_of_every_form_give_inputs_only() -> None:
    x, y = torch.arange(10.0).view(10, 1), torch.arange(10)
    model = nn.Linear(1, 1)
    halves = [(x[:5], y[:5]), (x[5:], y[5:])]
    forms = [
        x,
        [x[:5], x[5:]],
        halves,
        iter(halves),
        ([x[:5], y[:5]], [x[5:], y[5:]]),
        DataLoader(TensorDataset(x, y), batch_size=4),
        [{"input": x, "labels": y, "id": y}],
        {"input": x, "labels": y},
    ]
    for data in forms:
        calibration = Calibration(data=data, samples=7)
        for _ in range(2):  # the same at every call, also from an iterator
            batches = list(calibration.batches(model))
            inputs = [b["input"] if isinstance(b, dict) else b for b in batches]
            assert all(set(b) == {"input"} for b in batches if isinstance(b, dict))
            assert torch.equal(torch.cat(inputs), x[:7])
        assert calibration.describe(model) == "data n=7"
    labels = [label for _, label in Calibration(data=halves, samples=7).pairs(model)]
    assert torch.equal(torch.cat(labels), y[:7])


def test_shuffling_loader_is_seeded_and_leaves_the_global_state() -> None:
    loader = DataLoader(TensorDataset(torch.arange(20.0)), batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    a, b, c = (torch.cat(list(Calibration(data=loader, seed=s).batches(nn.Identity()))) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and sorted(a.tolist()) == list(range(20))
    assert torch.equal(torch.get_rng_state(), state)


def test_sampler_function_and_unknown_length() -> None:
    def ones(n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.ones(n, 1) + torch.rand(n, 1, generator=generator)

    calibration = Calibration(data=ones, samples=33)
    assert [len(b) for b in calibration.batches(nn.Identity())] == [32, 1]
    assert calibration.describe(nn.Identity()) == "synthetic:ones n=33 seed=0"

    class Stream:
        def __iter__(self) -> Iterator[torch.Tensor]:
            while True:
                yield torch.zeros(3, 1)

    endless = Calibration(data=Stream(), samples=4)
    assert [len(b) for b in endless.batches(nn.Identity())] == [3, 1]
    assert endless.describe(nn.Identity()) == "data n<=4"


def test_empty_data_and_things_that_are_no_batch() -> None:
    with pytest.raises(ValueError, match="no batches"):
        list(Calibration(data=[]).batches(nn.Identity()))
    with pytest.raises(ValueError, match="not str"):
        list(Calibration(data=["a"]).batches(nn.Identity()))


# What is measured --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_norms_and_gram(bias: bool, strided: bool) -> None:
    x = torch.randn(6, 5, 4)
    if strided:
        x = x.mT.contiguous().mT
    stats = only(nn.Linear(4, 3, bias=bias), [x[:4], x[4:]], "input_norm", "input_mean", "gram")
    rows = x.double().numpy().reshape(-1, 4)
    close(stats.input_norm, np.sqrt((rows**2).sum(0))[None])
    close(stats.input_mean, rows.mean(0)[None])
    close(stats.gram, rows.T @ rows)
    assert (stats.count, stats.rows) == (6, 30)
    assert stats.input_range is None and stats.gradient is None


def unit_responses(layer: Any, x: np.ndarray) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Per weight entry: its index, and the output [positions, channels] if it is one and the rest zero."""
    probe = copy.deepcopy(layer).double()
    probe.bias = None
    shape = probe.weight.shape
    responses = []
    with torch.no_grad():
        for index in np.ndindex(*shape):
            probe.weight.zero_()
            probe.weight[index] = 1
            y = probe(torch.from_numpy(x)).movedim(1, -1)
            responses.append((index, y.reshape(-1, y.shape[-1]).numpy()))
    return responses


CONVOLUTIONS = [
    (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 7)),
    (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 2, 8, 7)),
    (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (3, 4, 5, 6)),
    (nn.Conv2d(3, 3, 3, groups=3, stride=2), (3, 3, 7, 7)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    (nn.Conv3d(1, 2, 2), (2, 1, 3, 4, 3)),
    (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (3, 2, 5)),
    (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, groups=2, dilation=(2, 1)), (2, 4, 3, 4)),
    (nn.ConvTranspose2d(2, 1, 3, padding=2), (2, 2, 6, 6)),
]


@pytest.mark.parametrize(
    ("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v) if isinstance(v, nn.Module) else ""
)
def test_convolution_norms_and_means_equal_unit_kernel_responses(layer: Any, shape: tuple[int, ...]) -> None:
    """What an entry multiplies is the layer's response when that entry is one and the rest zero."""
    x = torch.randn(shape) + 1
    stats = only(layer, [x[:1], x[1:]], "input_norm", "input_mean", "gram")
    transposed, groups = layer.transposed, layer.groups
    responses = unit_responses(layer, x.double().numpy())
    norms, means = np.zeros((2, *layer.weight.shape))
    for index, y in responses:
        norms[index] = np.linalg.norm(y)
        output = index[1] + index[0] // (layer.in_channels // groups) * layer.weight.shape[1]
        means[index] = y[:, output if transposed else index[0]].mean()
    close(stats.input_norm.expand(layer.weight.shape), norms)
    close(stats.input_mean.expand(layer.weight.shape), means)
    # Gram matrix of one output channel per group: products of the responses of its weight entries.
    out_axis = 1 if transposed else 0
    grams = []
    for group in range(groups):
        first = group * (layer.out_channels // groups)
        channels = range(group * (layer.in_channels // groups), (group + 1) * (layer.in_channels // groups))
        ours = [
            y[:, first]
            for index, y in responses
            if (index[out_axis] == (0 if transposed else first)) and (not transposed or index[0] in channels)
        ]
        matrix = np.stack(ours, axis=1)
        grams.append(matrix.T @ matrix)
    close(stats.gram, np.stack(grams) if groups > 1 else grams[0])
    assert stats.rows == responses[0][1].shape[0]


def test_attention_norms_of_each_projection() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return self.attention(q, kv, kv)[0]

    model, q, kv = Cross(), torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    data = Calibration(data=[((q, kv), None)])
    found = collect(model, find(model), data, ["input_norm", "input_mean"])
    means = [t.double().numpy().reshape(-1, 4).mean(0) for t in (q, kv, kv)]
    close(found["attention.in_proj_weight"].input_mean, np.repeat(means, 4, axis=0))
    a, b = (np.sqrt((t.double().numpy().reshape(-1, 4) ** 2).sum(0)) for t in (q, kv))
    close(
        found["attention.in_proj_weight"].input_norm, np.concatenate([np.tile(v, (4, 1)) for v in (a, b, b)])
    )
    assert found["attention.in_proj_weight"].rows == 3 * 5  # of the queries
    # The output projection shows its input when it is the identity.
    probe = copy.deepcopy(model)
    with torch.no_grad():
        probe.attention.out_proj.weight.copy_(torch.eye(4))
        probe.attention.out_proj.bias.zero_()
        seen = probe(q, kv).reshape(-1, 4)
    close(found["attention.out_proj.weight"].input_norm, seen.norm(dim=0)[None].numpy())
    with pytest.raises(ValueError, match=r"attention\.in_proj_weight.*Gram"):
        collect(model, find(model), Calibration(data=[((q, kv), None)]), ["gram"])


def test_a_users_own_layer_with_another_orientation() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.kernel

    register(Own, (1, 0), param="kernel")
    x = torch.randn(7, 4)
    stats = only(nn.Sequential(Own()), [x], "input_norm", "gram")
    close(stats.input_norm, x.norm(dim=0)[:, None].numpy())
    close(stats.gram, (x.double().T @ x.double()).numpy())


def test_shared_weight_sums_over_its_uses() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model, x = Shared(), torch.randn(5, 3)
    stats = only(model, [x], "input_norm")
    expected = x.square().sum(0) + model.a(x).detach().square().sum(0)
    close(stats.input_norm, expected.sqrt()[None].numpy())
    assert stats.rows == 10


@pytest.mark.parametrize(
    ("modes", "used", "shape"),
    [
        ((4, 5), None, (6, 7)),
        ((4, 4), (2, 4), (8, 9)),
        ((5, 4), (4, 4), (8, 9)),
        ((6,), None, (16,)),
        ((6, 6), None, (4, 4)),
        ((3, 4, 4), None, (5, 6, 6)),
    ],
)
@pytest.mark.parametrize("separable", [False, True])
def test_spectral_norms_equal_unit_weight_responses(
    modes: tuple[int, ...], used: tuple[int, ...] | None, shape: tuple[int, ...], separable: bool
) -> None:
    """What an entry multiplies is the layer's own product when that entry is one and the rest zero."""
    spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
    layer = spectral.SpectralConv(2, 2, modes, separable=separable, bias=False)
    if used is not None:
        layer.n_modes = used
    x = torch.randn(3, 2, *shape)
    stats = only(layer, [x], "input_norm", "input_mean")
    probe = copy.deepcopy(layer)
    contract = probe._contract
    products: list[torch.Tensor] = []

    def spy(coefficients: torch.Tensor, weight: Any, separable: bool) -> torch.Tensor:
        products.append(contract(coefficients, weight, separable=separable))
        return products[-1]

    probe._contract = spy
    expected, means = torch.zeros_like(layer.weight.tensor.real), torch.zeros_like(layer.weight.tensor)
    with torch.no_grad():
        for index in np.ndindex(*expected.shape):
            probe.weight.tensor.zero_()
            probe.weight.tensor[index] = 1
            probe(x)
            means[index] = products[-1].sum() / len(x)
            expected[index] = products.pop().norm()
    close(stats.input_norm.expand(expected.shape), expected.numpy(), 1e-4)
    close(stats.input_mean.expand(expected.shape), means.numpy(), 1e-4)
    assert separable or stats.input_norm.shape[1] == 1
    assert float(expected.max()) > 0


def test_factors_of_a_spectral_weight_have_no_norms() -> None:
    spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
    layer = spectral.SpectralConv(4, 4, (4, 4), factorization="tucker", implementation="factorized", rank=0.5)
    with pytest.raises(ValueError, match=r"weight\.core was never used as a whole"):
        collect(layer, find(layer), Calibration(data=[torch.randn(2, 4, 8, 8)]), ["input_norm"])
    ranges = collect(layer, find(layer), Calibration(data=[torch.randn(2, 4, 8, 8)]), ["input_range"])
    assert "weight.core" in ranges and len(ranges) > 1


def test_ranges_and_histogram() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.fill_(10.0)
    batches = [torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, 7.0]])]
    stats = only(layer, batches, "input_range", "output_range", "histogram", "output_histogram")
    assert stats.input_range == (-3.0, 7.0)
    assert stats.output_range == (10.0 + 1 - 6, 10.0 + 0.5 + 14)
    counts, upper = stats.histogram
    assert counts.sum() == 6 and len(counts) == 2 * 2048
    assert upper == 8.0
    expected, _ = np.histogram(torch.cat(batches).numpy(), bins=2 * 2048, range=(-8, 8))
    assert np.array_equal(counts.numpy(), expected)
    counts, upper = stats.output_histogram
    outputs = layer(torch.cat(batches)).detach().numpy()
    expected, _ = np.histogram(outputs, bins=2 * 2048, range=(-32, 32))
    assert upper == 32.0 and np.array_equal(counts.numpy(), expected)


finite = st.floats(-1e6, 1e6, width=32)


@given(batches=st.lists(st.lists(finite, min_size=1, max_size=20), min_size=1, max_size=6))
def test_histogram_equals_one_over_all_values(batches: list[list[float]]) -> None:
    histogram = Histogram(bins=16)
    for batch in batches:
        histogram.add(torch.tensor(batch))
    values = np.array([v for batch in batches for v in batch])
    # Rational numbers: not even values next to an edge may be in the wrong bin.
    width = Fraction(histogram.upper or 1.0) / 16
    expected = np.bincount([math.floor(Fraction(v) / width) + 16 for v in values], minlength=32)
    assert np.array_equal(histogram.counts.numpy(), expected)
    largest = np.abs(values).max()
    assert largest < histogram.upper <= 2 * largest or histogram.upper == largest == 0


def test_histogram_of_complex_values_counts_both_parts() -> None:
    histogram, parts = Histogram(bins=8), Histogram(bins=8)
    z = torch.randn(50, dtype=torch.complex64)
    histogram.add(z.conj())
    parts.add(torch.stack([z.real, -z.imag]))
    assert torch.equal(histogram.counts, parts.counts) and histogram.counts.sum() == 100


def test_gradient_with_labels_is_the_mean_square_of_single_samples() -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    layer = nn.Linear(3, 2)
    stats = only(
        layer,
        [(x[:4], y[:4]), (x[4:], y[4:])],
        "gradient",
        loss=lambda out, label: (out - label).square().sum(),
    )
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    error = 2 * (x.numpy() @ w.T + b - y.numpy())
    expected = (np.einsum("no,ni->noi", error, x.numpy()) ** 2).mean(0)
    close(stats.gradient, expected)
    assert stats.count == 6 and layer.weight.grad is None


def test_gradient_without_labels_is_the_fisher_information() -> None:
    """Regression: E over y of g^2 is x_j^2; classification: p_o (1 - p_o) x_j^2."""
    count = 4000
    x = torch.tensor([[1.0, -2.0]]).repeat(count, 1)
    layer = nn.Linear(2, 3)
    p = torch.softmax(layer(x[:1]), 1).detach().numpy()[0]
    data = Calibration(data=[x], samples=count)
    regression = collect(layer, find(layer), data, ["gradient"], task="regression")["weight"].gradient
    classes = collect(layer, find(layer), data, ["gradient"])["weight"].gradient
    squares = np.array([[1.0, 4.0]])
    np.testing.assert_allclose(regression.numpy(), np.repeat(squares, 3, axis=0), rtol=0.1)
    np.testing.assert_allclose(classes.numpy(), (p * (1 - p))[:, None] * squares, rtol=0.1)


def test_gradient_of_complex_and_frozen_weights() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).real

    model, x = Field(), torch.randn(5, 3)
    (target,) = find(model, include="weight")
    found = collect(model, [target], Calibration(data=[(x, x)]), ["gradient"], loss=lambda out, _: out.sum())
    close(found["weight"].gradient, x.square().mean(0).numpy())
    assert not model.weight.requires_grad


def test_loss_needs_labels_and_fields_need_names() -> None:
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="labels"):
        only(layer, [x], "gradient", loss=lambda out, y: out.sum())
    with pytest.raises(ValueError, match=r"'grammar'.*input_norm, input_mean, gram"):
        only(layer, [x], "grammar")
    with pytest.raises(ValueError, match=r"'ranking'.*'regression'"):
        only(layer, [x], "gradient", task="ranking")


@pytest.mark.parametrize(
    "what",
    [
        "input_norm",
        "input_mean",
        "gram",
        "input_range",
        "output_range",
        "histogram",
        "output_histogram",
        "output_rms",
        "output_mean_abs",
        "gradient",
        "taylor",
        "taylor_sums",
    ],
)
def test_a_layer_that_never_ran_is_named(what: str) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Unused()
    with pytest.raises(ValueError, match=rf"spare\.weight was never used.*{what}"):
        collect(model, find(model), Calibration(data=[torch.ones(1, 2)]), [what])
    assert collect(model, find(model, exclude="spare"), Calibration(data=[torch.ones(1, 2)]), [what])


def test_the_bias_is_that_of_layer_and_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    nn.init.normal_(model[1].bias)
    model[1].running_mean.normal_()
    data = Calibration(data=[torch.randn(4, 3)])
    (target,) = find(model)
    what = ["bias", "bias_gradient", "norm_scale"]
    alone = collect(model, [target], data, what)["0.weight"]
    assert torch.equal(alone.bias, model[0].bias) and alone.norm_scale is None and alone.count == 4
    both = collect(model, [target], data, what, norms={"0.weight": model[1]})["0.weight"]
    zero = copy.deepcopy(model)
    nn.init.zeros_(zero[0].weight)
    torch.testing.assert_close(both.bias, zero(torch.randn(1, 3))[0].detach())
    assert torch.equal(both.norm_scale, model[1].weight.abs())
    # The linear layer's own bias sees the same gradients, times gamma / sigma.
    torch.testing.assert_close(alone.bias_gradient, both.bias_gradient / (1 + 1e-5))
    bare = nn.Linear(3, 2, bias=False)
    assert collect(bare, find(bare), data, what)["weight"].bias is None


def test_a_loss_of_the_calibration_is_used() -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    layer, loss = nn.Linear(3, 2), lambda out, label: (out - label).abs().sum()
    what = ["gradient", "taylor"]
    given = collect(layer, find(layer), Calibration(data=[(x, y)]), what, loss=loss)["weight"]
    held = collect(layer, find(layer), Calibration(data=[(x, y)], loss=loss), what)["weight"]
    assert torch.equal(given.gradient, held.gradient) and torch.equal(given.taylor, held.taylor)
    own = collect(layer, find(layer), Calibration(data=[(x, y)]), what)["weight"]
    assert not torch.equal(own.gradient, held.gradient) and not torch.equal(own.taylor, held.taylor)


@pytest.mark.parametrize("what", ["input_norm", "output_rms", "histogram", "gradient", "taylor"])
def test_values_that_are_not_finite_are_named(what: str) -> None:
    x = torch.ones(2, 2)
    x[1, 0] = float("nan")
    words = "output is not finite" if what in ("gradient", "taylor") else r"0\.weight: .* not finite"
    with pytest.raises(ValueError, match=words):
        only(nn.Sequential(nn.Linear(2, 2)), [x], what)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    class Last(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if fails:
                raise RuntimeError("on purpose")
            return x.flatten(1) + torch.rand(1)

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2).eval(), nn.Dropout(), Last())
    model[0].bias.requires_grad_(False)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    x = torch.ones(2, 1, 5, 5)
    for what in (["input_norm", "gram", "input_range", "output_range", "histogram"], ["gradient"]):
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                collect(model, find(model), Calibration(data=[x]), what)
        else:
            collect(model, find(model), Calibration(data=[x]), what)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    for new, old in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(new, old)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off_and_batch_norm_uses_its_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 1))
    model[0].running_mean.fill_(5.0)
    x = torch.randn(4, 3) + 5
    stats = only(model.train(), [x], "input_norm")
    close(stats.input_norm, ((x - 5) / np.sqrt(1 + 1e-5)).norm(dim=0)[None].numpy())


def test_same_seed_same_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    what = ["input_norm", "gradient"]
    a, b = (
        collect(model, find(model), Calibration(torch.zeros(1, 1, 5, 5), samples=20), what) for _ in range(2)
    )
    for key in a:
        assert torch.equal(a[key].input_norm, b[key].input_norm)
        assert torch.equal(a[key].gradient, b[key].gradient)
