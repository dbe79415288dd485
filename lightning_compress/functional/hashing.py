"""Hashing: which shared value an entry has by its place alone, and small tables that know the values of some places."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_compress.functional.compiled import compiled
from lightning_compress.functional.segments import IntArray

Words = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.uint32]

MAX_BITS = 31  # of a slot
_GOLDEN = 0x9E3779B97F4A7C15
_SLOTS, _SPARE = 1.23, 32  # slots for each key, and more: from there on peeling mostly succeeds
_SEEDS, _GROWTH = 100, 1.05


def splitmix64(state: npt.ArrayLike) -> Words:
    """The output of the SplitMix64 generator in some states: 64 well mixed bits for every integer.

    Args:
        state: integers in 0 .. 2^64 - 1, of any shape.

    Returns:
        uint64, same shape.

    Examples:
        >>> hex(splitmix64(0))
        '0xe220a8397b1dcdaf'

    Source: Steele et al. 2014, Fast Splittable Pseudorandom Number Generators.
    """
    words = np.asarray(state).astype(np.uint64)
    found: Words = _mixed(np.atleast_1d(words)).reshape(words.shape)[()]
    return found


def key_of(seed: int, name: str) -> int:
    """A key for one tensor: different names get unrelated hashes from one seed.

    Args:
        seed: any integer.
        name: of the tensor.

    Returns:
        An integer in 0 .. 2^63 - 1.

    Examples:
        >>> key_of(0, "conv1.weight") != key_of(0, "conv2.weight")
        True
    """
    digest = hashlib.blake2b(
        name.encode(), digest_size=8, key=(seed % (1 << 64)).to_bytes(8, "little")
    ).digest()
    return int.from_bytes(digest, "little") >> 1


def hashed(key: int, count: int, buckets: int, start: int = 0) -> tuple[IntArray, npt.NDArray[np.int8]]:
    """Bucket and sign of n places: ``h = splitmix64(key + i g)``, ``h mod K`` and the top bit of h.

    Args:
        key: what ``key_of`` returned.
        count: n.
        buckets: K >= 1.
        start: the first place; the others follow.

    Returns:
        Buckets in 0 .. K - 1 and signs -1 or 1, both [n].

    Examples:
        >>> buckets, signs = hashed(key_of(0, "weight"), 1000, 10)
        >>> len(set(buckets.tolist())), sorted(set(signs.tolist()))
        (10, [-1, 1])

    Source: Chen et al. 2015, Compressing Neural Networks with the Hashing Trick.
    """
    if buckets < 1 or min(count, start) < 0:
        raise ValueError(f"{count} places in {buckets} buckets: allowed are >= 0 places and >= 1 buckets.")
    words = _stream(np.uint64(key), start, count)
    signs = np.where(words >> np.uint64(63), np.int8(-1), np.int8(1))
    return (words % np.uint64(buckets)).astype(np.int64), signs


class Filter(NamedTuple):
    """A Bloomier filter: slots [m] of some bits, and the seed of its hashes."""

    slots: Slots
    seed: int


def bloomier_build(keys: npt.ArrayLike, values: npt.ArrayLike, bits: int, seed: int = 0) -> Filter:
    r"""A table of t bits a slot that knows the values of some keys, and answers by chance for others.

    Every key has one slot in each third of the table and a mask of t bits; the XOR of the three slots and the mask is
    its value. Slots are filled in an order in which each key comes upon a slot that no later one needs (peeling). If
    there is no such order the next seed is tried, and after 100 of them a table that is 5 % larger.

    Args:
        keys: different integers in 0 .. 2^63 - 1, [n].
        values: one for each, 0 .. 2^t - 1.
        bits: t, 1 to 31.
        seed: of the first try.

    Returns:
        The table of ``m = ceil(1.23 n) + 32`` slots (rounded up to a multiple of three; more, if it had to grow).

    Raises:
        ValueError: a value that does not fit, keys that occur twice, or a number of bits out of range.

    Examples:
        >>> table = bloomier_build([3, 10, 400], [1, 2, 1], bits=8)
        >>> bloomier_read(table, [10, 400, 3], bits=8).tolist()
        [2, 1, 1]

    Source: Chazelle et al. 2004, The Bloomier Filter; Botelho et al. 2007, Simple and Space-Efficient Minimal Perfect
        Hash Functions; Reagen et al. 2018, Weightless.
    """
    wanted = np.asarray(keys, dtype=np.int64).reshape(-1)
    given = np.asarray(values, dtype=np.int64).reshape(-1)
    _check_bits(bits)
    if wanted.shape != given.shape or (wanted.size and int(wanted.min()) < 0):
        raise ValueError(f"{given.size} values for {wanted.size} keys: as many are needed, and keys >= 0.")
    if given.size and not 0 <= int(given.min()) <= int(given.max()) < 1 << bits:
        raise ValueError(
            f"values {int(given.min())} to {int(given.max())}: {bits} bits hold 0 to {(1 << bits) - 1}."
        )
    if len(np.unique(wanted)) != wanted.size:
        raise ValueError("a key occurs twice.")
    size = math.ceil(_SLOTS * wanted.size) + _SPARE
    tried = seed
    while True:
        third = -(-size // 3)
        for _ in range(_SEEDS):
            start = np.uint64(key_of(tried, "bloomier"))
            slots = _filled(wanted.view(np.uint64), given.astype(np.uint32), start, third, bits)
            if len(slots):
                return Filter(slots, tried)
            tried += 1
        size = math.ceil(_GROWTH * size)


def bloomier_read(table: Filter, keys: npt.ArrayLike | int, bits: int) -> Slots:
    """The value of every key that the table was built with; of any other one, any t bits.

    Args:
        table: from ``bloomier_build``.
        keys: integers >= 0; or a number n, for the keys 0 .. n - 1.
        bits: t.

    Returns:
        uint32, one for each key.

    Raises:
        ValueError: a table of no slots, or a number of bits out of range.

    Examples:
        >>> table = bloomier_build(range(0, 1000, 2), [1] * 500, bits=8)
        >>> found = bloomier_read(table, 1000, bits=8)
        >>> bool((found[::2] == 1).all()), int((found[1::2] == 1).sum()) < 10
        (True, True)
    """
    _check_bits(bits)
    third, rest = divmod(len(table.slots), 3)
    if rest or not third:
        raise ValueError(f"a table of {len(table.slots)} slots; allowed are multiples of three.")
    wanted = np.arange(keys) if isinstance(keys, int) else np.asarray(keys, dtype=np.int64).reshape(-1)
    slots = np.ascontiguousarray(table.slots, dtype=np.uint32)
    return _answers(slots, wanted.view(np.uint64), np.uint64(key_of(table.seed, "bloomier")), third, bits)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits={bits}: allowed is 1 to {MAX_BITS}.")


# -- loops ---------------------------------------------------------------------------------------------------


@compiled(inline="always")
def _mix(z: Any) -> Any:
    z = np.uint64(z)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled()
def _mixed(states: Words) -> Words:
    found = np.empty(states.shape, dtype=np.uint64)
    source, target = states.reshape(-1), found.reshape(-1)
    for i in range(len(source)):
        target[i] = _mix(source[i] + np.uint64(_GOLDEN))
    return found


@compiled()
def _stream(key: Any, start: int, count: int) -> Words:
    found = np.empty(count, dtype=np.uint64)
    for i in range(count):
        found[i] = _mix(np.uint64(key) + np.uint64(start + i + 1) * np.uint64(_GOLDEN))
    return found


@compiled(inline="always")
def _places(key: Any, start: Any, third: int, bits: int) -> Any:
    """Slots and mask of a key: parts of 32 bits choose slots, by multiplication."""
    a = _mix(np.uint64(start) + (np.uint64(key) + np.uint64(1)) * np.uint64(_GOLDEN))
    b = _mix(a + np.uint64(_GOLDEN))
    size, half, low = np.uint64(third), np.uint64(32), np.uint64(0xFFFFFFFF)
    p = ((a >> half) * size) >> half
    q = ((a & low) * size) >> half
    r = ((b >> half) * size) >> half
    mask = b & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
    return np.int64(p), np.int64(q + size), np.int64(r + size + size), np.uint32(mask)


@compiled()
def _answers(slots: Slots, keys: Words, start: Any, third: int, bits: int) -> Slots:
    found = np.empty(len(keys), dtype=np.uint32)
    for i in range(len(keys)):
        p, q, r, mask = _places(keys[i], start, third, bits)
        found[i] = slots[p] ^ slots[q] ^ slots[r] ^ mask
    return found


@compiled()
def _filled(keys: Words, values: Slots, start: Any, third: int, bits: int) -> Slots:
    """The slots, or none if the keys cannot be peeled."""
    count, size = len(keys), 3 * third
    degree = np.zeros(size, dtype=np.int32)
    marks = np.zeros(
        size, dtype=np.int64
    )  # XOR of the keys (their numbers) at a slot: the last one left is known
    for i in range(count):
        for slot in _places(keys[i], start, third, bits)[:3]:
            degree[slot] += 1
            marks[slot] ^= i
    order = np.empty(count, dtype=np.int64)
    own = np.empty(count, dtype=np.int64)
    alone = np.empty(size, dtype=np.int64)
    waiting = 0
    for slot in range(size):
        if degree[slot] == 1:
            alone[waiting] = slot
            waiting += 1
    peeled = 0
    while waiting:
        waiting -= 1
        slot = alone[waiting]
        if degree[slot] != 1:
            continue
        i = marks[slot]
        order[peeled], own[peeled] = i, slot
        peeled += 1
        for other in _places(keys[i], start, third, bits)[:3]:
            degree[other] -= 1
            marks[other] ^= i
            if degree[other] == 1:
                alone[waiting] = other
                waiting += 1
    if peeled < count:
        return np.zeros(0, dtype=np.uint32)
    slots = np.zeros(size, dtype=np.uint32)
    for place in range(count - 1, -1, -1):
        i = order[place]
        p, q, r, mask = _places(keys[i], start, third, bits)
        # The key's own slot is still zero.
        slots[own[place]] = values[i] ^ mask ^ slots[p] ^ slots[q] ^ slots[r]
    return slots
