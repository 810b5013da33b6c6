"""One layer's routing and the cache make a plan: serve, skip, evict, prefetch.

The scheduler decides and never touches bytes, threads, clocks or torch. The cache changes when a
load is issued, so what is decided depends on the stream of activations alone: the same object runs
live and in replay.

n experts of the model; a key is ``offset[layer] + expert``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from moelab.scheduling import events as e
from moelab.scheduling.budget import BudgetError, asked_bits, check_budget
from moelab.scheduling.cache import Cache
from moelab.scheduling.events import LayerPlan
from moelab.scheduling.parts import Part, Precision
from moelab.scheduling.rollback import Unverified
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, Knobs, Request, Shape, View
from moelab.scheduling.victims import Limit, Ranking, Victims, scores

_NEEDED, _PROTECTED, _PINNED = Cache.NEEDED, Cache.PROTECTED, Cache.PINNED
_NOT_PROTECTED = ~np.uint8(_PROTECTED)
_SPARED = (_NEEDED | _PROTECTED | _PINNED, _NEEDED | _PINNED)
"""Flags of those who do not go for a load: at first, and where the others are not enough."""


class Scheduler:
    """Takes the five decisions of a strategy over one model.

    Parameters
    ----------
    shape, strategy, knobs
        The model, the strategy (a template: the scheduler keeps its own copy) and the settings.

    Raises
    ------
    BudgetError
        The budget is below one layer's need; the message gives the number that would do.
    """

    def __init__(self, shape: Shape, strategy: Strategy, knobs: Knobs) -> None:
        self.shape, self.cache = shape, Cache(shape, knobs.budget_bytes)
        self.view = View(shape, knobs, self.cache)
        self._prefetched = bytearray(shape.n)  # and not used yet
        self._needed: list[Key] = []  # flagged as needed by the layer at work
        self._ranking = Ranking(self.view)
        self._index_of, self._layer_of = shape.index_of.tolist(), shape.layer_of.tolist()
        self._unverified = Unverified(self.view)
        check_budget(shape, strategy, knobs)
        self._adopt(strategy.fresh())

    # -- the contract with the engine -------------------------------------------------------

    def mask(self, layer: int) -> Sequence[bool] | np.ndarray | None:
        """Experts the router may choose in ``layer``; None for all."""
        return self.strategy.route.mask(layer, self.view)

    def bias(self, layer: int) -> Sequence[float] | np.ndarray | None:
        """What is added to each expert's place in the ranking, see `Route.bias`."""
        return self.strategy.route.bias(layer, self.view)

    def look_ahead(self, layer: int, *, prefill: bool) -> int:
        """How many of the next layers' routers the engine should ask now."""
        asked = self._in_prefill or not prefill
        most = self.shape.stack_end(layer) - 1 - layer
        return min(self.strategy.prefetch.look_ahead(self.view), most) if asked else 0

    def begin(self) -> LayerPlan:
        """What is to be resident before the next token: fetches the engine waits for."""
        plan = LayerPlan(-1)
        self._ranking.begin(self.strategy.evict)
        for place in self.strategy.pinned:  # first: their flag keeps them from going for others
            key = self.shape.key(*place)
            self._fetch(key, self._asked[key], e.SET_UP, _SPARED[1], plan)
        keys = [self.shape.key(p.layer, p.expert) for p in self.strategy.prefetch.begin(self.view)]
        self._need(keys)  # what is to be there must not go for one another
        for key in keys:
            self._fetch(key, self._asked[key], e.SET_UP, _SPARED[1], plan)
        self._release()
        self.cache.in_flight[:] = False  # the engine waits
        return plan

    def step(self, given: LayerInput) -> LayerPlan:
        """Decide one layer. The cache already shows the outcome when this returns."""
        layer, cache, plan = given.layer, self.cache, LayerPlan(given.layer)
        self._ranking.begin(self.strategy.evict)  # scores are those of this layer, asked once
        self._observe(given, plan)
        self._held[layer] &= _NOT_PROTECTED  # their layer has come, right or wrong
        skips: list[e.Row] = []
        plan.rows += e.free_hits(layer, given.free) if given.free else ()
        loads = self._serve(given, plan, skips)
        # All that this layer computes is needed before the first load looks for room.
        self._need([key for key, *_ in loads])
        for key, *_ in loads:  # one copy an expert: the one at too few bits makes room first
            if key in cache:
                self._evict(key, e.UPGRADE, plan)
        for key, expert, want, asked in loads:
            self._load(key, expert, want, asked, plan)
        plan.rows += skips
        # Guesses last: they take what room the layer's own loads left, and evict none of its own.
        if self._in_prefill or not given.prefill:
            self._prefetch(given, plan)
        for key in self.strategy.evict.after_layer(layer, self.view):
            if cache.bits_of[key] and not cache.held_of[key] & _PINNED:
                self._evict(int(key), e.NOT_KEPT, plan)
        self._release()
        return plan

    def end_of_token(self, kept: int | None = None) -> None:
        """A pass is over; of a drafted one the first ``kept`` rows stand, None: all."""
        self._unverified.settle(kept)
        self.cache.token = self.view.token = self.view.token + 1
        self.view.prefill = False

    def new_sequence(self) -> None:
        """A new prompt begins; the cache stays as it is."""
        self.view.token = self.view.layer = 0
        self.view.prefill = True
        self.cache.new_sequence()
        self._prefetched = bytearray(self.shape.n)
        for part in self.strategy.objects:
            part.new_sequence()

    def change(self, knobs: Knobs, strategy: Strategy | None = None) -> LayerPlan:
        """Other settings from here on; the plan has the copies that must leave.

        Parts that the new strategy shares with the old one go on with what they have learnt.
        Copies above the bits now asked for leave too: a lower bitwidth is meant to be seen.

        Raises
        ------
        BudgetError
            The budget is below one layer's need; nothing changes.
        """
        old = self.strategy
        check_budget(self.shape, strategy or old, knobs)
        cache, plan = self.cache, LayerPlan(-1)
        self.view.knobs = knobs
        self._adopt(old if strategy is None else strategy.following(old))
        cache.budget_bytes = knobs.budget_bytes
        self._ranking.begin(self.strategy.evict)
        for key, bits in cache.items():
            if bits > self._asked[key]:
                self._evict(key, e.BITS, plan)
        everywhere = itertools.product(range(self.shape.layers), self.shape.nbytes)
        for layer, bits in [(-1, 0), *everywhere]:  # the budget first, then every share
            for limit, lack in self._lacks(layer, bits, 0):
                self._evict_until(limit, lack, e.BUDGET, plan)
        return plan

    def warm(self, resident: Iterable[tuple[Key, int]]) -> None:
        """Begin with these copies (key, bits) in the cache, as far as they fit."""
        for key, bits in resident:
            if self.shape.size(key, bits) <= self.cache.free_bytes:
                self.cache.add(key, bits)

    def why(self, layer: int) -> dict[int, dict[str, float]]:
        """The evict decision's own terms for a layer's resident experts."""
        terms = self.strategy.evict.terms(self.view)
        first = self.shape.offset[layer]
        return {
            int(key) - first: {name: float(values[key]) for name, values in terms.items()}
            for key in self.view.residents(layer)
        }

    # -- how it decides ---------------------------------------------------------------------

    def _adopt(self, strategy: Strategy) -> None:
        """Put a strategy in force: what it says of settings alone is asked once, here."""
        shape, view, cache = self.shape, self.view, self.cache
        self.strategy = strategy
        self.observes = strategy.observes
        self._in_prefill: bool = getattr(strategy.prefetch, "in_prefill", False)
        self._observers = [p for p in strategy.objects if type(p).observe != Part.observe]
        view.precision = strategy.precision
        view.asked = asked_bits(strategy, view)
        view.asked.flags.writeable = False
        self._asked = view.asked.data
        cache.held &= ~np.uint8(_PINNED)  # pins are the strategy's: they stay as long as it does
        for place in strategy.pinned:
            cache.held[shape.key(*place)] |= _PINNED
        cache.in_flight[:] = False
        own = [shape.keys(layer) for layer in range(shape.layers)]
        self._held = [cache.held[keys] for keys in own]  # views: numbers of theirs change in place
        self._budget_limit = Limit()
        self._layer_limits = [Limit(layer=keys) for keys in own]
        self._tier_limits = {bits: Limit(tier=bits) for bits in shape.nbytes}
        self._shares = [strategy.allocate.layer_bytes(at, view) for at in range(shape.layers)]
        self._pools = {b: strategy.allocate.tier_bytes(b, view) for b in shape.nbytes}

    def _observe(self, given: LayerInput, plan: LayerPlan) -> None:
        """Take in what happened since the layer before; what was withdrawn leaves."""
        view, cache = self.view, self.cache
        view.layer, view.prefill = given.layer, given.prefill
        self._unverified.take(given, self._observers)
        if "in_flight" in self.observes:
            cache.in_flight[:] = False
            cache.in_flight[[key for key in given.in_flight if key in cache]] = True
        if "unread" in self.observes:
            for key in filter(cache.__contains__, given.unread):
                self._evict(key, e.UNREAD, plan)
        for part in self._observers:
            part.observe(given, view)

    def _serve(
        self, given: LayerInput, plan: LayerPlan, skips: list[e.Row]
    ) -> list[tuple[Key, int, int, int]]:
        """Serve what is resident, skip what may be; returns the loads: key, expert, want, asked."""
        view, layer = self.view, given.layer
        first = self.shape.offset[layer]
        bits_of, held_of, asked_of = self.cache.bits_of, self.cache.held_of, self._asked
        tier, chooses = self.strategy.precision.tier, not given.prefill
        loads: list[tuple[Key, int, int, int]] = []
        for request in given.requests():
            expert = request[0]
            key = first + expert
            asked, have = asked_of[key], bits_of[key]
            # A prompt and a pinned expert are served at the bits asked for, whatever the score.
            free = chooses and not held_of[key] & _PINNED
            want = tier(request, asked, view) if free else asked
            if have and have >= want:  # a better copy than wanted serves too: it is there
                cause = e.PREFETCHED if self._prefetched[key] else e.NONE
                self._hit(key, expert, have, asked, want, cause, plan)
            elif not want:
                skips.append((e.SKIP, layer, expert, asked, 0, e.SCORE, expert))
            else:
                other = None if have else self._stand_in(request)
                if other is None:
                    loads.append((key, expert, want, asked))
                else:
                    self._hit(other, expert, bits_of[other], asked, want, e.STAND_IN, plan)
        return loads

    def _stand_in(self, request: Request) -> Key | None:
        """A resident expert that the route decision sends in place of a missing one."""
        other = self.strategy.route.stand_in(request, self.view)
        key = None if other is None else self.shape.key(request.layer, other)
        return key if key is not None and key in self.cache else None

    def _hit(
        self, key: Key, expert: int, bits: int, asked: int, want: int, cause: int, plan: LayerPlan
    ) -> None:
        self._prefetched[key] = False
        self.cache.held_of[key] |= _NEEDED
        self._needed.append(key)
        served, layer = self._index_of[key], plan.layer
        kind = e.HIT if served == expert else e.SUBSTITUTE
        plan.rows.append((kind, layer, served, asked, bits, cause, expert))
        if bits < asked:
            plan.rows.append((e.DOWNGRADE, layer, served, asked, bits, cause, expert))
        self.cache.use(key, high=want >= asked)

    def _load(self, key: Key, expert: int, want: int, asked: int, plan: LayerPlan) -> None:
        # Evict before the load takes its room: the budget counts loads in flight.
        for limit, lack in self._lacks(plan.layer, want, self.shape.size(key, want)):
            left = self._evict_until(limit, lack, e.ROOM, plan)
            while left > 0:  # a prompt larger than the budget: who was served already goes
                left -= self._evict_served(limit, plan)
        self.cache.add(key, want)  # in the budget from now on, though its bytes are still to come
        self.cache.use(key, high=want >= asked)
        plan.rows.append((e.LOAD, plan.layer, expert, asked, want, e.ON_DEMAND, expert))
        if want < asked:
            plan.rows.append((e.DOWNGRADE, plan.layer, expert, asked, want, e.ON_DEMAND, expert))

    def _evict_served(self, limit: Limit, plan: LayerPlan) -> int:
        """One of this layer's own goes: the engine computes it before it obeys that row."""
        served = {row[2] for row in plan.rows if row[4] and row[0] in (e.HIT, e.LOAD, e.SUBSTITUTE)}
        mask = np.zeros(self.shape.n, np.bool_)
        mask[[self.shape.offset[plan.layer] + expert for expert in served]] = True
        mask &= limit.mask(self.cache)
        victims = Victims(self.cache, scores(self.strategy.evict, self.view), mask)
        key = next(victims.allowed(_PINNED), None)
        if key is None:
            raise BudgetError(f"no room within {self.cache.budget_bytes} bytes")
        return self._evict(key, e.ROOM, plan, victims)

    def _prefetch(self, given: LayerInput, plan: LayerPlan) -> None:
        shape, view, cache = self.shape, self.view, self.cache
        guess, tier = self.strategy.prefetch, self.strategy.precision.tier
        chooses = not given.prefill and type(self.strategy.precision).tier is not Precision.tier
        last = given.layer + guess.look_ahead(view)  # a trace may know more than is asked for
        ahead = [a for a in given.look_ahead if a.layer <= last]
        bits_of, held_of, spared = cache.bits_of, cache.held_of, _SPARED[0]
        anew: dict[int, int] = {}  # by layer, whose former guesses no longer count: its cause
        for p in guess.predict(given.layer, ahead, view):
            key, at = shape.offset[p.layer] + p.expert, p.layer
            if at not in anew:
                anew[at] = e.AHEAD + int(shape.away(given.layer)[at])
                self._held[at] &= _NOT_PROTECTED
            want = asked = self._asked[key]
            if asked > bits_of[key]:
                if chooses and not held_of[key] & _PINNED:
                    request = Request(p.expert, p.weight, p.rank, p.score, 1, p.layer)
                    want = tier(request, asked, view)
                self._prefetched[key] |= self._fetch(key, want, anew[at], spared, plan, p.instead)
            if bits_of[key]:  # fetched or there before: until its layer comes it may stay
                held_of[key] |= _PROTECTED

    def _fetch(
        self, key: Key, want: int, cause: int, spared: int, plan: LayerPlan, instead: Key = -1
    ) -> bool:
        """Load ahead of need, if only experts with none of the flags ``spared`` must go for it."""
        cache, asked = self.cache, self._asked[key]
        have = cache.bits_of[key]
        going = self._going(key, have, want, spared, instead) if want > have else None
        if going is None:
            return False  # it is there, or nobody leaves for a guess that does not fit
        if have:
            self._evict(key, e.UPGRADE, plan)
        for other, victims in going:
            self._evict(other, e.ROOM, plan, victims)
        cache.add(key, want)
        expert = self._index_of[key]
        plan.rows.append((e.PREFETCH, self._layer_of[key], expert, asked, want, cause, expert))
        cache.in_flight[key] = "in_flight" in self.observes
        return True

    def _going(
        self, key: Key, have: int, want: int, spared: int, instead: Key
    ) -> list[tuple[Key, Victims]] | None:
        """Who must go for a prefetch, besides its own copy; None where they may not.

        All are found before the first goes: a prefetch that does not fit evicts nobody.
        """
        bits_of, size = self.cache.bits_of, self.shape.size
        going: dict[Key, Victims] = {}
        for limit, lack in self._lacks(self._layer_of[key], want, size(key, want)):
            inside = [k for k in going if limit.holds(k, bits_of[k])] if going else ()
            left = lack - sum([size(k, bits_of[k]) for k in inside])
            left -= size(key, have) if have and limit.holds(key, have) else 0
            if left <= 0:
                continue
            victims = self._ranking.within(limit)
            named = instead >= 0 and bits_of[instead] and limit.holds(instead, bits_of[instead])
            first = [instead] if named and not self.cache.held_of[instead] & spared else []
            for other in itertools.chain(first, victims.allowed(spared)):
                if other not in going and other != key:
                    going[other] = victims
                    left -= size(other, bits_of[other])
                    if left <= 0:
                        break
            if left > 0:
                return None
        return list(going.items())

    # -- room ---------------------------------------------------------------------------------

    def _lacks(self, layer: int, bits: int, nbytes: int) -> Iterable[tuple[Limit, int]]:
        """What bounds a copy of ``nbytes``, and the bytes that it lacks there; only where it does.

        In this order: the layer's share, the tier's pool, the budget. What one eviction frees may
        answer a later one: each is looked at when the one before has been answered.
        """
        cache = self.cache
        if layer >= 0:
            share = self._shares[layer]
            if share is not None and share - cache.layer_bytes[layer] < nbytes:
                yield self._layer_limits[layer], nbytes - share + cache.layer_bytes[layer]
            pool = self._pools[bits]
            if pool is not None and pool - cache.tier_bytes[bits] < nbytes:
                yield self._tier_limits[bits], nbytes - pool + cache.tier_bytes[bits]
        if cache.free_bytes < nbytes:
            yield self._budget_limit, nbytes - cache.free_bytes

    def _evict_until(self, limit: Limit, lack: int, cause: int, plan: LayerPlan) -> int:
        """Evict until ``lack`` bytes are free; returns what is still lacking."""
        victims = self._ranking.within(limit)
        # For a load a guess goes where nobody else is left, for a smaller budget like any other.
        for spared in _SPARED if cause == e.ROOM else _SPARED[1:]:
            for key in victims.allowed(spared):
                lack -= self._evict(key, cause, plan, victims)
                if lack <= 0:
                    return 0
        return lack

    def _evict(self, key: Key, cause: int, plan: LayerPlan, victims: Victims | None = None) -> int:
        """Let a copy go; returns its bytes. ``victims``: among whom it was chosen."""
        bits = self.cache.remove(key)
        self._prefetched[key] = False
        place = (self._layer_of[key], self._index_of[key])
        plan.rows.append((e.EVICT, *place, bits, bits, cause, place[1]))
        return self.shape.size(key, bits)

    def _need(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.cache.held_of[key] |= _NEEDED
            self._needed.append(key)

    def _release(self) -> None:
        held_of = self.cache.held_of
        for key in self._needed:
            held_of[key] &= ~_NEEDED
        self._needed.clear()
