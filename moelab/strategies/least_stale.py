"""Least-Stale: what this pass through the layers has not used leaves first, last turn first.

Source: SpecMD, arXiv 2602.03921, of which only the abstract was at hand: layers are walked in a
fixed order, so that reuse can be told ahead, and an eviction by it cuts "collision misses", on
OLMoE at 5 % of its memory. The rule itself is as others describe it, not read in the paper: copies
that the forward pass at hand has not used are stale, and leave before those that it has; within
each of the two the layer whose turn is farthest away gives first.

The layer at work has its next turn after all others. Equals leave by their last use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from moelab.scheduling.strategy import Evict, Strategy, View
from moelab.strategies.basics import turns


class LeastStale(Evict):
    """Not used in this pass, then farthest from its layer's turn."""

    title = "stale first, then by layer order (Least-Stale)"
    explained: ClassVar = {
        "used in this pass": "0: stale, and leaves before those with 1",
        "layers to its turn": "the highest leaves among equals",
    }

    def score(self, view: View) -> np.ndarray:
        used = view.last_token == view.token + 1
        return used * view.shape.layers - turns(view)

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        used = view.last_token == view.token + 1
        return {"used in this pass": used, "layers to its turn": turns(view)}


def least_stale() -> Strategy:
    """One pool; experts that this pass has not used leave first, the latest turn before others."""
    return Strategy("least_stale", LeastStale())
