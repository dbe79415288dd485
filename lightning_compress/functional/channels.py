"""Channel factors of weights that multiply one matrix per mode: those that keep most of the outputs.

For modes m, weights W_m [in, out] and inputs x_m, outputs are ``y_m = W_m^T x_m``. With ``S_m = sum conj(x_m) x_m^T``
over samples, the energy of an error E in the weights is ``sum_m tr(E_m^H S_m E_m) = sum |E_m^T x_m|^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.functional.factor import svd, whitening

_ROUNDS, _STEPS = 2, 5  # alternations, and steps of conjugate gradients in each
_FLOOR = 1e-6  # of the mean energy: modes that no input reached are fitted as they are


def output_energy(error: Tensor, metric: Tensor) -> float:
    """Energy of the outputs of a weight (or of an error in it): ``sum_m tr(E_m^H S_m E_m)``.

    Args:
        error: E [modes, in, out].
        metric: S [modes, in, in], Hermitian.

    Returns:
        The sum, >= 0.

    Examples:
        >>> output_energy(torch.ones(1, 2, 1), 3 * torch.eye(2)[None])
        6.0
    """
    return float((error.conj() * (metric.to(error.dtype) @ error)).sum().real)


def damped(metric: Tensor, damping: float) -> Tensor:
    """``S_m + max(damping tr(S_m), 1e-6 mean tr(S)) / n I``: never singular, also where no input was seen.

    Args:
        metric: S [modes, n, n], Hermitian, not all zeros.
        damping: >= 0.

    Returns:
        The matrices to fit with.

    Examples:
        >>> damped(torch.tensor([[[2.0]], [[0.0]]]), damping=0.5).flatten().tolist()
        [3.0, 9.999999974752427e-07]
    """
    n = metric.shape[-1]
    means = metric.diagonal(dim1=-2, dim2=-1).real.sum(-1) / n
    added = torch.maximum(damping * means, _FLOOR * means.mean())
    return metric + added[:, None, None] * torch.eye(n, dtype=metric.dtype, device=metric.device)


def output_basis(weight: Tensor, metric: Tensor, real: bool = False) -> tuple[Tensor, Tensor]:
    """Principal directions U of the outputs; ``W_m conj(U_r) U_r^T`` keeps most of their energy among all ranks r.

    Args:
        weight: W [modes, in, out].
        metric: S [modes, in, in].
        real: directions for real and imaginary parts alike.

    Returns:
        U [out, out], orthonormal columns, and the energy along each, in falling order.

    Examples:
        >>> output_basis(torch.diag(torch.tensor([1.0, 2.0]))[None], torch.eye(2)[None])[1].tolist()
        [4.0, 1.0]

    Source: Zhang et al. 2016, Accelerating Very Deep Convolutional Networks.
    """
    covariance = (weight.mH @ metric.to(weight.dtype) @ weight).sum(0).conj()
    values, vectors = torch.linalg.eigh(covariance.real if real else covariance)
    return vectors.flip(1), values.flip(0).clamp_min(0)


def fitted_core(weight: Tensor, basis: Tensor, metric: Tensor) -> Tensor:
    """Least squares for each mode: the G_m that bring ``V G_m`` closest to W_m in their outputs.

    ``G_m = (V^H S_m V)^-1 V^H S_m W_m``.

    Args:
        weight: W [modes, in, out].
        basis: V [in, r] of full column rank.
        metric: S [modes, in, in], not singular.

    Returns:
        G [modes, r, out].

    Examples:
        >>> fitted_core(torch.ones(1, 2, 1), torch.ones(2, 1), torch.eye(2)[None]).item()
        1.0
    """
    metric = metric.to(weight.dtype)
    return _fitted(basis, metric, metric @ weight)[0]


def _fitted(basis: Tensor, metric: Tensor, pulled: Tensor) -> tuple[Tensor, float]:
    """Cores for ``S W``, and the energy of the outputs that they keep."""
    wide = basis.to(pulled.dtype)
    known = wide.mH @ pulled
    core: Tensor = torch.linalg.solve(wide.mH @ (metric @ wide), known)
    return core, float((core.conj() * known).sum().real)


def input_factor(
    weight: Tensor, metric: Tensor, rank: int, plain: Tensor, real: bool = False
) -> tuple[Tensor, Tensor]:
    """One channel factor V for all modes and a core per mode, for the outputs: ``min sum |W_m - V G_m|^2_S``.

    Starts from the better of two bases: the given one, and the one that is best for ``S^(1/2) W_m`` with S the mean
    over modes and every mode weighed by its energy. Then V and G are improved in turn; the error never rises.

    Args:
        weight: W [modes, in, out].
        metric: S [modes, in, in], not singular.
        rank: columns of V.
        plain: a basis [in, r], such as the leading singular vectors of the weight.
        real: V real.

    Returns:
        V [in, r] with orthonormal columns, and G [modes, r, out].

    Examples:
        >>> weight = torch.ones(3, 4, 2).double()
        >>> basis, core = input_factor(weight, torch.eye(4).expand(3, 4, 4), 1, torch.ones(4, 1).double())
        >>> torch.allclose(basis @ core, weight)
        True
    """
    metric = metric.to(weight.dtype)
    pulled = metric @ weight
    starts = [torch.linalg.qr(given)[0] for given in (plain, _whitened(weight, metric, rank, real))]
    fits = [_fitted(basis, metric, pulled) for basis in starts]
    best = 0 if fits[0][1] >= fits[1][1] else 1
    basis, core = starts[best], fits[best][0]
    for _ in range(_ROUNDS if rank < weight.shape[1] else 0):
        basis = torch.linalg.qr(_improved(pulled, basis, core, metric))[0]
        core = _fitted(basis, metric, pulled)[0]
    return basis, core


def _whitened(weight: Tensor, metric: Tensor, rank: int, real: bool) -> Tensor:
    """Leading directions of ``S^(1/2) W_m e_m``, in the coordinates of W."""
    mean = metric.mean(0)
    root, inverse = whitening(mean.real if real else mean, damping=0.0)
    energies = metric.diagonal(dim1=-2, dim2=-1).real.sum(-1).sqrt()
    rows = (root.to(weight.dtype) @ (weight * energies[:, None, None])).permute(1, 2, 0)
    matrix = (torch.view_as_real(rows.resolve_conj()) if real and rows.is_complex() else rows).flatten(1)
    return inverse @ svd(matrix)[0][:, :rank]


def _improved(pulled: Tensor, basis: Tensor, core: Tensor, metric: Tensor) -> Tensor:
    """A better V for these G: conjugate gradients on ``sum S_m V (G_m G_m^H) = sum S_m W_m G_m^H``."""
    squares = core @ core.mH

    def kind(x: Tensor) -> Tensor:
        return x if basis.is_complex() else x.real

    def applied(v: Tensor) -> Tensor:
        return kind((metric @ v.to(core.dtype) @ squares).sum(0))

    rest = kind((pulled @ core.mH).sum(0)) - applied(basis)
    step, size = rest, rest.abs().square().sum()
    for _ in range(_STEPS):
        moved = applied(step)
        curvature = (step.conj() * moved).sum().real
        if not bool(curvature > 0):
            break
        basis = basis + (size / curvature) * step
        rest = rest - (size / curvature) * moved
        before, size = size, rest.abs().square().sum()
        step = rest + (size / before) * step
    return basis
