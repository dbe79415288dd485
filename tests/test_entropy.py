"""The entropy coders: identity, an independent decoder, sizes against the entropy, damaged bytes."""

import math
import tracemalloc
import zlib
from collections.abc import Iterator

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy as scipy_entropy

from lightning_compress.functional import frequencies
from lightning_compress.functional.entropy import (
    CODERS,
    byte_planes,
    decode,
    encode,
    entropy_bits,
    from_byte_planes,
    gaps_decode,
    gaps_encode,
)

GENERAL = [name for name, coder in CODERS.items() if coder.alphabet == 65_536]
STATIC = ["ans", "range"]


@st.composite
def sources(draw: st.DrawFn, max_size: int = 400) -> np.ndarray:
    """Symbols of many kinds: few or many distinct, dense or sparse alphabets, skewed, with runs."""
    alphabet = draw(
        st.lists(st.integers(0, 65_535), min_size=1, max_size=40, unique=True)
        | st.integers(1, 300).map(lambda n: list(range(n)))
        | st.sampled_from([[0], [65_535], [0, 65_535], [0, 255], [255, 256]])
    )
    index = draw(hnp.arrays(np.int64, st.integers(0, max_size), elements=st.integers(0, len(alphabet) - 1)))
    power = draw(st.sampled_from([1, 1, 4]))  # 4: mostly the first symbols
    index = (len(alphabet) * (index / len(alphabet)) ** power).astype(np.int64)
    symbols = np.array(alphabet)[index]
    return np.sort(symbols) if draw(st.booleans()) else symbols


def named(seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    yield "gaussian", np.clip(np.round(rng.normal(128, 20, 100_000)), 0, 255).astype(np.int64)
    yield "geometric", rng.geometric(0.05, 100_000)
    yield "mask", (rng.random(100_000) < 0.1).astype(np.int64)
    yield "rare", (rng.random(200_000) < 0.0005).astype(np.int64)
    yield "16 bit", np.abs(rng.normal(0, 2000, 150_000)).astype(np.int64)


# Identity


@given(sources(), st.sampled_from([*GENERAL, "auto"]))
@settings(max_examples=300)
def test_decode_inverts_encode(symbols: np.ndarray, coder: str) -> None:
    name, data = encode(symbols, coder)
    assert coder in ("auto", name)
    assert isinstance(data, bytes)
    decoded = decode(data, symbols.size, name)
    assert decoded.dtype == np.uint16
    assert np.array_equal(decoded, symbols)


@pytest.mark.parametrize("coder", STATIC)
def test_decode_inverts_encode_on_a_thousand_random_sources(coder: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        n, size = int(2 ** rng.uniform(0, 9)), int(2 ** rng.uniform(0, 11))
        alphabet = rng.choice(65_536, n, replace=False)
        symbols = rng.choice(alphabet, size, p=rng.dirichlet(np.full(n, 0.3)))
        assert np.array_equal(decode(encode(symbols, coder)[1], size, coder), symbols)


@pytest.mark.parametrize("coder", GENERAL)
@pytest.mark.parametrize(
    "symbols",
    [
        np.random.default_rng(2).permutation(65_536),
        np.concatenate([np.zeros(100_000, np.int64), [65_535]]),
        np.arange(3 * 65_536) % 7,
        np.full(70_001, 300),
    ],
    ids=["every symbol once", "one exception", "several chunks", "constant"],
)
def test_decode_inverts_encode_on_long_sources(coder: str, symbols: np.ndarray) -> None:
    assert np.array_equal(decode(encode(symbols, coder)[1], symbols.size, coder), symbols)


@pytest.mark.parametrize("coder", [*CODERS, "auto"])
def test_no_symbols_are_no_bytes(coder: str) -> None:
    name, data = encode(np.zeros((3, 0), np.int64), coder)
    assert data == b""
    assert decode(data, 0, name).shape == (0,)
    with pytest.raises(ValueError, match="1 bytes for no symbols"):
        decode(b"x", 0, name)


def test_a_constant_costs_the_table_alone() -> None:
    for size in (1, 100_000):
        assert len(encode(np.full(size, 1234), "ans")[1]) <= 7
        assert len(encode(np.zeros(size, np.int64))[1]) == 1


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int32, np.int64, ">u2", np.uint64])
def test_integer_types_and_shapes_do_not_matter(dtype: object) -> None:
    symbols = (np.random.default_rng(3).random((40, 50)) < 0.2).astype(dtype)
    assert encode(symbols) == encode(symbols.astype(np.int64).ravel())
    assert encode(symbols.T) == encode(np.ascontiguousarray(symbols.T))
    name, data = encode(symbols)
    decoded = decode(data, 2000, name, dtype)
    assert decoded.dtype == np.dtype(dtype)
    assert np.array_equal(decoded, symbols.ravel())


