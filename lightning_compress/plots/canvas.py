"""What every figure shares: a new Figure without pyplot, and colours that stay apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRONG, PALE = "#0072B2", "#C9D7E3"  # a pair that stays apart for colour-blind readers and in grey
SMALL = 9  # points


def figure(width: float, rows: float) -> Figure:
    """An empty figure, as tall as its rows of text need; nothing of pyplot's state is touched.

    Args:
        width: inches.
        rows: of text, a quarter of an inch each.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from lightning_compress.plots import canvas
        >>> canvas.figure(4, 10).get_size_inches().tolist()
        [4.0, 3.8]
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'lightning-compress[tensorboard]'.") from None
    return Figure(figsize=(width, 0.25 * rows + 1.3), layout="constrained")
