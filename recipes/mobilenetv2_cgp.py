"""MobileNetV2: circuits that compute the int8 weights of a convolution from its first 96; one layer, or all 52.

    python recipes/mobilenetv2_cgp.py --layer features.1.conv.1 features.18.0 --thresholds 1
    python recipes/mobilenetv2_cgp.py --all --jobs 2 --folder outputs/mobilenetv2

Not measured yet.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import cgp, codes
from lightning_compress.archive import size_of
from lightning_compress.cgp import campaign, presets
from lightning_compress.cgp.codes import CircuitCode
from lightning_compress.cgp.integers import all_int8, find_int8
from lightning_compress.checkpoints import load_weights
from lightning_compress.tables import text
