"""RemoveChannels: how many channels go, which ones, budgets, conflicts, fitted weights, and bad input."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.models import LeNet5, ResNetCIFAR
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.pruning.order import relative_latency
from lightning_compress.pruning.silence import silencing
from lightning_compress.stats import Calibration

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

ROW = torch.ones(1, 4)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    net = ResNetCIFAR(20, width=8).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def mlp(width: int = 10, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, width, bias=bias), nn.ReLU(), nn.Linear(width, width, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3, bias=bias)).eval()


def run(net: nn.Module, x: torch.Tensor = ROW, **options):
    data = options.pop("data", None)
    return lc.compress(net, [lc.RemoveChannels(**options)], example_input=x, data=data)


@pytest.mark.parametrize(("ratio", "left"), [(0.3, 7), (0.25, 7), (0.5, 5), (0.9, 1), (0.04, 10)])
def test_every_family_loses_its_share(ratio, left):
    if left == 10:
        with pytest.raises(lc.NothingChangedError, match="none of its channels"):
            run(mlp(), ratio=ratio)
        return
    small = run(mlp(), ratio=ratio).model
    assert (small[0].out_features, small[2].out_features, small[4].in_features) == (left, left, left)


def test_the_lowest_scores_go():
    net = mlp()
    norms = net[0].weight.detach().norm(dim=1)
    small = run(net, ratio=0.3, include="0").model
    kept = norms.argsort()[3:].sort().values
    assert torch.equal(small[0].weight, net[0].weight[kept]) and torch.equal(small[0].bias, net[0].bias[kept])
    assert torch.equal(small[2].weight, net[2].weight[:, kept])


def test_coupled_layers_vote_with_relative_scores():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(1, 3, bias=False), nn.Linear(1, 3, bias=False), nn.Linear(3, 1)
            self.a.weight.data = torch.tensor([[30.0], [10.0], [20.0]])  # relative: 1.5, 0.5, 1
            self.b.weight.data = torch.tensor([[1.0], [4.0], [1.0]])  # relative: 0.5, 2, 0.5

        def forward(self, x):
            return self.c(self.a(x) + self.b(x))

    small = run(Sum(), torch.ones(1, 1), ratio=1 / 3).model
    assert small.a.weight.flatten().tolist() == [30.0, 10.0] and small.b.weight.flatten().tolist() == [
        1.0,
        4.0,
    ]


def test_global_scope_takes_the_weakest_layer_first():
    net = mlp()
    net[2].weight.data[:6] *= 1e-3
    small = run(net, ratio=0.25, scope="global").model  # 5 of 20
    assert (small[0].out_features, small[2].out_features) == (10, 5)
    small = run(net, ratio=0.25, scope="global", max_layer_ratio=0.3).model
    assert (small[0].out_features, small[2].out_features) == (8, 7)


def test_mapping_patterns_rounding_and_caps():
    small = run(mlp(), ratio={"0": 0.5, "2": 0.2}).model
    assert (small[0].out_features, small[2].out_features) == (5, 8)
    small = run(mlp(), ratio=0.45, round_to=4).model
    assert (small[0].out_features, small[2].out_features) == (8, 8)
    small = run(mlp(), ratio=0.8, max_layer_ratio=0.5, exclude="2").model
    assert (small[0].out_features, small[2].out_features) == (5, 10)
    result = run(mlp(), ratio=0.5, include="2")
    assert result.model[0].out_features == 10
    assert result.steps[0].plan.skipped["0.weight"] == "no include pattern of ['2'] fits"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_budgets_are_met_and_not_by_much(resnet, kind, scope, share):
    result = run(resnet, IMAGE, budget=(kind, share), scope=scope)
    before, after = (getattr(c, kind) for c in (result.before, result.after))
    assert share - 0.05 <= after / before <= share  # 8 channels are coarse
    assert result.model(IMAGE).shape == (2, 10)


def test_a_budget_out_of_reach_says_how_far_it_goes(resnet):
    with pytest.raises(ValueError, match=r"cannot be met: without all channels that may go, 0\.\d+ are left"):
        run(resnet, IMAGE, budget=("macs", 0.05), max_layer_ratio=0.3)


def test_latency_budget(resnet):
    result = run(resnet, IMAGE, budget=("latency", 0.95))
    assert 0 < result.after.macs <= result.before.macs
    assert relative_latency(resnet, resnet, IMAGE) == pytest.approx(1, abs=0.5)


def test_padded_shortcuts_lose_channels_too():
    net = ResNetCIFAR(20, width=8, shortcut="pad").eval()
    result = run(net, IMAGE, ratio=0.5)
    small = result.model
    assert small.conv1.out_channels == 4 and small.linear.in_features < 32
    assert small.layer2[0].shortcut.before + small.layer2[0].shortcut.after < 8
    assert result.after.macs < 0.35 * result.before.macs


def silenced(net: nn.Module, x: torch.Tensor, ratio: float) -> nn.Module:
    """The network with the channels that would go at zero, wherever parameters have entries for them."""
    transform, inputs = lc.RemoveChannels(ratio), Calibration(example_input=x)
    found, _, trials = transform.find(net, inputs)
    scores, _ = transform.scores(net, found, inputs)
    gone = transform.choose(net, found, scores, trials)
    twin = copy.deepcopy(net)
    parameters = dict(twin.named_parameters())
    for key, mask in silencing(net, found, gone).items():
        parameters[key].data.masked_fill_(~mask, 0)
    return twin


def test_removal_equals_silence(resnet):
    twin = silenced(resnet, IMAGE, 0.5)
    small = run(resnet, IMAGE, ratio=0.5).model
    assert torch.allclose(small(IMAGE), twin(IMAGE), atol=1e-5)
    again = lc.compress(twin, [lc.RemoveChannels("silent")], example_input=IMAGE).model
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]
    assert torch.equal(again(IMAGE), small(IMAGE))


def test_nothing_silent_is_no_fault():
    assert (
        lc.compress(mlp(), [lc.RemoveChannels("silent")], example_input=torch.ones(1, 4)).coverage.share == 0
    )


def test_masks_are_cut_along():
    net = lc.compress(mlp(), [lc.Prune(0.5)]).model
    small = lc.compress(net, [lc.RemoveChannels(0.3)], example_input=torch.ones(1, 4)).model
    masks = {key: code.mask for key, _, _, code in lc_codes(small)}
    assert set(masks) == {"0.weight", "2.weight", "4.weight"}
    for key, mask in masks.items():
        weight = dict(small.named_parameters())[key]
        assert mask.shape == weight.shape and bool((weight[~mask] == 0).all())


def lc_codes(net):
    from lightning_compress import codes

    return list(codes.of(net))


def test_parameters_stay_the_same_objects():
    net = mlp()
    before = [id(p) for p in net.parameters()]
    lc.compress(net, [lc.RemoveChannels(0.5)], example_input=torch.ones(1, 4), inplace=True)
    assert [id(p) for p in net.parameters()] == before and net[0].out_features == 5
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def test_plans_are_json_and_replay_on_a_fresh_model(tmp_path):
    net = LeNet5().eval()
    x = torch.randn(1, 1, 28, 28)
    result = run(net, x, ratio=0.4)
    plan = from_json(to_json(result.steps[0].plan))
    fresh = LeNet5().eval()
    fresh.load_state_dict(net.state_dict())
    lc.RemoveChannels().apply(fresh, plan)
    assert torch.equal(fresh(x), result.model(x))
    lc.save(result.model, tmp_path / "net.lcz")
    assert torch.equal(lc.load(tmp_path / "net.lcz", into=LeNet5().eval())(x), result.model(x))


def test_a_forged_plan_changes_nothing():
    net = mlp()
    good = run(net, ratio=0.5).steps[0].plan
    before = copy.deepcopy(net.state_dict())
    for key, entry in (
        ("0.weight", {"shape": [10, 4], "keep": {"0": torch.tensor([3, 99])}}),
        ("0.weight", {"shape": [10, 4], "keep": {"0": torch.tensor([3, 3])}}),
        ("0.weight", {"shape": [10, 4], "keep": {"7": torch.tensor([3])}}),
        ("0.weight", {"shape": [11, 4], "keep": {"0": torch.tensor([3])}}),
        ("nope.weight", {"shape": [11, 4], "keep": {"0": torch.tensor([3])}}),
        ("0()", {"set": {"out_features": [-1, 10, 11]}}),
        ("0()", {"set": {"forward": [-1, 10, 5]}}),
        ("0.weight", {"value": torch.zeros(3, 3)}),
    ):
        forged = Plan({**good.layers, key: entry})
        with pytest.raises(ValueError, match=key.removesuffix("()")):
            lc.RemoveChannels().apply(net, forged)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Flattens(nn.Module):
    """Its code holds a number that no attribute says."""

    def __init__(self):
        super().__init__()
        self.conv, self.free, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(24, 2)

    def forward(self, x):
        return self.fc(self.free(self.conv(x)).view(-1, 24))


def test_what_cannot_go_is_left_with_the_reason():
    x = torch.randn(1, 1, 4, 4)
    result = run(Flattens(), x, ratio=0.5)
    assert (result.model.conv.out_channels, result.model.free.out_channels) == (4, 6)
    assert "its channels cannot go" in result.steps[0].plan.skipped["outputs of free.weight"]
    with pytest.raises(ValueError, match=r"the channels of free cannot be removed: .*exclude=\['free'\]"):
        run(Flattens(), x, ratio=0.5, on_conflict="error")
    assert run(Flattens(), x, ratio=0.5, on_conflict="error", exclude="free").model.conv.out_channels == 4


def test_refitted_weights_are_the_least_squares_solution():
    net = mlp()
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    plain = run(net, x[:1], ratio=0.4, include="0").model
    fitted = run(
        net, x[:1], ratio=0.4, include="0", reconstruct=True, samples=400, damping=1e-9, data=[x]
    ).model
    hidden = torch.relu(fitted[0](x)).double().detach().numpy()
    wanted = net[2](torch.relu(net[0](x))).double().detach().numpy()
    design = np.concatenate([hidden, np.ones((400, 1))], 1)
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    assert np.allclose(fitted[2].weight.detach().numpy(), solution[:-1].T, atol=1e-4)
    assert np.allclose(fitted[2].bias.detach().numpy(), solution[-1], atol=1e-4)
    errors = [(m(x) - net(x)).norm().item() for m in (fitted, plain)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("groups", [1, 2])
def test_refitted_convolutions_give_less_error(groups):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=groups)
    net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(32, 3, 12, 12)
    options = {"ratio": 0.5, "include": "0", "data": [x]}
    plain, fitted = run(net, x[:1], **options).model, run(net, x[:1], reconstruct=True, **options).model
    errors = [(m(x) - net(x)).norm().item() for m in (fitted, plain)]
    assert errors[0] < 0.9 * errors[1]
    assert [p.shape for p in fitted.parameters()] == [p.shape for p in plain.parameters()]


def test_fitted_weights_are_not_part_of_the_structure():
    plan = run(mlp(), ratio=0.4, reconstruct=True).steps[0].plan
    assert any("value" in e for e in plan.layers.values())
    assert not any("value" in e for e in lc.RemoveChannels.structure(plan).layers.values())


@pytest.mark.parametrize(
    "criterion", ["magnitude", "random", "taylor", "fisher", "wanda", "activation", "redundancy"]
)
def test_every_criterion_ranks_channels(criterion):
    result = run(mlp(), ratio=0.3, criterion=criterion, samples=16)
    assert result.model[0].out_features == 7
    needs = criterion in ("taylor", "fisher", "wanda", "activation")
    assert ("synthetic:normal n=16" in result.report) == needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "0 <= ratio < 1"),
        ({"ratio": "loud"}, "silent"),
        ({"scope": "row"}, "layer, global"),
        ({"budget": ("flops", 0.5)}, "macs"),
        ({"budget": ("macs", 0.0)}, "share in"),
        ({"round_to": 0}, "round_to=0"),
        ({"max_layer_ratio": 0.0}, "max_layer_ratio"),
        ({"on_conflict": "ignore"}, "skip, error"),
        ({"norm": "l3"}, "l2, l1"),
        ({"per": "byte"}, "channel, mac"),
        ({"damping": 0.0}, "damping"),
        ({"criterion": "size"}, "criterion"),
        ({"ratio": {"0": 0.5}, "scope": "global"}, "scope='layer'"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        lc.RemoveChannels(**options)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="example_input="):
        lc.compress(mlp(), [lc.RemoveChannels(0.5)])
    with pytest.raises(ValueError, match="fits no layer"):
        run(mlp(), exclude="conv*")
    with pytest.raises(lc.NothingChangedError, match="the model gives it out"):
        run(nn.Sequential(nn.Linear(4, 3)))
    quantized = lc.compress(mlp(), [lc.Quantize(4)]).model
    with pytest.raises(lc.transform.OrderError, match="remove channels first"):
        run(quantized)


@pytest.mark.parametrize("name", ["FNO", "TFNO"])
def test_neural_operators(name, tmp_path):
    models = pytest.importorskip("neuralop.models")
    options = {"n_modes": (6, 6), "in_channels": 1, "out_channels": 1, "hidden_channels": 8, "n_layers": 2}
    options |= {"rank": 0.5} if name == "TFNO" else {}
    torch.manual_seed(0)
    net, x = getattr(models, name)(**options).eval(), torch.randn(2, 1, 16, 16)
    twin = silenced(net, x, 0.5)
    result = run(net, x, ratio=0.5)
    small = result.model
    assert torch.allclose(small(x), twin(x), atol=1e-5)
    assert (
        tuple(small.fno_blocks.convs[0].weight.shape)[:2] == (4, 4)
        and small.fno_blocks.convs[0].out_channels == 4
    )
    assert small(torch.randn(1, 1, 20, 24)).shape == (1, 1, 20, 24)
    assert result.after.macs < 0.6 * result.before.macs
    before = copy.deepcopy(net)
    lc.save(small, tmp_path / "net.lcz")
    assert torch.equal(lc.load(tmp_path / "net.lcz", into=before)(x), small(x))
