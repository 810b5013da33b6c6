"""The plain strategies every other one is measured against, and the first predictor.

LRU, LFU, LRU per layer (each layer its own share, as in mixtral-offloading, arXiv 2312.17238) and
on-demand loading that keeps nothing. These take HOBBIT's precision rule, which is off while
``low_bits`` is not set, and look ahead through the next layers' routers, which is off while
``depth`` is 0. Two rules of thumb besides: everything in memory, which is what offloading is
measured against, and dropping a missing expert that hardly counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    Key,
    LookAhead,
    Parameter,
    Precision,
    Prediction,
    Prefetch,
    Request,
    Strategy,
    View,
)

DEPTH = Parameter("depth", "layers to look ahead, 0: off", 0, 3, 1)
"""Of every part that looks ahead through coming layers."""


class LRU(Evict):
    """Least recently used leaves."""

    title = "least recently used"
    explained: ClassVar = {
        "uses since": "uses and loads of any expert since its last; the highest leaves"
    }

    def score(self, view: View) -> np.ndarray:
        return view.last_use

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        return {"uses since": view.clock - view.last_use}


class LFU(LRU):
    """Least frequently used in this sequence leaves; among equals the least recently used."""

    title = "least frequently used"
    explained: ClassVar = {
        "uses": "in this sequence; the lowest leaves",
        "uses since": "uses and loads of any since its last; the highest leaves among equals",
    }

    def score(self, view: View) -> np.ndarray:
        return view.uses

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        return {"uses": view.uses, **super().terms(view)}


class KeepNothing(LRU):
    """Every expert leaves as soon as its layer is computed: loading on demand, no cache."""

    title = "keep nothing"

    def after_layer(self, layer: int, view: View) -> Iterable[Key]:
        return view.residents(layer)


class EqualShares(Allocate):
    """Each layer gets the same share of the budget."""

    title = "an equal share for every layer"

    def layer_bytes(self, layer: int, view: View) -> int:
        return view.knobs.budget_bytes // view.shape.layers


class TierPair(Precision):
    """HOBBIT's rule on a miss: high below T1, low up to T2, skip above (arXiv 2411.01433, sec. 3).

    The score s of an expert is the sum of the normalised gate weights ranked before it, so the
    first expert always comes at high precision. Off (always high) while ``low_bits`` is None or
    not below the bits asked for.
    """

    title = "high, low or skip by score (HOBBIT)"
    parameters: ClassVar = (
        Parameter("low_bits", "second tier, for unimportant misses; off: one precision", tier=True),
        Parameter("t1", "T1: unimportance score above which a miss is loaded at low bits"),
        Parameter("t2", "T2: score above which it is skipped"),
    )

    def __init__(self, low_bits: int | None = None, t1: float = 0.6, t2: float = 0.9) -> None:
        self.low_bits, self.t1, self.t2 = low_bits, t1, t2
        self.check()

    def check(self) -> None:
        numbers = all(isinstance(t, (int, float)) for t in (self.t1, self.t2))
        if not numbers or not 0 <= self.t1 <= self.t2:
            raise ValueError(f"t1={self.t1!r}, t2={self.t2!r}: need 0 <= t1 <= t2, both numbers")

    def tier(self, request: Request, asked: int, view: View) -> int:
        low = self.low_bits
        if low is None or low >= asked or request.score <= self.t1:
            return asked
        return low if request.score <= self.t2 else 0


class GateLookAhead(Prefetch):
    """The next layers' own routers, asked early with this layer's input (HOBBIT; Eliseev & Mazur).

    ``depth`` says how many layers ahead; 0 switches it off.
    """

    title = "the next layers' gates, asked early"
    parameters: ClassVar = (DEPTH,)

    def __init__(self, depth: int = 0) -> None:
        self.depth = DEPTH.checked(depth)

    def look_ahead(self, view: View) -> int:
        return self.depth

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        for coming in look_ahead:
            yield from map(expected, coming.requests())


def expected(request: Request) -> Prediction:
    """A request of a coming layer as a prediction."""
    return Prediction(request.layer, request.expert, request.weight, request.rank, request.score)


def turns(view: View) -> np.ndarray:
    """How many layers each expert's own has to wait for its turn: 1 next, L at work now ``[n]``."""
    return view.shape.next_turn(view.layer)[view.layer_of]


class DropIfCold(Precision):
    """Skip an expert that is missing and has less than F/k of the normalised gate weight.

    Training-free. With F <= 1 the first expert always stays, since the largest of k weights that
    sum to 1 is at least 1/k. The others keep their weights.
    """

    title = "drop if missing and weight < F/k"
    parameters: ClassVar = (
        Parameter("factor", "F: a missing expert below F/k of the gate weight is dropped"),
    )

    def __init__(self, factor: float = 0.6) -> None:
        self.factor = self.parameters[0].checked(factor)

    def tier(self, request: Request, asked: int, view: View) -> int:
        return 0 if request.weight < self.factor / view.shape.top_k else asked


class LoadAll(Prefetch):
    """Before the first token as many experts as fit, the same number of every layer."""

    title = "everything that fits, at the start"

    def begin(self, view: View) -> Iterable[Prediction]:
        room = view.knobs.budget_bytes
        for expert in range(max(view.shape.experts)):
            for layer, count in enumerate(view.shape.experts):
                if expert < count:
                    room -= view.shape.nbytes[int(view.asked[view.shape.key(layer, expert)])]
                    if room < 0:
                        return
                    yield Prediction(layer, expert)


def lru() -> Strategy:
    """One pool; the least recently used expert leaves."""
    return _basic("lru", LRU())


def lfu() -> Strategy:
    """One pool; the expert least used in this sequence leaves."""
    return _basic("lfu", LFU())


def layer_lru() -> Strategy:
    """LRU within an equal share of the budget for every layer."""
    return _basic("layer_lru", LRU(), EqualShares())


def on_demand() -> Strategy:
    """Nothing is kept: every expert is loaded each time it is needed."""
    return _basic("on_demand", KeepNothing())


def in_ram() -> Strategy:
    """Everything that fits is loaded before the first token; the rest on demand, LRU."""
    return Strategy("in_ram", LRU(), prefetch=LoadAll())


def drop_if_cold(*, factor: float = 0.6) -> Strategy:
    """LRU; a missing expert with little gate weight is dropped instead of loaded."""
    return Strategy("drop_if_cold", LRU(), precision=DropIfCold(factor), prefetch=GateLookAhead())


def _basic(name: str, evict: Evict, allocate: Allocate | None = None) -> Strategy:
    parts = {"precision": TierPair(), "prefetch": GateLookAhead()}
    return Strategy(name, evict, allocate or Allocate(), **parts)
