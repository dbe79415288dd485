"""`.lcz` files: every bit comes back, the size is near the entropy, and nothing that a file says does harm."""

import copy
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_compress as lc
from lightning_compress import codes, contents
from lightning_compress.archive import ArchiveError, baseline_sizes, inspect, load, save
from lightning_compress.codes import Code, same_bits
from lightning_compress.compress import compress
from lightning_compress.functional.arrays import CARRIERS
from lightning_compress.functional.entropy import CODERS
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.models import resnet20
from lightning_compress.transform import applied, restore


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def assert_same(a: nn.Module | dict[str, torch.Tensor], b: nn.Module | dict[str, torch.Tensor]) -> None:
    first, second = (state(x) if isinstance(x, nn.Module) else x for x in (a, b))
    assert first.keys() == second.keys()
    assert [k for k in first if not same_bits(first[k], second[k])] == []


class Net(nn.Module):
    """Convolutions, batch norms, a small and a large linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3),
        )
        self.head = nn.Linear(2 * width, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


def masked(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    """By magnitude, each layer with its own mask."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            size = module.weight.detach().abs()
            codes.set_mask(module, "weight", size > size.flatten().quantile(sparsity))
    return model


def trained(model: nn.Module) -> nn.Module:
    """Other values than a fresh model in every buffer too."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor).abs() * 0.3)
        else:
            tensor.fill_(391)
    return model


# What comes back.


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype and shape, any bits, any share of zeros."""
    dtype = draw(st.sampled_from(sorted(CARRIERS)))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 40]), max_size=3))
    kind, count = np.dtype(CARRIERS[dtype]), int(np.prod(shape))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    words = rng.integers(0, 2 if dtype == "bool" else 256, count * kind.itemsize, np.uint8).reshape(
        count, kind.itemsize
    )
    words[rng.random(count) < draw(st.sampled_from([0, 0.5, 0.97, 1]))] = 0
    words[:, draw(st.integers(0, kind.itemsize)) :] = 0  # small integers, short mantissas
    return torch.from_numpy(words.reshape(-1)).view(getattr(torch, dtype)).reshape(shape)


class Holder(nn.Module):
    def __init__(self, values: list[torch.Tensor]) -> None:
        super().__init__()
        for i, value in enumerate(values):
            if i % 2 and (value.is_floating_point() or value.is_complex()):
                self.register_parameter(f"t{i}", nn.Parameter(value))
            else:
                self.register_buffer(f"t{i}", value)


@settings(max_examples=60)
@given(st.lists(tensors(), max_size=5), st.sampled_from(["auto", *CODERS]))
def test_every_bit_of_every_dtype_and_shape_comes_back(values: list[torch.Tensor], coder: str) -> None:
    info = save(Holder(values), "a.lcz", coder=coder)
    fresh = load("a.lcz", Holder([torch.zeros_like(v) for v in values]))
    assert_same(fresh, Holder(values))
    assert info == inspect("a.lcz")
    assert info.file_bytes == os.path.getsize("a.lcz")
    assert {t.name: (t.shape, f"torch.{t.dtype}") for t in info.tensors} == {
        f"t{i}": (tuple(v.shape), str(v.dtype)) for i, v in enumerate(values)
    }


def test_signed_zeros_and_nan_payloads_come_back() -> None:
    words = torch.tensor([-(2**31), 0x7FC12345, -0x3EDCBB, 0x7F800001, 0, 1], dtype=torch.int32)
    net = Holder([torch.zeros(0), words.view(torch.float32).repeat(500)])
    codes.attach(net, "t1", codes.Mask(torch.ones(3000, dtype=torch.bool)))
    info = save(net, "a.lcz")
    fresh = load("a.lcz", Holder([torch.zeros(0), torch.zeros(3000)]))
    assert info.tensors[0].kind == "mask"
    assert torch.equal(fresh.t1.view(torch.int32), words.repeat(500))


def test_layouts_and_devices_of_memory_do_not_matter() -> None:
    net = trained(Net())
    net.body[3].weight.data = net.body[3].weight.data.to(memory_format=torch.channels_last)
    net.head.weight.data = net.head.weight.data.t().contiguous().t()
    save(net, "a.lcz")
    assert_same(load("a.lcz", Net()), net)
    save(copy.deepcopy(net), "b.lcz")
    assert Path("a.lcz").read_bytes() == Path("b.lcz").read_bytes()


