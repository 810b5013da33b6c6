"""A plan: what one layer is served, what is skipped, evicted and fetched ahead, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from moelab.scheduling.events import Decision, Row, in_words
from moelab.scheduling.stream import Key


class Serve(NamedTuple):
    """One expert to compute: the router's ``expert`` by the copy of ``key`` at ``bits``.

    ``load``: on demand, not there when the layer asked for it.
    """

    expert: int
    bits: int
    key: Key = -1
    load: bool = False


@dataclass(slots=True)
class LayerPlan:
    """What the engine does for one layer: ``rows`` of `moelab.scheduling.events`, in this order.

    Prefetches that were withdrawn (evictions), hits, loads by falling weight (each behind the
    evictions that make its room), skips, prefetches likewise, evictions of what is not kept. A
    downgrade stands right behind the hit or load that it is about. An eviction may name an expert
    served earlier in the same plan (a prefill larger than the budget): the engine computes what is
    pending before it lets go. ``layer`` is -1 between tokens.
    """

    layer: int
    rows: list[Row] = field(default_factory=list)

    def decisions(self, nbytes: Mapping[int, int]) -> Iterator[Decision]:
        """Every decision of this plan in words."""
        sizes = dict(nbytes)
        return (in_words(row, sizes) for row in self.rows)
