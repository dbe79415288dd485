"""DropLayers: what is left equals the network without the unit, and is one that others can load."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit import Lit, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.pruning.dropping import Bypass, NoSpectral
from lightning_compress.pruning.layers import DropLayers
from lightning_compress.pruning.modes import TruncateModes
from lightning_compress.transform import applied, replay

operators = pytest.importorskip("neuralop.models")
SpectralConv = pytest.importorskip("neuralop.layers.spectral_convolution").SpectralConv
X = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def fno(n_layers=4, kind="FNO", **options):
    torch.manual_seed(0)
    sizes = {"n_modes": (4, 4), "hidden_channels": 4, "projection_channel_ratio": 2}
    return getattr(operators, kind)(
        in_channels=1, out_channels=1, n_layers=n_layers, **{**sizes, **options}
    ).eval()


def codano(n_layers=3, skips=None, scales=None):
    torch.manual_seed(0)
    return operators.CODANO(
        output_variable_codimension=1,
        hidden_variable_codimension=4,
        lifting_channels=8,
        projection_channels=8,
        n_layers=n_layers,
        n_modes=[[4 + 2 * i, 4] for i in range(n_layers)],
        n_heads=[i + 1 for i in range(n_layers)],
        per_layer_scaling_factors=scales or [[1, 1]] * n_layers,
        attention_scaling_factors=[1] * n_layers,
        use_horizontal_skip_connection=skips is not None,
        horizontal_skips_map=skips,
    ).eval()


def uno():
    torch.manual_seed(0)
    return operators.UNO(
        in_channels=1,
        out_channels=1,
        hidden_channels=4,
        lifting_channels=4,
        projection_channels=4,
        n_layers=5,
        uno_out_channels=[4, 6, 6, 6, 4],
        uno_n_modes=[[4, 4]] * 5,
        uno_scalings=[[1, 1], [0.5, 0.5], [1, 1], [1, 1], [2, 2]],
        horizontal_skips_map={4: 0},
        channel_mlp_skip="linear",
    ).eval()


def run(model, *args, x=X, **options):
    return lc.compress(model, [DropLayers(*args, **options)], example_input=x)


def block(blocks, i, x):
    """Block i of an FNO without norms, by its formula."""
    y = blocks.convs[i](x) + blocks.fno_skips[i](x)
    y = nn.functional.gelu(y) if i < blocks.n_layers - 1 else y
    y = blocks.channel_mlp[i](y) + blocks.channel_mlp_skips[i](x)
    return nn.functional.gelu(y) if i < blocks.n_layers - 1 else y


@pytest.mark.parametrize("gone", [(0,), (2,), (3,), (0, 3), (0, 1, 2)])
def test_fno_without_blocks(gone, tmp_path):
    model = fno()
    small = run(model, layers=[f"fno_blocks.{i}" for i in gone]).model
    left = [i for i in range(4) if i not in gone]
    fresh = fno(len(left))
    state = small.state_dict()
    assert list(state) == list(fresh.state_dict()) and state["_metadata"] == fresh.state_dict()["_metadata"]
    fresh.load_state_dict(state)
    for size in (16, 32):
        x = torch.randn(2, 1, size, size)
        assert torch.equal(fresh(x), small(x))
        # By hand: the last of those that are left has no activation.
        y = model.lifting(model.positional_embedding(x))
        part = copy.deepcopy(model.fno_blocks)
        for position, i in enumerate(left):
            part.n_layers = i + 1 if position == len(left) - 1 else i + 2
            y = block(part, i, y)
        torch.testing.assert_close(small(x), model.projection(y))
    assert small.n_layers == small.fno_blocks.n_layers == len(left) and model.n_layers == 4
    small.save_checkpoint(tmp_path, "small")
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(operators.FNO.from_checkpoint(tmp_path, "small").eval()(x), small(x))


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "group_norm"},
        {"norm": "instance_norm", "preactivation": True},
        {"use_channel_mlp": False},
        {"fno_skip": None},
        {"channel_mlp_skip": None},
        {"resolution_scaling_factor": 1, "domain_padding": 0.2},
        {"kind": "TFNO", "rank": 0.5},
        {"complex_data": True},
        {"norm": "batch_norm"},
    ],
    ids=str,
)
def test_every_list_of_the_blocks_is_shortened(options):
    x = X.to(torch.cfloat) if options.get("complex_data") else X
    model = fno(3, **options)
    small = run(model, layers=["fno_blocks.1"], x=x).model
    fresh = fno(2, **options)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))
    gone = {k for k in model.state_dict() if k not in fresh.state_dict()}
    assert all(".2." in k or ".4." in k or ".5." in k for k in gone)
    assert torch.equal(small.fno_blocks.convs[1].bias, model.fno_blocks.convs[2].bias)
    if model.fno_blocks.norm is not None:
        assert len(small.fno_blocks.norm) == 4
    assert small.fno_blocks.resolution_scaling_factor == fresh.fno_blocks.resolution_scaling_factor


def test_blocks_that_scale_are_refused():
    model = fno(3, resolution_scaling_factor=[1, 2, 1])
    result = run(model, count=1)
    assert "its resolution is scaled by [2.0, 2.0]" in result.plan[0].skipped["fno_blocks.1"]
    assert result.model.resolution_scaling_factor in ([1, 2], [2, 1]) and model.n_layers == 3
    assert result.model(X).shape == (3, 1, 32, 32)
    with pytest.raises(ValueError, match=r"fno_blocks\.1.*scaled"):
        run(model, layers=["fno_blocks.1"])


def relative_change(model, other, x):
    a, b = model(x).detach().flatten(1), other(x).detach().flatten(1)
    return float(((a - b).norm(dim=1) / a.norm(dim=1)).mean())


@pytest.mark.parametrize("unit", ["block", "spectral"])
def test_bypass_error_takes_the_least_and_measures_again(unit):
    model = fno()
    with torch.no_grad():
        for i, layer in enumerate(model.fno_blocks.convs):
            layer.weight.tensor *= (3, 0.1, 2, 1)[i]
    name = "fno_blocks.{}" if unit == "block" else "fno_blocks.convs.{}"

    def error(*gone):
        chosen = [name.format(i) for i in gone]
        return relative_change(model, run(model, unit, layers=chosen).model, X)

    result = lc.compress(model, [DropLayers(unit, count=2)], data=X, example_input=X)
    first = min(range(4), key=error)
    second = min((i for i in range(4) if i != first), key=lambda i: error(first, i))
    plan = result.plan[0]
    assert list(plan.layers) == [name.format(first), name.format(second)]
    assert plan.layers[name.format(first)]["score"] == pytest.approx(error(first), rel=1e-5)
    assert plan.layers[name.format(second)]["score"] == pytest.approx(error(first, second), rel=1e-5)
    assert plan.data == "data n=3" and all("bypass error" in v for v in plan.skipped.values())
    once = lc.compress(model, [DropLayers(unit, count=2, iterative=False)], data=X, example_input=X).plan[0]
    assert list(once.layers) == [name.format(i) for i in sorted(range(4), key=error)[:2]]


def test_inputs_are_drawn_from_the_example():
    plan = run(fno(), ratio=0.25, samples=8).plan[0]
    assert plan.data == "synthetic:grf n=8 seed=0" and len(plan.layers) == 1


def test_scores_of_weights():
    model = fno()
    with torch.no_grad():
        for p in model.fno_blocks.parameters():
            p.fill_(1)
        for i, (layer, mlp) in enumerate(
            zip(model.fno_blocks.convs, model.fno_blocks.channel_mlp, strict=True)
        ):
            layer.weight.tensor *= (2, 1, 3, 1)[i]
            mlp.fcs[0].weight *= (1, 2, 1, 1)[i]
    plan = lc.compress(model, [DropLayers(criterion="magnitude", count=2)]).plan[0]
    assert list(plan.layers) == ["fno_blocks.3", "fno_blocks.1"] and plan.data == ""
    assert plan.layers["fno_blocks.3"]["score"] == 1.0
    spectral, skip, mlp = 4 * 4 * 4 * 3, 16, 2 * 4 + 2 * 4
    assert plan.layers["fno_blocks.1"]["score"] == pytest.approx(1 + 8 / (spectral + skip + mlp))
    random = [
        list(lc.compress(fno(), [DropLayers(criterion="random", count=1, seed=s)]).plan[0].layers)
        for s in (0, 0, 1, 2, 3, 4)
    ]
    assert random[0] == random[1] and len({r[0] for r in random}) > 1

    def last(target, stats):
        return torch.full(target.weight.shape, -1.0 if ".3" in target.name or "mlp.2" in target.name else 0.0)

    assert list(lc.compress(model, [DropLayers(criterion=last, count=1)]).plan[0].layers) == ["fno_blocks.3"]

    def norm(target, stats):
        return stats.input_norm.expand(target.weight.shape)

    norm.needs = ("input_norm",)
    inputs = lc.stats.Calibration(torch.randn(2, 3, 32, 32), "normal")
    plan = DropLayers(criterion=norm, count=1, samples=4).plan(lc.models.resnet20(), inputs)
    assert plan.data == "synthetic:normal n=4 seed=0"


# -- spectral paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"norm": "group_norm"}, {"complex_data": True}, {"fno_skip": None}], ids=str
)
def test_a_spectral_path_becomes_zero(options):
    x = X.to(torch.cfloat) if options.get("complex_data") else X
    model = fno(**options)
    small = run(model, "spectral", layers=["fno_blocks.convs.2"], x=x).model
    reference = copy.deepcopy(model)
    for p in reference.fno_blocks.convs[2].parameters():
        p.data.zero_()
    y = small(x)
    assert y.dtype == reference(x).dtype and torch.equal(y, reference(x))
    assert not [k for k in small.state_dict() if "convs.2" in k]
    assert small.n_layers == 4


@pytest.mark.parametrize("factor", [2, [0.5, 1.5]])
def test_scaling_and_output_shapes_stay(factor):
    layer = SpectralConv(2, 3, (4, 4), resolution_scaling_factor=factor)
    none = NoSpectral(layer, passes=False)
    x = torch.randn(2, 2, 12, 15)
    for shape in (None, (7, 9), (12, 15)):
        assert none(x, output_shape=shape).shape == layer(x, output_shape=shape).shape
        assert torch.equal(none.transform(x, shape), layer.transform(x, shape))
        assert not none(x, shape).any()
    model = fno(3, resolution_scaling_factor=[2, 1, 0.5])
    small = run(model, "spectral", count=2).model
    assert small(X).shape == model(X).shape and small(X).isfinite().all()


def test_a_spectral_path_without_a_skip_beside_it_stays():
    with pytest.raises(lc.NothingChangedError, match="no skip connection lies beside it"):
        run(fno(fno_skip=None, channel_mlp_skip=None), "spectral", count=1)
    with pytest.raises(lc.NothingChangedError, match="no spectral that could be left out"):
        run(lc.models.resnet20(), "spectral", count=1, x=torch.randn(1, 3, 32, 32))


# -- other models --------------------------------------------------------------------------------------------


def test_residual_blocks_let_their_input_through():
    torch.manual_seed(0)
    model, x = lc.models.resnet20().eval(), torch.randn(2, 3, 32, 32)
    result = run(model, layers=["layer1.1", "layer3.2"], x=x)
    small = result.model
    assert isinstance(small.layer1[1], Bypass) and type(small.layer1[0]).__name__ == "BasicBlock"
    reference = copy.deepcopy(model)
    for part in (reference.layer1[1], reference.layer3[2]):
        part.bn2.weight.data.zero_()  # the shortcut alone is left, and it is not negative
        part.bn2.bias.data.zero_()
    torch.testing.assert_close(small(x), reference(x))
    assert "maps 2 x 16 x 32 x 32 to 2 x 32 x 16 x 16" in result.plan[0].skipped["layer2.0"]
    assert set(DropLayers(count=1, samples=2).plan(model, lc.stats.Calibration(x, x)).layers) <= {
        f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2) if j or i == 1
    }
    assert result.after.macs < result.before.macs


def test_transformer_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    result = run(model, count=1, x=x)
    (name,) = result.plan[0].layers
    assert name in ("layers.1", "layers.2")  # the encoder itself reads attributes of the first
    assert "the model fails" in result.plan[0].skipped["layers.0"]
    two = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    left = [i for i in range(3) if f"layers.{i}" != name]
    for new, old in enumerate(left):
        two.layers[new].load_state_dict(model.layers[old].state_dict())
    torch.testing.assert_close(result.model(x), two(x))
    mask = torch.zeros(5, 5)
    torch.testing.assert_close(result.model(x, mask=mask), two(x, mask=mask))
    with pytest.raises(ValueError, match=r"layers\.0.*the model fails"):
        run(model, layers=["layers.0"], x=x)


class Stage(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.first = nn.Conv2d(a, b, 3, padding=1)
        self.blocks = nn.Sequential(*(Part(b) for _ in range(2)))

    def forward(self, x):
        return self.blocks(self.first(x))


class Part(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(n, n, 1), nn.ReLU()), nn.Conv2d(n, n, 1))

    def forward(self, x, scale=1):
        return x + scale * self.body(x)


def test_the_outermost_composite_modules_that_fit():
    x = torch.randn(1, 2, 6, 6)
    net = nn.Sequential(Stage(2, 3), Stage(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.ReLU())
    plan = DropLayers(count=3).plan(net, lc.stats.Calibration(x, x))
    assert set(plan.layers) | set(plan.skipped) == {"0", "0.blocks.0", "0.blocks.1", "1", "2"}
    assert "it maps 1 x 2 x 6 x 6 to 1 x 3 x 6 x 6" in plan.skipped["0"] and len(plan.layers) == 3
    shared = Part(3)
    twice = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ModuleList([shared])[0], shared, Part(3))
    small = run(twice, layers=["1"], x=x).model
    assert isinstance(small[1], Bypass) and small[1] is small[2]


def test_layers_that_keep_the_shape():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    result = run(net, "layer", x=x, layers=["2"])
    assert type(result.model[2]) is nn.Identity
    assert torch.equal(result.model(x), net[4](net[3](torch.relu(net[0](x)))))
    plan = DropLayers("layer", count=1).plan(net, lc.stats.Calibration(x, x))
    assert set(plan.layers) | set(plan.skipped) == {"0", "2", "4"}
    assert plan.skipped["4"] == "it maps 3 x 4 to 3 x 2"
    attention = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval()
    plan = DropLayers("layer", count=1).plan(attention, lc.stats.Calibration(torch.randn(1, 3, 4)))
    assert plan.skipped["self_attn.out_proj"] == "the forward pass does not call it"
    assert "something else than one tensor" in plan.skipped["self_attn"]
    model = fno(2)
    small = run(model, "layer", layers=["fno_blocks.convs.0"]).model
    h = model.lifting(model.positional_embedding(X))
    model.fno_blocks.convs[0].forward = lambda x, output_shape=None: x
    assert torch.equal(small(X), model(X)) and small.fno_blocks.convs[0](h).equal(h)


def test_codano_attention_layers():
    model = codano()
    small = run(model, layers=["attention_layers.1"]).model
    assert small.n_layers == 2 and small.n_modes == [[4, 4], [8, 4]] and small.n_heads == [1, 3]
    assert model.n_modes == [[4, 4], [6, 4], [8, 4]] and len(model.per_layer_scale_factors) == 3
    torch.manual_seed(0)
    fresh = operators.CODANO(
        output_variable_codimension=1,
        hidden_variable_codimension=4,
        lifting_channels=8,
        projection_channels=8,
        n_layers=small.n_layers,
        n_modes=small.n_modes,
        n_heads=small.n_heads,
        per_layer_scaling_factors=small.per_layer_scale_factors,
        attention_scaling_factors=small.attention_scalings,
    ).eval()
    fresh.load_state_dict(small.state_dict())
    for size in (16, 24):
        x = torch.randn(1, 1, size, size)
        assert torch.equal(fresh(x), small(x))
    assert run(model, count=2, samples=2).model.n_layers == 1


def test_codano_skips_are_renumbered():
    model = codano(5, skips={3: 0})
    result = run(model, count=1, samples=2)
    ends = [k for k, why in result.plan[0].skipped.items() if "horizontal skip" in why]
    assert ends == ["attention_layers.0", "attention_layers.3"]
    small = run(model, layers=["attention_layers.1", "attention_layers.4"]).model
    assert small.horizontal_skips_map == {2: 0} and list(small.skip_map_module) == ["2"]
    assert small(X).isfinite().all() and model.horizontal_skips_map == {3: 0}
    assert small.skip_map_module["2"].fcs[0].weight.equal(model.skip_map_module["3"].fcs[0].weight)
    scaled = codano(3, scales=[[1, 1], [2, 2], [1, 1]])
    assert "its resolution is scaled" in run(scaled, count=1, samples=2).plan[0].skipped["attention_layers.1"]


def test_uno_blocks():
    model = uno()
    result = run(model, layers=["fno_blocks.2"])
    skipped = result.plan[0].skipped
    assert all("horizontal skip" in skipped[f"fno_blocks.{i}"] for i in (0, 4))
    assert "it maps" in skipped["fno_blocks.1"] and isinstance(result.model.fno_blocks[2], Bypass)
    for size in (16, 24):
        assert result.model(torch.randn(1, 1, size, size)).shape == (1, 1, size, size)
    assert run(model, "spectral", count=1).model(X).shape == model(X).shape


# -- plans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "transform"),
    [
        (fno, DropLayers(ratio=0.5, samples=4)),
        (fno, DropLayers("spectral", count=2, samples=4)),
        (codano, DropLayers(count=1, samples=2)),
        (uno, DropLayers(count=1, samples=2)),
        (lambda: lc.models.resnet20(), DropLayers(ratio=0.3, criterion="magnitude")),
    ],
    ids=["fno", "spectral", "codano", "uno", "resnet"],
)
def test_archives_and_replay(make, transform, tmp_path):
    x = torch.randn(2, 3, 32, 32) if transform.ratio == 0.3 else X
    torch.manual_seed(1)
    result = lc.compress(make().eval(), [transform], example_input=x, data="normal")
    small = result.model
    lc.save(small, tmp_path / "small.lcz")
    back = lc.load(tmp_path / "small.lcz", into=make().eval())
    assert torch.equal(back(x), small(x)) and list(back.state_dict()) == list(small.state_dict())
    fresh = make().eval()
    replay(fresh, applied(small))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))
    fresh = make().eval()
    DropLayers().apply(fresh, from_json(json.loads(json.dumps(to_json(result.plan[0])))))
    assert list(fresh.state_dict()) == list(small.state_dict())
    assert torch.equal(lc.finalize(small)(x), small(x))


def test_steps_follow_one_another(tmp_path):
    steps = [DropLayers(count=1), TruncateModes((3, 2)), DropLayers("spectral", count=1), lc.Prune(0.5)]
    small = lc.compress(fno(), steps, example_input=X).model
    assert small.n_layers == 3 and sum(isinstance(m, NoSpectral) for m in small.modules()) == 1
    again = lc.compress(small, [DropLayers(count=1), TruncateModes((2, 2))], example_input=X).model
    assert again.n_layers == 2 and again.fno_blocks.n_modes == (2, 2) == again.n_modes
    lc.save(again, tmp_path / "small.lcz")
    back = lc.load(tmp_path / "small.lcz", into=fno())
    assert torch.equal(back(X), again(X))
    assert [k for k, *_ in codes.of(back)] == [k for k, *_ in codes.of(again)]


def test_masks_move_with_their_blocks():
    sparse = lc.compress(fno(), [lc.Prune(0.5)]).model
    small = run(sparse, layers=["fno_blocks.0"]).model
    held = dict((key, code.mask) for key, _, _, code in codes.of(small))
    before = dict((key, code.mask) for key, _, _, code in codes.of(sparse))
    assert held["fno_blocks.convs.1.weight.tensor"].equal(before["fno_blocks.convs.2.weight.tensor"])
    assert not any(".3." in key for key in held)
    assert all(code.matches(m.get_parameter(p)) for _, m, p, code in codes.of(small))


def test_a_checkpoint_loads_where_the_library_is_not_imported(tmp_path):
    small = run(fno(), count=2).model
    torch.save({"state": small.state_dict(), "x": X, "y": small(X).detach()}, tmp_path / "small.pt")
    code = f"""