def test_masked_model_comes_back_with_its_masks_into_the_same_parameters() -> None:
    net = masked(trained(Net(24)))
    with torch.no_grad():  # zeros that the mask does not know are kept apart from those that it does
        net.body[3].weight[:, ::2] = 0
    info = save(net, "a.lcz")
    fresh = Net(24)
    codes.set_mask(fresh.head, "bias", torch.ones(100, dtype=torch.bool))
    before = [(p, p.data_ptr()) for p in fresh.parameters()]
    assert load("a.lcz", into=fresh) is fresh
    assert_same(fresh, net)
    assert [(n, code) for n, _, _, code in codes.of(fresh)] == [(n, code) for n, _, _, code in codes.of(net)]
    assert all(p is q and q.data_ptr() == at for (p, at), q in zip(before, fresh.parameters(), strict=True))
    assert {t.name: t.kind for t in info.tensors if t.kind != "raw"} == dict.fromkeys(
        ["body.0.weight", "body.3.weight", "head.weight"], "mask"
    )
    assert info.stale == {} and info.skipped == {}
    assert info.compression_ratio == info.dense_bytes / info.file_bytes > 1
    assert info.size_fraction == info.file_bytes / info.dense_bytes
    real = sum(v.numel() for v in state(net).values() if v.is_floating_point())
    assert info.dense_bytes == 4 * real


def test_tied_weights_are_stored_once() -> None:
    def build(tie: bool = True) -> nn.Sequential:
        net = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
        if tie:
            net[2].weight = net[0].weight
        return net

    net = build()
    codes.set_mask(net[2], "weight", torch.rand(40, 40) > 0.9)
    info = save(net, "tied.lcz")
    assert info.aliases == {"0.weight": "2.weight"}
    assert [t.name for t in info.tensors] == ["0.bias", "2.weight", "2.bias"]
    assert info.dense_bytes == 4 * (1600 + 80)
    fresh = load("tied.lcz", build())
    assert fresh[0].weight is fresh[2].weight
    assert [name for name, *_ in codes.of(fresh)] == ["2.weight"]
    assert_same(fresh, net)
    assert_same(load("tied.lcz", build(tie=False)), net)
    untied = build(tie=False)
    save(untied, "untied.lcz")
    with pytest.raises(ArchiveError, match=r"'0.weight' and '2.weight' differ, but are one tensor"):
        load("untied.lcz", fresh)
    assert_same(fresh, net)
    untied[2].weight.data = untied[0].weight.data.clone()
    save(untied, "untied.lcz")
    assert_same(load("untied.lcz", fresh), untied)


def test_neural_operator_with_metadata_and_complex_weights() -> None:
    models = pytest.importorskip("neuralop.models")

    def build() -> nn.Module:
        return models.FNO(n_modes=(8, 8), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2)

    net = compress(build(), [lc.Prune(0.8)]).model
    info = save(net, "fno.lcz")
    fresh = load("fno.lcz", build())
    assert info.skipped == {"_metadata": "dict, not a tensor"}
    assert {t.dtype for t in info.tensors if t.kind == "mask"} == {"complex64", "float32"}
    assert_same(fresh, net)
    assert [(n, code) for n, _, _, code in codes.of(fresh)] == [(n, code) for n, _, _, code in codes.of(net)]
    x = torch.randn(1, 1, 16, 16)
    assert torch.equal(net(x), fresh(x))


def test_wrapped_models_have_clean_names() -> None:
    net = masked(trained(Net()))
    save(torch.compile(net), "compiled.lcz")
    save(net, "plain.lcz")
    assert Path("compiled.lcz").read_bytes() == Path("plain.lcz").read_bytes()
    fresh = Net()
    load("plain.lcz", into=torch.compile(fresh))
    assert_same(fresh, net)
    assert codes.read(fresh.head, "weight") == codes.read(net.head, "weight")


def with_few_options(model: nn.Module) -> nn.Module:
    """A copy whose steps carry no option that has its default."""
    model = copy.deepcopy(model)
    steps = [
        (at, dataclasses.replace(s, config={"sparsity": 0.6} if s.name == "Prune" else {}))
        for at, s in applied(model)
    ]
    restore(model, steps)
    return model


