"""A drafted pass until it is verified: what is rolled back is not learnt from.

The rows of a pass are asked for, loaded and decided over like any others, because nobody knows yet
which of them stand. When that is known, every part that observes is put back to what it knew before
the pass and observes the rows that were kept, and experts that only others asked for have the uses
that they had. What stays is what happened: copies loaded, and who was loaded last.

T rows of a pass, n experts of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from moelab.scheduling.parts import Part
from moelab.scheduling.steps import LayerInput
from moelab.scheduling.stream import View

_COUNTED = ("last_use", "last_token", "uses", "high_uses")


class Unverified:
    """What was known before a drafted pass, and what the pass was given so far.

    Parameters
    ----------
    view
        The scheduler's.
    """

    def __init__(self, view: View) -> None:
        self._view, self._given = view, list[LayerInput]()

    def take(self, given: LayerInput, parts: Sequence[Part]) -> None:
        """A layer's input is about to be observed by these ``parts``."""
        if self._view.shape.begins(given.layer, prefill=given.prefill):
            self._given.clear()
        if given.prefill or len(given.experts) < 2:
            return
        if not self._given:
            self._begin(parts)
        self._given.append(given)

    def _begin(self, parts: Sequence[Part]) -> None:
        view = self._view
        self._parts = [part for part in parts if part.learns]
        known = {id(part): part for part in self._parts}  # who knows whom stays so
        self._knew: list[dict[str, Any]] = copy.deepcopy([vars(p) for p in self._parts], known)
        self._bits = view.bits.copy()
        self._counts = {name: getattr(view.cache, name).copy() for name in _COUNTED}

    def settle(self, kept: int | None) -> None:
        """The first ``kept`` rows of the pass stand; None: all of them."""
        if kept is None or all(len(given.experts) <= kept for given in self._given):
            return
        view, at = self._view, self._view.layer
        for part, knew in zip(self._parts, self._knew, strict=True):
            vars(part).clear()
            vars(part).update(knew)
        for given in self._given:
            view.layer = given.layer
            stands = given.verified(kept)
            for part in self._parts:
                part.observe(stands, view)
            self._forget(given, stands)
        view.layer = at
        self._given.clear()

    def _forget(self, given: LayerInput, stands: LayerInput) -> None:
        """Put back the uses of experts that only rows which do not stand asked for."""
        cache, first = self._view.cache, self._view.shape.offset[given.layer]
        asked, kept = ({r.expert for r in one.requests()} for one in (given, stands))
        keys = [first + expert for expert in asked - kept]
        for name in _COUNTED[1:]:
            getattr(cache, name)[keys] = self._counts[name][keys]
        there = [key for key in keys if self._was_there(key)]
        cache.last_use[there] = self._counts["last_use"][there]

    def _was_there(self, key: int) -> bool:
        """Whether the copy was in memory before the pass: used, not loaded, by it."""
        return bool(self._bits[key]) and self._view.cache.bits[key] == self._bits[key]
