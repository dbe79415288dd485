"""Every criterion against NumPy: numbers worked out by hand, then layers of every kind."""

import numpy as np
import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.pruning.criteria import channel_scores, criterion, element_scores, measure
from lightning_compress.stats import Calibration, Stats, collect
from lightning_compress.targets import find

NAMES = ("magnitude", "random", "taylor", "fisher", "wanda", "activation", "batchnorm_scale", "redundancy")
CHANNELS_ONLY = ("activation", "batchnorm_scale", "redundancy")


def linear(weight, bias=None):
    weight = torch.as_tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = torch.as_tensor(bias)
    return layer


def scored(name, model, data=None, key=None, loss=None):
    """(rule, target, its statistics) after measuring."""
    rule = criterion(name, 0)
    targets = find(model)
    target = targets[0] if key is None else next(t for t in targets if t.key == key)
    found, _ = measure(rule, model, [target], Calibration(data=data, loss=loss), 256)
    return rule, target, found.get(target.key)


def elements(name, model, data=None, **options):
    return element_scores(*scored(name, model, data, **options)).numpy()


def channels(name, model, data=None, axis=0, norm="l2", normalize=True, **options):
    return channel_scores(*scored(name, model, data, **options), axis, norm, normalize).numpy()


# By hand: two or three weights ---------------------------------------------------------------------------------


def test_magnitude():
    layer = linear([[3.0, -4.0], [0.0, 1.0]])
    assert elements("magnitude", layer).tolist() == [[3, 4], [0, 1]]
    assert channels("magnitude", layer, normalize=False).tolist() == [5, 1]
    np.testing.assert_allclose(channels("magnitude", layer), [5 / 2**0.5, 1 / 2**0.5])
    assert channels("magnitude", layer, norm="l1").tolist() == [3.5, 0.5]
    assert channels("magnitude", layer, norm="l1", normalize=False, axis=1).tolist() == [3, 5]


def test_magnitude_of_complex_weights_is_the_modulus():
    layer = linear(torch.tensor([[3 + 4j, 0.0]]))
    assert elements("magnitude", layer).tolist() == [[5, 0]]
    assert channels("magnitude", layer, normalize=False).tolist() == [5]


def test_taylor_squares_the_mean_gradient_of_every_batch():
    # y = w x, loss (y - t)^2 / 2, gradient (y - t) x. w = (2, -1).
    # Batch 1: x = (1, 2), y = 0, t = -3: g = (3, 6).
    # Batch 2: x = (1, 0), y = 2, t = 1 and x = (3, 1), y = 5, t = 5: g = (1, 0) / 2.
    layer = linear([[2.0, -1.0]])
    data = [
        (torch.tensor([[1.0, 2.0]]), torch.tensor([[-3.0]])),
        (torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.tensor([[1.0], [5.0]])),
    ]
    for loss in (None, lambda y, t: (y - t).square().mean() / 2):
        np.testing.assert_allclose(elements("taylor", layer, data, loss=loss), [[(36 + 1) / 2, (36 + 0) / 2]])
        # The products g w of batch 1 cancel: 6 - 6; of batch 2: 1 + 0.
        np.testing.assert_allclose(channels("taylor", layer, data, loss=loss), [0.5])
        np.testing.assert_allclose(channels("taylor", layer, data, axis=1, loss=loss), [18.5, 18.0])


def test_taylor_without_labels_is_the_fisher_information_of_batches():
    # y = w x with x = 1, label y + N(0, 1): the mean gradient of a batch of 4 has variance 1 / 4.
    torch.manual_seed(0)
    layer = linear([[3.0]])
    target = find(layer)[0]
    data = Calibration(data=[torch.ones(4, 1)] * 2000, samples=8000)
    found, _ = measure(criterion("taylor", 0), layer, [target], data, 8000)
    np.testing.assert_allclose(found["weight"].taylor, [[9 / 4]], rtol=0.1)


