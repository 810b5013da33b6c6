"""HOBBIT: an unimportant miss is served at low precision (Tang et al., arXiv 2411.01433v2).

Three ideas, one per section of the paper: which precision a *miss* is loaded at (token level,
`TierPair` in basics), how far ahead to look (layer level, `StackedGates`), and who leaves
(sequence level, `FourTerms` within `TwoCaches`). MoE-APEX, its successor, changes the last one.

Symbols: s unimportance score, T1 and T2 its thresholds; B_h and B_l bytes of an expert at high and
low precision; l_i the layer at work, l_t the expert's layer, l_n the number of layers; T the tokens
of this sequence so far (the prompt counts as one, the token at work as well, so T >= 1); for each
expert, all within this sequence, R the token of its last use (1 to T, 0: never), F its uses, H its
uses at high precision.

Different from the paper: an expert has one copy, so a high load replaces the low copy; the routers
of the coming layers are asked one by one where the paper stacks them (the values are the same).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from moelab.scheduling.requests import ranked
from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    Key,
    LookAhead,
    Parameter,
    Prediction,
    Prefetch,
    Request,
    Strategy,
    View,
)
from moelab.strategies.basics import TierPair

EQUAL = (0.25, 0.25, 0.25, 0.25)


# -- token level: what a miss costs --------------------------------------------------------------


class Decided(Protocol):
    """A decision of a replay, or a row of ``run.events``."""

    @property
    def kind(self) -> str: ...
    @property
    def bits_asked(self) -> int: ...
    @property
    def bits(self) -> int: ...


def miss_penalty(decisions: Iterable[Decided], nbytes: Mapping[int, int]) -> float:
    """What the loads on demand cost: 1 for one at high precision, B_l / B_h for one at low.

    Parameters
    ----------
    decisions
        ``replay(...).decisions`` or ``run.events.itertuples()``, the prompt's too if they are in
        there; hits, skips and prefetches cost nothing.
    nbytes
        Bytes of an expert at each tier, ``shape.nbytes``.

    Examples
    --------
    >>> from moelab.scheduling.scheduler import Decision
    >>> high = Decision("load", 0, 3, 16, 16, 1600, "on demand")
    >>> low = Decision("load", 0, 5, 16, 4, 400, "on demand")
    >>> miss_penalty([high, low], {16: 1600, 4: 400})
    1.25
    """
    return sum(nbytes[d.bits] / nbytes[d.bits_asked] for d in decisions if d.kind == "load")


def miss_shares(decisions: Iterable[Decided]) -> dict[str, float]:
    """Shares of the misses that were loaded high, loaded low, and skipped; zeros without misses."""
    counts = Counter(
        "skip" if d.kind == "skip" else "high" if d.bits >= d.bits_asked else "low"
        for d in decisions
        if d.kind in ("load", "skip")
    )
    return {name: counts[name] / (counts.total() or 1) for name in ("high", "low", "skip")}


# -- layer level: the stacked gates --------------------------------------------------------------


class StackedGates(Prefetch):
    """The next p layers' gates on this layer's input; on to the next layer while all is there.

    Walks from layer l + 1 on and stops behind the first layer that misses a predicted expert (at
    the tier wanted for it), at the latest behind l + p. So what is near is fetched first, and what
    is far only when the link would idle. Experts seen on the way are protected from eviction.
    """

    title = "stacked gates, adaptive depth (HOBBIT)"

    def depth(self, view: View) -> int:
        return view.knobs.prefetch

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        for coming in look_ahead:
            if coming.layer > layer + self.depth(view):  # a trace may know more than is wanted
                return
            guesses = ranked(coming.experts, coming.weights, coming.layer)
            missing = any(self._missing(r, view) for r in guesses)  # before any is fetched
            for r in guesses:
                yield Prediction((r.layer, r.expert), r.weight, r.rank, r.score)
            if missing:
                return

    def _missing(self, guess: Request, view: View) -> bool:
        return view.cache.bits((guess.layer, guess.expert)) < view.wanted_bits(guess)


# -- sequence level: who leaves ------------------------------------------------------------------


class SequenceRecords(Evict):
    """R, F and H of every expert, resident or not, since the prompt."""

    def __init__(self) -> None:
        self.last: dict[Key, int] = {}  # R
        self.uses: Counter[Key] = Counter()  # F
        self.high_uses: Counter[Key] = Counter()  # H

    def used(self, key: Key, bits: int, view: View) -> None:
        self.last[key] = view.token + 1
        self.uses[key] += 1
        self.high_uses[key] += bits >= view.asked_bits(key)

    def new_sequence(self) -> None:
        self.last.clear()
        self.uses.clear()
        self.high_uses.clear()


class FourTerms(SequenceRecords):
    """Lowest p leaves: p = w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - distance / l_n).

    The distance ((l_t - l_i + l_n) mod l_n) is how many layers from now the expert's layer comes.
    The weights count by their ratio: they are divided by their sum, so that it is 1. The paper does
    not publish its weights; `moelab.calibration` finds those with the least miss penalty.

    Parameters
    ----------
    w_lru, w_lfu, w_lhu, w_fld
        Weights of recency, frequency, high-precision frequency and nearness; none below 0.

    Raises
    ------
    ValueError
        A weight is negative, or all are 0.
    """

    title = "LRU + LFU + LHU + FLD, weighted (HOBBIT)"
    explained: ClassVar = {
        "recency (LRU)": "last use / tokens so far",
        "frequency (LFU)": "uses / tokens so far",
        "high uses (LHU)": "high-precision uses / tokens so far",
        "nearness (FLD)": "1 where its layer comes next",
        "priority": "the sum of the four, weighted; the lowest leaves",
    }
    parameters = (
        Parameter("w_lru", "weight of recency: last use / tokens so far"),
        Parameter("w_lfu", "weight of frequency: uses / tokens so far"),
        Parameter("w_lhu", "weight of high-precision uses / tokens so far: costly to miss"),
        Parameter("w_fld", "weight of nearness: the sooner its layer comes, the longer it stays"),
    )

    def __init__(
        self, w_lru: float = 0.25, w_lfu: float = 0.25, w_lhu: float = 0.25, w_fld: float = 0.25
    ) -> None:
        super().__init__()
        self.w_lru, self.w_lfu, self.w_lhu, self.w_fld = w_lru, w_lfu, w_lhu, w_fld
        given = (w_lru, w_lfu, w_lhu, w_fld)
        if min(given) < 0 or sum(given) <= 0:
            raise ValueError(f"weights {given}: none may be below 0, and one must be above")

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """The four weights in force: sum 1, equal where all four were set to 0."""
        given = (self.w_lru, self.w_lfu, self.w_lhu, self.w_fld)
        total = sum(given)
        return tuple(w / total for w in given) if total else EQUAL  # type: ignore[return-value]

    def terms(self, key: Key, view: View) -> tuple[float, float, float, float]:
        """The four terms before weighting, each from 0 to 1."""
        t, n = view.token + 1, view.shape.layers
        distance = (key[0] - view.layer + n) % n
        return (
            self.last.get(key, 0) / t,
            self.uses[key] / t,
            self.high_uses[key] / t,
            1 - distance / n,
        )

    def priority(self, key: Key, view: View) -> float:
        return self._p(view)(key)

    def victim(self, allowed: Callable[[Key], bool], view: View) -> Key | None:
        return min(filter(allowed, view.cache), key=self._p(view), default=None)

    def _p(self, view: View) -> Callable[[Key], float]:
        """The priority as a function: what all keys have in common is worked out once."""
        (w_lru, w_lfu, w_lhu, w_fld), t, n = self.weights, view.token + 1, view.shape.layers
        last, uses, high = self.last, self.uses, self.high_uses
        near = [w_fld * (1 - (layer - view.layer + n) % n / n) for layer in range(n)]

        def p(key: Key) -> float:
            records = w_lru * last.get(key, 0) + w_lfu * uses[key] + w_lhu * high[key]
            return records / t + near[key[0]]

        return p

    def why(self, key: Key, view: View) -> dict[str, float]:
        names = ("recency (LRU)", "frequency (LFU)", "high uses (LHU)", "nearness (FLD)")
        weighted = [w * x for w, x in zip(self.weights, self.terms(key, view), strict=True)]
        return dict(zip(names, weighted, strict=True)) | {"priority": self.priority(key, view)}


class TwoCaches(Allocate):
    """One cache for high copies, one for low; the high one is the larger.

    Each keeps at least what one token's layer may need of it, whatever ``high_share`` says: top-k
    high copies (prefill and first-ranked experts load high only) and top-k low ones. With one
    precision (``low_bits`` None) there is one pool.

    Parameters
    ----------
    high_share
        Part of the budget for high copies. HOBBIT only says "larger", MoE-APEX 0.8.
    """

    title = "a high and a low cache (HOBBIT)"
    parameters = (
        Parameter("high_share", "part of the budget for high-precision copies", 0.5, 0.95),
    )

    def __init__(self, high_share: float = 0.75) -> None:
        if not 0.5 <= high_share <= 0.95:
            raise ValueError(f"high_share={high_share}: 0.5 to 0.95 of the budget")
        self.high_share = high_share

    def tier_bytes(self, bits: int, view: View) -> int | None:
        knobs, k, nbytes = view.knobs, view.shape.top_k, view.shape.nbytes
        if knobs.low_bits is None or knobs.low_bits >= knobs.bits:
            return None
        high = round(self.high_share * knobs.budget_bytes)
        high = min(high, knobs.budget_bytes - k * nbytes[knobs.low_bits])
        high = max(high, k * nbytes[knobs.bits])
        return high if bits > knobs.low_bits else max(knobs.budget_bytes - high, 0)


# -- the strategies ------------------------------------------------------------------------------


def hobbit(
    profile: Mapping[str, Any] | None = None,
    *,
    t1: float | None = None,
    t2: float | None = None,
    depth: int = 2,
    high: int | None = None,
    low: int = 4,
    weights: Sequence[float] | None = None,
    high_share: float = 0.75,
) -> Strategy:
    """HOBBIT: unimportant misses at low precision, the next layers' gates ahead, two caches.

    Parameters
    ----------
    profile
        Of ``lab.calibrate("hobbit")``: T1, T2 and the weights, where they are not given here.
    t1, t2
        Thresholds on the unimportance score; without a profile Mixtral's, 0.6 and 0.9.
    depth
        p, layers to look ahead at most (0: off).
    high, low
        The pair of tiers: the paper has 16 and 4, 8 and 2. ``high`` None keeps the setting.
    weights
        w_lru, w_lfu, w_lhu, w_fld; without a profile equal.
    high_share
        Part of the budget for the high cache.
    """
    found = profile or {}
    preset = {
        "low_bits": low,
        "t1": found.get("t1", 0.6) if t1 is None else t1,
        "t2": found.get("t2", 0.9) if t2 is None else t2,
        "prefetch": depth,
    }
    return Strategy(
        "hobbit",
        FourTerms(*(found.get("weights", EQUAL) if weights is None else weights)),
        allocate=TwoCaches(high_share),
        precision=TierPair(),
        prefetch=StackedGates(),
        preset=preset if high is None else preset | {"bits": high},
    )
