"""A plan: what one layer is served, what is skipped, evicted and fetched ahead, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moelab.scheduling.stream import Key


class Drop(NamedTuple):
    """A copy that leaves; cause: room, upgrade, budget, bits, not kept, unread."""

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

    ``withdrawn`` are prefetches that were not begun in time. ``serves`` holds hits first, then
    loads by falling weight; ``skips`` are (expert, bits asked). A drop may name an expert served
    earlier in the same plan (a prefill larger than the budget): the engine computes what is
    pending before it lets go.
    """

    layer: int
    withdrawn: list[Drop] = field(default_factory=list)
    serves: list[Serve] = field(default_factory=list)
    skips: list[tuple[int, int]] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    after: list[Drop] = field(default_factory=list)

    def decisions(self, nbytes: dict[int, int]) -> Iterator[Decision]:
        """Every decision of this plan, in the order the engine obeys them."""
        lay = self.layer
        yield from _dropped(self.withdrawn, nbytes)
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
