"""Penalties on singular values against closed forms, float64 autograd and finite differences; effective ranks."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional.penalties import entropy, hoyer, l1_l2, nuclear, orthogonality, scad
from lightning_compress.functional.ranks import KINDS, effective_rank, entropy_rank
from lightning_compress.functional.singular import spectra, spectrum

RULES = {
    "nuclear": nuclear,
    "entropy": entropy,
    "entropy-softmax": functools.partial(entropy, distribution="softmax"),
    "l1_l2": l1_l2,
    "l1_l2-squared": functools.partial(l1_l2, squared=True),
    "hoyer": hoyer,
    "scad": functools.partial(scad, lam=0.7),
}
SHAPES = [(4, 7), (7, 4), (5, 5), (1, 6)]


def closed_form(name: str, s: list[float]) -> float:
    """Every penalty again, in plain Python."""
    l1, l2 = sum(s), math.sqrt(sum(x * x for x in s))
    if name.startswith("entropy"):
        raw = [math.exp(x) for x in s] if name.endswith("softmax") else s
        return -sum(x / sum(raw) * math.log(x / sum(raw)) for x in raw if x)
    if name == "scad":
        lam, a = 0.7, 3.7
        return sum(
            lam * x
            if x <= lam
            else (2 * a * lam * x - x * x - lam * lam) / (2 * (a - 1))
            if x <= a * lam
            else (a + 1) * lam * lam / 2
            for x in s
        )
    root = math.sqrt(len(s))
    values = {"nuclear": l1, "l1_l2": l1 / l2, "l1_l2-squared": (l1 / l2) ** 2}
    return values[name] if name in values else 1 - (root - l1 / l2) / (root - 1)


def by_hand(name, sigma):
    """The same from torch operations, for autograd."""
    if name.startswith("entropy"):
        p = sigma.softmax(-1) if name.endswith("softmax") else sigma / sigma.sum()
        return -(p * p.log()).sum()
    if name == "scad":
        lam, a = 0.7, 3.7
        middle = (2 * a * lam * sigma - sigma**2 - lam**2) / (2 * (a - 1))
        top = torch.full_like(sigma, (a + 1) * lam**2 / 2)
        return torch.where(sigma <= lam, lam * sigma, torch.where(sigma <= a * lam, middle, top)).sum()
    ratio, root = sigma.sum() / sigma.square().sum().sqrt(), math.sqrt(len(sigma))
    return {"nuclear": sigma.sum(), "l1_l2": ratio, "l1_l2-squared": ratio**2}.get(
        name, (ratio - 1) / max(root - 1, 1e-300)
    )


def gradient(rule, weight):
    found = spectrum(weight)
    return found.compose(rule(found.sigma)[1])


def with_singular_values(values, m, n, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, k, generator=g, dtype=dtype))[0] for k in (m, n))
    s = torch.zeros(m, n, dtype=dtype)
    s.diagonal().copy_(torch.tensor(values, dtype=torch.float64))
    return u @ s @ v.mH


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_form_on_a_diagonal_matrix(name, dtype):
    found = spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=dtype)))
    assert found.sigma.tolist() == pytest.approx([3, 2, 1, 0], abs=1e-12)
    value, slope = RULES[name](found.sigma)
    assert float(value) == pytest.approx(closed_form(name, [3.0, 2.0, 1.0, 0.0]), rel=1e-12)
    assert slope[3] == 0 and torch.isfinite(slope).all()


def test_hand_values():
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert float(nuclear(sigma)[0]) == 6
    assert float(l1_l2(sigma, squared=True)[0]) == pytest.approx(36 / 14)
    assert float(hoyer(sigma)[0]) == pytest.approx(6 / math.sqrt(14) - 1)
    assert float(entropy(sigma)[0]) == pytest.approx(0.5 * math.log(2) + math.log(3) / 3 + math.log(6) / 6)
    assert float(scad(sigma, lam=1.0)[0]) == pytest.approx((22.2 - 10) / 5.4 + (14.8 - 5) / 5.4 + 1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_equals_float64_autograd(name, shape, dtype):
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()
    if min(shape) == 1 and name == "hoyer":
        assert not gradient(hoyer, weight.detach()).any()  # one singular value leaves nothing to choose
        return
    (expected,) = torch.autograd.grad(by_hand(name, torch.linalg.svdvals(weight)), weight)
    torch.testing.assert_close(gradient(RULES[name], weight.detach()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_of_equal_singular_values_equals_finite_differences(name, dtype):
    weight = with_singular_values([2.0, 2.0, 1.0, 1.0], 4, 6, dtype=dtype)
    rule, h = RULES[name], 1e-5
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        way = torch.randn(4, 6, generator=g, dtype=dtype)
        up, down = (float(rule(torch.linalg.svdvals(weight + sign * h * way))[0]) for sign in (1, -1))
        along = float((gradient(rule, weight) * way.conj()).real.sum())
        assert along == pytest.approx((up - down) / (2 * h), abs=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(8, 40), (40, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_gradient_of_an_ill_conditioned_32_bit_weight_equals_float64_autograd(name, shape, dtype):
    """The way through the Gram matrix: singular values over five decades, two of them equal."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = [3.0, 1.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 3e-5]
    weight = with_singular_values(values, *shape, dtype=wide).to(dtype)
    exact = weight.to(wide).requires_grad_()
    sigma = torch.linalg.svdvals(exact)
    (slope,) = torch.autograd.grad(by_hand(name, s := sigma.detach().requires_grad_()), s)
    u, _, vh = torch.linalg.svd(exact.detach(), full_matrices=False)
    expected = (u * slope) @ vh
    assert torch.allclose(spectrum(weight).sigma, sigma.detach(), rtol=1e-7, atol=0)
    close = expected.abs().max() * 1e-6
    torch.testing.assert_close(gradient(RULES[name], weight), expected, rtol=0, atol=float(close))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_a_singular_value_of_zero_takes_the_subgradient_zero(name, dtype):
    weight = torch.zeros(4, 6, dtype=dtype)
    weight[0, 0], weight[1, 1] = 3.0, 1.0
    found = gradient(RULES[name], weight)
    assert torch.isfinite(found).all() and not found[2:].any() and not found[:, 2:].any()
    assert not gradient(RULES[name], torch.zeros(2, 3, 5, dtype=dtype)).any()


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    scale=st.floats(-20, 20),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.complex64, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_spectrum_is_a_singular_value_decomposition(m, n, scale, seed, dtype):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    scale = scale / 5 if dtype == torch.float16 else scale
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(2, m, n, generator=g, dtype=wide) * 2.0**scale).to(dtype)
    left, sigma, right = spectrum(weight)
    assert left.dtype == wide and sigma.dtype == torch.float64
    exact = torch.linalg.svdvals(weight.to(wide))
    top = exact[:, :1]
    assert ((sigma - exact).abs() <= 1e-9 * top + 1.1 * exact * (exact <= 3e-7 * top)).all()
    eye = torch.eye(min(m, n), dtype=wide).expand(2, -1, -1)
    good = (sigma > 1e-4 * top).to(wide)
    torch.testing.assert_close(left.mH @ left, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close((right @ right.mH) * good[:, None], eye * good[:, None], rtol=0, atol=1e-7)
    again = spectrum(weight).compose(sigma)
    assert ((again - weight.to(wide)).abs() <= 1e-6 * top[..., None]).all()


def test_matrices_of_many_shapes_come_out_as_each_by_itself():
    g = torch.Generator().manual_seed(1)
    single, double, complex_ = torch.float32, torch.float64, torch.complex64
    kinds = [(1, 3, 5, single), (2, 3, 5, single), (1, 5, 3, single), (3, 3, 5, complex_)]
    kinds += [(1, 3, 5, double), (2, 3, 5, double)]
    many = {str(i): torch.randn(*k[:3], generator=g, dtype=k[3]) for i, k in enumerate(kinds)}
    found = spectra(many)
    assert list(found) == list(many)
    for name, matrix in many.items():
        for a, b in zip(found[name], spectrum(matrix), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert found[name].sigma.shape == (len(matrix), 3)
    assert spectra({}) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_that_are_not_finite_name_the_matrix(bad):
    broken = torch.ones(1, 2, 3)
    broken[0, 1, 1] = bad
    with pytest.raises(ValueError, match=r"1 of 6 entries of net\.2\.weight are not finite"):
        spectra({"net.0.weight": torch.ones(1, 2, 3), "net.2.weight": broken})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_orthogonality_equals_autograd_and_vanishes_for_orthonormal_factors(dtype):
    g = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, 7, generator=g, dtype=dtype).requires_grad_()
    second = torch.randn(2, 5, 3, generator=g, dtype=dtype).requires_grad_()
    eye = torch.eye(3, dtype=dtype)
    off = (first @ first.mH - eye).abs().square() + (second.mH @ second - eye).abs().square()
    expected = torch.autograd.grad(off.sum() / 9, (first, second))
    value, *found = orthogonality(first.detach(), second.detach())
    assert value.sum().item() == pytest.approx(off.sum().item() / 9)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    q, p = torch.linalg.qr(first.detach()[0].mH)[0].mH, torch.linalg.qr(second.detach()[0])[0]
    value, to_first, to_second = orthogonality(q, p)
    assert max(float(value), float(to_first.abs().max()), float(to_second.abs().max())) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: entropy(s, distribution="gumbel"), "distribution='gumbel' is unknown"),
        (lambda s: scad(s, lam=0.0), "lam > 0"),
        (lambda s: scad(s, lam=1.0, a=2.0), "a > 2"),
    ],
)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3))