def test_same_symbols_same_bytes() -> None:
    for _, symbols in named():
        assert encode(symbols) == encode(symbols.copy())


# An independent decoder of "ans", from the documented layout


def reference_ans(data: bytes, count: int) -> list[int]:
    """Table and rANS in plain integers: 24-bit probabilities, 64-bit state, 32-bit words."""
    size, precision = int.from_bytes(data[:2], "little") + 1, data[2]
    bits = "".join(f"{byte:08b}" for byte in data[3:])
    at = 0

    def golomb(order: int) -> int:
        nonlocal at
        zeros = 0
        while bits[at + zeros] == "0":
            zeros += 1
        at += zeros
        value = int(bits[at : at + zeros + order + 1], 2) - 2**order
        at += zeros + order + 1
        return value

    symbols, table, previous = [], [], -1
    for _ in range(size):
        previous += golomb(0) + 1
        symbols.append(previous)
    previous = 1
    for _ in range(size):
        previous = golomb(max(0, previous.bit_length() - 2)) + 1
        table.append(previous << (24 - precision))
    assert sum(table) == 1 << 24
    if size == 1:
        return symbols * count
    payload = data[3 + -(-at // 8) :]
    payload += bytes(-len(payload) % 4)
    words = [int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)]
    starts = [sum(table[:i]) for i in range(size)]
    owner = np.repeat(np.arange(size), table)  # of each of the 2^24 quantiles
    state, out = 0, []
    while words and state < 1 << 32:
        state = state << 32 | words.pop()
    for _ in range(count):
        quantile = state & 0xFFFFFF
        i = int(owner[quantile])
        state = (state >> 24) * table[i] + quantile - starts[i]
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
        out.append(symbols[i])
    assert state == 0
    assert not words
    return out


@pytest.mark.parametrize("seed", range(8))
def test_ans_streams_can_be_read_without_constriction(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, size = int(rng.integers(1, 200)), int(rng.integers(1, 3000))
    alphabet = rng.choice(70 if seed % 2 else 65_536, min(n, 70), replace=False)
    symbols = rng.choice(alphabet, size, p=rng.dirichlet(np.full(len(alphabet), 0.2)))
    assert reference_ans(encode(symbols, "ans")[1], size) == symbols.tolist()


# Sizes


@pytest.mark.parametrize("coder", STATIC)
@pytest.mark.parametrize("name", [name for name, _ in named()])
def test_long_streams_reach_their_entropy(coder: str, name: str) -> None:
    symbols = dict(named())[name]
    data = encode(symbols, coder)[1]
    table = frequencies.read(data)[1]
    bound = entropy_bits(symbols) / 8
    # Frequencies are as coarse as pays off, so what the table saves may be spent on the symbols.
    fine = len(frequencies._write(frequencies.Model(*_fine_model(symbols))))
    assert bound <= len(data) <= 1.001 * bound + max(table, fine) + 8


@given(sources(), st.sampled_from(STATIC))
@settings(max_examples=200)
def test_streams_are_as_long_as_their_model_says(symbols: np.ndarray, coder: str) -> None:
    if not symbols.size:
        return
    data = encode(symbols, coder)[1]
    model, table = frequencies.read(data)
    alphabet, counts = np.unique(symbols, return_counts=True)
    assert np.array_equal(model.symbols, alphabet)
    bits = float(np.sum(counts * (model.precision - np.log2(model.frequencies))))
    assert len(data) - table <= 1.005 * bits / 8 + 8  # two words of 32 bits


def _fine_model(symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    alphabet, counts = np.unique(symbols, return_counts=True)
    precision = 16 if len(alphabet) <= 4096 else 24
    return alphabet, frequencies.quantize(counts, precision), precision


def test_auto_is_the_smallest_of_all_and_ties_go_to_the_simpler() -> None:
    rng = np.random.default_rng(4)
    for top in (2, 3, 17, 256, 300, 65_536):
        for size in (1, 2, 10, 300, 4000):
            symbols = rng.integers(0, top, size) * (rng.random(size) < 0.5)
            sizes = {
                name: len(encode(symbols, name)[1])
                for name, coder in CODERS.items()
                if coder.automatic and symbols.max() < coder.alphabet
            }
            name, data = encode(symbols)
            assert len(data) == min(sizes.values())
            assert name == next(n for n, s in sizes.items() if s == len(data))


@given(sources())
def test_auto_is_never_longer_than_raw(symbols: np.ndarray) -> None:
    width = 2 if symbols.max(initial=0) > 255 else 1
    assert len(encode(symbols)[1]) <= width * symbols.size


@pytest.mark.parametrize("size", [4000, 100_000])
def test_auto_finds_repetitions(size: int) -> None:
    symbols = np.tile(np.random.default_rng(5).integers(0, 256, 500), size // 500)
    name, data = encode(symbols)
    assert name in ("zlib", "lzma")
    assert len(data) < 0.2 * size


def test_auto_leaves_noise_raw() -> None:
    assert encode(np.random.default_rng(6).integers(0, 256, 50_000))[0] == "raw"


@given(hnp.arrays(np.int64, st.integers(0, 50), elements=st.integers(-3, 5)))
def test_entropy_bits_is_shannons(symbols: np.ndarray) -> None:
    counts = np.unique(symbols, return_counts=True)[1]
    expected = symbols.size * scipy_entropy(counts, base=2) if symbols.size else 0
    assert entropy_bits(symbols) == pytest.approx(expected, abs=1e-9)


@given(hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(1, 10**6)), st.integers(0, 24))
def test_quantized_frequencies_are_positive_sum_to_a_power_and_stay_close(counts: np.ndarray, k: int) -> None:
    k = max(k, (len(counts) - 1).bit_length())
    f = frequencies.quantize(counts, k)
    assert f.min() >= 1
    assert f.sum() == 1 << k
    share = counts / counts.sum() * 2**k
    assert np.all(f <= np.maximum(share + 1, 1))
    assert np.all(
        np.diff(f[np.argsort(counts, kind="stable")]) >= np.minimum(0, np.diff(np.sort(counts)) - 1)
    )
    if share.min() >= 1:
        assert np.all(np.abs(f - share) < 1)


def test_fit_is_the_cheapest_precision() -> None:
    rng = np.random.default_rng(7)
    for size in (20, 500, 50_000):
        symbols, counts = np.unique(np.round(rng.normal(100, 10, size)).astype(np.int64), return_counts=True)

        def bits(model: frequencies.Model, table: bytes, counts: np.ndarray = counts) -> float:
            return 8 * len(table) + float(np.sum(counts * (model.precision - np.log2(model.frequencies))))

        best = min(
            bits(model, frequencies._write(model))
            for k in range((len(symbols) - 1).bit_length(), 25)
            for model in [frequencies.Model(symbols, frequencies.quantize(counts, k), k)]
        )
        assert bits(*frequencies.fit(symbols, counts)) <= best + 8  # padding to bytes


# Damaged and forged bytes


def survives(data: bytes, count: int, coder: str, dtype: object = np.uint16) -> bool:
    """Whether the bytes decode; anything but a valid array or ValueError fails the test."""
    try:
        decoded = decode(data, count, coder, dtype)
    except ValueError as error:
        assert str(error)
        return False
    assert decoded.shape == (count,)
    assert decoded.dtype == np.dtype(dtype)
    return True


@pytest.mark.parametrize("coder", CODERS)
def test_truncated_streams_are_refused_or_decode_to_something_else(coder: str) -> None:
    rng = np.random.default_rng(8)
    symbols = rng.integers(0, min(CODERS[coder].alphabet, 40), 500) * (rng.random(500) < 0.4)
    data = encode(symbols, coder)[1]
    survived = [cut for cut in range(len(data)) if survives(data[:cut], 500, coder)]
    if coder in (*STATIC, "gaps"):  # without a mark at the end, so that a checksum must stand beside
        assert not any(np.array_equal(decode(data[:cut], 500, coder), symbols) for cut in survived)
        assert len(survived) < len(data) / 2
    else:
        assert survived == []
        for extra in (b"\0", b"\1", bytes(9)):
            assert not survives(data + extra, 500, coder)
        for count in (100, 5000):
            assert not survives(data, count, coder)


@pytest.mark.parametrize("coder", CODERS)
def test_random_mutations_decode_or_raise_value_error(coder: str) -> None:
    rng = np.random.default_rng(9)
    top = min(CODERS[coder].alphabet, 300)
    for size in (1, 30, 700):
        symbols = rng.integers(0, top, size) * (rng.random(size) < 0.4)
        data = np.frombuffer(encode(symbols, coder)[1], dtype=np.uint8)
        for _ in range(150):
            mutated = data.copy()
            for place in rng.integers(0, len(data), rng.integers(1, 4)):
                mutated[place] ^= 1 << rng.integers(0, 8)
            survives(mutated.tobytes(), size, coder, rng.choice([np.uint8, np.uint16, np.int8, bool]))


@given(st.binary(max_size=60), st.integers(0, 300), st.sampled_from(list(CODERS)), st.sampled_from("?bBHq"))
@settings(max_examples=600)
def test_random_bytes_decode_or_raise_value_error(data: bytes, count: int, coder: str, dtype: str) -> None:
    survives(data, count, coder, dtype)


def bits_to_bytes(header: bytes, bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return header + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


TWO = b"\x01\x00"  # two symbols


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x01", "shorter than its header"),
        (TWO + b"\x19", "2 symbols with precision 25"),
        (TWO + b"\x00", "2 symbols with precision 0"),
        (b"\xff\xff\x0f", "65536 symbols with precision 15"),
        (b"\xff\xff\x10", "truncated"),
        (bits_to_bytes(TWO + b"\x01", "1" + "1" + "1" + "010"), "exceed"),
        (bits_to_bytes(TWO + b"\x02", "1" + "1" + "1" + "010"), "sum to 3, not to 2\\*\\*2"),
        (bits_to_bytes(TWO + b"\x01", "1" + "0" * 16 + "1" + "0" * 16 + "1" + "1"), "symbol 65536 is above"),
        (bits_to_bytes(TWO + b"\x01", "0" * 40 + "1" * 60), "a code of"),
        (bits_to_bytes(TWO + b"\x01", "1" + "1" + "1" + "1" + "0001"), "padding bits"),
        (bits_to_bytes(b"\x00\x00\x00", "1" + "1") + b"x", "1 bytes after the table of a constant"),
        (bits_to_bytes(TWO + b"\x01", "1111") + bytes(4), "invalid bytes"),
        (bits_to_bytes(TWO + b"\x01", "1111") + b"\1\1\1\1\1\1\1\1", "bytes are left"),
    ],
)
def test_forged_tables_are_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data, 5, "ans")


@pytest.mark.parametrize(
    ("data", "count", "coder", "message"),
    [
        (b"123", 2, "raw", "3 bytes for 2 symbols"),
        (b"\x11" + bytes(5), 2, "bitpack", "17 bits"),
        (b"\x04\xff\xff", 3, "bitpack", "padding bits"),
        (b"\x03" + zlib.compress(b"123"), 1, "zlib", "3 bytes per symbol"),
        (b"\x02" + zlib.compress(b"123"), 2, "zlib", "half a symbol|1 symbols"),
        (b"\x01" + zlib.compress(b"123"), 2, "zlib", "more than 2"),
        (b"\x01" + zlib.compress(b"1"), 2, "zlib", "1 symbols instead of 2"),
        (b"\x01" + zlib.compress(b"12") + b"x", 2, "zlib", "left after the end"),
        (b"\x01garbage", 2, "zlib", "invalid bytes"),
        (b"\x01garbage", 2, "lzma", "invalid bytes|truncated"),
        (b"", 2, "lzma", "0 bytes per symbol"),
        (b"", 2, "gaps", "0 symbols of 0 bits"),
        (bytes([2, 1, 5, 0]), 4, "gaps", "5 symbols of 2 bits"),
        (bytes([17, 0]), 4, "gaps", "17 bits"),
        (bytes([130, 1, 2, 2, 0b10100000]), 4, "gaps", "beyond 4 elements"),
        (bytes([130, 1, 1, 3, 0b11100000]), 9, "gaps", "beyond 9 elements"),
    ],
)
def test_forged_streams_are_refused_with_the_reason(
    data: bytes, count: int, coder: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data, count, coder)


def test_symbols_beyond_alphabet_or_dtype_are_refused() -> None:
    for coder in GENERAL:
        data = encode([0, 7, 300], coder)[1]
        assert decode(data, 3, coder, alphabet=301).tolist() == [0, 7, 300]
        with pytest.raises(ValueError, match="300, the highest allowed is 299"):
            decode(data, 3, coder, alphabet=300)
        with pytest.raises(ValueError, match="the highest allowed is 127"):
            decode(data, 3, coder, np.int8)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"unknown coder 'brotli'; allowed are 'auto', 'raw'"):
        encode([1], "brotli")
    with pytest.raises(ValueError, match=r"unknown coder 'auto'; allowed are 'raw'"):
        decode(b"", 0, "auto")
    with pytest.raises(ValueError, match="must be integers, got float64"):
        encode([0.5])
    with pytest.raises(ValueError, match=r"0\.\.65535, got -1\.\.3"):
        encode([-1, 3])
    with pytest.raises(ValueError, match=r"got 0\.\.65536"):
        encode([0, 65_536])
    with pytest.raises(ValueError, match=r"'gaps' takes symbols 0\.\.1, got 2"):
        encode([2], "gaps")
    with pytest.raises(ValueError, match="got float32"):
        decode(b"1", 1, "raw", np.float32)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        decode(b"", -1, "raw")
    with pytest.raises(ValueError, match=r"do not fit into memory|array is too big|Maximum allowed"):
        decode(b"\0", 2**60, "bitpack")


