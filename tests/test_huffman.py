"""The Huffman coder: an independent construction and an independent decoder, lengths, forged tables."""

import heapq
import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional.entropy import decode, encode, entropy_bits
from lightning_compress.functional.huffman import CHUNK, LONGEST, code_lengths, huffman_decode


def optimal_bits(counts: np.ndarray) -> int:
    """Sum of all merged nodes of Huffman's tree, which is its coded length; a single symbol takes none."""
    heap = [int(n) for n in counts]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        heapq.heappush(heap, merged)
        total += merged
    return total


class Bits:
    """Decoder written from the description of the format alone."""

    def __init__(self, data: bytes) -> None:
        self.text, self.at = "".join(f"{byte:08b}" for byte in data), 0

    def bit(self) -> int:
        self.at += 1
        return int(self.text[self.at - 1])

    def golomb(self, order: int) -> int:
        zeros, value = 0, 1
        while not self.bit():
            zeros += 1
        for _ in range(zeros + order):
            value = 2 * value + self.bit()
        return value - 2**order

    def align(self) -> None:
        rest = self.text[self.at : -(-self.at // 8) * 8]
        assert "1" not in rest
        self.at += len(rest)

    def symbols(self, count: int) -> tuple[list[int], int, int]:
        """Symbols, bytes of the table, bits of the codes."""
        found: list[tuple[int, int]] = []  # length, symbol
        symbol = length = 0
        while sum(2.0**-size for size, _ in found) < 1:
            v, run = self.golomb(1), self.golomb(0) + 1
            if v:
                length += (v - 1) // 2 if v % 2 else -(v // 2)
                found += [(length, s) for s in range(symbol, symbol + run)]
            symbol += run
        self.align()
        table = self.at // 8
        code, before, codes = -1, 0, {}
        for size, s in sorted(found):
            code = (code + 1) << (size - before)
            before = size
            codes[f"{code:b}".zfill(size) if size else ""] = s
        out = []
        for _ in range(count):
            word = ""
            while word not in codes:
                word += str(self.bit())
            out.append(codes[word])
        bits = self.at - 8 * table
        self.align()
        assert self.at == len(self.text)
        return out, table, bits


@st.composite
def histograms(draw: st.DrawFn) -> np.ndarray:
    """Counts: alike, very unlike, powers, Fibonacci numbers."""
    n = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["any", "small", "powers", "fibonacci", "equal"]))
    if kind == "equal":
        return np.full(n, draw(st.integers(1, 1000)))
    if kind == "fibonacci":
        values = [1, 1]
        while len(values) < n:
            values.append(values[-1] + values[-2])
        return np.array(draw(st.permutations(values[:n])))
    top = {"any": 10**6, "small": 4, "powers": 30}[kind]
    counts = draw(hnp.arrays(np.int64, n, elements=st.integers(0 if kind == "powers" else 1, top)))
    return 1 << counts if kind == "powers" else counts


@given(histograms())
@settings(max_examples=300)
def test_lengths_are_complete_and_optimal(counts: np.ndarray) -> None:
    lengths = code_lengths(counts)
    assert sum(2.0**-size for size in lengths.tolist()) == 1
    assert np.all(np.diff(lengths[np.argsort(counts, kind="stable")]) <= 0)  # what occurs more is no longer
    spent, best = int((counts * lengths).sum()), optimal_bits(counts)
    assert lengths.max() <= LONGEST
    assert spent == best or (spent > best and lengths.max() == LONGEST)


def test_codes_that_would_be_longer_than_32_bits_are_limited() -> None:
    counts = [1, 1]
    while len(counts) < 45:
        counts.append(counts[-1] + counts[-2])
    lengths = code_lengths(np.array(counts))
    assert lengths.max() == LONGEST and sum(2.0**-size for size in lengths.tolist()) == 1
    spent, best = int((np.array(counts) * lengths).sum()), optimal_bits(np.array(counts))
    assert best < spent < 1.0001 * best


def fibonacci(n: int) -> np.ndarray:
    counts = [1, 1]
    while len(counts) < n:
        counts.append(counts[-1] + counts[-2])
    return np.repeat(np.arange(n), counts)


