"""Parts of `.lcz` files: one tensor of many, where every byte went, and how little memory all of it takes."""

import dataclasses
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import codes, contents
from lightning_compress.archive import ArchiveError, inspect, load, load_tensor, save, size_of
from lightning_compress.container import PREFIX, Reader
from lightning_compress.functional.arrays import BLOCK
from lightning_compress.sharing.codes import Codebook


def few_values(net: nn.Module, sparsity: float, count: int) -> nn.Module:
    """Pruned by magnitude; what is left takes the nearest of some quantiles."""
    net = lc.compress(net, lc.Prune(sparsity, scope="layer")).model
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.data
            values = torch.cat(
                [weight[weight != 0].quantile(torch.linspace(0.1, 0.9, count)), torch.zeros(1)]
            )
            code = Codebook(values.unique(), zero=True)
            mask = weight != 0
            weight.copy_(code.project(weight)).masked_fill_(~mask, 0)
            codes.attach(module, "weight", code)
    return net


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Several segments, tied weights, codes, pools, and a tensor of more than one block."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 8))
    net[2].weight = net[1].weight
    net.register_buffer("long", torch.randn(BLOCK + 1000))
    net = lc.compress(net, lc.Quantize(8, exclude="0")).model
    path = tmp_path_factory.mktemp("large") / "net.lcz"
    save(net, path)
    return path, net


class Recorded(io.FileIO):
    """A file that notes which bytes were read."""

    seen: list[range]

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        count = super().readinto(buffer) or 0
        self.seen.append(range(start, start + count))
        return count

    def read(self, size: int = -1) -> bytes:
        start = self.tell()
        data = super().read(size)
        self.seen.append(range(start, start + len(data)))
        return data


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "2.weight", "3.weight", "3.bias", "long"])
def test_one_tensor_is_read_through_its_own_segments_alone(
    name: str, large: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, net = large
    with path.open("rb") as file:
        header = Reader(file).header
    sizes = header.segments()
    starts = [PREFIX + sum(sizes[:i]) for i in range(len(sizes))]
    stored = next(s for s in header.tensors if s.tensor.name == header.aliases.get(name, name))
    pools = {(p.dtype, p.name): p for p in header.pools}
    needed = [a if a.blocks else pools[a.dtype, pool] for a, pool in stored.arrays]
    wanted = {
        i
        for array in needed
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
        if start < PREFIX + array.offset + array.stored_bytes and PREFIX + array.offset < start + size
    }
    seen: list[range] = []

    def opened(self: Path, mode: str) -> Recorded:
        file = Recorded(self, "rb")
        file.seen = seen
        return file

    monkeypatch.setattr(Path, "open", opened)
    assert torch.equal(load_tensor(path, name), net.state_dict()[name])
    read, expected = (np.zeros(path.stat().st_size, bool) for _ in range(2))
    for part in seen:
        read[part.start : part.stop] = True
    for i in wanted:
        expected[starts[i] : starts[i] + sizes[i]] = True
    payload = slice(PREFIX, PREFIX + header.payload_bytes)
    assert np.array_equal(read[payload], expected[payload])
    assert len(wanted) < len(sizes)


def test_damage_elsewhere_does_not_matter_to_one_tensor_and_damage_in_it_is_found(
    large: tuple[Path, nn.Module],
) -> None:
    path, net = large
    data = bytearray(path.read_bytes())
    data[PREFIX + 100] ^= 1  # in the first segment
    Path("x.lcz").write_bytes(bytes(data))
    assert torch.equal(load_tensor("x.lcz", "1.weight"), net[1].weight)
    for read in (lambda: load_tensor("x.lcz", "long"), lambda: inspect("x.lcz"), lambda: load("x.lcz", net)):
        with pytest.raises(ArchiveError, match="damaged: the check of bytes 0 to"):
            read()


def test_one_tensor_that_is_not_there(large: tuple[Path, nn.Module]) -> None:
    path, net = large
    with pytest.raises(ArchiveError, match=r"no tensor '1.weigth'; nearest names: 1.weight"):
        load_tensor(path, "1.weigth")
    size = net.long.nbytes
    load_tensor(path, "long", max_bytes=size)
    with pytest.raises(ArchiveError, match=f"'long': {size:,} bytes are declared; allowed are max_bytes"):
        load_tensor(path, "long", max_bytes=size - 1)


def test_blocks_come_back_in_one_piece(large: tuple[Path, nn.Module]) -> None:
    path, net = large
    with path.open("rb") as file:
        blocks = {s.tensor.name: len(s.tensor.blocks) for s in Reader(file).header.tensors}
    assert blocks["long"] == 2
    fresh = load(path, nn_like(net))
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), net.state_dict().values(), strict=True)
    )


