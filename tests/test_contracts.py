"""Every transform runs through the same contracts; a new method adds one row to ``CASES``."""

import copy
import dataclasses
import functools
import json
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.batchnorm import ReestimateBatchNorm
from lightning_compress.codes import same_bits
from lightning_compress.plans import from_json, to_json
from lightning_compress.targets import find
from lightning_compress.transform import Transform


@dataclass(frozen=True)
class Case:
    """One transform: weaker to stronger settings, and its identity if it has a strength."""

    levels: tuple[Transform, ...]
    identity: Transform | None = None
    options: dict[str, Any] | None = None
    kinds: tuple[str, ...] = ("net", "operators")

    def __repr__(self) -> str:
        return type(self.levels[0]).__name__ + "".join(f"-{k}-{v}" for k, v in (self.options or {}).items())


def prune(**options: Any) -> Case:
    levels = tuple(lc.Prune(s, **options) for s in (0.2, 0.5, 0.9))
    return Case(levels, lc.Prune(0.0, **options), options)


def quantize(**options: Any) -> Case:
    return Case(tuple(lc.Quantize(bits, **options) for bits in (8, 4, 2)), None, options)


def share(**options: Any) -> Case:
    return Case(tuple(lc.ShareWeights(clusters=c, **options) for c in (16, 8, 4)), None, options)


_OPERATORS = ("operators",)


def factorize(**options: Any) -> Case:
    return Case(tuple(lc.Factorize(share, **options) for share in (0.4, 0.3, 0.2)), None, options)


CASES = [
    quantize(),
    quantize(symmetric=False, granularity="per_tensor"),
    quantize(activation_bits=8),
    quantize(activation_bits=8, mode="dynamic", format="log2"),
    quantize(rounding="compensated", bias_correction=True, granularity="per_tensor"),
    Case((lc.Quantize(format="e4m3"),), None, {"format": "e4m3"}),
    prune(),
    prune(criterion="random", scope="layer"),
    prune(scope="row"),
    Case((lc.FuseBatchNorm(),)),
    factorize(),
    factorize(activation_aware=True),
    factorize(real_channel=True),
    Case(
        tuple(lc.TruncateModes(keep_ratio=r) for r in (0.75, 0.5)),
        lc.TruncateModes(keep_ratio=1.0),
        None,
        _OPERATORS,
    ),
    Case((lc.PartialFourier(),), lc.PartialFourier(), None, _OPERATORS),
    Case(
        (lc.DropLayers("spectral", count=1), lc.DropLayers("spectral", count=2)),
        lc.DropLayers(count=0),
        None,
        _OPERATORS,
    ),
    Case(tuple(lc.Factorize(budget=("params", share)) for share in (0.95, 0.9)), None, {"budget": "params"}),
    Case((lc.Prune(pattern="2:4"),), lc.Prune(0.0, pattern="2:4"), {"pattern": "2:4"}, ("net",)),
    dataclasses.replace(prune(pattern="channel"), kinds=("net",)),
    dataclasses.replace(prune(pattern="channel", criterion="fisher", scope="layer"), kinds=("net",)),
    dataclasses.replace(prune(pattern="block:2x1"), kinds=("net",)),
    dataclasses.replace(prune(criterion="taylor"), kinds=("net",)),
    dataclasses.replace(prune(criterion="wanda"), kinds=("net",)),
    Case(tuple(lc.RemoveChannels(r) for r in (0.25, 0.5, 0.75)), lc.RemoveChannels(0.0), None, ("net",)),
    Case((lc.RemoveChannels(0.5, reconstruct=True, samples=32),), None, {"reconstruct": True}, ("net",)),
    Case(tuple(lc.RateDistortionQuantize(step=s) for s in (0.2, 0.5, 1.0))),
    share(),
    dataclasses.replace(share(scope="global"), kinds=("net",)),
    dataclasses.replace(share(block=2), kinds=("net",)),
    dataclasses.replace(share(codebook_bits=8, importance="fisher"), kinds=("net",)),
    Case(tuple(lc.ShareWeights("hash", ratio=r) for r in (0.5, 0.25)), None, {"strategy": "hash"}, ("net",)),
    Case((lc.ShareWeights("adaptive", ratio=0.3),), None, {"strategy": "adaptive"}, ("net",)),
    Case(tuple(lc.Narrow(r, minimum=2, tolerance=0.3) for r in (0.8, 0.6)), lc.Narrow(1.0), None, ("net",)),
    Case(
        tuple(lc.EvolveWeights(error_threshold=t, rows=16, generations=20) for t in (0.0, 4.0)),
        None,
        {},
        ("integers",),
    ),
    Case((ReestimateBatchNorm(samples=32),), ReestimateBatchNorm(momentum=0.0)),
]


