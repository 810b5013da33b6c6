"""What any budget could hit: the best eviction, LRU's reuse distances, and working sets."""

from __future__ import annotations

import heapq
from bisect import bisect_left

import numpy as np

from moelab.scheduling.events import free_hits
from moelab.scheduling.trace import Trace

NEVER = np.iinfo(np.int64).max
"""Reuse distance of an expert's first request."""
RECENT = 16
Stream = list[tuple[tuple[int, int], bool]]
"""Requests as (layer, expert), and whether each counts."""


def requests(trace: Trace) -> Stream:
    """Every request as (layer, expert), and whether it is a decoded token's.

    What was resident at the start was asked for before; a prompt's requests are not counted either.
    """
    warm = [(trace.shape.place(key), False) for key, _ in trace.resident]
    return warm + [((s.layer, r.expert), not s.prefill) for s in trace.steps for r in s.requests()]


def _free(trace: Trace) -> int:
    """Decoded tokens' requests for experts without weights: hits everywhere, also here."""
    return sum(len(free_hits(s.layer, s.free)) for s in trace.steps if s.free and not s.prefill)


def belady_hits(
    trace: Trace, capacity: int, *, bypass: bool = False, per_layer: bool = False
) -> tuple[int, int]:
    """Hits and requests of the decoded tokens with Belady's eviction and room for ``capacity``.

    Parameters
    ----------
    bypass
        An expert that is needed later than all that are there may be computed and not kept; without
        it every load is kept, as strategies here do.
    per_layer
        Each layer has a cache of its own, for ``capacity`` experts.

    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """
    streams, free = [requests(trace)], _free(trace)
    if per_layer:
        layers = range(trace.shape.layers)
        streams = [[one for one in streams[0] if one[0][0] == at] for at in layers]
    found = [_best(own, capacity, bypass=bypass) for own in streams]
    return sum(hits for hits, _ in found) + free, sum(asked for _, asked in found) + free


def _best(stream: Stream, capacity: int, *, bypass: bool) -> tuple[int, int]:
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
        full = key not in resident and len(resident) >= capacity
        if full and bypass:  # whoever is needed last is let go, and that may be the newcomer
            resident[key] = following[i]
            heapq.heappush(heap, (-following[i], key))
        if full:
            while True:
                when, victim = heapq.heappop(heap)
                if resident.get(victim) == -when:
                    del resident[victim]
                    break
        if not (full and bypass):
            resident[key] = following[i]
            heapq.heappush(heap, (-following[i], key))
    return hits, asked


def reuse_distances(trace: Trace) -> np.ndarray:
    """How many experts a cache needs to hit each request of the decoded tokens, int64 ``[R]``.

    That is one more than the other experts asked for since; `NEVER` at first use, 0 of an expert
    without weights (those first).
    """
    found = [0] * _free(trace)
    times: list[int] = []  # of each expert's last request, rising
    last: dict[tuple[int, int], int] = {}
    for now, (key, counted) in enumerate(requests(trace)):
        distance = NEVER
        if key in last:
            at = bisect_left(times, last[key])
            distance = len(times) - at
            del times[at]
        times.append(now)
        last[key] = now
        if counted:
            found.append(distance)
    return np.array(found, np.int64)


def working_set(trace: Trace, recent: int = RECENT) -> np.ndarray:
    """How many experts the last ``recent`` decoded tokens asked for, int64 ``[T]``."""
    asked: list[set[tuple[int, int]]] = []
    for step in trace.steps:
        if not step.prefill:
            if step.layer == trace.shape.path().start:
                asked.append(set())
            asked[-1].update((step.layer, r.expert) for r in step.requests())
    windows = (asked[max(0, t + 1 - recent) : t + 1] for t in range(len(asked)))
    return np.array([len(set().union(*window)) for window in windows], np.int64)
