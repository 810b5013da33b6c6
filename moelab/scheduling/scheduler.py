"""One layer's routing and the cache make a plan: serve, skip, evict, prefetch.

The scheduler decides and never touches bytes, threads, clocks or torch. The cache changes when a
load is issued, so what is decided depends on the stream of activations alone: the same object runs
live and in replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moelab.scheduling.cache import Cache
from moelab.scheduling.strategy import Key, Knobs, Request, Shape, Strategy, View
from moelab.scheduling.trace import LayerInput


class BudgetError(ValueError):
    """The budget cannot hold what one token needs at once."""


class Drop(NamedTuple):
    """A copy that leaves, and why (``room``, ``upgrade``, ``budget``, ``bits``, ``not kept``)."""

    key: Key
    bits: int
    cause: str


class Serve(NamedTuple):
    """One expert of this layer: compute ``served`` (the router's ``expert`` or its stand-in).

    ``load`` is True where its bytes must be fetched first; ``drops`` free the room for that.
    """

    expert: int
    served: int
    bits: int
    asked: int
    load: bool
    cause: str
    drops: tuple[Drop, ...] = ()


class Fetch(NamedTuple):
    """A load ahead of need."""

    key: Key
    bits: int
    asked: int
    cause: str
    drops: tuple[Drop, ...] = ()


class Decision(NamedTuple):
    """One decision as the event log and a replay both write it down."""

    kind: str
    layer: int
    expert: int
    bits_asked: int
    bits: int
    nbytes: int
    cause: str


@dataclass(slots=True)
class LayerPlan:
    """What the engine does for one layer, in this order.

    ``serves`` holds hits first, then loads by falling weight; ``skips`` are (expert, bits asked).
    A drop may name an expert served earlier in the same plan (a prefill larger than the budget):
    the engine computes what is pending before it lets go.
    """

    layer: int
    serves: list[Serve] = field(default_factory=list)
    skips: list[tuple[int, int]] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    after: list[Drop] = field(default_factory=list)

    def decisions(self, nbytes: dict[int, int]) -> Iterator[Decision]:
        """Every decision of this plan, in the order the engine obeys them."""
        lay = self.layer
        for s in self.serves:
            yield from _dropped(s.drops, nbytes)
            kind = "load" if s.load else "substitute" if s.served != s.expert else "hit"
            yield Decision(kind, lay, s.served, s.asked, s.bits, nbytes[s.bits], s.cause)
            if s.bits < s.asked:
                yield Decision("downgrade", lay, s.served, s.asked, s.bits, 0, s.cause)
        for expert, asked in self.skips:
            yield Decision("skip", lay, expert, asked, 0, 0, "score")
        for f in self.fetches:
            yield from _dropped(f.drops, nbytes)
            yield Decision("prefetch", *f.key, f.asked, f.bits, nbytes[f.bits], f.cause)
        yield from _dropped(self.after, nbytes)


def _dropped(drops: Sequence[Drop], nbytes: dict[int, int]) -> Iterator[Decision]:
    for d in drops:
        yield Decision("evict", *d.key, d.bits, d.bits, nbytes[d.bits], d.cause)


class Scheduler:
    """Takes the five decisions of a strategy over one model.

    Parameters
    ----------
    shape, strategy, knobs
        The model, the strategy (a template: the scheduler keeps its own copy) and the settings.

    Raises
    ------
    BudgetError
        The budget is below one token's need; the message gives the number that would do.
    """

    def __init__(self, shape: Shape, strategy: Strategy, knobs: Knobs) -> None:
        self.shape = shape
        self.cache = Cache(shape, knobs.budget_bytes)
        self.view = View(shape, knobs, self.cache)
        self.strategy = strategy.fresh()
        self._protected: dict[int, set[Key]] = {}
        self._ahead: set[Key] = set()
        check_budget(shape, self.strategy, knobs)

    # -- the contract with the engine -------------------------------------------------------

    def mask(self, layer: int) -> Sequence[bool] | None:
        """Experts the router may choose in ``layer``; None for all."""
        return self.strategy.route.mask(layer, self.view)

    def depth(self, layer: int, *, prefill: bool) -> int:
        """How many of the next layers' routers the engine should ask now."""
        if prefill:
            return 0
        return min(self.strategy.prefetch.depth(self.view), self.shape.layers - 1 - layer)

    def step(self, given: LayerInput) -> LayerPlan:
        """Decide one layer. The cache already shows the outcome when this returns."""
        view, plan = self.view, LayerPlan(given.layer)
        view.layer, view.prefill = given.layer, given.prefill
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
            if key in self.cache:
                plan.after.append(self._drop(key, "not kept"))
        return plan

    def end_of_token(self) -> None:
        """The model has produced one token."""
        self.view.token += 1

    def new_sequence(self) -> None:
        """A new prompt begins; the cache stays as it is."""
        self.view.token = 0
        self.view.prefill = True
        self._protected.clear()
        self.strategy.evict.new_sequence()

    def change(self, knobs: Knobs, strategy: Strategy | None = None) -> list[Drop]:
        """Other settings from here on; returns the copies that must leave.

        Copies above the bits now asked for leave too: a lower bitwidth is meant to be seen.
        """
        new = self.strategy if strategy is None else strategy.fresh()
        check_budget(self.shape, new, knobs)
        view, cache = self.view, self.cache
        view.knobs, self.strategy = knobs, new
        cache.budget_bytes = knobs.budget_bytes
        if strategy is not None:
            for key, bits in list(cache.items()):
                new.evict.loaded(key, bits, view)
        drops = [
            self._drop(key, "bits")
            for key, bits in list(cache.items())
            if bits > new.allocate.bits(key, view)
        ]
        while cache.free_bytes < 0:
            drops.append(self._drop(self._victim(lambda _: True), "budget"))
        for layer in range(self.shape.layers):
            share = new.allocate.layer_bytes(layer, view)
            while share is not None and cache.layer_bytes[layer] > share:
                drops.append(self._drop(self._victim(lambda k, at=layer: k[0] == at), "budget"))
        return drops

    def warm(self, resident: Iterable[tuple[Key, int]]) -> None:
        """Begin with these copies (key, bits) in the cache, as far as they fit."""
        for key, bits in resident:
            if self.shape.nbytes[bits] <= self.cache.free_bytes:
                self.cache.add(key, bits)
                self.strategy.evict.loaded(key, bits, self.view)

    def why(self, key: Key) -> dict[str, float]:
        """The evict decision's own terms for a resident expert."""
        return self.strategy.evict.why(key, self.view)

    # -- how it decides ---------------------------------------------------------------------

    def _request(self, request: Request, plan: LayerPlan, loads: list, needed: set[Key]) -> None:
        view, key = self.view, (plan.layer, request.expert)
        asked = self.strategy.allocate.bits(key, view)
        want = asked if view.prefill else self.strategy.precision.tier(request, asked, view)
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
        shelter = set().union(*self._protected.values()) if self._protected else set()
        tests: tuple[Callable[[Key], bool], ...] = (
            lambda k: k not in needed and k not in shelter,
            lambda k: k not in needed,
            lambda k: k in served,
        )
        self._make_room(plan.layer, self.shape.nbytes[want], tests, drops)
        self.cache.add(key, want)
        plan.serves.append(
            Serve(request.expert, request.expert, want, asked, True, "on demand", tuple(drops))
        )
        self.strategy.evict.loaded(key, want, self.view)
        self.strategy.evict.used(key, want, self.view)

    def _prefetch(self, given: LayerInput, plan: LayerPlan, needed: set[Key]) -> None:
        view, guess = self.view, self.strategy.prefetch
        for p in guess.predict(given.layer, given.look_ahead, view):
            asked = self.strategy.allocate.bits(p.key, view)
            request = Request(p.key[1], p.weight, p.rank, p.score)
            want = self.strategy.precision.tier(request, asked, view)
            have = self.cache.bits(p.key)
            shelter = set().union(*self._protected.values()) if self._protected else set()
            if want == 0 or (have and have >= want):
                if have:
                    self._protected.setdefault(p.key[0], set()).add(p.key)
                continue
            test = lambda k, s=shelter: k not in needed and k not in s  # noqa: E731
            if not self._has_room(p.key, self.shape.nbytes[want], test):
                continue  # the rest of the cache is needed sooner than this guess
            drops = [self._drop(p.key, "upgrade")] if have else []
            self._make_room(p.key[0], self.shape.nbytes[want], (test,), drops)
            self.cache.add(p.key, want)
            self._ahead.add(p.key)
            self._protected.setdefault(p.key[0], set()).add(p.key)
            plan.fetches.append(
                Fetch(p.key, want, asked, f"look-ahead +{p.key[0] - given.layer}", tuple(drops))
            )
            self.strategy.evict.loaded(p.key, want, view)

    def _has_room(self, key: Key, nbytes: int, test: Callable[[Key], bool]) -> bool:
        """Whether `_make_room` would succeed (``key``'s own copy may go too)."""
        sizes, cache = self.shape.nbytes, self.cache
        share = self.strategy.allocate.layer_bytes(key[0], self.view)
        if share is not None:
            inside = (b for k, b in cache.items() if k[0] == key[0] and (k == key or test(k)))
            if share - cache.layer_bytes[key[0]] + sum(sizes[b] for b in inside) < nbytes:
                return False
        if cache.free_bytes >= nbytes:
            return True
        going = (sizes[b] for k, b in cache.items() if k == key or test(k))
        return cache.free_bytes + sum(going) >= nbytes

    def _make_room(
        self,
        layer: int,
        nbytes: int,
        tests: Sequence[Callable[[Key], bool]],
        drops: list[Drop],
    ) -> None:
        share = self.strategy.allocate.layer_bytes(layer, self.view)
        if share is not None:
            inside = [lambda k, t=t: k[0] == layer and t(k) for t in tests]
            while self.cache.layer_bytes[layer] + nbytes > share:
                drops.append(self._drop_first(inside, nbytes))
        while self.cache.free_bytes < nbytes:
            drops.append(self._drop_first(tests, nbytes))

    def _drop_first(self, tests: Sequence[Callable[[Key], bool]], nbytes: int) -> Drop:
        for test in tests:
            key = self._ask_victim(test)
            if key is not None:
                return self._drop(key, "room")
        raise BudgetError(f"no room for {nbytes} bytes within {self.cache.budget_bytes}")

    def _victim(self, test: Callable[[Key], bool]) -> Key:
        key = self._ask_victim(test)
        if key is None:  # a policy that forgot a copy must not break the promise
            key = next(k for k in self.cache if test(k))
        return key

    def _ask_victim(self, test: Callable[[Key], bool]) -> Key | None:
        key = self.strategy.evict.victim(test, self.view)
        if key is not None and not (key in self.cache and test(key)):
            raise ValueError(
                f"{type(self.strategy.evict).__name__}.victim chose expert {key}, which is not "
                "resident or is needed now; choose a resident key that allowed(key) admits"
            )
        return key

    def _drop(self, key: Key, cause: str) -> Drop:
        bits = self.cache.remove(key)
        self._ahead.discard(key)
        self.strategy.evict.gone(key)
        return Drop(key, bits, cause)


def requests(given: LayerInput) -> list[Request]:
    """The layer's unique experts: a token's by falling weight, a prompt's by falling use."""
    if not given.prefill and len(given.experts) == 1:
        return ranked(given.experts[0], given.weights[0])
    seen: dict[int, list[float]] = {}
    for row, weights in zip(given.experts, given.weights, strict=True):
        for expert, weight in zip(row, weights, strict=True):
            seen.setdefault(expert, []).append(weight)
    order = sorted(seen.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Request(e, max(w), tokens=len(w)) for e, w in order]


def ranked(experts: Sequence[int], weights: Sequence[float]) -> list[Request]:
    """One token's requests: weights normalised to sum 1, HOBBIT's score = weights ranked before."""
    total = sum(abs(w) for w in weights) or 1.0
    pairs = sorted(zip(experts, weights, strict=True), key=lambda p: (-abs(p[1]), p[0]))
    out, before = [], 0.0
    for rank, (expert, weight) in enumerate(pairs):
        share = abs(weight) / total
        out.append(Request(expert, share, rank, before))
        before += share
    return out


def check_budget(shape: Shape, strategy: Strategy, knobs: Knobs) -> None:
    """Refuse a budget that cannot hold one layer's top-k at the bits asked for."""
    need = minimum_budget(shape, strategy, knobs)
    if knobs.budget_bytes < need:
        raise BudgetError(
            f"budget {_mb(knobs.budget_bytes)} is below one token's need with strategy "
            f"{strategy.name!r} (top-{shape.top_k} at {knobs.bits} bit: {_mb(need)}); raise it to "
            f"{need} bytes or choose fewer bits"
        )


def minimum_budget(shape: Shape, strategy: Strategy, knobs: Knobs) -> int:
    """Least bytes that hold the top-k experts of every layer in turn, or in its own share."""
    view = View(shape, knobs, Cache(shape, knobs.budget_bytes))
    worst = []
    for layer, count in enumerate(shape.experts):
        sizes = (shape.nbytes[strategy.allocate.bits((layer, e), view)] for e in range(count))
        worst.append(sum(sorted(sizes, reverse=True)[: shape.top_k]))
    shared = strategy.allocate.layer_bytes(0, view) is None
    return max(worst) if shared else max(worst) * shape.layers


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB"
