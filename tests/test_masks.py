"""Mask functions against NumPy's stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_compress.functional.masks import (
    apply_mask_,
    count_pruned,
    pack_bits,
    row_mask,
    topk_mask,
    unpack_bits,
)

SCORES = st.lists(
    arrays(np.float32, st.integers(0, 12), elements=st.sampled_from([-np.inf, 0.0, 1.0, 1.5, 2.0, 3.0])),
    min_size=1,
    max_size=4,
)


def lowest_by_sorting(scores: list[np.ndarray], k: int) -> np.ndarray:
    flat = np.concatenate(scores)
    keep = np.ones(flat.size, bool)
    keep[np.argsort(flat, kind="stable")[:k]] = False
    return keep


@given(SCORES, st.floats(0, 1))
def test_topk_mask_equals_a_stable_sort(scores, share):
    k = count_pruned(share, sum(s.size for s in scores))
    masks = topk_mask([torch.from_numpy(s) for s in scores], k)
    assert np.array_equal(np.concatenate([m.numpy() for m in masks]), lowest_by_sorting(scores, k))


def test_topk_mask_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        topk_mask([torch.tensor([1.0, float("nan")])], 1)
    with pytest.raises(ValueError, match="allowed is 0 to 2"):
        topk_mask([torch.zeros(2)], 3)


@given(arrays(np.float32, (3, 5), elements=st.sampled_from([0.0, 1.0, 2.0])), st.integers(0, 5))
def test_row_mask_equals_a_stable_sort_of_every_row(scores, k):
    for axis, rows in ((0, scores), (1, np.ascontiguousarray(scores.T))):
        mask = row_mask(torch.from_numpy(rows), k, axis).numpy()
        mask = mask if axis == 0 else mask.T
        assert np.array_equal(mask, np.stack([lowest_by_sorting([row], k) for row in scores]))


@given(arrays(np.bool_, st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_packed_masks_come_back(mask):
    tensor = torch.from_numpy(mask)
    packed = pack_bits(tensor)
    assert packed.numel() == (mask.size + 7) // 8
    assert torch.equal(unpack_bits(packed, mask.shape), tensor)


def test_unpacking_a_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 are needed"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), (9,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_masked_entries_are_plus_zero_and_others_untouched(dtype):
    weight = torch.tensor([-1.0, 2.0, -3.0], dtype=dtype)
    apply_mask_(weight, torch.tensor([False, True, False]))
    assert weight.tolist() == [0, 2, 0]
    real = torch.view_as_real(weight) if weight.is_complex() else weight
    assert not torch.signbit(real).any()


def test_infinite_weights_become_zero_too():
    weight = torch.tensor([float("inf"), float("nan")])
    apply_mask_(weight, torch.tensor([False, False]))
    assert weight.tolist() == [0.0, 0.0]
