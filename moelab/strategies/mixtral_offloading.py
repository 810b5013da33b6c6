"""mixtral-offloading: one LRU cache a layer, and the next layer's gate asked early.

Source: A. Eliseev and D. Mazur, "Fast Inference of Mixture-of-Experts Language Models with
Offloading", arXiv 2312.17238. Every layer keeps the same number of experts and lets go of the one
unused for longest. Once a layer's own experts are on their way, the next layer's gate is given this
layer's input, and its one or two likeliest experts are fetched.

Not as there: a guess lands in its layer's share at once, where the paper has a few staging buffers
beside the caches. A wrong guess can therefore push out an expert, never exceed the budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from moelab.scheduling.strategy import LookAhead, Parameter, Prediction, Strategy, View
from moelab.strategies.basics import DEPTH, LRU, EqualShares, GateLookAhead, expected


class SpeculativeGate(GateLookAhead):
    """The likeliest experts of the next layer, by its own gate on this layer's input."""

    title = "the next gate's best (mixtral-offloading)"
    parameters: ClassVar = (
        DEPTH,
        Parameter("guesses", "experts fetched for each coming layer", 1, 4, 1),
    )

    def __init__(self, guesses: int = 2, depth: int = 1) -> None:
        super().__init__(depth)
        self.guesses = self.parameters[1].checked(guesses)

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        for coming in look_ahead:
            yield from map(expected, coming.requests()[: self.guesses])


def mixtral_offloading(*, guesses: int = 2) -> Strategy:
    """LRU within an equal share for every layer; the next layer's gate, asked early, prefetches."""
    return Strategy(
        "mixtral_offloading", LRU(), allocate=EqualShares(), prefetch=SpeculativeGate(guesses)
    )
