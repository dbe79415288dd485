"""Hashes against published values and statistics; filters against what they were given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional.hashing import bloomier_build, bloomier_read, hashed, key_of, splitmix64


def test_splitmix64_gives_the_published_sequence():
    """Outputs of the reference implementation for seed 1234567."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden) % 2**64 for i in range(5)]
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(np.array(states, dtype=np.uint64)).tolist() == expected
    assert int(splitmix64(0)) == 0xE220A8397B1DCDAF


def test_hashes_come_from_key_and_place_alone():
    a, b = hashed(key_of(1, "conv.weight"), 1000, 37), hashed(key_of(1, "conv.weight"), 400, 37)
    assert all(np.array_equal(x[:400], y) for x, y in zip(a, b, strict=True))
    later = hashed(key_of(1, "conv.weight"), 300, 37, start=700)
    assert all(np.array_equal(x[700:], y) for x, y in zip(a, later, strict=True))
    for seed, name in ((2, "conv.weight"), (1, "conv.bias")):
        other = hashed(key_of(seed, name), 1000, 37)
        assert (other[0] == a[0]).mean() < 0.1 and 0.4 < (other[1] == a[1]).mean() < 0.6


def test_buckets_and_signs_are_uniform_and_independent():
    n, buckets = 100_000, 64
    places, signs = hashed(key_of(0, "x"), n, buckets)
    counts = np.bincount(places, minlength=buckets)
    chi = float(np.square(counts - n / buckets).sum() / (n / buckets))
    assert abs(chi - (buckets - 1)) < 5 * np.sqrt(2 * buckets)
    assert abs(signs.mean()) < 5 / np.sqrt(n)
    by_bucket = np.bincount(places, signs, buckets) / np.sqrt(counts)
    assert np.abs(by_bucket).max() < 5


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 2**62), st.integers(0, 2**9 - 1), max_size=200), st.integers(9, 31))
def test_filters_know_their_keys(table, bits):
    built = bloomier_build(list(table), list(table.values()), bits)
    assert bloomier_read(built, list(table), bits).tolist() == list(table.values())
    assert len(built.slots) % 3 == 0 and (built.slots < 2**bits).all()


def test_filters_have_their_declared_size():
    built = bloomier_build(range(1000), [3] * 1000, 8)
    assert 0 <= len(built.slots) - (1230 + 32) < 3


@pytest.mark.parametrize(("values", "bits"), [(16, 11), (256, 15), (1, 3)])
def test_false_positives_are_as_rare_as_chance(values, bits):
    """Within 3 standard errors of K / 2^t over 10^5 other keys."""
    generator = np.random.default_rng(bits)
    keys = generator.choice(2**40, 20_000, replace=False)
    built = bloomier_build(keys, generator.integers(1, values + 1, len(keys)), bits)
    others = np.setdiff1d(generator.choice(2**40, 110_000, replace=False), keys)[:100_000]
    found = bloomier_read(built, others, bits)
    share, expected = ((found >= 1) & (found <= values)).mean(), values / 2**bits
    assert abs(share - expected) < 3 * np.sqrt(expected * (1 - expected) / 100_000)


def test_what_cannot_be_peeled_gets_another_seed_or_more_slots(monkeypatch):
    """Three quarters as many slots as keys never suffice: the table grows until they do."""
    from lightning_compress.functional import hashing

    monkeypatch.setattr(hashing, "_SLOTS", 0.75)
    monkeypatch.setattr(hashing, "_SPARE", 3)
    built = bloomier_build(range(300), [1] * 300, 4, seed=5)
    assert len(built.slots) > 300 and built.seed > 5 + hashing._SEEDS
    assert (bloomier_read(built, 300, 4) == 1).all()


def test_a_number_of_keys_means_the_first_ones():
    built = bloomier_build([2, 5], [7, 9], 20)
    assert bloomier_read(built, 6, 20).tolist() == bloomier_read(built, [0, 1, 2, 3, 4, 5], 20).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [0, 0], 4), "a key occurs twice"),
        (([1, 2], [0], 4), "1 values for 2 keys"),
        (([-1], [0], 4), "keys >= 0"),
        (([1], [16], 4), "4 bits hold 0 to 15"),
        (([1], [0], 32), "bits=32: allowed is 1 to 31"),
    ],
)
def test_bad_tables_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bloomier_build(*arguments)


def test_forged_tables_are_refused():
    built = bloomier_build([1], [1], 4)
    for slots in (built.slots[:0], built.slots[:4]):
        with pytest.raises(ValueError, match="multiples of three"):
            bloomier_read(built._replace(slots=slots), [1], 4)
    with pytest.raises(ValueError, match="buckets"):
        hashed(0, 3, 0)
