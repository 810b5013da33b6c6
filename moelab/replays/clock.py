"""A virtual clock for a replay: when everything that is decided would have happened.

It goes along with a replay as the engine goes along with the scheduler: asks for loads, computes
what is there, waits for the rest. Times come from two models: `Computing`, measured on a machine,
and a bus that says when a load would be done. Nothing waits; a token takes some microseconds.
What it does not know: prompts (their loads are waited for, their computing is a guess), and a
machine that is busy with something else.

Times are seconds, but for figures named ``_ms``.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol

from moelab.scheduling.events import EVICT, HIT, LOAD, PREFETCH, SUBSTITUTE, LayerPlan
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import Key, Shape

_SERVED = (HIT, LOAD, SUBSTITUTE)


class Bus(Protocol):
    """Where loads come from: ``queue`` of them at once, each done when ``due`` says."""

    queue: int

    def due(self, nbytes: int, now: float) -> float:
        """When a load begun ``now`` is complete; asked once, in the order in which they begin."""
        ...


@dataclass(frozen=True)
class Computing:
    """What a decoded token takes besides waiting, in milliseconds of one machine.

    Attributes
    ----------
    layer_ms
        A layer without its experts: attention, router, and what the engine does around them.
    token_ms
        What comes after the last layer: the head, and drawing the token.
    expert_ms
        One expert of one token at each tier.
    call_ms
        One call that computes the experts that are there; each wait makes another one.
    deciding_ms
        A layer's decision.
    ask_ms
        Asking one coming layer's router early.
    wake_ms
        From a load that is done, or asked for, to a thread that goes on.
    after_wait
        How many times as long experts take that come after a wait: a core that slept is slower.
    """

    layer_ms: float
    token_ms: float
    expert_ms: Mapping[int, float]
    call_ms: float = 0.0
    deciding_ms: float = 0.0
    ask_ms: float = 0.0
    wake_ms: float = 0.0
    after_wait: float = 1.0

    def fitted(self, layers: int, found: Spent, measured: Spent, rows: float = 1.0) -> Computing:
        """As measured passes of ``rows`` tokens were: their layers take what ``found`` lacks."""
        more = (measured.compute_ms - found.compute_ms) / layers / rows
        deciding = measured.deciding_ms / layers
        return dataclasses.replace(
            self, layer_ms=max(0.0, self.layer_ms + more), deciding_ms=deciding
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """A token's milliseconds, as `moelab.Run.per_token` has them."""

    compute_ms: float = 0.0
    deciding_ms: float = 0.0
    stall_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """All of them."""
        return self.compute_ms + self.deciding_ms + self.stall_ms


@dataclass(eq=False, slots=True)
class _Load:
    nbytes: int
    asked: float
    urgent: bool
    done: float | None = None  # None: not begun


@dataclass(slots=True)
class _Line:
    """The loader: on demand before prefetch, no more at once than the bus works on.

    ``wake``: seconds until a reader that had nothing to do goes on.
    """

    bus: Bus
    wake: float = 0.0
    queues: tuple[deque[_Load], deque[_Load]] = field(default_factory=lambda: (deque(), deque()))
    free: list[float] = field(default_factory=list)  # when each place is, a heap

    def submit(self, nbytes: int, now: float, *, urgent: bool) -> _Load:
        self.run(now)
        load = _Load(nbytes, now, urgent)
        self.queues[0 if urgent else 1].append(load)
        return load

    def run(self, until: float) -> None:
        """Begin what would have begun by then."""
        free, bus = self.free, self.bus
        while ready := self.queues[0] or self.queues[1]:
            begin = ready[0].asked + self.wake
            while len(free) > bus.queue:  # another device, which works on fewer
                heapq.heappop(free)
            if len(free) == bus.queue:
                if free[0] > until:
                    return
                begin = max(begin, heapq.heappop(free))
            load = ready.popleft()
            load.done = bus.due(load.nbytes, begin)
            heapq.heappush(free, load.done)

    def wait(self, load: _Load, now: float) -> float:
        """When it is done; a prefetch not begun becomes urgent."""
        self.run(now)
        if load.done is None and not load.urgent:
            self.queues[1].remove(load)
            self.queues[0].append(load)
            load.urgent, load.asked = True, now
        while load.done is None:
            self.run(self.free[0])
        return load.done

    def cancel(self, load: _Load, now: float) -> bool:
        """Withdraw it; False where it has begun."""
        self.run(now)
        if load.done is not None:
            return False
        self.queues[0 if load.urgent else 1].remove(load)
        return True


