"""The event array: one record for everything that happens to an expert.

A scheduler's plan, the log of a run and the outcome of a replay are rows of the same kind, so that
what a replay decides can be held against what a run did. Kinds and causes are codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np

from moelab.scheduling.stream import Shape

KINDS = ("hit", "load", "prefetch", "downgrade", "skip", "substitute", "evict", "stall")
HIT, LOAD, PREFETCH, DOWNGRADE, SKIP, SUBSTITUTE, EVICT, STALL = range(len(KINDS))
CODES = {kind: code for code, kind in enumerate(KINDS)}

_CAUSES = (
    "",
    "on demand",  # a load, and the stall that waits for it
    "prefetched",  # a hit of a prefetch's copy
    "stand-in",  # served by another expert
    "score",  # skipped by the precision decision
    "set-up",  # resident before the first token, or after a change of settings
    "room",  # evicted for another copy
    "upgrade",  # evicted for a copy of the same expert at more bits
    "budget",  # evicted by a smaller budget or share
    "bits",  # evicted by fewer bits asked for
    "not kept",  # evicted by the strategy when its layer was computed
    "unread",  # a prefetch withdrawn before it was read
    "cancelled",  # a load that was never read
    "failed",  # evicted: its load failed
    "prefetch late",  # a hit of a prefetch's copy that is still on its way, and the stall for it
    "evict",  # a stall: the copy that leaves was still on its way
)
AHEAD = len(_CAUSES)
CAUSES = (*_CAUSES, *(f"ahead +{n}" for n in range(256 - AHEAD)))
"""Words of the causes by code; ``"ahead +n"``: fetched for the layer n layers on, on the ring."""
CAUSE = {cause: code for code, cause in enumerate(CAUSES)}
NONE, ON_DEMAND, PREFETCHED, STAND_IN, SCORE, SET_UP, ROOM, UPGRADE, BUDGET, BITS = range(10)
NOT_KEPT, UNREAD, CANCELLED, FAILED, LATE, EVICTED_LATE = range(10, AHEAD)
GUESSED = (CAUSES[PREFETCHED], CAUSES[LATE])
"""Causes of a hit that a prefetch made, in time or late; what has no clock says the first."""

DTYPE = np.dtype(
    [
        ("token", "i4"),
        ("at", "i2"),
        ("layer", "i2"),
        ("expert", "i2"),
        ("kind", "u1"),
        ("bits_asked", "u1"),
        ("bits", "u1"),
        ("bytes", "i8"),
        ("start_ms", "f8"),
        ("dur_ms", "f8"),
        ("cause", "u1"),
    ]
)
"""One event. ``token`` is the generated token it was spent on (0: the prefill), ``at`` the layer
whose step decided it, -1 between tokens (a set-up, a change of settings); ``bits`` is what was
served, 0 for a skip; times are milliseconds since the run began; ``kind`` and ``cause`` are codes
of `KINDS` and `CAUSES`.

Rows are in the order decided: resident at a token and layer is what was so at the start, changed by
all rows up to there.
"""

Row = tuple[int, int, int, int, int, int, int]
"""(kind, layer, expert, bits asked, bits, cause, the router's expert) of one decision."""


def free_hits(layer: int, free: Sequence[Sequence[int]]) -> list[Row]:
    """Hits of 0 bits and bytes: experts without weights, each once however many tokens chose it.

    They are always there: never loaded, never evicted, and no part is asked about them.
    """
    return [(HIT, layer, one, 0, 0, NONE, one) for one in sorted(set(chain.from_iterable(free)))]


class Decision(NamedTuple):
    """One decision in words."""

    kind: str
    layer: int
    expert: int
    bits_asked: int
    bits: int
    nbytes: int
    cause: str


def in_words(row: Row, shape: Shape) -> Decision:
    """A row of a plan as a `Decision`."""
    kind, layer, expert, asked, bits, cause, _ = row
    own = shape.size(shape.key(layer, expert), bits) if bits else 0  # none of a free expert
    size = 0 if kind in (DOWNGRADE, SKIP) else own
    return Decision(KINDS[kind], layer, expert, asked, bits, size, CAUSES[cause])


@dataclass(slots=True)
class LayerPlan:
    """What the engine does for one layer: its ``rows``, in this order.

    Prefetches that were withdrawn (evictions), hits, loads by falling weight (each behind the
    evictions that make its room), skips, prefetches likewise, evictions of what is not kept. A
    downgrade stands right behind the hit or load that it is about. An eviction may name an expert
    served earlier in the same plan (a prefill larger than the budget): the engine computes what is
    pending before it lets go. ``layer`` is -1 between tokens.
    """

    layer: int
    rows: list[Row] = field(default_factory=list)

    def decisions(self, shape: Shape) -> Iterator[Decision]:
        """Every decision of this plan in words."""
        return (in_words(row, shape) for row in self.rows)
