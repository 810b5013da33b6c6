"""Checkpoints rewritten before they are packed: ideas for smaller experts, as stock models.

`transform` writes what an idea makes of every expert back into a checkpoint, so that its quality
can be measured like that of any other; `compare` does that at equal bytes. One file is one idea.
"""

from __future__ import annotations

from moelab.transforms.compare import compare
from moelab.transforms.merge import Merge
from moelab.transforms.puzzle import Puzzle
from moelab.transforms.resmoe import ResMoE
from moelab.transforms.rewrite import IDEAS, transform
from moelab.transforms.slim import Slim

__all__ = ["IDEAS", "Merge", "Puzzle", "ResMoE", "Slim", "compare", "transform"]