class Clock:
    """Goes along with one replay; ``tokens`` has what each decoded token would have taken.

    Parameters
    ----------
    shape, computing
        The model and the machine.
    buses
        Where experts come from, by the step from which on they do; 0 is among them.
    """

    def __init__(self, shape: Shape, computing: Computing, buses: Mapping[int, Bus]) -> None:
        self.tokens: list[Spent] = []
        self._shape, self._computing, self._buses = shape, computing, buses
        self._line = _Line(buses[0], computing.wake_ms / 1e3)
        self._now = 0.0
        self._loads: dict[Key, _Load] = {}  # that may not have landed
        self._ahead: set[Key] = set()  # prefetches among them
        self._slow = False  # computing right after a wait
        self._compute = self._deciding = self._stall = 0.0  # of the token at work

    def changed(self, step: int) -> None:
        """Settings changed before this step: loads may come from elsewhere from here on."""
        self._line.bus = self._buses.get(step, self._line.bus)

    def seen(self, given: LayerInput, observes: AbstractSet[str], asked: int = 0) -> LayerInput:
        """The layer's router has spoken: what had landed by now is told as it would have been.

        ``asked``: how many of the coming layers' routers are asked as well.
        """
        rows = len(given.experts)
        self._work(self._computing.layer_ms * rows + self._computing.ask_ms * asked)
        if not {"unread", "in_flight"} & observes:
            return given
        own, unread = self._shape.keys(given.layer), []
        if self._ahead and "unread" in observes:
            mine = [k for k in self._ahead if own.start <= k < own.stop]
            unread = [k for k in mine if self._line.cancel(self._loads[k], self._now)]
            self._ahead -= set(mine)
            for key in unread:
                del self._loads[key]
        self._line.run(self._now)
        flying = [k for k in list(self._ahead) if not self._landed(k)]
        return given.told(flying if "in_flight" in observes else (), unread)

    def step(self, given: LayerInput, plan: LayerPlan) -> None:
        """The engine obeys one layer's plan; after the last layer the token is complete."""
        self._now += self._computing.deciding_ms / 1e3
        self._deciding += self._computing.deciding_ms
        rows = len(given.experts)  # tokens of one pass, over its experts with weights
        asked = sum(map(len, given.experts))
        each = asked / max(1, len(given.requests())) if rows > 1 else 1.0
        self._finish(self._issue(plan, each), each)
        if given.layer == self._shape.layers - 1:
            self._work(self._computing.token_ms * (1 if given.prefill else rows))
            if not given.prefill:
                self.tokens.append(Spent(self._compute, self._deciding, 1e3 * self._stall))
            self._compute = self._deciding = self._stall = 0.0

    def between(self, plan: LayerPlan) -> None:
        """What is to be there before the next token is waited for, and counts for none."""
        before = self._compute, self._deciding, self._stall
        for key, _ in self._issue(plan, 0.0):
            self._wait(key)
        self._compute, self._deciding, self._stall = before

    # -- as the engine does it ----------------------------------------------------------------

    def _issue(self, plan: LayerPlan, each: float) -> list[tuple[Key, int]]:
        """Do what the rows say, in their order; returns what is to be computed: key and bits."""
        waiting: list[tuple[Key, int]] = []
        offset, size, loads = self._shape.offset, self._shape.size, self._loads
        for kind, layer, expert, _, bits, _, _ in plan.rows:
            key = offset[layer] + expert
            if kind in _SERVED and bits:
                if kind == LOAD:
                    loads[key] = self._line.submit(size(key, bits), self._now, urgent=True)
                waiting.append((key, bits))
            elif kind == EVICT:
                if layer == plan.layer and key in dict(waiting):
                    self._finish(waiting, each)  # a prompt larger than the budget
                if key in loads:
                    self._evict(key)
            elif kind == PREFETCH:
                loads[key] = self._line.submit(size(key, bits), self._now, urgent=False)
                self._ahead.add(key)
                if plan.layer < 0:
                    waiting.append((key, bits))
        return waiting

    def _evict(self, key: Key) -> None:
        if not self._landed(key) and not self._line.cancel(self._loads[key], self._now):
            self._wait(key)
        self._loads.pop(key, None)
        self._ahead.discard(key)

    def _finish(self, waiting: list[tuple[Key, int]], each: float) -> None:
        """Compute all that is here, wait for the first of the rest, and again."""
        computing, cost = self._computing, self._computing.expert_ms
        while waiting:
            ready, rest = waiting, []
            if self._loads:
                self._line.run(self._now)
                ready = []
                for one in waiting:
                    late = one[0] in self._loads and not self._landed(one[0])
                    (rest if late else ready).append(one)
            if not ready:
                self._wait(waiting[0][0])
                continue
            ms = computing.call_ms + max(1.0, each) * sum([cost[bits] for _, bits in ready])
            self._work(ms * (computing.after_wait if self._slow else 1.0))
            self._slow = False
            waiting[:] = rest

    def _landed(self, key: Key) -> bool:
        load = self._loads.get(key)
        if load is not None and (load.done is None or load.done > self._now):
            return False
        self._loads.pop(key, None)
        self._ahead.discard(key)
        return True

    def _wait(self, key: Key) -> None:
        load = self._loads.get(key)
        if load is None:
            return
        done = max(self._now, self._line.wait(load, self._now)) + self._computing.wake_ms / 1e3
        self._stall += done - self._now
        self._now, self._slow = done, True
        self._landed(key)

    def _work(self, ms: float) -> None:
        self._now += ms / 1e3
        self._compute += ms