class Net(nn.Module):
    """Grouped and transposed convolutions, BatchNorm, attention, an embedding, and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.group = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn3 = nn.BatchNorm2d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.embedding = nn.Embedding(4, 6)
        for norm in (self.bn, self.bn2, self.bn3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn3(self.up(self.bn2(self.group(torch.relu(self.bn(self.conv(x)))))))
        x = x.flatten(2).transpose(1, 2) + self.embedding.weight[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.b(torch.relu(self.a(x)))


class Mixing(nn.Module):
    """A user's own layer with a complex weight, known to the library by one line."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, channels, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi...,io->bo...", torch.fft.fft2(x), self.kernel).real


lc.register(Mixing, lc.Axes(out=1, in_=0), param="kernel")


def operators() -> nn.Module:
    """Every kind of neural operator in a row, with BatchNorm and a user's own complex layer between them."""
    models = pytest.importorskip("neuralop.models")
    options = {"out_channels": 3, "projection_channel_ratio": 1, "n_layers": 1, "hidden_channels": 6}
    net = nn.Sequential(
        models.FNO(n_modes=(4, 4), in_channels=3, **options),
        models.TFNO(n_modes=(4, 4), in_channels=3, rank=0.8, **options),
        Mixing(3),
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        models.UNO(
            in_channels=4,
            out_channels=2,
            hidden_channels=4,
            lifting_channels=4,
            projection_channels=4,
            n_layers=2,
            uno_n_modes=[[4, 4], [2, 2]],
            uno_scalings=[[0.5, 0.5], [2.0, 2.0]],
            uno_out_channels=[4, 4],
            channel_mlp_skip="linear",
        ),
        models.CODANO(
            output_variable_codimension=1,
            hidden_variable_codimension=2,
            lifting_channels=4,
            projection_channels=4,
            n_layers=1,
            n_modes=[[4, 4]],
            n_heads=[2],
            per_layer_scaling_factors=[[1, 1]],
            attention_scaling_factors=[1],
            use_horizontal_skip_connection=False,
            attention_token_dim=1,
            per_channel_attention=False,
        ),
    )
    net[4].running_mean.normal_()
    return net


def integers() -> nn.Module:
    """Integers of 8 bits, which circuits compute."""
    return lc.compress(Net().eval(), [lc.Quantize(8)]).model


MODELS = {"net": Net, "operators": operators, "integers": integers}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
DATA = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(6))]


@functools.cache
def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def model(kind: str) -> nn.Module:
    return copy.deepcopy(built(kind))


def tensors(m: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in m.state_dict().items() if isinstance(v, torch.Tensor)}


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = tensors(a), tensors(b)
    return list(x) == list(y) and all(same_bits(x[k], y[k]) for k in x)


@pytest.fixture(params=[(c, k) for c in CASES for k in c.kinds], ids=lambda pair: f"{pair[0]!r}-{pair[1]}")
def pair(request):
    return request.param


@pytest.fixture
def case(pair):
    return pair[0]


@pytest.fixture
def kind(pair):
    return pair[1]


def run(transform, m, **options):
    """With given inputs: drawing them takes seconds, and has tests of its own."""
    return lc.compress(m, [transform], example_input=X, data=DATA, **options)


def test_plan_writes_nothing(case, kind):
    m = model(kind)
    before, held, hooks = copy.deepcopy(m), list(codes.of(m)), [len(x._forward_hooks) for x in m.modules()]
    rng = torch.random.get_rng_state()
    case.levels[-1].plan(m, lc.stats.Calibration(X, DATA))
    assert same(m, before) and list(codes.of(m)) == held and torch.equal(rng, torch.random.get_rng_state())
    assert hooks == [len(x._forward_hooks) for x in m.modules()] and not m.training


def test_same_seed_same_plan_same_bytes(case, kind):
    a, b = (run(case.levels[-1], model(kind)) for _ in range(2))
    assert json.dumps(to_json(a.plan[0])) == json.dumps(to_json(b.plan[0])) and same(a.model, b.model)


