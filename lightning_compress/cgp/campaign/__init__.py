"""Campaigns: experiments as folders, whose runs go on anywhere and give the same files.

Reading order: `texts` (an experiment as text), `statistics` (rows that grow), `folders` (which file is where),
`planning` (``plan``), `states` (where a run stands), `single` (one run), `processes` (each in a process of its own),
`running` (``run``), `gates` (what the best circuits use), `overview` (``status``), `merging` (``merge``), `scripts`
(``script``).
"""

from lightning_compress.cgp.campaign.folders import Config, Folder, find, read
from lightning_compress.cgp.campaign.merging import merge
from lightning_compress.cgp.campaign.overview import Progress, Status, status
from lightning_compress.cgp.campaign.planning import plan
from lightning_compress.cgp.campaign.running import run
from lightning_compress.cgp.campaign.scripts import dask_script, script
from lightning_compress.cgp.campaign.single import Outcome
from lightning_compress.cgp.campaign.statistics import COLUMNS, read_rows

__all__ = [
    "COLUMNS",
    "Config",
    "Folder",
    "Outcome",
    "Progress",
    "Status",
    "dask_script",
    "find",
    "merge",
    "plan",
    "read",
    "read_rows",
    "run",
    "script",
    "status",
]
