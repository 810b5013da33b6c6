"""Questions to the evict decision, answered between two layers of whatever runs.

The arrays it goes by change while a layer is decided, so it is asked by the thread that decides.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from moelab.scheduling.scheduler import Scheduler

Terms = dict[str, float]


class Questions:
    """What others want to know, and when it is answered."""

    def __init__(self) -> None:
        self._asked: deque[tuple[int, Future[dict[int, Terms]]]] = deque()

    def why(self, layer: int) -> Future[dict[int, Terms]]:
        """Ask for the terms of a layer's residents, ``{expert: {name: value}}``."""
        future: Future[dict[int, Terms]] = Future()
        self._asked.append((layer, future))
        return future

    def answer(self, scheduler: Scheduler) -> None:
        """Answer what was asked."""
        while self._asked:
            layer, future = self._asked.popleft()
            try:
                future.set_result(scheduler.why(layer))
            except Exception as error:  # noqa: BLE001, a policy of somebody's own: theirs to see
                future.set_exception(error)
