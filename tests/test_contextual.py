"""The adaptive coder: an independent decoder in plain Python, sizes against its own model, contexts that pay."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional.contextual import CHUNK, adaptive_decode, adaptive_encode
from lightning_compress.functional.entropy import decode, encode, entropy_bits


class Reference:
    """Decoder written from the description of the format alone; it also adds up -log2 of every probability."""

    def __init__(self, data: bytes) -> None:
        self.centre = used = 0
        while True:
            byte = data[used]
            self.centre += (byte % 128) << (7 * used)
            used += 1
            if byte < 128:
                break
        self.bytes = iter(data[used:])
        self.span, self.code, self.bits = 0xFFFFFFFF, 0, 0.0
        for _ in range(4):
            self.code = self.code * 256 + next(self.bytes, 0)
        self.edges = [27, 64, 118, 192, 299, 448, 661, 960, 1385, 1984, 2833, 4032, 5729, 8128, 11522, 16384]
        self.edges += [(24576 if c % 2 else 16384) * 2 ** (c // 2) for c in range(1, 20)]
        self.contexts: dict[int, list] = {}

    def context(self, level: int) -> list:
        if level >= 16384:
            level = level // 256 * 256
        c = sum(edge <= level for edge in self.edges)
        if c not in self.contexts:
            bounds = [0, *self.edges, 2**24]
            middle = (bounds[c] + bounds[c + 1]) // 2
            shift = max(0, (3 * middle // 256).bit_length() - 3)
            mean = max(middle >> shift, 16)
            ratio, weights = (mean << 16) // (mean + 256), [2**24]
            while len(weights) < 17:
                weights.append(weights[-1] * ratio >> 16)
            order = [weights[abs(h)] for h in range(-15, 16)] + [weights[16]]
            whole = 2**23 - 512 * 32
            table = [sum(order[: i + 1]) * whole // sum(order) + 512 * (i + 1) for i in range(32)]
            self.contexts[c] = [shift, table, 0]
        return self.contexts[c]

    def renormalize(self) -> None:
        while self.span < 2**24:
            self.span, self.code = self.span * 256, self.code * 256 + next(self.bytes, 0)

    def raw(self, bits: int) -> int:
        self.bits += bits
        self.span >>= bits
        value, self.code = divmod(self.code, self.span)
        self.renormalize()
        return value

    def symbols(self, count: int) -> list[int]:
        level, out = 0, []
        for _ in range(count):
            context = self.context(level)
            shift, table, seen = context
            unit = self.span // 2**15
            token = sum(unit * (t >> 8) <= self.code for t in table[:31])
            low = table[token - 1] >> 8 if token else 0
            width = (table[token] >> 8) - low
            assert width > 0
            self.bits += 15 - math.log2(width)
            self.code -= unit * low
            self.span = unit * width
            rate = 3 + sum(seen >= n for n in (8, 24, 56, 120))
            for i in range(31):
                goal = 512 * (i + 1) + (2**23 - 512 * 32 if i >= token else 0)
                table[i] += (goal - table[i]) >> rate
            context[2] = min(seen + 1, 120)
            self.renormalize()
            h = token - 15
            if token == 31:
                zeros = 0
                while not self.raw(1):
                    zeros += 1
                value = 1
                for _ in range(zeros + 1):
                    value = 2 * value + self.raw(1)
                h = (value - 2 + 16) * (-1 if self.raw(1) else 1)
            x = (h << shift) + (self.raw(shift) if shift else 0)
            out.append(self.centre + x)
            level += (abs(x) * 256 - level) >> 3
        return out


SOURCES = {
    "weights": lambda rng: np.round(rng.laplace(0, 2, 20_000)).astype(int) + 60,
    "fine weights": lambda rng: np.round(rng.normal(0, 300, 8_000)).astype(int) + 3000,
    "mask": lambda rng: (rng.random(20_000) < 0.03).astype(int),
    "constant": lambda rng: np.full(5_000, 9),
    "all symbols": lambda rng: rng.permutation(65_536)[:6_000],
    "extremes": lambda rng: rng.choice([0, 65_535], 3_000),
}


@pytest.mark.parametrize("name", SOURCES)
def test_streams_can_be_read_from_their_description_and_are_as_long_as_their_model_says(name: str) -> None:
    symbols = SOURCES[name](np.random.default_rng(0))
    data = encode(symbols, "adaptive")[1]
    reference = Reference(data)
    assert reference.symbols(len(symbols)) == symbols.tolist()
    assert reference.bits / 8 - 1 <= len(data) <= 1.005 * reference.bits / 8 + 8


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=60), st.integers(0, 3))
@settings(max_examples=200)
def test_reference_and_decoder_agree(values: list[int], kind: int) -> None:
    symbols = [[v % 2 for v in values], [v % 40 for v in values], values, sorted(values)][kind]
    data = encode(symbols, "adaptive")[1]
    assert decode(data, len(symbols), "adaptive").tolist() == symbols
    assert Reference(data).symbols(len(symbols)) == symbols


def test_pieces_are_one_stream() -> None:
    symbols = np.random.default_rng(1).poisson(3, 3 * CHUNK + 5).astype(np.uint8)
    data = adaptive_encode(symbols)
    pieces = list(adaptive_decode(data, symbols.size))
    assert [p.size for p in pieces] == [CHUNK, CHUNK, CHUNK, 5]
    assert np.array_equal(np.concatenate(pieces), symbols)


def test_carries_run_through_many_waiting_bytes() -> None:
    """Raw bits of all ones make bytes of 255 that wait, until a later symbol carries into them or does not."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        symbols = np.where(rng.random(4_000) < 0.9, 65_535, rng.integers(0, 65_536, 4_000)).astype(np.uint16)
        assert np.array_equal(decode(adaptive_encode(symbols), symbols.size, "adaptive"), symbols)


def test_rows_of_different_size_are_coded_below_the_entropy_of_all_together() -> None:
    rng = np.random.default_rng(2)
    sizes = np.repeat(rng.choice([0.3, 1.0, 6.0], 100), 600)
    symbols = np.round(rng.laplace(0, sizes)).astype(int) + 100
    bound = entropy_bits(symbols) / 8
    assert len(encode(symbols, "adaptive")[1]) < 0.95 * bound < len(encode(symbols, "ans")[1])


def test_short_streams_have_no_table_to_pay_for() -> None:
    symbols = np.round(np.random.default_rng(3).laplace(0, 3, 300)).astype(int) + 60
    assert len(encode(symbols, "adaptive")[1]) < len(encode(symbols, "ans")[1])
