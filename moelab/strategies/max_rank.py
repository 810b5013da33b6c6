"""Max-rank routing: a resident expert near the top of the router's ranking serves a missing one.

A rule of thumb of ours, of the family of cache-prior routing (arXiv 2412.00099) and drop-if-cold,
training-free: the ``max_rank`` times k best experts of the router count as good enough. Where one
of the k chosen is missing, the best resident one among them that does not serve yet computes in its
place, with the missing one's gate weight; where there is none, the missing expert is loaded. The
router's first choice is always served itself. Unlike a bias (`moelab.strategies.cache_prior`) it
changes nothing where everything chosen is in memory, and never goes below the rank that is set.

Decode only. It needs the gate's probabilities of all experts: where they are not told (a trace
without them, a family without a router to be asked) nobody is replaced.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Parameter, Request, Route, Strategy, View
from moelab.strategies.basics import LRU, GateLookAhead, TierPair


class MaxRank(Route):
    """The best resident expert within the first places, for one that is missing."""

    title = "a resident expert of the first ranks (max-rank)"
    observes = frozenset({"probabilities"})
    parameters: ClassVar = (
        Parameter(
            "max_rank", "places of the router's ranking that may serve, times top-k", 1, 8, 1
        ),
    )

    def __init__(self, max_rank: int = 2) -> None:
        self.max_rank = self.parameters[0].checked(max_rank)
        self._free: list[int] = []  # may serve and do not yet, the router's best first

    def observe(self, given: LayerInput, view: View) -> None:
        self._free = []
        if given.probabilities is None or given.prefill:
            return
        ranking = np.argsort(-np.array(given.probabilities), kind="stable")
        places = ranking[: self.max_rank * view.shape.top_k].tolist()
        self._free = [expert for expert in places if expert not in given.experts[0]]

    def stand_in(self, request: Request, view: View) -> int | None:
        first = view.shape.offset[request.layer]
        here = (e for e in self._free if view.bits[first + e]) if request.rank else ()
        found = next(iter(here), None)
        if found is not None:
            self._free.remove(found)
        return found


def max_rank(*, max_rank: int = 2) -> Strategy:
    """LRU; a missing expert is replaced by a resident one among the router's first ranks."""
    return Strategy(
        "max_rank",
        LRU(),
        route=MaxRank(max_rank),
        precision=TierPair(),
        prefetch=GateLookAhead(),
    )
