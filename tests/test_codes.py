"""Codes: beside the weight, never in the state dict, checked against the weight before use."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress import codes
from lightning_compress.codes import Mask, same_bits


@given(
    st.lists(st.booleans(), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.complex64]),
)
def test_mask_rebuilds_the_weight_bit_for_bit(kept, dtype):
    mask = torch.tensor(kept)
    weight = torch.randn(len(kept), dtype=dtype) * mask
    weight[~mask] = 0
    code = Mask(mask)
    assert code.matches(weight)
    assert same_bits(code.rebuild(code.arrays(weight), dtype), weight)


def test_a_stale_mask_is_noticed():
    code = Mask(torch.tensor([True, False]))
    assert not code.matches(torch.tensor([1.0, 1e-30]))
    assert not code.matches(torch.tensor([1.0]))


def test_bits_never_exceed_dense_and_never_grow_with_sparsity():
    weight = torch.ones(100)
    bits = []
    for kept in range(100, -1, -1):
        mask = torch.arange(100) < kept
        bits.append(Mask(mask).bits(weight))
    assert bits[0] == 3200 and bits == sorted(bits, reverse=True) and bits[-1] == 100


def test_codes_travel_with_copies_and_never_enter_the_state_dict():
    layer = nn.Linear(2, 2)
    codes.set_mask(layer, "weight", torch.tensor([[True, False], [True, True]]))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert codes.read(twin, "weight") == codes.read(layer, "weight")
        assert codes.read(twin, "weight") is not codes.read(layer, "weight")
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [(k, p) for k, _, p, _ in codes.of(nn.Sequential(layer))] == [("0.weight", "weight")]
    codes.remove(layer, "weight")
    codes.remove(layer, "weight")
    assert not list(codes.of(layer)) and layer.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]
)
def test_same_bits(dtype):
    a = torch.tensor([0, 1]).to(dtype)
    assert (
        same_bits(a, a.clone())
        and not same_bits(a, a.flip(0))
        and same_bits(a[:0], a[:0])
        and same_bits(a[0], a[0].clone())
    )
    assert not same_bits(a, a.view(2, 1)) and not same_bits(a, torch.zeros(2, dtype=torch.int8))


def test_same_bits_tells_nan_and_signed_zero():
    nan = torch.tensor(float("nan"))
    assert same_bits(nan, nan.clone()) and not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