def test_effective_ranks_by_hand_and_by_numpy():
    sigma = np.array([4.0, 2.0, 1.0, 1.0])
    weight = with_singular_values(sigma.tolist(), 4, 6).float()
    p = sigma / sigma.sum()
    assert effective_rank(weight) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert effective_rank(weight, "energy", 0.9) == 2  # 20 of 22
    assert effective_rank(weight, "energy") == 4 and effective_rank(weight, "energy", 1.0) == 4
    assert effective_rank(weight, "stable") == pytest.approx(22 / 16, rel=1e-6)
    thin = torch.randn(8, 3) @ torch.randn(3, 4)
    assert effective_rank(thin, "numerical") == 3 == np.linalg.matrix_rank(thin.numpy())
    assert effective_rank(torch.eye(5)) == pytest.approx(5) and effective_rank(torch.eye(5), "stable") == 5


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 50), power=st.integers(-10, 10))
@settings(max_examples=20, deadline=None)
def test_effective_rank_lies_between_1_and_full_rank_and_knows_no_scale(kind, seed, power):
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    found = effective_rank(weight, kind)
    assert 1 <= found <= 4 + 1e-9
    assert effective_rank(weight * 2.0**power, kind) == pytest.approx(found)
    assert effective_rank(torch.view_as_complex(torch.stack([weight, weight], -1)), kind) == pytest.approx(
        found
    )
    assert effective_rank(torch.zeros(3, 4), kind) == 0


def test_entropy_rank_counts_equal_values_and_is_batched():
    sigma = torch.tensor([[1.0, 1.0, 1.0, 0.0], [7.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert entropy_rank(sigma).tolist() == pytest.approx([3, 1, 0])


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (
            torch.eye(2),
            {"kind": "nuclear"},
            "kind='nuclear' is unknown; allowed: entropy, energy, stable, num",
        ),
        (torch.eye(2), {"kind": "energy", "energy_ratio": 0.0}, "energy_ratio=0.0"),
        (torch.ones(3), {}, r"shape \(3,\) is no matrix"),
        (torch.full((2, 2), math.nan), {}, "not finite"),
    ],
)
def test_effective_rank_refuses(weight, options, message):
    with pytest.raises(ValueError, match=message):
        effective_rank(weight, **options)
