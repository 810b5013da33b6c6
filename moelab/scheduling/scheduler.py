"""One layer's routing and the cache make a plan: serve, skip, evict, prefetch.

The scheduler decides and never touches bytes, threads, clocks or torch. The cache changes when a
load is issued, so what is decided depends on the stream of activations alone: the same object runs
live and in replay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from moelab.scheduling.budget import BudgetError, check_budget, minimum_budget
from moelab.scheduling.cache import Cache
from moelab.scheduling.plan import Decision, Drop, Fetch, LayerPlan, Serve
from moelab.scheduling.requests import ranked, requests
from moelab.scheduling.strategy import Strategy
from moelab.scheduling.stream import Key, Knobs, Prediction, Request, Shape, View
from moelab.scheduling.trace import LayerInput

__all__ = [
    "BudgetError",
    "Decision",
    "Drop",
    "Fetch",
    "LayerPlan",
    "Scheduler",
    "Serve",
    "check_budget",
    "minimum_budget",
    "ranked",
    "requests",
]


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
        self.shape = shape
        self.cache = Cache(shape, knobs.budget_bytes)
        self.view = View(shape, knobs, self.cache)
        self._take(strategy.fresh())
        self._protected: dict[int, set[Key]] = {}
        self._ahead: set[Key] = set()
        check_budget(shape, self.strategy, knobs)

    # -- the contract with the engine -------------------------------------------------------

    def mask(self, layer: int) -> Sequence[bool] | None:
        """Experts the router may choose in ``layer``; None for all."""
        return self.strategy.route.mask(layer, self.view)

    def bias(self, layer: int) -> Sequence[float] | None:
        """What is added to each expert's place in the ranking, see `Route.bias`."""
        return self.strategy.route.bias(layer, self.view)

    def depth(self, layer: int, *, prefill: bool) -> int:
        """How many of the next layers' routers the engine should ask now."""
        if prefill:
            return 0
        return min(self.strategy.prefetch.depth(self.view), self.shape.layers - 1 - layer)

    def begin(self) -> LayerPlan:
        """What is to be resident before the next token: fetches the engine waits for."""
        view, plan = self.view, LayerPlan(-1)
        wanted = [*map(Prediction, view.keep), *self.strategy.prefetch.begin(view)]
        listed = {p.key for p in wanted}
        for p in wanted:
            bits = view.asked_bits(p.key)
            stay = view.keep if p.key in view.keep else listed
            self._fetch(p.key, bits, bits, "set-up", plan, lambda k, s=stay: k not in s)
        view.in_flight.clear()  # the engine waits
        return plan

    def step(self, given: LayerInput) -> LayerPlan:
        """Decide one layer. The cache already shows the outcome when this returns."""
        view, plan = self.view, LayerPlan(given.layer)
        self._look(given, plan)
        self._protected.pop(given.layer, None)
        loads: list[tuple[Request, int, int]] = []
        needed = set[Key]()
        for request in requests(given):
            self._request(request, plan, loads, needed)
        needed.update((given.layer, r.expert) for r, _, _ in loads)
        drops = [
            self._drop((given.layer, r.expert), "upgrade")
            for r, _, _ in loads
            if (given.layer, r.expert) in self.cache
        ]
        for request, want, asked in loads:
            self._load(request, want, asked, plan, needed, drops)
            drops = []
        if not given.prefill:
            self._prefetch(given, plan, needed)
        for key in self.strategy.evict.after_layer(given.layer, view):
            if key in self.cache and key not in view.keep:
                plan.after.append(self._drop(key, "not kept"))
        return plan

    def end_of_token(self) -> None:
        """The model has produced one token."""
        self.view.token += 1
        self.view.prefill = False

    def new_sequence(self) -> None:
        """A new prompt begins; the cache stays as it is."""
        self.view.token = 0
        self.view.prefill = True
        self._protected.clear()
        self._ahead.clear()
        for part in self.strategy.objects:
            part.new_sequence()

    def change(self, knobs: Knobs, strategy: Strategy | None = None) -> list[Drop]:
        """Other settings from here on; returns the copies that must leave.

        Parts that the new strategy shares with the old one go on with what they have learnt.
        Copies above the bits now asked for leave too: a lower bitwidth is meant to be seen.
        """
        old = self.strategy
        check_budget(self.shape, strategy or old, knobs)
        new = old if strategy is None else strategy.following(old)
        view, cache = self.view, self.cache
        view.knobs = knobs
        self._take(new)
        cache.budget_bytes = knobs.budget_bytes
        if new.evict is not old.evict:
            for key, bits in list(cache.items()):
                new.evict.loaded(key, bits, view)
        drops = [
            self._drop(key, "bits")
            for key, bits in list(cache.items())
            if bits > view.asked_bits(key)
        ]
        while cache.free_bytes < 0:
            drops.append(self._drop(self._victim(lambda _: True), "budget"))
        for layer, bits in itertools.product(range(self.shape.layers), self.shape.nbytes):
            for free, inside in self._limits(layer, bits):
                while free() < 0:
                    drops.append(self._drop(self._victim(inside), "budget"))
        return drops

    def warm(self, resident: Iterable[tuple[Key, int]], *, known: bool = False) -> None:
        """Begin with these copies (key, bits) in the cache, as far as they fit.

        ``known``: the strategy's state is of a time when they were resident already.
        """
        for key, bits in resident:
            if self.shape.nbytes[bits] <= self.cache.free_bytes:
                self.cache.add(key, bits)
                if not known:
                    self.strategy.evict.loaded(key, bits, self.view)

    def why(self, key: Key) -> dict[str, float]:
        """The evict decision's own terms for a resident expert."""
        return self.strategy.evict.why(key, self.view)

    # -- how it decides ---------------------------------------------------------------------

    def _take(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.view.allocate, self.view.precision = strategy.allocate, strategy.precision
        self.view.keep = strategy.keep
        self._observes = strategy.observes
        self.view.in_flight.clear()

    def _look(self, given: LayerInput, plan: LayerPlan) -> None:
        """Take in what happened since the layer before."""
        view = self.view
        view.layer, view.prefill = given.layer, given.prefill
        if "in_flight" in self._observes:
            view.in_flight = {k for k in given.in_flight if k in self.cache}
        if "unread" in self._observes:
            for key in given.unread:
                if key in self.cache:
                    plan.withdrawn.append(self._drop(key, "unread"))
        for part in self.strategy.objects:
            part.observe(given, view)

    def _request(self, request: Request, plan: LayerPlan, loads: list, needed: set[Key]) -> None:
        view, key = self.view, (plan.layer, request.expert)
        asked = view.asked_bits(key)
        given = view.prefill or key in view.keep
        want = asked if given else self.strategy.precision.tier(request, asked, view)
        have = self.cache.bits(key)
        if have and have >= want:
            self._serve_resident(key, request.expert, have, asked, plan, needed)
        elif want == 0:
            plan.skips.append((request.expert, asked))
        else:
            other = None if have else self.strategy.route.stand_in(request, view)
            if other is not None and (plan.layer, other) in self.cache:
                have = self.cache.bits((plan.layer, other))
                self._serve_resident((plan.layer, other), request.expert, have, asked, plan, needed)
            else:
                loads.append((request, want, asked))

    def _serve_resident(
        self, key: Key, expert: int, bits: int, asked: int, plan: LayerPlan, needed: set[Key]
    ) -> None:
        cause = "stand-in" if key[1] != expert else "prefetched" if key in self._ahead else ""
        self._ahead.discard(key)
        needed.add(key)
        plan.serves.append(Serve(expert, key[1], bits, asked, False, cause))
        self.cache.touch(key)
        self.strategy.evict.used(key, bits, self.view)

    def _load(
        self,
        request: Request,
        want: int,
        asked: int,
        plan: LayerPlan,
        needed: set[Key],
        drops: list[Drop],
    ) -> None:
        key = (plan.layer, request.expert)
        served = {(plan.layer, s.served) for s in plan.serves}
        shelter = self._shelter()
        tests: tuple[Callable[[Key], bool], ...] = (
            lambda k: k not in needed and k not in shelter,
            lambda k: k not in needed,
            lambda k: k in served,
        )
        self._make_room(plan.layer, want, tests, drops)
        self.cache.add(key, want)
        plan.serves.append(
            Serve(request.expert, request.expert, want, asked, True, "on demand", tuple(drops))
        )
        self.strategy.evict.loaded(key, want, self.view)
        self.strategy.evict.used(key, want, self.view)

    def _prefetch(self, given: LayerInput, plan: LayerPlan, needed: set[Key]) -> None:
        view, guess = self.view, self.strategy.prefetch
        last = given.layer + guess.depth(view)  # a trace may know more than is asked for
        ahead = [a for a in given.look_ahead if a.layer <= last]
        for p in guess.predict(given.layer, ahead, view):
            layer, expert = p.key
            asked = view.asked_bits(p.key)
            request = Request(expert, p.weight, p.rank, p.score, layer=layer)
            kept = p.key in view.keep
            want = asked if kept else self.strategy.precision.tier(request, asked, view)
            shelter = self._shelter()
            cause = f"ahead +{(layer - given.layer) % self.shape.layers}"
            if self._fetch(
                p.key, want, asked, cause, plan, lambda k, s=shelter: k not in needed and k not in s
            ):
                self._ahead.add(p.key)
            if p.key in self.cache:
                self._protected.setdefault(layer, set()).add(p.key)

    def _fetch(
        self,
        key: Key,
        want: int,
        asked: int,
        cause: str,
        plan: LayerPlan,
        test: Callable[[Key], bool],
    ) -> bool:
        """Load ahead of need, if that is needed and only ``test``-ed experts must go for it."""
        have = self.cache.bits(key)
        if want == 0 or (have and have >= want) or not self._has_room(key, want, test):
            return False
        drops = [self._drop(key, "upgrade")] if have else []
        self._make_room(key[0], want, (test,), drops)
        self.cache.add(key, want)
        plan.fetches.append(Fetch(key, want, asked, cause, tuple(drops)))
        self.strategy.evict.loaded(key, want, self.view)
        if "in_flight" in self._observes:
            self.view.in_flight.add(key)
        return True

    def _shelter(self) -> set[Key]:
        """Experts that a prediction protects, and those kept for good."""
        return set(self.view.keep).union(*self._protected.values())

    def _limits(
        self, layer: int, bits: int
    ) -> list[tuple[Callable[[], int], Callable[[Key], bool]]]:
        """What bounds a copy: (bytes free, which residents count) of layer, tier and budget."""
        cache, allocate, view = self.cache, self.strategy.allocate, self.view
        out: list[tuple[Callable[[], int], Callable[[Key], bool]]] = []
        share = allocate.layer_bytes(layer, view)
        if share is not None:
            out.append((lambda: share - cache.layer_bytes[layer], lambda k: k[0] == layer))
        pool = allocate.tier_bytes(bits, view)
        if pool is not None:
            out.append((lambda: pool - cache.tier_bytes[bits], lambda k: cache.bits(k) == bits))
        out.append((lambda: cache.free_bytes, lambda _: True))
        return out

    def _has_room(self, key: Key, bits: int, test: Callable[[Key], bool]) -> bool:
        """Whether `_make_room` would succeed (``key``'s own copy may go too)."""
        sizes = self.shape.nbytes
        for free, inside in self._limits(key[0], bits):
            lack = sizes[bits] - free()
            if lack <= 0:
                continue
            going = (sizes[b] for k, b in self.cache.items() if inside(k) and (k == key or test(k)))
            if sum(going) < lack:
                return False
        return True

    def _make_room(
        self, layer: int, bits: int, tests: Sequence[Callable[[Key], bool]], drops: list[Drop]
    ) -> None:
        need = self.shape.nbytes[bits]
        for free, inside in self._limits(layer, bits):
            while free() < need:
                drops.append(
                    self._drop_first([lambda k, t=t: inside(k) and t(k) for t in tests], need)  # noqa: B023
                )

    def _drop_first(self, tests: Sequence[Callable[[Key], bool]], nbytes: int) -> Drop:
        for test in tests:
            key = self._ask_victim(test)
            if key is not None:
                return self._drop(key, "room")
        raise BudgetError(f"no room for {nbytes} bytes within {self.cache.budget_bytes}")

    def _victim(self, test: Callable[[Key], bool]) -> Key:
        key = self._ask_victim(test)
        if key is None:  # a policy that forgot a copy must not break the promise
            key = next(k for k in self.cache if test(k) and k not in self.view.keep)
        return key

    def _ask_victim(self, test: Callable[[Key], bool]) -> Key | None:
        keep = self.view.keep
        allowed = (lambda k: k not in keep and test(k)) if keep else test
        key = self.strategy.evict.victim(allowed, self.view)
        if key is not None and not (key in self.cache and allowed(key)):
            raise ValueError(
                f"{type(self.strategy.evict).__name__}.victim chose expert {key}, which is not "
                "resident or is needed now; choose a resident key that allowed(key) admits"
            )
        return key

    def _drop(self, key: Key, cause: str) -> Drop:
        bits = self.cache.remove(key)
        self._ahead.discard(key)
        self.view.in_flight.discard(key)
        self.strategy.evict.gone(key)
        return Drop(key, bits, cause)
