"""Tucker, tensor train and canonical decompositions, and channel factors for outputs, against references."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.functional.channels import (
    damped,
    fitted_core,
    input_factor,
    output_basis,
    output_energy,
)
from lightning_compress.functional.tensors import (
    along,
    canonical,
    canonical_product,
    energy,
    tensor_train,
    train_product,
    tucker,
    tucker_product,
)

LETTERS = "abcdefgh"


def normal(*shape, seed=0, complex=True):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex else torch.float64
    return torch.randn(*shape, dtype=dtype, generator=generator)


def lost(tensor, product):
    return energy(tensor - product) / energy(tensor)


@st.composite
def shapes(draw, least=2):
    return tuple(draw(st.lists(st.integers(1, 5), min_size=least, max_size=4)))


@settings(max_examples=40)
@given(shapes(), st.booleans(), st.data())
def test_tucker(shape, complex, data):
    x = normal(*shape, complex=complex)
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True))
    full = [min(shape[a], math.prod(shape) // shape[a]) for a in axes]
    ranks = [data.draw(st.integers(1, f)) for f in full]
    core, bases = tucker(x, ranks, axes)
    letters = LETTERS[: len(shape)]
    inner = "".join(LETTERS[a].upper() if a in axes else LETTERS[a] for a in range(len(shape)))
    factors = [LETTERS[a] + LETTERS[a].upper() for a in axes]
    equation = f"{','.join([inner, *factors])}->{letters}"
    product = np.einsum(equation, core.numpy(), *[u.numpy() for u in bases])
    assert np.allclose(product, tucker_product(core, bases, axes).numpy())
    for basis, rank in zip(bases, ranks, strict=True):
        assert basis.shape[1] == rank
        assert torch.allclose(basis.mH @ basis, torch.eye(rank, dtype=x.dtype))
    error = energy(x - torch.from_numpy(product))
    assert error == pytest.approx(energy(x) - energy(core), abs=1e-9)  # orthonormal bases
    bound = 0.0  # the sum of the tails of the singular values
    for a, r in zip(axes, ranks, strict=True):
        rows = np.moveaxis(x.numpy(), a, 0).reshape(shape[a], -1)
        bound += float((np.linalg.svd(rows, compute_uv=False)[r:] ** 2).sum())
    assert error <= bound + 1e-9
    plain, start = tucker(x, ranks, axes, sweeps=0)
    assert error <= energy(x - tucker_product(plain, start, axes)) + 1e-9
    if ranks == full:
        assert error < 1e-18 * energy(x) + 1e-20


@pytest.mark.parametrize("complex", [False, True])
def test_tucker_is_not_worse_than_tensorly(complex):
    tl = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    tl.set_backend("pytorch")
    x = normal(8, 7, 6, 5, complex=complex)
    for ranks in ((4, 4, 4, 4), (2, 5, 3, 1), (8, 7, 3, 2)):
        theirs = tl.tucker_to_tensor(decomposition.tucker(x, ranks, n_iter_max=100, tol=1e-6))
        ours = tucker_product(*tucker(x, ranks, range(4), sweeps=100), range(4))
        assert lost(x, ours) <= lost(x, theirs) * 1.01


@settings(max_examples=40)
@given(shapes(), st.booleans(), st.floats(0.3, 0.999))
def test_tensor_train(shape, complex, ratio):
    x = normal(*shape, complex=complex)
    whole = tensor_train(x)
    assert lost(x, train_product(whole)) < 1e-24
    left = [math.prod(shape[:k]) for k in range(1, len(shape))]
    assert [c.shape[2] for c in whole[:-1]] == [min(n, x.numel() // n) for n in left]
    cut = tensor_train(x, energy_ratio=ratio)
    assert lost(x, train_product(cut)) <= 1 - ratio + 1e-12
    again = tensor_train(x, [c.shape[2] for c in cut[:-1]])
    assert all(torch.equal(a, b) for a, b in zip(cut, again, strict=True))
    ranks = LETTERS.upper()[: len(shape) + 1]
    factors = ",".join(ranks[k] + LETTERS[k] + ranks[k + 1] for k in range(len(shape)))
    product = np.einsum(f"{factors}->{LETTERS[: len(shape)]}", *[c.numpy() for c in cut])
    assert np.allclose(product, train_product(cut).numpy())
    more = [c.shape[2] + 1 for c in whole[:-1]]
    padded = tensor_train(x, more)
    assert [c.shape[2] for c in padded[:-1]] == more
    assert lost(x, train_product(padded)) < 1e-24


def test_tensor_train_loses_what_tensorly_loses():
    tl = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    tl.set_backend("pytorch")
    x = normal(6, 5, 4, 3)
    for ranks in ((3, 8, 2), (6, 12, 3), (1, 1, 1)):
        theirs = tl.tt_to_tensor(decomposition.tensor_train(x, (1, *ranks, 1)))
        assert lost(x, train_product(tensor_train(x, ranks))) == pytest.approx(lost(x, theirs), rel=1e-9)


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (5, 6, 4, 3)])
def test_canonical_finds_the_terms_of_a_low_rank_tensor(shape, complex):
    rank = 3
    truth = [normal(n, rank, seed=k, complex=complex) for k, n in enumerate(shape)]
    letters = LETTERS[: len(shape)]
    equation = f"{','.join(letter + 'Z' for letter in letters)}->{letters}"
    x = torch.from_numpy(np.einsum(equation, *[f.numpy() for f in truth]))
    assert torch.allclose(canonical_product(truth), x)
    factors = canonical(x, rank, sweeps=500, tolerance=1e-9)
    assert lost(x, canonical_product(factors)) < 1e-9
    norms = torch.stack([f.norm(dim=0) for f in factors])
    assert torch.allclose(norms, norms[:1].expand_as(norms))
    assert bool((norms[0].diff() <= 1e-12).all())
    assert lost(x, canonical_product(canonical(x, 1))) > 0.1


@pytest.mark.parametrize("complex", [False, True])
def test_canonical_is_not_worse_than_tensorly(complex):
    tl = pytest.importorskip("tensorly")
    decomposition = pytest.importorskip("tensorly.decomposition")
    tl.set_backend("pytorch")
    x = normal(8, 7, 5, complex=complex)
    for rank in (1, 4, 7):
        weights, factors = decomposition.parafac(x, rank, n_iter_max=100, init="svd", tol=1e-7)
        theirs = lost(x, tl.cp_to_tensor((weights, factors)))
        assert lost(x, canonical_product(canonical(x, rank, tolerance=1e-6))) <= theirs * 1.02


def test_canonical_sweeps_never_lose_more_and_repeat():
    x = normal(7, 6, 5)
    errors = [lost(x, canonical_product(canonical(x, 10, sweeps=n, tolerance=0))) for n in range(1, 12)]
    assert all(b <= a + 1e-12 for a, b in pairwise(errors))
    assert errors[-1] < errors[0]
    first, second = (
        canonical(x, 10, sweeps=3),
        canonical(x, 10, sweeps=3),
    )  # more terms than any axis has: some drawn
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], canonical(x, 10, sweeps=3, seed=1)[0])


def test_canonical_of_zeros():
    assert not canonical_product(canonical(torch.zeros(3, 4, 5), 2)).any()


def test_along_is_a_product_on_one_axis():
    x, matrix = normal(3, 4, 5), normal(6, 4, seed=1)
    assert np.allclose(along(x, matrix, 1).numpy(), np.einsum("abc,zb->azc", x.numpy(), matrix.numpy()))


@pytest.mark.parametrize(
    "decompose", [lambda x: tucker(x, [1], [0]), lambda x: canonical(x, 1), tensor_train]
)
def test_values_that_are_not_finite(decompose):
    with pytest.raises(ValueError, match="not finite"):
        decompose(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))


# -- channel factors for outputs ------------------------------------------------------------------------------


def seen(modes=6, channels=5, samples=40, seed=3, correlated=True):
    """Inputs [modes, samples, channels] and S of each mode."""
    x = normal(modes, samples, channels, seed=seed)
    if correlated:
        x = x * torch.logspace(0, -2, channels) @ normal(channels, channels, seed=seed + 1)
        x = x * torch.logspace(0, -1, modes)[:, None, None]
    return x, x.mH @ x


@pytest.mark.parametrize("real", [False, True])
def test_energies_and_output_bases_equal_those_of_the_outputs_themselves(real):
    weight, (x, metric) = normal(6, 5, 4), seen()
    outputs = (x @ weight).numpy()
    assert output_energy(weight, metric) == pytest.approx(float((abs(outputs) ** 2).sum()))
    basis, energies = output_basis(weight, metric, real)
    rows = outputs.reshape(-1, 4)
    if real:
        rows = np.concatenate([rows.real, rows.imag])
    assert np.allclose(energies.numpy(), np.linalg.svd(rows, compute_uv=False) ** 2)
    assert basis.is_complex() != real
    for r in (1, 2, 3):
        u = basis[:, :r].to(weight.dtype)
        left = output_energy(weight - weight @ u.conj() @ u.mT, metric)
        assert left == pytest.approx(float(energies[r:].sum()))


def test_fitted_core_equals_least_squares_on_the_inputs():
    weight, basis, (x, metric) = normal(6, 5, 4), normal(5, 2, seed=9), seen()
    core = fitted_core(weight, basis, metric)
    for m in range(6):
        answer = np.linalg.lstsq((x[m] @ basis).numpy(), (x[m] @ weight[m]).numpy(), rcond=None)[0]
        assert np.allclose(core[m].numpy(), answer)


@pytest.mark.parametrize("real", [False, True])
def test_input_factors_keep_more_of_the_outputs_than_the_weights_own(real):
    weight, (_, metric) = normal(6, 5, 4), seen()
    rows = weight.permute(1, 2, 0)
    rows = (torch.view_as_real(rows) if real else rows).flatten(1)
    u = torch.linalg.svd(rows, full_matrices=False)[0]
    total = output_energy(weight, metric)
    before = math.inf
    for r in range(1, 6):
        plain = u[:, :r]
        basis, core = input_factor(weight, metric, r, plain, real)
        assert basis.is_complex() != real and basis.shape == (5, r) and core.shape == (6, r, 4)
        wide = plain.to(weight.dtype)
        theirs = output_energy(weight - wide @ wide.mH @ weight, metric) / total
        ours = output_energy(weight - basis.to(weight.dtype) @ core, metric) / total
        assert ours <= theirs + 1e-12 and ours <= before + 1e-12
        assert r == 5 or ours < 0.7 * theirs
        before = ours
    assert before < 1e-12


def test_input_factors_of_white_inputs_are_those_of_the_weight():
    weight, white = normal(6, 5, 4), torch.eye(5).expand(6, 5, 5)
    u, s, _ = torch.linalg.svd(weight.permute(1, 2, 0).flatten(1), full_matrices=False)
    for r in range(1, 5):
        basis, core = input_factor(weight, white, r, u[:, :r])
        assert output_energy(weight - basis @ core, white) == pytest.approx(float(s[r:].square().sum()))


def test_damping_makes_modes_without_inputs_count_a_little():
    _, metric = seen()
    metric[2] = 0
    fit = damped(metric, 0.1)
    means = metric.diagonal(dim1=1, dim2=2).real.mean(1)
    added = fit - metric
    assert torch.allclose(added[0], 0.1 * means[0] * torch.eye(5).to(metric))
    assert torch.allclose(added[2], 1e-6 * means.mean() * torch.eye(5).to(metric))
    assert float(torch.linalg.eigvalsh(fit).min()) > 0
