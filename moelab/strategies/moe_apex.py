"""MoE-APEX: HOBBIT's successor evicts by what a miss would cost and how soon it would come.

Source: ASPLOS'26, doi 10.1145/3779212.3790187, its rule as a third party reports it. Everything but
the eviction and the size of the high cache is HOBBIT's; symbols as there, and L an expert's uses at
low precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moelab.scheduling.strategy import Key, Strategy, View
from moelab.strategies.hobbit import SequenceRecords, TwoCaches, hobbit

HIGH_SHARE = 0.8


class CostAndDistance(SequenceRecords):
    """Lowest C/T leaves, plus 1/D for an expert that the last pass used.

    C = H + (B_l / B_h) L weighs a use by what missing it would have cost;
    D = ((l_t - l_i + l_n) mod l_n) + 0.1. Used in the last pass: R >= T - 1.
    """

    title = "uses by cost + 1/distance (MoE-APEX)"
    explained: ClassVar = {
        "uses by cost (C/T)": "uses per token, a low-precision one counting less",
        "nearness (1/D)": "of its layer, where the last pass used it",
        "priority": "their sum; the lowest leaves",
    }

    def terms(self, key: Key, view: View) -> tuple[float, float]:
        """C/T, and 1/D or 0."""
        t, n, nbytes = view.token + 1, view.shape.layers, view.shape.nbytes
        asked, low = view.asked_bits(key), view.knobs.low_bits
        ratio = nbytes[low] / nbytes[asked] if low is not None and low < asked else 1.0
        high = self.high_uses[key]
        cost = high + ratio * (self.uses[key] - high)
        distance = (key[0] - view.layer + n) % n + 0.1
        in_last_pass = 0 < self.last.get(key, 0) >= t - 1
        return cost / t, 1 / distance if in_last_pass else 0.0

    def priority(self, key: Key, view: View) -> float:
        return sum(self.terms(key, view))

    def why(self, key: Key, view: View) -> dict[str, float]:
        cost, near = self.terms(key, view)
        return {"uses by cost (C/T)": cost, "nearness (1/D)": near, "priority": cost + near}


def moe_apex(
    profile: Mapping[str, Any] | None = None,
    *,
    t1: float | None = None,
    t2: float | None = None,
    depth: int = 2,
    high: int | None = None,
    low: int = 4,
) -> Strategy:
    """MoE-APEX: HOBBIT's successor, evicting by cost-weighted uses and distance, high cache 80 %.

    Parameters as in `hobbit`; of its profile only T1 and T2 are used.
    """
    base = hobbit(profile, t1=t1, t2=t2, depth=depth, high=high, low=low)
    return base.replace(evict=CostAndDistance(), allocate=TwoCaches(HIGH_SHARE), name="moe_apex")
