"""Who may leave, in order: the lowest score first, among equals the least recently used.

A layer that lacks room asks the evict decision once for the scores of all experts. As few of them
are put in order as are evicted: the lowest few are selected, more only when those are used up.

n experts of the model, m of them that may go.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moelab.scheduling.cache import Cache
from moelab.scheduling.parts import Evicts
from moelab.scheduling.stream import Key, View

_FIRST = 8
"""How many are put in order at first."""


class Limit:
    """What bounds memory: a layer's share (its keys), a tier's pool, or else the budget."""

    __slots__ = ("layer", "tier")

    def __init__(self, layer: slice | None = None, tier: int = 0) -> None:
        self.layer, self.tier = layer, tier

    def mask(self, cache: Cache) -> np.ndarray:
        """The resident copies that count, bool ``[n]``."""
        mask = cache.bits == self.tier if self.tier else cache.bits > 0
        if self.layer is not None:
            mask[: self.layer.start] = False
            mask[self.layer.stop :] = False
        return mask

    def holds(self, key: Key, bits: int) -> bool:
        """Whether a copy counts."""
        if self.layer is not None:
            return self.layer.start <= key < self.layer.stop
        return not self.tier or self.tier == bits


def scores(evict: Evicts, view: View) -> np.ndarray:
    """What the evict decision says of all experts, checked.

    Raises
    ------
    ValueError
        It is not one number for each expert.
    """
    found = np.asarray(evict.score(view))
    if found.shape != (view.shape.n,) or found.dtype.kind not in "biuf":
        raise ValueError(
            f"{type(evict).__name__}.score returned {found.dtype} of shape {found.shape}; "
            f"return one number for each expert, shape ({view.shape.n},)"
        )
    return found


class Ranking:
    """The `Victims` within any limit; the evict decision is asked once for a layer at work."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._evict: Evicts | None = None
        self._score: np.ndarray | None = None
        self._victims: dict[Limit, Victims] = {}

    def begin(self, evict: Evicts) -> None:
        """Another layer: nothing of the last one's holds."""
        self._evict, self._score = evict, None
        self._victims.clear()

    def within(self, limit: Limit) -> Victims:
        """The residents that count for a limit, the lowest score first."""
        victims = self._victims.get(limit)
        if victims is None:
            if self._score is None:
                assert self._evict is not None
                self._score = scores(self._evict, self._view)
            cache = self._view.cache
            victims = Victims(cache, self._score, limit.mask(cache), type(self._evict).__name__)
            self._victims[limit] = victims
        return victims


class Victims:
    """Residents in the order in which they would leave.

    Parameters
    ----------
    cache
        Asked at every turn whether a copy may go: flags are set and copies leave meanwhile.
    score
        ``[n]``.
    mask
        Among whom to choose, bool ``[n]``.
    whose
        The policy's name, for an error.

    Raises
    ------
    ValueError
        The score of one of them is not a number.
    """

    def __init__(
        self, cache: Cache, score: np.ndarray, mask: np.ndarray, whose: str = "the policy"
    ) -> None:
        self._cache = cache
        self._rest = mask.nonzero()[0]  # [m] not in order yet, but for the taken
        self._score = score[self._rest]
        self._taken: np.ndarray | None = None
        if self._score.dtype.kind == "f" and len(self._score) and np.isnan(self._score.max()):
            place = cache.shape.place(int(self._rest[np.isnan(self._score)][0]))
            raise ValueError(
                f"{whose}.score is not a number (NaN) for the resident expert {place}; "
                "return a number for each resident"
            )
        self._order: list[Key] = []
        self._first = 0  # those before it have left

    def allowed(self, held: int) -> Iterator[Key]:
        """Those still resident that have none of the flags ``held``, in order.

        To be used within one layer's step: a copy that came later is not among them, and one that
        left and came back may be passed over. Both are held until the step is over.
        """
        bits_of, held_of = self._cache.bits_of, self._cache.held_of
        at = self._first
        while at < len(self._order) or self._more():
            key = self._order[at]
            if not bits_of[key]:
                self._first += at == self._first
            elif not held_of[key] & held:
                yield key
            at += 1

    def _more(self) -> bool:
        """Put some more in order; False where there are none."""
        if self._taken is not None:
            left = np.ones(len(self._rest), np.bool_)
            left[self._taken] = False
            self._rest, self._score, self._taken = self._rest[left], self._score[left], None
        if not len(self._rest):
            return False
        lowest = self._lowest(max(_FIRST, 3 * len(self._order)))
        keys = self._rest[lowest]
        order = np.lexsort((self._cache.last_use[keys], self._score[lowest]))
        self._order += keys[order].tolist()
        self._taken = lowest
        return True

    def _lowest(self, count: int) -> np.ndarray:
        """Places in ``_rest`` of the lowest ``count``; equals at the edge by their last use."""
        score = self._score
        if count >= len(score):
            return np.arange(len(score))
        edge = np.partition(score, count - 1)[count - 1]
        lowest = (score <= edge).nonzero()[0]
        if len(lowest) == count:
            return lowest
        equal = score[lowest] == edge
        below, equals = lowest[~equal], lowest[equal]
        lack = count - len(below)
        oldest = self._cache.last_use[self._rest[equals]].argpartition(lack - 1)[:lack]
        return np.concatenate((below, equals[oldest]))
