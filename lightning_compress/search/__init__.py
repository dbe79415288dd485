"""Settings of their own for every layer, searched for the best compromises between size, error and cost.

Reading order: `space` (what may be chosen), `assemble` (a genome becomes a model), `objectives`, `nsga` (pure
functions of evolution), `greedy` (where it starts), `propose` (what to try next), `journal` (what was tried), `result`,
`run` (``search``).
"""

from lightning_compress.search.result import Row, SearchResult
from lightning_compress.search.run import search
from lightning_compress.search.space import Space, space_of

__all__ = ["Row", "SearchResult", "Space", "search", "space_of"]