def nn_like(net: nn.Module) -> nn.Module:
    fresh = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 300), nn.Linear(300, 8))
    fresh[2].weight = fresh[1].weight
    fresh.register_buffer("long", torch.zeros_like(net.long))
    return fresh


# Sizes.


@pytest.mark.parametrize("make", [lc.models.resnet20, lambda: nn.Linear(3, 2), lambda: nn.Flatten()])
def test_every_byte_is_accounted_for(make: Any) -> None:
    net = make()
    if sum(p.numel() for p in net.parameters()) > 100:
        net = lc.compress(net, [lc.Prune(0.8), lc.Quantize(4)]).model
    info = save(net, "net.lcz")
    assert sum(part.stored_bytes for part in info.parts) == info.file_bytes == os.path.getsize("net.lcz")
    table = info.size_report.splitlines()
    assert len(table) == 2 + len(info.parts) + 1
    assert f"{info.file_bytes:,}" in table[-1] and "100.0%" in table[-1]
    if net.__class__.__name__ == "CifarResNet" or len(info.tensors) > 10:
        fields = {(p.part, p.field) for p in info.parts}
        assert ("layer3.2.conv2.weight", "codes") in fields and ("pool", "scale") in fields
        own = {p.part: p for p in info.parts if p.field == "codes" and p.part != "pool"}
        assert all(p.elements == net.get_parameter(name).numel() for name, p in own.items())
        assert all(p.coders for p in own.values())


@pytest.mark.parametrize("coder", ["auto", "ans", "raw"])
def test_size_of_is_the_length_of_the_file(coder: str) -> None:
    net = lc.compress(lc.models.resnet20(), lc.Quantize(4)).model
    about = {"a": ["ü", 1.5, None]}
    assert size_of(net, coder, about) == save(net, "net.lcz", coder=coder, metadata=about).file_bytes
    assert os.listdir() == ["net.lcz"]


def test_size_of_refuses_what_save_refuses() -> None:
    with pytest.raises(ArchiveError, match="'weight' is on the meta device"):
        size_of(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ArchiveError, match="unknown coder 'best'"):
        size_of(nn.Linear(2, 2), "best")


def test_all_but_the_streams_is_at_most_three_percent_of_a_small_lenet() -> None:
    net = few_values(lc.models.LeNet5(), 0.95, 4)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.bias.data = module.bias.data.bfloat16().float()
    info = save(net, "lenet.lcz")
    assert info.compression_ratio > 60
    streams = sum(p.stored_bytes for p in info.parts if p.part not in ("prefix", "header", "check"))
    assert info.file_bytes - streams <= 0.03 * info.file_bytes
    assert inspect("lenet.lcz").applied[0][1]["config"] == {"scope": "layer", "sparsity": 0.95}


@pytest.mark.parametrize(("sparsity", "least", "most"), [(0.945, 3500, 4500), (0.955, 2500, 3500)])
def test_the_header_is_at_most_three_percent_of_a_lenet_with_shared_values(
    sparsity: float, least: int, most: int
) -> None:
    """Pruned, and weights and biases with few values: what recipes/lenet5.py makes, without its training."""
    torch.manual_seed(0)
    biases = [f"{layer}.bias" for layer in ("conv1", "conv2", "fc1", "fc2", "fc3")]
    clusters = {"*.bias": 4, "*": 8}
    sharing = lc.ShareWeights(clusters=clusters, codebook_dtype="float16", include=["*", *biases])
    net = lc.compress(lc.models.LeNet5(), [lc.Prune(sparsity, scope="layer"), sharing]).model
    info = save(net, "lenet.lcz")
    assert least < info.file_bytes < most
    others = sum(p.stored_bytes for p in info.parts if p.part in ("prefix", "header", "check"))
    assert others <= 0.03 * info.file_bytes
    assert info.applied[1][1]["config"]["clusters"] == clusters