def test_applied_steps_and_structure_come_back() -> None:
    start = trained(Net()).eval()
    result = compress(start, [FuseBatchNorm(), lc.Prune(0.6)])
    info = save(result.model, "a.lcz", metadata={"seed": 3, "note": ["ü", None, 0.5]})
    fresh = load("a.lcz", into=Net().eval())
    assert_same(fresh, result.model)
    sizes = {name: tensor.nbytes for name, tensor in result.model.state_dict().items()}
    assert [(part, s.name, s.config, s.coverage) for part, s in applied(fresh)] == [
        (part, s.name, s.config, dataclasses.replace(s.coverage, changed=kept, skipped={}))
        for part, s in applied(with_few_options(result.model))
        for kept in [{n: size for n, size in s.coverage.changed.items() if sizes.get(n) == size}]
    ]
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(fresh(x), result.model(x))
    assert [step["name"] for _, step in info.applied] == ["FuseBatchNorm", "Prune"]
    assert info.metadata == {"seed": 3, "note": ["ü", None, 0.5]}
    save(fresh, "b.lcz")
    load("b.lcz", into=fresh)  # again: the structure is there, steps are not doubled
    assert len(list(applied(fresh))) == 2
    assert_same(fresh, result.model)


@dataclass(frozen=True, eq=False)
class Halves(Code):
    """A grid of step 1/2 with tensors and options, as later methods will have."""

    scale: torch.Tensor
    bits_: int = 4
    kind: ClassVar[str] = "test-halves"

    def arrays(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"index": (weight / self.scale).round().to(torch.int16), "scale": self.scale}

    def rebuild(self, arrays: Any, dtype: torch.dtype) -> torch.Tensor:
        return (arrays["index"] * arrays["scale"]).to(dtype)

    def bits(self, weight: torch.Tensor) -> int:
        return self.bits_ * weight.numel()


@pytest.fixture(autouse=True)
def _only_here() -> Any:
    Code.registry[Halves.kind] = Halves
    yield
    del Code.registry[Halves.kind]


def test_any_kind_of_code_is_stored_through_its_arrays() -> None:
    net = nn.Linear(100, 100)
    net.weight.data = torch.randint(-7, 8, (100, 100)) * 0.5
    codes.attach(net, "weight", Halves(torch.tensor([0.5]), bits_=3))
    info = save(net, "a.lcz")
    fresh = load("a.lcz", nn.Linear(100, 100))
    assert codes.read(fresh, "weight") == Halves(torch.tensor([0.5]), bits_=3)
    assert_same(fresh, net)
    assert info.tensors[0].kind == Halves.kind
    assert info.tensors[0].stored_bytes < 1.02 * 10_000 * np.log2(15) / 8 + 30
    del Code.registry[Halves.kind]
    with pytest.raises(ArchiveError, match="'weight' has the unknown code 'test-halves'; known: mask"):
        load("a.lcz", nn.Linear(100, 100))
    Code.registry[Halves.kind] = Halves


@pytest.mark.parametrize("granularity", [lc.PerTensor(), lc.PerChannel(), lc.PerGroup(9)], ids=str)
@pytest.mark.parametrize("grid", [8, 3, "log2", "e4m3"], ids=str)
def test_every_grid_is_stored_through_its_integers(grid: Any, granularity: Any) -> None:
    options = {"bits": grid} if isinstance(grid, int) else {"format": grid}
    model = compress(trained(Net()).eval(), [lc.Quantize(granularity=granularity, **options)]).model
    info = save(model, "a.lcz")
    assert info.stale == {} and {"raw"} < {t.kind for t in info.tensors}
    fresh = load("a.lcz", into=Net().eval())
    assert_same(fresh, model)
    again = save(fresh, "b.lcz")
    assert (again.file_bytes, again.stale) == (info.file_bytes, {})


@pytest.mark.parametrize("spoil", ["value", "negative zero", "shape", "layer"])
def test_stale_code_is_reported_and_not_used(spoil: str) -> None:
    net = masked(trained(Net()))
    code = codes.read(net.head, "weight")
    with torch.no_grad():
        if spoil == "value":
            net.head.weight[~code.mask] = 1e-3
        elif spoil == "negative zero":
            net.head.weight[~code.mask] = -0.0
        elif spoil == "shape":
            net.head.weight = nn.Parameter(torch.randn(100, 15))
        else:
            net.head = nn.Sequential(net.head)
            codes.attach(net.head, "weight", code)
    info = save(net, "a.lcz")
    fresh = copy.deepcopy(net)
    for value in fresh.state_dict().values():
        value.zero_()
    load("a.lcz", fresh)
    assert_same(fresh, net)
    assert list(info.stale) == ["head.weight"]
    assert "mask code" in info.stale["head.weight"] and "stale head.weight" in str(info)
    assert codes.read(fresh.head, "weight") is None


