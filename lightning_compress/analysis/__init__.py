"""What a model can bear: every technique measured on it, the trade-off, and the files to choose from.

Reading order: `rows` and `outcome` (what is found), `techniques` and `combined` (what is tried), `inputs` and `bare`
(what it starts from), `judge` and `workshop` (how a row is made), `sweep` (``analyze``), `quick`, `layers`, `result`,
`flips`.
"""

from lightning_compress.analysis.flips import bit_error_curve
from lightning_compress.analysis.layers import sensitivity
from lightning_compress.analysis.quick import Quick, quick
from lightning_compress.analysis.result import Analysis, write_report
from lightning_compress.analysis.sweep import analyze

__all__ = ["Analysis", "Quick", "analyze", "bit_error_curve", "quick", "sensitivity", "write_report"]