def test_the_sidecar_says_everything() -> None:
    net = lc.compress(lc.models.resnet20(), [lc.Prune(0.5, seed=7), lc.Quantize(4)]).model
    info = save(net, "net.lcz", sidecar=True, metadata={"data": "none"})
    values = json.loads(Path("net_metadata.json").read_text(encoding="utf-8"))
    assert values["techniques"] == ["Prune", "Quantize"] and values["seed"] == 7
    assert (
        values["applied"][0]["config"] == lc.Prune(0.5, seed=7).config()
    )  # all options, not only the unusual ones
    coverage = values["applied"][1]["coverage"]
    assert (
        coverage["skipped"]["bn1.weight"]
        and coverage["share"] > 0.9
        and "linear.weight" in coverage["changed"]
    )
    assert sum(part["stored_bytes"] for part in values["parts"]) == values["file_bytes"] == info.file_bytes
    assert values["size_fraction"] == info.size_fraction and values["dense_bytes"] == info.dense_bytes
    assert values["versions"].keys() == {"format", "lightning_compress", "numpy", "python", "torch"}
    assert values["versions"]["format"] == "1.0" and values["metadata"] == {"data": "none"}
    save(net, "net.lcz", sidecar=True, metadata={"seed": 3})
    assert json.loads(Path("net_metadata.json").read_text(encoding="utf-8"))["seed"] == 3


# Memory.


class Many(nn.Sequential):
    """Ten layers of 262,144 weights each."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(512, 512) for _ in range(10)))


@pytest.mark.parametrize(
    "transform", [lc.Prune(0.9), lc.Quantize(4, calibrator="minmax")], ids=["prune", "quantize"]
)
def test_saving_and_loading_take_the_memory_of_a_block_and_a_layer(
    transform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as NumPy's arrays go; recipes/benchmarks/archive_scale.py measures the whole process."""
    monkeypatch.setattr("lightning_compress.archive.reading._HELD", 0)
    net = Many()
    lc.compress(net, transform, inplace=True)
    size = sum(p.nbytes for p in net.parameters())
    save(net, "net.lcz")  # what is compiled or made once is no part of what follows
    tracemalloc.start()
    try:
        save(net, "net.lcz")
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        load("net.lcz", Many())
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert written < 0.5 * size and read < 0.3 * size


def test_loading_keeps_little_and_decodes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, again = Many(), []
    save(net, "net.lcz")
    decode = contents.decode
    monkeypatch.setattr(contents, "decode", lambda s, r: (again.append(s.tensor.name), decode(s, r))[1])
    fresh = load("net.lcz", Many())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), net.parameters(), strict=True))
    counts = {name: again.count(name) for name in again}
    assert counts["0.weight"] == 1 and counts["9.weight"] == 2 and counts["9.bias"] == 1


def test_plans_and_codes_of_large_models_are_small() -> None:
    net = Many()
    size = sum(p.nbytes for p in net.parameters())

    def held(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        if dataclasses.is_dataclass(value):
            return sum(map(held, vars(value).values()))
        inner = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        )
        return sum(map(held, inner))

    pruned = lc.compress(net, lc.Prune(0.5))
    assert held(pruned.plan) < size / 31
    assert sum(held(code) for *_, code in codes.of(pruned.model)) < size / 31
    quantized = lc.compress(net, lc.Quantize(8, calibrator="minmax"))
    assert held(quantized.plan) < size / 200
    assert sum(held(code) for *_, code in codes.of(quantized.model)) < size / 200
