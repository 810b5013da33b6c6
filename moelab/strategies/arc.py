"""ARC: a list of what was used once and one of what was used again; ghosts say which is to grow.

Source: N. Megiddo and D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003,
fig. 4, for c slots. T1 holds who was asked for once, T2 who was asked for again, both by last use;
B1 and B2 the names of those who left them. A request for a name in B1 raises p, the size aimed at
for T1, one for a name in B2 lowers it. |T1| + |B1| <= c and all four hold 2c at most.

The lists are trimmed after a request where the paper does so before it: with c constant that is the
same, and it holds when the budget changes. How it becomes a score: `moelab.strategies.textbook`.
"""

from __future__ import annotations

from moelab.scheduling.strategy import Key, Strategy
from moelab.strategies.textbook import Queue, Textbook, oldest


class ARC(Textbook):
    """Adaptive replacement: recency against frequency, by what was missed."""

    title = "adaptive replacement (ARC)"

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2, self.b1, self.b2 = Queue(), Queue(), Queue(), Queue()
        self.p = 0.0

    def request(self, key: Key, slots: int) -> None:
        t1, t2, b1, b2 = self.t1, self.t2, self.b1, self.b2
        known = next((q for q in (t1, t2, b1, b2) if key in q), None)
        if known is b1:
            self.p = min(slots, self.p + max(1, len(b2) / len(b1)))
        elif known is b2:
            self.p = max(0, self.p - max(1, len(b1) / len(b2)))
        if known is not None:
            del known[key]
        if known is not t1 and known is not t2:
            while len(t1) + len(t2) >= slots:
                self._replace(again=known is b2)
        (t1 if known is None else t2)[key] = 0
        self.put(key, 1 if known is None else 2)
        while b1 and len(t1) + len(b1) > slots:
            oldest(b1)
        while b2 and len(t1) + len(t2) + len(b1) + len(b2) > 2 * slots:
            oldest(b2)

    def _replace(self, *, again: bool) -> None:
        """One leaves T1 or T2 for the ghosts; ``again``: for a name that was in B2."""
        first = len(self.t1) > self.p or (again and len(self.t1) == self.p)
        once = self.t1 and (first or not self.t2)
        key = oldest(self.t1 if once else self.t2)
        (self.b1 if once else self.b2)[key] = 0
        self.put(key, 0)


def arc() -> Strategy:
    """One pool; recency or frequency, whichever would have missed less (ARC)."""
    return Strategy("arc", ARC())