def test_entries_that_are_no_tensors_of_the_model_are_listed() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

        def set_extra_state(self, value: object) -> None:
            raise AssertionError("archives do not hold extra state")

    net = Odd(3, 3)
    net.hidden = nn.Parameter(torch.ones(2))

    def hook(module: nn.Module, values: dict[str, Any], prefix: str, _: object) -> None:
        values[f"{prefix}made"] = torch.ones(1)
        del values[f"{prefix}hidden"]

    net.register_state_dict_post_hook(hook)
    assert save(net, "a.lcz").skipped == {
        "_extra_state": "dict, not a tensor",
        "made": "neither a parameter nor a buffer of the model",
        "hidden": "a parameter that is not in the state dict",
    }
    assert_same(load("a.lcz", nn.Linear(3, 3)), {k: v for k, v in state(net).items() if k != "made"})


def test_a_fresh_process_reads_the_same_bits() -> None:
    net = masked(trained(resnet20()))
    save(net, "a.lcz")
    script = (
        "import torch, hashlib, lightning_compress as lc\n"
        "from lightning_compress.archive import load\n"
        "from lightning_compress.models import resnet20\n"
        "tensors = load('a.lcz', resnet20()).state_dict().values()\n"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in tensors)).hexdigest())"
    )
    expected = hashlib.sha256(b"".join(t.numpy().tobytes() for t in net.state_dict().values())).hexdigest()
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.split() == [expected]


# How large it is.


def order0(values: np.ndarray) -> float:
    """Bytes of the order-0 entropy, by definition."""
    _, counts = np.unique(values, return_counts=True)
    p = counts / counts.sum()
    return float(-(counts * np.log2(p)).sum() / 8) if counts.size else 0.0


def pooled_planes(values: list[np.ndarray]) -> float:
    """Sum of the entropies of the four byte planes after a rotation by one bit."""
    words = np.concatenate([v.reshape(-1) for v in values]).view(np.uint32).astype(np.uint64)
    rotated = (words << 1 | words >> 31) & 0xFFFFFFFF
    return sum(order0(rotated >> shift & 255) for shift in (0, 8, 16, 24))


def entropy_bound(model: nn.Module) -> float:
    """Order-0 bytes of all that is stored: masks each for itself, kept values pooled, other tensors pooled."""
    pruned = {name: code.mask.numpy() for name, _, _, code in codes.of(model)}
    values = {name: value.numpy() for name, value in model.state_dict().items()}
    masks = sum(order0(mask) for mask in pruned.values())
    kept = pooled_planes([values[name][mask] for name, mask in pruned.items()])
    return (
        masks
        + kept
        + pooled_planes([v for n, v in values.items() if n not in pruned and v.dtype == np.float32])
    )


def test_pruned_resnet20_is_within_three_percent_of_its_entropy() -> None:
    net = resnet20()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.normal_().abs_()
    net = compress(net, [lc.Prune(0.9)]).model
    info, bound, sizes = save(net, "a.lcz"), entropy_bound(net), baseline_sizes(net)
    assert bound <= info.file_bytes <= 1.03 * bound
    assert info.file_bytes < sizes["lzma"] < sizes["gzip"] < sizes["state_dict"]
    assert 18 < info.file_bytes - sum(t.stored_bytes for t in info.tensors) < 400  # prefix, header, check
    assert info.compression_ratio > 9.5


def test_baselines_count_numbers_as_float32() -> None:
    net = Holder(
        [torch.randn(5000).half(), torch.randn(5000, dtype=torch.complex128), torch.zeros(5000).bool()]
    )
    assert 20_000 + 40_000 + 5_000 < baseline_sizes(net)["state_dict"] < 68_000


def test_same_model_same_bytes_and_no_tensor_grows() -> None:
    net = trained(resnet20())
    save(net, "a.lcz")
    first = Path("a.lcz").read_bytes()
    save(net, "b.lcz", verify=False)
    assert Path("b.lcz").read_bytes() == first
    assert len(first) < 4 * sum(v.numel() for v in state(net).values())
    assert save(net, "b.lcz", coder="raw").file_bytes > len(first)


# What is refused.


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (Net(9), r"'body.0.weight' is float32 \(8, 3, 3, 3\) here, but float32 \(9, 3, 3, 3\) in Net"),
        (Net().half(), r"'body.0.weight' is float32 \(8, 3, 3, 3\) here, but float16 \(8, 3, 3, 3\) in Net"),
        (nn.Linear(2, 2), r"Linear lacks 10 stored tensors \['body.0.weight'.*has 2 that are not stored"),
        (Net().to("meta"), "'body.0.weight' is on the meta device"),
    ],
)
def test_wrong_model_is_left_as_it_was(into: nn.Module, message: str) -> None:
    save(masked(trained(Net())), "a.lcz")
    before = copy.deepcopy(into)
    with pytest.raises(ArchiveError, match=rf"^a\.lcz: {message}"):
        load("a.lcz", into)
    if not next(into.parameters()).is_meta:
        assert_same(into, before)
    assert list(codes.of(into)) == []


