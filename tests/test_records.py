"""The bytes of headers: whatever is written comes back, and whatever else is refused with ValueError alone."""

import contextlib
import hashlib
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_compress.functional.arrays import CARRIERS, Array, Block, Stream
from lightning_compress.functional.entropy import CODERS
from lightning_compress.functional.headers import CODERS_IN_FILES, DTYPES, Header, Stored
from lightning_compress.functional.packing import DICTIONARY, pack, unpack
from lightning_compress.functional.records import Cursor, dump, names, parse, sint, uint


@given(st.integers(0, 2**64 - 1))
def test_numbers_come_back(value: int) -> None:
    data = uint(value)
    assert len(data) == max(1, -(-value.bit_length() // 7))
    assert Cursor(data).uint() == value


@given(st.integers(-(2**63), 2**63 - 1))
def test_numbers_with_a_sign_come_back(value: int) -> None:
    cursor = Cursor(sint(value) + b"x")
    assert cursor.sint() == value and cursor.left == 1


PIECES = st.sampled_from(
    ["conv", ".", "0", "1", "2", "10", "007", "weight", "\x03", "\x08", "é", "٣", "9" * 12]
)


@given(st.lists(st.lists(PIECES, max_size=6).map("".join), max_size=12))
@example(["layers.9.a", "layers.10.a", "layers.1.a", "x", "", ""])
def test_names_come_back(values: list[str]) -> None:
    assert Cursor(names(values)).names() == values


@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=9), max_size=5
    )
)
def test_any_names_come_back(values: list[str]) -> None:
    assert Cursor(names(values)).names() == values


def test_a_name_with_the_character_0_is_refused() -> None:
    with pytest.raises(ValueError, match="holds the character 0"):
        names(["a\0b"])


def test_layers_that_count_up_are_the_same_text() -> None:
    layers = [f"layers.{i}.linear{j}.{p}" for i in range(50) for j in (1, 2) for p in ("weight", "bias")]
    assert len(pack(names(layers))) < 60


LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=12))
def test_json_comes_back(value: object) -> None:
    assert parse(dump(value).encode("utf-8", "surrogatepass")) == value


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_a_record_or_a_value_error(data: bytes) -> None:
    for read in (Cursor.uint, Cursor.sint, Cursor.text, Cursor.json, Cursor.names):
        with contextlib.suppress(ValueError):
            read(Cursor(data))


@given(st.binary(max_size=2000))
def test_headers_are_packed_without_loss(data: bytes) -> None:
    packed = pack(data)
    assert len(packed) <= len(data) + 1 and unpack(packed) == data
    assert len(pack(data + DICTIONARY[-60:])) < len(packed) + 20


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Consistent ones: each stored tensor has the blocks that its size asks for."""
    rng = random.Random(draw(st.integers(0, 10**6)))

    def array(name: str, shape: tuple[int, ...], dtype: str, pool: bool = False) -> Array:
        bare = Array(name, dtype, shape)
        if bare.pooled and not pool:
            return bare
        return Array(name, dtype, shape, tuple(block(bare, count) for count in bare.extents()))

    def block(bare: Array, count: int) -> Block:
        kinds = ["symbols"] if bare.dtype in ("bool", "int8", "uint8") else ["planes", "sparse"]
        layout = rng.choice(kinds)
        number = 0 if layout != "sparse" else rng.randrange(count + 1)
        size = {"float16": 2, "bfloat16": 2, "float32": 4, "complex64": 4}.get(bare.dtype, 1)
        streams = 1 if layout == "symbols" else size + (layout == "sparse")
        picked = (Stream(rng.choice(CODERS_IN_FILES), rng.randrange(count + 60)) for _ in range(streams))
        return Block(layout, number, tuple(picked))

    tensors, pools = [], {}
    for i in range(draw(st.integers(0, 8))):
        dtype = rng.choice(["float32", "float16", "bfloat16", "complex64", "bool", "int8"])
        shape = tuple(rng.choice([1, 2, 3, 30, 64]) for _ in range(rng.randrange(4)))
        name = f"layers.{i // 3}.{rng.choice('ab')}{i}.weight"
        if rng.random() < 0.5:
            stored = Stored(array(name, shape, dtype))
        else:
            codes = array("codes", rng.choice([shape, (*shape, 2)]), "int8")
            fields = (codes, array("scale", (rng.randrange(9),), "float32"))
            config = {"bits": rng.randrange(4), "axes": [rng.randrange(3)]}
            stored = Stored(Array(name, dtype, shape), "affine", rng.choice([1, 2]), config, fields)
        tensors.append(stored)
        for part, pool in stored.arrays:
            if part.pooled and part.count:
                pools[part.dtype, pool] = pools.get((part.dtype, pool), 0) + part.count
    made = tuple(array(pool, (count,), dtype, pool=True) for (dtype, pool), count in pools.items())
    kept = tuple(s.tensor.name for s in tensors)
    changed = {s.tensor.name: s.tensor.nbytes for s in tensors[2:5]}
    coverage = {"changed": changed, "skipped": {}, "total_bytes": 40, "share": 0.25}
    step = {
        "name": "Prune",
        "config": {"sparsity": 0.5},
        "plan": rng.choice([None, {"a": [1]}]),
        "coverage": coverage,
    }
    header = Header(
        tuple(tensors),
        made,
        aliases={f"other{i}": name for i, name in enumerate(kept[:2])},
        steps=(("", step), ("body", step))[: rng.randrange(3)],
        skipped=rng.choice([{}, {"x": "why"}]),
        stale=rng.choice([{}, {"y": "because"}]),
        metadata=rng.choice([None, {"a": 1}, [], 0]),
    )
    checks = tuple(rng.randbytes(8) for _ in header.segments())
    return Header(**{**vars(header), "checks": checks})


@given(headers())
@settings(max_examples=150)
def test_headers_come_back(header: Header) -> None:
    back = Header.from_bytes(header.to_bytes())
    assert back == header
    ends = 0
    for array in back.arrays:
        if array.blocks:
            assert array.offset == ends
            ends += array.stored_bytes
    assert ends == back.payload_bytes == sum(back.segments())


@given(headers(), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_changed_headers_are_read_or_refused(header: Header, rng: random.Random) -> None:
    data = bytearray(header.to_bytes())
    for _ in range(3):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        back = Header.from_bytes(bytes(data))
    except (ValueError, TypeError, AttributeError):
        return
    assert back.payload_bytes == sum(back.segments())


def test_numbers_of_dtypes_and_coders_never_change() -> None:
    """They are in files: what is new comes last."""
    assert tuple(CARRIERS) == DTYPES
    assert DTYPES[:6] == ("bool", "uint8", "int8", "int16", "int32", "int64")
    assert DTYPES[6:11] == ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
    assert DTYPES[11:17] == ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
    assert CODERS_IN_FILES[:8] == ("raw", "bitpack", "ans", "range", "gaps", "zlib", "lzma", "adaptive")
    assert CODERS_IN_FILES[8] == "huffman"
    assert sorted(CODERS_IN_FILES) == sorted(CODERS)
    digest = hashlib.sha256(DICTIONARY).hexdigest()
    assert digest == "0a06895334efc504bfcde8e43983fd3acaaf06a6ca9fbd1afa1710eab408c1e8"
