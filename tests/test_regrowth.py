"""Which entries are exchanged, and how many each layer keeps: by hand, by sorting, by bisection."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional.masks import count_pruned
from lightning_compress.functional.regrowth import erdos_renyi, exchange, uniform


def test_exchange_by_hand():
    weights = torch.tensor([[0.5, -0.1, 0.0], [0.0, 2.0, -0.3]])
    gradient = torch.tensor([[9.0, 0.1, 0.7], [-0.8, 9.0, 0.2]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    # 0.1 and 0.3 go; 0.8 and 0.7 are the largest gradients outside of what is left
    assert exchange(weights.abs(), gradient.abs(), mask, 2).tolist() == [
        [True, False, True],
        [True, True, False],
    ]


def test_what_went_may_come_straight_back():
    mask = torch.tensor([True, True, False])
    assert exchange(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0.0, 3.0, 1.0]), mask, 1).equal(mask)


def test_what_stays_is_no_candidate():
    """Its gradient is the largest, but it is there already: another one comes."""
    mask = torch.tensor([True, True, False, False])
    new = exchange(torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([99.0, 0.0, 1.0, 2.0]), mask, 1)
    assert new.tolist() == [True, False, False, True]


@pytest.mark.parametrize("k", [-1, 3])
def test_more_than_is_kept_cannot_be_exchanged(k):
    with pytest.raises(ValueError, match=rf"k={k} entries to exchange: allowed is 0 to 2"):
        exchange(torch.ones(4), torch.ones(4), torch.tensor([True, True, False, False]), k)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_exchange_equals_sorting(data):
    """Small whole numbers, so that there are ties; NumPy's stable sort says who goes and who comes."""
    n = data.draw(st.integers(1, 30))
    numbers = st.lists(st.integers(0, 4), min_size=n, max_size=n)
    scores, growth = (np.array(data.draw(numbers), dtype=float) for _ in range(2))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    k = data.draw(st.integers(0, int(mask.sum())))
    kept = mask.copy()
    inside = np.flatnonzero(mask)
    kept[inside[np.argsort(scores[inside], kind="stable")][:k]] = False
    outside = np.flatnonzero(~kept)
    expected = kept.copy()
    expected[outside[np.argsort(-growth[outside], kind="stable")][:k]] = True
    new = exchange(torch.tensor(scores), torch.tensor(growth), torch.tensor(mask), k)
    assert new.tolist() == expected.tolist() and new.sum() == mask.sum()


def test_erdos_renyi_by_hand():
    """3 x 3 kernels: e (16 + 8 + 3 + 3) and e (10 + 16) of 1152 + 160 entries, 131 in all at 0.9: e = 131 / 56."""
    shapes = [(16, 8, 3, 3), (10, 16)]
    assert count_pruned(0.9, 1312) == 1312 - 131
    assert erdos_renyi(shapes, 0.9) == [round(131 * 30 / 56), round(131 * 26 / 56)] == [70, 61]
    # without the kernel the density is e (16 + 8) / (16 * 8): e (24 * 9) entries, and e = 131 / (216 + 26)
    assert (
        erdos_renyi(shapes, 0.9, kernel=False) == [round(131 * 216 / 242), round(131 * 26 / 242)] == [117, 14]
    )


def test_a_layer_that_would_be_more_than_full_is_dense():
    assert erdos_renyi([(4, 4), (100, 100)], 0.5) == [16, 5008 - 16]


SHAPES = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.floats(0, 0.999))
def test_counts_add_up_exactly_and_follow_the_proportions(shapes, sparsity):
    sizes = np.array([math.prod(s) for s in shapes], dtype=float)
    total = int(sizes.sum()) - count_pruned(sparsity, int(sizes.sum()))
    least = 1.0 if total >= len(shapes) else 0.0
    for rule, weights in ((uniform, sizes), (erdos_renyi, np.array([sum(s) for s in shapes], dtype=float))):
        counts = np.array(rule(shapes, sparsity))
        assert counts.sum() == total
        assert (counts >= least).all() and (counts <= sizes).all()
        # The one factor under which clipped proportions give the total, found by bisection.
        low, high = 0.0, 2 * sizes.max() + 2
        for _ in range(200):
            middle = (low + high) / 2
            if np.clip(middle * weights, least, sizes).sum() < total:
                low = middle
            else:
                high = middle
        assert np.abs(counts - np.clip(high * weights, least, sizes)).max() <= 1 + 1e-6