def test_strength_zero_is_the_identity(case, kind):
    if case.identity is None:
        assert case.levels[0].structural or case.levels[0].stage == "grid"  # no strength: all or nothing
        return
    assert same(run(case.identity, model(kind)).model, model(kind))


def test_keys_order_and_parameters_are_kept_or_the_rewrite_is_declared(case, kind):
    m = model(kind)
    keys, ids = list(m.state_dict()), [id(p) for p in m.parameters()]
    run(case.levels[-1], m, inplace=True)
    kept = list(m.state_dict()) == keys and [id(p) for p in m.parameters()] == ids
    assert kept or (case.levels[0].structural and set(map(id, m.parameters())) & set(ids))


def test_shape_dtype_and_complexness_are_kept(case, kind):
    m = model(kind)
    after = tensors(run(case.levels[-1], m).model)
    for key, value in tensors(m).items():
        if key in after:
            assert (after[key].dtype, after[key].device) == (value.dtype, value.device)
            cuts = isinstance(case.levels[-1], lc.TruncateModes | lc.RemoveChannels | lc.Narrow)
            assert after[key].shape == value.shape or cuts


def test_forward_runs_and_strength_counts(case, kind):
    m = model(kind)
    results = [run(t, m) for t in case.levels]
    assert all(torch.isfinite(r.model(X)).all() for r in results)
    grows = isinstance(
        case.levels[0], lc.EvolveWeights
    )  # indices take what integers took, and there is a circuit
    bits = [r.before.bits for r in results[: 0 if grows else 1]] + [r.after.bits for r in results]
    assert bits == sorted(bits, reverse=True)


def test_copies_and_pickles_are_equal(case, kind):
    m = run(case.levels[-1], model(kind)).model
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert same(twin, m) and torch.equal(twin(X), m(X))
        assert [c for *_, c in codes.of(twin)] == [c for *_, c in codes.of(m)]


def test_archives_come_back(case, kind, tmp_path):
    m = run(case.levels[-1], model(kind)).model
    info = lc.save(m, tmp_path / "net.lcz")
    assert info.file_bytes == (tmp_path / "net.lcz").stat().st_size
    back = lc.load(tmp_path / "net.lcz", into=model(kind))
    assert same(back, m) and torch.equal(back(X), m(X))
    assert [c for *_, c in codes.of(back)] == [c for *_, c in codes.of(m)]


def test_finalize_equals_before(case, kind):
    m = run(case.levels[-1], model(kind)).model
    final = lc.finalize(m)
    assert final is not m and same(final, m) and torch.equal(final(X), m(X))


def test_excluded_layers_are_untouched(case, kind):
    m = model(kind)
    if not hasattr(case.levels[-1], "exclude"):  # all layers by one factor
        return
    part = "3" if kind == "operators" else "up"
    t = type(case.levels[-1])(**{**vars(case.levels[-1]), "exclude": part})
    try:
        after = run(t, m).model
    except lc.NothingChangedError as error:
        assert part in str(error)
        return
    if isinstance(t, lc.RemoveChannels):  # its outputs stay; the inputs are those of others
        assert after.get_submodule(part).out_channels == m.get_submodule(part).out_channels
        return
    for key, value in tensors(m.get_submodule(part)).items():
        assert same_bits(tensors(after)[f"{part}.{key}"], value)


def test_a_shared_weight_is_compressed_once(case, kind):
    m = run(case.levels[-1], model(kind)).model
    if kind == "net":
        assert m.a.weight is m.b.weight
        assert sum(t.weight is m.a.weight for t in find(m)) == 1
        assert (
            sum(key.endswith((".a.weight", ".b.weight", "a.weight", "b.weight")) for key, *_ in codes.of(m))
            <= 1
        )


def test_non_finite_weights_give_a_clear_error(case, kind):
    m = model(kind)
    target = find(m)[0]
    with torch.no_grad():
        target.weight.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=target.key.replace(".", r"\.") + ".*1 of .*not finite"):
        run(case.levels[-1], m)


def test_plans_replay_on_a_fresh_model(case, kind):
    m = run(case.levels[-1], model(kind))
    fresh = model(kind)
    type(case.levels[-1])().apply(fresh, from_json(json.loads(json.dumps(to_json(m.plan[0])))))
    assert same(fresh, m.model)


def test_configuration_is_json(case):
    stored = json.loads(json.dumps(case.levels[-1].config()))
    assert stored and stored.keys() == vars(case.levels[-1]).keys()
