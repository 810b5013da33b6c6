"""What was possible at best: the offline optimum of eviction for experts of one size."""

from __future__ import annotations

import heapq

from moelab.scheduling.trace import Trace


def belady_hits(trace: Trace, capacity: int) -> tuple[int, int]:
    """Hits and requests of the decoded tokens with Belady's eviction and room for ``capacity``.

    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """
    stream = [((s.layer, r.expert), not s.prefill) for s in trace.steps for r in s.requests()]
    following, last = [len(stream)] * len(stream), {}
    for i in range(len(stream) - 1, -1, -1):
        following[i] = last.get(stream[i][0], len(stream) + i)
        last[stream[i][0]] = i
    resident: dict = {}
    heap: list[tuple[int, tuple[int, int]]] = []
    hits = asked = 0
    for i, (key, counted) in enumerate(stream):
        hits += counted and key in resident
        asked += counted
        if key not in resident and len(resident) >= capacity:
            while True:
                when, victim = heapq.heappop(heap)
                if resident.get(victim) == -when:
                    del resident[victim]
                    break
        resident[key] = following[i]
        heapq.heappush(heap, (-following[i], key))
    return hits, asked
