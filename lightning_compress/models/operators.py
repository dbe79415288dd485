"""Neural operators of neuraloperator with arguments that go together; their constructors are kept from printing."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from torch import nn

_MODES = (8, 8)


def _neuralop() -> Any:
    try:
        from neuralop import models
    except ImportError as error:
        raise ImportError(
            "neural operators need neuraloperator: pip install lightning-compress[operators]"
        ) from error
    return models


def fno(
    n_modes: Sequence[int] = _MODES, hidden_channels: int = 24, n_layers: int = 4, **options: Any
) -> nn.Module:
    """Fourier neural operator, one field to one field.

    Args:
        n_modes: modes per axis, which also sets the number of axes.
        hidden_channels: width.
        n_layers: Fourier blocks.
        **options: of ``neuralop.models.FNO``, such as ``in_channels``.

    Returns:
        The network.

    Raises:
        ImportError: neuraloperator is missing; names the extra.

    Examples:
        >>> fno(n_modes=(4, 4), hidden_channels=6)(torch.zeros(1, 1, 9, 12)).shape
        torch.Size([1, 1, 9, 12])

    Source: Li et al. 2021, Fourier Neural Operator for Parametric Partial Differential Equations.
    """
    given = {"in_channels": 1, "out_channels": 1, "projection_channel_ratio": 2} | options
    model: nn.Module = _neuralop().FNO(
        n_modes=tuple(n_modes), hidden_channels=hidden_channels, n_layers=n_layers, **given
    )
    return model


def tfno(
    n_modes: Sequence[int] = _MODES,
    hidden_channels: int = 24,
    n_layers: int = 4,
    rank: float = 0.5,
    **options: Any,
) -> nn.Module:
    """Fourier neural operator whose spectral weights are Tucker tensors.

    Args:
        n_modes: modes per axis.
        hidden_channels: width.
        n_layers: Fourier blocks.
        rank: share of the numbers of dense weights, in (0, 1].
        **options: of ``neuralop.models.TFNO``.

    Returns:
        The network.

    Examples:
        >>> tfno(n_modes=(4, 4), hidden_channels=6)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 1, 8, 8])

    Source: Kossaifi et al. 2024, Multi-Grid Tensorized Fourier Neural Operator.
    """
    return fno(n_modes, hidden_channels, n_layers, factorization="Tucker", rank=rank, **options)


def uno(
    n_modes: Sequence[int] = _MODES, hidden_channels: int = 16, n_layers: int = 4, **options: Any
) -> nn.Module:
    """U-shaped neural operator: one level down and up again.

    Args:
        n_modes: modes per axis of every block.
        hidden_channels: width of every block.
        n_layers: blocks, 4 or more.
        **options: of ``neuralop.models.UNO``.

    Returns:
        The network.

    Raises:
        ValueError: fewer than 4 blocks.

    Examples:
        >>> uno(n_modes=(4, 4), hidden_channels=6)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 1, 8, 8])

    Source: Rahman et al. 2023, U-NO: U-shaped Neural Operators.
    """
    if n_layers < 4:
        raise ValueError(f"n_layers={n_layers}: one level down and up needs 4 blocks or more.")
    scalings = (1.0, 0.5, *[1.0] * (n_layers - 4), 2.0, 1.0)
    given = {
        "in_channels": 1,
        "out_channels": 1,
        "lifting_channels": 2 * hidden_channels,
        "projection_channels": 2 * hidden_channels,
        "uno_out_channels": [hidden_channels] * n_layers,
        "uno_n_modes": [list(n_modes)] * n_layers,
        "uno_scalings": [[s] * len(n_modes) for s in scalings],
        "channel_mlp_skip": "linear",  # channels change, which soft gating cannot follow
    } | options
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = _neuralop().UNO(hidden_channels=hidden_channels, n_layers=n_layers, **given)
    return model


def codano(
    n_modes: Sequence[int] = _MODES,
    hidden_channels: int = 8,
    n_layers: int = 2,
    n_heads: int = 2,
    **options: Any,
) -> nn.Module:
    """Codomain-attention neural operator, every channel a variable.

    Args:
        n_modes: modes per axis of every layer.
        hidden_channels: channels of each variable.
        n_layers: attention layers.
        n_heads: heads of each.
        **options: of ``neuralop.models.CODANO``.

    Returns:
        The network.

    Examples:
        >>> codano(n_modes=(4, 4), hidden_channels=4)(torch.zeros(1, 2, 8, 8)).shape
        torch.Size([1, 2, 8, 8])

    Source: Rahman et al. 2024, Pretraining Codomain Attention Neural Operators.
    """
    given = {
        "output_variable_codimension": 1,
        "lifting_channels": 2 * hidden_channels,
        "projection_channels": 2 * hidden_channels,
        "n_modes": [list(n_modes)] * n_layers,
        "n_heads": [n_heads] * n_layers,
        "per_layer_scaling_factors": [[1] * len(n_modes)] * n_layers,
        "attention_scaling_factors": [1] * n_layers,
        "attention_token_dim": hidden_channels,
        "per_channel_attention": False,
    } | options
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = _neuralop().CODANO(
            hidden_variable_codimension=hidden_channels, n_layers=n_layers, **given
        )
    return model
