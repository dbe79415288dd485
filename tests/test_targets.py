"""Targets: every layer type, patterns, shared weights once, wrappers, and the errors."""

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress.names import clean, lookup
from lightning_compress.targets import find, locate, survey


def keys(model, *args, **kwargs):
    return [t.key for t in find(model, *args, **kwargs)]


@pytest.mark.parametrize(
    ("layer", "axes"),
    [
        (nn.Linear(3, 4), (0, 1)),
        (nn.Conv1d(4, 6, 3), (0, 1)),
        (nn.Conv2d(4, 6, 3, groups=2), (0, 1)),
        (nn.Conv2d(4, 4, 3, groups=4), (0, None)),
        (nn.Conv3d(4, 6, 3), (0, 1)),
        (nn.ConvTranspose1d(4, 6, 3), (1, 0)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (1, 0)),
        (nn.ConvTranspose3d(4, 6, 3), (1, 0)),
    ],
)
def test_axes_of_every_layer(layer, axes):
    (target,) = find(nn.Sequential(layer))
    assert (target.key, tuple(target.axes)) == ("0.weight", axes)
    assert target.weight is layer.weight


def test_attention_projections_are_targets():
    same = nn.MultiheadAttention(8, 2)
    assert keys(same) == ["in_proj_weight", "out_proj.weight"]
    other = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    assert keys(other) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    assert keys(encoder, include="self_attn*") == ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]


def test_recurrent_weights_are_pruned_in_place_when_named():
    net = nn.ModuleDict({"lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True), "cell": nn.GRUCell(3, 4)})
    assert keys(net) == []
    found = keys(net, include=["lstm", "cell"])
    assert len(found) == 10 and all(".weight_" in k for k in found) and "cell.weight_hh" in found
    lstm = lc.compress(net, [lc.Prune(0.5, include="lstm", scope="layer")]).model["lstm"]
    lstm.flatten_parameters()
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    lstm(torch.randn(5, 2, 3))[0].sum().backward()
    assert all(p.grad is not None for p in lstm.parameters())
    optimizer.step()


def test_norms_biases_and_embeddings_only_when_named():
    net = nn.ModuleDict({"emb": nn.Embedding(5, 4), "bn": nn.BatchNorm1d(4), "fc": nn.Linear(4, 2)})
    found = survey(net)
    assert [t.key for t in found.targets] == ["fc.weight"]
    assert set(found.skipped) == {"emb.weight", "bn.weight", "bn.bias", "fc.bias"}
    assert "only when a pattern names them" in found.skipped["emb.weight"]
    assert keys(net, include=["emb"]) == ["emb.weight"]
    assert keys(net, include=["fc", "bn.weight", "fc.bias"]) == ["bn.weight", "fc.weight", "fc.bias"]


@pytest.mark.parametrize("options", [{}, {"factorization": "tucker", "rank": 0.5}, {"separable": True}])
def test_spectral_weights_are_found_by_parameter(options):
    models = pytest.importorskip("neuralop.models")
    fno = models.FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=6, n_layers=1, **options)
    found = {t.key: t for t in find(fno)}
    spectral = [k for k in found if ".convs." in k]
    assert all(found[k].weight.is_complex() for k in spectral)
    assert found[spectral[0]].name == "fno_blocks.convs.0"
    if options.get("separable"):
        assert [tuple(found[k].axes) for k in spectral] == [(0, None)]
    elif options:
        assert [k.removeprefix("fno_blocks.convs.0.weight.") for k in spectral] == [
            "core",
            *(f"factors.factor_{i}" for i in range(4)),
        ]
    else:
        assert [tuple(found[k].axes) for k in spectral] == [(1, 0)]
    assert "fno_blocks.fno_skips.0.conv.weight" in found
    assert not any("bias" in k for k in found)


def test_a_user_registers_a_layer_in_one_line():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 5))

    assert keys(nn.Sequential(Mixer())) == []
    lc.register(Mixer, lc.Axes(out=1, in_=0), param="kernel")

    class Child(Mixer):
        pass

    assert keys(nn.Sequential(Mixer(), Child())) == ["0.kernel", "1.kernel"]
    result = lc.compress(nn.Sequential(Mixer()), [lc.Prune(0.4)])
    assert int((result.model[0].kernel == 0).sum()) == 6
    with pytest.raises(TypeError, match="layer class or its dotted name"):
        lc.register(Mixer(), (0, 1))


def test_shared_weights_are_one_target_with_aliases():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    found = find(net)
    assert [(t.key, t.aliases) for t in found] == [("0.weight", ("2.weight",)), ("1.weight", ())]
    assert lc.compress(net, [lc.Prune(0.5)]).after.zeros == 16


def test_names_without_wrappers():
    assert clean("_orig_mod.net._orig_mod.0") == "net.0" and clean("module.net") == "module.net"
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    net[0] = torch.compile(net[0], backend="eager")
    assert keys(net, include="0.0") == ["0.0.weight"]
    assert locate(net, "0.0", "weight")[1] is find(net)[0].weight


def test_patterns():
    net = nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in range(4)})
    assert keys(net, "layer[12]") == ["layer1.weight", "layer2.weight"]
    assert keys(net, "re:layer[03]") == ["layer0.weight", "layer3.weight"]
    assert keys(net, exclude=["layer0", "*3"]) == ["layer1.weight", "layer2.weight"]
    assert lookup({"layer*": 0.1, "layer2": 0.9, "*": 0.5}, "layer2") == 0.9
    assert lookup({"a*": 1}, "b") is None


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_an_unused_pattern_is_an_error_with_the_nearest_names(where):
    net = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer2": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"'layr1' fits no layer.*layer1"):
        find(net, **{where: ["layr1"]})
    with pytest.raises(ValueError, match="not a regular expression"):
        find(net, include="re:(")


def test_weights_that_cannot_be_targets_say_why():
    net = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    net["b"].weight.requires_grad_(False)
    found = survey(net)
    assert [t.key for t in found.targets] == ["b.weight"]
    assert all("parametrization" in why for k, why in found.skipped.items() if "original" in k)
    with pytest.raises(ValueError, match=r"lazy layer.*run one forward pass"):
        find(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"no weight b\.kernel"):
        locate(net, "b", "kernel")
