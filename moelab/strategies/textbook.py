"""A cache algorithm of the literature as an evict decision: it runs beside, on names alone.

What such an algorithm does is no function of what is in memory: it has queues and ghosts (names of
who has left), and admits one at a time. So it is kept whole, with a cache of its own of as many
slots as experts fit the budget at the bits asked for, and is told every request. Whom it has
dropped leaves first, the earliest before others; then who stands lowest in its queues.

With one layer and one expert a token its hits are those of the algorithm, to the request. Beyond
that: a layer's requests come to it one after the other, those of a token by falling weight and a
prompt's once for each expert, while the scheduler serves them at once and lets none of them go; so
for the time of a step, or of a prompt, the two may differ. A prefetch is no request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Evict, Key, View

Queue = OrderedDict[Key, int]
"""Names, the next to leave first, and what is counted of each."""


def oldest(queue: Queue) -> Key:
    """Take out who came first."""
    return queue.popitem(last=False)[0]


class Textbook(Evict):
    """The lowest queue leaves first, and in a queue who was put there first."""

    explained: ClassVar = {
        "queue": "where the algorithm holds it, 0: nowhere; the lowest leaves",
        "moves since": "in any queue since it was put there; the highest leaves among equals",
    }

    def __init__(self) -> None:
        self._moves = 0
        self._queue = self._moved = np.zeros(0, np.int64)  # [n] each

    def request(self, key: Key, slots: int) -> None:
        """An expert is asked for; ``slots``: experts that the cache holds."""
        raise NotImplementedError(f"{type(self).__name__} must define request(key, slots)")

    def put(self, key: Key, queue: int) -> None:
        """The algorithm has put a name last into this queue; 0: it has let it go."""
        self._moves += 1
        self._queue[key], self._moved[key] = queue, self._moves

    def observe(self, given: LayerInput, view: View) -> None:
        shape, knobs = view.shape, view.knobs
        if not self._queue.size:
            self._queue, self._moved = np.zeros((2, shape.n), np.int64)
        slots = max(1, knobs.budget_bytes // shape.nbytes[knobs.bits])
        for request in given.requests():
            self.request(shape.key(given.layer, request.expert), slots)

    def score(self, view: View) -> np.ndarray:
        if not self._queue.size:
            return np.zeros(view.shape.n)
        return self._queue * (self._moves + 1) + self._moved

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        if not self._queue.size:
            return dict.fromkeys(self.explained, np.zeros(view.shape.n))
        return {"queue": self._queue, "moves since": self._moves - self._moved}
