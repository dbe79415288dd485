"""The history of an evolution in TensorBoard, or in anything else that takes scalars."""

from __future__ import annotations

from typing import Any, Protocol

from lightning_compress.cgp.search.evolution import Callback, Evolution
from lightning_compress.cgp.search.settings import MILLI, PICO


class Writer(Protocol):
    """Takes scalars, as ``torch.utils.tensorboard.SummaryWriter`` does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take one."""
        ...


def log_to(writer: Writer, prefix: str = "cgp") -> Callback:
    """A callback of ``evolve`` that writes every new row of the history, at its generation.

    The two phases count errors differently, so each has a curve: ``cgp/error/phase_1`` and ``cgp/error/phase_2``. The
    others are ``cgp/energy_pj``, ``cgp/delay`` (in additions), ``cgp/depth`` and ``cgp/gate_count``.

    Args:
        writer: of TensorBoard, or any object with its ``add_scalar``; it is neither flushed nor closed.
        prefix: of all names, such as "cgp/conv2" where several circuits are evolved.

    Returns:
        A callback for one evolution; one that goes on from a state writes its earlier rows, too.

    Examples:
        >>> from types import SimpleNamespace
        >>> from lightning_compress.cgp.search.logs import log_to
        >>> from lightning_compress.cgp.search.settings import Row
        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(global_step, tag, scalar_value)
        >>> row = Row(
        ...     generation=7, phase=1, seconds=0.5, error=9, energy=30_000, delay=1000, depth=1, gate_count=1
        ... )
        >>> log_to(Printer())(SimpleNamespace(history=[row]))
        7 cgp/error/phase_1 9
        7 cgp/energy_pj 0.03
        7 cgp/delay 1.0
        7 cgp/depth 1
        7 cgp/gate_count 1
    """
    written = 0

    def callback(evolution: Evolution) -> None:
        nonlocal written
        for row in evolution.history[written:]:
            values = {
                f"error/phase_{row.phase}": row.error,
                "energy_pj": row.energy / PICO,
                "delay": row.delay / MILLI,
                "depth": row.depth,
                "gate_count": row.gate_count,
            }
            for name, value in values.items():
                writer.add_scalar(f"{prefix}/{name}", value, row.generation)
        written = len(evolution.history)

    return callback