def test_taylor_of_complex_weights_takes_the_real_part():
    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1 + 2j, 3j]]))

        def forward(self, x):
            return (x * self.weight).sum(1).real

    model = Field()
    (target,) = find(model, include="weight")
    # d Re(x w) / d(a + ib) as PyTorch has it: conj(x). x = (1, 1 + 1j): g = (1, 1 - 1j).
    x = torch.tensor([[1 + 0j, 1 + 1j]])
    data = Calibration(data=[(x, x)], loss=lambda out, _: out.sum())
    found, _ = measure(criterion("taylor", 0), model, [target], data, 9)
    # Re(conj(g) w) = Re(1 (1 + 2j)) = 1, Re((1 + 1j) 3j) = -3: the change of the loss when the entry goes is minus it.
    np.testing.assert_allclose(criterion("taylor", 0)(target, found["weight"]).numpy(), [[1, 9]])
    np.testing.assert_allclose(channel_scores(criterion("taylor", 0), target, found["weight"], 0), [4])


def test_fisher_squares_the_gradients_of_single_samples():
    # y = w x + b, loss (y - t)^2: gradient of w 2 (y - t) x, of b 2 (y - t).
    # x = 1: y = 5, t = 4: 2, 2. x = 3: y = 9, t = 10: -6, -2. Their mean, -2 and 0, is not what counts.
    layer = linear([[2.0]], [3.0])
    data = [(torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [10.0]]))]
    options = {"loss": lambda y, t: (y - t).square().sum()}
    np.testing.assert_allclose(elements("fisher", layer, data, **options), [[0.5 * (4 + 36) / 2 * 4]])
    np.testing.assert_allclose(channels("fisher", layer, data, **options), [40 + 0.5 * 4 * 9])
    np.testing.assert_allclose(channels("fisher", layer, data, axis=1, **options), [40])


def test_fisher_of_a_channel_sums_over_its_weights():
    layer = linear([[2.0, 1.0]])
    data = [(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]]))]  # y = 4, y - t = 3: g = (3, 6)
    options = {"loss": lambda y, t: (y - t).square().sum() / 2}
    np.testing.assert_allclose(elements("fisher", layer, data, **options), [[0.5 * 9 * 4, 0.5 * 36 * 1]])
    np.testing.assert_allclose(channels("fisher", layer, data, **options), [36])


@pytest.mark.parametrize("affine", [True, False])
def test_fisher_takes_the_bias_that_layer_and_batchnorm_have_together(affine):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=affine)).eval()
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(net[1].weight)
        nn.init.normal_(net[1].bias)
    data = [(torch.randn(5, 2, 6, 6), torch.randn(5, 3, 4, 4))]
    loss = lambda y, t: (y - t).square().sum()  # noqa: E731
    fused = lc.compress(net, lc.FuseBatchNorm(), example_input=data[0][0]).model
    before, after = (channels("fisher", m, data, loss=loss) for m in (net, fused))
    np.testing.assert_allclose(before, after, rtol=1e-4)
    without = elements("fisher", net, data, loss=loss).sum((1, 2, 3))
    assert (before > without * 1.001).all()


def test_products_do_not_change_when_batchnorm_is_folded():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    nn.init.normal_(net[1].weight)
    net[1].running_var.uniform_(0.5, 2)
    data = [(torch.randn(5, 2, 6, 6), torch.randn(5, 3, 4, 4))]
    fused = lc.compress(net, lc.FuseBatchNorm(), example_input=data[0][0]).model
    for score in (elements, channels):
        np.testing.assert_allclose(
            score("taylor", net, data), score("taylor", fused, data), rtol=1e-3, atol=1e-9
        )


def test_wanda():
    # ||x_0|| = 5, ||x_1|| = 1 over samples.
    layer, data = linear([[1.0, -4.0], [2.0, 0.0]]), [torch.tensor([[3.0, 0.0], [4.0, 1.0]])]
    np.testing.assert_allclose(elements("wanda", layer, data), [[5, 4], [10, 0]])
    np.testing.assert_allclose(channels("wanda", layer, data), [9, 10])
    np.testing.assert_allclose(channels("wanda", layer, data, axis=1), [15, 4])


def test_activation():
    # a = w x + b: channel 0 gives 1 and -7, channel 1 nothing.
    layer, data = linear([[1.0], [0.0]], [-1.0, 0.0]), [torch.tensor([[2.0]]), torch.tensor([[-6.0]])]
    np.testing.assert_allclose(channels("activation", layer, data), [5, 0])
    np.testing.assert_allclose(channels("activation", layer, data, norm="l1"), [4, 0])