@pytest.mark.parametrize(
    "symbols",
    [
        np.array([9]),
        np.full(1000, 65_535),
        np.array([0, 65_535] * 9),
        np.arange(65_536)[::-1],
        fibonacci(26),
        np.random.default_rng(0).permutation(fibonacci(24)) * 2500,
        np.round(np.random.default_rng(1).normal(128, 20, 5000)).astype(int),
        np.random.default_rng(2).geometric(0.001, 20_000).clip(max=65_535),
        np.arange(2 * CHUNK + 77) % 3,
    ],
    ids=["one", "constant", "two", "all", "fibonacci", "sparse", "weights", "many", "chunks"],
)
def test_streams_are_as_long_as_the_optimal_code_and_can_be_read_from_their_description(
    symbols: np.ndarray,
) -> None:
    data = encode(symbols, "huffman")[1]
    assert np.array_equal(decode(data, symbols.size, "huffman"), symbols)
    counts = np.unique(symbols, return_counts=True)[1]
    reference = Bits(data)
    head = symbols[: min(len(symbols), 10_000)]
    if len(counts) < 5000 and len(symbols) < 200_000:
        found, table, bits = reference.symbols(len(symbols))
        assert found == symbols.tolist()
        assert bits == optimal_bits(counts)
        assert len(data) == table + math.ceil(bits / 8)
    assert len(data) <= 1.005 * optimal_bits(counts) / 8 + 1.5 * len(counts) + 12
    assert len(data) * 8 < entropy_bits(symbols) + len(symbols) + 12 * len(counts) + 96
    assert decode(encode(head, "huffman")[1], len(head), "huffman").tolist() == head.tolist()


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=80), st.integers(0, 3))
@settings(max_examples=200)
def test_reference_and_decoder_agree(values: list[int], kind: int) -> None:
    symbols = [[v % 2 for v in values], [v % 40 for v in values], values, sorted(values)][kind]
    data = encode(symbols, "huffman")[1]
    assert decode(data, len(symbols), "huffman").tolist() == symbols
    found, table, bits = Bits(data).symbols(len(symbols))
    assert found == symbols
    assert bits == optimal_bits(np.unique(symbols, return_counts=True)[1])
    assert len(data) == table + -(-bits // 8)


def test_equal_counts_take_a_table_of_few_bytes() -> None:
    assert len(encode(np.arange(65_536), "huffman")[1]) <= 2 * 65_536 + 8


def bits_to_bytes(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


ABSENT, LENGTH_1, LONGER_BY_1, SHORTER_BY_1 = "10", "0101", "0101", "0100"  # v of 0, 3, 3, 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (bits_to_bytes(ABSENT + "1" + LENGTH_1), "truncated"),
        (bits_to_bytes(ABSENT + "1" + LENGTH_1 + "1"), "truncated"),  # one code of one bit
        (bits_to_bytes(LENGTH_1 + "011"), "more codes than there can be"),  # three of one bit
        (bits_to_bytes(SHORTER_BY_1 + "1"), "a code of -1 bits"),
        (bits_to_bytes("00000" + "1000101" + "1"), "a code of 33 bits"),
        (bits_to_bytes(ABSENT + "0" * 16 + "1" + "0" * 16 + LENGTH_1 + "010"), "symbol 65537 is above 65535"),
        (bits_to_bytes("0" * 40 + "1" * 60), "a code of [0-9]+ bits"),
        (bits_to_bytes(LENGTH_1 + "010" + "1") + b"\xff", "padding bits are not zero"),
        (bits_to_bytes(LENGTH_1 + "010"), "truncated, 0 bytes for 9 symbols"),
        (bits_to_bytes(LENGTH_1 + "010") + b"\0", "truncated, 1 bytes for 9 symbols"),
        (bits_to_bytes(LENGTH_1 + "010") + b"\0\1", "padding bits are not zero"),
        (bits_to_bytes(LENGTH_1 + "010") + bytes(3), "3 bytes, of which 2 are used"),
        (bits_to_bytes("11" + "1") + b"x", "1 bytes after the table of a constant"),
    ],
)
def test_forged_tables_are_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"huffman: (table: )?{message}"):
        decode(data, 9, "huffman")


@given(st.binary(max_size=80), st.integers(1, 300))
@settings(max_examples=500)
def test_random_bytes_decode_or_raise_value_error(data: bytes, count: int) -> None:
    try:
        pieces = list(huffman_decode(data, count))
    except ValueError:
        return
    assert sum(piece.size for piece in pieces) == count
