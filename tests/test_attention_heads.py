"""Attention with fewer heads: the layer against PyTorch's own, transformers that lose heads, neurons and channels."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_channels import Net, channels_of, gap, shapes, trained, twin
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress.channels.attention import DecoupledAttention, decouple, decoupled
from lightning_compress.compress import compress
from lightning_compress.cost import cost
from lightning_compress.pruning.channels import RemoveChannels

# -- the layer ----------------------------------------------------------------------------------------------------


def same_layer(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """PyTorch's layer and one of ours with the same parameters; biases are not zero, as they are at first."""
    layer = nn.MultiheadAttention(12, 3, **options)
    for name, p in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    ours = copy.deepcopy(layer)
    ours.__class__ = DecoupledAttention
    return layer.eval(), ours.eval()


def inputs(options: dict[str, Any], batched: bool) -> list[Tensor]:
    sizes = [(4, 12), (5, options.get("kdim", 12)), (5, options.get("vdim", 12))]
    if not batched:
        return [torch.randn(size) for size in sizes]
    first = options.get("batch_first", False)
    return [torch.randn((2, n, d) if first else (n, 2, d)) for n, d in sizes]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 7, "vdim": 5},
    {"kdim": 7, "batch_first": True, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True, "vdim": 9},
]


def floating(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


CAUSAL = torch.ones(4, 5).triu(1).bool()
PADDING = torch.tensor([[False] * 5, [False, False, True, True, False]])
PER_HEAD = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.7
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "bool": {"attn_mask": CAUSAL},
    "float": {"attn_mask": floating(CAUSAL) + 0.3},
    "per head": {"attn_mask": PER_HEAD},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": floating(PADDING)},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "both, float": {"attn_mask": floating(PER_HEAD) - 0.2, "key_padding_mask": floating(PADDING)},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_is_that_of_pytorch(options: dict[str, Any], masks: str) -> None:
    layer, ours = same_layer(**options)
    for batched, weights, average in itertools.product((True, False), (True, False), (True, False)):
        given = dict(MASKS[masks])
        if not batched:
            given = {
                k: (m[1] if k == "key_padding_mask" else m[:3] if m.dim() == 3 else m)
                for k, m in given.items()
            }
        qkv = inputs(options, batched)
        with torch.no_grad():
            expected = layer(*qkv, **given, need_weights=weights, average_attn_weights=average)
            got = ours(*qkv, **given, need_weights=weights, average_attn_weights=average)
        assert (expected[1] is None) == (got[1] is None) == (not weights)
        for a, b in zip(expected, got, strict=True):
            if a is not None:
                torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5, equal_nan=True)  # of rows without keys


def test_gradients_are_those_of_pytorch() -> None:
    layer, ours = same_layer(add_bias_kv=True)
    q, k, v = inputs({}, True)
    for one in (layer, ours):
        one.train()(q, k, v)[0].square().sum().backward()
    for (name, a), (_, b) in zip(layer.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_draws_as_often_as_its_rate_says(weights: bool) -> None:
    _, ours = same_layer(dropout=0.4, bias=False)
    nn.init.eye_(ours.out_proj.weight)
    nn.init.zeros_(ours.in_proj_weight)
    nn.init.ones_(ours.in_proj_weight[24:])  # every value is 12, attention is uniform
    x = torch.ones(400, 1, 12)
    with torch.no_grad():
        out = ours.train()(x, x, x, need_weights=weights)[0]
    assert abs(out.mean().item() - 12) < 0.5
    assert out.std() > 0.3
    assert ours.eval()(x, x, x, need_weights=weights)[0].std() < 1e-3


def test_a_causal_hint_needs_its_mask() -> None:
    layer, ours = same_layer()
    for one in (layer, ours):
        with pytest.raises(RuntimeError, match="attn_mask"):
            one(*inputs({}, True), is_causal=True, need_weights=False)


def test_classes_are_changed_only_where_sizes_need_it() -> None:
    net = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4)])
    decouple(net)
    assert {type(m) for m in net} == {nn.MultiheadAttention}
    with decoupled(net):
        assert {type(m) for m in net} == {DecoupledAttention}
    assert {type(m) for m in net} == {nn.MultiheadAttention}
    with pytest.raises(ZeroDivisionError), decoupled(net):
        raise ZeroDivisionError
    assert {type(m) for m in net} == {nn.MultiheadAttention}


# -- networks ------------------------------------------------------------------------------------------------------


