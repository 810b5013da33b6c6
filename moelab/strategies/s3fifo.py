"""S3-FIFO: a small queue to pass or leave by, a main one with second chances, and ghosts.

Source: J. Yang et al., "FIFO Queues Are All You Need for Cache Eviction", SOSP 2023. A newcomer
enters S, a tenth of the slots; at its end it goes on to M if it was used more than once there, and
else leaves, its name kept in G. A name in G enters M at once. At the end of M who was used since
goes back to its beginning with one use less. Uses are counted up to 3 and begin anew in M; G holds
as many names as M has slots.

Who gives is S while it has its tenth, M otherwise. Where a promotion fills M beyond its share
nobody leaves for that alone, since one eviction makes room for one load: M gives at the next.
How it becomes a score: `moelab.strategies.textbook`.
"""

from __future__ import annotations

from moelab.scheduling.strategy import Key, Strategy
from moelab.strategies.textbook import Queue, Textbook, oldest

SMALL, MOST = 0.1, 3
"""Share of S; up to how many uses are counted."""


class S3FIFO(Textbook):
    """Three queues, first in, first out; quick demotion of what is used once."""

    title = "small, main and ghost queue (S3-FIFO)"

    def __init__(self) -> None:
        super().__init__()
        self.small, self.main, self.ghost = Queue(), Queue(), Queue()  # uses of each

    def request(self, key: Key, slots: int) -> None:
        for queue in (self.small, self.main):
            if key in queue:
                queue[key] = min(queue[key] + 1, MOST)
                return
        while len(self.small) + len(self.main) >= slots:
            self._evict(slots)
        if key in self.ghost:
            del self.ghost[key]
            self.main[key] = 0
            self.put(key, 2)
        else:
            self.small[key] = 0
            self.put(key, 1)

    def _evict(self, slots: int) -> None:
        """One leaves S or M; nobody where all of S go on to M."""
        small, main = self.small, self.main
        if len(small) < SMALL * slots:
            key, uses = main.popitem(last=False)
            while uses:
                main[key] = uses - 1
                self.put(key, 2)
                key, uses = main.popitem(last=False)
            self.put(key, 0)
            return
        while small:
            key, uses = small.popitem(last=False)
            if uses <= 1:
                self.ghost[key] = 0
                self.put(key, 0)
                break
            main[key] = 0
            self.put(key, 2)
        while len(self.ghost) > (1 - SMALL) * slots:
            oldest(self.ghost)


def s3fifo() -> Strategy:
    """One pool; what is used only once after it came leaves early (S3-FIFO)."""
    return Strategy("s3fifo", S3FIFO())
