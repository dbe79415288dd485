"""Every scheme there is, and which one made or fits a layer."""

from __future__ import annotations

from torch import nn

from lightning_compress.lowrank.convolutions import CONVOLUTION_SCHEMES
from lightning_compress.lowrank.factors import Factors
from lightning_compress.lowrank.matrices import MATRIX_SCHEMES
from lightning_compress.lowrank.schemes import Scheme
from lightning_compress.lowrank.spectral import REAL_SPECTRAL_SCHEMES, SPECTRAL_SCHEMES
from lightning_compress.spectral import is_factorized, is_spectral
from lightning_compress.targets import Target


def schemes(real: bool = False) -> tuple[Scheme, ...]:
    """All schemes.

    Args:
        real: real channel factors for spectral layers.

    Returns:
        Schemes of linear layers and embeddings, of convolutions, and of spectral convolutions.
    """
    spectral = REAL_SPECTRAL_SCHEMES if real else SPECTRAL_SCHEMES
    return (*MATRIX_SCHEMES, *CONVOLUTION_SCHEMES, *spectral)


def scheme_of(name: str, target: Target, real: bool) -> Scheme | None:
    """The scheme of a name for a target.

    Args:
        name: as users give it.
        target: the weight.
        real: real channel factors for spectral layers.

    Returns:
        The scheme, or None if there is none of that name for this layer.
    """
    return next((s for s in schemes(real) if s.name == name and s.fits(target) is None), None)


def maker(layer: nn.Module) -> Scheme | None:
    """The scheme that can merge what a layer holds as factors.

    Args:
        layer: any module.

    Returns:
        The scheme; None for a layer without factors.
    """
    if isinstance(layer, Factors):
        return next((s for s in schemes(real=True) if type(s).__name__ == layer.scheme), None)
    return SPECTRAL_SCHEMES[0] if is_spectral(layer) and is_factorized(layer) else None
