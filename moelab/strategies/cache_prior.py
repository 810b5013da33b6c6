"""Cache-prior routing: the router prefers, a little, the experts that are in memory.

Source: A. Skliar et al., "Mixture of Cache-Conditional Experts for Efficient Mobile Device
Inference", arXiv 2412.00099. Before the top-k is taken, λ·Δ is added to the log-score of every
resident expert, Δ being the spread (largest - smallest) of the scores: λ = 0 leaves the router
alone, λ = 1 puts every resident expert before every absent one. Only the choice changes; the gate
weights of those chosen are the router's own. The hit ratio may pass Belady's bound, which holds
for a fixed routing.

Not as there: Δ is the spread of this token instead of a running mean over tokens, and the router's
own J best experts, which the paper gives the same head start so that they always stay, can lose
their place: a bias is given before the router has spoken.
Prompts are routed as the router says.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moelab.scheduling.strategy import Parameter, Route, Strategy, View
from moelab.strategies.basics import LRU, GateLookAhead, TierPair


class CachePrior(Route):
    """λ for resident experts, 0 for the others."""

    title = "prefer resident experts (cache-prior)"
    parameters: ClassVar = (
        Parameter("lam", "λ: head start of resident experts, in spreads of the router's scores"),
    )

    def __init__(self, lam: float = 0.1) -> None:
        self.lam = self.parameters[0].checked(lam)

    def bias(self, layer: int, view: View) -> np.ndarray | None:
        if view.prefill or not self.lam:
            return None
        return self.lam * (view.bits[view.shape.keys(layer)] > 0)


def cache_prior(*, lam: float = 0.1) -> Strategy:
    """LRU; the router gives experts that are in memory a head start of λ."""
    return Strategy(
        "cache_prior", LRU(), route=CachePrior(lam), precision=TierPair(), prefetch=GateLookAhead()
    )
