"""AdapMoE: no second expert where it hardly matters, and cache where it pays.

Source: S. Zhong et al., "AdapMoE: Adaptive Sensitivity-based Expert Gating and Management for
Efficient MoE Inference", arXiv 2408.10284. Its two ideas:

gating
    Leaving an expert of gate weight w out of layer l costs about ½·h_l·w² of loss, h_l being how
    sensitive the loss is to that layer. It is left out where w < sqrt(τ/h_l), so each omission
    costs at most τ/2.
allocation
    Dynamic programming gives every layer its number of cached experts c_l, so that the expected
    loads Σ_l (1 - hit_l(c_l)) are fewest within the budget.

Prefetching is HOBBIT's: the next layer's gate, one layer further while all guesses are in memory.

Not as there: h_l is measured (the KL divergence with all but the first experts of the layer left
out) instead of summed from Fisher gradients, and hit_l is counted on a trace under LRU instead of
computed from uniform routing; the dynamic programme does not know what prefetching and gating save.
With top-k above 2 every expert but the first may be left out. Those that stay keep their weights
instead of sharing its, and an expert in memory is used all the same. Without a calibration h_l = 1
for every layer and the shares are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from moelab.scheduling.strategy import Allocate, Parameter, Precision, Request, Strategy, View
from moelab.strategies.basics import LRU
from moelab.strategies.hobbit import StackedGates

TAU = 0.05
"""Of a model that was not measured."""


class SensitivityGate(Precision):
    """Leave out what is missing and has a gate weight below sqrt(τ/h_l).

    Parameters
    ----------
    h
        Sensitivity of each layer, nats; empty: 1 for all.
    tau
        Twice the loss, nats of KL divergence, that leaving one expert out may cost.
    """

    title = "drop below a layer's sensitivity (AdapMoE)"
    parameters: ClassVar = (
        Parameter("tau", "τ: an omission may cost τ/2 nats of KL divergence", 0.0, 0.5, 0.005),
    )

    def __init__(self, h: Sequence[float] = (), tau: float = TAU) -> None:
        self.h = tuple(h)
        self.tau = self.parameters[0].checked(tau)

    def threshold(self, layer: int) -> float:
        """Gate weight below which an expert of ``layer`` is left out."""
        h = self.h[layer] if layer < len(self.h) else 1.0
        return math.sqrt(self.tau / h) if h > 0 else math.inf

    def tier(self, request: Request, asked: int, view: View) -> int:
        first = request.rank == 0
        return asked if first or request.weight >= self.threshold(request.layer) else 0


class BestShares(Allocate):
    """Each layer's number of experts by dynamic programming over its measured hit ratios.

    Parameters
    ----------
    hits
        ``hits[l][c]``: hit ratio of layer l with c experts cached, c from 0 to E; empty: equal
        shares.
    """

    title = "experts a layer by dynamic programming (AdapMoE)"

    def __init__(self, hits: Sequence[Sequence[float]] = ()) -> None:
        self.hits = tuple(tuple(row) for row in hits)
        self._known: dict[tuple[int, int], tuple[int, ...]] = {}  # (room, least) -> c [L]

    def layer_bytes(self, layer: int, view: View) -> int | None:
        budget, shape = view.knobs.budget_bytes, view.shape
        each = shape.nbytes[view.knobs.bits]
        room = min(budget // each, sum(shape.experts))
        if len(self.hits) != shape.layers or room < shape.top_k * shape.layers:
            return budget // shape.layers
        setting = (room, shape.top_k)
        if setting not in self._known:
            self._known[setting] = best_shares(self.hits, *setting)
        counts = self._known[setting]
        return counts[layer] * each + (budget - sum(counts) * each) // shape.layers


def best_shares(hits: Sequence[Sequence[float]], room: int, least: int) -> tuple[int, ...]:
    """Experts c_l of each layer, ``least`` <= c_l <= E_l, Σ c_l <= ``room``, most Σ hits[l][c_l].

    >>> best_shares([[0, 0.5, 0.6, 0.7], [0, 0.1, 0.5, 0.9]], 4, 1)
    (1, 3)

    Raises
    ------
    ValueError
        ``room`` is below ``least`` for every layer.
    """
    if room < least * len(hits):
        raise ValueError(f"room for {room} experts is below {least} in each of {len(hits)} layers")
    best = np.full(room + 1, -np.inf)  # [experts given so far] -> most hits
    best[0] = 0.0
    choices = []
    for row in hits:
        new, choice = np.full(room + 1, -np.inf), np.zeros(room + 1, int)
        for c in range(least, min(len(row) - 1, room) + 1):
            found = best[: room + 1 - c] + row[c]
            better = found > new[c:]
            new[c:][better], choice[c:][better] = found[better], c
        best = new
        choices.append(choice)
    shares, used = [], int(np.argmax(best))
    for choice in reversed(choices):
        shares.append(int(choice[used]))
        used -= shares[-1]
    return tuple(reversed(shares))


def adapmoe(profile: Mapping[str, Any] | None = None, *, tau: float | None = None) -> Strategy:
    """Unimportant experts are dropped by their layer's sensitivity; shares by dynamic programming.

    Parameters
    ----------
    profile
        ``{"h": [L], "hits": [L][E + 1], "tau": τ}`` of ``lab.calibrate("adapmoe")``.
    tau
        Twice the KL divergence, nats, that one omission may cost; default the profile's.
    """
    known = profile or {}
    return Strategy(
        "adapmoe",
        LRU(),
        allocate=BestShares(known.get("hits", ())),
        precision=SensitivityGate(
            known.get("h", ()), known.get("tau", TAU) if tau is None else tau
        ),
        prefetch=StackedGates(depth=2),
    )
