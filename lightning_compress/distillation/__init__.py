"""Distillation: a small model trained on the outputs of a large one, with data or without."""
