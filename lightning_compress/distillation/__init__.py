"""Distillation: a small model trained on the outputs of a large one, with data or without.

Reading order: `losses` (the formulas), `module` (the LightningModule), `features` and `watching` (layers inside).
"""

from lightning_compress.distillation.module import Distillation

__all__ = ["Distillation"]
