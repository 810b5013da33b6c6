"""HOBBIT: an unimportant miss is served at low precision (Tang et al., arXiv 2411.01433v2).

Three ideas, one per section of the paper: which precision a *miss* is loaded at (token level,
`TierPair` in basics), how far ahead to look (layer level, `StackedGates`), and who leaves
(sequence level, `FourTerms` within `TwoCaches`). MoE-APEX, its successor, changes the last one.

Symbols: s unimportance score, T1 and T2 its thresholds; B_h and B_l bytes of an expert at high and
low precision; l_i the layer at work, l_t the expert's layer, l_n the number of layers; T the tokens
of this sequence so far (the prompt counts as one, the token at work as well, so T >= 1); for each
expert, all within this sequence, R the token of its last use (1 to T, 0: never), F its uses, H
those that asked for high precision, whatever copy served them.

Different from the paper: an expert has one copy, so a high load replaces the low copy (an
independent simulation puts two copies at a miss penalty 1 to 3 % higher for budgets of 10 to 50 %
and 6 % lower at 75 %); the routers of the coming layers are asked one by one where the paper stacks
them (the values are the same).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from moelab.scheduling.strategy import (
    Allocate,
    Evict,
    LookAhead,
    Parameter,
    Prediction,
    Request,
    Strategy,
    View,
)
from moelab.strategies.basics import GateLookAhead, TierPair, expected

EQUAL = (0.25, 0.25, 0.25, 0.25)


# -- token level: what a miss costs --------------------------------------------------------------


def miss_penalty(decisions: Iterable[Any], nbytes: Mapping[int, int]) -> float:
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
    >>> from moelab.scheduling.events import Decision
    >>> high = Decision("load", 0, 3, 16, 16, 1600, "on demand")
    >>> low = Decision("load", 0, 5, 16, 4, 400, "on demand")
    >>> miss_penalty([high, low], {16: 1600, 4: 400})
    1.25
    """
    return sum(nbytes[d.bits] / nbytes[d.bits_asked] for d in decisions if d.kind == "load")


def miss_shares(decisions: Iterable[Any]) -> dict[str, float]:
    """Shares of the misses that were loaded high, loaded low, and skipped; zeros without misses."""
    counts = Counter(
        "skip" if d.kind == "skip" else "high" if d.bits >= d.bits_asked else "low"
        for d in decisions
        if d.kind in ("load", "skip")
    )
    return {name: counts[name] / (counts.total() or 1) for name in ("high", "low", "skip")}


# -- layer level: the stacked gates --------------------------------------------------------------


class StackedGates(GateLookAhead):
    """The next p layers' gates on this layer's input; on to the next layer while all is there.

    Walks from layer l + 1 on and stops behind the first layer that misses a predicted expert (at
    the tier wanted for it), at the latest behind l + p. So what is near is fetched first, and what
    is far only when the link would idle. Experts seen on the way are protected from eviction, until
    their layer is predicted anew. A prompt is looked ahead for too, all of its tokens together.
    """

    in_prefill = True

    title = "stacked gates, adaptive depth (HOBBIT)"

    def predict(
        self, layer: int, look_ahead: Sequence[LookAhead], view: View
    ) -> Iterable[Prediction]:
        for coming in look_ahead:
            guesses = coming.requests()
            missing = any(self._missing(r, view) for r in guesses)  # before any is fetched
            yield from map(expected, guesses)
            if missing:
                return

    def _missing(self, guess: Request, view: View) -> bool:
        have = view.bits[view.shape.key(guess.layer, guess.expert)]
        return have < view.wanted_bits(guess)


# -- sequence level: who leaves ------------------------------------------------------------------


def layers_away(view: View) -> np.ndarray:
    """(l_t - l_i + l_n) mod l_n of every layer ``[L]``: how many layers from now it comes.

    An encoder's, behind the layer at work, come no more: l_n.
    """
    return view.shape.away(view.layer)


class FourTerms(Evict):
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
        "high uses (LHU)": "requests for high precision / tokens so far",
        "nearness (FLD)": "1 where its layer comes next",
        "priority": "the sum of the four, weighted; the lowest leaves",
    }
    parameters = (
        Parameter("w_lru", "weight of recency: last use / tokens so far"),
        Parameter("w_lfu", "weight of frequency: uses / tokens so far"),
        Parameter("w_lhu", "weight of requests for high precision / tokens so far: costly to miss"),
        Parameter("w_fld", "weight of nearness: the sooner its layer comes, the longer it stays"),
    )

    def __init__(
        self, w_lru: float = 0.25, w_lfu: float = 0.25, w_lhu: float = 0.25, w_fld: float = 0.25
    ) -> None:
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

    def score(self, view: View) -> np.ndarray:
        (w_lru, w_lfu, w_lhu, w_fld), n = self.weights, view.shape.layers
        records = w_lru * view.last_token + w_lfu * view.uses + w_lhu * view.high_uses
        near = w_fld * (1 - layers_away(view) / n)  # [L]
        return records / (view.token + 1) + near[view.layer_of]

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        (w_lru, w_lfu, w_lhu, w_fld), t = self.weights, view.token + 1
        near = w_fld * (1 - layers_away(view) / view.shape.layers)  # [L]
        return {
            "recency (LRU)": w_lru * view.last_token / t,
            "frequency (LFU)": w_lfu * view.uses / t,
            "high uses (LHU)": w_lhu * view.high_uses / t,
            "nearness (FLD)": near[view.layer_of],
            "priority": self.score(view),
        }


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
        self.high_share = self.parameters[0].checked(high_share)

    def tier_bytes(self, bits: int, view: View) -> int | None:
        knobs, k, nbytes, low = view.knobs, view.shape.top_k, view.shape.nbytes, view.low_bits
        if low is None:
            return None
        high = round(self.high_share * knobs.budget_bytes)
        high = min(high, knobs.budget_bytes - k * nbytes[low])
        high = max(high, k * nbytes[knobs.bits])
        return high if bits > low else max(knobs.budget_bytes - high, 0)


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
    scores: tuple[float, float] = (
        found.get("t1", 0.6) if t1 is None else t1,
        found.get("t2", 0.9) if t2 is None else t2,
    )
    return Strategy(
        "hobbit",
        FourTerms(*(found.get("weights", EQUAL) if weights is None else weights)),
        allocate=TwoCaches(high_share),
        precision=TierPair(low, *scores),
        prefetch=StackedGates(depth),
        bits=high,
    )