def test_batchnorm_scale():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    net[1].weight.data = torch.tensor([0.5, -2.0, 0.0])
    assert channels("batchnorm_scale", net).tolist() == [0.5, 2, 0]
    with pytest.raises(ValueError, match=r"3\.weight has no norm_scale: no BatchNorm directly follows it"):
        channels("batchnorm_scale", net, key="3.weight")
    with pytest.raises(ValueError, match=r"axis 1 of 0\.weight is not its output axis 0"):
        channels("batchnorm_scale", net, axis=1)


def test_redundancy_is_the_sum_of_distances_to_the_other_channels():
    # Distances: (0, 0)-(3, 4) 5, (0, 0)-(0, 4) 4, (3, 4)-(0, 4) 3.
    layer = linear([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
    np.testing.assert_allclose(channels("redundancy", layer), [9, 8, 7])
    np.testing.assert_allclose(channels("redundancy", layer, norm="l1"), [7 + 4, 7 + 3, 4 + 3])
    np.testing.assert_allclose(channels("redundancy", layer, axis=1), [17**0.5] * 2)
    twin = linear(torch.view_as_complex(torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[0.0, 4.0]]])))
    np.testing.assert_allclose(channels("redundancy", twin), [9, 8, 7])


def test_random_gives_one_number_to_every_channel():
    layer = nn.Linear(4, 3)
    a, b, other = channels("random", layer), channels("random", layer), channels("random", layer, axis=1)
    assert a.shape == (3,) and other.shape == (4,) and np.array_equal(a, b) and not np.isin(a, other).any()
    assert ((a >= 0) & (a < 1)).all() and len(set(a)) == 3


def test_functions_of_users_are_put_together_by_the_norm():
    layer = linear([[3.0, -4.0]])
    raw = lambda t, s: t.weight.detach()  # noqa: E731
    assert channels(raw, layer, norm="l1", normalize=False).tolist() == [-1]
    assert channels(raw, layer, normalize=False).tolist() == [5]


# Layers of every kind -------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (nn.Linear(4, 6), (5, 4)),
    "linear on sequences": (nn.Linear(4, 6), (5, 3, 4)),
    "conv": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 4, 5, 5)),
    "depth-wise": (nn.Conv1d(4, 8, 3, groups=4), (5, 4, 7)),
    "transposed": (nn.ConvTranspose2d(3, 4, 2, stride=2), (5, 3, 4, 4)),
    "grouped transposed": (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), (5, 4, 6)),
}


@pytest.fixture(params=list(LAYERS))
def layer_and_input(request):
    layer, shape = LAYERS[request.param]
    return layer, torch.randn(shape)


def groups_of(scores, axis):
    """Scores of every element as rows, one for each index of the axis."""
    return np.moveaxis(scores, axis, 0).reshape(scores.shape[axis], -1)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_scores_of_every_axis(layer_and_input, name):
    layer, x = layer_and_input
    rule, target, stats = scored(name, layer, [x])
    if name == "batchnorm_scale":
        return
    if name not in CHANNELS_ONLY:
        assert element_scores(rule, target, stats).shape == layer.weight.shape
    for axis in [target.axes.out] if name == "activation" else range(layer.weight.dim()):
        scores = channel_scores(rule, target, stats, axis)
        assert scores.shape == layer.weight.shape[axis : axis + 1] and bool(scores.isfinite().all())


def test_taylor_of_every_axis_equals_autograd(layer_and_input):
    layer, x = layer_and_input
    y = torch.randn_like(layer(x)).detach()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    products = []
    for inputs, labels in batches:
        value = (layer(inputs) - labels).square().sum() / (2 * len(inputs))
        products.append(
            (torch.autograd.grad(value, layer.weight)[0] * layer.weight).detach().double().numpy()
        )
    expected = np.mean([p**2 for p in products], axis=0)
    np.testing.assert_allclose(elements("taylor", layer, batches), expected, rtol=1e-3, atol=1e-7)
    for axis in range(layer.weight.dim()):
        sums = np.mean([groups_of(p, axis).sum(1) ** 2 for p in products], axis=0)
        np.testing.assert_allclose(channels("taylor", layer, batches, axis=axis), sums, rtol=1e-3, atol=1e-6)