def alone(**options: Any) -> nn.Module:
    core = nn.MultiheadAttention(16, 4, batch_first=True, **options)
    return Net(
        lambda net, x: net.head(net.core(net.a(x), net.k(x), net.v(x))[0]),
        a=nn.Linear(3, 16), k=nn.Linear(3, core.kdim), v=nn.Linear(3, core.vdim), core=core, head=nn.Linear(16, 2),
    )  # fmt: skip


def encoder(**options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, **options)
        core = nn.TransformerEncoder(layer, 2)
    return Net(
        lambda net, x, mask=None: net.head(net.core(net.a(x), src_key_padding_mask=mask)),
        a=nn.Linear(3, 16), core=core, head=nn.Linear(16, 2),
    )  # fmt: skip


def decoder() -> nn.Module:
    core = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, batch_first=True), 2)
    return Net(
        lambda net, x, y: net.head(net.core(net.a(x), net.b(y))),
        a=nn.Linear(3, 16), b=nn.Linear(3, 16), core=core, head=nn.Linear(16, 2),
    )  # fmt: skip


def both() -> nn.Module:
    core = nn.Transformer(16, 4, 1, 1, 24, batch_first=True, norm_first=True)
    return Net(
        lambda net, x, y: net.head(net.core(net.a(x), net.b(y))),
        a=nn.Linear(3, 16), b=nn.Linear(3, 16), core=core, head=nn.Linear(16, 2),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, list[str]]] = {
    "alone": (alone, 1, ["core"]),
    "alone, other sizes": (lambda: alone(kdim=6, vdim=10, add_bias_kv=True, add_zero_attn=True), 1, ["core"]),
    "encoder": (encoder, 1, ["core.layers.0.self_attn", "core.layers.1.self_attn"]),
    "encoder, norm first": (
        lambda: encoder(norm_first=True),
        1,
        ["core.layers.0.self_attn", "core.layers.1.self_attn"],
    ),
    "decoder": (
        decoder,
        2,
        [f"core.layers.{i}.{kind}" for i in (0, 1) for kind in ("self_attn", "multihead_attn")],
    ),
    "both": (
        both,
        2,
        [
            "core.encoder.layers.0.self_attn",
            "core.decoder.layers.0.self_attn",
            "core.decoder.layers.0.multihead_attn",
        ],
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request: Any) -> tuple[Callable[[], nn.Module], nn.Module, Any, list[str]]:
    build, count, layers = NETWORKS[request.param]
    x = tuple(torch.randn(2, 5, 3) for _ in range(count))
    return build, trained(build()), x if count > 1 else x[0], layers


HEADS = ("core", "*.self_attn", "*.multihead_attn")


def only(layers: list[str]) -> list[str]:
    """The patterns that fit one of the layers."""
    return (
        ["core"] if layers == ["core"] else [p for p in HEADS if any(name.endswith(p[1:]) for name in layers)]
    )


def test_heads_alone_go_as_if_their_slices_were_zero(network: Any) -> None:
    _, net, x, layers = network
    result = compress(net, [RemoveChannels(0.5, include=only(layers))], example_input=x)
    for name in layers:
        layer, old = result.model.get_submodule(name), net.get_submodule(name)
        assert (layer.num_heads, layer.head_dim, layer.embed_dim, layer.kdim) == (2, 4, 16, old.kdim)
        assert layer.out_proj.weight.shape == (16, 8)
        assert layer.out_proj.in_features == 8
        assert isinstance(layer, DecoupledAttention)
        kept = result.plan[0].layers[f"{name}.out_proj.weight"]["keep"]["1"].view(2, 4)
        assert torch.equal(kept, kept[:, :1] // 4 * 4 + torch.arange(4))  # whole heads
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5
    by_hand = copy.deepcopy(net)
    for name in layers:
        layer = by_hand.get_submodule(name)
        heads = {int(i) // 4 for i in result.plan[0].layers[f"{name}.out_proj.weight"]["keep"]["1"]}
        for head in set(range(4)) - heads:
            layer.out_proj.weight.data[:, 4 * head : 4 * head + 4] = 0
    assert gap(by_hand, result.model, x) < 1e-5
    assert all(
        isinstance(m, DecoupledAttention)
        for m in result.model.modules()
        if isinstance(m, nn.MultiheadAttention)
    )


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}], ids=str)
def test_inputs_of_an_attention_layer_go_and_its_outputs_stay(options: dict[str, int]) -> None:
    net, x = trained(alone(**options)), torch.randn(2, 5, 3)
    result = compress(net, [RemoveChannels(0.5, include=["a", "k", "v"])], example_input=x)
    core = result.model.core
    assert (core.num_heads, core.embed_dim, core.kdim, core.vdim) == (
        4,
        16,
        net.core.kdim // 2,
        net.core.vdim // 2,
    )
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5


