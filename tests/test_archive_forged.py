"""Damaged and forged `.lcz` files: always `ArchiveError`, never another exception, never much memory."""

import copy
import dataclasses
import hashlib
import io
import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.archive import ArchiveError, inspect, load, load_tensor, save
from lightning_compress.codes import same_bits
from lightning_compress.compress import compress
from lightning_compress.functional.arrays import Block, Stream
from lightning_compress.functional.headers import Header, Stored
from lightning_compress.functional.packing import DICTIONARY, pack, unpack
from lightning_compress.functional.records import text, uint
from lightning_compress.fusion import FuseBatchNorm
from lightning_compress.transform import Transform


def check(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def split(data: bytes) -> tuple[bytes, bytes]:
    """Unpacked header and payload, by the description of the format."""
    length = int.from_bytes(data[-12:-8], "little")
    start = len(data) - 12 - length
    assert data[:6] == b"\x89LCZ\1\0" and data[-8:] == check(data[:6] + data[start:-8])
    return unpack(data[start : start + length]), data[6:start]


def seal(packed: bytes, payload: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """A file with a valid length and check around anything."""
    prefix, end = b"\x89LCZ" + bytes(version), packed + len(packed).to_bytes(4, "little")
    return prefix + payload + end + check(prefix + end)


def join(header: bytes | Header, payload: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    return seal(pack(header if isinstance(header, bytes) else header.to_bytes()), payload, version)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
        self.head = nn.Linear(16, 100)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, nn.Module]:
    """A file with codes, pools, own streams of every layout, ties, a structural step and metadata; and its model."""
    return made(tmp_path_factory.mktemp("sample"), [FuseBatchNorm()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, nn.Module]:
    """The same without the structural step, which takes time to carry out."""
    return made(tmp_path_factory.mktemp("plain"), [])


def made(folder: Path, transforms: list[Transform]) -> tuple[bytes, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(Net(), nn.Linear(40, 40), nn.Linear(40, 40)).eval()
    net[2].weight = net[1].weight
    net.register_buffer("wide", torch.arange(3000) ** 4)
    net.register_buffer("thin", torch.where(torch.rand(3000) < 0.9, 0.0, torch.randn(3000)))
    net.register_buffer("flags", torch.rand(5000) < 0.1)
    for parameter in net.parameters():
        parameter.data.normal_()
    net = compress(net, transforms).model if transforms else net
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            size = module.weight.detach().abs()
            codes.set_mask(module, "weight", size > size.flatten().quantile(0.9))
    path = folder / "a.lcz"
    save(net, path, metadata={"a": [1, {"b": "c"}]})
    return path.read_bytes(), net


def blank(net: nn.Module) -> nn.Module:
    """Same structure, all zero."""
    fresh = copy.deepcopy(net)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    return fresh


def equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(same_bits(value, other[name]) for name, value in a.state_dict().items())


def load_bytes(data: bytes, into: nn.Module) -> bool:
    """Load what never was on a disk: everything, or ArchiveError and `into` keeps its zeros."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BytesIO(data))
        try:
            load("x.lcz", into)
        except ArchiveError as error:
            assert str(error).startswith("x.lcz: ")
            assert not any(bool(t.any()) for t in into.state_dict().values())
            return False
    return True


def attempt(data: bytes, net: nn.Module, into: nn.Module) -> bool:
    """Load, and compare what comes back."""
    done = load_bytes(data, into)
    assert not done or equal(into, net)
    return done


def test_five_thousand_damaged_files_are_refused(plain: tuple[bytes, nn.Module]) -> None:
    data, net = plain
    into, rng = blank(net), random.Random(0)
    for case in range(5000):
        damaged = bytearray(data)
        kind, at = case % 4, rng.randrange(len(data))
        if kind == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[at:]
        elif kind == 2:
            damaged += rng.randbytes(rng.randrange(1, 50))
        else:
            damaged[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
        if bytes(damaged) != data:
            assert not attempt(bytes(damaged), net, into)
    assert attempt(data, net, into)


def test_a_file_can_be_taken_apart_and_joined(sample: tuple[bytes, nn.Module]) -> None:
    data, _ = sample
    raw, payload = split(data)
    assert join(raw, payload) == data
    header = Header.from_bytes(raw)
    assert header.to_bytes() == raw
    assert {block.layout for a in header.arrays for block in a.blocks} == {"symbols", "planes", "sparse"}
    assert header.aliases and header.steps[0][1]["plan"] and sum(bool(t.kind) for t in header.tensors) >= 3
    assert header.metadata == {"a": [1, {"b": "c"}]} and len(header.pools) >= 3


def resealed(raw: bytes, payload: bytes) -> bytes:
    """With the checks of the segments of another payload."""
    header, checks, start = Header.from_bytes(raw), [], 0
    for size in header.segments():
        checks.append(check(payload[start : start + size]))
        start += size
    return join(dataclasses.replace(header, checks=tuple(checks)), payload)


def test_forged_payloads_with_valid_checks(plain: tuple[bytes, nn.Module]) -> None:
    data, net = plain
    raw, payload = split(data)
    into, rng = blank(net), random.Random(1)
    refused = 0
    for _ in range(500):
        forged = bytearray(payload)
        for _ in range(rng.choice([1, 1, 5])):
            forged[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        if load_bytes(resealed(raw, bytes(forged)), into):
            into = blank(net)  # other bits of weights, which nothing but the file itself says
        else:
            refused += 1
    assert 30 < refused < 500


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_forged_headers_with_a_valid_check(seed: int, plain: tuple[bytes, nn.Module]) -> None:
    """1,500 of them; what they say may be true of other files, but it is never believed against the model."""
    data, net = plain
    raw, payload = split(data)
    rng, into, refused = random.Random(seed), blank(net), 0
    size = sum(t.nbytes for t in net.state_dict().values())
    tracemalloc.start()
    try:
        for _ in range(1500):
            forged = bytearray(raw)
            for _ in range(rng.choice([1, 1, 2, 5])):
                at, kind = rng.randrange(len(forged)), rng.randrange(4)
                if kind == 0:
                    forged[at] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    forged[at : at + 1] = uint(rng.choice([2**14, 2**31, 2**40, 2**63, 2**64 - 1]))
                elif kind == 2:
                    del forged[at : at + rng.randrange(1, 9)]
                else:
                    forged[at:at] = forged[rng.randrange(len(forged)) :][: rng.randrange(1, 30)]
            if load_bytes(join(bytes(forged), payload), into):
                into = blank(net)  # such as other metadata, which says nothing about tensors
            else:
                refused += 1
        assert tracemalloc.get_traced_memory()[1] < 2 * size + 2_000_000
    finally:
        tracemalloc.stop()
    assert refused > 1200


Lie = Callable[[Header], Header]


def tensor(which: str, /, **changes: Any) -> Lie:
    """Say something else about a stored tensor."""

    def change(header: Header) -> Header:
        stored = [
            dataclasses.replace(s, tensor=dataclasses.replace(s.tensor, **changes))
            if s.tensor.name == which
            else s
            for s in header.tensors
        ]
        return dataclasses.replace(header, tensors=tuple(stored))

    return change


def coded(**changes: Any) -> Lie:
    """Say something else about the code of the first tensor that has one."""

    def change(header: Header) -> Header:
        first = next(s for s in header.tensors if s.kind)
        found = [dataclasses.replace(s, **changes) if s is first else s for s in header.tensors]
        return dataclasses.replace(header, tensors=tuple(found))

    return change


def field(**changes: Any) -> Lie:
    """Say something else about the first field of that code."""

    def change(header: Header) -> Header:
        first, *others = next(s for s in header.tensors if s.kind).fields
        return coded(fields=(dataclasses.replace(first, **changes), *others))(header)

    return change


def block(**changes: Any) -> Lie:
    """Say something else about how "flags" is stored."""

    def change(header: Header) -> Header:
        (flags,) = (s.tensor for s in header.tensors if s.tensor.name == "flags")
        return tensor("flags", blocks=(dataclasses.replace(flags.blocks[0], **changes),))(header)

    return change


def step(**changes: Any) -> Lie:
    return lambda h: dataclasses.replace(h, steps=((h.steps[0][0], h.steps[0][1] | changes),))


def other(**changes: Any) -> Lie:
    return lambda h: dataclasses.replace(h, **changes)


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


BOMB = {"dtype": "uint8", "shape": [2**36], "zlib": "eJw="}
PLAN = {"layers": {"x": {"t": BOMB}}, "skipped": {}, "identity": False, "data": ""}


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (tensor("thin", shape=(2**40,)), "more than 131072 tensors, fields and blocks"),
        (tensor("thin", shape=(2**26,)), "'thin': "),
        (tensor("thin", shape=(2**60,)), "impossible shape"),
        (tensor("thin", shape=(2,) * 33), "impossible shape of 33 axes"),
        (tensor("thin", shape=(2**20,) * 3), "impossible shape"),
        (tensor("flags", shape=(5001,)), r"\(5001,\) here, but bool \(5000,\)"),
        (tensor("flags", shape=(50,)), r"\(50,\) here, but bool \(5000,\)"),
        (tensor("flags", name="other"), r"lacks 1 stored tensors \['other'\]"),
        (tensor("flags", name="thin"), "tensor 'thin' is declared 2 times"),
        (tensor("flags", dtype="uint8"), "'flags' is uint8 .* here, but bool"),
        (block(layout="planes"), "'flags': layout 'planes'; allowed for bool: symbols"),
        (block(number=2), "'flags': number 2; 'symbols' allows 0 to 1"),
        (block(number=-1), "'flags': number -1; 'symbols' allows 0 to 1"),
        (block(streams=(Stream("raw", 10**6),)), "'flags': a stream of 1000000 bytes"),
        (block(streams=(Stream("raw", 0),)), "streams of [0-9]+ bytes in a payload"),
        (block(streams=()), "coder number|layout number|stream|part|header"),
        (other(aliases={"2.weight": "2.bias"}), "'2.weight' is float32"),
        (other(aliases={"flags": "thin"}), "tensor 'flags' is declared 2 times"),
        (coded(kind="os.system"), "unknown code 'os.system'"),
        (coded(config={"x": deep(40)}), "nests 42 deep"),
        (field(dtype="int64"), "pool|number|stream|layout|coder|header"),
        (field(shape=(8, 3, 3, 2**30)), "code of .* elements; at most"),
        (field(shape=(8, 3, 3, 4)), "stream|values for|shape|pool|adaptive"),
        (field(name="values"), "field 'values' is declared 2 times"),
        (coded(fields=()), "mask|KeyError|stream|layout|coder|header|part"),
        (step(name="subprocess.Popen"), "transform 'subprocess.Popen' is unknown"),
        (step(plan=PLAN), "declares [0-9,]+ bytes of decisions"),
        (step(plan=[1]), "malformed"),
        (step(plan={"layers": {"x": {"t": BOMB | {"shape": 5}}}}), "a tensor of shape 5"),
        (
            lambda h: dataclasses.replace(h, steps=(("1.nowhere", h.steps[0][1]),)),
            "was applied to '1.nowhere'",
        ),
        (other(checks=(bytes(8),)), "damaged: the check of bytes 0 to"),
    ],
)
def test_each_lie_in_a_header_has_its_sentence(
    lie: Lie, reason: str, sample: tuple[bytes, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, net = sample
    raw, payload = split(data)
    monkeypatch.setattr("lightning_compress.functional.records._check", lambda data: None)
    forged = join(lie(Header.from_bytes(raw)), payload)
    monkeypatch.undo()
    into = blank(net)
    Path("x.lcz").write_bytes(forged)
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match=rf"^x\.lcz: .*({reason})"):
            load("x.lcz", into)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    assert not any(bool(t.any()) for t in into.state_dict().values())


def test_lies_around_the_header(sample: tuple[bytes, nn.Module]) -> None:
    data, net = sample
    raw, payload = split(data)
    packed = pack(raw)

    def deflated(plain: bytes) -> bytes:
        coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
        return b"\1" + coder.compress(plain) + coder.flush()

    def notes(value: bytes) -> bytes:
        """With another part for the reasons."""
        return raw + uint(2 * 2) + text(value.decode("latin-1"))

    cases = {
        join(raw, payload, (2, 0)): "format 2.0; this library reads 1.x",
        join(raw, payload + b"x"): "in a payload of",
        join(raw, payload[:-1]): "in a payload of",
        seal(
            deflated(bytes(100_000_000)), payload
        ): "does not inflate to its end, or to more than is allowed",
        seal(packed + b"x", payload): "does not inflate to its end",
        seal(packed[:-3], payload): "does not inflate",
        seal(b"\1" + b"\xff" * 50, payload): "the header does not inflate",
        seal(b"\2" + raw, payload): "cannot be unpacked",
        seal(b"", payload): "cannot be unpacked",
        join(b"", payload): "the header ends 1 bytes too early",
        join(raw[:50], payload): "the header ends",
        join(uint(2**30) + raw, payload): "the header ends [0-9]+ bytes too early",
        join(b"\x80" * 11, payload): "a number of more than 10 bytes",
        join(b"\x02\xff\xff" + raw, payload): "UnicodeDecodeError|decode",
        join(b"\x01a" + raw, payload): "list of names is cut off",
        join(raw + raw[-20:], payload): "twice|the header|part",
        join(notes(b'{"skipped":{"a":1}}'), payload): "not names and reasons",
        join(notes(b"{"), payload): "JSONDecodeError|property name",
        join(notes(b"[" * 10_000), payload): "nests 10000 deep",
        join(notes(b'{"a":' * 50 + b"1" + b"}" * 50), payload): "nests 50 deep",
        join(notes(b"NaN"), payload): "NaN, which is no JSON",
        join(notes(b"9" * 5000), payload): "x.lcz",
        join(notes(b"," * 5_000_000), payload): "marks; allowed are",
        b"": "no .lcz file",
        data[:7]: "the file ends after 7 bytes",
        data[:-1]: "damaged or cut off",
        data[:6] + data[-12:]: "the length of its header is more than the file has",
        data + b"x": "damaged or cut off",
        data[:100] + b"x" + data[101:]: "damaged: the check of bytes",
    }
    for forged, reason in cases.items():
        Path("x.lcz").write_bytes(forged)
        for read in (inspect, lambda path: load(path, blank(net)), lambda path: load_tensor(path, "flags")):
            if "damaged: the check" in reason and read is not inspect:
                continue  # a part that one tensor may not need
            with pytest.raises(ArchiveError, match=reason):
                read("x.lcz")


def test_a_header_of_many_rows_is_refused_before_they_are_made(sample: tuple[bytes, nn.Module]) -> None:
    _, net = sample
    names = "".join("\2\0" for _ in range(200_000))
    Path("x.lcz").write_bytes(join(text(names) + bytes(1000), b""))
    with pytest.raises(ArchiveError, match="more than 131072 tensors, fields and blocks"):
        load("x.lcz", blank(net))


# Versions.


def test_newer_minor_versions_may_hold_parts_that_are_not_needed(sample: tuple[bytes, nn.Module]) -> None:
    data, net = sample
    raw, payload = split(data)
    newer = raw + uint(2 * 77) + text("something that readers may pass over")
    assert attempt(join(newer, payload, (1, 7)), net, blank(net))
    Path("x.lcz").write_bytes(join(newer, payload, (1, 7)))
    info = inspect("x.lcz")
    assert info.unknown == (77,) and info.version == "1.7"
    assert "part 77 of the header is not known to this library" in str(info)


def test_parts_that_are_needed_and_not_known_refuse_the_file(sample: tuple[bytes, nn.Module]) -> None:
    data, net = sample
    raw, payload = split(data)
    Path("x.lcz").write_bytes(join(raw + uint(2 * 77 + 1) + text("needed"), payload, (1, 7)))
    for read in (inspect, lambda path: load(path, blank(net)), lambda path: load_tensor(path, "flags")):
        with pytest.raises(
            ArchiveError, match=r"part 77, which is needed to read the file .*: update lightning-c"
        ):
            read("x.lcz")


def test_numbers_that_only_a_newer_library_knows_refuse_the_file() -> None:
    """A dtype, a layout and a coder, each by its number in the file."""
    net = nn.Linear(60, 60, bias=False)
    save(net, "a.lcz")
    raw, payload = split(Path("a.lcz").read_bytes())
    header = Header.from_bytes(raw)
    (stored,) = header.tensors
    assert isinstance(stored, Stored) and stored.tensor.blocks[0] == Block(
        stored.tensor.blocks[0].layout, 0, stored.tensor.blocks[0].streams
    )
    table = raw[: -8 * len(header.checks)]
    where = table.index(b"weight\0") + len(b"weight\0")  # number of sorts, then the dtype
    for place, what in ((where + 1, "dtype"), (where + 6, "layout"), (where + 7, "coder")):
        forged = bytearray(raw)
        assert forged[place] < 20, (place, raw)
        forged[place] = 100
        Path("x.lcz").write_bytes(join(bytes(forged), payload, (1, 3)))
        with pytest.raises(ArchiveError, match=f"{what} number 100 is unknown to this library: update"):
            load("x.lcz", nn.Linear(60, 60, bias=False))


def test_checks_stand_where_the_description_says() -> None:
    net = lc.models.resnet20()
    save(net, "a.lcz")
    raw, payload = split(Path("a.lcz").read_bytes())
    header = Header.from_bytes(raw)
    sizes = header.segments()
    assert sum(sizes) == len(payload) == header.payload_bytes and len(sizes) > 5
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    assert list(header.checks) == [check(payload[a : a + n]) for a, n in zip(starts, sizes, strict=True)]
    lengths = [stream.length for a in header.arrays for b in a.blocks for stream in b.streams]
    ends, begin, total = [], 0, 0
    for length in lengths:
        total += length
        if total - begin >= 65536 or (total == len(payload) and total > begin):
            ends.append(total)
            begin = total
    assert ends == [start + size for start, size in zip(starts, sizes, strict=True)]