def test_structure_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    save(compress(trained(Net()).eval(), [FuseBatchNorm()]).model, "a.lcz")
    into = Net(9).eval()
    before = copy.deepcopy(into)
    with pytest.raises(ArchiveError, match=r"^a\.lcz: "):
        load("a.lcz", into)
    assert_same(into, before)
    assert list(applied(into)) == []


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2, device="meta"), {}, "'weight' is on the meta device"),
        (nn.LazyLinear(2), {}, r"'weight' has no shape yet \(lazy layer\)"),
        (
            Holder([torch.zeros(2).to_sparse()]),
            {},
            "'t0' has dtype torch.float32 and layout torch.sparse_coo",
        ),
        (nn.Linear(2, 2), {"metadata": {1, 2}}, "metadata is not JSON"),
        (nn.Linear(2, 2), {"metadata": float("nan")}, "metadata is not JSON"),
        (nn.Linear(2, 2), {"coder": "best"}, "unknown coder 'best'; allowed: auto, raw"),
    ],
)
def test_what_cannot_be_saved(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchiveError, match=rf"^a\.lcz: .*{message}"):
        save(model, "a.lcz", **options)
    assert os.listdir() == []


def test_missing_folder_is_found_before_any_work() -> None:
    with pytest.raises(ArchiveError, match="the folder nowhere does not exist: make it first"):
        save(nn.Linear(2, 2, device="meta"), "nowhere/a.lcz")
    with pytest.raises(ArchiveError, match=r"a\.lcz: FileNotFoundError"):
        load("a.lcz", nn.Linear(2, 2))


def test_max_bytes_counts_declared_tensors() -> None:
    net = nn.Linear(100, 100)
    save(net, "a.lcz")
    load("a.lcz", nn.Linear(100, 100), max_bytes=40_400)
    with pytest.raises(
        ArchiveError, match="40,400 bytes of tensors are declared; allowed are max_bytes=40,399"
    ):
        load("a.lcz", nn.Linear(100, 100), max_bytes=40_399)


def test_verify_compares_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    save(net, "a.lcz")
    old = Path("a.lcz").read_bytes()
    parts = contents._parts
    monkeypatch.setattr(contents, "_parts", lambda t: (*parts(t)[:2], parts(t)[2].copy() * 2))
    with pytest.raises(
        ArchiveError, match=r"'body\.0\.weight': what was written does not give its bits back"
    ):
        save(net, "a.lcz")
    assert os.listdir() == ["a.lcz"] and Path("a.lcz").read_bytes() == old


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_interrupted_save_keeps_the_old_file(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    save(net, "a.lcz")

    def interrupt(_: int) -> None:
        raise stop("now")

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else ArchiveError):
        save(trained(Net()), "a.lcz")
    assert os.listdir() == ["a.lcz"]
    assert_same(load("a.lcz", Net()), net)


def test_killed_save_keeps_the_old_file() -> None:
    net = nn.Linear(50, 50)
    save(net, "a.lcz")
    child = os.fork()
    if not child:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        save(nn.Linear(50, 50), "a.lcz")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(os.listdir()) == 2  # the new file, under another name
    assert_same(load("a.lcz", nn.Linear(50, 50)), net)


def test_sidecar_and_text_say_what_the_file_holds() -> None:
    net = compress(Net(), [lc.Prune(0.5)]).model
    info = save(net, "net.lcz", sidecar=True, metadata="m")
    assert sorted(os.listdir()) == ["net.lcz", "net_metadata.json"]
    values = json.loads(Path("net_metadata.json").read_text(encoding="utf-8"))
    assert values["file_bytes"] == os.path.getsize("net.lcz") and values["metadata"] == "m"
    assert values["compression_ratio"] == info.compression_ratio and values["file"] == "net.lcz"
    assert values["applied"][0]["name"] == "Prune" and values["applied"][0]["config"]["sparsity"] == 0.5
    assert (
        f"{info.file_bytes:,} bytes" in str(info)
        and "head.weight" in str(info)
        and "applied Prune" in str(info)
    )


def test_reading_is_bounded_by_the_declared_sizes() -> None:
    """A large honest model: saving and loading need little beyond the model and its copy."""
    net = nn.Sequential(*(nn.Linear(500, 500) for _ in range(8)))
    size = sum(p.nbytes for p in net.parameters())
    tracemalloc.start()
    try:
        save(net, "a.lcz")
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        load("a.lcz", net)
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert written < 2 * size and read < 2 * size
