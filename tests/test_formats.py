"""Number formats against torch's casts, tables of all values and NumPy's log2."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_compress.functional.formats import (
    MINIFLOATS,
    log2_dequantize,
    log2_quantize,
    minifloat_dequantize,
    minifloat_quantize,
    minifloat_range,
    minifloat_round,
    power_of_two,
)

CASTS = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
FORMATS = st.tuples(st.integers(2, 8), st.integers(0, 10))
FLOATS = st.floats(width=32, allow_nan=False)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Bit patterns, so that -0.0 differs from 0.0."""
    return x.contiguous().view(torch.int32)


def all_bfloat16() -> torch.Tensor:
    """Every bfloat16 but the NaNs, which the formats do not take."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[~x.isnan()]


def a_million() -> torch.Tensor:
    """Random signs and mantissas over 76 decades, with a dense part where the 8-bit formats live."""
    generator = torch.Generator().manual_seed(1)
    place = torch.rand(1_000_000, generator=generator, dtype=torch.float64)
    decades = torch.cat([76 * place[:500_000] - 38, 14 * place[500_000:] - 9])
    x = torch.randn(1_000_000, generator=generator) * 10.0**decades
    return x.clamp(-3.4e38, 3.4e38).float()


@pytest.mark.parametrize("name", sorted(CASTS))
@pytest.mark.parametrize("values", [all_bfloat16, a_million])
def test_minifloats_are_torchs_casts_with_saturation(name, values):
    form, x = MINIFLOATS[name], values()
    top = minifloat_range(*form).max
    assert top == torch.finfo(CASTS[name]).max
    expected = x.clamp(-top, top).to(CASTS[name])
    assert torch.equal(bits(minifloat_round(x, *form)), bits(expected.float()))
    codes = minifloat_quantize(x, *form)
    integers = torch.int8 if expected.element_size() == 1 else torch.int16
    assert torch.equal(codes.to(integers), expected.view(integers))
    assert torch.equal(bits(minifloat_dequantize(codes, *form)), bits(expected.float()))


def table(exponent: int, mantissa: int, top: float) -> np.ndarray:
    """Every value >= 0 by the textbook, in the order of the codes."""
    bias = 2 ** (exponent - 1) - 1
    values = []
    for field in range(2**exponent):
        for fraction in range(2**mantissa):
            implicit = 0 if field == 0 else 1
            values.append((implicit + fraction / 2**mantissa) * 2.0 ** (max(field, 1) - bias))
    return np.array([v for v in values if v <= top])


@pytest.mark.parametrize(("name", "top"), [("e3m4", 15.5), ("e2m1", 6.0), ("e4m3", 448.0)])
def test_minifloats_are_the_nearest_entry_of_the_table_ties_to_the_even_code(name, top):
    form = MINIFLOATS[name]
    values = table(*form, top)
    assert minifloat_range(*form).max == top == values[-1]
    middles = (values[1:] + values[:-1]) / 2
    around = [np.nextafter(middles, side, dtype=np.float32) for side in (-np.inf, np.inf)]
    x = np.concatenate([values, middles, *around, np.linspace(0, 1.2 * top, 20_011)]).astype(np.float32)
    distance = np.abs(x.astype(np.float64)[:, None] - values)
    nearest = distance == distance.min(1, keepdims=True)
    odd_loses = np.where(nearest, np.arange(len(values)) % 2, 2)
    codes = odd_loses.argmin(1)
    assert np.array_equal(minifloat_quantize(torch.from_numpy(x), *form).numpy(), codes)
    assert np.array_equal(minifloat_round(torch.from_numpy(-x), *form).numpy(), -values[codes])
    assert minifloat_range(*form)[1:3] == (values[2 ** form[1]], values[1])


@given(FORMATS, st.data())
def test_minifloat_codes_are_all_used_and_come_back(form, data):
    exponent, mantissa = form
    last = int(minifloat_quantize(torch.tensor(torch.inf), *form))
    step = max(1, last // 1500)
    codes = torch.arange(data.draw(st.integers(0, step - 1)), last + 1, step, dtype=torch.int32)
    codes = torch.cat([codes, codes | 1 << (exponent + mantissa)])
    values = minifloat_dequantize(codes, *form)
    assert torch.equal(minifloat_quantize(values, *form), codes)
    assert torch.equal(bits(minifloat_round(values, *form)), bits(values))
    positive = values[: len(codes) // 2]
    assert bool((positive[1:] > positive[:-1]).all())
    with pytest.raises(ValueError, match="NaN or infinity"):
        minifloat_dequantize(torch.tensor([2 ** (1 + exponent + mantissa)]), *form)
    if form != (2, 1):
        with pytest.raises(ValueError, match="NaN or infinity"):
            minifloat_dequantize(torch.tensor([last + 1]), *form)


@given(FORMATS, arrays(np.float32, st.integers(1, 40), elements=FLOATS))
def test_minifloat_rounds_to_the_nearest_and_codes_say_the_same(form, x):
    x = torch.from_numpy(x)
    y = minifloat_round(x, *form)
    assert torch.equal(bits(minifloat_dequantize(minifloat_quantize(x, *form), *form)), bits(y))
    limits = minifloat_range(*form)
    clipped = x.double().clamp(-limits.max, limits.max)
    ulp = np.exp2(np.floor(np.log2(np.maximum(np.abs(clipped.numpy()), limits.normal))) - form[1])
    assert bool(((y.double() - clipped).abs() <= torch.from_numpy(ulp) / 2).all())
    assert torch.equal(y.signbit(), x.signbit())


@pytest.mark.parametrize("x", [torch.zeros(0), torch.tensor(0.3), torch.rand(4, 3).t(), torch.rand(6)[::2]])
def test_minifloats_of_any_shape_and_stride_leave_the_input_alone(x):
    before = x.clone()
    y = minifloat_round(x, 4, 3)
    assert torch.equal(x, before) and y.shape == x.shape
    assert torch.equal(minifloat_dequantize(minifloat_quantize(x, 4, 3), 4, 3), y)
    assert torch.equal(y, before.to(torch.float8_e4m3fn).float())


def test_minifloat_says_what_it_refuses():
    with pytest.raises(ValueError, match=r"1 of 2 values are NaN"):
        minifloat_quantize(torch.tensor([1.0, torch.nan]), 4, 3)
    for form in ((1, 3), (9, 3), (4, -1), (4, 11)):
        with pytest.raises(ValueError, match="2 to 8 exponent and 0 to 10 mantissa"):
            minifloat_range(*form)
    assert minifloat_round(torch.tensor(torch.nan), 4, 3).isnan()
    assert minifloat_round(torch.tensor([torch.inf, -torch.inf]), 5, 2).tolist() == [57344, -57344]


def test_powers_of_two_are_exact():
    exponents = np.arange(-149, 128)
    expected = np.ldexp(np.float32(1), exponents)
    assert np.array_equal(power_of_two(torch.from_numpy(exponents)).numpy(), expected)


def log2_reference(row: np.ndarray, width: int, rounding: str) -> np.ndarray:
    """The definition in float64, one value after the other."""
    w = row.astype(np.float64)
    if not w.any():
        return np.zeros_like(w)
    e_max = min(round(np.log2(np.abs(w).max())), 127)
    e_min = e_max - (2 ** (width - 1) - 2)
    out = []
    for value in w:
        a = abs(value)
        if a < 2.0 ** (e_min - 1):
            out.append(0.0)
            continue
        e = np.rint(np.log2(a))
        if rounding == "linear":
            low = int(np.floor(np.log2(a)))
            e = low if a < 1.5 * 2.0**low else low + 1
        out.append(np.sign(value) * 2.0 ** np.clip(e, e_min, e_max))
    return np.array(out)


@given(
    arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=FLOATS.filter(np.isfinite)),
    st.integers(2, 8),
    st.sampled_from(["log", "linear"]),
)
def test_log2_is_the_definition_in_numpy(rows, width, rounding):
    codes, e_max = log2_quantize(torch.from_numpy(rows), width, rounding=rounding)
    values = log2_dequantize(codes, e_max, width)
    expected = np.stack([log2_reference(row, width, rounding) for row in rows])
    assert np.array_equal(values.numpy(), expected)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= 2 ** (width - 1) - 1
    again, _ = log2_quantize(values, width, e_max, rounding)
    assert torch.equal(again, codes)
    assert torch.equal(values == 0, codes == 0) and not bool(values[codes == 0].signbit().any())


@pytest.mark.parametrize("rounding", ["log", "linear"])
def test_log2_on_a_million_values(rounding):
    rows = a_million().view(1000, 1000)
    codes, e_max = log2_quantize(rows, 8, rounding=rounding)
    values = log2_dequantize(codes, e_max, 8)
    a = rows.double().abs().numpy()
    kept = values.numpy() != 0
    low = np.floor(np.log2(a, where=kept, out=np.zeros_like(a)))
    # sqrt(2) is irrational, so comparing squares in float64 decides exactly as log2 would.
    up = (a / 2.0**low) ** 2 > 2 if rounding == "log" else a / 2.0**low >= 1.5
    inside = kept & (low >= e_max.numpy()[:, None] - 125) & (low < e_max.numpy()[:, None])
    assert inside.mean() > 0.5
    assert np.array_equal(np.log2(np.abs(values.numpy()[inside])), (low + up)[inside])


def test_log2_keeps_small_weights_within_half_an_octave():
    values = torch.tensor([[1.0, 1e-4, -1e-4, 0.0]])
    back = log2_dequantize(*log2_quantize(values, 8), 8)
    ratio = float(back[0, 1] / 1e-4)
    assert 2**-0.5 <= ratio <= 2**0.5
    assert back[0, 2] == -back[0, 1] and back[0, 3] == 0 and back[0, 0] == 1


@pytest.mark.parametrize("width", range(2, 9))
def test_log2_uses_every_exponent_it_has(width):
    levels = 2 ** (width - 1) - 1
    e_max = torch.tensor([3], dtype=torch.int32)
    codes = torch.arange(-levels, levels + 1).view(1, -1)
    values = log2_dequantize(codes, e_max, width)
    assert len(values.unique()) == 2 * levels + 1
    assert torch.equal(log2_quantize(values, width, e_max)[0].long(), codes)
    # Below the last exponent: half of it rounds up to it, less becomes zero.
    edge = 2.0 ** (3 - (levels - 1) - 1)
    close = torch.tensor([[edge, np.nextafter(np.float32(edge), np.float32(0))]])
    assert log2_quantize(close, width, e_max)[0].tolist() == [[levels, 0]]


def test_log2_extremes_stay_finite():
    rows = torch.tensor([[3.4e38, -3.4e38], [1e-45, -1e-45], [0.0, -0.0], [3.4e38, 1e-45]])
    codes, e_max = log2_quantize(rows, 4)
    values = log2_dequantize(codes, e_max, 4)
    assert e_max.tolist() == [127, -149, 0, 127]
    assert codes.tolist() == [[1, -1], [1, -1], [0, 0], [1, 0]]
    assert values.tolist() == [[2.0**127, -(2.0**127)], [2.0**-149, -(2.0**-149)], [0, 0], [2.0**127, 0]]


def test_log2_says_what_is_allowed():
    x = torch.ones(1, 1)
    for width in (1, 9):
        with pytest.raises(ValueError, match="2 to 8"):
            log2_quantize(x, width)
        with pytest.raises(ValueError, match="2 to 8"):
            log2_dequantize(x.int(), torch.zeros(1), width)
    with pytest.raises(ValueError, match="log, linear"):
        log2_quantize(x, 4, rounding="nearest")
    with pytest.raises(ValueError, match=r"code 4 at bits=3"):
        log2_dequantize(torch.tensor([[-4]]), torch.tensor([0]), 3)