import sys, torch
from neuralop.models import FNO
held = torch.load({str(tmp_path / "small.pt")!r}, weights_only=False)
model = FNO((4, 4), in_channels=1, out_channels=1, hidden_channels=4, n_layers=2, projection_channel_ratio=2)
model.load_state_dict(held["state"], strict=True)
assert torch.equal(model.eval()(held["x"]), held["y"]) and "lightning_compress" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Operator(Lit):
    def __init__(self, net):
        super().__init__(net)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])


def test_pruning_while_training_what_is_left():
    small = run(fno(3), count=1).model.train()
    x = torch.randn(8, 1, 16, 16)
    lit = Operator(small)
    prune = lc.ScheduledPruning(
        sparsity=0.5, include="net.fno_blocks.convs.*", begin=1, end=4, unit="step", every=1
    )
    trainer(prune, max_epochs=2).fit(lit, DataLoader(TensorDataset(x, x.cumsum(-1)), batch_size=2))
    weights = [p for n, p in small.named_parameters() if ".convs." in n and p.is_complex()]
    total = sum(w.numel() for w in weights)
    assert len(weights) == 2 and sum(int((w == 0).sum()) for w in weights) == math.floor(total / 2 + 0.5)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.999), st.integers(1, 40))
def test_how_many_go(ratio, total):
    wanted = DropLayers(ratio=ratio)._wanted(total)
    assert wanted == min(math.floor(ratio * total + 0.5), total - 1)


