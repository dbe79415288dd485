"""Methods together: recipes as plain data, and as much compression as a target asks for (``compress_to``).

Reading order: `keys` (unknown names), `steps` (transforms by name, and their order), `files` (YAML), `config` (a recipe
or flat settings), `knobs` (strength), `bisection`, `limits` (targets), `errors` (of outputs), `running` (one pass),
`result`, `reach` (``compress_to``).
"""

from lightning_compress.pipelines.config import CompressionConfig
from lightning_compress.pipelines.reach import compress_to
from lightning_compress.pipelines.result import TargetResult

__all__ = ["CompressionConfig", "TargetResult", "compress_to"]
