"""Everything in memory: what offloading is measured against.

All experts are loaded before the first token, at the ``bits`` setting: all-in-RAM at 16 bit, its
INT8 and INT4 variants at 8 and 4. Where the budget is too small for all, as many as fit are
loaded, the same number of every layer, and the rest comes on demand.
"""

from __future__ import annotations

from collections.abc import Iterable

from moelab.scheduling.strategy import Prediction, Prefetch, Strategy, View
from moelab.strategies.basics import LRU


class LoadAll(Prefetch):
    """As many experts as fit, before the first token."""

    title = "everything that fits, at the start"

    def begin(self, view: View) -> Iterable[Prediction]:
        room = view.knobs.budget_bytes
        for expert in range(max(view.shape.experts)):
            for layer, count in enumerate(view.shape.experts):
                if expert < count:
                    room -= view.shape.nbytes[int(view.asked[view.shape.key(layer, expert)])]
                    if room < 0:
                        return
                    yield Prediction(layer, expert)


def in_ram() -> Strategy:
    """Everything that fits is loaded before the first token; the rest on demand, LRU."""
    return Strategy("in_ram", LRU(), prefetch=LoadAll())
