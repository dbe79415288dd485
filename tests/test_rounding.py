"""Compensated rounding against its definition, rounding to nearest and all combinations."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional.affine import choose_qparams, dequantize, quantize
from lightning_compress.functional.rounding import compensated_codes


def problem(seed, rows=6, inputs=10, correlation=0.9, samples=None, symmetric=True, qmax=3):
    """A weight, a correlated Gram matrix and the grid of each row."""
    generator = torch.Generator().manual_seed(seed)
    samples = samples or 4 * inputs
    x = torch.randn(samples, inputs, generator=generator)
    shared = torch.randn(samples, 1, generator=generator)
    x = (1 - correlation) ** 0.5 * x + correlation**0.5 * shared
    x = x * torch.rand(inputs, generator=generator).add(0.2)
    weight = torch.randn(rows, inputs, generator=generator)
    qmin, qmax = (-qmax, qmax) if symmetric else (0, 2 * qmax + 1)
    scale, zero_point = choose_qparams(weight.amin(1), weight.amax(1), qmin, qmax, symmetric)
    return weight, x.T @ x / samples, scale[:, None], zero_point[:, None], qmin, qmax


def output_error(weight, gram, codes, scale, zero_point):
    e = (weight - dequantize(codes, scale, zero_point)).double()
    return torch.einsum("ri,ij,rj->r", e, gram.double(), e)


def slow(weight, gram, scale, zero_point, qmin, qmax, damp=0.01, mask=None):
    """Column by column: solve for the best real values of the columns left, round the first of them."""
    g = gram.double()
    h = g + damp * g.diagonal().mean() * torch.eye(len(g), dtype=torch.float64)
    order = g.diagonal().argsort(descending=True).tolist()
    codes = torch.zeros_like(weight)
    for r, row in enumerate(weight.double()):
        fixed, errors = [], []
        for place, j in enumerate(order):
            left = order[place:]
            value = row[j]
            if fixed:
                push = torch.linalg.solve(h[left][:, left], h[left][:, fixed] @ torch.stack(errors))
                value = value + push[0]
            code = quantize(value.float(), scale[r], zero_point[r], qmin, qmax)
            if mask is not None and not mask[r, j]:
                code = zero_point[r].float()
            codes[r, j] = code
            fixed.append(j)
            errors.append((row[j] - dequantize(code.double(), scale[r], zero_point[r])).squeeze())
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_columns_follow_the_definition(symmetric, masked):
    used = 0
    for seed in range(8):
        weight, *rest = problem(seed, symmetric=symmetric)
        mask = (
            torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
        )
        codes = compensated_codes(weight, *rest, mask=mask)
        want = slow(weight, *rest, mask=mask)
        gram, scale, zero_point = rest[:3]
        nearest = quantize(weight, *rest[1:])
        if masked:
            nearest = torch.where(mask, nearest, zero_point.float())
        better = output_error(weight, gram, want, scale, zero_point) < output_error(
            weight, gram, nearest, scale, zero_point
        )
        assert torch.equal(codes, torch.where(better[:, None], want, nearest))
        used += int(better.sum())
    assert used > 24  # of 48 rows


def test_blocks_make_no_difference():
    """More columns than a block."""
    weight, *rest = problem(1, rows=2, inputs=150)
    assert torch.equal(compensated_codes(weight, *rest), slow(weight, *rest))


@given(
    st.integers(0, 10**6),
    st.floats(0, 0.999),
    st.booleans(),
    st.sampled_from([1, 3, 7]),
    st.booleans(),
    st.integers(0, 2),
)
@settings(max_examples=80)
def test_never_worse_than_nearest_and_always_on_the_grid(seed, correlation, symmetric, qmax, masked, sweeps):
    weight, gram, scale, zero_point, qmin, qmax = problem(
        seed, correlation=correlation, symmetric=symmetric, qmax=qmax, samples=7
    )
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
    codes = compensated_codes(weight, gram, scale, zero_point, qmin, qmax, mask=mask, sweeps=sweeps)
    nearest = quantize(weight, scale, zero_point, qmin, qmax)
    if masked:
        nearest = torch.where(mask, nearest, zero_point.float())
        assert torch.equal(codes[~mask], zero_point.float().expand_as(codes)[~mask])
    assert codes.dtype == torch.float32 and torch.equal(codes, codes.round())
    assert int(codes.min()) >= qmin and int(codes.max()) <= qmax
    new, old = (output_error(weight, gram, c, scale, zero_point) for c in (codes, nearest))
    assert bool((new <= old * (1 + 1e-9) + 1e-12).all())


def test_the_error_falls_by_half_on_average():
    ratios = []
    for seed in range(20):
        weight, gram, *grid = problem(seed, rows=8, inputs=32, correlation=0.8, qmax=7)
        codes = compensated_codes(weight, gram, *grid)
        nearest = quantize(weight, *grid)
        ratios.append(
            float(output_error(weight, gram, codes, *grid[:2]).sum())
            / float(output_error(weight, gram, nearest, *grid[:2]).sum())
        )
    assert np.mean(ratios) < 0.5


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=40)
def test_uncorrelated_inputs_are_rounded_to_nearest(seed, symmetric):
    weight, gram, *grid = problem(seed, symmetric=symmetric)
    for diagonal in (torch.eye(len(gram)), torch.diag(torch.rand(len(gram)))):
        for sweeps in (0, 3):
            codes = compensated_codes(weight, diagonal, *grid, sweeps=sweeps)
            assert torch.equal(codes, quantize(weight, *grid))


def test_what_a_mask_loses_is_compensated():
    """Two copies of an input: without the second weight, the first takes over its part."""
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    weight, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    codes = compensated_codes(weight, gram, torch.ones(1, 1), None, -7, 7, mask=mask, sweeps=1)
    assert codes.tolist() == [[3.0, 0.0]]
    late = torch.tensor([[2.0, 1.0]])  # the other order of columns: already at its turn
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.1]])
    assert compensated_codes(late, gram, torch.ones(1, 1), None, -7, 7, mask=mask).tolist() == [[3.0, 0.0]]


def test_dead_inputs_are_rounded_to_nearest_and_change_nothing():
    weight, gram, *grid = problem(2)
    alone = compensated_codes(weight, gram, *grid, sweeps=2)
    wide = torch.zeros(12, 12)
    places = [0, 1, 2, 4, 5, 6, 7, 8, 9, 11]
    wide[np.ix_(places, places)] = gram
    padded = torch.full((6, 12), 0.7)
    padded[:, places] = weight
    codes = compensated_codes(padded, wide, *grid, sweeps=2)
    assert torch.equal(codes[:, places], alone)
    assert torch.equal(codes[:, [3, 10]], quantize(padded, *grid)[:, [3, 10]])
    assert torch.equal(
        compensated_codes(weight, torch.zeros(10, 10), *grid, sweeps=2), quantize(weight, *grid)
    )


def test_a_scale_per_entry_is_a_scale_per_row_where_they_agree():
    weight, gram, scale, zero_point, *limits = problem(3, symmetric=False)
    per_row = compensated_codes(weight, gram, scale, zero_point, *limits, sweeps=1)
    wide = [t.expand_as(weight).contiguous() for t in (scale, zero_point)]
    assert torch.equal(compensated_codes(weight, gram, *wide, *limits, sweeps=1), per_row)
    groups = torch.cat([scale.expand(6, 5), 2 * scale.expand(6, 5)], dim=1)
    codes = compensated_codes(weight, gram, groups, zero_point, *limits)
    nearest = quantize(weight, groups, zero_point, *limits)
    new, old = (output_error(weight, gram, c, groups, zero_point).sum() for c in (codes, nearest))
    assert float(new) < float(old)


def test_sweeps_only_lower_the_error_and_end_where_no_single_step_helps():
    weight, _, *grid = problem(4, rows=10, inputs=140)
    axes, _ = torch.linalg.qr(torch.randn(140, 140))
    gram = (axes / torch.arange(1, 141)) @ axes.T  # power falls off as it does in images
    errors, codes = [], None
    for sweeps in (0, 1, 2, 50):
        codes = compensated_codes(weight, gram, *grid, sweeps=sweeps)
        errors.append(output_error(weight, gram, codes, *grid[:2]))
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-9)).all())
    assert float(errors[-1].sum()) < 0.98 * float(errors[0].sum())
    qmin, qmax = grid[2:]
    for j in range(140):
        for step in (-1, 1):
            moved = codes.clone()
            moved[:, j] = (moved[:, j] + step).clamp(qmin, qmax)
            assert bool((output_error(weight, gram, moved, *grid[:2]) >= errors[-1] * (1 - 1e-6)).all())


def test_tiny_problems_end_at_or_near_the_optimum():
    """Rows of four 3-bit weights: all 7^4 combinations are tried."""
    combinations = torch.cartesian_prod(*[torch.arange(-3.0, 4.0)] * 4)
    counts, excess = {"nearest": 0, "columns": 0, "sweeps": 0}, []
    for seed in range(60):
        weight, gram, scale, zero_point, *limits = problem(seed, rows=1, inputs=4, correlation=0.9)
        found = {
            "nearest": quantize(weight, scale, zero_point, *limits),
            "columns": compensated_codes(weight, gram, scale, zero_point, *limits),
            "sweeps": compensated_codes(weight, gram, scale, zero_point, *limits, sweeps=10),
        }
        every = output_error(weight.expand(len(combinations), 4), gram, combinations, scale, zero_point)
        best = float(every.min())
        for name, codes in found.items():
            value = float(output_error(weight, gram, codes, scale, zero_point))
            assert value >= best * (1 - 1e-9)
            counts[name] += value <= best * (1 + 1e-6)
        excess.append(value / best)
    assert counts["nearest"] < 30 < 45 <= counts["columns"] <= counts["sweeps"]  # of 60; found 23, 46, 47
    assert np.mean(excess) < 1.2


def test_the_result_does_not_depend_on_the_unit_of_the_gram():
    weight, gram, *grid = problem(5)
    want = compensated_codes(weight, gram, *grid, sweeps=1)
    for unit in (2.0**-40, 2.0**40):
        assert torch.equal(compensated_codes(weight, gram * unit, *grid, sweeps=1), want)


def test_what_is_refused():
    weight, gram, *grid = problem(0)
    singular = torch.ones(10, 10)
    for arguments, options, message in (
        ((weight, gram[:5, :5]), {}, r"weight \(6, 10\) with a Gram matrix \(5, 5\)"),
        ((weight, gram), {"mask": torch.ones(6, 9, dtype=torch.bool)}, r"mask \(6, 9\)"),
        ((weight, gram), {"damp": -1.0}, r"damp=-1.0.*>= 0"),
        ((weight, gram), {"sweeps": -1}, r"sweeps=-1.*>= 0"),
        ((weight, gram * torch.inf), {}, "infinite or NaN"),
        ((weight, singular - 2 * torch.eye(10).fill_diagonal_(0.1)), {"damp": 0.0}, "not positive definite"),
    ):
        with pytest.raises(ValueError, match=message):
            compensated_codes(*arguments, *grid, **options)
    assert compensated_codes(weight, singular, *grid).shape == weight.shape  # damping is enough
