"""Who may leave, in order: the lowest score first, among equals the least recently used.

A layer that lacks room asks the evict decision once for the scores of all experts. As few of them
are put in order as are evicted: the lowest few are selected, more only when those are used up.

n experts of the model, m of them that may go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moelab.scheduling.cache import Cache
from moelab.scheduling.parts import Evicts
from moelab.scheduling.stream import Key, View

_FIRST = 8
"""How many are put in order at first."""


class Limit(NamedTuple):
    """What bounds memory: a layer's share (its keys), a tier's pool, or else the budget."""

    layer: slice | None = None
    tier: int = 0

    def __hash__(self) -> int:
        return hash((self.layer and self.layer.start, self.tier))

    def inside(self, cache: Cache) -> np.ndarray:
        """The resident copies that count, bool ``[n]``."""
        if self.tier:
            return cache.bits == self.tier
        if self.layer is None:
            return cache.bits > 0
        mask = np.zeros(len(cache.bits), np.bool_)
        mask[self.layer] = cache.bits[self.layer] > 0
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


class Victims:
    """Residents in the order in which they would leave.

    Parameters
    ----------
    cache
        Asked again at every turn whether a copy may still go.
    score
        ``[n]``.
    mask
        Who may go, bool ``[n]``.

    Raises
    ------
    ValueError
        The score of one that may go is not a number.
    """

    def __init__(self, cache: Cache, score: np.ndarray, mask: np.ndarray) -> None:
        self._cache = cache
        self._rest = np.flatnonzero(mask)  # [m] not in order yet
        self._score = score[self._rest]
        if np.isnan(self._score).any() if self._score.dtype.kind == "f" else False:
            raise ValueError("a score is not a number (NaN); return a number for each resident")
        self._order: list[Key] = []
        self._first = 0  # those before it are gone for good, or held

    def allowed(self, held: int) -> Iterator[Key]:
        """Those still resident that have none of the flags ``held``, in order.

        Whoever is evicted or held once stays so while this is used: within one layer's step.
        """
        bits_of, held_of = self._cache.bits_of, self._cache.held_of
        at = self._first
        while at < len(self._order) or self._more():
            key = self._order[at]
            if bits_of[key] and not held_of[key] & held:
                yield key
            elif at == self._first:
                self._first += 1
            at += 1

    def _more(self) -> bool:
        """Put some more in order; False where there are none."""
        if not len(self._rest):
            return False
        count = max(_FIRST, 3 * len(self._order))
        lowest = self._lowest(count)
        order = np.lexsort((self._cache.last_use[self._rest[lowest]], self._score[lowest]))
        self._order += self._rest[lowest[order]].tolist()
        left = np.ones(len(self._rest), np.bool_)
        left[lowest] = False
        self._rest, self._score = self._rest[left], self._score[left]
        return True

    def _lowest(self, count: int) -> np.ndarray:
        """Places in ``_rest`` of the lowest ``count``; equals at the edge by their last use."""
        score = self._score
        if count >= len(score):
            return np.arange(len(score))
        edge = np.partition(score, count - 1)[count - 1]
        below, equal = np.flatnonzero(score < edge), np.flatnonzero(score == edge)
        lack = count - len(below)
        if lack < len(equal):
            oldest = np.argpartition(self._cache.last_use[self._rest[equal]], lack - 1)[:lack]
            equal = equal[oldest]
        return np.concatenate((below, equal))
