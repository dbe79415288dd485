"""The embedded Darcy solver against analytic solutions, its equation written out, and itself on finer grids."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lightning_compress.functional.darcy import darcy, solve
from lightning_compress.functional.sampling import gaussian_random_field

pytest.importorskip("scipy.sparse.linalg")


def grid(m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coordinates of cell centres and of inner nodes."""
    centres = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    nodes = torch.arange(1, m, dtype=torch.float64) / m
    return *torch.meshgrid(centres, centres, indexing="ij"), *torch.meshgrid(nodes, nodes, indexing="ij")


def constant(x, y):
    return torch.ones_like(x)


def smooth(x, y):
    return 1 + x + 2 * y**2


def sine(x, y):
    return torch.sin(math.pi * x) * torch.sin(2 * math.pi * y)


@pytest.mark.parametrize("coefficient", [constant, smooth])
def test_manufactured_solutions_converge_with_order_two(coefficient):
    errors = []
    for m in (16, 32, 64):
        *cells, x, y = grid(m)
        x, y = x.requires_grad_(), y.requires_grad_()
        u = sine(x, y)  # its forcing by automatic differentiation of -div(a grad u)
        a = coefficient(x, y)
        ux, uy = torch.autograd.grad(u.sum(), (x, y), create_graph=True)
        fx = torch.autograd.grad((a * ux).sum(), x, retain_graph=True)[0]
        fy = torch.autograd.grad((a * uy).sum(), y)[0]
        found = solve(coefficient(*cells), -(fx + fy).detach())
        errors.append(float((found - u.detach()).abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 2e-3 and all(1.9 < order < 2.1 for order in orders)


def test_axes_and_layers_in_series():
    """Coefficients that depend on one axis alone: u solves a one-dimensional problem where nothing else happens."""
    m = 32
    a = torch.ones(m, m, dtype=torch.float64)
    a[m // 2 :] = 4.0  # jumps along the first axis
    u = solve(a)
    torch.testing.assert_close(solve(a.T), u.T)
    torch.testing.assert_close(u, u.flip(1))  # symmetric along the second axis
    assert u[m // 4, m // 2] > u[-m // 4, m // 2]  # more conductive, lower pressure
    torch.testing.assert_close(solve(a, 3.0), 3 * u)
    torch.testing.assert_close(solve(7 * a), u / 7)


@pytest.mark.parametrize("m", [3, 4, 9, 24])
def test_the_discrete_equation_holds_at_every_node(m):
    generator = torch.Generator().manual_seed(m)
    a = torch.where(torch.rand(m, m, generator=generator) > 0.5, 12.0, 3.0)
    f = torch.randn(m - 1, m - 1, generator=generator, dtype=torch.float64)
    u, cells = np.zeros((m + 1, m + 1)), a.double().numpy()
    u[1:-1, 1:-1] = solve(a, f).numpy()
    for i in range(1, m):
        for j in range(1, m):
            flux = 0.0
            for di, dj, shared in (
                (1, 0, (cells[i, j - 1], cells[i, j])),
                (-1, 0, (cells[i - 1, j - 1], cells[i - 1, j])),
                (0, 1, (cells[i - 1, j], cells[i, j])),
                (0, -1, (cells[i - 1, j - 1], cells[i, j - 1])),
            ):
                flux += sum(shared) / 2 * (u[i, j] - u[i + di, j + dj])
            assert abs(flux * m**2 - float(f[i - 1, j - 1])) < 1e-8


def test_pairs_are_the_thresholded_field_and_its_solution():
    a, u = darcy(3, 12, coefficients=(5.0, 2.0), forcing=2.0, refine=2)
    field = gaussian_random_field((3, 12, 12), alpha=2.0, tau=3.0, boundary="neumann")
    assert torch.equal(a, torch.where(field >= 0, 5.0, 2.0)) and a.dtype == u.dtype == torch.float32
    fine = solve(a[1].repeat_interleave(2, 0).repeat_interleave(2, 1), 2.0)
    torch.testing.assert_close(
        u[1], fine[::2, ::2].float()
    )  # node 2 i + 1 of 24 is the centre of cell i of 12
    few, _ = darcy(2, 12, coefficients=(5.0, 2.0), refine=2)
    assert torch.equal(few, a[:2])


def test_u_is_given_at_the_cell_centres():
    """For a = 1 the solution there is known as a series."""
    x = (np.arange(16) + 0.5) / 16
    exact = sum(
        16 / (math.pi**4 * p * q * (p**2 + q**2)) * np.outer(np.sin(p * math.pi * x), np.sin(q * math.pi * x))
        for p in range(1, 60, 2)
        for q in range(1, 60, 2)
    )
    _, u = darcy(1, 16, coefficients=(1.0, 1.0), refine=8)
    assert np.abs(u[0].numpy() - exact).max() < 2e-4 * exact.max()


def test_finer_grids_agree():
    a, u = darcy(2, 24)
    again, finer = darcy(2, 24, refine=8)
    assert torch.equal(a, again)
    change = (u - finer).flatten(1).norm(dim=1) / finer.flatten(1).norm(dim=1)
    assert 0 < float(change.max()) < 0.03


def test_generators_are_used_and_the_global_one_is_not():
    state = torch.get_rng_state()
    one, _ = darcy(1, 8, generator=torch.Generator().manual_seed(1))
    other, _ = darcy(1, 8, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(one, other) and torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(1)
    parts = torch.cat([darcy(1, 8, generator=generator)[0] for _ in range(3)])
    assert torch.equal(parts, darcy(3, 8, generator=torch.Generator().manual_seed(1))[0])


@pytest.mark.parametrize(
    "options",
    [{"size": 1}, {"refine": 3}, {"refine": 0}, {"coefficients": (1.0, 0.0)}, {"forcing": math.inf}],
)
def test_numbers_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=r"refine=.*allowed: size >= 2"):
        darcy(1, **{"size": 8} | options)


def test_coefficients_that_cannot_be_solved_are_refused():
    for a in (
        torch.ones(4, 5),
        torch.ones(2, 2),
        torch.zeros(4, 4),
        torch.full((4, 4), math.nan),
        torch.tensor(1.0),
    ):
        with pytest.raises(ValueError, match="allowed is a square"):
            solve(a)
    with pytest.raises(ValueError, match=r"forcing has shape \(4, 4\).*\[3, 3\]"):
        solve(torch.ones(4, 4), torch.ones(4, 4))