def test_neurons_alone_go_as_if_they_were_zero(network: Any) -> None:
    _, net, x, layers = network
    if layers == ["core"]:
        return
    result = compress(net, [RemoveChannels(0.5, include="*.linear1")], example_input=x)
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5
    assert {m.linear1.out_features for m in result.model.modules() if hasattr(m, "linear1")} == {12}
    assert not any(isinstance(m, DecoupledAttention) for m in result.model.modules())


def test_the_stream_goes_too_and_the_model_trains(network: Any) -> None:
    _, net, x, layers = network
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    small = result.model
    for name in layers:
        layer = small.get_submodule(name)
        assert (layer.num_heads, layer.head_dim, layer.embed_dim) == (2, 4, 8)
        assert layer.out_proj.weight.shape == (8, 8)
    if isinstance(net.core, nn.Transformer):
        assert small.core.d_model == 8
    assert {m.normalized_shape for m in small.modules() if isinstance(m, nn.LayerNorm)} <= {(8,)}
    if layers == ["core"]:  # nothing normalizes over channels
        assert gap(twin(net, result.plan[0]), small, x) < 1e-5
    found = channels_of(net, x)
    assert found.macs([]) == pytest.approx(cost(net, x).macs)
    assert channels_of(small, x).macs([]) == pytest.approx(cost(small, x).macs)
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    args = x if isinstance(x, tuple) else (x,)
    with torch.no_grad():
        quick = small.eval()(*args)
    slow = small.train()(*args)
    torch.testing.assert_close(quick, slow, atol=1e-5, rtol=1e-5)
    slow.square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_keys_stay_and_files_give_the_model_back(network: Any, tmp_path: Path) -> None:
    build, net, x, layers = network
    small = compress(net, [RemoveChannels(0.5, include=only(layers))], example_input=x).model
    assert list(small.state_dict()) == list(net.state_dict())
    lc.save(small, tmp_path / "small.lc")
    assert gap(small, lc.load(tmp_path / "small.lc", build()).eval(), x) == 0
    other = copy.deepcopy(small)
    assert gap(small, other, x) == 0
    core = pickle.loads(pickle.dumps(small.core))
    assert any(isinstance(m, DecoupledAttention) for m in core.modules())
    assert all(torch.equal(a, b) for a, b in zip(core.parameters(), small.core.parameters(), strict=True))


def test_padded_inputs_of_an_encoder_that_packs_them() -> None:
    net, x = trained(encoder()), torch.randn(2, 5, 3)
    mask = PADDING.sort(1).values  # PyTorch packs only what is padded at the end
    assert net.core.use_nested_tensor
    result = compress(net, [RemoveChannels(0.5, include="*.self_attn")], example_input=(x, mask))
    expected, got = (m(x, mask) for m in (twin(net, result.plan[0]).train(False), result.model))
    torch.testing.assert_close(got[~mask], expected[~mask], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x, mask)[~mask], expected[~mask], atol=1e-5, rtol=1e-5)


def test_one_head_stays() -> None:
    net = trained(Net(
        lambda net, x: net.head(net.core(net.a(x), net.a(x), net.a(x))[0]),
        a=nn.Linear(3, 16), core=nn.MultiheadAttention(16, 1, batch_first=True), head=nn.Linear(16, 2),
    ))  # fmt: skip
    x = torch.randn(2, 5, 3)
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    assert shapes(result.model)["core.in_proj_weight"] == (48, 8)
    assert shapes(result.model)["core.out_proj.weight"] == (8, 16)
    assert "one head" in result.plan[0].skipped["outputs of core.in_proj_weight"]
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5