def test_strength_zero_and_a_single_unit():
    for options in ({"ratio": 0.0}, {"count": 0}):
        result = run(fno(), **options)
        assert result.plan[0].identity and result.model.n_layers == 4 and not result.coverage.changed
    with pytest.raises(lc.NothingChangedError, match=r"ratio=0\.1 of 4 is none"):
        run(fno(), ratio=0.1)
    with pytest.raises(lc.NothingChangedError, match="it is the only one"):
        run(fno(1), ratio=0.5)
    with pytest.raises(lc.NothingChangedError, match="the only one stays"):
        run(fno(), ratio=0.5, include="fno_blocks.2")


def test_patterns():
    plan = run(fno(), count=1, include=["fno_blocks.1", "fno_blocks.2"], exclude="fno_blocks.0").plan[0]
    assert set(plan.layers) < {"fno_blocks.1", "fno_blocks.2"}
    assert plan.skipped["fno_blocks.0"] == "excluded by 'fno_blocks.0'"
    assert "no include pattern" in plan.skipped["fno_blocks.3"]
    wrapped = nn.Sequential(fno())
    assert list(run(wrapped, layers=["0.fno_blocks.1"]).plan[0].layers) == ["0.fno_blocks.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one of ratio, count, layers"),
        ({"ratio": 0.5, "count": 1}, "ratio and count"),
        ({"ratio": 1.0}, "one unit must stay"),
        ({"count": -1}, "allowed is >= 0"),
        ({"count": 4}, "has 4 of unit='block' to choose from, and one must stay"),
        ({"unit": "channel", "count": 1}, "allowed: block, spectral, layer"),
        ({"layers": "fno_blocks.1"}, "sequence of names"),
        ({"layers": ["fno_blocks.9"]}, r"'fno_blocks\.9'.*these are: fno_blocks\.0"),
        ({"layers": [f"fno_blocks.{i}" for i in range(4)]}, "one must stay"),
        ({"criterion": "nonsense", "count": 1}, "criterion='nonsense' is unknown"),
        ({"count": 1, "samples": 0}, "at least 1"),
        ({"count": 1, "include": "nowhere"}, r"'nowhere' fits no unit; these are: fno_blocks\.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        run(fno(), **options)


def test_without_inputs():
    with pytest.raises(ValueError, match="calibration needs inputs"):
        lc.compress(fno(), [DropLayers(count=1)])
    with pytest.raises(lc.NothingChangedError, match="give an example_input"):
        lc.compress(lc.models.resnet20(), [DropLayers(count=1, criterion="magnitude")])
    assert lc.compress(fno(), [DropLayers(layers=["fno_blocks.3"])]).model.n_layers == 3


@pytest.mark.parametrize(
    "forged",
    [
        {"fno_blocks.0": {"kind": "entry", "of": "fno_blocks", "index": 4, "layers": 4}},
        {"fno_blocks.0": {"kind": "entry", "of": "fno_blocks", "index": -1, "layers": 4}},
        {"fno_blocks.0": {"kind": "entry", "of": "fno_blocks", "index": True, "layers": 4}},
        {"fno_blocks.0": {"kind": "entry", "of": "fno_blocks", "index": 0, "layers": 5}},
        {"fno_blocks.0": {"kind": "entry", "of": "lifting", "index": 0, "layers": 4}},
        {"fno_blocks.0": {"kind": "entry", "of": None, "index": 0}},
        {f"b{i}": {"kind": "entry", "of": "fno_blocks", "index": i, "layers": 4} for i in range(4)},
        {n: {"kind": "entry", "of": "fno_blocks", "index": 1, "layers": 4} for n in "ab"},
        {"fno_blocks.convs.0": {"kind": "spectral", "passes": False, "shape": [1]}},
        {"lifting": {"kind": "spectral", "passes": False, "shape": [1]}},
        {"lifting": {"kind": "bypass", "class": "Linear"}},
        {"nowhere": {"kind": "identity", "class": "Linear"}},
        {"lifting": {}},
    ],
    ids=str,
)
def test_forged_plans_change_nothing(forged):
    model = fno()
    good = {
        "fno_blocks.convs.1": run(model, "spectral", layers=["fno_blocks.convs.1"])
        .plan[0]
        .layers["fno_blocks.convs.1"]
    }
    with pytest.raises(ValueError, match="the plan leaves out"):
        DropLayers().apply(model, Plan(good | forged))
    assert model.n_layers == 4 and [type(c) for c in model.fno_blocks.convs] == [SpectralConv] * 4
    assert torch.equal(model(X), fno()(X))


def test_prune_points_to_it():
    with pytest.raises(ValueError, match=r"would remove the layer.*DropLayers"):
        lc.Prune(1.0)
