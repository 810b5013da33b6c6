"""MoE-APEX: HOBBIT's successor evicts by what a miss would cost and how soon it would come.

Source: ASPLOS'26, doi 10.1145/3779212.3790187, its rule as a third party reports it. Everything but
the eviction and the size of the high cache is HOBBIT's; symbols as there, and L an expert's uses
that asked for low precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from moelab.scheduling.strategy import Evict, Strategy, View
from moelab.strategies.hobbit import TwoCaches, hobbit, layers_away

HIGH_SHARE = 0.8


class CostAndDistance(Evict):
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

    def score(self, view: View) -> np.ndarray:
        cost, near = self._sum(view)
        return cost + near

    def terms(self, view: View) -> Mapping[str, np.ndarray]:
        cost, near = self._sum(view)
        return {"uses by cost (C/T)": cost, "nearness (1/D)": near, "priority": cost + near}

    def _sum(self, view: View) -> tuple[np.ndarray, np.ndarray]:
        """C/T, and 1/D or 0, of every expert ``[n]``."""
        t, nbytes = view.token + 1, view.shape.nbytes
        low = getattr(view.precision, "low_bits", None)
        ratio = np.ones(max(nbytes) + 1)  # by the bits asked for
        for bits in nbytes:
            if low is not None and low < bits:
                ratio[bits] = nbytes[low] / nbytes[bits]
        cost = view.high_uses + ratio[view.asked] * (view.uses - view.high_uses)
        near = (1 / (layers_away(view) + 0.1))[view.layer_of]
        in_last_pass = (view.last_token > 0) & (view.last_token >= t - 1)
        return cost / t, np.where(in_last_pass, near, 0.0)


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
    parts = {"evict": CostAndDistance(), "allocate": TwoCaches(HIGH_SHARE)}
    return base.replace(**parts, name="moe_apex", keywords={"strategy": "moe_apex"})