@pytest.mark.parametrize("heads", [2, 3, 4, 6])
def test_as_many_heads_as_features_or_as_many_as_parts(heads: int) -> None:
    """Own attention code that views queries, keys and values at once; axes of the same length are told apart."""

    def forward(net: Any, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = net.qkv(x).view(n, length, 3, net.num_heads, net.head_dim).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(-2, -1) * net.head_dim**-0.5
        out = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(n, length, net.num_heads * net.head_dim)
        return net.out(out)

    parts = {
        "qkv": nn.Linear(5, 9 * heads),
        "out": nn.Linear(3 * heads, 2),
        "num_heads": heads,
        "head_dim": 3,
    }
    net, x = Net(forward, **parts).eval(), torch.randn(2, 4, 5)
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    small = result.model
    assert (small.num_heads, small.head_dim) == (heads // 2, 3)
    assert small.qkv.weight.shape == (9 * (heads // 2), 5)
    assert gap(twin(net, result.plan[0]), small, x) < 1e-5


def test_heads_of_a_vision_transformer() -> None:
    vision = pytest.importorskip("torchvision").models
    net = vision.VisionTransformer(8, 4, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=24, num_classes=3)
    nn.init.normal_(net.heads.head.weight)  # it starts at zero
    net, x = trained(net), torch.randn(2, 3, 8, 8)
    result = compress(net, [RemoveChannels(0.5, include=["*.self_attention", "*.mlp.0"])], example_input=x)
    assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5
    sizes = shapes(result.model)
    assert sizes["encoder.layers.encoder_layer_1.self_attention.in_proj_weight"] == (24, 16)
    assert sizes["encoder.layers.encoder_layer_1.mlp.3.weight"] == (16, 12)
    whole = compress(net, [RemoveChannels(0.5)], example_input=x).model
    assert shapes(whole)["class_token"] == (1, 1, 8)
    assert shapes(whole)["encoder.pos_embedding"] == (1, 5, 8)
    assert whole.hidden_dim == 8
    whole.train()(x).sum().backward()


def hugging_face(name: str) -> tuple[nn.Module, dict[str, Tensor], list[str], list[str]]:
    """A small network of the library, an input, patterns of layers that make heads and of those that make neurons."""
    library = pytest.importorskip("transformers")
    words = torch.randint(3, 40, (2, 6))
    small = {"vocab_size": 40, "attn_implementation": name.rpartition(" ")[2], "use_cache": False}
    kind = name.partition(" ")[0]
    if kind == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        core = library.BertModel(library.BertConfig(**small, **sizes), add_pooling_layer=False)
        return core, {"input_ids": words}, ["*.query"], ["*.intermediate.dense"]
    if kind == "gpt2":
        lc.register("transformers.pytorch_utils.Conv1D", lc.Axes(out=1, in_=0))
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        core = library.GPT2Model(
            library.GPT2Config(**small, **ends, n_embd=32, n_layer=2, n_head=4, n_positions=9)
        )
        return core, {"input_ids": words}, ["*.c_attn"], ["*.c_fc"]
    if kind.startswith("llama"):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
        config = library.LlamaConfig(**small, **sizes, num_key_value_heads=int(kind[-1]))
        return library.LlamaModel(config), {"input_ids": words}, ["*.q_proj"], ["*.gate_proj"]
    heads = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 9}
    core = library.WhisperModel(library.WhisperConfig(**small, **heads, **ends, **sizes))
    x = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": words}
    return core, x, ["*.self_attn.q_proj", "*.encoder_attn.q_proj"], ["*.fc1"]


FOREIGN = [
    f"{kind} {code}"
    for kind in ("bert", "gpt2", "llama-4", "llama-2", "whisper")
    for code in ("eager", "sdpa")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOREIGN)
def test_networks_of_another_library(name: str) -> None:
    core, x, heads, neurons = hugging_face(name)
    net = trained(
        Net(lambda net, **x: net.head(net.core(**x).last_hidden_state), core=core, head=nn.Linear(32, 3))
    )
    for patterns in (heads, neurons):
        result = compress(net, [RemoveChannels(0.5, include=patterns)], example_input=x)
        assert gap(twin(net, result.plan[0]), result.model, x) < 1e-5
        cut = [
            key for key, entry in result.plan[0].layers.items() if "keep" in entry and "0" in entry["keep"]
        ]
        assert cut
        assert result.after.macs < result.before.macs
    result = compress(net, [RemoveChannels(0.5)], example_input=x)
    assert result.after.macs < 0.4 * result.before.macs
    assert result.plan[0].skipped.keys() <= {"outputs of head.weight"}
    found = channels_of(result.model, x)
    assert found.macs([]) == pytest.approx(result.after.macs)
    result.model.train()(**x).sum().backward()