def test_fisher_of_the_output_axis_equals_autograd_with_the_bias(layer_and_input):
    layer, x = layer_and_input
    y = torch.randn_like(layer(x)).detach()
    tensors = [p for p in (layer.weight, layer.bias) if p is not None]
    squares = [np.zeros(t.shape) for t in tensors]
    for i in range(len(x)):
        value = (layer(x[i : i + 1]) - y[i : i + 1]).square().sum()
        for total, gradient in zip(squares, torch.autograd.grad(value, tensors), strict=True):
            total += gradient.double().numpy() ** 2 / len(x)
    parts = [0.5 * s * t.detach().double().numpy() ** 2 for s, t in zip(squares, tensors, strict=True)]
    rule, target, stats = scored("fisher", layer, [(x, y)], loss=lambda out, t: (out - t).square().sum())
    np.testing.assert_allclose(element_scores(rule, target, stats), parts[0], rtol=1e-3)
    expected = groups_of(parts[0], target.axes.out).sum(1)
    expected = expected + (parts[1].reshape(-1, len(expected)).sum(0) if len(parts) > 1 else 0)
    np.testing.assert_allclose(channel_scores(rule, target, stats, target.axes.out), expected, rtol=1e-3)


def test_activation_equals_the_outputs_that_a_hook_sees(layer_and_input):
    layer, x = layer_and_input
    with torch.no_grad():
        axis = -1 if isinstance(layer, nn.Linear) else 1
        out = np.moveaxis(layer(x).double().numpy(), axis, 0)
    rule, target, stats = scored("activation", layer, [x[:2], x[2:]])
    size = layer.weight.shape[target.axes.out]
    rows = np.concatenate(
        np.split(out.reshape(len(out), -1), len(out) // size), axis=1
    )  # groups share an index
    for norm, expected in (("l2", np.sqrt((rows**2).mean(1))), ("l1", np.abs(rows).mean(1))):
        np.testing.assert_allclose(
            channel_scores(rule, target, stats, target.axes.out, norm), expected, rtol=1e-5
        )


def test_outputs_of_attention_projections_are_seen():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    q, kv = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    found = collect(attention, find(attention), Calibration(data=[((q, kv, kv), None)]), ["output_rms"])
    with torch.no_grad():
        w, b = attention.in_proj_weight, attention.in_proj_bias
        parts = [(x @ w[i : i + 4].T + b[i : i + 4]).reshape(-1, 4) for x, i in ((q, 0), (kv, 4), (kv, 8))]
        final = attention(q, kv, kv)[0].reshape(-1, 4)
    expected = torch.cat([p.square().mean(0).sqrt() for p in parts])
    torch.testing.assert_close(found["in_proj_weight"].output_rms, expected)
    torch.testing.assert_close(found["out_proj.weight"].output_rms, final.square().mean(0).sqrt())


def test_spectral_weights_have_every_score():
    spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
    layer, x = spectral.SpectralConv(2, 3, (4, 4)), torch.randn(5, 2, 8, 8)
    with torch.no_grad():
        out = layer(x).transpose(0, 1).flatten(1)
    rule, target, stats = scored("activation", layer, [x])
    torch.testing.assert_close(channel_scores(rule, target, stats, 1), out.square().mean(1).sqrt())
    for name in ("magnitude", "random", "taylor", "fisher", "wanda", "redundancy"):
        rule, target, stats = scored(name, layer, [x])
        if name != "redundancy":
            assert element_scores(rule, target, stats).shape == target.weight.shape
        for axis in range(4):
            scores = channel_scores(rule, target, stats, axis)
            assert scores.shape == target.weight.shape[axis : axis + 1] and not scores.is_complex()


def test_taylor_of_a_whole_spectral_weight_is_the_change_of_a_linear_loss():
    spectral = pytest.importorskip("neuralop.layers.spectral_convolution")
    layer, x, y = spectral.SpectralConv(2, 1, (4, 4)), torch.randn(5, 2, 8, 8), torch.randn(5, 1, 8, 8)
    loss = lambda out, t: (out * t).sum()  # noqa: E731
    rule, target, stats = scored("taylor", layer, [(x, y)], loss=loss)
    assert not rule(target, stats).is_complex() and rule(target, stats).shape == (2, 1, 4, 3)
    with torch.no_grad():
        before = loss(layer(x), y)
        target.weight.zero_()
        change = before - loss(layer(x), y)
    torch.testing.assert_close(
        channel_scores(rule, target, stats, 1), change.square()[None], rtol=1e-3, atol=1e-4
    )


def test_a_complex_layer_of_a_user_has_input_and_output_norms():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

        def forward(self, x):
            return torch.einsum("bi...,io->bo...", x, self.kernel).real

    lc.register(Mixed, lc.Axes(out=1, in_=0), param="kernel")
    model, x = nn.Sequential(Mixed()), torch.randn(4, 3, 5, dtype=torch.complex64)
    target = find(model)[0]
    stats = collect(model, [target], Calibration(data=[x]), ["input_norm", "output_rms"])[target.key]
    torch.testing.assert_close(stats.input_norm, x.transpose(0, 1).flatten(1).norm(dim=1)[:, None])
    out = torch.einsum("bin,io->obn", x, model[0].kernel.detach()).flatten(1)
    torch.testing.assert_close(stats.output_rms, out.abs().square().mean(1).sqrt())


def test_embeddings_are_scored_by_how_often_they_are_looked_up():
    layer, tokens = nn.Embedding(3, 2), torch.tensor([[0, 1, 0, 0], [0, 1, 1, 1]])
    (target,) = find(layer, include="weight")
    rule = criterion("wanda", 0)
    found, _ = measure(rule, layer, [target], Calibration(data=[tokens]), 9)
    expected = layer.weight.detach().abs() * torch.tensor([4.0, 4.0, 0.0]).sqrt()[:, None]
    torch.testing.assert_close(element_scores(rule, target, found["weight"]), expected)
    with pytest.raises(ValueError, match=r"weight: an embedding has no Gram matrix"):
        collect(layer, [target], Calibration(data=[tokens]), ["gram"])
    sparse = nn.Embedding(3, 2, sparse=True)
    (target,) = find(sparse, include="weight")
    found = collect(sparse, [target], Calibration(data=[tokens]), ["taylor", "gradient"], task="regression")
    assert (found["weight"].gradient[2] == 0).all() and (found["weight"].taylor[:2] > 0).all()


# Precision, data, errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "taylor", "fisher"])
def test_scores_are_float32_or_as_precise_as_the_weight(dtype, name):
    layer, x = nn.Linear(3, 2, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.as_tensor(elements(name, layer, [x])).dtype == wanted
    assert torch.as_tensor(channels(name, layer, [x])).dtype == wanted


def test_double_weights_are_ranked_in_double_precision():
    layer = linear(torch.tensor([[1.0 + 1e-12, 1.0, 1.0 + 2e-12]], dtype=torch.float64))
    pruned = lc.compress(layer, lc.Prune(0.34, max_layer_sparsity=0.5)).model
    assert (pruned.weight == 0).tolist() == [[False, True, False]]


def test_a_dead_channel_goes_first_by_activation():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3))
    net[0].weight.data[4].mul_(1e-4)
    net[0].bias.data[4] = 0
    prune = lc.Prune(0.2, criterion="activation", pattern="channel", exclude="2")
    pruned = lc.compress(net, prune, data=[torch.randn(4, 1, 8, 8)]).model
    assert (pruned[0].weight == 0).flatten(1).all(1).nonzero().tolist() == [[4]]


