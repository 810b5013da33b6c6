"""The scheduler over a recorded trace: what would have been decided.

A replay of a run's own trace decides exactly what the run decided (a test holds this): the trace
carries the strategy as it was when the run began. By itself it does not know time: a load is there
at once. A clock (see `moelab.replays.clock`) goes along and says when.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from moelab.replays.clock import Clock, Spent
from moelab.scheduling.events import (
    HIT,
    KINDS,
    LOAD,
    PREFETCH,
    SKIP,
    SUBSTITUTE,
    Decision,
    LayerPlan,
    Row,
    in_words,
)
from moelab.scheduling.parts import Precision
from moelab.scheduling.scheduler import Scheduler
from moelab.scheduling.steps import Change, LayerInput
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Knobs, Shape
from moelab.scheduling.trace import Trace


@dataclass(slots=True, repr=False)
class Replay:
    """The outcome of a replay.

    Attributes
    ----------
    shape
        Of the trace.
    rows
        Every decision as codes, see `moelab.scheduling.events`.
    tally, bytes
        How many of each kind of decoded tokens, by code, and bytes loaded and prefetched for them;
        prefill does not count.
    tokens
        What each decoded token would have taken by the clock, where there was one.
    free
        Hits of decoded tokens that were of experts without weights, of 0 bytes.
    """

    shape: Shape
    rows: list[Row] = field(default_factory=list)
    tally: list[int] = field(default_factory=lambda: [0] * len(KINDS))
    bytes: int = 0
    tokens: list[Spent] = field(default_factory=list)
    free: int = 0

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {kind}s" for kind, count in self.counts.items())
        counts += f", {self.free} of the hits of 0 bytes" * bool(self.free)
        return f"<Replay: hit ratio {self.hit_ratio:.3f}; {counts}; {self.bytes} bytes read>"

    @property
    def counts(self) -> Counter[str]:
        """How many of each kind, where there are any."""
        return Counter({kind: n for kind, n in zip(KINDS, self.tally, strict=True) if n})

    @property
    def decisions(self) -> list[Decision]:
        """Every decision in words."""
        return [in_words(row, self.shape) for row in self.rows]

    @property
    def hit_ratio(self) -> float:
        """Hits per request of the decoded tokens."""
        asked = sum(self.tally[kind] for kind in (HIT, LOAD, SKIP, SUBSTITUTE))
        return self.tally[HIT] / asked if asked else 0.0

    def take(self, rows: list[Row], *, prefill: bool, keep: bool = True) -> None:
        """Write down one plan, or count it only."""
        if keep:
            self.rows += rows
        if prefill:
            return
        tally, size, offset = self.tally, self.shape.size, self.shape.offset
        for kind, layer, expert, _, bits, _, _ in rows:
            tally[kind] += 1
            self.free += kind == HIT and not bits
            if kind in (LOAD, PREFETCH):
                self.bytes += size(offset[layer] + expert, bits)


def replay(
    trace: Trace,
    strategy: Strategy | None = None,
    knobs: Knobs | None = None,
    *,
    strategies: Mapping[str, Strategy] | None = None,
    make: Callable[[Shape, Strategy, Knobs], Scheduler] = Scheduler,
    clock: Clock | None = None,
) -> Replay:
    """Decide a trace again.

    Parameters
    ----------
    trace
        Recorded by a run (``run.trace``) or loaded.
    strategy, knobs
        Other than the recorded ones, for the whole trace. Without ``knobs`` the recorded budget and
        bits stay as they were, from token to token.
    strategies
        Name -> strategy, for a trace from a file, which knows its strategies by name only.
    make
        Makes the scheduler; one that watches itself decides the same.
    clock
        Goes along; what strategies observe of loads that have landed is then by this clock, not as
        it was recorded.

    Raises
    ------
    ValueError
        The trace records no settings, or a strategy's name is not among ``strategies``.
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"this is a {type(trace).__name__}; give a trace, as in run.trace")
    changes = list(trace.changes)
    if knobs is not None:
        if strategy is None:
            raise ValueError("knobs= without strategy=: give both")
        changes = [Change(0, knobs, strategy.name, strategy=strategy)]
    if not changes or changes[0].at != 0:
        raise ValueError("this trace records no settings; give strategy= and knobs=")
    if strategy is not None:
        changes = [c._replace(name=strategy.name, strategy=strategy) for c in changes]
    changes = _found(changes, strategies or {})
    if "gate weights" in trace.lacks:
        by_weight = [c.name for c in changes if c.strategy and goes_by_weight(c.strategy)]
        if by_weight:
            raise ValueError(f"this trace has no gate weights, by which {by_weight[0]!r} decides")
    first = changes.pop(0)
    assert first.strategy is not None
    player = Player(make(trace.shape, first.strategy, first.knobs), clock)
    player.scheduler.warm(trace.resident)
    for i, (given, kept) in enumerate(trace.with_kept()):
        due = [change for change in changes if change.at == i]
        player.step(given, [(change.knobs, change.strategy) for change in due], kept)
    return player.out


class Player:
    """Tells one scheduler one step of a stream after another, and writes down what it decides.

    Without ``keep`` it counts only: a stream may go on for long.
    """

    def __init__(
        self, scheduler: Scheduler, clock: Clock | None = None, *, keep: bool = True
    ) -> None:
        self._keep = keep
        self.scheduler, self.out = scheduler, Replay(scheduler.shape)
        self.at = 0
        """Steps by now."""
        self._clock = clock
        if clock:
            self.out.tokens = clock.tokens

    def step(
        self,
        given: LayerInput,
        changes: Iterable[tuple[Knobs, Strategy | None]] = (),
        kept: int | None = None,
    ) -> None:
        """One layer's input, before which settings may have changed; ``kept`` of its pass stand."""
        scheduler, clock = self.scheduler, self._clock
        if self.at == 0 or (given.prefill and given.layer == 0):
            scheduler.new_sequence()
            self._between(scheduler.begin())
        for knobs, strategy in changes:
            self._between(scheduler.change(knobs, strategy))
            if clock:
                clock.changed(self.at)
            self._between(scheduler.begin())
        if clock:
            asked = scheduler.look_ahead(given.layer, prefill=given.prefill)
            plan = scheduler.step(clock.seen(given, scheduler.observes, asked))
        else:
            plan = scheduler.step(given)
        self.out.take(plan.rows, prefill=given.prefill, keep=self._keep)
        if clock:
            clock.step(given, plan)
        if given.layer == scheduler.shape.layers - 1:
            scheduler.end_of_token(kept)
        self.at += 1

    def _between(self, plan: LayerPlan) -> None:
        self.out.take(plan.rows, prefill=True, keep=self._keep)
        if self._clock:
            self._clock.between(plan)


def goes_by_weight(strategy: Strategy) -> bool:
    """Whether gate weights decide at which bits an expert is served."""
    plain = type(strategy.precision).tier is Precision.tier
    return not plain and getattr(strategy.precision, "low_bits", 0) is not None


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
            own = {n: v for n, v in (c.parameters or {}).items() if n in use.parameters}
            use = use.tuned(**own) if own else use
            use = dataclasses.replace(use, pinned=c.pinned or {})
        found.append(c._replace(strategy=use))
        last = use
    return found
