"""Flipped bits: as many as asked for, in the bits that are stored, and decoded as they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.functional.bit_errors import KINDS, Word, count_differing_bits, flip_bits, word_of
from lightning_compress.functional.formats import minifloat_dequantize
from lightning_compress.metrics import bit_error_rate, inject_bit_errors, weight_error
from lightning_compress.transform import Transform

WORDS = [
    Word(4, "complement"),
    Word(6, "modulus", exponent=5),
    Word(8, exponent=4),
    Word(3, count=5),
    Word(1, "only"),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(word: Word) -> Tensor:
    """Every value that a word can be."""
    if word.sign == "only":
        return torch.tensor([-1, 1], dtype=torch.int8)
    if word.sign == "complement":
        return torch.arange(-(1 << (word.width - 1)), 1 << (word.width - 1), dtype=torch.int8)
    if word.sign == "modulus":
        most = (1 << (word.width - 1)) - 1
        return torch.arange(-most, most + 1, dtype=torch.int8)
    return torch.arange(word.count or 1 << word.width).to(torch.uint8)


def popcount(a: Tensor, b: Tensor) -> int:
    """By NumPy, on the bytes."""
    one, two = (np.unpackbits(t.contiguous().view(torch.uint8).numpy().reshape(-1)) for t in (a, b))
    return int((one != two).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", WORDS, ids=str)
def test_rate_zero_is_the_identity(kind: str, word: Word) -> None:
    stored = values(word)
    assert torch.equal(flip_bits(stored, 0.0, kind, word=word, generator=seeded()), stored)


@pytest.mark.parametrize("rate", [0.001, 0.03])
@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_flipped_bits_is_the_rate(kind: str, rate: float) -> None:
    """Over 200 seeds; the standard error is that of their mean, whatever depends on what within one."""
    stored = torch.randn(700, generator=seeded())
    rates = [bit_error_rate(stored, flip_bits(stored, rate, kind, generator=seeded(s))) for s in range(200)]
    error = np.std(rates, ddof=1) / math.sqrt(len(rates))
    assert abs(np.mean(rates) - rate) <= 3 * error
    assert error < rate / 10


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_the_stream_join(kind: str) -> None:
    """More words than are worked on at a time."""
    stored = torch.zeros(150_000, dtype=torch.uint8)
    found = flip_bits(stored, 0.05, kind, generator=seeded(1))
    parts = [bit_error_rate(stored[i::3], found[i::3]) for i in range(3)]
    assert all(abs(p - 0.05) < 0.005 for p in parts)
    assert all(bit_error_rate(stored[a:b], found[a:b]) > 0.04 for a, b in ((0, 60_000), (131_072, 150_000)))


def test_bursts_are_runs_of_two_to_eight() -> None:
    stored = torch.zeros(400_000, dtype=torch.uint8)
    bits = np.unpackbits(flip_bits(stored, 0.002, "burst", generator=seeded()).numpy())
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bits, [0]])))
    lengths = edges[1::2] - edges[::2]
    assert lengths.min() >= 2
    assert np.mean(lengths > 8) < 0.05  # two that touch
    counts = np.bincount(lengths, minlength=9)[2:9] / len(lengths)
    assert np.all(np.abs(counts - 1 / 7) < 0.04)


def test_clusters_lie_in_windows() -> None:
    stored = torch.zeros(80_000, dtype=torch.uint8)
    bits = np.unpackbits(flip_bits(stored, 0.003, "clustered", generator=seeded()).numpy())
    shares = []
    for offset in range(64):  # at the right one windows are empty or have about 0.3
        windows = bits[offset:][: (len(bits) - offset) // 64 * 64].reshape(-1, 64).mean(1)
        shares.append((windows > 0).mean())
    assert min(shares) == pytest.approx(0.01, abs=0.004)
    assert max(shares) > 1.6 * min(shares)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 8), (torch.float16, 5), (torch.bfloat16, 8)])
def test_single_events_of_floats(dtype: torch.dtype, exponent: int) -> None:
    stored = torch.rand(60_000, generator=seeded()).to(dtype) + 1
    width = 8 * dtype.itemsize
    found = flip_bits(stored, 0.5 / width, "single_event", generator=seeded(1))
    integers = {16: torch.int16, 32: torch.int32}[width]
    xor = (stored.view(integers).long() ^ found.view(integers).long()) & ((1 << width) - 1)
    hit = xor[xor != 0]
    assert abs(len(hit) / len(stored) - 0.5) < 0.01
    places = torch.log2(hit.double())
    assert torch.equal(places, places.round())  # one bit a word
    sign = float((places == width - 1).float().mean())
    middle = float(((places < width - 1) & (places >= width - 1 - exponent)).float().mean())
    assert sign == pytest.approx(0.7, abs=0.02)
    assert middle == pytest.approx(0.15, abs=0.02)


def test_single_events_of_integers_hit_the_top_bit() -> None:
    stored = torch.zeros(50_000, dtype=torch.int8)
    found = flip_bits(stored, 1 / 4, "single_event", word=Word(4, "complement"), generator=seeded())
    assert float((found == -8).float().mean()) == pytest.approx(0.7, abs=0.01)
    assert all(float((found == v).float().mean()) == pytest.approx(0.1, abs=0.01) for v in (1, 2, 4))


@settings(max_examples=40)
@given(st.sampled_from(WORDS), st.floats(0, 1), st.integers(0, 99))
def test_entries_stay_in_their_word(word: Word, rate: float, seed: int) -> None:
    stored = values(word).repeat(5)
    found = flip_bits(stored, rate, word=word, generator=seeded(seed))
    assert set(found.tolist()) <= set(values(word).tolist()) and found.dtype == stored.dtype


@pytest.mark.parametrize("word", [w for w in WORDS if w.count is None], ids=str)
def test_flipping_all_bits_twice_gives_them_back(word: Word) -> None:
    stored = values(word)
    stored = stored[stored != 0] if word.sign == "modulus" else stored  # a negative zero has no integer
    stored = stored[stored.abs() < values(word).max()] if word.sign == "modulus" else stored
    once = flip_bits(stored, 1.0, word=word, generator=seeded())
    assert not bool((once == stored).any())
    assert torch.equal(flip_bits(once, 1.0, word=word, generator=seeded()), stored)


@settings(max_examples=30)
@given(st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.int8, torch.int64, torch.uint8]))
def test_bit_error_rate_counts_like_numpy(dtype: torch.dtype) -> None:
    a = (100 * torch.rand(50, generator=seeded())).to(dtype)
    b = flip_bits(a, 0.2, generator=seeded(3))
    bits = 8 * a.element_size() * a.numel()
    assert bit_error_rate(a, b) == popcount(a, b) / bits
    assert count_differing_bits(a, b)[1] == bits


@pytest.mark.parametrize(
    ("transform", "width"),
    [
        (lc.Quantize(4), 4),
        (lc.Quantize(1), 1),
        (lc.Quantize(6, format="log2"), 6),
        (lc.Quantize(format="e4m3"), 8),
        (lc.ShareWeights(clusters=10), 4),
        (lc.ShareWeights(clusters=16, block=2), 4 / 2),
        (lc.Prune(0.75), 32 / 4),
        (None, 32),
    ],
    ids=str,
)
def test_bits_of_a_model_are_those_that_are_stored(transform: Transform | None, width: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = net if transform is None else lc.compress(net, [transform]).model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    damaged = inject_bit_errors(model, 0.01, seed=1)
    assert damaged.bits == 2 * 64 * 64 * width
    assert abs(damaged.rate - 0.01) < 4 * math.sqrt(0.01 / damaged.bits) + (0.002 if width == 4 else 0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    changed = {k for k, v in damaged.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.weight", "2.weight"}
    assert not list(codes.of(damaged.model))
    again = inject_bit_errors(model, 0.01, seed=1)
    assert torch.equal(again.model[0].weight.view(torch.int32), damaged.model[0].weight.view(torch.int32))
    assert inject_bit_errors(model, 0.0).flipped == 0


def test_a_damaged_weight_lies_on_the_grid_of_its_code() -> None:
    model = lc.compress(nn.Linear(32, 32), [lc.Quantize(4)]).model
    scale = codes.read(model, "weight").scale  # type: ignore[union-attr]
    integers = inject_bit_errors(model, 0.1).model.weight / scale[:, None]
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert int(integers.round().min()) >= -8 and int(integers.round().max()) <= 7


def test_what_is_not_finite_is_counted_and_kept() -> None:
    net = nn.Linear(100, 100)
    damaged = inject_bit_errors(net, 0.3, seed=0)
    found = int((~torch.isfinite(damaged.model.weight)).sum())
    assert damaged.nonfinite == found > 0


@pytest.mark.parametrize(
    ("form", "dtype"), [((4, 3), torch.float8_e4m3fn), ((5, 2), torch.float8_e5m2)], ids=str
)
def test_damaged_minifloats_decode_as_the_formats_say(form: tuple[int, int], dtype: torch.dtype) -> None:
    every = torch.arange(256)
    wanted = every.to(torch.uint8).view(dtype).float()
    assert torch.equal(
        minifloat_dequantize(every, *form, special=True).nan_to_num(nan=1e9), wanted.nan_to_num(nan=1e9)
    )


def test_the_global_random_state_is_untouched() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    inject_bit_errors(torch.ones(9), 0.1)
    assert torch.equal(torch.rand(3), wanted)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="allowed: random, burst, single_event, clustered"):
        inject_bit_errors(torch.ones(3), 0.1, kind="cosmic")
    with pytest.raises(ValueError, match=r"can have 0 to 0\.03125"):
        inject_bit_errors(torch.ones(3), 0.1, kind="single_event")
    with pytest.raises(ValueError, match=r"weight: rate=0.5: .*can have 0 to 0.3"):
        inject_bit_errors(nn.Linear(2, 2), 0.5, kind="clustered")
    with pytest.raises(ValueError, match="both must be equal"):
        bit_error_rate(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"dtype torch\.bool"):
        word_of(torch.bool)
    with pytest.raises(ValueError, match="allowed: none, complement"):
        Word(4, "ones")
    with pytest.raises(ValueError, match="widths of 1 to 64"):
        Word(65)


# -- weights ---------------------------------------------------------------------------------------------------


def test_weight_error_by_hand() -> None:
    w = torch.randn(50, dtype=torch.complex64, generator=seeded())
    v = w + 0.1 * torch.randn(50, dtype=torch.complex64, generator=seeded(1))
    error = weight_error(w, v)
    a, b = w.numpy().astype(np.complex128), v.numpy().astype(np.complex128)
    ratio = (np.abs(a - b) ** 2).sum() / (np.abs(a) ** 2).sum()
    assert error.relative == pytest.approx(math.sqrt(ratio)) and error.sqnr_db == pytest.approx(
        -10 * math.log10(ratio)
    )


def test_weight_error_of_models() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert weight_error(net, net) == (math.inf, 0.0)
    half = lc.compress(net, [lc.Prune(0.5, scope="layer")]).model
    w, v = (torch.cat([m[0].weight.flatten(), m[2].weight.flatten()]) for m in (net, half))
    assert weight_error(net, half).relative == pytest.approx(
        (w - v).norm().item() / w.norm().item(), rel=1e-5
    )
    other = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert all(math.isnan(x) for x in weight_error(net, other))
    with pytest.raises(ValueError, match="two models, or two tensors"):
        weight_error(net, torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same shape"):
        weight_error(torch.ones(3), torch.ones(2))
