"""Random inputs: the spectrum of the fields, and that a sample depends on nothing but seed and number."""

import math

import numpy as np
import pytest
import scipy.fft
import torch

from lightning_compress.functional.sampling import gaussian_random_field, normal


def sigma(grid: tuple[int, ...], alpha: float, tau: float, boundary: str) -> np.ndarray:
    """The formula of the specification, written with NumPy."""
    axes = [np.fft.fftfreq(n, 1 / n) if boundary == "periodic" else np.arange(n) for n in grid]
    squared = sum(k**2 for k in np.meshgrid(*axes, indexing="ij"))
    wave = (4 if boundary == "periodic" else 1) * np.pi**2 * squared
    return tau ** (alpha - len(grid) / 2) * (wave + tau**2) ** (-alpha / 2)


@pytest.mark.parametrize("boundary", ["periodic", "neumann"])
@pytest.mark.parametrize(
    ("grid", "alpha", "tau"), [((16, 16), 2.0, 3.0), ((9, 14), 1.5, 5.0), ((15,), 2.5, 7.0)]
)
def test_spectrum(boundary: str, grid: tuple[int, ...], alpha: float, tau: float) -> None:
    count = 2000
    fields = gaussian_random_field((count, *grid), alpha, tau, boundary).double().numpy()
    axes = tuple(range(1, fields.ndim))
    if boundary == "periodic":
        coefficients = np.fft.fftn(fields, axes=axes) / math.prod(grid)
    else:  # the orthonormal transform of SciPy, rescaled from the grid to [0, 1]^d
        coefficients = scipy.fft.dctn(fields, norm="ortho", axes=axes) / math.sqrt(math.prod(grid))
    measured = np.sqrt((np.abs(coefficients) ** 2).mean(0))
    expected = sigma(grid, alpha, tau, boundary)
    # One standard deviation of a mean of 2000 squares of N(0, 1) is 3 %, of its root half of that.
    assert np.abs(measured / expected - 1).ravel()[1:].max() < 0.08
    assert np.sqrt(((measured / expected - 1).ravel()[1:] ** 2).mean()) < 0.02
    assert abs((measured / expected).ravel()[1:].mean() - 1) < 0.01
    assert measured.ravel()[0] < 1e-7


@pytest.mark.parametrize("boundary", ["periodic", "neumann"])
def test_first_fields_do_not_depend_on_the_batch(boundary: str) -> None:
    few, many = (gaussian_random_field((n, 12, 10), boundary=boundary) for n in (3, 40))
    assert torch.equal(few, many[:3])
    assert few.dtype == torch.float32 and few.shape == (3, 12, 10)
    assert not torch.equal(many[0], many[1])


def test_normal_is_standard_and_independent_of_the_batch() -> None:
    few, many = normal((3, 5, 7)), normal((400, 5, 7))
    assert torch.equal(few, many[:3])
    assert abs(float(many.mean())) < 4 / math.sqrt(many.numel())
    assert abs(float(many.var()) - 1) < 4 * math.sqrt(2 / many.numel())


@pytest.mark.parametrize("draw", [normal, gaussian_random_field])
def test_generator_is_used_and_the_global_one_is_not(draw: object) -> None:
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    first, second = draw((2, 8), generator=generator), draw((2, 8), generator=generator)
    assert torch.equal(first, draw((2, 8), generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)
    assert torch.equal(draw((2, 8)), draw((2, 8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_neumann_fields_have_no_slope_at_the_border() -> None:
    field = gaussian_random_field((50, 256), alpha=3.0, boundary="neumann").double()
    border = (field[:, 1] - field[:, 0]).abs().mean()
    inside = (field[:, 1:] - field[:, :-1]).abs().mean()
    assert border < 0.05 * inside


def test_no_fields_and_bad_input() -> None:
    assert gaussian_random_field((0, 4)).shape == (0, 4)
    for arguments in (
        {"boundary": "dirichlet"},
        {"alpha": 0.0},
        {"tau": -1.0},
        {"shape": (3,)},
        {"shape": (2, 0)},
    ):
        with pytest.raises(ValueError, match=r"allowed"):
            gaussian_random_field(**{"shape": (2, 4), **arguments})