def test_wanda_beats_magnitude_where_one_input_dominates():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(64, 32)
    x[:, 3] *= 30
    with torch.no_grad():
        layer.weight[:, 3] *= 0.1
    errors = {}
    for name in ("wanda", "magnitude"):
        result = lc.compress(layer, lc.Prune(0.5, criterion=name, scope="row"), data=[x])
        assert int((result.model.weight == 0).sum()) == 16 * 16
        errors[name] = float((result.model(x) - layer(x)).detach().norm() / layer(x).detach().norm())
    assert errors["wanda"] < 0.7 * errors["magnitude"]


def test_wanda_ranks_in_rows_unless_told_otherwise():
    assert (
        lc.Prune(criterion="wanda").scope == "row"
        and lc.Prune(criterion="wanda", scope="layer").scope == "layer"
    )
    assert lc.Prune().scope == "global" and lc.Prune(criterion="wanda", pattern="channel").scope == "global"


@pytest.mark.parametrize("name", ["wanda", "taylor", "fisher", "activation"])
def test_without_data_inputs_are_drawn_and_the_report_says_so(name):
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(1, 4)
    prune = lc.Prune(0.3, criterion=name, pattern="channel", exclude="2")
    state = torch.random.get_rng_state()
    a, b, c = (lc.compress(net, prune, example_input=x, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert "data: Prune synthetic:normal n=256 seed=0" in a.report and "seed=1" in c.report
    assert torch.equal(a.model[0].weight, b.model[0].weight)
    assert ("labels of the model's own distribution" in a.report) == (name in ("taylor", "fisher"))
    with pytest.raises(ValueError, match=r"data=.*example_input="):
        lc.compress(net, prune)


def test_the_report_names_the_loss():
    net, data = nn.Linear(4, 3), [(torch.randn(8, 4), torch.randint(3, (8,)))]
    given = lc.compress(net, lc.Prune(criterion="taylor"), data=data, loss=nn.functional.cross_entropy)
    labelled = lc.compress(net, lc.Prune(criterion="taylor"), data=data)
    assert "data n=8, loss cross_entropy" in given.report and "data n=8, its labels" in labelled.report
    assert torch.equal(given.model.weight, labelled.model.weight)
    with pytest.raises(ValueError, match="loss= needs labels"):
        lc.compress(net, lc.Prune(criterion="taylor"), data=[data[0][0]], loss=nn.functional.cross_entropy)
    with pytest.raises(ValueError, match=r"loss= gave torch.Size\(\[8\]\); needed is one number"):
        per_sample = lambda out, y: nn.functional.cross_entropy(out, y, reduction="none")  # noqa: E731
        lc.compress(net, lc.Prune(criterion="taylor"), data=data, loss=per_sample)


def test_labels_of_dense_outputs_are_used_too():
    net, x = nn.Conv2d(1, 3, 1), torch.randn(4, 1, 2, 2)
    y = torch.randint(3, (4, 2, 2))
    loss = lambda out, t: nn.functional.cross_entropy(out, t, reduction="sum") / len(out)  # noqa: E731
    np.testing.assert_allclose(
        elements("taylor", net, [(x, y)]), elements("taylor", net, [(x, y)], loss=loss)
    )


@pytest.mark.parametrize("name", CHANNELS_ONLY)
def test_criteria_of_channels_refuse_elements(name):
    with pytest.raises(
        ValueError, match=rf"criterion='{name}' scores whole channels: give pattern='channel'"
    ):
        lc.Prune(criterion=name)
    with pytest.raises(
        ValueError, match=rf"criterion '{name}' scores whole channels, not the elements of weight"
    ):
        criterion(name, 0)(find(nn.Linear(2, 2))[0], Stats())


def test_statistics_that_are_missing_are_named():
    target = find(nn.Linear(2, 2))[0]
    for name, field in (("taylor", "taylor"), ("fisher", "gradient"), ("wanda", "input_norm")):
        with pytest.raises(ValueError, match=f"weight has no {field}: it was not measured"):
            criterion(name, 0)(target, Stats())


def test_gradients_that_are_not_finite_are_named():
    net, data = nn.Sequential(nn.Linear(2, 2)), [(torch.zeros(3, 2), torch.zeros(3, 2))]
    with pytest.raises(ValueError, match=r"0\.weight: 4 of 4 entries of its gradient are not finite"):
        elements("taylor", net, data, loss=lambda out, y: (out * 0 / 0).sum() + out.sum() * float("inf"))


def test_layers_without_a_batchnorm_are_left_alone_with_the_reason():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    nn.init.normal_(net[1].weight)
    result = lc.compress(net, lc.Prune(0.5, criterion="batchnorm_scale", pattern="channel"))
    assert result.coverage.skipped["2.weight"] == "no BatchNorm directly follows it"
    gone = (result.model[1].weight == 0).tolist()
    assert gone == (net[1].weight.abs() <= net[1].weight.abs().sort().values[1]).tolist()


def test_measuring_leaves_the_model_as_it_was(layer_and_input):
    layer, x = layer_and_input
    net = nn.Sequential(layer, nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for name in NAMES[:-1]:
        measure(criterion(name, 0), net, find(net), Calibration(data=[x]), 256)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert not any(m._forward_hooks for m in net.modules()) and all(p.grad is None for p in net.parameters())