def test_bombs_do_not_take_memory() -> None:
    zeros = np.zeros(20_000_000, np.uint8)
    bombs = {coder: encode(zeros, coder)[1] for coder in ("zlib", "lzma")}
    for coder, data in bombs.items():
        assert len(data) < 30_000
        tracemalloc.start()
        with pytest.raises(ValueError, match="more than 1000"):
            decode(data, 1000, coder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


@pytest.mark.parametrize("coder", GENERAL)
def test_decoding_takes_the_result_the_data_and_little_else(coder: str) -> None:
    symbols = np.random.default_rng(10).geometric(0.3, 1_000_000).clip(max=255).astype(np.uint8)
    data = encode(symbols, coder)[1]
    tracemalloc.start()
    decode(data, symbols.size, coder, np.uint8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < symbols.size + 3 * len(data) + 4_000_000


# Gaps


def reference_gaps(mask: np.ndarray, bits: int) -> list[int]:
    symbols, zeros = [], 0
    for kept in mask:
        if kept:
            while zeros >= 2**bits - 1:
                symbols.append(2**bits - 1)
                zeros -= 2**bits - 1
            symbols.append(zeros)
            zeros = 0
        else:
            zeros += 1
    return symbols


@given(hnp.arrays(bool, st.integers(0, 300)), st.integers(1, 16) | st.none())
@settings(max_examples=200)
def test_gaps_decode_inverts_encode(mask: np.ndarray, bits: int | None) -> None:
    data = gaps_encode(mask, bits)
    assert np.array_equal(gaps_decode(data, mask.size), mask)


@pytest.mark.parametrize("bits", [1, 2, 5, 16])
def test_gap_symbols_are_those_of_the_definition(bits: int) -> None:
    mask = np.random.default_rng(11).random(4000) < 0.03
    data = gaps_encode(mask, bits)
    assert data[0] & 127 == bits
    number = int.from_bytes(data[2 : 2 + data[1]], "little")
    symbols = decode(data[2 + data[1] :], number, "bitpack" if data[0] & 128 else "ans")
    assert symbols.tolist() == reference_gaps(mask, bits)


@pytest.mark.parametrize("density", [0, 0.002, 0.05, 0.5, 1])
def test_gap_bits_are_chosen_by_bytes(density: float) -> None:
    mask = np.random.default_rng(12).random((20, 500)) < density
    data = gaps_encode(mask)
    assert len(data) == min(len(gaps_encode(mask, bits)) for bits in range(1, 17))
    assert np.array_equal(gaps_decode(data, mask.size), mask.ravel())


def test_gaps_span_chunks() -> None:
    mask = np.random.default_rng(13).random(400_000) < 0.5
    for bits in (1, 3):
        assert np.array_equal(gaps_decode(gaps_encode(mask, bits), mask.size), mask)
    lonely = np.zeros(3_000_000, bool)
    lonely[2_999_000] = True
    assert len(gaps_encode(lonely)) < 30
    assert np.array_equal(gaps_decode(gaps_encode(lonely), lonely.size), lonely)


def test_gap_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="must be boolean, got int64"):
        gaps_encode(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"1\.\.16, got 0"):
        gaps_encode(np.array([True]), 0)


# Byte planes

WORDS = {"f2": np.uint16, "f4": np.uint32, "f8": np.uint64, "u2": np.uint16}


@given(st.data(), st.sampled_from(list(WORDS)))
def test_byte_planes_invert_bit_for_bit_on_every_pattern(data: st.DataObject, dtype: str) -> None:
    special = {
        "f2": [0x8000, 0x7E01, 0xFC00],
        "f4": [0x80000000, 0x7FC00001, 0xFF800001],
        "u2": [0x8000, 0x7FC1],
    }
    word = st.integers(0, 2 ** (8 * np.dtype(dtype).itemsize) - 1) | st.sampled_from(
        special.get(dtype, [1 << 63])
    )
    words = data.draw(hnp.arrays(WORDS[dtype], hnp.array_shapes(max_dims=3, min_side=0), elements=word))
    x = words.view(dtype)
    planes = byte_planes(x)
    assert len(planes) == x.itemsize
    back = from_byte_planes(planes, x.dtype, x.shape)
    assert back.shape == x.shape
    assert np.array_equal(back.view(WORDS[dtype]), words)
    # Word by word in plain integers: sign last, everything else in order.
    width = 8 * x.itemsize
    for i, value in enumerate(words.ravel().tolist()):
        rotated = (value * 2) % 2**width + (value >> (width - 1))
        assert bytes(int(plane[i]) for plane in planes) == rotated.to_bytes(x.itemsize, "big")


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_byte_planes_take_complex_numbers_as_pairs(dtype: type) -> None:
    x = np.array([[1 + 2j, complex(math.nan, -0.0)], [complex(-math.inf, 3), 0]], dtype=dtype)
    real = np.dtype(dtype).type(0).real.dtype
    planes = byte_planes(x)
    assert all(np.array_equal(a, b) for a, b in zip(planes, byte_planes(x.view(real)), strict=True))
    back = from_byte_planes(planes, dtype, x.shape)
    assert back.tobytes() == x.tobytes()


def test_byte_planes_ignore_memory_order() -> None:
    x = np.random.default_rng(14).normal(size=(6, 4)).astype(np.float32)
    expected = byte_planes(x)
    for same in (x.astype(">f4"), np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2]):
        assert all(np.array_equal(a, b) for a, b in zip(byte_planes(same), expected, strict=True))
    assert np.array_equal(from_byte_planes(byte_planes(x.T), "f4", (4, 6)), x.T)


def test_the_exponent_stands_in_the_first_plane() -> None:
    x = np.random.default_rng(15).normal(0, 0.05, 50_000).astype(np.float32)
    planes = byte_planes(x)
    assert np.array_equal(planes[0].astype(int) - 126, np.frexp(x)[1])
    assert 2 < entropy_bits(planes[0]) / x.size < 3
    assert encode(planes[0])[0] == "ans"
    assert all(encode(plane)[0] == "raw" for plane in planes[2:])


def test_planes_that_do_not_fit_are_refused() -> None:
    x = np.zeros((2, 3), np.float32)
    planes = byte_planes(x)
    for bad in (planes[:3], [*planes[:3], planes[3][:5]], [p.astype(np.int64) for p in planes]):
        with pytest.raises(ValueError, match=r"4 times uint8 \(6,\)"):
            from_byte_planes(bad, np.float32, (2, 3))
    with pytest.raises(ValueError, match=r"4 times uint8 \(7,\)"):
        from_byte_planes(planes, np.float32, (7,))
    for dtype in (np.int32, np.uint8, bool):
        with pytest.raises(ValueError, match="byte planes: dtype must be float16"):
            byte_planes(np.zeros(3, dtype))
