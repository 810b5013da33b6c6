"""The scheduler over a recorded trace: what would have been decided, and what was possible at best.

A replay of a run's own trace decides exactly what the run decided (a test holds this): the trace
carries the strategy as it was when the run began. `belady_hits` is the offline optimum of eviction
for experts of one size.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moelab.scheduling.plan import Decision, LayerPlan
from moelab.scheduling.requests import requests
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Change, Trace


@dataclass(slots=True)
class Replay:
    """The outcome of a replay: every decision, and counts of decoded tokens (prefill excluded)."""

    decisions: list[Decision] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def hit_ratio(self) -> float:
        """Hits per request of the decoded tokens."""
        asked = sum(self.counts[k] for k in ("hit", "load", "skip", "substitute"))
        return self.counts["hit"] / asked if asked else 0.0

    def take(self, plan: LayerPlan, nbytes: Mapping[int, int], *, prefill: bool) -> None:
        """Write down one plan."""
        for d in plan.decisions(dict(nbytes)):
            self.decisions.append(d)
            if not prefill:
                self.counts[d.kind] += 1
                if d.kind in ("load", "prefetch"):
                    self.bytes += d.nbytes


def replay(
    trace: Trace,
    strategy: Strategy | None = None,
    knobs: Knobs | None = None,
    *,
    strategies: Mapping[str, Strategy] | None = None,
    make: Callable[[Shape, Strategy, Knobs], Scheduler] = Scheduler,
) -> Replay:
    """Decide a trace again.

    Parameters
    ----------
    trace
        Recorded by a run (``run.trace``) or loaded.
    strategy, knobs
        Other than the recorded ones, for the whole trace; both or neither.
    strategies
        Name -> strategy, for a trace from a file, which knows its strategies by name only.
    make
        Makes the scheduler; one that watches itself decides the same.

    Raises
    ------
    ValueError
        The trace records no settings, or a strategy's name is not among ``strategies``.
    """
    changes = list(trace.changes)
    if strategy is not None and knobs is not None:
        changes = [Change(0, knobs, strategy.name, strategy=strategy)]
    if not changes or changes[0].at != 0:
        raise ValueError("this trace records no settings; give strategy= and knobs=")
    known = strategy is None and changes[0].strategy is not None
    changes = _found(changes, strategies or {})
    first = changes.pop(0)
    assert first.strategy is not None
    scheduler, out = make(trace.shape, first.strategy, first.knobs), Replay()
    scheduler.warm(trace.resident, known=known)
    for i, given in enumerate(trace.steps):
        if i == 0 or (given.prefill and given.layer == 0):
            scheduler.new_sequence()
            out.take(scheduler.begin(), trace.shape.nbytes, prefill=True)
        while changes and changes[0].at == i:
            change = changes.pop(0)
            scheduler.change(change.knobs, change.strategy)
            out.take(scheduler.begin(), trace.shape.nbytes, prefill=True)
        out.take(scheduler.step(given), trace.shape.nbytes, prefill=given.prefill)
        if given.layer == trace.shape.layers - 1:
            scheduler.end_of_token()
    return out


def _found(changes: list[Change], strategies: Mapping[str, Strategy]) -> list[Change]:
    """The changes with a strategy each: their own, or the one of that name."""
    missing = {c.name for c in changes if c.strategy is None} - strategies.keys()
    if missing:
        raise ValueError(
            f"strategies {sorted(missing)} of this trace are unknown; pass strategies="
        )
    found, last = [], None
    for c in changes:
        use = c.strategy
        if use is None:
            use = last if last is not None and not c.fresh else strategies[c.name].renewed()
            use = use.tuned(**c.parameters) if c.parameters else use
            use = dataclasses.replace(use, keep=c.keep or {})
        found.append(c._replace(strategy=use))
        last = use
    return found


def belady_hits(trace: Trace, capacity: int) -> tuple[int, int]:
    """Hits and requests of the decoded tokens with Belady's eviction and room for ``capacity``.

    Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """
    stream = [((s.layer, r.expert), not s.prefill) for s in trace.steps for r in requests(s)]
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
