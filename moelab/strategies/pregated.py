"""Pre-gated MoE: a layer's experts are chosen by the layer before, and fetched meanwhile.

Source: R. Hwang et al., "Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable
Mixture-of-Expert Inference", arXiv 2308.12066. While block N computes, exactly the experts that its
pre-gate named for block N + 1 are copied; memory holds the active experts of two blocks.

Not as there: their pre-gates are trained. Here the next layer's own router is asked with this
layer's input, without training, and may then choose only among the top-k it named; the gate weights
are those it gives them when its turn comes. So the output changes: look at its KL. Layer 0 and
prompts are routed as usual. Experts stay while there is room (LRU), where the paper frees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import LookAhead, Prediction, Prefetch, Route, Strategy, View
from moelab.strategies.basics import LRU, expected


class PreGate(Route, Prefetch):
    """Route and prefetch in one: who the layer before named is fetched, and alone may serve."""

    title = "chosen by the layer before (Pre-gated MoE)"

    def __init__(self) -> None:
        self._named: dict[int, tuple[int, ...]] = {}

    def look_ahead(self, view: View) -> int:
        return 1

    def observe(self, given: LayerInput, view: View) -> None:
        coming = () if given.prefill else given.look_ahead
        self._named = {ahead.layer: ahead.experts for ahead in coming}

    def new_sequence(self) -> None:
        self._named = {}

    def mask(self, layer: int, view: View) -> np.ndarray | None:
        named = set(self._named.get(layer, ()))
        if len(named) < view.shape.top_k:  # nobody was asked, or the router cannot be
            return None
        mask = np.zeros(view.shape.experts[layer], np.bool_)
        mask[list(named)] = True
        return mask

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        for coming in look_ahead:
            yield from map(expected, coming.requests())


def pregated() -> Strategy:
    """The layer before names a layer's experts: fetched while it computes, they alone serve."""
    one = PreGate()
    return Strategy("pregated", LRU(), route=one, prefetch=one)
