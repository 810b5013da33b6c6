"""The plain strategies every other one is measured against, and the first predictor.

LRU, LFU, LRU per layer (each layer its own share, as in mixtral-offloading, arXiv 2312.17238) and
on-demand loading that keeps nothing. All of them take HOBBIT's precision rule, which is off while
``low_bits`` is not set, and look ahead through the next layers' routers, which is off while
``prefetch`` is 0.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from moelab.scheduling.scheduler import ranked
from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    Key,
    LookAhead,
    Precision,
    Prediction,
    Prefetch,
    Request,
    Strategy,
    View,
)


class LRU(Evict):
    """Least recently used leaves."""

    title = "least recently used"
    explained: ClassVar = {"uses since": "uses of any expert since its last; the highest leaves"}

    def __init__(self) -> None:
        self._order: OrderedDict[Key, int] = OrderedDict()
        self._clock = 0

    def loaded(self, key: Key, bits: int, view: View) -> None:
        self._touch(key)

    def used(self, key: Key, bits: int, view: View) -> None:
        self._touch(key)

    def gone(self, key: Key) -> None:
        self._order.pop(key, None)

    def victim(self, allowed: Callable[[Key], bool], view: View) -> Key | None:
        return next((k for k in self._order if allowed(k)), None)

    def why(self, key: Key, view: View) -> dict[str, float]:
        return {"uses since": float(self._clock - self._order.get(key, 0))}

    def _touch(self, key: Key) -> None:
        self._clock += 1
        self._order[key] = self._clock
        self._order.move_to_end(key)


class LFU(LRU):
    """Least frequently used in this sequence leaves; among equals the least recently used."""

    title = "least frequently used"
    explained: ClassVar = {
        "uses": "in this sequence; the lowest leaves",
        "uses since": "uses of any expert since its last; the highest leaves among equals",
    }

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[Key] = Counter()

    def used(self, key: Key, bits: int, view: View) -> None:
        super().used(key, bits, view)
        self._uses[key] += 1

    def victim(self, allowed: Callable[[Key], bool], view: View) -> Key | None:
        return min(filter(allowed, self._order), key=self._uses.__getitem__, default=None)

    def new_sequence(self) -> None:
        self._uses.clear()

    def why(self, key: Key, view: View) -> dict[str, float]:
        return {"uses": float(self._uses[key])} | super().why(key, view)


class KeepNothing(LRU):
    """Every expert leaves as soon as its layer is computed: loading on demand, no cache."""

    title = "keep nothing"

    def after_layer(self, layer: int, view: View) -> Iterable[Key]:
        return [k for k in self._order if k[0] == layer]


class EqualShares(Allocate):
    """Each layer gets the same share of the budget."""

    title = "an equal share for every layer"

    def layer_bytes(self, layer: int, view: View) -> int:
        return view.knobs.budget_bytes // view.shape.layers


class TierPair(Precision):
    """HOBBIT's rule on a miss: high below T1, low up to T2, skip above (arXiv 2411.01433, sec. 3).

    The score s of an expert is the sum of the normalised gate weights ranked before it, so the
    first expert always comes at high precision. Off (always high) while ``low_bits`` is None.
    """

    title = "high, low or skip by score (HOBBIT)"

    def tier(self, request: Request, asked: int, view: View) -> int:
        knobs = view.knobs
        if knobs.low_bits is None or knobs.low_bits >= asked or request.score <= knobs.t1:
            return asked
        return knobs.low_bits if request.score <= knobs.t2 else 0


class GateLookAhead(Prefetch):
    """The next layers' own routers, asked early with this layer's input (HOBBIT; Eliseev & Mazur).

    ``prefetch`` in the settings says how many layers ahead; 0 switches it off.
    """

    title = "the next layers' gates, asked early"

    def depth(self, view: View) -> int:
        return view.knobs.prefetch

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        for coming in look_ahead:
            for r in ranked(coming.experts, coming.weights):
                yield Prediction((coming.layer, r.expert), r.weight, r.rank, r.score)


def _basic(name: str, evict: Evict) -> Strategy:
    return Strategy(name, evict, precision=TierPair(), prefetch=GateLookAhead())


def lru() -> Strategy:
    """One pool; the least recently used expert leaves."""
    return _basic("lru", LRU())


def lfu() -> Strategy:
    """One pool; the expert least used in this sequence leaves."""
    return _basic("lfu", LFU())


def layer_lru() -> Strategy:
    """LRU within an equal share of the budget for every layer."""
    return _basic("layer_lru", LRU()).replace(allocate=EqualShares(), name="layer_lru")


def on_demand() -> Strategy:
    """Nothing is kept: every expert is loaded each time it is needed."""
    return _basic("on_demand", KeepNothing())
